"""Housekeeping: what is kept, what goes, what is noted, on both stores."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from conftest import Clock, open_database, wait_for
from sqlalchemy import insert, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError

from atlas import admission, audit, presence
from atlas.db import Database
from atlas.documents import Documents, Extracted, Submission
from atlas.queue import DAY_MS, Queue, Result
from atlas.schema import hosts, job_events, queue_samples, workers
from atlas.services import Housekeeping
from atlas.settings import Identity, Settings, TokenSpec
from atlas.tokens import Tokens


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(environment="development", database_url=database_url, queue_limit=500)


@pytest.fixture
def housekeeping(database: Database, documents: Documents, settings: Settings) -> Iterator[Housekeeping]:
    admission.admit(database, 1)
    yield Housekeeping(database, documents, settings)


def rows(database: Database, *columns: object) -> list[tuple[object, ...]]:
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(select(*columns))]  # type: ignore[arg-type]


def test_the_queue_is_sampled_once_for_each_minute(
    housekeeping: Housekeeping, documents: Documents, queue: Queue, clock: Clock, database: Database
) -> None:
    clock.now = clock.now // 60_000 * 60_000 + 20_000
    for number in range(3):
        documents.submit(Submission(content=f"n{number}", content_type="text/plain"))
    first, second, _ = queue.claim(3)
    queue.finish([Result(first, Extracted("t"))], documents.store)
    queue.fail(second, "parse_error", "bad")
    housekeeping.sample()
    clock.advance(20)
    housekeeping.sample()
    clock.advance(20)
    housekeeping.sample()
    minute = clock.now
    clock.advance(60)
    housekeeping.sample()
    columns = [queue_samples.c[name] for name in ("at", "ready", "running", "dead", "finished", "failed")]
    assert rows(database, *columns) == [
        (minute - 60_000, 0, 1, 1, 0, 0),
        (minute, 0, 1, 1, 1, 1),
        (minute + 60_000, 0, 1, 1, 0, 0),
    ]
    clock.advance(8 * 86_400)
    housekeeping.forgotten()
    assert rows(database, *columns) == []


def test_old_events_go_but_for_the_proof_of_a_finish(
    housekeeping: Housekeeping, database: Database, clock: Clock, documents: Documents, queue: Queue
) -> None:
    taken = documents.submit(Submission(content="n", content_type="text/plain"))
    queue.finish([Result(job, Extracted("t")) for job in queue.claim(1)], documents.store)
    event = {"job_id": 99, "event": "finished", "token": 1, "attempt": 1}
    with database.write() as connection:
        connection.execute(insert(job_events), [event | {"at": clock.now}] * 1500)
        connection.execute(insert(job_events), [event | {"at": clock.now + 31 * DAY_MS}])
    clock.advance(30.5 * 86_400)
    assert housekeeping.events() is True and housekeeping.events() is False
    assert set(rows(database, job_events.c.document_id)) == {(taken.id,), (None,)}
    shown = documents.get(taken.id)
    assert shown is not None and shown.applied == 1


def test_services_that_are_gone_for_good_are_forgotten(
    housekeeping: Housekeeping, database: Database, clock: Clock
) -> None:
    presence.beat(database, Identity(1, "r", "blue", "gone"), "core", 0)
    clock.advance(6 * 86_400)
    presence.beat(database, Identity(1, "r", "blue", "here"), "core", 0)
    with database.write() as connection:
        connection.execute(insert(hosts).values(name="quiet.test", state="closed", changed_at=clock.now))
    clock.advance(2 * 86_400)
    housekeeping.forgotten()
    assert rows(database, workers.c.host) == [("here",)] and rows(database, hosts.c.name) == []


def test_the_expiry_of_a_token_is_recorded_once(database_url: str, keyring: object, settings: Settings) -> None:
    database = open_database(database_url)
    spec = {"sha256": "0" * 64, "scopes": ["read"]}
    soon = TokenSpec.model_validate(spec | {"name": "soon", "expires_at": 1_700_000_000_000})
    later = TokenSpec.model_validate(spec | {"name": "later", "sha256": "1" * 64, "expires_at": 9_900_000_000_000})
    Tokens(database).apply([soon, later])
    housekeeping = Housekeeping(database, Documents(database, Queue(database, "s"), keyring, settings), settings)  # type: ignore[arg-type]
    for _ in range(2):
        housekeeping.tokens()
    entries, total = audit.records(database, {"action": "expired"})
    database.close()
    assert total == 1 and (entries[0]["actor"], entries[0]["object_id"]) == ("service:services", "soon")
    assert entries[0]["detail"] == {"expired_at": "2023-11-14T22:13:20.000Z"}


def test_a_reader_that_holds_up_the_store_is_named(
    housekeeping: Housekeeping, database: Database, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.services.LONG_SECONDS", 0.2)
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        with database.read() as connection:
            connection.execute(text("SELECT count(*) FROM documents"))
            reading.set()
            done.wait(120)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert reading.wait(60)
        documents.submit(Submission(content="n", content_type="text/plain"))
        done.wait(0.3)
        look = housekeeping.checkpoint if database.dialect == "sqlite" else housekeeping.hints
        look()
        assert any(word in housekeeping.warnings[0] for word in ("a reader kept", "a transaction has been open"))
    finally:
        done.set()
        reader.join()
    monkeypatch.setattr("atlas.services.LONG_SECONDS", 60)  # autovacuum may be at work
    look()
    assert housekeeping.warnings == []


def test_a_table_full_of_dead_rows_is_named(housekeeping: Housekeeping, database: Database) -> None:
    if database.dialect == "sqlite":
        housekeeping.optimize()
        return
    with database.write() as connection:
        connection.execute(text("ALTER TABLE leases SET (autovacuum_enabled = off)"))
        fill = "INSERT INTO leases SELECT 'l' || n, 'o', 1, 1 FROM generate_series(1, 12000) n"
        connection.execute(text(fill))
    with database.write() as connection:
        connection.execute(text("DELETE FROM leases"))
        connection.execute(text("SELECT pg_stat_force_next_flush()"))

    def is_named() -> bool:
        housekeeping.hints()
        return any("table leases holds 12000 dead rows" in warning for warning in housekeeping.warnings)

    wait_for(is_named, 10, "the table is named")


def test_every_chore_is_due_at_once_and_then_in_its_time(housekeeping: Housekeeping) -> None:
    counted: dict[str, int] = dict.fromkeys(housekeeping._chores, 0)

    def count(name: str) -> bool:
        counted[name] += 1
        return name == "events" and counted[name] == 1

    housekeeping._chores = {
        name: (seconds, lambda name=name: count(name))  # type: ignore[misc]
        for name, (seconds, _) in housekeeping._chores.items()
    }
    assert housekeeping.run_due() is True
    assert housekeeping.run_due() is False
    assert counted.pop("events") == 2 and set(counted.values()) == {1}
    expected = {"feeds", "sample", "tokens", "retention", "audit", "forgotten"}
    assert expected <= set(counted) and ({"checkpoint", "optimize"} <= set(counted) or "hints" in counted)


def test_a_chore_that_the_store_refuses_keeps_no_other_from_being_done(housekeeping: Housekeeping) -> None:
    done: list[str] = []
    housekeeping._chores = {"feeds": (5, lambda: refuse()), "retention": (60, lambda: done.append("retention") is None)}

    def refuse() -> bool:
        if error is not None:
            raise error
        return False

    error: SQLAlchemyError | None = ProgrammingError("SELECT", {}, Exception("permission denied"))
    assert housekeeping.run_due() is True and done == ["retention"]
    assert housekeeping.failing == {"feeds": "the chore feeds fails: permission denied"}
    housekeeping._due["feeds"] = 0
    error = OperationalError("SELECT", {}, Exception("away"))
    with pytest.raises(OperationalError):
        housekeeping.run_due()
    assert done == ["retention"], "a store that is away is not asked again and again"
    error = None
    housekeeping.run_due()
    assert housekeeping.failing == {} and len(done) == 2
