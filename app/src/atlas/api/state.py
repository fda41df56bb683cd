"""What the request handlers share: one State for each application."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from flask import current_app
from sqlalchemy.exc import SQLAlchemyError

from atlas import migrations, presence
from atlas.api.metrics import HttpMetrics
from atlas.api.session import Sessions
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.queue import Queue, QueueStats
from atlas.runtime import BEAT_SECONDS, one_line
from atlas.settings import Identity, Settings
from atlas.tokens import Tokens

LOOK_SECONDS = 1.0
SCHEMA_SECONDS = 10.0
STALE_SECONDS = 10.0
COUNT_SECONDS = 0.02
COUNT_SHARE = 0.05

log = structlog.get_logger("atlas.api")


class Pulse:
    """Looks at the store for all requests, so that none of them waits for a store that is away.

    Started in a thread it looks every second and writes the heartbeat; without, each question looks.
    """

    def __init__(self, database: Database, identity: Identity) -> None:
        self._database = database
        self._identity = identity
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._started_at = time.time_ns() // 1_000_000
        self._looked_at = self._schema_at = self._beaten_at = float("-inf")
        self._problems: dict[str, str] = {"database": "has not been looked at yet"}
        self._schema_problem: str | None = None
        self.engine: str | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and take leave."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(5)
        try:
            presence.leave(self._database, self._identity, "api")
        except (SQLAlchemyError, OSError) as error:
            log.warning("could not take leave", reason=one_line(error))

    def problems(self) -> dict[str, str]:
        """What keeps this process from serving, by the name of the check; empty is ready."""
        if self._thread is None:
            self.look()
        elif time.monotonic() - self._looked_at > STALE_SECONDS:
            return {"database": f"has not answered for {STALE_SECONDS:.0f} s"}
        return self._problems

    def known_problems(self) -> dict[str, str]:
        """The problems of the last look, without looking."""
        return self._problems if self._thread is not None and self._looked_at > 0 else {}

    def _run(self) -> None:
        while True:
            self.look()
            try:
                if not self._problems and time.monotonic() - self._beaten_at >= BEAT_SECONDS:
                    presence.beat(self._database, self._identity, "api", self._started_at)
                    self._beaten_at = time.monotonic()
            except (SQLAlchemyError, OSError) as error:
                log.warning("no heartbeat", reason=one_line(error))
            if self._stop.wait(LOOK_SECONDS):
                return

    def look(self) -> None:
        found: dict[str, str] = {}
        try:
            with self._database.read() as connection:
                self._database.now(connection)
            self.engine = self.engine or self._database.version()
            if time.monotonic() - self._schema_at > SCHEMA_SECONDS or self._schema_problem:
                self._schema_problem = self._look_at_schema()
                self._schema_at = time.monotonic()
            if self._schema_problem:
                found["schema"] = self._schema_problem
        except (SQLAlchemyError, OSError) as error:
            found["database"] = f"does not answer: {one_line(error)}"
        if found != self._problems:
            log.info("readiness changed", problems=found)
        self._problems = found
        self._looked_at = time.monotonic()

    def _look_at_schema(self) -> str | None:
        schema = migrations.status(self._database)
        if schema.compatible:
            return None
        return f"is at {schema.current or 'nothing'}, this release needs {schema.head}: run atlas db migrate"


class Counted:
    """The queue's statistics. A long queue is counted in a thread beside, and for a small part of the time."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._stats: QueueStats | None = None
        self._took = collections.deque([0.0], maxlen=2)
        self._due = 0.0

    def get(self) -> QueueStats:
        """The statistics of now; where counting takes long, those of the last count."""
        # One slow count may be chance, two are not.
        if self._stats is None or min(self._took) < COUNT_SECONDS:
            return self._count()
        if time.monotonic() >= self._due and self._lock.acquire(blocking=False):
            threading.Thread(target=self._recount, name="count", daemon=True).start()
        return self._stats

    def _count(self) -> QueueStats:
        began = time.monotonic()
        self._stats = stats = self._queue.stats()
        self._took.append(time.monotonic() - began)
        self._due = began + self._took[-1] / COUNT_SHARE
        return stats

    def _recount(self) -> None:
        try:
            self._count()
        except (SQLAlchemyError, OSError) as error:
            log.warning("the queue could not be counted", reason=one_line(error))
        finally:
            self._lock.release()


@dataclass
class State:
    """Everything that a handler may need."""

    settings: Settings
    identity: Identity
    database: Database
    queue: Queue
    counted: Counted
    documents: Documents
    tokens: Tokens
    sessions: Sessions
    keyring: Keyring
    metrics: HttpMetrics
    pulse: Pulse
    draining: Callable[[], bool] = field(default=lambda: False)


def state() -> State:
    """The State of the application that handles this request."""
    found = current_app.extensions["atlas"]
    assert isinstance(found, State)  # noqa: S101 - tells the type checker
    return found
