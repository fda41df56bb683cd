"""Figures of the whole service: how much there is, how much is done, what fails, and how much tokens use."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from atlas.db import Database
from atlas.queue import QueueStats, in_state
from atlas.schema import PRIORITIES, documents, jobs, queue_samples, token_uses, tokens
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
            "documents": _documents(connection),
            "queue": queue,
            "throughput": {span: _ended(connection, now - length) for span, length in _SPANS_MS.items()},
            "dead_letters": _failures(connection),
            "tokens": _uses(connection, now),
        }


def _documents(connection: Connection) -> dict[str, int]:
    names = {"queued": "ready", "processing": "running", "dead": "dead"}
    counts = {
        name: connection.scalar(select(func.count()).where(in_state(state), jobs.c.document_id.is_not(None))) or 0
        for name, state in names.items()
    }
    total = connection.scalar(select(func.count()).select_from(documents)) or 0
    return {"total": total, **counts, "processed": max(0, total - sum(counts.values()))}


def _ended(connection: Connection, since: int) -> dict[str, int]:
    sums = [func.coalesce(func.sum(queue_samples.c[name]), 0) for name in ("finished", "failed")]
    finished, failed = connection.execute(select(*sums).where(queue_samples.c.at > since)).one()
    return {"finished": int(finished), "failed": int(failed)}


def _failures(connection: Connection) -> dict[str, int]:
    kind = func.coalesce(jobs.c.error_class, "unknown")
    return dict(connection.execute(select(kind, func.count()).where(in_state("dead")).group_by(kind)).all())


def _uses(connection: Connection, now: int) -> list[dict[str, Any]]:
    used = select(tokens.c.name, token_uses).join(tokens, tokens.c.sha256 == token_uses.c.token)
    rows = connection.execute(used.where(tokens.c.disabled_at.is_(None)).order_by(tokens.c.name)).mappings()
    return [
        {"name": row["name"]}
        | {name: row[f"{name}_uses"] if row[name] == now // length else 0 for name, length in WINDOWS_MS.items()}
        for row in rows
    ]
