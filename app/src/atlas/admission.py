"""Which deployments may claim jobs, and which process leads: decided in the store, for all hosts at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, func, literal, select, update

from atlas import audit
from atlas.db import Database
from atlas.schema import deployments, job_events, leases

RECENT_MS = 300_000


@dataclass(frozen=True)
class Admission:
    """`concurrency` is how many jobs the deployment may have running at once; None is no limit."""

    id: int
    admitted: bool
    concurrency: int | None
    changed_at: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def admit(database: Database, deployment: int, concurrency: int | None = None, alone: bool = False) -> bool:
    """Let a deployment claim jobs and lead, and no other if `alone`; whether that changed anything."""
    if concurrency is not None and concurrency < 1:
        raise ValueError("concurrency: must be 1 or more; dismiss the deployment to stop it")
    others = [entry.id for entry in admissions(database) if alone and entry.admitted and entry.id != deployment]
    # First the new one: there is always somebody to do the work.
    return any([_set(database, deployment, True, concurrency), *(dismiss(database, other) for other in others)])


def dismiss(database: Database, deployment: int) -> bool:
    """Let a deployment claim no more jobs, and lead no longer; whether that changed anything.

    Jobs that it has claimed stay its own until they are finished.
    """
    return _set(database, deployment, False, None)


def _set(database: Database, deployment: int, admitted: bool, concurrency: int | None) -> bool:
    values = {"admitted": admitted, "concurrency": concurrency}
    with database.write() as connection:
        row = connection.execute(select(deployments).where(deployments.c.id == deployment)).one_or_none()
        if row is not None and (row.admitted, row.concurrency) == (admitted, concurrency):
            return False
        values["changed_at"] = database.now(connection)
        statement = database.insert(deployments).values(id=deployment, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
        if not admitted:
            connection.execute(delete(leases).where(leases.c.deployment == deployment))
        done, detail = ("admitted", {"concurrency": concurrency}) if admitted else ("dismissed", None)
        audit.record(connection, audit.operator(), done, "deployment", deployment, detail=detail)
        database.ring(connection)
    return True


def admissions(database: Database) -> list[Admission]:
    """What was decided for each deployment, newest deployment first."""
    with database.read() as connection:
        rows = connection.execute(select(deployments).order_by(deployments.c.id.desc()))
        return [Admission(*row) for row in rows]


def outcomes(database: Database) -> dict[int, dict[str, int]]:
    """How the jobs of the last five minutes went: deployment, event, count."""
    found: dict[int, dict[str, int]] = {}
    with database.read() as connection:
        counted = select(job_events.c.deployment, job_events.c.event, func.count())
        recent = counted.where(job_events.c.at > database.now(connection) - RECENT_MS)
        for deployment, event, count in connection.execute(
            recent.group_by(job_events.c.deployment, job_events.c.event)
        ):
            found.setdefault(deployment, {})[event] = count
    return found


def lead(database: Database, name: str, owner: str, deployment: int, seconds: float) -> bool:
    """Take or renew the lease `name` for `seconds`; whether `owner` leads now.

    Only an admitted deployment may lead, and only when no other owner's lease is running.
    """
    with database.write() as connection:
        now = database.clock_expression()
        until = now + int(seconds * 1000)
        allowed = select(literal(name), literal(owner), deployments.c.id, until).where(
            deployments.c.id == deployment, deployments.c.admitted
        )
        statement = database.insert(leases).from_select(["name", "owner", "deployment", "until"], allowed)
        statement = statement.on_conflict_do_update(
            index_elements=["name"],
            set_={"owner": statement.excluded.owner, "deployment": deployment, "until": statement.excluded.until},
            where=(leases.c.until < now) | (leases.c.owner == owner),
        )
        return connection.execute(statement.returning(leases.c.owner)).first() is not None


def step_down(database: Database, name: str, owner: str) -> None:
    """Give up the lease, so that another may lead at once."""
    with database.write() as connection:
        connection.execute(update(leases).where(leases.c.name == name, leases.c.owner == owner).values(until=0))


def leader(database: Database, name: str) -> str | None:
    """Who leads now, or None."""
    with database.read() as connection:
        query = select(leases.c.owner).where(leases.c.name == name, leases.c.until >= database.clock_expression())
        return connection.scalar(query)
