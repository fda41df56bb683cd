"""The durable queue: jobs are claimed under a lease, and finished exactly once.

A job is `ready`, `running`, `done` or `dead`. A claim raises its fencing token and its attempts; who finishes, fails or
renews must hold the current token. Whatever dies in between, the reaper makes the job ready again.

A job whose remote host may not be asked now (see breakers) leaves the common queue for the lane of its host, once, and
is claimed from there when its turn comes: what waits for one host costs the others nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    null,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from atlas import breakers, counts
from atlas.db import Database, rfc3339, rows, total
from atlas.schema import ANYONE, LANE, PRIORITIES, PRIORITY_NAMES, deployments, documents, hosts, job_events, jobs
from atlas.settings import RETRIES, Retry

DAY_MS = 86_400_000
# A claim that meets jobs of blocked hosts looks at so many jobs more, at most so often, and into so many lanes.
WINDOW = 1000
ROUNDS = 8
LANES = 16
PROBES = 4
NOBODY = -2
CHANGED_AT_ONCE, CHANGED_MOST = 1000, 10_000
STATES = ("ready", "running", "done", "dead")
_SHOWN = ("id", "kind", "document_id", "state", "host", "attempts", "request_id", "error_class", "error")
_SHOWN_EVENT = ("event", "attempt", "owner", "deployment", "error_class", "error")
Note = Callable[[Connection, Sequence[int]], None]


@dataclass(frozen=True)
class NewJob:
    """A job to enqueue. `target` names the one deployment that may claim it (a probe).

    `host` is the remote host that it will ask, as host[:port].
    """

    kind: str = "document"
    document_id: str | None = None
    payload: Mapping[str, Any] | None = None
    priority: int = PRIORITIES["normal"]
    target: int = ANYONE
    delay_seconds: float = 0
    request_id: str | None = None
    host: str | None = None


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
    host: str | None = None


@dataclass(frozen=True)
class Result:
    """A job that was done, and what it made; `value` goes to the `store` given to `finish`.

    A value of None says that nothing was to be done, and so nothing of a host. `asked` are the remote hosts that
    answered; if none is named, that of the job.
    """

    job: Job
    value: Any = None
    asked: Sequence[str] = ()

    def seen(self) -> list[breakers.Seen]:
        """What this says of hosts."""
        asked = self.asked or ([self.job.host] if self.job.host else [])
        return [] if self.value is None else [(name, None, 0.0) for name in set(asked)]


@dataclass(frozen=True)
class Failure:
    """A job that did not work out. `retry_after` is in seconds, from the server.

    `asked` are the remote hosts that were asked, one after another: the last one failed, the others led there. If none
    is named, it was the host of the job.
    """

    job: Job
    error_class: str
    message: str
    retry_after: float | None = None
    asked: Sequence[str] = ()

    @property
    def host(self) -> str | None:
        """The host that failed: the job waits for that one from now on."""
        return self.asked[-1] if self.asked else self.job.host

    def seen(self) -> list[breakers.Seen]:
        """What this says of hosts."""
        ways: list[breakers.Seen] = [(name, None, 0.0) for name in {*self.asked} - {self.host}]
        return ways + ([(self.host, self.error_class, self.retry_after or 0.0)] if self.host else [])


@dataclass(frozen=True)
class Which:
    """Jobs that match everything that is given. `state` is one of STATES; the times (ms) are those of their end."""

    ids: Sequence[int] | None = None
    state: str | None = None
    host: str | None = None
    error_class: str | None = None
    since: int | None = None
    until: int | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        given = {name: getattr(self, name) for name in ("host", "error_class")}
        wanted = [jobs.c[name] == value for name, value in given.items() if value is not None]
        wanted += [] if self.state is None else [in_state(self.state)]
        wanted += [] if self.ids is None else [jobs.c.id.in_(self.ids)]
        wanted += [] if self.since is None else [jobs.c.finished_at >= self.since]
        return wanted + ([] if self.until is None else [jobs.c.finished_at < self.until])


@dataclass(frozen=True)
class QueueStats:
    """`depth` by state (ready, running, dead) and priority; ages in seconds; `detail` are the counts it is made of."""

    depth: Mapping[str, Mapping[int, int]]
    oldest_ready_seconds: float
    detail: Sequence[counts.Count] = ()

    def total(self, state: str) -> int:
        return sum(self.depth.get(state, {}).values())


_ENDED: list[ColumnElement[str]] = [literal_column("'done'"), literal_column("'dead'")]


def in_state(state: str) -> ColumnElement[bool]:
    """The condition for one of STATES."""
    # Written out: a partial index serves no condition whose value is bound later. SQLite also wants to see its words.
    ended = (
        [jobs.c.state.in_([literal_column("'done'"), literal_column("'dead'")])] if state in ("done", "dead") else []
    )
    return and_(jobs.c.state == literal_column(f"'{state}'"), *ended)


def _common(priority: int) -> ColumnElement[bool]:
    # One range of the index by run_at, whatever waits for later at another priority.
    written = (in_state("ready"), jobs.c.target == literal_column(str(ANYONE)))
    return and_(*written, jobs.c.priority == literal_column(str(priority)))


def _soonest(priority: int) -> Any:
    # Not a minimum, for which PostgreSQL reads all of a table that it has not analysed yet.
    return (
        select(jobs.c.run_at)
        .where(_common(priority))
        .order_by(jobs.c.run_at)
        .limit(literal_column("1"))
        .scalar_subquery()
    )


_OLDEST = select(*(_soonest(priority) for priority in PRIORITIES.values()))
_NOW = bindparam("now", type_=BigInteger)
# Written out too: PostgreSQL makes a new plan each time for what it cannot judge without the value.
_OWN, _MOST, _LIMIT, _WINDOW = (
    bindparam(name, type_=BigInteger, literal_execute=True) for name in ("own", "concurrency", "limit", "window")
)
_URGENCY = (jobs.c.priority, jobs.c.run_at, jobs.c.id)
_QUEUED = [jobs.c[name] for name in ("id", "target", "priority", "run_at", "host")]
_IDS, _NAMES = rows("ids", id=BigInteger), rows("names", name=Text)
_HELD = rows("held", id=BigInteger, token=BigInteger)
# What a worker may end or renew: the jobs that it still holds.
_FENCE = and_(jobs.c.id == _HELD.c.id, jobs.c.token == _HELD.c.token, in_state("running"))


def _waiting(where: ColumnElement[bool], limit: Any) -> Any:
    found = select(*_QUEUED).where(where, jobs.c.run_at <= _NOW).order_by(*_URGENCY).limit(limit)
    return select(found.with_for_update(skip_locked=True).subquery())


_PROBES = and_(in_state("ready"), jobs.c.target == _OWN)
_CANDIDATES = union_all(
    _waiting(_PROBES, literal_column(str(PROBES))),
    *(_waiting(_common(priority), _WINDOW) for priority in sorted(PRIORITIES.values())),
).limit(_LIMIT)
_IN_LANE = and_(in_state("ready"), jobs.c.target == literal_column(str(LANE)))
_LANE = (
    select(*_QUEUED)
    .where(_IN_LANE, jobs.c.host == bindparam("host", type_=Text))
    .order_by(*_URGENCY)
    .limit(_LIMIT)
    .with_for_update(skip_locked=True)
)
_RUNNING = select(func.count()).where(in_state("running"), jobs.c.host == hosts.c.name).scalar_subquery()
_HAS_ROOM = and_(hosts.c.waiting, case((hosts.c.state == "closed", _MOST), else_=1) > _RUNNING)
_LANES = select(hosts.c.name).where(_HAS_ROOM, hosts.c.next_at <= _NOW).order_by(hosts.c.next_at)
_LANES = _LANES.limit(literal_column(str(LANES)))
_LEAVE = (
    update(hosts)
    .where(hosts.c.name == _NAMES.c.name, ~select(jobs.c.id).where(_IN_LANE, jobs.c.host == hosts.c.name).exists())
    .values(waiting=False)
)
_COUNT = (
    select(jobs.c.host, func.count()).where(in_state("running"), jobs.c.host == _NAMES.c.name).group_by(jobs.c.host)
)
_CLAIM = (
    update(jobs)
    .where(jobs.c.id == _IDS.c.id)
    .values(
        state="running",
        target=case((jobs.c.target == LANE, ANYONE), else_=jobs.c.target),
        token=jobs.c.token + 1,
        attempts=jobs.c.attempts + 1,
        lease_until=bindparam("b_until"),
        owner=bindparam("b_owner"),
        deployment=bindparam("b_deployment"),
    )
    .returning(*(jobs.c[name] for name in Job.__dataclass_fields__))
)
_PARK = update(jobs).where(jobs.c.id == _IDS.c.id).values(target=LANE)
_RENEW = update(jobs).where(_FENCE).values(lease_until=bindparam("b_until")).returning(jobs.c.id)
_RELEASE = update(jobs).where(_FENCE).values(state="ready", attempts=jobs.c.attempts - 1, lease_until=None)
_FINISH = (
    update(jobs)
    .where(_FENCE)
    .values(state="done", finished_at=_NOW, lease_until=None, error_class=None, error=None)
    .returning(jobs.c.id, jobs.c.token)
)
_ENDS = rows(
    "held",
    id=BigInteger,
    token=BigInteger,
    state=Text,
    attempts=BigInteger,
    run_at=BigInteger,
    kind=Text,
    error=Text,
    host=Text,
)
_FAIL = (
    update(jobs)
    .where(jobs.c.id == _ENDS.c.id, jobs.c.token == _ENDS.c.token, in_state("running"))
    .values(
        state=_ENDS.c.state,
        attempts=_ENDS.c.attempts,
        run_at=_ENDS.c.run_at,
        finished_at=case((_ENDS.c.state == "dead", _NOW)),
        lease_until=None,
        error_class=_ENDS.c.kind,
        error=_ENDS.c.error,
        host=_ENDS.c.host,
    )
    .returning(jobs.c.id, jobs.c.token)
)
_RECORD = insert(job_events).from_select(
    ["job_id", "document_id", "event", "token", "attempt", "owner", "deployment", "error_class", "error", "at"],
    select(
        *(jobs.c.id, jobs.c.document_id),
        case((in_state("dead"), bindparam("if_dead", type_=Text)), else_=bindparam("event", type_=Text)),
        *(jobs.c.token, jobs.c.attempts, bindparam("owner", type_=Text), bindparam("deployment", type_=BigInteger)),
        *(jobs.c.error_class, jobs.c.error, _NOW),
    ).where(jobs.c.id == _IDS.c.id),
)
_NEXT_OWN = select(func.min(jobs.c.run_at).label("at")).where(_PROBES)
_FIRST = union_all(
    _NEXT_OWN,
    *(select(_soonest(priority)) for priority in PRIORITIES.values()),
    select(select(hosts.c.next_at).where(_HAS_ROOM).order_by(hosts.c.next_at).limit(1).scalar_subquery()),
).subquery()
_NEXT = select(func.min(_FIRST.c.at))


class Queue:
    """The queue as one worker process (`owner`, of `deployment`) sees it.

    Durations are in seconds. `retries` says how classes of error differ from `attempts` and `retry_base_seconds`.
    `random_delay(upper)` draws the jitter and is replaced in tests.
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
        retries: Mapping[str, Retry] = RETRIES,
        limits: breakers.Limits | None = None,
        random_delay: Callable[[float], float] = lambda upper: random.uniform(0, upper),  # noqa: S311
    ) -> None:
        self.database = database
        self.owner = owner
        self.deployment = deployment
        self.lease_ms = int(lease_seconds * 1000)
        self.attempts = attempts
        self.retry_base_seconds = retry_base_seconds
        self.retry_cap_seconds = retry_cap_seconds
        self.retries = retries
        self.limits = limits or breakers.Limits()
        self._random_delay = random_delay
        self._own = NOBODY if deployment == ANYONE else deployment
        this = deployments.c.id == deployment
        self._standing = select(
            database.clock_expression(),
            *(select(deployments.c[name]).where(this).scalar_subquery() for name in ("admitted", "concurrency")),
        )

    def enqueue(self, connection: Connection, job: NewJob) -> int:
        """Add one job in the caller's transaction; its id."""
        [(job_id, _)] = self.enqueue_many(connection, [job])
        return job_id

    def enqueue_many(self, connection: Connection, new: Sequence[NewJob]) -> list[tuple[int, str | None]]:
        """Add jobs in the caller's transaction; (id, document id) of each, in no particular order."""
        now = self.database.now(connection)
        names = ("kind", "document_id", "payload", "priority", "state", "target", "run_at", "request_id")
        values = [
            (job.kind, job.document_id, job.payload, job.priority, "ready", job.target)
            + (now + int(job.delay_seconds * 1000), job.request_id, job.host, now)
            for job in new
        ]
        self.database.ring(connection)
        added = self.database.insert_rows(connection, jobs, (*names, "host", "created_at"), values, "id, document_id")
        return [(job_id, document_id) for job_id, document_id in added]

    def claim(self, limit: int = 1) -> list[Job]:
        """Up to `limit` jobs, most urgent first: this deployment's probes, and others' if it is admitted."""
        claimed: list[Job] = []
        window = limit
        for _ in range(ROUNDS):
            try:
                with self.database.write() as connection:
                    found, goes_on = self._claim(connection, limit - len(claimed), window)
            except SQLAlchemyError:
                if not claimed:
                    raise
                break
            claimed += found
            if not goes_on or len(claimed) >= limit:
                break
            window = WINDOW
        return claimed

    def _claim(self, connection: Connection, limit: int, window: int) -> tuple[list[Job], bool]:
        """Jobs, and whether another look would find more: this one has met jobs whose host may not be asked."""
        now, places = self._places(connection, limit)
        candidates, lanes = self._candidates(connection, now, max(window, places) if places else 0)
        names = {row.host for row in candidates if row.host} | lanes
        known, room = self._room(connection, names, now) if names else ({}, {})
        chosen: list[Row[Any]] = []
        parked: list[Row[Any]] = []
        for row in candidates:
            is_probe = row.target == self._own
            if len(chosen) == limit or not (places or is_probe):
                break
            if row.host and not room[row.host]:
                parked += [row] if row.target == ANYONE else []
                continue
            chosen.append(row)
            places -= not is_probe
            if row.host:
                room[row.host] -= 1
        values = {"b_until": now + self.lease_ms, "b_owner": self.owner, "b_deployment": self.deployment}
        claimed = connection.execute(_CLAIM, values | {"ids": _listed(chosen)}).all() if chosen else []
        taken = {row[0]: Job(*row) for row in claimed}
        if parked:
            connection.execute(_PARK, {"ids": _listed(parked)})
        asked, blocked = ({row.host for row in some} for some in (chosen, parked))
        for name, host in list(known.items()):
            after = replace(host, waiting=host.waiting or name in blocked)
            known[name] = after.asked(now, self.limits) if name in asked else after
            if name in lanes - asked and len(lanes) == LANES:
                # Nothing in it was urgent enough: other lanes are looked into first the next time.
                known[name] = replace(after, next_at=max(after.next_at, now))
            if known[name] == host:
                del known[name]
        breakers.save(self.database, connection, known.values(), now)
        if lanes:
            connection.execute(_LEAVE, {"names": _names(lanes)})
        return [taken[row.id] for row in chosen], bool(parked)

    def _places(self, connection: Connection, limit: int) -> tuple[int, int]:
        """The time, and how many common jobs this deployment may claim."""
        now, is_admitted, concurrency = connection.execute(self._standing).one()
        if not is_admitted or concurrency is None:
            return now, limit if is_admitted else 0
        # Only a limited deployment is locked, so that its processes count one after another.
        connection.execute(select(deployments.c.id).where(deployments.c.id == self.deployment).with_for_update())
        running = select(func.count()).where(in_state("running"), jobs.c.deployment == self.deployment)
        return now, max(0, min(limit, concurrency - (connection.scalar(running) or 0)))

    def _candidates(self, connection: Connection, now: int, window: int) -> tuple[list[Row[Any]], set[str]]:
        """Probes, then what is queued for anyone, most urgent first; and the lanes that were looked into."""
        values = {"now": now, "own": self._own, "window": window, "limit": window + PROBES}
        found = connection.execute(_CANDIDATES, values).all()
        probes = [row for row in found if row.target != ANYONE]
        queued = list(found[len(probes) :][:window])
        # Behind a full window there may be jobs that are more urgent than what waits in a lane.
        last = _urgency(queued[-1]) if 0 < len(queued) == window else None
        most = self.limits.concurrency
        lanes = connection.scalars(_LANES, {"now": now, "concurrency": most}).all() if window else []
        for name in lanes:
            lane = connection.execute(_LANE, {"host": name, "limit": most})
            queued += [row for row in lane if last is None or _urgency(row) < last]
        return probes + sorted(queued, key=_urgency), set(lanes)

    def _room(
        self, connection: Connection, names: Collection[str], now: int
    ) -> tuple[dict[str, breakers.Host], dict[str, int]]:
        """The hosts, locked, and how many more jobs each may have running."""
        breakers.lock(connection, names)
        known = breakers.load(connection, names)
        running: dict[str, int] = dict(connection.execute(_COUNT, {"names": _names(names)}).all())
        return known, {name: host.room(running.get(name, 0), now, self.limits) for name, host in known.items()}

    def due_in(self) -> float | None:
        """Seconds until there is something to claim for this process; None if nothing is in sight."""
        with self.database.read() as connection:
            now, is_admitted, _ = connection.execute(self._standing).one()
            values = {"own": self._own, "concurrency": self.limits.concurrency}
            at = connection.scalar(_NEXT if is_admitted else _NEXT_OWN, values)
        return None if at is None else max(0, at - now) / 1000

    def heartbeat(self, claimed: Sequence[Job]) -> set[int]:
        """Renew the leases; the ids of the jobs that were lost, whose work must stop."""
        if not claimed:
            return set()
        with self.database.write() as connection:
            until = self.database.now(connection) + self.lease_ms
            kept = connection.scalars(_RENEW, {"held": _held(claimed), "b_until": until}).all()
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
            now = self.database.now(connection)
            kept = connection.execute(_FINISH, {"held": _held(result.job for result in results), "now": now}).all()
            keys = {(row.id, row.token) for row in kept}
            accepted = [result for result in results if (result.job.id, result.job.token) in keys]
            if store is not None and accepted:
                store(connection, accepted)
            self._record(connection, now, "finished", kept)
            seen = [each for result in accepted for each in result.seen()]
            breakers.observe(self.database, connection, now, self.limits, seen)
        return {result.job.id for result in results if (result.job.id, result.job.token) not in keys}

    def fail(self, job: Job, error_class: str, message: str, retry_after: float | None = None) -> str | None:
        """End one attempt with an error: the new state, or None if the job was lost; see `fail_many`."""
        return self.fail_many([Failure(job, error_class, message, retry_after)])[0]

    def fail_many(self, failures: Sequence[Failure]) -> list[str | None]:
        """End attempts with errors, in one transaction: for each the new state, "ready" or "dead", or None if lost.

        `retry_after` (seconds, from the server) spends no attempt during the job's first day. Otherwise the back-off
        has full jitter: uniform between 0 and min(cap, base x 2^(attempts-1)).
        """
        if not failures:
            return []
        with self.database.write() as connection:
            now = self.database.now(connection)
            ends = [self._end(failure, now) for failure in failures]
            kept = connection.execute(_FAIL, {"held": json.dumps(ends), "now": now}).all()
            keys = {(row.id, row.token) for row in kept}
            self._record(connection, now, "failed", kept)
            held = [failure for failure in failures if (failure.job.id, failure.job.token) in keys]
            seen = [each for failure in held for each in failure.seen()]
            breakers.observe(self.database, connection, now, self.limits, seen)
        return [state if (job_id, token) in keys else None for job_id, token, state, *_ in ends]

    def _end(self, failure: Failure, now: int) -> tuple[int, int, str, int, int, str, str, str | None]:
        """A row of _ENDS."""
        job, retry = failure.job, self.retries.get(failure.error_class, Retry())
        spent = job.attempts
        # A pause of nothing is none: who asks for it would be asked again and again, all day.
        if failure.retry_after and now - job.created_at < DAY_MS:
            spent -= 1
            delay = min(failure.retry_after, DAY_MS / 1000)
        else:
            base = retry.base_seconds or self.retry_base_seconds
            delay = self._random_delay(min(self.retry_cap_seconds, base * 2 ** (job.attempts - 1)))
        state = "dead" if spent >= min(retry.attempts or self.attempts, self.attempts) else "ready"
        run_at = now + int(delay * 1000)
        error = clean(failure.message)[:2000]
        return job.id, job.token, state, spent, run_at, failure.error_class, error, failure.host

    def release(self, claimed: Sequence[Job]) -> None:
        """Give jobs back unworked, for anyone at once; no attempt is spent."""
        if not claimed:
            return
        with self.database.write() as connection:
            connection.execute(_RELEASE, {"held": _held(claimed)})
            self.database.ring(connection)

    def reap(self, limit: int = 1000) -> tuple[int, int]:
        """Take jobs from workers whose lease ran out: how many are ready again, and how many are dead.

        A job whose attempts are used up is dead: it has killed, or outlived, each worker that took it. Dead is also
        what has waited for a day for a host whose breaker did not close.
        """
        with self.database.write() as connection:
            now = self.database.now(connection)
            expired = select(jobs.c.id).where(in_state("running"), jobs.c.lease_until < now)
            used_up = jobs.c.attempts >= self.attempts
            lost = self._take(
                connection,
                expired.limit(limit).with_for_update(skip_locked=True),
                state=case((used_up, "dead"), else_="ready"),
                finished_at=case((used_up, now), else_=null()),
                run_at=now,
                lease_until=None,
                error_class="lost",
                error="the worker stopped answering before its lease ended",
            )
            hopeless = select(jobs.c.id).join(hosts, hosts.c.name == jobs.c.host)
            hopeless = hopeless.where(_IN_LANE, jobs.c.priority.in_(PRIORITIES.values()), hosts.c.state != "closed")
            given_up = self._take(
                connection,
                hopeless.where(jobs.c.run_at < now - DAY_MS).limit(limit).with_for_update(of=jobs, skip_locked=True),
                state="dead",
                target=ANYONE,
                finished_at=now,
                error_class="unreachable",
                error="the breaker of the host did not close for a day",
            )
            self._record(connection, now, "lost", [*lost, *given_up])
        dead = len(given_up) + sum(row.state == "dead" for row in lost)
        return len(lost) + len(given_up) - dead, dead

    def _take(self, connection: Connection, chosen: Any, **values: Any) -> Sequence[Row[Any]]:
        """Change jobs that nobody holds; their ids and new states."""
        ids = chosen.cte("chosen")
        statement = update(jobs).where(jobs.c.id.in_(select(ids.c.id))).values(**values)
        return connection.execute(statement.returning(jobs.c.id, jobs.c.state)).all()

    def _record(
        self, connection: Connection, now: int, event: str, ended: Sequence[Row[Any]], if_dead: str = "died"
    ) -> None:
        """Add an event for each of these jobs, as they are now."""
        if ended:
            values = {"owner": self.owner, "deployment": self.deployment, "event": event, "if_dead": if_dead}
            connection.execute(_RECORD, values | {"ids": _listed(ended), "now": now})

    def stats(self) -> QueueStats:
        with self.database.read() as connection:
            now = self.database.now(connection)
            found = counts.counted(connection)
            depth = {state: dict.fromkeys(PRIORITIES.values(), 0) for state in ("ready", "running", "dead")}
            for count in found:
                if count.state in depth:
                    depth[count.state][count.priority] += count.n
            oldest = connection.execute(_OLDEST).one()
            waits = max(0, *(now - (at or now) for at in oldest))
            return QueueStats(depth, waits / 1000, found)

    def job(self, job_id: int) -> dict[str, Any] | None:
        """One job as it is now, with the events of its past; None if there is none."""
        found = self.find(Which(ids=[job_id]), 1)[0]
        return found[0] if found else None

    def find(self, which: Which, limit: int = 50, before: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """Jobs with their events, newest id first, and how many match (db.total); `before` is a page's last id."""
        wanted = which.conditions()
        page = select(jobs).where(*wanted).order_by(jobs.c.id.desc()).limit(limit)
        with self.database.read() as connection:
            matching = total(connection, select(jobs.c.id).where(*wanted))
            shown = connection.execute(page if before is None else page.where(jobs.c.id < before)).mappings()
            found = {row["id"]: dict(row) | {"events": []} for row in shown}
            events = select(job_events).where(job_events.c.job_id.in_(found)).order_by(job_events.c.id)
            for event in connection.execute(events).mappings():
                found[event["job_id"]]["events"].append(dict(event))
        return list(found.values()), matching

    def requeue(self, which: Which, note: Note | None = None, limit: int = 1000) -> list[int]:
        """Make dead jobs ready again with all their attempts, at most `limit`: their ids.

        `note` is called with the ids in the same transaction, unless there are none.
        """
        with self.database.write() as connection:
            now = self.database.now(connection)
            fresh = {"state": "ready", "attempts": 0, "run_at": now, "finished_at": None}
            revived = self._take(connection, _buried(which, limit), **fresh)
            self._record(connection, now, "requeued", revived)
            self.database.ring(connection)
            return _noted(connection, revived, note)

    def discard(self, which: Which, note: Note | None = None, limit: int = 1000) -> list[int]:
        """Remove dead jobs, and their documents if those were never processed, at most `limit`: their ids."""
        with self.database.write() as connection:
            buried = self._take(connection, _buried(which, limit), lease_until=None)
            self._record(connection, self.database.now(connection), "discarded", buried, if_dead="discarded")
            remove(connection, [row.id for row in buried])
            return _noted(connection, buried, note)


# What may be done with dead letters: how, and the word for it in the audit log.
CHANGES = {"requeue": (Queue.requeue, "requeued"), "discard": (Queue.discard, "discarded")}


def change_many(queue: Queue, change: str, which: Which, note: Note) -> tuple[int, bool]:
    """Make one of CHANGES to all dead letters that match: how many, and whether some may be left.

    At most CHANGED_MOST at once, in several transactions; `note` is called in each.
    """
    make, count = CHANGES[change][0], 0
    for _ in range(CHANGED_MOST // CHANGED_AT_ONCE):
        changed = len(make(queue, which, note, CHANGED_AT_ONCE))
        count += changed
        if changed < CHANGED_AT_ONCE:
            return count, False
    return count, True


def remove(connection: Connection, ids: Sequence[int]) -> int:
    """Delete these jobs, and their documents if those were never processed: how many documents."""
    owners = connection.scalars(delete(jobs).where(jobs.c.id.in_(ids)).returning(jobs.c.document_id)).all()
    unprocessed = documents.c.id.in_([owner for owner in owners if owner]) & documents.c.processed_at.is_(None)
    return remove_documents(connection, unprocessed)


def remove_documents(connection: Connection, which: ColumnElement[bool]) -> int:
    """Delete documents, with the events of their jobs, whose errors may quote them: how many."""
    gone = connection.scalars(delete(documents).where(which).returning(documents.c.id)).all()
    if gone:
        connection.execute(delete(job_events).where(job_events.c.document_id.in_(gone)))
    return len(gone)


def shown(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job of `Queue.find` as it is shown: without its payload, with times in RFC 3339."""
    times = {name: rfc3339(job[name]) for name in ("run_at", "created_at", "finished_at")}
    events = [{"at": rfc3339(event["at"])} | {name: event[name] for name in _SHOWN_EVENT} for event in job["events"]]
    own = {name: job[name] for name in _SHOWN} | {"priority": PRIORITY_NAMES[job["priority"]]}
    return own | times | {"events": events}


def _buried(which: Which, limit: int) -> Any:
    wanted = replace(which, state="dead").conditions()
    return select(jobs.c.id).where(*wanted).order_by(jobs.c.id).limit(limit).with_for_update(skip_locked=True)


def _noted(connection: Connection, changed: Sequence[Row[Any]], note: Note | None) -> list[int]:
    ids = sorted(row.id for row in changed)
    if note is not None and ids:
        note(connection, ids)
    return ids


def _urgency(row: Row[Any]) -> tuple[int, int, int]:
    return row.priority, row.run_at, row.id


def _listed(found: Iterable[Any]) -> str:
    return json.dumps([[row.id] for row in found])


def _names(names: Iterable[str]) -> str:
    return json.dumps([[name] for name in names])


def _held(claimed: Iterable[Job]) -> str:
    return json.dumps([[job.id, job.token] for job in claimed])


def clean(value: str) -> str:
    """The text as both stores can hold it: no NUL, no lone surrogates."""
    return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
