"""Run by Alembic: uses the connection and transaction that `migrate` hands in."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import insert

from atlas.db import Database
from atlas.migrations import phase_of
from atlas.schema import metadata, schema_revisions

database: Database = context.config.attributes["database"]
connection = context.config.attributes["connection"]


def record(*, step: Any, **_: object) -> None:
    """Note the revision just applied, with its phase."""
    script = step.up_revision
    values = {"revision": script.revision, "phase": phase_of(script), "applied_at": database.now(connection)}
    connection.execute(insert(schema_revisions), [values])


context.configure(connection=connection, target_metadata=metadata, on_version_apply=record)  # type: ignore[arg-type]
context.run_migrations()
