"""Connections to the store: SQLite or PostgreSQL behind one small interface.

Times in the store are whole milliseconds since the Unix epoch, by the clock of the database.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pysqlite3 import dbapi2 as sqlite
from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Subquery,
    Table,
    Text,
    bindparam,
    cast,
    create_engine,
    event,
    func,
    inspect,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError, TimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from atlas.settings import Settings

BUSY_TIMEOUT_MS = 10_000
INSERT_ROWS = 10_000
BELL = "atlas_jobs"  # the channel of NOTIFY
BELL_SECONDS = 0.02
WRITER_SECONDS = 30.0
# Connections of a process besides those of its threads: heartbeat, counting, one look within another.
SPARE = 3
TOTAL_MOST = 10_000
# Without, who waits for a server whose machine is gone waits for two hours: the kernel asks after it no sooner.
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000}
PG_NOW = "(extract(epoch from statement_timestamp()) * 1000)::bigint"


def milliseconds(value: str) -> int:
    """A moment in RFC 3339 as it is stored. Raises ValueError."""
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("needs a time zone: 2026-01-31T12:00:00Z")
    return int(moment.timestamp() * 1000)


def rfc3339(milliseconds: int | None) -> str | None:
    """A stored time as RFC 3339 in UTC, with milliseconds."""
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def slot_connections(settings: Settings) -> int:
    """How many connections to PostgreSQL the four services of one slot open at most: its server needs room for them.

    Known to the inventories as well, by the filter of this name.
    """
    api = settings.api_workers * (settings.api_threads + SPARE)
    # core, services and monitoring each listen on one more.
    return api + (settings.core_concurrency + SPARE + 1) + 2 * (1 + SPARE + 1)


class Database:
    """The store. `clock` replaces the database's clock in tests (milliseconds)."""

    _writer: Engine
    _reader: Engine

    def __init__(self, settings: Settings, threads: int = 1, clock: Callable[[], int] | None = None) -> None:
        """`threads`: how many of this process use it at once; on PostgreSQL it opens so many connections and SPARE."""
        secret = settings.database_password
        url = make_url(settings.database_url)
        is_postgresql = url.get_backend_name() == "postgresql"
        self._open(
            url.set(username=settings.database_login) if is_postgresql and settings.database_login else url,
            secret.get_secret_value() if secret else None,
            settings.database_role,
            threads + SPARE,
        )
        # Read by audit.record, which is handed a connection and nothing else.
        self._writer = self._writer.execution_options(audit_retention_days=settings.audit_retention_days)
        self.clock = clock

    @classmethod
    def from_url(
        cls,
        url: str,
        password: str | None = None,
        role: str | None = None,
        *,
        clock: Callable[[], int] | None = None,
        pool_size: int = 8,
    ) -> Database:
        self = cls.__new__(cls)
        self._open(make_url(url), password, role, pool_size)
        self.clock = clock
        return self

    def _open(self, url: URL, password: str | None, role: str | None, pool_size: int) -> None:
        self.dialect = url.get_backend_name()
        self.path = path = url.database or ""
        self._rung_at = float("-inf")
        self._lock = threading.Lock()
        self._kept: Connection | None = None
        if self.dialect == "sqlite":
            # One writing connection for each process: its threads queue for it instead of polling SQLite's lock.
            self._writer = _sqlite_engine(path, "rwc", 1)
            self._reader = _sqlite_engine(path, "ro", pool_size)
        else:
            options = "-c idle_in_transaction_session_timeout=30000 -c lock_timeout=10000"
            # A role in the options survives a rollback, which would undo SET ROLE.
            if role is not None:
                options += f" -c role={role}"
            self._writer = create_engine(
                url.set(password=password) if password else url,
                connect_args={"options": options, "application_name": "atlas", "connect_timeout": 10, **KEEPALIVE},
                pool_size=pool_size,
                # A server has so many connections for all hosts: who finds none free waits for one of its own process.
                max_overflow=0,
                pool_timeout=WRITER_SECONDS,
                pool_pre_ping=True,
                hide_parameters=True,
            )
            self._reader = self._writer.execution_options(postgresql_readonly=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the store and cannot change it."""
        with self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed, durably, at the end of the block; rolled back if it raises."""
        with self._writing() as connection:
            connection.info.pop(BELL, None)
            with connection.begin():
                yield connection
            if connection.info.pop(BELL, False):
                self._ring(connection)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if self.dialect == "postgresql":
            with self._writer.connect() as connection:
                yield connection
            return
        # Kept, and not taken from the pool each time: that would cost as much as the transaction.
        if not self._lock.acquire(timeout=WRITER_SECONDS):
            raise TimeoutError(f"no turn to write within {WRITER_SECONDS:.0f} s")
        try:
            self._kept = self._kept or self._writer.connect()
            yield self._kept
        finally:
            self._lock.release()

    def dedicated(self) -> Any:
        """A connection of psycopg that belongs to the caller, in autocommit (PostgreSQL alone)."""
        proxy = self._writer.raw_connection()
        connection: Any = proxy.driver_connection
        proxy.detach()
        connection.autocommit = True
        return connection

    def ring(self, connection: Connection) -> None:
        """Wake the workers of all hosts when the transaction of this connection has committed: see atlas.wake."""
        connection.info[BELL] = True

    def _ring(self, connection: Connection) -> None:
        # Whoever wakes looks again for a while, so a ring soon after another can be left out. After the commit and
        # not within: PostgreSQL lets transactions that notify commit only one after another.
        if time.monotonic() - self._rung_at < BELL_SECONDS:
            return
        self._rung_at = time.monotonic()
        with suppress(SQLAlchemyError, OSError):
            if self.dialect == "postgresql":
                connection.exec_driver_sql(f"NOTIFY {BELL}")
                connection.commit()
            else:
                os.utime(self.path)

    def insert(self, table: Table) -> Any:
        """An INSERT that knows ON CONFLICT, in the dialect of this store."""
        return postgresql_dialect.insert(table) if self.dialect == "postgresql" else sqlite_dialect.insert(table)

    def insert_rows(
        self,
        connection: Connection,
        table: Table,
        names: tuple[str, ...],
        rows: Sequence[Sequence[Any]],
        returning: str,
        conflict: str = "",
    ) -> list[Any]:
        """Insert rows, each with values for the columns `names`; (`returning`, …) of each that was inserted.

        One statement takes all rows as JSON: it is prepared once, and does not hold the interpreter up at each row.
        `conflict` is an ON CONFLICT clause.
        """
        statement = _insert_statement(self.dialect, table, names, conflict)
        returned: list[Any] = []
        for start in range(0, len(rows), INSERT_ROWS):
            part = json.dumps(rows[start : start + INSERT_ROWS], ensure_ascii=False, separators=(",", ":"))
            if self.dialect == "postgresql":
                returned += connection.exec_driver_sql(f"{statement} RETURNING {returning}", (part,))
                continue
            # New rows have the highest numbers. So read they are one row, where RETURNING stops for each.
            [(before,)] = _run_sqlite(connection, f"SELECT coalesce(max(rowid), 0) FROM {table.name}")
            _run_sqlite(connection, statement, (part,))
            new = f"SELECT json_group_array(json_array({returning})) FROM {table.name} WHERE rowid > ?"
            returned += json.loads(_run_sqlite(connection, new, (before,))[0][0])
        return returned

    def clock_expression(self) -> ColumnElement[int]:
        """The current time as an SQL expression; constant within a statement, so that indexes serve it."""
        if self.clock is None and self.dialect == "postgresql":
            return literal_column(PG_NOW, BigInteger)
        return bindparam("clock", type_=BigInteger, callable_=self.clock or _milliseconds)

    def now(self, connection: Connection) -> int:
        """The time of the database's clock in milliseconds."""
        if self.clock is None and self.dialect == "postgresql":
            return int(connection.scalar(select(self.clock_expression())) or 0)
        return (self.clock or _milliseconds)()

    def revision(self) -> str | None:
        """The schema revision of the store; None if it was never migrated."""
        with self.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return found

    def version(self) -> str:
        """The version of the database engine."""
        if self.dialect == "sqlite":
            return str(sqlite.sqlite_version)
        with self.read() as connection:
            return str(connection.scalar(text("SHOW server_version")))

    def close(self) -> None:
        with self._lock:
            if self._kept is not None:
                self._kept.close()
                self._kept = None
        self._reader.dispose()
        self._writer.dispose()


def is_away(error: Exception) -> bool:
    """Whether the store does not serve at all, and would do so later; else it is what was asked that is wrong."""
    # What exceeds a limit of PostgreSQL's own (SQLSTATE 54...), like a text too long to index, does so for ever.
    limit = str(getattr(getattr(error, "orig", None), "sqlstate", None)).startswith("54")
    return isinstance(error, OperationalError | InterfaceError | TimeoutError) and not limit


_POSTGRESQL = postgresql_dialect.dialect()  # type: ignore[no-untyped-call]


def total(connection: Connection, matching: Select[Any]) -> int:
    """How many rows match, as the lists of the API say it: counting stops at TOTAL_MOST, however many there are."""
    counted = matching.limit(TOTAL_MOST).subquery()
    return int(connection.scalar(select(func.count()).select_from(counted)) or 0)


@functools.cache
def _insert_statement(dialect: str, table: Table, names: tuple[str, ...], ending: str) -> str:
    values = [f"r.value ->> {position}" for position in range(len(names))]
    source = "json_each(?) AS r"
    if dialect == "postgresql":
        types = [table.c[name].type.compile(_POSTGRESQL) for name in names]
        values = [f"CAST({value} AS {kind})" for value, kind in zip(values, types, strict=True)]
        source = "jsonb_array_elements(%s::jsonb) AS r(value)"
    return f"INSERT INTO {table.name} ({', '.join(names)}) SELECT {', '.join(values)} FROM {source} WHERE true {ending}"


def _run_sqlite(connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
    # By the driver itself, with the errors of SQLAlchemy: its own way costs as much as the statement.
    try:
        return list(connection.connection.driver_connection.execute(statement, parameters))  # type: ignore[union-attr]
    except sqlite.Error as error:
        raise DBAPIError.instance(statement, None, error, sqlite.Error, hide_parameters=True) from error


class _Each(FunctionElement[str]):
    name = "json_each"
    inherit_cache = True


@compiles(_Each, "sqlite")
def _each_sqlite(element: _Each, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_Each, "postgresql")
def _each_postgresql(element: _Each, compiler: Any, **options: Any) -> str:
    return f"json_array_elements(CAST({compiler.process(element.clauses, **options)} AS json))"


def rows(parameter: str, /, **types: type[TypeEngine[Any]]) -> Subquery:
    """A table of values, given as one `parameter`: a JSON list of rows, each a list of the columns in order.

    However many the rows, the statement is the same text, which both stores then prepare only once.
    """
    value = _Each(bindparam(parameter, type_=Text)).table_valued("value", name=f"{parameter}_json").c.value
    columns = [
        cast(value.op("->>")(literal_column(str(position))), kind).label(column)
        for position, (column, kind) in enumerate(types.items())
    ]
    return select(*columns).subquery(parameter)


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def _sqlite_engine(path: str, mode: str, pool_size: int) -> Engine:
    def connect() -> Any:
        connection = sqlite.connect(
            f"file:{quote(path)}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
        )
        pragmas = [f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON", "cache_size=-8192"]
        if mode != "ro":
            # A checkpoint writes each page once, however often the log holds it: four times the default costs less.
            pragmas += ["synchronous=FULL", "journal_size_limit=67108864", "wal_autocheckpoint=4000"]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        if mode != "ro":
            _use_wal(connection)
        return connection

    engine = create_engine(
        "sqlite://",
        module=sqlite,
        creator=connect,
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0 if mode != "ro" else pool_size,
        hide_parameters=True,
    )
    statement = "BEGIN" if mode == "ro" else "BEGIN IMMEDIATE"
    event.listen(engine, "begin", lambda connection: _run_sqlite(connection, statement))
    return engine


def _use_wal(connection: Any) -> None:
    # The first switch of a new file fails at once, whatever the timeout, when two processes try it together.
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
