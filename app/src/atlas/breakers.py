"""Remote hosts: how many jobs may ask one at once, and its circuit breaker, kept in the store for all workers.

Closed: asked freely, within the limits. Open, after failures in a row: not asked for a while. Half-open after that: one
job at a time tries, enough successes close the breaker, one failure opens it again. Any answer of a host is a success,
even 404; what says nothing of the host (a private address, a fault of ours) counts for neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import structlog
from sqlalchemy import Connection, Text, case, delete, func, select, text

from atlas.db import Database, rfc3339, rows, total
from atlas.schema import hosts

FAULTS = frozenset({"timeout", "network", "dns", "server_error"})
SILENT = frozenset({"internal", "refused"})
FORGET_MS = 86_400_000

# A host, how it failed (a class of error; None: it answered), and the pause that it asked for (s), which all its jobs
# keep, up to the time of an open breaker.
Seen = tuple[str, str | None, float]

log = structlog.get_logger("atlas")


@dataclass(frozen=True)
class Limits:
    """How many jobs of a host may run at once, the pause between two, and when its breaker opens and closes."""

    concurrency: int = 4
    interval_seconds: float = 0
    failures: int = 10
    open_seconds: float = 300
    successes: int = 5


@dataclass(frozen=True)
class Host:
    """A remote host. `next_at` is when it may be asked next; `waiting` says that jobs stand in its lane."""

    name: str
    state: str = "closed"
    failures: int = 0
    successes: int = 0
    open_until: int = 0
    next_at: int = 0
    waiting: bool = False
    error: str | None = None

    def at(self, now: int) -> Host:
        """The host as time has made it: an open breaker becomes half-open when its time is over."""
        is_over = self.state == "open" and now >= self.open_until
        return replace(self, state="half_open", successes=0) if is_over else self

    def room(self, running: int, now: int, limits: Limits) -> int:
        """How many more jobs may be claimed now, when `running` jobs run."""
        if now < self.next_at or self.at(now).state == "open":
            return 0
        most = limits.concurrency if self.state == "closed" else 1
        return max(0, min(most - running, 1 if limits.interval_seconds else most))

    def asked(self, now: int, limits: Limits) -> Host:
        """After a claim. The pause is counted from now; without one, `now` sends the host's lane behind the others."""
        host = self.at(now)
        if not (host.waiting or limits.interval_seconds):
            return host
        return replace(host, next_at=now + int(limits.interval_seconds * 1000))

    def answered(self, now: int, limits: Limits) -> Host:
        """After a success."""
        host = self.at(now)
        if host.state == "open":
            return host
        if host.state == "half_open" and host.successes + 1 < limits.successes:
            return replace(host, successes=host.successes + 1)
        return replace(host, state="closed", failures=0, successes=0, open_until=0, error=None)

    def failed(self, now: int, limits: Limits, error: str) -> Host:
        """After a failure."""
        host = self.at(now)
        if host.state == "open":
            return host
        host = replace(host, failures=host.failures + 1, error=error)
        if host.state == "closed" and host.failures < limits.failures:
            return host
        until = now + int(limits.open_seconds * 1000)
        return replace(host, state="open", successes=0, open_until=until, next_at=max(host.next_at, until))

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: times in RFC 3339."""
        times = {key: rfc3339(getattr(self, key) or None) for key in ("open_until", "next_at")}
        return asdict(self) | times


_NAMES = rows("names", name=Text)
_COLUMNS = [hosts.c[name] for name in Host.__dataclass_fields__]
_LOAD = select(*_COLUMNS).where(hosts.c.name == _NAMES.c.name)
_LOCK = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")


def lock(connection: Connection, names: Iterable[str]) -> None:
    """Let no other transaction decide about these hosts before this one has ended.

    Call it once in a transaction: it takes all locks in one order, so that none waits in a circle. A host needs no row
    for it. On SQLite there is but one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        hashes = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in set(names))
        connection.execute(_LOCK, {"keys": sorted(int.from_bytes(found, "big", signed=True) for found in hashes)})


def load(connection: Connection, names: Collection[str]) -> dict[str, Host]:
    """What is known of these hosts."""
    found = connection.execute(_LOAD, {"names": json.dumps([[name] for name in names])})
    return {name: Host(name) for name in names} | {row.name: Host(*row) for row in found}


def save(database: Database, connection: Connection, changed: Collection[Host], now: int) -> None:
    """Store these hosts, whose locks the caller holds."""
    if not changed:
        return
    statement = database.insert(hosts)
    fresh = {column.name: statement.excluded[column.name] for column in hosts.c if column.name != "name"}
    connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_=fresh),
        [asdict(host) | {"changed_at": now} for host in changed],
    )


def observe(
    database: Database,
    connection: Connection,
    now: int,
    limits: Limits,
    seen: Collection[Seen],
) -> None:
    """Take note of what was seen of hosts."""
    if not seen:
        return
    names = {name for name, _, _ in seen}
    if not any(error in FAULTS or pause for _, error, pause in seen) and not _troubled(connection, names):
        return
    lock(connection, names)
    before = load(connection, names)
    after = dict(before)
    for name, error, pause in seen:
        host = after[name]
        if error in FAULTS:
            host = host.failed(now, limits, str(error))
        elif error not in SILENT:
            host = host.answered(now, limits)
        if pause:
            host = replace(host, next_at=max(host.next_at, now + int(min(pause, limits.open_seconds) * 1000)))
        after[name] = host
    for name, host in after.items():
        if host.state != before[name].state:
            log.warning("breaker", remote_host=name, state=host.state, error=host.error)
    save(database, connection, [host for name, host in after.items() if host != before[name]], now)


def _troubled(connection: Connection, names: Collection[str]) -> bool:
    return any(host.failures or host.state != "closed" for host in load(connection, names).values())


def states(database: Database, connection: Connection) -> dict[str, int]:
    """How many breakers are in each state; hosts of which nothing is known are not counted."""
    over = (hosts.c.state == "open") & (hosts.c.open_until <= database.clock_expression())
    counted = select(case((over, "half_open"), else_=hosts.c.state).label("now"), func.count()).group_by("now")
    return {"closed": 0, "open": 0, "half_open": 0} | dict(connection.execute(counted).all())


def listed(
    database: Database, state: str | None = None, limit: int = 50, after: str | None = None
) -> tuple[list[Host], int]:
    """Hosts by name and how many there are (see db.total); `after` continues after a page's last name."""
    wanted = [] if state is None else [hosts.c.state == state]
    page = select(*_COLUMNS).where(*wanted).order_by(hosts.c.name).limit(limit)
    with database.read() as connection:
        known = total(connection, select(hosts.c.name).where(*wanted))
        found = connection.execute(page if after is None else page.where(hosts.c.name > after))
        now = database.now(connection)
        return [Host(*row).at(now) for row in found], known


def reset(database: Database, connection: Connection, name: str) -> bool:
    """Close the breaker, and end any pause of the host; whether anything was known of it."""
    lock(connection, [name])
    host = load(connection, [name])[name]
    if host == Host(name):
        return False
    save(database, connection, [Host(name, waiting=host.waiting)], database.now(connection))
    database.ring(connection)
    return True


def forget(database: Database) -> None:
    """Remove hosts of which nothing was heard for a day, and nothing is left to remember."""
    with database.write() as connection:
        now = database.now(connection)
        idle = (~hosts.c.waiting) & (hosts.c.next_at < now) & (hosts.c.changed_at < now - FORGET_MS)
        connection.execute(delete(hosts).where(idle))
