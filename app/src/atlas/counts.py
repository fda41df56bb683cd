"""How many jobs and documents there are: counted by triggers of the store, in the transaction of each change.

So the figures are exact for whoever reads them, whichever release wrote, and cost the same however long the queue is.
Jobs are counted by state (ready, running, dead), kind, priority, and, where dead, class of error; documents as STORED.
On PostgreSQL each session counts in rows of its own (`shard`), so that none waits for another; the sum is what counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, case, func, literal, literal_column, select, text, union_all

from atlas.db import Database
from atlas.schema import counts, documents, jobs

STORED = "stored"
_KEY = [counts.c[name] for name in ("state", "kind", "priority", "error_class")]
_SUM = func.sum(counts.c.n)
_ALL = select(*_KEY, _SUM.label("n")).group_by(*_KEY)
# What each count should be, taken from it.
_JOB_KEY = [jobs.c.state, jobs.c.kind, jobs.c.priority]
_DEAD = case((jobs.c.state == "dead", func.coalesce(jobs.c.error_class, "unknown")), else_="").label("error_class")
_BOTH = union_all(
    select(*_KEY, counts.c.n),
    select(*_JOB_KEY, _DEAD, -func.count()).where(jobs.c.state != "done").group_by(*_JOB_KEY, _DEAD),
    select(literal(STORED), literal("document"), literal_column("0"), literal(""), -func.count()).select_from(
        documents
    ),
).subquery()
_DRIFT = select(*list(_BOTH.c)[:4], func.sum(_BOTH.c.n)).group_by(*list(_BOTH.c)[:4]).having(func.sum(_BOTH.c.n) != 0)
_MERGE = text("""
    WITH gone AS (
        DELETE FROM counts WHERE (state, kind, priority, error_class, shard) IN (
            SELECT state, kind, priority, error_class, shard FROM counts
            WHERE shard <> 0 AND shard NOT IN (SELECT pid FROM pg_stat_activity WHERE pid IS NOT NULL)
            FOR UPDATE SKIP LOCKED
        ) RETURNING *
    )
    INSERT INTO counts AS c (state, kind, priority, error_class, shard, n)
    SELECT state, kind, priority, error_class, 0, sum(n) FROM gone GROUP BY 1, 2, 3, 4
    ON CONFLICT (state, kind, priority, error_class, shard) DO UPDATE SET n = c.n + excluded.n
""")


class Count(NamedTuple):
    """Jobs in a state, or documents (STORED), that have the rest in common."""

    state: str
    kind: str
    priority: int
    error_class: str
    n: int


def counted(connection: Connection) -> list[Count]:
    """All counts."""
    return [Count(*row[:4], int(row[4])) for row in connection.execute(_ALL)]


def in_state(connection: Connection, state: str) -> int:
    """How many jobs are in a state (other than done)."""
    return int(connection.scalar(select(_SUM).where(counts.c.state == state)) or 0)


def drift(connection: Connection) -> list[tuple[Any, ...]]:
    """Counts that differ from what is there, each with the difference: none, unless something is broken."""
    return [tuple(row) for row in connection.execute(_DRIFT)]


def merge(database: Database) -> bool:
    """Add up what sessions of PostgreSQL have counted that are over; always False: there is never more to do."""
    with database.write() as connection:
        connection.execute(_MERGE)
    return False
