"""The HTTP interface on both stores, through Flask's test client."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import open_database
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select

from atlas import db as db_module
from atlas.api import create_app
from atlas.api import state as state_module
from atlas.db import Database
from atlas.documents import Extracted
from atlas.queue import Queue, Result
from atlas.schema import documents
from atlas.settings import Identity, Settings, TokenLimits, TokenSpec
from atlas.tokens import Tokens

ALL = "atl_" + "a" * 43
READ_ONLY = "atl_" + "r" * 43
LIMITED = "atl_" + "l" * 43
TEXT = {"content": "Some words to keep.", "content_type": "text/plain"}


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    store = open_database(database_url)
    Tokens(store).apply(
        [
            TokenSpec(name="all", sha256=digest(ALL), scopes=["ingest", "read", "operate"], limits=None),
            TokenSpec(name="reader", sha256=digest(READ_ONLY), scopes=["read"]),
            TokenSpec(name="limited", sha256=digest(LIMITED), scopes=["read"], limits=TokenLimits(per_minute=2)),
        ]
    )
    store.close()
    settings = Settings(
        environment="development",
        database_url=database_url,
        database_role="atlas" if database_url.startswith("postgresql") else None,
        fernet_keys=Fernet.generate_key().decode(),
        content_limit_bytes=1000,
        queue_limit=5,
    )
    app = create_app(settings, Identity(7, "0.1.0-0123456789ab", "green", "test1"))
    yield app
    app.extensions["atlas"].database.close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {ALL}"
    return client


def store_of(app: Flask) -> Database:
    database: Database = app.extensions["atlas"].database
    return database


def as_worker(app: Flask) -> Queue:
    """The queue as a worker of an admitted deployment sees it."""
    from atlas import admission

    admission.admit(store_of(app), 7)
    return Queue(store_of(app), "worker", 7)


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/problem+json"
    body: dict[str, Any] = answer.get_json()
    assert body["status"] == status and body["title"] and body["request_id"] == answer.headers["X-Request-Id"]
    return body


def test_a_document_goes_in_and_comes_out(client: FlaskClient, app: Flask) -> None:
    taken = client.post("/v1/documents", json=TEXT | {"title": "Words", "tags": ["x"], "priority": "high"})
    assert taken.status_code == 202
    body = taken.get_json()
    assert body["status"] == "queued" and taken.headers["Location"] == f"/v1/documents/{body['id']}"
    again = client.post("/v1/documents", json=TEXT)
    assert again.status_code == 200 and again.get_json()["id"] == body["id"]
    queue = as_worker(app)
    queue.finish(
        [Result(job, Extracted("Some words to keep.")) for job in queue.claim(9)],
        app.extensions["atlas"].documents.store,
    )
    shown = client.get(f"/v1/documents/{body['id']}").get_json()
    assert (shown["status"], shown["title"], shown["tags"], shown["applied"]) == ("processed", "Words", ["x"], 1)
    assert shown["text"] == "Some words to keep." and re.fullmatch(r"[\d-]{10}T[\d:.]{12}Z", shown["created_at"])
    found = client.get("/v1/documents?q=words").get_json()
    assert found["total"] == 1 and found["items"][0]["id"] == body["id"] and "**words**" in found["items"][0]["snippet"]
    listed = client.get("/v1/documents").get_json()
    assert [item["id"] for item in listed["items"]] == [body["id"]] and "text" not in listed["items"][0]
    job = client.get(f"/v1/jobs/{body['job_id']}").get_json()
    assert (job["state"], job["priority"], [event["event"] for event in job["events"]]) == (
        "done",
        "high",
        ["finished"],
    )
    assert "payload" not in job


def test_202_means_committed(client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = app.extensions["atlas"]
    monkeypatch.setattr(shared.queue, "enqueue_many", lambda *_: 1 / 0)
    problem(client.post("/v1/documents", json=TEXT), 500)
    with store_of(app).read() as connection:
        assert connection.execute(select(documents)).all() == []


def test_lists_have_pages(client: FlaskClient) -> None:
    ids = [client.post("/v1/documents", json=TEXT | {"content": f"n{number}"}).get_json()["id"] for number in range(3)]
    first = client.get("/v1/documents?limit=2").get_json()
    second = client.get(f"/v1/documents?limit=2&cursor={first['next']}").get_json()
    assert [item["id"] for item in first["items"] + second["items"]] == ids[::-1] and second["next"] is None
    for query in ("limit=0", "limit=201", "limit=x", "cursor=zzz"):
        problem(client.get(f"/v1/documents?{query}"), 422)


def test_a_document_is_deleted_once_and_that_is_recorded(client: FlaskClient) -> None:
    taken = client.post("/v1/documents", json=TEXT).get_json()
    path = f"/v1/documents/{taken['id']}"
    problem(client.delete(path, headers={"Authorization": f"Bearer {READ_ONLY}"}), 403)
    answer = client.delete(path)
    assert (answer.status_code, answer.data, "Content-Length" in answer.headers) == (204, b"", False)
    for gone in (client.delete(path), client.get(path), client.get(f"/v1/jobs/{taken['job_id']}")):
        problem(gone, 404)
    (entry,) = client.get("/v1/audit", query_string={"object_type": "document"}).get_json()["items"]
    assert (entry["actor"], entry["action"], entry["object_id"]) == ("all", "deleted", taken["id"])


def test_what_no_store_can_hold_is_refused_and_tells_nothing(client: FlaskClient) -> None:
    for path in ("/v1/documents/%00", "/v1/documents/%ff", f"/v1/jobs/{10**30}", "/v1/feeds/%00", "/%0d%0aX-Evil:%201"):
        answer = client.get(path)
        problem(answer, 404)
        assert "X-Evil" not in answer.headers
    for query in ("q=%00", "tag=%00", "cursor=%00", f"cursor={10**17}0", "limit=1e400", "limit=%ff", "status=%00"):
        problem(client.get(f"/v1/documents?{query}"), 422)
    assert client.get("/v1/documents?q=%ff&tag=%ed%a0%80").status_code == 200
    for body in (
        '{"host": "a\\u0000"}',
        '{"since": 5}',
        '{"error_class": "\\ud800"}',
        '{"until": "0001-01-01T00:00:00+14:00"}',
    ):
        answer = client.post("/v1/dead-letters:requeue", data=body, content_type="application/json")
        assert answer.status_code in (200, 400, 422), answer.text
        assert "Traceback" not in answer.text and "psycopg" not in answer.text and "SELECT" not in answer.text
    assert client.post("/v1/documents", data="[" * 100_000, content_type="application/json").status_code in (400, 413)
    nested = "{" + '"a":{' * 900 + "}" * 901
    problem(client.post("/v1/documents", data=nested, content_type="application/json"), 400)


def test_lists_take_filters(client: FlaskClient) -> None:
    one = client.post("/v1/documents", json=TEXT | {"tags": ["ä b"]}).get_json()["id"]
    two = client.post("/v1/documents", json={"url": "http://example.org/"}).get_json()["id"]

    def ids(**query: str) -> list[str]:
        return [item["id"] for item in client.get("/v1/documents", query_string=query).get_json()["items"]]

    assert ids(tag="ä b") == [one] and ids(url="http://EXAMPLE.org") == [two] and ids(status="queued") == [two, one]
    assert ids(status="dead") == ids(q="words", tag="ä b") == []
    for query in ({"status": "x"}, {"url": "x"}, {"q": "x", "status": "dead"}, {"tag": "\0"}, {"limit": "9" * 40}):
        problem(client.get("/v1/documents", query_string=query), 422)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "either url or content"),
        ({"url": "http://a.test/", **TEXT}, "either url or content"),
        ({"content": "x"}, "content_type"),
        ({"content": "x", "content_type": "application/pdf"}, "content_type"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "http://user:pw@a.test/"}, "url"),
        ({"url": "http://a.test/", "content_type": "text/html"}, "content_type"),
        (TEXT | {"priority": "urgent"}, "priority"),
        (TEXT | {"tags": "x"}, "tags"),
        (TEXT | {"extra": 1}, "extra"),
        ({"url": "gopher://a.test/"}, "must begin with http:// or https://"),
        ({"url": "http://a.test/\r\nX: y"}, "url"),
        *(
            ({"url": "http://a.test/", "sensitive": sensitive}, "sensitive")
            for sensitive in (
                {"headers": {"X-Key": "a\r\nX-Other: b"}},
                {"headers": {"X-Key\n": "a"}},
                {"headers": {"Host": "inside.test"}},
                {"headers": {"x-key": "a", "X-Key": "b"}},
                {"cookies": {"c": "a; d=b"}},
                {"cookies": {"c": "a\n"}},
                {"password": "without a name"},
                {"username": "a:b", "password": "c"},
                {"key": "value"},
            )
        ),
    ],
)
def test_a_bad_document_is_refused_with_its_field(client: FlaskClient, document: dict[str, Any], field: str) -> None:
    assert field in problem(client.post("/v1/documents", json=document), 422)["detail"]


def test_bodies_that_are_no_document(client: FlaskClient) -> None:
    problem(client.post("/v1/documents", data=b"{", content_type="application/json"), 400)
    problem(client.post("/v1/documents", data=b"\xff", content_type="application/json"), 400)
    problem(client.post("/v1/documents", data="{}", content_type="text/plain"), 415)
    problem(client.post("/v1/documents", json=TEXT | {"content": "é" * 501}), 413)
    problem(client.post("/v1/documents", data=b" " * 100_000, content_type="application/json"), 413)
    assert client.post("/v1/documents", json=TEXT | {"content": "é" * 500}).status_code == 202


def test_what_is_not_there(client: FlaskClient) -> None:
    for path in ("/v1/documents/nothing", "/v1/jobs/99", "/v1/nothing", "/v1/jobs/x"):
        problem(client.get(path), 404)
    problem(client.post("/v1/dead-letters/99:requeue"), 404)
    assert "GET" in client.delete("/v1/documents").headers["Allow"]
    problem(client.delete("/v1/documents"), 405)


def test_a_full_queue_is_503_with_retry_after(client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        assert client.post("/v1/documents", json=TEXT | {"content": f"n{number}"}).status_code == 202
    full = client.post("/v1/documents", json=TEXT)
    problem(full, 503)
    assert full.headers["Retry-After"] == "5"
    assert 'atlas_documents_submitted_total{outcome="refused"} 1.0' in client.get("/metrics").text


def test_tokens_and_scopes(client: FlaskClient) -> None:
    for value in ("", "Bearer", "Bearer wrong", f"Basic {ALL}", f"Bearer {ALL}x"):
        answer = client.get("/v1/documents", headers={"Authorization": value})
        problem(answer, 401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    reader = {"Authorization": f"Bearer {READ_ONLY}"}
    assert client.get("/v1/documents", headers=reader).status_code == 200
    problem(client.post("/v1/documents", json=TEXT, headers=reader), 403)
    problem(client.get("/v1/dead-letters", headers=reader), 403)


def test_a_token_has_its_own_rate_limit(client: FlaskClient) -> None:
    limited = {"Authorization": f"Bearer {LIMITED}"}
    codes = [client.get("/v1/documents", headers=limited) for _ in range(4)]
    # A minute may end between two of them, so at least one of four is over the limit of two.
    over = [answer for answer in codes if answer.status_code == 429]
    assert over and 1 <= int(over[0].headers["Retry-After"]) <= 61
    problem(over[0], 429)
    assert client.get("/v1/documents").status_code == 200


def test_dead_letters_are_listed_and_requeued(client: FlaskClient, app: Flask) -> None:
    queue = as_worker(app)
    taken = client.post("/v1/documents", json=TEXT).get_json()
    queue.fail(queue.claim(1)[0], "parse_error", "unreadable")
    (letter,) = client.get("/v1/dead-letters").get_json()["items"]
    assert (letter["id"], letter["error_class"], letter["error"]) == (taken["job_id"], "parse_error", "unreadable")
    assert client.get(f"/v1/documents/{taken['id']}").get_json()["status"] == "dead"
    assert client.post(f"/v1/dead-letters/{letter['id']}:requeue").get_json()["state"] == "ready"
    assert client.get("/v1/dead-letters").get_json() == {"items": [], "total": 0, "next": None}
    assert client.get(f"/v1/documents/{taken['id']}").get_json()["status"] == "queued"
    problem(client.post(f"/v1/dead-letters/{letter['id']}:requeue"), 404)


def test_sensitive_fields_are_stored_encrypted_and_never_shown(client: FlaskClient, app: Flask) -> None:
    taken = client.post("/v1/documents", json=TEXT | {"sensitive": {"cookies": {"c": "open-sesame"}}}).get_json()
    assert "sesame" not in client.get(f"/v1/documents/{taken['id']}").text
    with store_of(app).read() as connection:
        stored = connection.scalar(select(documents.c.sensitive))
    assert stored and "sesame" not in stored
    work = app.extensions["atlas"].documents.work([taken["id"]])[taken["id"]]
    assert work.sensitive == {"cookies": {"c": "open-sesame"}}


def test_every_answer_names_release_slot_and_request(client: FlaskClient) -> None:
    for path in ("/healthz", "/readyz", "/health", "/metrics", "/", "/v1/documents", "/nothing"):
        headers = client.get(path, headers={"X-Request-Id": "abc-1"}).headers
        assert (headers["X-Atlas-Release"], headers["X-Atlas-Slot"]) == ("0.1.0-0123456789ab", "green")
        assert headers["X-Request-Id"] == "abc-1"
    odd = client.get("/healthz", headers={"X-Request-Id": 'x" injected'}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{16}", odd)


def test_health_readiness_and_status_page_hold_no_secret(client: FlaskClient, app: Flask) -> None:
    anonymous = app.test_client()
    ready = anonymous.get("/readyz")
    assert ready.status_code == 200 and set(ready.get_json()["checks"].values()) == {"ok"}
    health = anonymous.get("/health").get_json()
    assert (health["status"], health["deployment"], health["slot"], health["host"]) == ("ok", 7, "green", "test1")
    assert health["queue"]["ready"] == 0 and health["keyring"]["keys"] == 1 and health["workers"] == []
    page = anonymous.get("/").text
    assert "0.1.0-0123456789ab" in page and "<script" not in page
    secret = app.extensions["atlas"].settings.fernet_keys.get_secret_value()
    for text in (page, json.dumps(health), ready.text, anonymous.get("/metrics").text):
        assert secret not in text and ALL not in text and digest(ALL) not in text


def test_readiness_follows_draining_schema_and_store(
    client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = app.extensions["atlas"]
    shared.draining = lambda: True
    assert client.get("/readyz").get_json()["checks"]["draining"] == "this process is stopping"
    assert client.get("/readyz").status_code == 503
    shared.draining = lambda: False
    newer = state_module.migrations.SchemaStatus("9999", "0001", False, False)
    monkeypatch.setattr(state_module.migrations, "status", lambda _database: newer)
    shared.pulse._schema_at = float("-inf")
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "9999" in answer.get_json()["checks"]["schema"]
    shared.database.close()
    monkeypatch.setattr(db_module.Database, "now", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "gone" in answer.get_json()["checks"]["database"]
    assert client.get("/healthz").status_code == 200 and client.get("/health").get_json()["status"] == "degraded"
