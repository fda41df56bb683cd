"""Schema migrations: Alembic revisions, each marked with a phase, and the safe way to run them.

An `expand` revision leaves the schema usable by the releases before it; a `contract` revision does not. The applied
revisions and their phases are recorded in the store, so that an older release can tell whether it may still serve.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import DBAPIError

from atlas.db import Database
from atlas.schema import schema_revisions

ADVISORY_LOCK = 0x61746C6173  # "atlas"
GUARD_SECONDS = 60.0
LOCK_MILLISECONDS = 500
"""For so long a migration waits for a table, and all others behind it; then it lets them pass and tries again."""
LOCK_PAUSE_SECONDS = 1.5
LOCK_SECONDS = 20.0
"""After so long it gives up: somebody holds the table for longer than a deploy should wait."""
LOCK_NOT_AVAILABLE = "55P03"


class MigrationError(Exception):
    """The schema cannot be migrated; nothing was changed."""


@dataclass(frozen=True)
class SchemaStatus:
    """`known`: this release has the current revision. `compatible`: this release can serve on it.

    `applied`: the revisions of the schema, each with its phase.
    """

    current: str | None
    head: str
    known: bool
    compatible: bool
    applied: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def phase_of(script: Script) -> str:
    """The phase of a revision; MigrationError if it does not state one."""
    phase = getattr(script.module, "phase", None)
    if phase not in ("expand", "contract"):
        raise MigrationError(f'revision {script.revision}: needs phase = "expand" or "contract"')
    return cast(str, phase)


@cache
def revisions() -> list[dict[str, str]]:
    """The revisions of this release, oldest first, each with its phase. Needs no store."""
    scripts = reversed(list(_scripts().walk_revisions()))
    return [{"revision": script.revision, "phase": phase_of(script)} for script in scripts]


def head() -> str:
    return revisions()[-1]["revision"]


def status(database: Database) -> SchemaStatus:
    with database.read() as connection:
        return _status(connection)


def _status(connection: Connection) -> SchemaStatus:
    own = [revision["revision"] for revision in revisions()]
    current: str | None = None
    applied: dict[str, str] = {}
    if inspect(connection).has_table("alembic_version"):
        current = connection.scalar(text("SELECT version_num FROM alembic_version"))
        query = select(schema_revisions.c.revision, schema_revisions.c.phase)
        applied = {row.revision: row.phase for row in connection.execute(query)}
    newer_contract = any(phase == "contract" for revision, phase in applied.items() if revision not in own)
    # A release serves before its contract revisions are applied: a later deploy does that.
    needed = [revision["revision"] for revision in revisions() if revision["phase"] == "expand"]
    fits = applied.keys() >= set(needed) and not newer_contract
    return SchemaStatus(current, own[-1], current in own, fits, applied)


def migrate(database: Database, contract: bool = False) -> tuple[str | None, str | None]:
    """Apply this release's revisions, up to the first `contract` one unless `contract` is set.

    Everything happens in one transaction under a lock, so that several hosts may do it at once. Returns the revision
    before and after. Raises MigrationError if the schema is newer than this release can serve, or a lock is not free.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return _migrate(database, contract)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                raise MigrationError(f"the schema could not be migrated, nothing was changed: {error.orig}") from error
        time.sleep(LOCK_PAUSE_SECONDS)


def _migrate(database: Database, contract: bool) -> tuple[str | None, str | None]:
    with database.write() as connection:
        if database.dialect == "postgresql":
            _guard(connection)
        before = _status(connection)
        if before.current is not None and not before.known:
            if before.compatible:
                return before.current, before.current
            raise MigrationError(
                f"the schema is at {before.current}, which this release (head {before.head}) cannot serve;"
                " deploy a newer release"
            )
        target = _target(before.current, contract)
        if target != before.current and target is not None:
            config = _config()
            config.attributes.update(connection=connection, database=database)
            command.upgrade(config, target)
        return before.current, target


def _guard(connection: Connection) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK}):
        if time.monotonic() > deadline:
            raise MigrationError(f"another host has been migrating for {GUARD_SECONDS:.0f} s; see atlas db status")
        time.sleep(0.1)
    # A migration waits briefly for a table, or it would queue all traffic behind itself.
    connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}"))


def _target(current: str | None, contract: bool) -> str | None:
    listed = revisions()
    names = [revision["revision"] for revision in listed]
    target, waiting = current, None
    for revision in listed[names.index(current) + 1 if current in names else 0 :]:
        if revision["phase"] == "contract" and not contract:
            waiting = waiting or revision["revision"]
        elif waiting:
            raise MigrationError(
                f"revision {revision['revision']} waits behind the contract revision {waiting}, which must come first"
            )
        else:
            target = revision["revision"]
    return target
