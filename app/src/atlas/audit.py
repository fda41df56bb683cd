"""The audit log: who did what to which object, when and from where.

The store itself keeps it: a record is never changed, and goes only when the days are over that were set when it was
written. On PostgreSQL the table belongs to a role that the service is no member of (docs/decisions/0007-audit.md).
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from atlas.db import Database, rfc3339, total
from atlas.queue import DAY_MS
from atlas.schema import audit

RETENTION_DAYS = 365
FILTERS = ("actor", "action", "object_type", "object_id")
_SHOWN = [column for column in audit.c if column.name != "keep_days"]


def record(
    connection: Connection,
    actor: str,
    action: str,
    object_type: str,
    object_id: str | int | None = None,
    address: str | None = None,
    request_id: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write one record in the caller's transaction: it is there exactly if what it speaks of was done.

    `action` is a verb in the past ("requeued"), `detail` holds no secret. The store stamps the time.
    """
    connection.execute(
        insert(audit).values(
            actor=actor,
            action=action,
            object_type=object_type,
            object_id=None if object_id is None else str(object_id),
            address=address,
            request_id=request_id,
            detail=None if detail is None else dict(detail),
            keep_days=connection.get_execution_options().get("audit_retention_days", RETENTION_DAYS),
        )
    )


def operator() -> str:
    """The actor of a command: the account that runs it, or that called sudo for it."""
    return f"cli:{os.environ.get('SUDO_USER') or getpass.getuser()}"


def records(
    database: Database,
    filters: Mapping[str, str | None] | None = None,
    limit: int = 50,
    before: int | None = None,
    since: int | None = None,
    until: int | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Records that match, newest first, and how many do (see db.total).

    `filters` are values for names of FILTERS; `since` and `until` are in milliseconds; `before` the last id of a page.
    """
    wanted = [audit.c[name] == value for name, value in (filters or {}).items() if value is not None]
    wanted += [] if since is None else [audit.c.at >= since]
    wanted += [] if until is None else [audit.c.at < until]
    page = select(*_SHOWN).where(*wanted).order_by(audit.c.id.desc()).limit(limit)
    with database.read() as connection:
        matching = total(connection, select(audit.c.id).where(*wanted))
        found = connection.execute(page if before is None else page.where(audit.c.id < before)).mappings()
        return [dict(row) for row in found], matching


def shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is shown: its time in RFC 3339."""
    return dict(entry) | {"at": rfc3339(entry["at"])}


def purge(database: Database, limit: int = 1000) -> int:
    """Remove records whose days are over, at most `limit`; how many. Others the store does not let go."""
    with database.write() as connection:
        if database.dialect == "postgresql":
            return connection.scalar(select(func.purge_audit(limit))) or 0
        over = select(audit.c.id).where(audit.c.at + audit.c.keep_days * DAY_MS < database.clock_expression())
        return connection.execute(delete(audit).where(audit.c.id.in_(over.limit(limit)))).rowcount
