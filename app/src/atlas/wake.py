"""How an idle process hears that there is work, without asking the store again and again.

Database.ring rings when a transaction that brings work has committed: NOTIFY on PostgreSQL; on SQLite the time stamp of
the database's file, which inotify(7) watches. A ring may get lost: whoever listens also looks now and then.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any

import psycopg
import structlog
from sqlalchemy.exc import SQLAlchemyError

from atlas.db import BELL, Database

IN_ATTRIB = 0x4
IN_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC

log = structlog.get_logger("atlas")


class Ear:
    """Hears the bell of a store. Never raises; deaf until it could listen, and again when the connection is lost."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._source: Any = None
        self.fd: int | None = None

    def heard(self) -> bool:
        """Whether the bell rang since the last call, or may have: also true when listening has just begun."""
        try:
            if self.fd is None:
                self._open()
                return True
            if self._source is None:
                return bool(os.read(self.fd, 65536))
            self._source.pgconn.consume_input()
            return len(list(iter(self._source.pgconn.notifies, None))) > 0
        except BlockingIOError:
            return False
        except (psycopg.Error, SQLAlchemyError, OSError) as error:
            log.debug("not listening", reason=str(error))
            self.close()
            return False

    def _open(self) -> None:
        if self._database.dialect == "postgresql":
            self._source = self._database.dedicated()
            self._source.execute(f"LISTEN {BELL}")
            self.fd = self._source.fileno()
            return
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(IN_NONBLOCK_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(self._database.path), IN_ATTRIB) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        with suppress(Exception):
            if self._source is not None:
                self._source.close()
            elif self.fd is not None:
                os.close(self.fd)
        self._source = self.fd = None
