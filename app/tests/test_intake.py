"""The way in, on both stores: batches, repeated requests, limits, and what many processes bring at the same moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, open_database
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, insert, select
from test_api import ALL, LIMITED, READ_ONLY, TEXT, app, as_worker, client, digest, problem, store_of

from atlas.db import Database
from atlas.documents import Documents, Extracted, KeyReused, Outcome, Repeat, Submission, Submitted
from atlas.queue import Result
from atlas.schema import documents as table
from atlas.schema import idempotency_keys, jobs, queue_samples
from atlas.settings import TokenLimits, TokenSpec
from atlas.tokens import Token, Tokens

__all__ = ["app", "client"]
HERE = Path(__file__).parent


def count(database: Database, *tables: Any) -> list[int]:
    with database.read() as connection:
        return [connection.scalar(select(func.count()).select_from(each)) or 0 for each in tables]


def batch(client: FlaskClient, lines: list[Any], **headers: str) -> Any:
    body = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return client.post("/v1/documents:batch", data=body, content_type="application/x-ndjson", headers=headers)


def text(content: str, **values: Any) -> dict[str, Any]:
    return {"content": content, "content_type": "text/plain"} | values


def test_each_line_of_a_batch_has_its_own_outcome(client: FlaskClient, app: Flask) -> None:
    first = client.post("/v1/documents", json=text("known")).get_json()
    answer = batch(
        client,
        [
            text("new", title="Title", tags=["a"], priority="high"),
            text("known"),
            b"",
            b"{",
            b'{"content": "\xff", "content_type": "text/plain"}',
            text("x", colour="red"),
            {"url": "file:///etc/passwd"},
            text("é" * 501),
            text("new"),
            {"url": "http://example.org/a"},
        ],
    )
    assert answer.status_code == 200
    body = answer.get_json()
    codes = {item["line"]: item["code"] for item in body["items"]}
    assert codes == {1: 202, 2: 200, 4: 400, 5: 400, 6: 422, 7: 422, 8: 413, 9: 200, 10: 202}
    assert (body["created"], body["duplicates"], body["refused"]) == (2, 2, 5)
    items = {item["line"]: item for item in body["items"]}
    assert (items[1]["status"], items[2]["id"], items[9]["id"]) == ("queued", first["id"], items[1]["id"])
    assert items[6]["problem"]["status"] == 422 and "colour" in items[6]["problem"]["detail"]
    assert "http://" in items[7]["problem"]["detail"] and "id" not in items[7]
    assert client.get(f"/v1/documents/{items[1]['id']}").get_json()["tags"] == ["a"]
    assert client.get(f"/v1/jobs/{items[1]['job_id']}").get_json()["priority"] == "high"
    assert count(store_of(app), table, jobs) == [3, 3]
    metrics = client.get("/metrics").text
    assert 'atlas_documents_submitted_total{outcome="created"} 3.0' in metrics


def test_a_batch_is_one_transaction(client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = app.extensions["atlas"]
    monkeypatch.setattr(shared.queue, "enqueue_many", lambda *_: 1 / 0)
    problem(batch(client, [text("a"), text("b")]), 500)
    assert count(store_of(app), table, jobs) == [0, 0]


def test_what_is_no_batch(client: FlaskClient, app: Flask) -> None:
    problem(client.post("/v1/documents:batch", json=TEXT), 415)
    problem(batch(client, [b" ", b""]), 422)
    shared = app.extensions["atlas"]
    shared.settings = shared.settings.model_copy(update={"batch_limit": 2})
    assert "at most 2" in problem(batch(client, [text("a"), text("b"), text("c")]), 413)["detail"]
    problem(batch(client, [b" " * 100_000]), 413)
    assert count(store_of(app), table) == [0]


def test_a_batch_meets_a_full_queue_line_by_line(client: FlaskClient) -> None:
    answer = batch(client, [text("low", priority="low")] + [text(f"{n}") for n in range(6)] + [text("0")])
    codes = [item["code"] for item in answer.get_json()["items"]]
    assert codes == [202, 202, 202, 202, 202, 503, 503, 200]
    assert "priority normal" in answer.get_json()["items"][5]["problem"]["detail"]


@pytest.fixture
def limited(app: Flask) -> FlaskClient:
    """A client whose token may take in three documents in a minute."""
    tokens = [
        TokenSpec(name="all", sha256=digest(ALL), scopes=["ingest", "read", "operate"], limits=None),
        TokenSpec(name="three", sha256=digest(LIMITED), scopes=["ingest"], limits=TokenLimits(per_minute=3)),
    ]
    Tokens(store_of(app)).apply(tokens)
    app.extensions["atlas"].database.clock = Clock()
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {LIMITED}"
    return client


def test_each_line_of_a_batch_counts_against_the_token(limited: FlaskClient) -> None:
    answer = batch(limited, [text("a"), b"{", text("b"), text("c"), text("d")])
    items = answer.get_json()["items"]
    assert [item["code"] for item in items] == [202, 400, 202, 429, 429]
    assert "rate limit" in items[3]["problem"]["detail"]
    for over in (batch(limited, [text("c")]), limited.post("/v1/documents", json=text("c"))):
        problem(over, 429)
        assert 1 <= int(over.headers["Retry-After"]) <= 60


def test_limits_hold_for_all_processes_and_windows_pass(database: Database, clock: Clock) -> None:
    one, other = Tokens(database), Tokens(database)
    token = Token("t", "x", frozenset(), TokenLimits(per_minute=2, per_hour=5))
    assert [one.spend(token), other.spend(token), one.spend(token), other.spend(token)] == [
        (1, 0),
        (1, 0),
        (0, 60),
        (0, 60),
    ]
    clock.advance(59)
    assert Tokens(database).spend(token) == (0, 1)
    clock.advance(1)
    assert Tokens(database).spend(token, 9) == (2, 60)
    clock.advance(60)
    assert Tokens(database).spend(token, 2) == (1, 3600 - 120)
    clock.advance(3600 - 120)
    assert Tokens(database).spend(token) == (1, 0)
    assert one.spend(Token("t", "y", frozenset(), None), 10**6) == (10**6, 0)


def test_a_high_limit_is_spent_in_pieces_and_never_exceeded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = Token("t", "x", frozenset(), TokenLimits(per_minute=1800, per_hour=2000))
    processes = [Tokens(database), Tokens(database)]
    asked: list[int] = []
    for each in processes:
        reserve = each._reserve
        monkeypatch.setattr(each, "_reserve", lambda *given, reserve=reserve: asked.append(1) or reserve(*given))
    granted = [each.spend(token)[0] for _ in range(1000) for each in processes]
    assert 1794 <= sum(granted) <= 1800
    assert len(asked) < 620


def test_statistics_tell_what_there_is(client: FlaskClient, app: Flask) -> None:
    shared = app.extensions["atlas"]
    shared.database.clock = Clock()
    batch(client, [text("a"), text("b", priority="high"), {"url": "http://h/"}, text("c", priority="low")])
    queue = as_worker(app)
    for job in queue.claim(3):
        if job.document_id in {item.id for item in shared.documents.list(url="http://h/").items}:
            queue.fail(job, "not_found", "404")
        elif job.priority == 0:
            queue.finish([Result(job, Extracted("b"))], shared.documents.store)
    Tokens(store_of(app)).spend(Token("x", digest(LIMITED), frozenset(), TokenLimits()), 3)
    with store_of(app).write() as connection:
        now = shared.database.now(connection)
        for minutes, finished in ((1, 2), (90, 10), (60 * 30, 500)):
            values = {"at": now - minutes * 60_000, "ready": 0, "running": 0, "dead": 0, "failed": 1}
            connection.execute(insert(queue_samples).values(values | {"finished": finished}))
    found = client.get("/v1/statistics").get_json()
    assert found["documents"] == {"total": 4, "queued": 1, "processing": 1, "processed": 1, "dead": 1}
    assert found["queue"]["ready"] == {"high": 0, "normal": 0, "low": 1} and found["queue"]["limit"] == 5
    assert found["queue"]["running"]["normal"] == found["queue"]["dead"]["normal"] == 1
    assert found["throughput"]["hour"] == {"finished": 2, "failed": 1}
    assert found["throughput"]["day"] == {"finished": 12, "failed": 2}
    assert found["dead_letters"] == {"not_found": 1}
    assert found["tokens"] == [{"name": "limited", "minute": 3, "hour": 3}]
    reader = {"Authorization": f"Bearer {READ_ONLY}"}
    assert client.get("/v1/statistics", headers=reader).get_json()["tokens"] == []


def test_the_same_key_and_body_get_the_same_answer(client: FlaskClient, app: Flask) -> None:
    key = {"Idempotency-Key": "order-1"}
    first = client.post("/v1/documents", json=TEXT, headers=key)
    again = client.post("/v1/documents", json=TEXT, headers=key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.get_json() == again.get_json() and first.headers["Location"] == again.headers["Location"]
    assert "Idempotency-Key" in problem(client.post("/v1/documents", json=text("other"), headers=key), 409)["detail"]
    problem(batch(client, [TEXT], **key), 409)
    assert client.post("/v1/documents", json=TEXT).status_code == 200, "without the key it is a duplicate"
    assert count(store_of(app), table, jobs) == [1, 1]
    assert 'outcome="created"} 1.0' in client.get("/metrics").text
    for bad in ("", "a b", "é", "x" * 256):
        problem(client.post("/v1/documents", json=TEXT, headers={"Idempotency-Key": bad}), 422)


def test_keys_belong_to_their_token(client: FlaskClient, app: Flask) -> None:
    tokens = [
        TokenSpec(name=secret[-1], sha256=digest(secret), scopes=["ingest"], limits=None) for secret in (ALL, LIMITED)
    ]
    Tokens(store_of(app)).apply(tokens)
    answers = [
        client.post(
            "/v1/documents", json=text(secret), headers={"Authorization": f"Bearer {secret}", "Idempotency-Key": "k"}
        )
        for secret in (ALL, LIMITED)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]


def test_a_batch_can_be_repeated(client: FlaskClient) -> None:
    first = batch(client, [text("a"), b"{"], **{"Idempotency-Key": "k"})
    again = batch(client, [text("a"), b"{"], **{"Idempotency-Key": "k"})
    assert first.get_json() == again.get_json() and first.get_json()["items"][0]["code"] == 202


def test_a_refusal_is_not_remembered(client: FlaskClient, app: Flask) -> None:
    shared = app.extensions["atlas"]
    documents: Documents = shared.documents
    limit, documents.settings = documents.settings, documents.settings.model_copy(update={"queue_limit": 0})
    key = {"Idempotency-Key": "k"}
    problem(client.post("/v1/documents", json=TEXT, headers=key), 503)
    problem(client.post("/v1/documents", json=text("", url="file:///"), headers=key), 422)
    documents.settings = limit
    assert client.post("/v1/documents", json=TEXT, headers=key).status_code == 202


def test_a_key_is_stored_with_its_document_or_not_at_all(
    client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = app.extensions["atlas"]
    with monkeypatch.context() as broken:
        broken.setattr(shared.documents, "_remember", lambda *_: 1 / 0)
        problem(client.post("/v1/documents", json=TEXT, headers={"Idempotency-Key": "k"}), 500)
    assert count(store_of(app), table, jobs, idempotency_keys) == [0, 0, 0]
    assert client.post("/v1/documents", json=TEXT, headers={"Idempotency-Key": "k"}).status_code == 202


def test_keys_are_forgotten_in_time(documents: Documents, clock: Clock) -> None:
    def send(content: str) -> Any:
        def render(outcomes: Any) -> tuple[int, Any]:
            return 202, outcomes[0].id

        submission = Submission(content=content, content_type="text/plain")
        return documents.answer([submission], render, Repeat("t", "k", content))

    first = send("a")
    clock.advance(23 * 3600)
    assert documents.clean()["idempotency_keys"] == 0
    assert send("a") == first
    with pytest.raises(KeyReused):
        send("b")
    clock.advance(2 * 3600)
    assert documents.clean()["idempotency_keys"] == 1
    assert send("b") != first


def test_many_processes_bring_the_same_at_the_same_moment(database_url: str) -> None:
    command = [sys.executable, "intake_process.py", database_url, Fernet.generate_key().decode()]
    environment = {"PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"}
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, cwd=HERE, env=environment, stdin=pipe, stdout=pipe) for _ in range(3)]
    database = open_database(database_url)

    def together(scenario: str) -> list[Any]:
        for process in processes:
            assert process.stdin
            process.stdin.write(f"{scenario}\n".encode())
            process.stdin.flush()
        return [answer for process in processes if process.stdout for answer in json.loads(process.stdout.readline())]

    try:
        assert [process.stdout.readline() for process in processes if process.stdout] == [b"ready\n"] * 3
        answers = together("duplicate")
        assert len(answers) == 3 * 80
        assert len({(document, job) for document, job, _ in answers}) == 40, "each is one document with one job"
        assert sum(created for *_, created in answers) == 40
        assert count(database, table, jobs) == [40, 40]

        # Half of the keys are sent six times with one body, the others each time with another.
        answers = together("repeated")
        given = Counter(json.dumps(answer) for answer in answers)
        assert given.pop("null") == 20 * 5, "whoever sent another body was refused"
        assert sorted(given.values()) == [1] * 20 + [6] * 20, "the others were all answered alike"
        assert count(database, table, jobs, idempotency_keys) == [80, 80, 40]

        # A minute may end between, and then as much again is granted, but the hour holds.
        assert sum(together("spend")) in (50, 70)
    finally:
        for process in processes:
            process.communicate(timeout=120)
        database.close()


def test_outcomes_keep_their_order(documents: Documents) -> None:
    contents = [f"{number}" for number in range(60)]
    outcomes: list[Outcome] = documents.submit_many(
        [Submission(content=content, content_type="text/plain") for content in contents]
    )
    ids = [outcome.id for outcome in outcomes if isinstance(outcome, Submitted)]
    work = documents.work(ids)
    assert [work[each].content for each in ids] == contents
