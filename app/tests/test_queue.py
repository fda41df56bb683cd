"""The queue, on both stores: what may be claimed, who may finish, and what happens to what fails or is lost."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Clock, open_database
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError

from atlas import admission
from atlas.db import Database
from atlas.queue import NewJob, Queue, Result, Which
from atlas.schema import job_events, jobs


def add(queue: Queue, *new: NewJob) -> list[int]:
    with queue.database.write() as connection:
        return [queue.enqueue(connection, job) for job in new]


def dead(queue: Queue, limit: int = 50, before: int | None = None) -> list[dict[str, Any]]:
    return queue.find(Which(state="dead"), limit, before)[0]


def events(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.scalars(select(job_events.c.event).order_by(job_events.c.id)))


@pytest.fixture(autouse=True)
def admitted(database: Database) -> None:
    admission.admit(database, 1)


def test_claim_takes_priority_first_then_the_oldest(queue: Queue, clock: Clock) -> None:
    low, normal, high = add(queue, NewJob(priority=2), NewJob(priority=1), NewJob(priority=0))
    clock.advance(1)
    (later,) = add(queue, NewJob(priority=1))
    assert [job.id for job in queue.claim(3)] == [high, normal, later]
    assert [job.id for job in queue.claim(3)] == [low]


def test_a_delayed_job_waits(queue: Queue, clock: Clock) -> None:
    add(queue, NewJob(delay_seconds=10))
    assert queue.claim() == []
    clock.advance(10)
    assert len(queue.claim()) == 1


def test_only_an_admitted_deployment_claims(queue: Queue, database: Database) -> None:
    add(queue, NewJob())
    stranger = Queue(database, "worker-2", 2)
    assert stranger.claim(5) == []
    admission.admit(database, 2)
    admission.dismiss(database, 1)
    assert queue.claim(5) == []
    assert len(stranger.claim(5)) == 1


def test_a_probe_reaches_its_deployment_alone_even_when_not_admitted(queue: Queue, database: Database) -> None:
    (probe,) = add(queue, NewJob(kind="probe", target=2))
    assert queue.claim(5) == []
    assert [job.id for job in Queue(database, "worker-2", 2).claim(5)] == [probe]


def test_concurrency_bounds_what_runs_at_once(queue: Queue, database: Database) -> None:
    admission.admit(database, 1, concurrency=2)
    add(queue, *[NewJob() for _ in range(5)])
    first = queue.claim(5)
    assert len(first) == 2
    assert queue.claim(5) == []
    queue.finish([Result(first[0])])
    assert len(queue.claim(5)) == 1


def test_concurrency_holds_when_processes_claim_together(queue: Queue, database_url: str, clock: Clock) -> None:
    admission.admit(queue.database, 1, concurrency=3)
    add(queue, *[NewJob() for _ in range(40)])
    others = [Queue(open_database(database_url, clock), f"w{n}", 1) for n in range(6)]
    try:
        with ThreadPoolExecutor(6) as pool:
            claimed = [job.id for batch in pool.map(lambda other: other.claim(2), others) for job in batch]
    finally:
        for other in others:
            other.database.close()
    assert len(claimed) == 3


def test_concurrent_claims_share_no_job(queue: Queue, database_url: str, clock: Clock) -> None:
    ids = add(queue, *[NewJob() for _ in range(120)])
    others = [Queue(open_database(database_url, clock), f"w{n}", 1) for n in range(4)]

    def drain(other: Queue) -> list[int]:
        mine: list[int] = []
        while batch := other.claim(7):
            mine += [job.id for job in batch]
        return mine

    try:
        with ThreadPoolExecutor(4) as pool:
            claimed = [job_id for mine in pool.map(drain, others) for job_id in mine]
    finally:
        for other in others:
            other.database.close()
    # A claim may skip rows that another has locked and find none, but none is taken twice.
    assert max(Counter(claimed).values()) == 1
    assert sorted(claimed + [job.id for job in queue.claim(120)]) == ids


def test_a_late_finisher_is_refused(queue: Queue, database: Database, clock: Clock) -> None:
    add(queue, NewJob())
    (late,) = queue.claim()
    clock.advance(61)
    assert queue.reap() == (1, 0)
    assert queue.finish([Result(late)]) == {late.id}, "reaped, not yet claimed again"
    (current,) = Queue(database, "worker-2", 1).claim()
    assert current.token > late.token
    stored: list[int] = []
    assert queue.finish([Result(late)], lambda _, accepted: stored.append(len(accepted))) == {late.id}
    assert queue.heartbeat([late]) == {late.id}
    assert queue.fail(late, "timeout", "too late") is None
    queue.release([late])
    assert stored == []
    assert queue.finish([Result(current)]) == set()
    assert events(database) == ["lost", "finished"]


def test_a_heartbeat_keeps_the_lease(queue: Queue, clock: Clock) -> None:
    add(queue, NewJob())
    claimed = queue.claim()
    for _ in range(4):
        clock.advance(40)
        assert queue.heartbeat(claimed) == set()
        assert queue.reap() == (0, 0)
    clock.advance(61)
    assert queue.reap() == (1, 0)
    assert queue.heartbeat(claimed) == {claimed[0].id}


def test_a_job_that_kills_its_workers_is_buried(queue: Queue, database: Database, clock: Clock) -> None:
    (job_id,) = add(queue, NewJob())
    for _ in range(4):
        assert len(queue.claim()) == 1
        clock.advance(61)
        assert queue.reap() == (1, 0)
    assert queue.claim()[0].attempts == 5
    clock.advance(61)
    assert queue.reap() == (0, 1)
    assert queue.claim() == []
    assert [letter["id"] for letter in dead(queue)] == [job_id]
    assert events(database) == ["lost"] * 4 + ["died"]


def test_back_off_doubles_up_to_its_cap(database: Database, clock: Clock) -> None:
    bounds: list[float] = []

    def longest(upper: float) -> float:
        bounds.append(upper)
        return upper

    queue = Queue(database, "w", 1, attempts=12, retry_cap_seconds=300, random_delay=longest)
    add(queue, NewJob())
    for _ in range(11):
        (job,) = queue.claim()
        assert queue.fail(job, "internal", "again") == "ready"
        assert queue.claim() == []
        clock.advance(bounds[-1])
    assert bounds == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


@pytest.mark.parametrize(
    ("error_class", "attempts"),
    [("timeout", 3), ("rate_limited", 5), ("server_error", 2), ("not_found", 1), ("unsupported", 1), ("unheard_of", 5)],
)
def test_each_class_has_its_attempts(queue: Queue, clock: Clock, error_class: str, attempts: int) -> None:
    add(queue, NewJob())
    made = 0
    while batch := queue.claim():
        made += 1
        state = queue.fail(batch[0], error_class, "x")
        assert state == ("dead" if made == attempts else "ready")
        clock.advance(301)
    assert made == attempts


def test_retry_after_spends_no_attempt_for_a_day(queue: Queue, clock: Clock) -> None:
    add(queue, NewJob())
    for _ in range(20):
        (job,) = queue.claim()
        assert job.attempts == 1
        assert queue.fail(job, "rate_limited", "slow down", retry_after=30) == "ready"
        clock.advance(29)
        assert queue.claim() == []
        clock.advance(1)
    clock.advance(86_400)
    attempts = 0
    while batch := queue.claim():
        attempts += 1
        queue.fail(batch[0], "rate_limited", "slow down", retry_after=30)
        clock.advance(301)
    assert attempts == 5


def test_a_retry_after_of_nothing_spends_attempts(queue: Queue, clock: Clock) -> None:
    add(queue, NewJob())
    attempts = 0
    while batch := queue.claim():
        attempts += 1
        assert attempts <= 5
        queue.fail(batch[0], "rate_limited", "slow down", retry_after=0)
        assert queue.claim() == []
        clock.advance(301)
    assert attempts == 5


def test_release_spends_no_attempt(queue: Queue) -> None:
    add(queue, NewJob())
    first = queue.claim()
    queue.release(first)
    (again,) = queue.claim()
    assert again.attempts == 1
    assert again.token > first[0].token


def test_a_failing_store_finishes_nothing(queue: Queue, database: Database) -> None:
    add(queue, NewJob(), NewJob())
    claimed = queue.claim(2)

    def store(*_: object) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        queue.finish([Result(job) for job in claimed], store)
    assert events(database) == []
    assert queue.finish([Result(job) for job in claimed]) == set()


def test_dead_letters_are_requeued_with_all_attempts(queue: Queue, database: Database) -> None:
    first, second = add(queue, NewJob(), NewJob())
    for job in queue.claim(2):
        queue.fail(job, "not_found", "404\0")
    assert [letter["id"] for letter in dead(queue, limit=1)] == [second]
    (letter,) = dead(queue, before=second)
    assert (letter["id"], letter["error_class"], letter["error"]) == (first, "not_found", "404\ufffd")
    assert queue.requeue(Which(ids=[first, 999])) == [first]
    assert queue.requeue(Which(ids=[first])) == []
    (job,) = queue.claim(5)
    assert (job.id, job.attempts) == (first, 1)
    found = queue.job(first)
    assert found is not None
    assert [event["event"] for event in found["events"]] == ["died", "requeued"]


def test_stats_count_by_state_and_priority(queue: Queue, clock: Clock) -> None:
    add(queue, NewJob(priority=0), NewJob(priority=2), NewJob(priority=2))
    clock.advance(7)
    (job,) = queue.claim()
    queue.finish([Result(job)])
    stats = queue.stats()
    assert stats.depth["ready"] == {0: 0, 1: 0, 2: 2}
    assert (stats.total("ready"), stats.total("running"), stats.total("dead")) == (2, 0, 0)
    assert stats.oldest_ready_seconds == 7


def test_events_are_append_only(queue: Queue, database: Database) -> None:
    add(queue, NewJob())
    queue.finish([Result(job) for job in queue.claim()])
    with pytest.raises(DBAPIError, match="append-only"), database.write() as connection:
        connection.execute(update(job_events).values(event="lost"))


def test_jobs_keep_their_checks(database: Database, queue: Queue) -> None:
    with pytest.raises(DBAPIError):
        add(queue, NewJob(priority=3))
    add(queue, NewJob())
    with pytest.raises(DBAPIError), database.write() as connection:
        connection.execute(update(jobs).values(state="lost"))
