"""/v1/jobs and /v1/dead-letters: what became of the work, and another try for what failed."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import structlog
from flask import Blueprint, Response, jsonify
from pydantic import BaseModel

from atlas.api.auth import require
from atlas.api.documents import page_arguments
from atlas.api.openapi import PageQuery, describe
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.db import rfc3339
from atlas.schema import PRIORITIES

blueprint = Blueprint("jobs", __name__, url_prefix="/v1")
log = structlog.get_logger("atlas.api")
_PRIORITY_NAMES = {value: name for name, value in PRIORITIES.items()}
_JOB = ("id", "kind", "document_id", "state", "attempts", "request_id", "error_class", "error")
_EVENT = ("event", "attempt", "owner", "deployment", "error_class", "error")


def shown(job: dict[str, Any]) -> dict[str, Any]:
    """A job as clients see it: without its payload, with times in RFC 3339."""
    times = {name: rfc3339(job[name]) for name in ("run_at", "created_at", "finished_at")}
    events = [{"at": rfc3339(event["at"])} | {name: event[name] for name in _EVENT} for event in job["events"]]
    return (
        {name: job[name] for name in _JOB} | {"priority": _PRIORITY_NAMES[job["priority"]]} | times | {"events": events}
    )


class EventOut(BaseModel):
    """Something that happened to a job."""

    event: str
    at: datetime
    attempt: int
    owner: str | None
    deployment: int | None
    error_class: str | None
    error: str | None


class JobOut(BaseModel):
    """A job with its history."""

    id: int
    kind: str
    document_id: str | None
    state: Literal["ready", "running", "done", "dead"]
    priority: Literal["high", "normal", "low"]
    attempts: int
    request_id: str | None
    error_class: str | None
    error: str | None
    run_at: datetime
    created_at: datetime
    finished_at: datetime | None
    events: list[EventOut]


class JobPage(BaseModel):
    """Part of a list; `next` is the cursor of the following part."""

    items: list[JobOut]
    total: int
    next: str | None


class RequeuedOut(BaseModel):
    """A job that gets another try."""

    id: int
    state: Literal["ready"]


@blueprint.get("/jobs/<int:job_id>")
@require("read")
@describe({200: JobOut}, problems=(404,))
def show(job_id: int) -> Response:
    """Show a job with its history."""
    job = state().queue.job(job_id)
    if job is None:
        raise Problem(404, f"there is no job {job_id}")
    return jsonify(shown(job))


@blueprint.get("/dead-letters")
@require("operate")
@describe({200: JobPage}, query=PageQuery)
def dead_letters() -> Response:
    """List the jobs that failed for good, newest first."""
    limit, cursor = page_arguments()
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise Problem(422, "cursor: is not one that a page of this list gave")
    queue = state().queue
    found = queue.dead_letters(limit + 1, None if cursor is None else int(cursor))
    following = str(found[limit - 1]["id"]) if len(found) > limit else None
    return jsonify(items=[shown(job) for job in found[:limit]], total=queue.stats().total("dead"), next=following)


@blueprint.post("/dead-letters/<int:job_id>:requeue")
@require("operate")
@describe({200: RequeuedOut}, problems=(404,))
def requeue(job_id: int) -> Response:
    """Give a dead letter all its attempts again."""
    if not state().queue.requeue([job_id]):
        raise Problem(404, f"there is no dead letter {job_id}")
    log.info("dead letter requeued", job_id=job_id)
    return jsonify(id=job_id, state="ready")
