"""The durable queue: jobs are claimed under a lease, and finished exactly once.

A job is `ready`, `running`, `done` or `dead`. A claim raises its fencing token and its attempts; who finishes, fails or
renews must hold the current token. Whatever dies in between, the reaper makes the job ready again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    null,
    select,
    tuple_,
    update,
)

from atlas.db import Database
from atlas.schema import ANYONE, PRIORITIES, deployments, job_events, jobs

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Retry:
    """How often a class of error is attempted in all, and the base of its back-off (None: the setting)."""

    attempts: int
    base_seconds: float | None = None


# Classes that are not listed get the settings: five attempts, one second.
RETRIES: Mapping[str, Retry] = {
    "timeout": Retry(3, 60),
    "rate_limited": Retry(5, 300),
    "server_error": Retry(2, 120),
    "not_found": Retry(1),
    "client_error": Retry(1),
    "parse_error": Retry(1),
    "too_large": Retry(1),
    "unsupported": Retry(1),
    "refused": Retry(1),
}


@dataclass(frozen=True)
class NewJob:
    """A job to enqueue. `target` names the one deployment that may claim it (a probe)."""

    kind: str = "document"
    document_id: str | None = None
    payload: Mapping[str, Any] | None = None
    priority: int = PRIORITIES["normal"]
    target: int = ANYONE
    delay_seconds: float = 0
    request_id: str | None = None


@dataclass(frozen=True)
class Job:
    """A claimed job. `attempts` counts this attempt."""

    id: int
    token: int
    kind: str
    document_id: str | None
    payload: Mapping[str, Any] | None
    priority: int
    target: int
    attempts: int
    request_id: str | None
    created_at: int
    run_at: int
    lease_until: int


@dataclass(frozen=True)
class Result:
    """A job that was done, and what it made; `value` goes to the `store` given to `finish`."""

    job: Job
    value: Any = None


@dataclass(frozen=True)
class QueueStats:
    """`depth` by state (ready, running, dead) and priority; ages in seconds; events of the last five minutes."""

    depth: Mapping[str, Mapping[int, int]]
    oldest_ready_seconds: float
    events: Mapping[str, int] = field(default_factory=dict)

    def total(self, state: str) -> int:
        return sum(self.depth.get(state, {}).values())


_CLAIMED = [jobs.c[name] for name in Job.__dataclass_fields__]


class Queue:
    """The queue as one worker process (`owner`, of `deployment`) sees it.

    Durations are in seconds. `random_delay(upper)` draws the jitter and is replaced in tests.
    """

    def __init__(
        self,
        database: Database,
        owner: str,
        deployment: int = 0,
        *,
        lease_seconds: float = 60,
        attempts: int = 5,
        retry_base_seconds: float = 1,
        retry_cap_seconds: float = 300,
        random_delay: Callable[[float], float] = lambda upper: random.uniform(0, upper),  # noqa: S311
    ) -> None:
        self.database = database
        self.owner = owner
        self.deployment = deployment
        self.lease_ms = int(lease_seconds * 1000)
        self.attempts = attempts
        self.retry_base_seconds = retry_base_seconds
        self.retry_cap_seconds = retry_cap_seconds
        self._random_delay = random_delay

    def enqueue(self, connection: Connection, job: NewJob) -> int:
        """Add one job in the caller's transaction; its id."""
        [(job_id, _)] = self.enqueue_many(connection, [job])
        return job_id

    def enqueue_many(self, connection: Connection, new: Sequence[NewJob]) -> list[tuple[int, str | None]]:
        """Add jobs in the caller's transaction; (id, document id) of each, in no particular order."""
        now = self.database.now(connection)
        names = ("kind", "document_id", "payload", "priority", "state", "target", "run_at", "request_id", "created_at")
        rows = [
            (job.kind, job.document_id, job.payload, job.priority, "ready", job.target)
            + (now + int(job.delay_seconds * 1000), job.request_id, now)
            for job in new
        ]
        return [
            (job, document)
            for job, document in self.database.insert_rows(connection, jobs, names, rows, "id, document_id")
        ]

    def claim(self, limit: int = 1) -> list[Job]:
        """Up to `limit` jobs, most urgent first: this deployment's probes, and others' if it is admitted."""
        with self.database.write() as connection:
            open_places = self._open_places(connection, limit)
            now = self.database.clock_expression()
            probes = self._candidates(self.deployment, limit).cte("probes") if self.deployment != ANYONE else None
            common = self._candidates(ANYONE, open_places).where(self._admitted()).cte("common")
            wanted = select(common.c.id)
            chosen = wanted if probes is None else select(probes.c.id).union_all(wanted)
            claimed = connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(chosen))
                .values(
                    state="running",
                    token=jobs.c.token + 1,
                    attempts=jobs.c.attempts + 1,
                    lease_until=now + self.lease_ms,
                    owner=self.owner,
                    deployment=self.deployment,
                )
                .returning(*_CLAIMED)
            ).all()
        order = sorted(claimed, key=lambda row: (row.target == ANYONE, row.priority, row.run_at, row.id))
        return [Job(*row) for row in order]

    def _candidates(self, target: int, limit: int) -> Any:
        return (
            select(jobs.c.id)
            .where(jobs.c.state == "ready", jobs.c.target == target, jobs.c.run_at <= self.database.clock_expression())
            .order_by(jobs.c.priority, jobs.c.run_at, jobs.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )

    def _admitted(self) -> ColumnElement[bool]:
        return exists().where(deployments.c.id == self.deployment, deployments.c.admitted)

    def _open_places(self, connection: Connection, limit: int) -> int:
        # Only a limited deployment is locked, so that its processes count one after another.
        limited: int | None = connection.scalar(
            select(deployments.c.concurrency)
            .where(deployments.c.id == self.deployment, deployments.c.concurrency.is_not(None))
            .with_for_update()
        )
        if limited is None:
            return limit
        running: int | None = connection.scalar(
            select(func.count()).where(jobs.c.state == "running", jobs.c.deployment == self.deployment)
        )
        return max(0, min(limit, limited - (running or 0)))

    def _held(self, claimed: Iterable[Job]) -> ColumnElement[bool]:
        """The rows of these jobs that this process still holds: the fence."""
        pairs = [(job.id, job.token) for job in claimed]
        return and_(
            jobs.c.id.in_([pair[0] for pair in pairs]),
            tuple_(jobs.c.id, jobs.c.token).in_(pairs),
            jobs.c.state == "running",
        )

    def heartbeat(self, claimed: Sequence[Job]) -> set[int]:
        """Renew the leases; the ids of the jobs that were lost, whose work must stop."""
        if not claimed:
            return set()
        with self.database.write() as connection:
            until = self.database.clock_expression() + self.lease_ms
            kept = connection.scalars(
                update(jobs).where(self._held(claimed)).values(lease_until=until).returning(jobs.c.id)
            ).all()
        return {job.id for job in claimed} - set(kept)

    def finish(
        self, results: Sequence[Result], store: Callable[[Connection, Sequence[Result]], None] | None = None
    ) -> set[int]:
        """Mark jobs done and store what they made, in one transaction; the ids of the jobs refused as lost.

        `store` gets only the accepted results. If it raises, no job of the batch is finished.
        """
        if not results:
            return set()
        with self.database.write() as connection:
            rows = connection.execute(
                update(jobs)
                .where(self._held([result.job for result in results]))
                .values(state="done", finished_at=self.database.clock_expression(), lease_until=None)
                .values(error_class=None, error=None)
                .returning(*_EVENT)
            ).all()
            accepted_ids = {row.id for row in rows}
            accepted = [result for result in results if result.job.id in accepted_ids]
            if store is not None and accepted:
                store(connection, accepted)
            self._record(connection, "finished", rows)
        return {result.job.id for result in results} - accepted_ids

    def fail(self, job: Job, error_class: str, message: str, retry_after: float | None = None) -> str | None:
        """End this attempt with an error: the new state ("ready" or "dead"), or None if the job was lost.

        `retry_after` (seconds, from the server) spends no attempt during the job's first day. Otherwise the back-off
        has full jitter: uniform between 0 and min(cap, base x 2^(attempts-1)).
        """
        retry = RETRIES.get(error_class, Retry(self.attempts))
        most = min(retry.attempts, self.attempts)
        with self.database.write() as connection:
            now = self.database.now(connection)
            spent = job.attempts
            if retry_after is not None and now - job.created_at < DAY_MS:
                spent -= 1
                delay = min(max(retry_after, 0), DAY_MS / 1000)
            else:
                base = retry.base_seconds or self.retry_base_seconds
                delay = self._random_delay(min(self.retry_cap_seconds, base * 2 ** (job.attempts - 1)))
            dead = spent >= most
            rows = connection.execute(
                update(jobs)
                .where(self._held([job]))
                .values(
                    state="dead" if dead else "ready",
                    attempts=spent,
                    run_at=now + int(delay * 1000),
                    finished_at=now if dead else None,
                    lease_until=None,
                    error_class=error_class,
                    error=clean(message)[:2000],
                )
                .returning(*_EVENT)
            ).all()
            self._record(connection, "died" if dead else "failed", rows)
        return None if not rows else "dead" if dead else "ready"

    def release(self, claimed: Sequence[Job]) -> None:
        """Give jobs back unworked, for anyone at once; no attempt is spent."""
        if not claimed:
            return
        with self.database.write() as connection:
            connection.execute(
                update(jobs)
                .where(self._held(claimed))
                .values(state="ready", attempts=jobs.c.attempts - 1, lease_until=None)
            )

    def reap(self, limit: int = 1000) -> tuple[int, int]:
        """Take jobs from workers whose lease ran out: how many are ready again, and how many are dead.

        A job whose attempts are used up is dead: it has killed, or outlived, each worker that took it.
        """
        with self.database.write() as connection:
            now = self.database.clock_expression()
            expired = (
                select(jobs.c.id)
                .where(jobs.c.state == "running", jobs.c.lease_until < now)
                .limit(limit)
                .with_for_update(skip_locked=True)
                .cte("expired")
            )
            used_up = jobs.c.attempts >= self.attempts
            rows = connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(select(expired.c.id)))
                .values(
                    state=case((used_up, "dead"), else_="ready"),
                    finished_at=case((used_up, now), else_=null()),
                    run_at=now,
                    lease_until=None,
                    error_class="lost",
                    error="the worker stopped answering before its lease ended",
                )
                .returning(*_EVENT)
            ).all()
            dead = [row for row in rows if row.state == "dead"]
            self._record(connection, "lost", [row for row in rows if row.state == "ready"])
            self._record(connection, "died", dead)
        return len(rows) - len(dead), len(dead)

    def _record(self, connection: Connection, event: str, rows: Sequence[Row[Any]]) -> None:
        if not rows:
            return
        at = self.database.clock_expression()
        connection.execute(
            insert(job_events).values(
                job_id=bindparam("b_job"),
                document_id=bindparam("b_document"),
                event=event,
                token=bindparam("b_token"),
                attempt=bindparam("b_attempt"),
                owner=self.owner,
                deployment=self.deployment,
                error_class=bindparam("b_class"),
                error=bindparam("b_error"),
                at=at,
            ),
            [
                {
                    "b_job": row.id,
                    "b_document": row.document_id,
                    "b_token": row.token,
                    "b_attempt": row.attempts,
                    "b_class": row.error_class,
                    "b_error": row.error,
                }
                for row in rows
            ],
        )

    def depth(self, connection: Connection, most: int) -> int:
        """How many jobs are ready; no more than `most` are counted."""
        ready = select(jobs.c.id).where(jobs.c.state == "ready").limit(most).subquery()
        count: int | None = connection.scalar(select(func.count()).select_from(ready))
        return count or 0

    def stats(self) -> QueueStats:
        with self.database.read() as connection:
            now = self.database.now(connection)
            depth: dict[str, dict[int, int]] = {}
            for state in ("ready", "running", "dead"):
                counts = connection.execute(
                    select(jobs.c.priority, func.count()).where(jobs.c.state == state).group_by(jobs.c.priority)
                )
                depth[state] = dict.fromkeys(PRIORITIES.values(), 0) | dict(counts.all())
            oldest = connection.scalar(
                select(func.min(jobs.c.run_at)).where(jobs.c.state == "ready", jobs.c.target == ANYONE)
            )
            recent = connection.execute(
                select(job_events.c.event, func.count())
                .where(job_events.c.at > now - 300_000)
                .group_by(job_events.c.event)
            )
            return QueueStats(depth, max(0, now - (oldest or now)) / 1000, dict(recent.all()))

    def job(self, job_id: int) -> dict[str, Any] | None:
        """One job as it is now, with the events of its past; None if there is none."""
        with self.database.read() as connection:
            found = self._described(connection, select(jobs).where(jobs.c.id == job_id))
            return found[0] if found else None

    def dead_letters(self, limit: int = 50, before: int | None = None) -> list[dict[str, Any]]:
        """Dead jobs with their history, newest id first; `before` continues after a page's last id."""
        query = select(jobs).where(jobs.c.state == "dead").order_by(jobs.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(jobs.c.id < before)
        with self.database.read() as connection:
            return self._described(connection, query)

    def _described(self, connection: Connection, query: Any) -> list[dict[str, Any]]:
        found = [dict(row) for row in connection.execute(query).mappings()]
        events = connection.execute(
            select(job_events).where(job_events.c.job_id.in_([job["id"] for job in found])).order_by(job_events.c.id)
        ).mappings()
        history = [dict(event) for event in events]
        return [job | {"events": [event for event in history if event["job_id"] == job["id"]]} for job in found]

    def requeue(self, ids: Sequence[int]) -> list[int]:
        """Make dead jobs ready again with all their attempts; the ids that were dead."""
        if not ids:
            return []
        with self.database.write() as connection:
            rows = connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(ids), jobs.c.state == "dead")
                .values(state="ready", attempts=0, run_at=self.database.clock_expression(), finished_at=None)
                .returning(*_EVENT)
            ).all()
            self._record(connection, "requeued", rows)
        return sorted(row.id for row in rows)


_EVENT = [jobs.c[name] for name in ("id", "document_id", "token", "attempts", "error_class", "error", "state")]


def clean(value: str) -> str:
    """The text as both stores can hold it: no NUL, no lone surrogates."""
    return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
