"""What operators do through the API, each time with its effect in the store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select
from test_api import READ_ONLY, TEXT, app, as_worker, client, problem, store_of

from atlas.db import rfc3339
from atlas.documents import Extracted
from atlas.queue import Job, Queue, Result
from atlas.schema import audit, documents, hosts, job_events, jobs

__all__ = ["app", "client"]
READER = {"Authorization": f"Bearer {READ_ONLY}"}


@pytest.fixture
def letters(client: FlaskClient, app: Flask) -> Iterator[list[int]]:
    """Dead letters: two of a.test, one of b.test; and a job that waits. The ids of all four."""
    queue = as_worker(app)
    ids = []
    for page, error_class in (("a.test/1", "not_found"), ("a.test/2", "parse_error"), ("b.test/1", "not_found")):
        ids.append(client.post("/v1/documents", json={"url": f"http://{page}"}).get_json()["job_id"])
        assert queue.fail(queue.claim()[0], error_class, f"no http://{page}") == "dead"
    ids.append(client.post("/v1/documents", json=TEXT).get_json()["job_id"])
    yield ids


def states(app: Flask) -> dict[int, str]:
    with store_of(app).read() as connection:
        return dict(connection.execute(select(jobs.c.id, jobs.c.state)).all())


def stored(app: Flask) -> int:
    with store_of(app).read() as connection:
        return connection.scalar(select(func.count()).select_from(documents)) or 0


def recorded(app: Flask, object_type: str = "job") -> list[tuple[str, str, str | None]]:
    with store_of(app).read() as connection:
        query = select(audit.c.actor, audit.c.action, audit.c.object_id).where(audit.c.object_type == object_type)
        return [tuple(row) for row in connection.execute(query.order_by(audit.c.id))]


def found(client: FlaskClient, path: str, **query: Any) -> list[int]:
    answer = client.get(path, query_string=query)
    assert answer.status_code == 200, answer.text
    body = answer.get_json()
    ids = [item["id"] for item in body["items"]]
    assert body["total"] == len(ids) and body["next"] is None
    return ids


def test_jobs_are_listed_by_what_is_asked(client: FlaskClient, app: Flask, letters: list[int]) -> None:
    one, two, three, waiting = letters
    assert found(client, "/v1/jobs") == [waiting, three, two, one]
    assert found(client, "/v1/jobs", state="ready") == [waiting] and found(client, "/v1/jobs", state="done") == []
    assert found(client, "/v1/jobs", host="a.test", error_class="parse_error") == [two]
    [job] = as_worker(app).claim()
    assert found(client, "/v1/jobs", state="running") == [job.id] == [waiting]
    first = client.get("/v1/jobs?limit=3", headers=READER).get_json()
    second = client.get(f"/v1/jobs?limit=3&cursor={first['next']}").get_json()
    assert [len(first["items"]), len(second["items"]), first["total"], second["next"]] == [3, 1, 4, None]
    with store_of(app).read() as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == two)).one()
    shown = client.get(f"/v1/jobs/{two}", headers=READER).get_json()
    assert {key: shown[key] for key in ("id", "document_id", "state", "host", "attempts", "error_class", "error")} == {
        "id": two,
        "document_id": row.document_id,
        "state": "dead",
        "host": "a.test",
        "attempts": 1,
        "error_class": "parse_error",
        "error": "no http://a.test/2",
    }
    assert (shown["created_at"], shown["finished_at"]) == (rfc3339(row.created_at), rfc3339(row.finished_at))
    for query in ("state=lost", "limit=0", "cursor=x", "since=now"):
        problem(client.get(f"/v1/jobs?{query}"), 422)


def test_dead_letters_are_listed_and_inspected(client: FlaskClient, app: Flask, letters: list[int]) -> None:
    one, two, three, waiting = letters
    assert found(client, "/v1/dead-letters") == [three, two, one]
    assert found(client, "/v1/dead-letters", host="a.test") == [two, one]
    assert found(client, "/v1/dead-letters", error_class="not_found") == [three, one]
    assert found(client, "/v1/dead-letters", since="2999-01-01T00:00:00Z") == []
    assert found(client, "/v1/dead-letters", until="2999-01-01T00:00:00Z") == [three, two, one]
    client.post(f"/v1/dead-letters/{one}:requeue")
    queue = as_worker(app)
    (again,) = [job for job in queue.claim(2) if job.id == one]
    queue.fail(again, "client_error", "again")
    shown = client.get(f"/v1/dead-letters/{one}").get_json()
    assert [(event["event"], event["error_class"], event["error"]) for event in shown["events"]] == [
        ("died", "not_found", "no http://a.test/1"),
        ("requeued", "not_found", "no http://a.test/1"),
        ("died", "client_error", "again"),
    ]
    problem(client.get(f"/v1/dead-letters/{waiting}"), 404)
    problem(client.get(f"/v1/dead-letters/{one}", headers=READER), 403)


def test_one_dead_letter_is_requeued(client: FlaskClient, app: Flask, letters: list[int]) -> None:
    one, two, three, waiting = letters
    problem(client.post(f"/v1/dead-letters/{one}:requeue", headers=READER), 403)
    problem(client.post(f"/v1/dead-letters/{waiting}:requeue"), 404)
    assert states(app) == {one: "dead", two: "dead", three: "dead", waiting: "ready"} and recorded(app) == []
    assert client.post(f"/v1/dead-letters/{one}:requeue").get_json() == {"id": one, "state": "ready"}
    assert states(app) == {one: "ready", two: "dead", three: "dead", waiting: "ready"}
    with store_of(app).read() as connection:
        assert connection.scalar(select(jobs.c.attempts).where(jobs.c.id == one)) == 0
    assert recorded(app) == [("all", "requeued", str(one))]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"host": "a.test"}, [0, 1]),
        ({"error_class": "not_found"}, [0, 2]),
        ({"host": "a.test", "error_class": "not_found"}, [0]),
        ({"until": "2000-01-01T00:00:00Z"}, []),
        ({"since": "2000-01-01T00:00:00Z"}, [0, 1, 2]),
        ({"all": True}, [0, 1, 2]),
    ],
)
def test_dead_letters_are_requeued_by_filter(
    client: FlaskClient, app: Flask, letters: list[int], asked: dict[str, Any], chosen: list[int]
) -> None:
    answer = client.post("/v1/dead-letters:requeue", json=asked).get_json()
    assert answer == {"count": len(chosen), "state": "ready", "more": False}
    assert states(app) == {id_: "ready" if n in [*chosen, 3] else "dead" for n, id_ in enumerate(letters)}
    assert recorded(app) == [("all", "requeued", None)] * bool(chosen)


def test_dead_letters_are_discarded_with_their_documents(client: FlaskClient, app: Flask, letters: list[int]) -> None:
    one, two, three, waiting = letters
    problem(client.post("/v1/dead-letters:discard", json={"host": "a.test"}, headers=READER), 403)
    for wrong in ({}, {"all": False}, {"all": True, "host": "a.test"}, {"ids": [one]}):
        problem(client.post("/v1/dead-letters:discard", json=wrong), 422)
    problem(client.post(f"/v1/dead-letters/{waiting}:discard"), 404)
    assert (len(states(app)), stored(app), recorded(app)) == (4, 4, [])
    assert client.post(f"/v1/dead-letters/{three}:discard").get_json() == {"id": three, "state": "discarded"}
    assert states(app) == {one: "dead", two: "dead", waiting: "ready"} and stored(app) == 3
    answer = client.post("/v1/dead-letters:discard", json={"all": True}).get_json()
    assert answer == {"count": 2, "state": "discarded", "more": False}
    assert states(app) == {waiting: "ready"} and stored(app) == 1
    assert recorded(app) == [("all", "discarded", str(three)), ("all", "discarded", None)]
    again = client.post("/v1/documents", json={"url": "http://a.test/1"})
    assert again.status_code == 202, "what was discarded may come again"


def test_a_breaker_is_listed_and_reset(client: FlaskClient, app: Flask, letters: list[int]) -> None:
    shared = app.extensions["atlas"]
    queue = Queue(store_of(app), "worker", 7, limits=shared.queue.limits, attempts=99, random_delay=lambda _: 0)
    client.post("/v1/documents", json={"url": "http://c.test/"})
    for _ in range(shared.queue.limits.failures):
        (job,) = (job for job in queue.claim(9) if job.host == "c.test")
        queue.fail(job, "network", "refused")
    breaker = client.get("/v1/breakers?state=open", headers=READER).get_json()
    assert [(host["name"], host["state"], host["error"]) for host in breaker["items"]] == [
        ("c.test", "open", "network")
    ]
    problem(client.post("/v1/breakers/c.test:reset", headers=READER), 403)
    problem(client.post("/v1/breakers/d.test:reset"), 404)
    assert host_state(app) == "open" and recorded(app, "breaker") == []
    assert client.post("/v1/breakers/c.test:reset").get_json()["state"] == "closed"
    assert host_state(app) == "closed" and recorded(app, "breaker") == [("all", "reset", "c.test")]
    assert [job.host for job in queue.claim(9)] == ["c.test"], "it is asked again at once"


def host_state(app: Flask) -> str | None:
    with store_of(app).read() as connection:
        return connection.scalar(select(hosts.c.state).where(hosts.c.name == "c.test"))


def test_a_deleted_document_leaves_nothing_behind(client: FlaskClient, app: Flask) -> None:
    queue, shared = as_worker(app), app.extensions["atlas"]
    queue.retry_cap_seconds = 0

    def fail(job: Job) -> None:
        assert queue.fail(job, "network", "cannot reach sesame") == "ready"

    kept = client.post("/v1/documents", json=TEXT | {"content": "kept"}).get_json()
    gone = client.post("/v1/documents", json=TEXT | {"content": "open sesame", "title": "sesame"}).get_json()
    for job in queue.claim(2):
        fail(job)
    queue.finish([Result(job, Extracted("open sesame")) for job in queue.claim(2)], shared.documents.store)
    assert client.delete(f"/v1/documents/{gone['id']}").status_code == 204
    with store_of(app).read() as connection:
        for table in (documents, jobs, job_events):
            key = table.c.id if table is documents else table.c.document_id
            assert set(connection.scalars(select(key))) == {kept["id"]}, table.name
        assert connection.scalar(select(func.count()).select_from(job_events)) == 2
    # So does a dead letter that is discarded with its document.
    client.post("/v1/documents", json={"url": "http://a.test/sesame"})
    queue.fail(queue.claim()[0], "not_found", "no http://a.test/sesame")
    assert client.post("/v1/dead-letters:discard", json={"all": True}).get_json()["count"] == 1
    with store_of(app).read() as connection:
        assert set(connection.scalars(select(job_events.c.document_id))) == {kept["id"]}
