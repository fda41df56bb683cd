"""/v1/jobs, /v1/dead-letters, /v1/breakers: what became of the work, what to do with what failed, who is not asked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Self

from flask import Blueprint, Response, jsonify
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import Connection

from atlas import breakers
from atlas.api.audit import note
from atlas.api.auth import require
from atlas.api.openapi import LIST_LIMIT, Moment, PageQuery, describe, read_body, read_query
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.queue import CHANGES, Which, change_many, shown

blueprint = Blueprint("jobs", __name__, url_prefix="/v1")
State = Literal["ready", "running", "done", "dead"]


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
    """A job with its history. `host` is the remote host that it asks."""

    id: int
    kind: str
    document_id: str | None
    state: State
    host: str | None
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


class LetterQuery(PageQuery):
    """Jobs that match all that is given; `since` and `until` speak of their end."""

    host: str | None = None
    error_class: str | None = None
    since: Moment | None = None
    until: Moment | None = None


class JobQuery(LetterQuery):
    """Jobs that match all that is given; `since` and `until` speak of their end."""

    state: State | None = None


class LettersIn(BaseModel):
    """The dead letters that match all that is given. All of them must be asked for by {"all": true}."""

    model_config = ConfigDict(extra="forbid")

    host: str | None = None
    error_class: str | None = None
    since: Moment | None = None
    until: Moment | None = None
    all: Literal[True] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = set(self.model_dump(exclude_none=True))
        if not given or ("all" in given and len(given) > 1):
            raise ValueError('give host, error_class, since or until; or {"all": true} alone')
        return self


class ChangedOut(BaseModel):
    """What became of a dead letter."""

    id: int
    state: Literal["ready", "discarded"]


class ChangedManyOut(BaseModel):
    """How many dead letters were changed; `more` says that some may be left: ask again."""

    count: int
    state: Literal["ready", "discarded"]
    more: bool


class BreakerOut(BaseModel):
    """A remote host. `waiting` says that jobs wait until it may be asked, at `next_at` at the earliest."""

    name: str
    state: Literal["closed", "open", "half_open"]
    failures: int
    successes: int
    open_until: datetime | None
    next_at: datetime | None
    waiting: bool
    error: str | None


class BreakerPage(BaseModel):
    """Part of a list; `next` is the cursor of the following part."""

    items: list[BreakerOut]
    total: int
    next: str | None


class BreakerQuery(BaseModel):
    """The arguments of the list, which is sorted by name. `cursor` is the `next` of the page before."""

    limit: int = Field(default=50, ge=1, le=LIST_LIMIT)
    cursor: str | None = None
    state: Literal["closed", "open", "half_open"] | None = None


@blueprint.get("/jobs")
@require("read")
@describe({200: JobPage}, query=JobQuery)
def index() -> Response:
    """List jobs, newest first."""
    query = read_query(JobQuery)
    return _page(query, query.state)


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
@describe({200: JobPage}, query=LetterQuery)
def dead_letters() -> Response:
    """List the jobs that failed for good, newest first."""
    return _page(read_query(LetterQuery), "dead")


def _page(query: LetterQuery, wanted: str | None) -> Response:
    which = Which(None, wanted, query.host, query.error_class, query.since, query.until)
    before = None if query.cursor is None else int(query.cursor)
    found, total = state().queue.find(which, query.limit + 1, before)
    following = str(found[query.limit - 1]["id"]) if len(found) > query.limit else None
    return jsonify(items=[shown(job) for job in found[: query.limit]], total=total, next=following)


@blueprint.get("/dead-letters/<int:job_id>")
@require("operate")
@describe({200: JobOut}, problems=(404,))
def dead_letter(job_id: int) -> Response:
    """Show a dead letter with the history of its errors."""
    found, _ = state().queue.find(Which(ids=[job_id], state="dead"), 1)
    if not found:
        raise Problem(404, f"there is no dead letter {job_id}")
    return jsonify(shown(found[0]))


@blueprint.post("/dead-letters/<int:job_id>:<any(requeue, discard):change>")
@require("operate")
@describe({200: ChangedOut}, problems=(404,))
def change_one(job_id: int, change: str) -> Response:
    """Give a dead letter all its attempts again, or remove it.

    With a letter that is discarded goes its document, if that was never processed.
    """
    make, done = CHANGES[change]
    if not make(state().queue, Which(ids=[job_id]), lambda connection, _: note(connection, done, "job", job_id)):
        raise Problem(404, f"there is no dead letter {job_id}")
    return jsonify(id=job_id, state=_outcome(change))


@blueprint.post("/dead-letters:<any(requeue, discard):change>")
@require("operate")
@describe({200: ChangedManyOut}, body=LettersIn)
def change_all(change: str) -> Response:
    """Do the same with all dead letters that match, up to 10,000 at once."""
    given = read_body(LettersIn)
    which = Which(None, None, given.host, given.error_class, given.since, given.until)

    def write(connection: Connection, ids: Sequence[int]) -> None:
        detail = given.model_dump(exclude_none=True) | {"ids": list(ids)}
        note(connection, CHANGES[change][1], "job", detail=detail)

    count, more = change_many(state().queue, change, which, write)
    return jsonify(count=count, state=_outcome(change), more=more)


def _outcome(change: str) -> str:
    return "ready" if change == "requeue" else "discarded"


@blueprint.get("/breakers")
@require("read")
@describe({200: BreakerPage}, query=BreakerQuery)
def list_breakers() -> Response:
    """List the remote hosts of which there is something to remember."""
    query = read_query(BreakerQuery)
    found, total = breakers.listed(state().database, query.state, query.limit + 1, query.cursor)
    following = found[query.limit - 1].name if len(found) > query.limit else None
    return jsonify(items=[host.as_dict() for host in found[: query.limit]], total=total, next=following)


@blueprint.post("/breakers/<host>:reset")
@require("operate")
@describe({200: BreakerOut}, problems=(404,))
def reset_breaker(host: str) -> Response:
    """Close the breaker of a host, and end any pause."""
    with state().database.write() as connection:
        if not breakers.reset(state().database, connection, host):
            raise Problem(404, f"nothing is known of the host {host}")
        note(connection, "reset", "breaker", host)
        return jsonify(breakers.load(connection, [host])[host].as_dict())
