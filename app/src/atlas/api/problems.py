"""Errors as application/problem+json (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from flask import Flask, Response, g, jsonify
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DataError, InterfaceError, OperationalError, TimeoutError
from werkzeug.exceptions import HTTPException

from atlas.documents import InvalidDocument, KeyReused, QueueFull
from atlas.runtime import one_line

log = structlog.get_logger("atlas.api")


class ProblemOut(BaseModel):
    """What went wrong. `errors` names the fields, where fields are wrong."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None


class Problem(Exception):
    """An answer that is an error. `detail` is for the caller; `fields` are further members of the answer."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **fields: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}
        self.fields = fields

    def members(self) -> dict[str, Any]:
        """As JSON holds it."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": str(self)} | self.fields


def answer(problem: Problem) -> Response:
    response = jsonify(problem.members() | {"request_id": g.get("request_id")})
    response.status_code = problem.status
    response.mimetype = "application/problem+json"
    response.headers.update(problem.headers)
    return response


def unavailable(detail: str, retry_after: int = 1) -> Problem:
    return Problem(503, detail, {"Retry-After": str(retry_after)})


def problem_of(error: Exception) -> Problem:
    """The problem that the refusal of a document is."""
    if isinstance(error, QueueFull):
        return unavailable(str(error), error.retry_after)
    return Problem(409 if isinstance(error, KeyReused) else 422, str(error))


def install(app: Flask) -> None:
    """Turn every way in which a request can fail into a problem."""

    def on_http(error: HTTPException) -> Response:
        methods = getattr(error, "valid_methods", None)
        headers = {"Allow": ", ".join(methods)} if methods else {}
        return answer(Problem(error.code or 500, error.description or "", headers))

    def on_store_away(error: Exception) -> Response:
        log.error("the store failed a request", reason=one_line(error))
        return answer(unavailable("the store does not answer; nothing was taken in"))

    def on_unfit(_error: Exception) -> Response:
        log.warning("a value does not fit the store", exc_info=True)
        return answer(Problem(422, "a value is none that the store can hold; nothing was changed"))

    def on_unexpected(_error: Exception) -> Response:
        log.exception("a request failed unexpectedly")
        return answer(Problem(500, "the service failed; the log has the details under this request id"))

    app.register_error_handler(Problem, answer)
    app.register_error_handler(HTTPException, on_http)
    for refusal in (InvalidDocument, QueueFull, KeyReused):
        app.register_error_handler(refusal, lambda error: answer(problem_of(error)))
    for kind in (OperationalError, InterfaceError, TimeoutError):
        app.register_error_handler(kind, on_store_away)
    for unfit in (DataError, OverflowError):
        app.register_error_handler(unfit, on_unfit)
    app.register_error_handler(Exception, on_unexpected)
