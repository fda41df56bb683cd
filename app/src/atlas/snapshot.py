"""The service's side of backups: a copy of the store, what a store holds, and whether this release can live on it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pysqlite3 import dbapi2 as sqlite
from sqlalchemy import func, inspect, select, text

from atlas import counts, migrations, search
from atlas.crypto import Keyring, KeyringError
from atlas.db import Database
from atlas.schema import counts as counts_table
from atlas.schema import documents, feeds, metadata, sessions

SEARCHED_DOCUMENTS = 50
# Whose rows come and go while nothing is done to the store.
FLEETING = (counts_table, sessions)
# Several plain words in a row: a phrase that both search engines cut alike.
_PHRASE = re.compile(r"\b(?:[A-Za-z]{3,12} ){2,7}[A-Za-z]{5,12}\b")


class SnapshotError(Exception):
    """A copy cannot be taken; the message says why, and no file is left."""


def take(source: str, target: Path) -> dict[str, Any]:
    """Copy the SQLite file *source* to *target* as it is at one moment, whole and durable or not at all.

    Writers go on meanwhile. Returns what the copy holds (see `contents`) and its size. Raises SnapshotError.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)):
            pass
        original = sqlite.connect(f"file:{source}?mode=ro", uri=True)
        copy = sqlite.connect(str(partial), isolation_level=None)
        try:
            original.backup(copy)
            # One file that can be opened where nothing can be written.
            copy.execute("PRAGMA journal_mode=DELETE")
            found = [str(row[0]) for row in copy.execute("PRAGMA integrity_check(5)")]
        finally:
            copy.close()
            original.close()
        if found != ["ok"]:
            raise SnapshotError(f"the copy of {source} is damaged: {'; '.join(found)}")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        held = Database.from_url(f"sqlite:///{partial}")
        try:
            values = contents(held)
        finally:
            held.close()
        partial.rename(target)
    except (sqlite.Error, OSError) as error:
        raise SnapshotError(f"{source} cannot be copied to {target}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return values | {"bytes": target.stat().st_size}


def contents(database: Database) -> dict[str, Any]:
    """The schema revision, and the number of rows of each table that lasts, all of one moment."""
    with database.read() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        present = set(inspect(connection).get_table_names())
        rows = {
            table.name: connection.scalar(select(func.count()).select_from(table))
            for table in metadata.sorted_tables
            if table.name in present and table not in FLEETING
        }
    return {"schema": database.revision(), "rows": rows}


def verify(database: Database, keyring: Keyring) -> dict[str, Any]:
    """Whether this release can live on the store: `faults` names what keeps it from it, the rest what was found.

    Looks at the file (SQLite), the schema, every sensitive field, the audit log, and asks the search for a document.
    """
    schema = migrations.status(database)
    faults = []
    if database.dialect == "sqlite":
        with database.read() as connection:
            for pragma in ("integrity_check(5)", "foreign_key_check"):
                broken = [str(row[0]) for row in connection.execute(text(f"PRAGMA {pragma}")) if row[0] != "ok"]
                faults += [f"{pragma.split('(')[0]}: {line}" for line in broken[:5]]
    if not schema.compatible:
        faults.append(f"the schema is at {schema.current or 'nothing'}; this release reads {schema.head}")
        return {"faults": faults, "schema": schema.current}
    with database.read() as connection:
        faults += [f"the count of {row[:4]} is off by {row[4]}" for row in counts.drift(connection)]
    found = contents(database)
    opened, unreadable = _open_sensitive(database, keyring)
    searched, missed = _search(database)
    return found | {"faults": faults + unreadable + missed, "sensitive": opened, "searched": searched}


def _open_sensitive(database: Database, keyring: Keyring) -> tuple[int, list[str]]:
    """How many sensitive fields were decrypted, and a fault for each table that holds one that cannot be."""
    opened, faults = 0, []
    for table in (documents, feeds):
        closed = 0
        query = select(table.c.sensitive).where(table.c.sensitive.is_not(None))
        with database.read() as connection:
            for value in connection.execution_options(yield_per=500).scalars(query):
                try:
                    keyring.decrypt(value)
                    opened += 1
                except KeyringError:
                    closed += 1
        if closed:
            faults.append(f"{closed} sensitive fields of {table.name} need a key that is not in the keyring")
    return opened, faults


def _search(database: Database) -> tuple[str | None, list[str]]:
    """The document that the search was asked for, and a fault if it did not find it."""
    query = (
        select(documents.c.seq, documents.c.id, documents.c.text)
        .where(documents.c.text.is_not(None))
        .order_by(documents.c.seq.desc())
        .limit(SEARCHED_DOCUMENTS)
    )
    with database.read() as connection:
        for row in connection.execute(query).all():
            phrase = _PHRASE.search(row.text)
            if phrase:
                _total, matches = search.find(connection, f'"{phrase.group()}"', 1000, 0)
                is_found = row.seq in {match.seq for match in matches}
                return row.id, [] if is_found else [f"the search does not find the document {row.id}"]
    return None, []
