"""Which service processes are alive: each writes a heartbeat that the health gate reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, select

from atlas.db import Database
from atlas.schema import workers
from atlas.settings import Identity


@dataclass(frozen=True)
class Presence:
    """A service as it was last seen."""

    host: str
    slot: str
    service: str
    deployment: int
    release: str
    detail: Mapping[str, Any] | None
    started_at: int
    seen_at: int
    age_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def beat(
    database: Database, identity: Identity, service: str, started_at: int, detail: Mapping[str, Any] | None = None
) -> None:
    """Say that this service is alive. `started_at` (ms) tells a restarted process from an old one."""
    with database.write() as connection:
        values = {
            "deployment": identity.deployment,
            "release": identity.release,
            "detail": detail,
            "started_at": started_at,
            "seen_at": database.clock_expression(),
        }
        key = {"host": identity.host, "slot": identity.slot, "service": service}
        statement = database.insert(workers).values(**key, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=values))


def leave(database: Database, identity: Identity, service: str) -> None:
    """Say that this service has stopped."""
    with database.write() as connection:
        connection.execute(
            delete(workers).where(
                workers.c.host == identity.host,
                workers.c.slot == identity.slot,
                workers.c.service == service,
                workers.c.deployment == identity.deployment,
            )
        )


def roster(database: Database) -> list[Presence]:
    """Every service that was seen and has not left, with the age of its last heartbeat."""
    with database.read() as connection:
        now = database.now(connection)
        query = select(workers).order_by(workers.c.host, workers.c.slot, workers.c.service)
        return [
            Presence(**row._mapping, age_seconds=max(0, now - row.seen_at) / 1000) for row in connection.execute(query)
        ]
