"""Figures of the whole service: how much there is, how much is done, what fails, and how much tokens use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, select

from atlas.counts import STORED, Count
from atlas.db import Database
from atlas.queue import QueueStats
from atlas.schema import PRIORITIES, queue_samples, token_uses, tokens
from atlas.tokens import WINDOWS_MS

_SPANS_MS = {"hour": 3_600_000, "day": 86_400_000}


def collect(database: Database, stats: QueueStats, queue_limit: int) -> dict[str, Any]:
    """The figures as JSON holds them; those of the queue are made of `stats`."""
    queue: dict[str, Any] = {
        name: {priority: stats.depth[name][value] for priority, value in PRIORITIES.items()} for name in stats.depth
    }
    queue |= {"limit": queue_limit, "oldest_ready_seconds": stats.oldest_ready_seconds}
    with database.read() as connection:
        now = database.now(connection)
        return {
            "documents": _documents(stats.detail),
            "queue": queue,
            "throughput": {span: _ended(connection, now - length) for span, length in _SPANS_MS.items()},
            "dead_letters": _failures(stats.detail),
            "tokens": _uses(connection, now),
        }


def _documents(found: Sequence[Count]) -> dict[str, int]:
    total, queued, processing, dead = (
        sum(count.n for count in found if (count.state, count.kind) == (state, "document"))
        for state in (STORED, "ready", "running", "dead")
    )
    processed = total - queued - processing - dead
    return {"total": total, "queued": queued, "processing": processing, "processed": processed, "dead": dead}


def _ended(connection: Connection, since: int) -> dict[str, int]:
    sums = [func.coalesce(func.sum(queue_samples.c[name]), 0) for name in ("finished", "failed")]
    finished, failed = connection.execute(select(*sums).where(queue_samples.c.at > since)).one()
    return {"finished": int(finished), "failed": int(failed)}


def _failures(found: Sequence[Count]) -> dict[str, int]:
    failures = Counter[str]()
    for count in found:
        if count.state == "dead":
            failures[count.error_class] += count.n
    return {kind: n for kind, n in failures.items() if n}


def _uses(connection: Connection, now: int) -> list[dict[str, Any]]:
    used = select(tokens.c.name, token_uses).join(tokens, tokens.c.sha256 == token_uses.c.token)
    rows = connection.execute(used.where(tokens.c.disabled_at.is_(None)).order_by(tokens.c.name)).mappings()
    return [
        {"name": row["name"]}
        | {name: row[f"{name}_uses"] if row[name] == now // length else 0 for name, length in WINDOWS_MS.items()}
        for row in rows
    ]
