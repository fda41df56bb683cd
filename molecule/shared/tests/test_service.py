"""The service as a user meets it, through the edge."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from labtest import Lab


def submit(lab: Lab, text: str) -> str:
    """Submit *text* and return the new document's id."""
    answer = lab.http("POST", "/v1/documents", {"content": text, "content_type": "text/plain", "title": "check"})
    assert answer.status == 202, answer
    assert answer.body["status"] == "queued"
    identifier: str = answer.body["id"]
    return identifier


def finished(lab: Lab, identifier: str) -> Any:
    """Return the document once it is processed or dead, else None."""
    document = lab.http("GET", f"/v1/documents/{identifier}").body
    return document if document["status"] in ("processed", "dead") else None


def test_a_document_is_processed_once_and_found(lab: Lab, wait_for: Callable[..., Any]) -> None:
    word = f"w{uuid.uuid4().hex}"
    identifier = submit(lab, f"A page about {word} and nothing else.")
    document = wait_for(lambda: finished(lab, identifier), 30, "the document is processed")
    assert document["status"] == "processed"
    assert document["applied"] == 1
    assert word in document["text"]
    listing = lab.http("GET", f"/v1/documents?q={word}").body
    assert [item["id"] for item in listing["items"]] == [identifier]
    assert listing["total"] == 1


def test_the_same_content_is_one_document(lab: Lab) -> None:
    body = {"content": f"twice {uuid.uuid4().hex}", "content_type": "text/plain"}
    first, second = lab.http("POST", "/v1/documents", body), lab.http("POST", "/v1/documents", body)
    assert (first.status, second.status) == (202, 200)
    assert first.body["id"] == second.body["id"]


@pytest.mark.parametrize("token", [None, "atl_" + "A" * 43])
def test_without_a_good_token_nothing_is_taken(lab: Lab, token: str | None) -> None:
    answer = lab.http("POST", "/v1/documents", {"content": "x", "content_type": "text/plain"}, token=token)
    assert answer.status == 401
    assert answer.headers["content-type"].startswith("application/problem+json")


@pytest.mark.parametrize(
    "body", [{}, {"url": "file:///etc/passwd"}, {"content": "x", "content_type": "image/png"}, {"surprise": 1}]
)
def test_bad_requests_are_problems_not_tracebacks(lab: Lab, body: dict[str, Any]) -> None:
    answer = lab.http("POST", "/v1/documents", body)
    assert 400 <= answer.status < 500
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert "Traceback" not in str(answer.body)


def test_content_over_the_limit_is_refused(lab: Lab) -> None:
    answer = lab.http("POST", "/v1/documents", {"content": "x" * 1_200_000, "content_type": "text/plain"})
    assert answer.status == 413


def test_a_page_of_the_origin_is_fetched_and_extracted(lab: Lab, wait_for: Callable[..., Any]) -> None:
    variables = next(iter(lab.facts()["_meta"]["hostvars"].values()))
    origin = f"http://{variables['lab_origin']['address']}"
    page = lab.http("GET", "/pages.txt", token=None, base=origin).body.split()[3]
    identifier = lab.http("POST", "/v1/documents", {"url": f"{origin}/{page.lstrip('/')}"}).body["id"]
    document = wait_for(lambda: finished(lab, identifier), 60, "the page is processed")
    assert document["status"] == "processed", document
    assert len(document["text"]) > 100
    assert "<html" not in document["text"]


def test_a_private_address_is_refused(lab: Lab, wait_for: Callable[..., Any]) -> None:
    """The allow-list opens the origin alone: a lab host that serves HTTP too stays closed."""
    target = f"http://{lab.hosts[lab.group('edge')[0]]}/healthz?{uuid.uuid4().hex}"
    answer = lab.http("POST", "/v1/documents", {"url": target})
    if answer.status != 202:
        assert 400 <= answer.status < 500
        return
    document = wait_for(lambda: finished(lab, answer.body["id"]), 60, "the fetch is refused")
    assert document["status"] == "dead"


def test_health_tells_what_runs(lab: Lab, wait_for: Callable[..., Any]) -> None:
    def healthy() -> Any:
        body = lab.http("GET", "/health", token=None).body
        return body if isinstance(body, dict) and body.get("status") == "ok" else None

    health = wait_for(healthy, 120, "the service is well, and so are its first backups")
    assert health["environment"] == ("staging" if lab.group("database") else "development")
    services = {(worker["host"], worker["service"]) for worker in health["workers"]}
    for host in lab.group("app"):
        for service in ("core", "services", "monitoring"):
            assert (host, service) in services


def test_metrics_are_served(lab: Lab) -> None:
    metrics = lab.http("GET", "/metrics", token=None)
    assert metrics.status in (200, 401)
    if metrics.status == 401:
        metrics = lab.http("GET", "/metrics")
    assert "atlas_" in metrics.body


def test_search_input_is_not_a_query_language_injection(lab: Lab) -> None:
    for query in ('"', "AND OR", "a' OR '1'='1", "*", "col:x NEAR("):
        assert lab.http("GET", f"/v1/documents?q={quote(query)}").status in (200, 400)
