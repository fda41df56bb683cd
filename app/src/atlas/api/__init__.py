"""The HTTP interface: a Flask application, one module per kind of resource."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from flask import Flask, Response, g, request
from structlog.contextvars import bind_contextvars, clear_contextvars

from atlas.api import audit, documents, health, jobs, metrics, problems, status
from atlas.api.state import Pulse, State
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.runtime import open_queue
from atlas.settings import Identity, Settings
from atlas.tokens import Tokens

# JSON writes a character of two bytes with six; a body beyond this cannot hold content within the limit.
BODY_PER_CONTENT = 3
BODY_EXTRA_BYTES = 65_536
QUIET = ("health.healthz", "health.readyz", "metrics.metrics")

log = structlog.get_logger("atlas.api")


def create_app(settings: Settings, identity: Identity) -> Flask:
    """The application of one process. Raises KeyringError if the keyring cannot be used; needs no store to start."""
    app = Flask("atlas.api")
    app.config["MAX_CONTENT_LENGTH"] = settings.content_limit_bytes * BODY_PER_CONTENT + BODY_EXTRA_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    keyring = Keyring.from_secret(settings.fernet_keys)
    database = Database(settings)
    queue = open_queue(database, f"{identity.host}/{identity.slot}/api", identity.deployment, settings)
    app.extensions["atlas"] = shared = State(
        settings=settings,
        identity=identity,
        database=database,
        queue=queue,
        documents=Documents(database, queue, keyring, settings),
        tokens=Tokens(database),
        keyring=keyring,
        metrics=metrics.HttpMetrics(settings.backup_status_path),
        pulse=Pulse(database, identity),
    )
    for module in (audit, documents, health, jobs, metrics, status):
        app.register_blueprint(module.blueprint)
    problems.install(app)

    @app.before_request
    def begin() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)
        g.began = time.perf_counter()
        clear_contextvars()
        bind_contextvars(request_id=g.request_id)
        if request.path.startswith("/v1/") and shared.pulse.known_problems():
            raise problems.unavailable("the store is not ready; nothing was taken in")

    @app.after_request
    def end(response: Response) -> Response:
        seconds = time.perf_counter() - g.began
        endpoint = request.endpoint or "none"
        shared.metrics.requests.labels(request.method, endpoint, str(response.status_code)).inc()
        shared.metrics.seconds.labels(endpoint).observe(seconds)
        response.headers["X-Atlas-Release"] = identity.release
        response.headers["X-Atlas-Slot"] = identity.slot
        response.headers["X-Request-Id"] = g.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        write = log.debug if endpoint in QUIET else log.info
        write(
            "request",
            method=request.method,
            path=request.path,
            status=response.status_code,
            milliseconds=round(seconds * 1000, 1),
        )
        return response

    return app
