"""The rotation of the keys that encrypt sensitive fields: how far it is, and the next step.

A key is added by putting it first into the credential `fernet_keys`. What older keys encrypted is then encrypted anew,
in batches that commit on their own, so that a run that was killed is continued by the next. A key may go when the
store counts nothing under it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Table, bindparam, func, select, update

from atlas import audit
from atlas.crypto import Keyring, KeyringError
from atlas.db import Database
from atlas.schema import documents, feeds

BATCH = 100
PAUSE_SECONDS = 0.005
_TABLES = (documents, feeds)


@dataclass(frozen=True)
class Progress:
    """How many sensitive fields each key has encrypted, by its fingerprint, newest key first.

    `remaining` counts those that are not under the newest key, `unknown` those whose key is not in the keyring.
    """

    rows: dict[str, int]
    remaining: int
    unknown: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def progress(connection: Connection, keyring: Keyring) -> Progress:
    counted = dict.fromkeys(keyring.fingerprints, 0)
    for table in _TABLES:
        query = select(table.c.sensitive_key, func.count()).where(table.c.sensitive_key.is_not(None))
        for key, count in connection.execute(query.group_by(table.c.sensitive_key)):
            counted[key] = counted.get(key, 0) + count
    unknown = sum(count for key, count in counted.items() if key not in keyring.fingerprints)
    return Progress(counted, sum(counted.values()) - counted[keyring.fingerprints[0]], unknown)


def reencrypt(database: Database, keyring: Keyring) -> tuple[int, int]:
    """Bring everything that an older key of the keyring encrypted under the newest.

    Returns how many fields were encrypted anew, and how many could not be read (they stay as they are). The service
    goes on meanwhile: it reads with all keys, and each batch holds its rows only briefly.
    """
    newest, done, unreadable = keyring.fingerprints[0], 0, 0
    with database.write() as connection:
        before = progress(connection, keyring)
        if before.remaining == before.unknown:
            return 0, 0
        _record(connection, "reencrypting", newest, before)
    for table in _TABLES:
        for old in keyring.fingerprints[1:]:
            last = -1
            while True:
                with database.write() as connection:
                    position, changed, failed = _batch(connection, keyring, table, old, last)
                done, unreadable = done + changed, unreadable + failed
                if position == last:
                    break
                last = position
                time.sleep(PAUSE_SECONDS)
    with database.write() as connection:
        _record(connection, "reencrypted", newest, progress(connection, keyring))
    return done, unreadable


def _batch(connection: Connection, keyring: Keyring, table: Table, old: str, last: int) -> tuple[int, int, int]:
    """The following rows under the key `old`: the last of them (else `last`), how many changed, how many failed."""
    query = select(table.c.seq, table.c.sensitive).where(table.c.sensitive_key == old, table.c.seq > last)
    rows = connection.execute(query.order_by(table.c.seq).limit(BATCH).with_for_update()).all()
    renewed = []
    for row in rows:
        try:
            renewed.append({"b_seq": row.seq, "b_text": keyring.encrypt(keyring.decrypt(row.sensitive))})
        except KeyringError:
            continue
    if renewed:
        values = {"sensitive": bindparam("b_text"), "sensitive_key": keyring.fingerprints[0]}
        connection.execute(update(table).where(table.c.seq == bindparam("b_seq")).values(values), renewed)
    return rows[-1].seq if rows else last, len(renewed), len(rows) - len(renewed)


def _record(connection: Connection, action: str, newest: str, found: Progress) -> None:
    audit.record(connection, audit.operator(), action, "key", newest, detail=found.as_dict())
