"""Remote hosts, on both stores: how many may be asked at once, how often, and what happens when one fails."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Clock, open_database
from sqlalchemy import func, select

from atlas import admission, breakers
from atlas.breakers import Host, Limits
from atlas.db import Database
from atlas.queue import Failure, Job, NewJob, Queue, Result, Which
from atlas.schema import LANE, job_events, jobs

BLOCKED = int(os.environ.get("ATLAS_BLOCKED_JOBS", "3000"))
LIMITS = Limits(concurrency=2, failures=3, open_seconds=60, successes=2)

Make = Callable[..., Queue]


@pytest.fixture(autouse=True)
def admitted(database: Database) -> None:
    admission.admit(database, 1)


@pytest.fixture
def make(database: Database) -> Make:
    """A queue with limits that are small, or as given."""

    def make(**limits: float) -> Queue:
        return Queue(database, "w", 1, limits=Limits(**vars(LIMITS) | limits), random_delay=lambda _upper: 0)  # type: ignore[arg-type]

    return make


def add(queue: Queue, *hosts: str | None, priority: int = 1) -> list[int]:
    with queue.database.write() as connection:
        return [queue.enqueue(connection, NewJob(host=host, priority=priority)) for host in hosts]


def hosts_of(claimed: list[Job]) -> list[str | None]:
    return [job.host for job in claimed]


def state_of(database: Database, name: str) -> Host:
    with database.read() as connection:
        return breakers.load(connection, [name])[name]


def in_lanes(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(func.count()).where(jobs.c.target == LANE)) or 0


def test_a_busy_host_lets_the_others_go_on(make: Make, clock: Clock) -> None:
    queue = make()
    busy = add(queue, *["a"] * 6)
    add(queue, "b", None)
    first = queue.claim(5)
    assert sorted(map(str, hosts_of(first))) == ["None", "a", "a", "b"]
    assert queue.claim(5) == [] and in_lanes(queue.database) == 4
    queue.finish([Result(job, 1) for job in first if job.host == "a"])
    # Out of the lane they come in their order, and are everybody's again.
    assert [(job.id, job.target, job.attempts) for job in queue.claim(5)] == [(one, 0, 1) for one in busy[2:4]]


def test_what_waits_in_a_lane_keeps_its_place(make: Make, clock: Clock) -> None:
    queue = make(concurrency=1)
    first, second = add(queue, "a", "a")
    (running,) = queue.claim(1)
    assert queue.claim(2) == []
    clock.advance(1)
    (later,) = add(queue, None)
    (urgent,) = add(queue, None, priority=0)
    queue.finish([Result(running, 1)])
    assert [job.id for job in queue.claim(3)] == [urgent, second, later]


def test_an_urgent_job_overtakes_a_lane(make: Make) -> None:
    queue = make(concurrency=1)
    add(queue, "a", "a", "a", priority=2)
    (running,) = queue.claim(3)
    urgent = add(queue, *[None] * 3, priority=0)
    queue.finish([Result(running, 1)])
    assert [job.id for job in queue.claim(2)] == urgent[:2]
    assert hosts_of(queue.claim(3)) == [None, "a"]


def test_a_look_past_blocked_jobs_finds_what_is_more_urgent_than_a_lane(make: Make) -> None:
    queue = make(concurrency=1)
    add(queue, "a", "b", priority=0)
    running = queue.claim(2)
    add(queue, "b", priority=2)
    assert queue.claim(1) == [] and in_lanes(queue.database) == 1
    queue.finish([Result(job, 1) for job in running if job.host == "b"])
    add(queue, "a", priority=0)
    urgent = add(queue, None)
    assert [job.id for job in queue.claim(1)] == urgent


def test_lanes_that_wait_behind_the_common_queue_hide_no_urgent_one(make: Make, clock: Clock) -> None:
    queue = make(concurrency=1)
    names = [f"h{number}" for number in range(20)]
    add(queue, *["urgent"] * 3, priority=0)
    running = queue.claim(1)
    clock.advance(1)
    add(queue, *names, *names, priority=2)
    running += queue.claim(100)
    assert len(running) == 21 and queue.claim(100) == [] and in_lanes(queue.database) == 22
    queue.finish([Result(job) for job in running])
    clock.advance(1)
    (asked,) = queue.claim(1)
    assert asked.host == "urgent", "its host was the one asked first, and is now the one asked last"
    queue.finish([Result(asked)])
    clock.advance(1)
    add(queue, *[None] * 100)
    assert "urgent" in hosts_of([job for _ in range(4) for job in queue.claim(8)])


def test_a_host_is_asked_no_more_often_than_its_interval(make: Make, clock: Clock) -> None:
    queue = make(concurrency=5, interval_seconds=2)
    add(queue, "a", "a", "a", "b")
    assert hosts_of(queue.claim(5)) == ["a", "b"]
    clock.advance(1.9)
    assert queue.claim(5) == []
    assert queue.due_in() == pytest.approx(0.1)
    clock.advance(0.1)
    assert queue.due_in() == 0
    assert hosts_of(queue.claim(5)) == ["a"]


def test_many_blocked_jobs_cost_the_others_nothing(make: Make, database: Database, clock: Clock) -> None:
    """BLOCKED jobs of one host at the head of the queue; see docs/testing.md for the full size."""
    queue = make(concurrency=1)
    with database.write() as connection:
        queue.enqueue_many(connection, [NewJob(host="a", priority=0) for _ in range(BLOCKED)])
    others = add(queue, *[f"b{number}" for number in range(20)])
    claimed: list[Job] = []
    looks = 0
    while len(claimed) < 21:
        claimed += queue.claim(7)
        looks += 1
    assert looks <= 4 + BLOCKED / 1000
    assert sorted(job.id for job in claimed)[1:] == others
    before = _written(database)
    for name in "cdefg":
        add(queue, name)
        assert hosts_of(queue.claim(7)) == [name]
    # Five inserts, five claims, and no trace of the thousands that wait.
    assert _written(database) - before == 10
    with database.read() as connection:
        untouched = select(func.count()).where(jobs.c.host == "a", jobs.c.attempts == 0, jobs.c.run_at == clock.now)
        assert connection.scalar(untouched) == BLOCKED - 1


def _written(database: Database) -> int:
    """How many rows of jobs were written since the first call (SQLite), or ever."""
    if database.dialect == "sqlite":
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TEMP TABLE IF NOT EXISTS written (job)")
            for change in ("INSERT", "UPDATE"):
                trigger = f"CREATE TEMP TRIGGER IF NOT EXISTS on_{change} AFTER {change} ON main.jobs"
                connection.exec_driver_sql(f"{trigger} BEGIN INSERT INTO written VALUES (new.id); END")
            return int(connection.exec_driver_sql("SELECT count(*) FROM written").scalar_one())
    with database.write() as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
    with database.read() as connection:
        connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
        counted = "SELECT n_tup_ins + n_tup_upd FROM pg_stat_user_tables WHERE relname = 'jobs'"
        return int(connection.exec_driver_sql(counted).scalar_one())


def test_claimers_agree_on_a_host(make: Make, database_url: str, clock: Clock) -> None:
    queue = make()
    add(queue, *["a"] * 60)
    others = [Queue(open_database(database_url, clock), f"w{n}", 1, limits=LIMITS) for n in range(4)]
    most, lock, held = 0, threading.Lock(), Counter[str]()

    def work(other: Queue) -> int:
        nonlocal most
        done = 0
        for _ in range(200):
            batch = other.claim(4)
            with lock:
                held["a"] += len(batch)
                most = max(most, held["a"])
            with lock:
                held["a"] -= len(batch)
            other.finish([Result(job, 1) for job in batch])
            done += len(batch)
            if not batch and other.due_in() is None:
                break
        return done

    try:
        with ThreadPoolExecutor(4) as pool:
            done = sum(pool.map(work, others))
    finally:
        for other in others:
            other.database.close()
    done += sum(
        len(queue.finish([Result(job, 1) for job in batch]) or batch) for batch in iter(lambda: queue.claim(4), [])
    )
    assert most <= 2 and done == 60 and in_lanes(queue.database) == 0
    assert not state_of(queue.database, "a").waiting


def fail(queue: Queue, error_class: str = "timeout") -> None:
    (job,) = queue.claim(1)
    queue.fail(job, error_class, "no answer")


def test_a_breaker_opens_and_its_jobs_wait_without_spending_attempts(make: Make, clock: Clock) -> None:
    queue = make(concurrency=1)
    waiting = add(queue, *["a"] * 10)
    for _ in range(3):
        fail(queue)
    assert state_of(queue.database, "a").state == "open"
    clock.advance(59.9)
    assert queue.claim(5) == []
    add(queue, "b")
    assert hosts_of(queue.claim(5)) == ["b"]
    with queue.database.read() as connection:
        spent = connection.execute(select(jobs.c.attempts).where(jobs.c.id.in_(waiting)).order_by(jobs.c.id))
        assert list(spent.scalars()) == [3] + [0] * 9


def test_a_half_open_breaker_lets_one_job_try_at_a_time(make: Make, clock: Clock) -> None:
    queue = make()
    add(queue, *["a"] * 8)
    for _ in range(3):
        fail(queue, "server_error")
    assert queue.claim(8) == [] and queue.due_in() == 60
    clock.advance(60)
    (first,) = queue.claim(8)
    assert queue.claim(8) == [] and state_of(queue.database, "a").state == "half_open"
    queue.finish([Result(first, 1)])
    (second,) = queue.claim(8)
    queue.finish([Result(second, 1)])
    assert state_of(queue.database, "a") == Host("a", waiting=True, next_at=clock.now)
    assert len(queue.claim(8)) == 2


def test_one_failure_opens_a_half_open_breaker_again(make: Make, clock: Clock) -> None:
    queue = make()
    add(queue, *["a"] * 8)
    for _ in range(3):
        fail(queue, "dns")
    clock.advance(60)
    fail(queue, "network")
    assert state_of(queue.database, "a").state == "open" and queue.claim(8) == []
    clock.advance(60)
    assert len(queue.claim(8)) == 1


@pytest.mark.parametrize("error_class", ["not_found", "client_error", "parse_error", "rate_limited", "too_large"])
def test_any_answer_of_a_host_ends_a_row_of_failures(make: Make, error_class: str) -> None:
    queue = make()
    add(queue, *["a"] * 9)
    for failure in ("timeout", "timeout", error_class, "timeout", "timeout"):
        fail(queue, failure)
    assert state_of(queue.database, "a").failures == 2


def test_our_own_failures_say_nothing_of_a_host(make: Make) -> None:
    queue = make()
    add(queue, *["a"] * 9)
    for failure in ("timeout", "internal", "timeout", "refused", "timeout"):
        fail(queue, failure)
    assert state_of(queue.database, "a").state == "open"


def test_after_a_redirect_the_host_that_failed_is_charged(make: Make, database: Database, clock: Clock) -> None:
    queue = make(failures=2, concurrency=9)
    add(queue, "a.test", "a.test", "a.test")
    one, two, three = queue.claim(3)
    way = ("a.test", "b.test")
    assert queue.fail_many([Failure(one, "network", "gone", asked=way)]) == ["ready"]
    assert [state_of(database, name).failures for name in way] == [0, 1]
    # An answer ends the row of failures, also of a host that was only led to.
    queue.finish([Result(three, "made", way)])
    assert state_of(database, "b.test").failures == 0
    (again,) = queue.claim(3)
    assert (again.id, again.host) == (one.id, "b.test")
    queue.fail_many([Failure(job, "network", "gone", asked=way) for job in (again, two)])
    assert [(state_of(database, name).failures, state_of(database, name).state) for name in way] == [
        (0, "closed"),
        (2, "open"),
    ]
    # What failed waits for the host that failed; others of its own host go on.
    (fresh,) = add(queue, "a.test")
    assert [job.id for job in queue.claim(9)] == [fresh] and in_lanes(database) == 2
    clock.advance(LIMITS.open_seconds)
    (tried,) = queue.claim(9)
    queue.fail_many([Failure(tried, "network", "gone", asked=way[:1])])
    assert state_of(database, "a.test").failures == 1
    assert state_of(database, "b.test").at(clock.now).state == "half_open", "it was not asked"


def test_a_pause_that_the_server_asks_for_holds_for_the_whole_host(make: Make, clock: Clock) -> None:
    queue = make()
    add(queue, "a", "a", "b")
    (job,) = queue.claim(1)
    assert queue.fail(job, "rate_limited", "slow down", retry_after=20) == "ready"
    assert hosts_of(queue.claim(5)) == ["b"]
    clock.advance(20)
    assert sorted(job.attempts for job in queue.claim(5)) == [1, 1]


def test_a_batch_of_failures_is_one_transaction(make: Make, database: Database) -> None:
    queue = make(concurrency=50)
    add(queue, *["a", "b"] * 5)
    batch = queue.claim(10)
    lost = Job(**vars(batch[0]) | {"token": 99})
    ended = [Failure(job, "timeout" if job.host == "a" else "not_found", "x") for job in batch]
    assert queue.fail_many([*ended, Failure(lost, "timeout", "x")]) == ["ready", "dead"] * 5 + [None]
    assert state_of(database, "a").state == "open" and state_of(database, "b").state == "closed"
    with database.read() as connection:
        counted = select(job_events.c.event, func.count()).group_by(job_events.c.event)
        assert dict(connection.execute(counted).all()) == {"failed": 5, "died": 5}


def test_a_job_waits_a_day_for_a_host_that_does_not_come_back(make: Make, clock: Clock) -> None:
    queue = make()
    add(queue, *["a"] * 6)
    for _ in range(3):
        fail(queue)
    assert queue.claim(9) == []
    clock.advance(86_401)
    # The job that failed three times is dead of that.
    assert queue.reap() == (0, 5)
    letters, total = queue.find(Which(state="dead", error_class="unreachable", host="a"))
    assert total == 5 and [event["event"] for event in letters[0]["events"]] == ["died"]
    assert len(queue.requeue(Which(error_class="unreachable", host="a"))) == 5 and in_lanes(queue.database) == 0


def test_an_operator_closes_a_breaker(make: Make, database: Database) -> None:
    queue = make()
    add(queue, *["a"] * 6)
    for _ in range(3):
        fail(queue)
    assert queue.claim(6) == []
    with database.write() as connection:
        assert breakers.reset(database, connection, "a")
        assert not breakers.reset(database, connection, "unheard-of")
    assert len(queue.claim(6)) == 2


def test_states_are_counted_and_listed_as_time_has_made_them(make: Make, database: Database, clock: Clock) -> None:
    queue = make()
    add(queue, "a", "a", "a", "b")
    for _ in range(3):
        fail(queue)
    fail(queue)
    with database.read() as connection:
        assert breakers.states(database, connection) == {"closed": 1, "open": 1, "half_open": 0}
    clock.advance(60)
    with database.read() as connection:
        assert breakers.states(database, connection) == {"closed": 1, "open": 0, "half_open": 1}
    found, total = breakers.listed(database, limit=1)
    assert (found[0].name, found[0].state, total) == ("a", "half_open", 2)
    assert [host.name for host in breakers.listed(database, after="a")[0]] == ["b"]


def test_hosts_are_forgotten_when_nothing_is_left_to_remember(make: Make, database: Database, clock: Clock) -> None:
    queue = make()
    add(queue, *["b"] * 5)
    for _ in range(3):
        fail(queue)
    assert queue.claim(5) == []
    add(queue, "a")
    fail(queue)
    assert [host.name for host in breakers.listed(database)[0]] == ["a", "b"]
    clock.advance(86_401)
    breakers.forget(database)
    assert [host.name for host in breakers.listed(database)[0]] == ["b"]
