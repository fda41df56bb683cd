"""The status page at `/`: rendered here, without a script, for whoever is signed in.

Others see a form to sign in, whether the service is well, and its release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import structlog
from flask import Blueprint, Response, g, make_response, redirect, render_template, request, url_for
from markupsafe import Markup, escape
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from atlas import breakers
from atlas.admission import RECENT_MS
from atlas.api.audit import note
from atlas.api.auth import admit
from atlas.api.chart import chart
from atlas.api.health import checks, detail
from atlas.api.openapi import describe
from atlas.api.problems import Problem, unavailable
from atlas.api.state import State, state
from atlas.db import rfc3339
from atlas.documents import InvalidDocument
from atlas.queue import DAY_MS, Which
from atlas.schema import job_events, queue_samples
from atlas.tokens import Token

blueprint = Blueprint("status", __name__, template_folder="templates")
log = structlog.get_logger("atlas.api")
SHOWN = 20
TROUBLED = ("open", "half_open")
LOOKED_AT = 5000  # of the last events, to find failures among them
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@blueprint.after_request
def protect(response: AnyResponse) -> AnyResponse:
    response.headers.update(HEADERS)
    return response


@blueprint.get("/")
@describe(dict.fromkeys((200, 403, 422, 429, 503), "text/html"))
def page() -> AnyResponse:
    """The status page."""
    shared = state()
    token = _signed_in(shared)
    if token is None:
        return _sign_in_page()
    admit(token, "read")
    query = request.args.get("q", "").strip()
    found = shared.documents.search(query, SHOWN, request.args.get("cursor")) if query else None
    content = {"query": query, "found": found, "token": token, "form_key": shared.sessions.form_key()}
    return make_response(render_template("status.html", health=detail(shared), **content, **_overview(shared)))


@blueprint.post("/sign-in")
@describe({303: None} | dict.fromkeys((403, 413, 429, 503), "text/html"))
def sign_in() -> AnyResponse:
    """Begin a session on the status page."""
    shared = state()
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise Problem(403, "the form came from another site")
    token = shared.tokens.authenticate(request.form.get("token", "").strip())
    if token is None:
        log.warning("a sign-in was refused")
        return _sign_in_page("This token is not valid.", 403)
    admit(token, "read")
    with shared.database.write() as connection:
        session = shared.sessions.begin(connection, token)
        note(connection, "signed_in", "session")
    response = _to_page()
    shared.sessions.give(response, session)
    return response


@blueprint.post("/sign-out")
@describe({303: None} | dict.fromkeys((403, 413, 503), "text/html"))
def sign_out() -> AnyResponse:
    """End the session."""
    shared = state()
    _check_form(shared)
    with shared.database.write() as connection:
        shared.sessions.end(connection)
    response = _to_page()
    shared.sessions.take(response)
    return response


@blueprint.post("/requeue")
@describe({303: None} | dict.fromkeys((403, 404, 413, 429, 503), "text/html"))
def requeue() -> AnyResponse:
    """Give a dead letter another try, from the status page."""
    shared = state()
    token = _signed_in(shared)
    if token is None:
        return _sign_in_page("Your session is over.", 403)
    _check_form(shared)
    admit(token, "operate")
    job_id = request.form.get("job", "")
    which = Which(ids=[int(job_id[:18])] if job_id.isascii() and job_id.isdigit() else [])
    if not shared.queue.requeue(which, lambda connection, _: note(connection, "requeued", "job", job_id)):
        raise Problem(404, "that dead letter is no longer there")
    return _to_page(requeued=job_id)


def _signed_in(shared: State) -> Token | None:
    try:
        return shared.sessions.token()
    except (SQLAlchemyError, OSError):
        return None


def _check_form(shared: State) -> None:
    if not shared.sessions.is_own_form():
        raise Problem(403, "the form is not one of this session; go back to the page and try again")


def _to_page(requeued: str | None = None) -> Response:
    response = make_response(redirect(url_for("status.page", requeued=requeued), 303))
    assert isinstance(response, Response)  # noqa: S101 - tells the type checker
    return response


def _sign_in_page(message: str | None = None, status: int = 200) -> AnyResponse:
    is_well = all(result == "ok" for result in checks(state()).values())
    content = {"status": "ok" if is_well else "degraded", "release": state().identity.release, "message": message}
    return make_response(render_template("sign_in.html", **content), status)


def _overview(shared: State) -> dict[str, Any]:
    """What the page shows beside /health: the queue's past, breakers that are not closed, failures, dead letters."""
    with shared.database.read() as connection:
        now = shared.database.now(connection)
        samples = select(queue_samples).where(queue_samples.c.at > now - DAY_MS).order_by(queue_samples.c.at)
        samples_of_day = [dict(row._mapping) for row in connection.execute(samples)]
        latest = select(job_events).order_by(job_events.c.id.desc()).limit(LOOKED_AT).subquery()
        failures = select(latest).where(latest.c.event.in_(("failed", "lost", "died"))).limit(SHOWN)
        return {
            "now": now,
            "chart": chart(samples_of_day, now),
            "finished": sum(sample["finished"] for sample in samples_of_day if sample["at"] > now - RECENT_MS),
            "failures": connection.execute(failures).all(),
            "breakers": [host for state in TROUBLED for host in breakers.listed(shared.database, state, SHOWN)[0]],
            "dead_letters": shared.queue.find(Which(state="dead"), SHOWN)[0],
        }


@blueprint.app_template_filter()
def marked(snippet: str) -> Markup:
    """A snippet in which every other part between `**` is a match."""
    parts = [escape(part) for part in snippet.split("**")]
    return Markup("").join(Markup("<mark>{}</mark>").format(part) if n % 2 else part for n, part in enumerate(parts))


@blueprint.app_template_filter()
def moment(milliseconds: int | None) -> Markup:
    """A stored time, to the second."""
    text = rfc3339(milliseconds)
    return (
        Markup("")
        if text is None
        else Markup('<time datetime="{}">{}</time>').format(text, text[:19].replace("T", " "))
    )


@blueprint.app_template_filter()
def slots(services: list[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Services by host and slot, then by name."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for service in services:
        found.setdefault((service["host"], service["slot"]), {})[service["service"]] = service
    return found


def _explain(problem: Problem) -> AnyResponse:
    content = {"problem": problem, "request_id": g.get("request_id"), "release": state().identity.release}
    return make_response(render_template("problem.html", **content), problem.status, problem.headers)


blueprint.register_error_handler(Problem, _explain)
blueprint.register_error_handler(HTTPException, lambda error: _explain(Problem(error.code, error.description or "")))
blueprint.register_error_handler(InvalidDocument, lambda error: _explain(Problem(422, str(error))))
for _kind in (OperationalError, InterfaceError, TimeoutError):
    blueprint.register_error_handler(_kind, lambda _error: _explain(unavailable("the store does not answer")))
