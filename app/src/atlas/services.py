"""atlas-services: feeds, retention and housekeeping, done by one leader among all hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import structlog
from pysqlite3 import dbapi2 as sqlite
from sqlalchemy import delete, make_url, select
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.feeds import Feeds
from atlas.queue import DAY_MS
from atlas.runtime import Runtime, one_line, open_queue
from atlas.schema import job_events, workers
from atlas.settings import Settings

LEASE = "services"
LEASE_SECONDS = 20.0
RENEW_SECONDS = 5.0
BATCH = 1000

log = structlog.get_logger("atlas.services")


class Housekeeping:
    """The chores, each with its interval in seconds. Each does a bounded piece and says whether there is more."""

    def __init__(self, database: Database, documents: Documents, settings: Settings) -> None:
        self._database = database
        self._documents = documents
        self._settings = settings
        self._chores: dict[str, tuple[float, Callable[[], bool]]] = {
            "feeds": (RENEW_SECONDS, Feeds(documents).poll),
            "retention": (3600, self.retention),
            "events": (3600, self.events),
            "workers": (3600, self.workers),
        }
        if database.dialect == "sqlite":
            self._chores["checkpoint"] = (60, self.checkpoint)
            self._chores["optimize"] = (3600, self.optimize)
        self._due = dict.fromkeys(self._chores, time.monotonic())

    def run_due(self) -> bool:
        """Do a piece of each chore that is due; whether any wants to go on at once."""
        more = False
        for name, (interval, chore) in self._chores.items():
            if time.monotonic() >= self._due[name]:
                goes_on = chore()
                self._due[name] = time.monotonic() + (0 if goes_on else interval)
                more = more or goes_on
        return more

    def retention(self) -> bool:
        removed = self._documents.clean(BATCH)
        if any(removed.values()):
            log.info("retention", **removed)
        return removed["jobs"] >= BATCH

    def events(self) -> bool:
        """Old events go, but for those that prove a finish: `applied` counts them as long as the document lives."""
        with self._database.write() as connection:
            before = self._database.now(connection) - int(self._settings.job_retention_days * DAY_MS)
            old = select(job_events.c.id).where(job_events.c.at < before, job_events.c.event != "finished").limit(BATCH)
            return connection.execute(delete(job_events).where(job_events.c.id.in_(old))).rowcount >= BATCH

    def workers(self) -> bool:
        """Services that have not been seen for a week are gone for good."""
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.seen_at < self._database.now(connection) - 7 * DAY_MS))
        return False

    def checkpoint(self) -> bool:
        busy, pages, _ = self._pragma("wal_checkpoint(TRUNCATE)")
        if busy:
            log.info("the checkpoint was kept from finishing by a reader", wal_pages=pages)
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
        runtime.detail = {"leader": leads}
        return 0.1 if leads and housekeeping.run_due() else RENEW_SECONDS

    if runtime.connect():
        runtime.loop(step)
        try:
            admission.step_down(database, LEASE, runtime.owner)
        except (SQLAlchemyError, OSError) as error:
            log.warning("the lease of the leader is left to run out", reason=one_line(error))
    runtime.close()
