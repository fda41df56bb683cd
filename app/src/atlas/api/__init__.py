"""The HTTP interface: a Flask application, one module per kind of resource."""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING, Any

import structlog
from flask import Flask, Response, g, request
from structlog.contextvars import bind_contextvars, clear_contextvars
from werkzeug.routing import IntegerConverter, UnicodeConverter

from atlas.api import audit, documents, feeds, health, jobs, metrics, openapi, problems, statistics, status
from atlas.api.session import Sessions
from atlas.api.state import Counted, Pulse, State
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.runtime import open_queue
from atlas.settings import Identity, Settings
from atlas.tokens import Tokens

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from werkzeug.datastructures import Headers

# JSON writes a character of two bytes with six; a body beyond this cannot hold content within the limit.
BODY_PER_CONTENT = 3
BODY_EXTRA_BYTES = 65_536
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET = ("health.healthz", "health.readyz", "metrics.metrics", "static")

log = structlog.get_logger("atlas.api")


class Id(IntegerConverter):
    """A number that both stores can hold; there is nothing at any other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max": 2**63 - 1} | kwargs)


class Name(UnicodeConverter):
    """A text that both stores can hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.regex = r"[^/\0]+"


class Answer(Response):
    """A response whose headers are already what goes out, so that nothing is worked out twice."""

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        return super().get_wsgi_headers(environ) if self.status_code in (204, 304) else self.headers


def create_app(settings: Settings, identity: Identity) -> Flask:
    """The application of one process. Raises KeyringError if the keyring cannot be used; needs no store to start."""
    app = Flask("atlas.api")
    app.response_class = Answer
    app.url_map.converters.update(int=Id, default=Name)
    app.config["MAX_CONTENT_LENGTH"] = settings.content_limit_bytes * BODY_PER_CONTENT + BODY_EXTRA_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    keyring = Keyring.from_secret(settings.fernet_keys)
    database = Database(settings, settings.api_threads)
    queue = open_queue(database, f"{identity.host}/{identity.slot}/api", identity.deployment, settings)
    tokens = Tokens(database)
    app.extensions["atlas"] = shared = State(
        settings=settings,
        identity=identity,
        database=database,
        queue=queue,
        counted=Counted(queue),
        documents=Documents(database, queue, keyring, settings),
        tokens=tokens,
        sessions=Sessions(keyring, tokens),
        keyring=keyring,
        metrics=metrics.HttpMetrics(settings.backup_status_path),
        pulse=Pulse(database, identity),
    )
    for module in (audit, documents, feeds, health, jobs, metrics, openapi, statistics, status):
        app.register_blueprint(module.blueprint)
    problems.install(app)

    common = [
        ("X-Atlas-Release", identity.release),
        ("X-Atlas-Slot", identity.slot),
        ("X-Content-Type-Options", "nosniff"),
    ]

    @app.before_request
    def begin() -> None:
        environ, scope = request.environ, g._get_current_object()
        scope.began = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        scope.request_id = given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
        clear_contextvars()
        bind_contextvars(request_id=scope.request_id)
        if environ["PATH_INFO"].startswith("/v1/") and shared.pulse.known_problems():
            raise problems.unavailable("the store is not ready; nothing was taken in")

    @app.after_request
    def end(response: Response) -> Response:
        asked, scope = request._get_current_object(), g._get_current_object()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - scope.began
        endpoint, status = asked.endpoint or "none", response.status_code
        shared.metrics.count(asked.method, endpoint, status, seconds)
        response.headers.extend([*common, ("X-Request-Id", scope.request_id)])
        write = log.debug if endpoint in QUIET else log.info
        write("request", method=asked.method, path=asked.path, status=status, milliseconds=round(seconds * 1000, 1))
        return response

    return app
