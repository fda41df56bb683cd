"""The queue and the breakers against models: whatever is done in whatever order, both say the same.

The models are as simple as can be: lists that are looked through, and a history that is told again from its beginning.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from conftest import Clock
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select

from atlas import admission, breakers, counts
from atlas.breakers import Host, Limits
from atlas.db import Database
from atlas.queue import Failure, Job, NewJob, Queue, Result, Which
from atlas.schema import LANE, job_events, jobs
from atlas.schema import hosts as hosts_table
from atlas.settings import RETRIES

EXAMPLES = int(os.environ.get("ATLAS_EXAMPLES", "80")) // 2
LEASE, ATTEMPTS, CAP = 60, 3, 300
CLASSES = ("timeout", "server_error", "not_found", "internal", "rate_limited", "network")
FAULTS = ("timeout", "server_error", "network", "dns")
CHOSEN = st.lists(st.integers(0, 15), min_size=1, max_size=6)


def told_again(history: list[tuple[int, str]], now: int, limits: Limits) -> tuple[str, int]:
    """The state of a breaker after (time, "good" or "bad") in order, and since when it is open or how long it will."""
    state, bad, good, until = "closed", 0, 0, 0
    for at, outcome in [*history, (now, "look")]:
        if state == "open" and at >= until:
            state, good = "half_open", 0
        if state == "open" or outcome == "look":
            continue
        if outcome == "good":
            good, bad = good + 1, 0 if state == "closed" else bad
            if state == "half_open" and good == limits.successes:
                state, bad = "closed", 0
        elif state == "half_open" or bad + 1 == limits.failures:
            state, bad, until = "open", 0, at + int(limits.open_seconds * 1000)
        else:
            bad += 1
    return state, until


class BreakerMachine(RuleBasedStateMachine):
    """One breaker, by its pure functions."""

    limits = Limits(failures=3, open_seconds=10, successes=2)

    def __init__(self) -> None:
        super().__init__()
        self.now, self.host = 1000, Host("a")
        self.history: list[tuple[int, str]] = []

    @rule(seconds=st.sampled_from([0.001, 1, 9.999, 10, 11]))
    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1000)

    @rule(is_good=st.booleans())
    def end(self, is_good: bool) -> None:
        self.history.append((self.now, "good" if is_good else "bad"))
        host, limits = self.host, self.limits
        self.host = host.answered(self.now, limits) if is_good else host.failed(self.now, limits, "no")

    @rule()
    def ask(self) -> None:
        assume(self.host.room(0, self.now, self.limits))
        self.host = self.host.asked(self.now, self.limits)

    @invariant()
    def agrees(self) -> None:
        state, until = told_again(self.history, self.now, self.limits)
        assert self.host.at(self.now).state == state
        rooms = [self.host.room(running, self.now, self.limits) for running in range(6)]
        assert rooms == {"open": [0] * 6, "half_open": [1] + [0] * 5, "closed": [4, 3, 2, 1, 0, 0]}[state]
        if state == "open":
            assert self.host.open_until == self.host.next_at == until


@dataclass
class ModelJob:
    id: int
    priority: int
    host: str | None
    created_at: int
    run_at: int
    state: str = "ready"
    attempts: int = 0
    token: int = 0
    lease_until: int = 0
    events: list[str] = field(default_factory=list)

    @property
    def urgency(self) -> tuple[int, int, int]:
        return self.priority, self.run_at, self.id


class QueueMachine(RuleBasedStateMachine):
    """A queue with two workers, on a store that the class is given."""

    database: Database
    clock: Clock

    @initialize(
        concurrency=st.integers(1, 3), interval=st.sampled_from([0, 0, 2]), places=st.sampled_from([None, None, 2])
    )
    def begin(self, concurrency: int, interval: float, places: int | None) -> None:
        with self.database.write() as connection:
            for table in (jobs, job_events, hosts_table):
                connection.execute(delete(table))
        self.limits = Limits(concurrency, interval, failures=2, open_seconds=30, successes=2)
        self.queue = Queue(
            self.database,
            "w",
            1,
            lease_seconds=LEASE,
            attempts=ATTEMPTS,
            limits=self.limits,
            random_delay=lambda upper: upper / 2,
        )
        admission.admit(self.database, 1, places)
        self.places, self.is_admitted = places, True
        self.jobs: dict[int, ModelJob] = {}
        self.histories: dict[str, list[tuple[int, str]]] = {}
        self.next_at: Counter[str] = Counter()
        self.seen: list[Job] = []  # every claim that was ever made: most of them hold no longer

    # What the model says.

    def holds(self, job: Job) -> bool:
        model = self.jobs.get(job.id)
        return model is not None and model.state == "running" and model.token == job.token

    def room(self, host: str) -> int:
        running = sum(job.state == "running" and job.host == host for job in self.jobs.values())
        state, _ = told_again(self.histories.get(host, []), self.clock.now, self.limits)
        if state == "open" or self.clock.now < self.next_at[host]:
            return 0
        most = self.limits.concurrency if state == "closed" else 1
        return max(0, min(most - running, 1 if self.limits.interval_seconds else most))

    def claimable(self, limit: int) -> list[ModelJob]:
        """What a scheduler would take that looks at every job."""
        running = sum(job.state == "running" for job in self.jobs.values())
        limit = min(limit, limit if self.places is None else max(0, self.places - running)) if self.is_admitted else 0
        rooms = {host: self.room(host) for host in {job.host for job in self.jobs.values()} if host}
        taken: list[ModelJob] = []
        due = [job for job in self.jobs.values() if job.state == "ready" and job.run_at <= self.clock.now]
        for job in sorted(due, key=lambda job: job.urgency):
            if len(taken) < limit and (job.host is None or rooms[job.host]):
                taken.append(job)
                rooms.update({job.host: rooms[job.host] - 1} if job.host else {})
        return taken

    def observe(self, host: str | None, error_class: str | None, pause: float = 0) -> None:
        if host is None:
            return
        if error_class not in ("internal", "refused"):
            outcome = "bad" if error_class in FAULTS else "good"
            self.histories.setdefault(host, []).append((self.clock.now, outcome))
        _, until = told_again(self.histories.get(host, []), self.clock.now, self.limits)
        waits = [until, self.clock.now + int(min(pause, self.limits.open_seconds) * 1000) if pause else 0]
        self.next_at[host] = max(self.next_at[host], *waits)

    # What is done.

    @rule(
        new=st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from([None, "a", "b", "c"]), st.sampled_from([0, 0, 0, 5])),
            min_size=1,
            max_size=6,
        )
    )
    def enqueue(self, new: list[tuple[int, str | None, int]]) -> None:
        for priority, host, delay in new:
            with self.database.write() as connection:
                job = NewJob(priority=priority, host=host, delay_seconds=delay)
                job_id = self.queue.enqueue(connection, job)
            now = self.clock.now
            self.jobs[job_id] = ModelJob(job_id, priority, host, now, now + delay * 1000)

    @rule(seconds=st.sampled_from([0.5, 5, 61, 200]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(limit=st.sampled_from([1, 2, 3, 8]))
    def take(self, limit: int) -> None:
        self.claim(limit)

    @rule(limit=st.sampled_from([3, 8]), seconds=st.sampled_from([0, 2, 30]))
    def take_later(self, limit: int, seconds: float) -> None:
        self.wait(seconds)
        self.claim(limit)

    def claim(self, limit: int) -> None:
        expected = self.claimable(limit)
        claimed = self.queue.claim(limit)
        assert [job.id for job in claimed] == [job.id for job in expected]
        for job, model in zip(claimed, expected, strict=True):
            model.state, model.lease_until = "running", self.clock.now + LEASE * 1000
            model.attempts, model.token = model.attempts + 1, model.token + 1
            assert (job.attempts, job.token, job.host) == (model.attempts, model.token, model.host)
            if model.host and self.limits.interval_seconds:
                self.next_at[model.host] = self.clock.now + int(self.limits.interval_seconds * 1000)
        self.seen += claimed

    def recent(self, chosen: list[int]) -> list[Job]:
        """Jobs of the latest claims, which may be held no longer."""
        seen = self.seen[-16:]
        return list({job.id: job for job in (seen[position % len(seen)] for position in chosen)}.values())

    @precondition(lambda self: self.seen)
    @rule(chosen=CHOSEN)
    def end_well(self, chosen: list[int]) -> None:
        self.finish(self.recent(chosen))

    @precondition(lambda self: self.seen)
    @rule(chosen=CHOSEN, error_class=st.sampled_from(CLASSES), retry_after=st.sampled_from([None, None, 0, 10, 90]))
    def end_badly(self, chosen: list[int], error_class: str, retry_after: float | None) -> None:
        self.fail(self.recent(chosen), error_class, retry_after)

    @precondition(lambda self: self.seen)
    @rule(chosen=CHOSEN, gives_back=st.booleans())
    def hold_on(self, chosen: list[int], gives_back: bool) -> None:
        (self.release if gives_back else self.heartbeat)(self.recent(chosen))

    def finish(self, chosen: list[Job]) -> None:
        stored: list[int] = []
        results = [Result(job, "made") for job in chosen]
        refused = self.queue.finish(results, lambda _, accepted: stored.extend(one.job.id for one in accepted))
        held = [job for job in chosen if self.holds(job)]
        assert refused == {job.id for job in chosen} - {job.id for job in held} and stored == [job.id for job in held]
        for job in held:
            self.jobs[job.id].state = "done"
            self.jobs[job.id].events.append("finished")
            self.observe(job.host, None)

    def fail(self, chosen: list[Job], error_class: str, retry_after: float | None) -> None:
        states = self.queue.fail_many([Failure(job, error_class, "no", retry_after) for job in chosen])
        for job, state in zip(chosen, states, strict=True):
            if not self.holds(job):
                assert state is None
                continue
            model, retry = self.jobs[job.id], RETRIES[error_class]
            if retry_after and self.clock.now - model.created_at < 86_400_000:
                model.attempts -= 1
                wait = retry_after
            else:
                wait = min(CAP, (retry.base_seconds or 1) * 2 ** (model.attempts - 1)) / 2
            is_dead = model.attempts >= min(retry.attempts or ATTEMPTS, ATTEMPTS)
            model.state = "dead" if is_dead else "ready"
            model.run_at = self.clock.now + int(wait * 1000)
            model.events.append("died" if is_dead else "failed")
            assert state == model.state
            self.observe(job.host, error_class, retry_after or 0)

    def release(self, chosen: list[Job]) -> None:
        self.queue.release(chosen)
        for job in filter(self.holds, chosen):
            self.jobs[job.id].state = "ready"
            self.jobs[job.id].attempts -= 1

    def heartbeat(self, chosen: list[Job]) -> None:
        assert self.queue.heartbeat(chosen) == {job.id for job in chosen if not self.holds(job)}
        for job in filter(self.holds, chosen):
            self.jobs[job.id].lease_until = self.clock.now + LEASE * 1000

    def reap(self) -> None:
        lost = [job for job in self.jobs.values() if job.state == "running" and job.lease_until < self.clock.now]
        for job in lost:
            job.state, job.run_at = "dead" if job.attempts >= ATTEMPTS else "ready", self.clock.now
            job.events.append("died" if job.state == "dead" else "lost")
        dead = sum(job.state == "dead" for job in lost)
        assert self.queue.reap() == (len(lost) - dead, dead)

    def lose(self) -> None:
        """Every worker is gone for longer than a lease, and what it held goes to others."""
        self.wait(LEASE + 1)
        self.reap()
        self.claim(8)

    @rule(
        what=st.sampled_from(["reap", "lose", "lose", "reset", "change_dead_letters", "admit"]),
        host=st.sampled_from([None, "a", "b"]),
        is_so=st.booleans(),
    )
    def keep_house(self, what: str, host: str | None, is_so: bool) -> None:
        if what in ("reap", "lose"):
            getattr(self, what)()
        elif what == "reset":
            self.reset(host or "a")
        elif what == "admit":
            self.admit(is_so or host is not None)
        else:
            self.change_dead_letters(host, is_so)

    def change_dead_letters(self, host: str | None, discards: bool) -> None:
        wanted = [job for job in self.jobs.values() if job.state == "dead" and host in (None, job.host)]
        change = self.queue.discard if discards else self.queue.requeue
        assert change(Which(host=host)) == sorted(job.id for job in wanted)
        for job in wanted:
            job.state, job.attempts, job.run_at = "ready", 0, self.clock.now
            job.events.append("requeued")
            if discards:
                del self.jobs[job.id]

    def reset(self, host: str) -> None:
        with self.database.write() as connection:
            breakers.reset(self.database, connection, host)
        self.histories.pop(host, None)
        self.next_at[host] = 0

    def admit(self, is_admitted: bool) -> None:
        if is_admitted:
            admission.admit(self.database, 1, self.places)
        else:
            admission.dismiss(self.database, 1)
        self.is_admitted = is_admitted

    # What must hold at all times.

    @invariant()
    def the_store_agrees(self) -> None:
        if not hasattr(self, "jobs"):
            return
        with self.database.read() as connection:
            rows = {row.id: row for row in connection.execute(select(jobs))}
            assert counts.drift(connection) == []
            events = list(connection.execute(select(job_events.c.job_id, job_events.c.event).order_by(job_events.c.id)))
            waiting = set(connection.scalars(select(hosts_table.c.name).where(hosts_table.c.waiting)))
        assert rows.keys() == self.jobs.keys()
        history: dict[int, list[str]] = {}
        for job_id, event in events:
            history.setdefault(job_id, []).append(event)
        for model in self.jobs.values():
            row: Any = rows[model.id]
            assert (row.state, row.attempts, row.token) == (model.state, model.attempts, model.token)
            assert row.state != "ready" or row.run_at == model.run_at
            assert history.get(model.id, []) == model.events and model.events.count("finished") <= 1
            assert row.target != LANE or (row.state == "ready" and row.host in waiting), "nobody is forgotten in a lane"

    @invariant()
    def nobody_sleeps_while_there_is_work(self) -> None:
        if not hasattr(self, "jobs"):
            return
        due = self.queue.due_in()
        if self.claimable(1):
            assert due == 0
        ready = [job.run_at for job in self.jobs.values() if job.state == "ready" and job.host is None]
        if ready and self.is_admitted:
            assert due is not None and due <= max(0, min(ready) - self.clock.now) / 1000


def check(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            # Making a counterexample smaller takes minutes on a store, and it can be read as it is.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_breaker_is_what_its_history_makes_of_it() -> None:
    check(BreakerMachine, 150, 40)


def test_the_queue_does_what_its_model_says(database: Database, clock: Clock) -> None:
    check(type("Machine", (QueueMachine,), {"database": database, "clock": clock}), EXAMPLES, 50)
