"""atlas-api: gunicorn around the application.

gunicorn itself would report ready as soon as its arbiter has booted. Here systemd hears READY when a worker has
answered /healthz, and the watchdog is fed by the arbiter only while its workers answer.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import os
import selectors
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog
from flask import Flask
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]
from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]

from atlas import logs
from atlas.runtime import service_port
from atlas.settings import Identity, Settings, SettingsError, load_identity, load_settings
from atlas.watchdog import Notifier

GRACE_SECONDS = 45  # within the unit's TimeoutStopSec of 60
WORKER_TIMEOUT_SECONDS = 20  # a hung worker is replaced before systemd would end the service
KEEPALIVE_SECONDS = 75
LINGER_SECONDS = 2.0  # for what a client still sends on a connection that is being closed
ANSWER_SECONDS = 10.0

log = structlog.get_logger("atlas.serve")


class HealthProbe:
    """Asks /healthz over loopback without ever blocking: each call of `step` takes the question a little further."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._asked_at = 0.0

    def step(self) -> bool:
        """Whether a good answer has arrived just now."""
        try:
            if self._socket is None:
                self._ask()
                return False
            head = self._socket.recv(64)
        except BlockingIOError:
            if time.monotonic() - self._asked_at > ANSWER_SECONDS:
                self.close()
            return False
        except OSError:
            self.close()
            return False
        self.close()
        return head.startswith(b"HTTP/1.1 200 ")

    def _ask(self) -> None:
        self._socket = socket.socket()
        self._asked_at = time.monotonic()
        self._socket.settimeout(0.5)
        self._socket.connect(("127.0.0.1", self._port))
        self._socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        self._socket.setblocking(False)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class ServiceArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's arbiter, which also tells systemd how its workers are."""

    def __init__(self, app: Application) -> None:
        self.probe = HealthProbe(app.port)
        self._notifier = app.notifier
        self._is_ready = False
        self._pinged_at = float("-inf")
        super().__init__(app)

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        signals: list[int] = super().wait_for_signals(timeout=timeout if self._is_ready else 0.1)
        if not signals:
            self._look()
        return signals

    def _look(self) -> None:
        if time.monotonic() - self._pinged_at < min(1.0, self._notifier.interval / 2):
            return
        # The probe meets one worker; the others show by their own beat that they are not stuck.
        beats = [time.monotonic() - worker.tmp.last_update() for worker in list(self.WORKERS.values())]
        if len(beats) < self.num_workers or max(beats) > ANSWER_SECONDS or not self.probe.step():
            return
        self._pinged_at = time.monotonic()
        if not self._is_ready:
            self._is_ready = True
            self._notifier.ready("serving")
            log.info("ready", workers=len(beats))
        self._notifier.ping()

    def stop(self, graceful: bool = True) -> None:
        self._notifier.stopping()
        self.probe.close()
        super().stop(graceful)


class ServiceWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, which waits for no client, and closes the door at once when it stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lingering: collections.deque[tuple[float, TConn]] = collections.deque()

    def finish_request(self, conn: TConn, future: Any) -> None:
        if future.cancelled() or future.exception() or future.result():
            super().finish_request(conn, future)
            return
        # gunicorn would wait in its only loop, and all requests with it, until the client has closed its end too.
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, lambda _socket: self._drain(conn))
            self._lingering.append((time.monotonic() + LINGER_SECONDS, conn))
        except OSError:
            self._close(conn)

    def _drain(self, conn: TConn) -> None:
        try:
            if conn.sock.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.poller.unregister(conn.sock)
        self._close(conn)

    def _close(self, conn: TConn) -> None:
        conn.close()
        self.nr_conns -= 1

    def murder_pending(self) -> None:
        super().murder_pending()
        while self._lingering and (self._lingering[0][1].sock.fileno() < 0 or self._lingering[0][0] < time.monotonic()):
            _, conn = self._lingering.popleft()
            if conn.sock.fileno() >= 0:
                self.poller.unregister(conn.sock)
                self._close(conn)

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if self.alive:
            return
        # Whoever came in before is served; whoever knocked later on a door left ajar would be reset in the end.
        for listener in self.sockets:
            known = -1
            while self.nr_conns != known:
                known = self.nr_conns
                self.accept(listener)
            listener.close()


class JsonLogger(Logger):  # type: ignore[misc]
    """Hands gunicorn's messages to our logging; requests are logged by the application."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = logging.INFO
        self.error_log.propagate = True

    def access(self, *args: Any) -> None:
        pass


class Application(BaseApplication):  # type: ignore[misc]
    """What gunicorn runs, configured by our settings and by nothing else."""

    def __init__(self, settings: Settings, identity: Identity, port: int, notifier: Notifier) -> None:
        self.settings = settings
        self.identity = identity
        self.port = port
        self.notifier = notifier
        super().__init__()

    def load_config(self) -> None:
        options = {
            "bind": [f"{address}:{self.port}" for address in addresses(self.settings.api_bind_address)],
            "worker_class": ServiceWorker,
            "workers": self.settings.api_workers,
            "threads": self.settings.api_threads,
            "timeout": WORKER_TIMEOUT_SECONDS,
            "graceful_timeout": GRACE_SECONDS,
            "keepalive": KEEPALIVE_SECONDS,
            "control_socket_disable": True,
            "logger_class": JsonLogger,
            "proc_name": "atlas-api",
            "post_fork": lambda arbiter, _worker: arbiter.probe.close(),
            "post_worker_init": _worker_begins,
            "worker_exit": _worker_ends,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        from atlas.api import create_app  # see run()

        return create_app(self.settings, self.identity)

    def run(self) -> None:
        ServiceArbiter(self).run()


def is_leaving() -> bool:
    """Whether users are to go elsewhere, by a file in the unit's runtime directory; every request is still answered."""
    directory = os.environ.get("RUNTIME_DIRECTORY")
    return directory is not None and Path(directory, "leaving").exists()


def _worker_begins(worker: Worker) -> None:
    shared = worker.wsgi.extensions["atlas"]
    shared.draining = lambda: not worker.alive or is_leaving()
    shared.pulse.start()


def _worker_ends(_arbiter: Arbiter, worker: Worker) -> None:
    if isinstance(worker.wsgi, Flask):
        worker.wsgi.extensions["atlas"].pulse.stop()
        worker.wsgi.extensions["atlas"].database.close()


def addresses(bind: str) -> list[str]:
    """Where to listen: the address of the settings, and loopback, where the arbiter asks after its workers."""
    return [bind] if bind in ("0.0.0.0", "127.0.0.1") else [bind, "127.0.0.1"]  # noqa: S104 - compared, not bound


def check_free(bind: str, port: int) -> None:
    """Raises SettingsError if the service could not listen there."""
    for address in addresses(bind):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address.strip("[]"), port))
            except OSError as error:
                message = f"port {port} on {address} cannot be taken: {error.strerror}; see ss -ltnp"
                raise SettingsError([f"api_bind_address: {message}"]) from None


def run() -> None:
    """Serve until SIGTERM; requests that have begun are answered before the process ends."""
    notifier = Notifier()
    settings = load_settings()
    identity = load_identity(settings)
    logs.configure(settings.log_level, "api", identity)
    port = service_port(identity.slot, "api")
    check_free(settings.api_bind_address, port)
    with contextlib.ExitStack() as stack:
        if settings.api_workers > 1:
            # Read by prometheus_client when it is imported: several processes then count together.
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("RUNTIME_DIRECTORY")))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        import atlas.api  # noqa: F401 - before the fork, so that the workers share its memory

        gc.freeze()
        Application(settings, identity, port, notifier).run()
