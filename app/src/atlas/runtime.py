"""What the queue workers, the services and the monitoring have in common: start, beat, ping, stop."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from atlas import logs, presence
from atlas.breakers import Limits
from atlas.db import Database
from atlas.queue import Queue
from atlas.settings import Settings, SettingsError, load_identity, load_settings
from atlas.wake import Ear
from atlas.watchdog import Notifier

PORTS = {"api": {"blue": 8101, "green": 8102}, "monitoring": {"blue": 8111, "green": 8112}}
BEAT_SECONDS = 5.0
STOP_SECONDS = 40.0
BACKOFF_CAP_SECONDS = 5.0

log = structlog.get_logger("atlas")


class Runtime:
    """A service process. Its main loop beats, pings the watchdog and survives the absence of the database."""

    def __init__(self, service: str) -> None:
        self.notifier = Notifier()
        self.service = service
        self.settings = load_settings()
        self.identity = load_identity(self.settings)
        logs.configure(self.settings.log_level, service, self.identity)
        self.owner = f"{self.identity.host}/{self.identity.slot}/{service}/{os.getpid()}"
        self.database = Database(self.settings, self.settings.core_concurrency if service == "core" else 1)
        self.started_at = time.time_ns() // 1_000_000
        self.stopping = False
        self.detail: Mapping[str, Any] | None = None
        self.ear = Ear(self.database)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pinged_at = self._beaten_at = float("-inf")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """End the current wait; from any thread or signal handler."""
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until woken, or until the ear has something to hear."""
        sources = [self._event] if self.ear.fd is None else [self._event, self.ear.fd]
        if self._event in select.select(sources, [], [], max(0.0, seconds))[0]:
            os.eventfd_read(self._event)

    def connect(self) -> bool:
        """Wait for a database with a schema; whether it came before a signal to stop."""
        delay = 0.25
        while not self.stopping:
            try:
                if self.database.revision() is not None:
                    return True
                problem = "the database has no schema yet: run atlas db migrate"
            except (SQLAlchemyError, OSError) as error:
                problem = f"the database does not answer: {one_line(error)}"
            log.warning("waiting for the database", reason=problem, retry_seconds=delay)
            self.notifier.status(problem)
            self.wait(delay)
            delay = min(BACKOFF_CAP_SECONDS, delay * 2)
        return False

    def loop(self, step: Callable[[], float], healthy: Callable[[], bool] = lambda: True) -> None:
        """Call `step`, which returns the seconds until it wants to be called again, until a signal to stop.

        systemd hears READY after the first step that succeeds; the watchdog is fed only while `healthy` says so.
        """
        delay, is_ready = 0.0, False
        while not self.stopping:
            try:
                self.beat()
                wanted, delay = step(), 0.0
                if not is_ready:
                    is_ready = True
                    self.notifier.ready("running")
                    log.info("ready", deployment=self.identity.deployment)
            except (SQLAlchemyError, OSError) as error:
                wanted = delay = min(BACKOFF_CAP_SECONDS, delay * 2 or 0.25)
                log.warning("the database does not answer", reason=one_line(error), retry_seconds=delay)
            if healthy():
                self.ping()
            self.wait(min(wanted, self.notifier.interval))
        self.notifier.stopping()
        log.info("stopping")

    def ping(self) -> None:
        if time.monotonic() - self._pinged_at >= self.notifier.interval:
            self._pinged_at = time.monotonic()
            self.notifier.ping()

    def beat(self) -> None:
        """Write the heartbeat, if it is due."""
        if time.monotonic() - self._beaten_at >= BEAT_SECONDS:
            presence.beat(self.database, self.identity, self.service, self.started_at, self.detail)
            self._beaten_at = time.monotonic()

    def close(self) -> None:
        """Take leave. A database that is away must not keep the process."""
        try:
            presence.leave(self.database, self.identity, self.service)
        except (SQLAlchemyError, OSError) as error:
            log.warning("could not take leave", reason=one_line(error))
        self.database.close()
        log.info("stopped")


def one_line(error: BaseException) -> str:
    """An error as a single line, without the SQL around it."""
    original = getattr(error, "orig", None) or error
    return " ".join(str(original).split())[:300] or type(original).__name__


def service_port(slot: str, service: str) -> int:
    """The TCP port of a service in a slot. ATLAS_PORT takes its place in tests and by hand."""
    value = os.environ.get("ATLAS_PORT")
    if value is not None:
        if not value.isdigit() or not 0 < int(value) < 65536:
            raise SettingsError([f"ATLAS_PORT: {value!r} is not a port"], "environment")
        return int(value)
    try:
        return PORTS[service][slot]
    except KeyError:
        raise SettingsError([f"ATLAS_SLOT: {slot!r} has no ports; use blue or green"], "environment") from None


def open_queue(database: Database, owner: str, deployment: int, settings: Settings) -> Queue:
    """The queue with the limits of the settings."""
    return Queue(
        database,
        owner,
        deployment,
        lease_seconds=settings.lease_seconds,
        attempts=settings.job_attempts,
        retry_base_seconds=settings.retry_base_seconds,
        retry_cap_seconds=settings.retry_cap_seconds,
        retries=settings.retries,
        limits=Limits(
            settings.host_concurrency,
            settings.host_interval_seconds,
            settings.breaker_failures,
            settings.breaker_open_seconds,
            settings.breaker_successes,
        ),
    )
