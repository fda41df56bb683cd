"""atlas-services: feeds, retention and housekeeping, done by one leader among all hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import structlog
from pysqlite3 import dbapi2 as sqlite
from sqlalchemy import delete, exists, func, make_url, select, text
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission, audit, breakers, counts
from atlas.crypto import Keyring
from atlas.db import Database, is_away, rfc3339
from atlas.documents import Documents
from atlas.feeds import Feeds
from atlas.queue import DAY_MS
from atlas.runtime import Runtime, one_line, open_queue
from atlas.schema import audit as table
from atlas.schema import job_events, queue_samples, tokens, workers
from atlas.settings import Settings

LEASE = "services"
LEASE_SECONDS = 20.0
RENEW_SECONDS = 5.0
BATCH = 1000
LONG_SECONDS = 300
DEAD_ROWS = text(
    "SELECT relname, n_dead_tup FROM pg_stat_user_tables WHERE n_dead_tup > 10000 AND n_dead_tup > n_live_tup"
)
OLDEST_TRANSACTION = text(
    "SELECT extract(epoch FROM max(clock_timestamp() - xact_start)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)

log = structlog.get_logger("atlas.services")


class Housekeeping:
    """The chores, each with its interval in seconds. Each does a bounded piece and says whether there is more."""

    def __init__(self, database: Database, documents: Documents, settings: Settings) -> None:
        self._database = database
        self._documents = documents
        self._settings = settings
        self._chores: dict[str, tuple[float, Callable[[], bool]]] = {
            "feeds": (RENEW_SECONDS, Feeds(documents).poll),
            "sample": (RENEW_SECONDS, self.sample),
            "tokens": (60, self.tokens),
            "retention": (3600, self.retention),
            "events": (3600, self.events),
            "audit": (3600, lambda: audit.purge(database, BATCH) >= BATCH),
            "forgotten": (3600, self.forgotten),
        }
        if database.dialect == "sqlite":
            self._chores["checkpoint"] = (60, self.checkpoint)
            self._chores["optimize"] = (3600, self.optimize)
        else:
            self._chores["hints"] = (60, self.hints)
            self._chores["counts"] = (60, lambda: counts.merge(database))
        # What an operator should know; shown in /health with this service.
        self.warnings: list[str] = []
        self.failing: dict[str, str] = {}
        self._due = dict.fromkeys(self._chores, time.monotonic())

    def run_due(self) -> bool:
        """Do a piece of each chore that is due; whether any wants to go on at once.

        A chore that the store refuses keeps no other from being done.
        """
        more = False
        for name, (interval, chore) in self._chores.items():
            if time.monotonic() >= self._due[name]:
                goes_on = False
                try:
                    goes_on = chore()
                    self.failing.pop(name, None)
                except SQLAlchemyError as error:
                    if is_away(error):
                        raise
                    self.failing[name] = f"the chore {name} fails: {one_line(error)}"
                    log.error("a chore failed", chore=name, reason=one_line(error))
                self._due[name] = time.monotonic() + (0 if goes_on else interval)
                more = more or goes_on
        return more

    def retention(self) -> bool:
        removed = self._documents.clean(BATCH)
        if any(removed.values()):
            log.info("retention", **removed)
        return max(removed.values()) >= BATCH

    def events(self) -> bool:
        """Old events go, but for those that prove a finish: `applied` counts them as long as the document lives."""
        is_proof = (job_events.c.event == "finished") & job_events.c.document_id.is_not(None)
        with self._database.read() as connection:
            before = self._database.now(connection) - int(self._settings.job_retention_days * DAY_MS)
            old = select(job_events.c.id).where(job_events.c.at < before, ~is_proof).limit(BATCH)
            found = connection.scalars(old).all()
        if found:
            with self._database.write() as connection:
                connection.execute(delete(job_events).where(job_events.c.id.in_(found)))
        return len(found) == BATCH

    def forgotten(self) -> bool:
        """Services unseen for a week are gone for good; so go hosts with nothing to remember, and old samples."""
        breakers.forget(self._database)
        with self._database.write() as connection:
            now = self._database.now(connection)
            connection.execute(delete(workers).where(workers.c.seen_at < now - 7 * DAY_MS))
            sampled_before = now - int(self._settings.queue_sample_retention_days * DAY_MS)
            connection.execute(delete(queue_samples).where(queue_samples.c.at < sampled_before))
        return False

    def sample(self) -> bool:
        """Note how the queue is, once for each minute, whoever leads, with what ended in the minute before."""
        with self._database.read() as connection:
            minute = self._database.now(connection) // 60_000 * 60_000
            if connection.scalar(select(queue_samples.c.at).where(queue_samples.c.at == minute)) is not None:
                return False
            ended = select(job_events.c.event, func.count()).group_by(job_events.c.event)
            ended = ended.where(job_events.c.at >= minute - 60_000, job_events.c.at < minute)
            events: dict[str, int] = dict(connection.execute(ended).all())
        stats = self._documents.queue.stats()
        values = {state: stats.total(state) for state in ("ready", "running", "dead")}
        values |= {"at": minute, "finished": events.get("finished", 0)}
        values["failed"] = sum(events.get(event, 0) for event in ("failed", "lost", "died"))
        with self._database.write() as connection:
            connection.execute(self._database.insert(queue_samples).values(values).on_conflict_do_nothing())
        return False

    def tokens(self) -> bool:
        """Record once that a token has expired; it is refused from that moment on anyway."""
        known = select(table.c.id).where(
            table.c.object_type == "token",
            table.c.object_id == tokens.c.name,
            table.c.action == "expired",
            table.c.at >= tokens.c.expires_at,
        )
        with self._database.write() as connection:
            expired = select(tokens.c.name, tokens.c.expires_at).where(
                tokens.c.disabled_at.is_(None),
                tokens.c.expires_at <= self._database.clock_expression(),
                ~exists(known),
            )
            for name, expires_at in connection.execute(expired).all():
                detail = {"expired_at": rfc3339(expires_at)}
                audit.record(connection, "service:services", "expired", "token", name, detail=detail)
        return False

    def hints(self) -> bool:
        """What PostgreSQL counts that an operator should look at."""
        with self._database.read() as connection:
            bloated = connection.execute(DEAD_ROWS).all()
            # As the account that all services log in as, which sees what its sessions do; the role does not.
            connection.execute(text("SET LOCAL ROLE NONE"))
            oldest = connection.scalar(OLDEST_TRANSACTION) or 0
        self._warn(
            [f"table {row.relname} holds {row.n_dead_tup} dead rows: is autovacuum running?" for row in bloated]
            + [f"a transaction has been open for {oldest:.0f} s: see pg_stat_activity"] * (oldest > LONG_SECONDS)
        )
        return False

    def _warn(self, warnings: list[str]) -> None:
        if warnings != self.warnings:
            log.warning("housekeeping", warnings=warnings)
        self.warnings = warnings

    def checkpoint(self) -> bool:
        busy, pages, _ = self._pragma("wal_checkpoint(TRUNCATE)")
        self._warn([f"a reader kept {pages} pages of the write-ahead log from being written back"] if busy else [])
        return False

    def optimize(self) -> bool:
        self._pragma("optimize")
        return False

    def _pragma(self, pragma: str) -> tuple[int, ...]:
        # Outside a transaction, and on a connection that waits briefly: a chore gives way to the service.
        path = make_url(self._settings.database_url).database or ""
        try:
            with closing(sqlite.connect(path, timeout=1.0, isolation_level=None)) as connection:
                return tuple(connection.execute(f"PRAGMA {pragma}").fetchone() or (0, 0, 0))
        except sqlite.Error as error:
            log.info("housekeeping was put off", pragma=pragma, reason=str(error))
            return (0, 0, 0)


def run() -> None:
    """Serve until SIGTERM."""
    runtime = Runtime("services")
    settings, database = runtime.settings, runtime.database
    queue = open_queue(database, runtime.owner, runtime.identity.deployment, settings)
    documents = Documents(database, queue, Keyring.from_secret(settings.fernet_keys), settings)
    housekeeping = Housekeeping(database, documents, settings)

    def step() -> float:
        leads = admission.lead(database, LEASE, runtime.owner, runtime.identity.deployment, LEASE_SECONDS)
        if leads != bool((runtime.detail or {}).get("leader")):
            log.info("leads" if leads else "follows")
        warnings = [*housekeeping.warnings, *housekeeping.failing.values()] if leads else []
        runtime.detail = {"leader": leads, "warnings": warnings}
        return 0.1 if leads and housekeeping.run_due() else RENEW_SECONDS

    if runtime.connect():
        runtime.loop(step)
        try:
            admission.step_down(database, LEASE, runtime.owner)
        except (SQLAlchemyError, OSError) as error:
            log.warning("the lease of the leader is left to run out", reason=one_line(error))
    runtime.close()
