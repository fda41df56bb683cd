"""/v1/documents: take in, show, list and search."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from flask import Blueprint, Response, g, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from atlas.api.audit import note
from atlas.api.auth import over_rate, require, spend
from atlas.api.openapi import PageQuery, describe, not_valid, read_body, read_query
from atlas.api.problems import Problem, problem_of
from atlas.api.state import State, state
from atlas.documents import Answer, Outcome, Repeat, Submission, Submitted
from atlas.schema import PRIORITIES
from atlas.sensitive import Sensitive

blueprint = Blueprint("documents", __name__, url_prefix="/v1")
NDJSON = "application/x-ndjson"
KEY = {"type": "string", "pattern": "^[!-~]{1,255}$"}
# The body of a batch is kept in memory: it may hold so many contents of the greatest size.
BATCH_CONTENTS, BATCH_EXTRA_BYTES = 10, 65_536
Status = Literal["queued", "processing", "processed", "dead"]


Title = Annotated[str, Field(max_length=1000)]
Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=50)]
Priority = Literal["high", "normal", "low"]


class DocumentIn(BaseModel):
    """A document as a client sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str | None = None
    content: str | None = None
    content_type: (
        Literal["text/html", "text/plain", "text/markdown", "application/rss+xml", "application/atom+xml"] | None
    ) = None
    title: Title | None = None
    tags: Tags = Field(default_factory=list)
    priority: Priority = "normal"
    sensitive: Sensitive | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.url is None) == (self.content is None):
            raise ValueError("give either url or content")
        if (self.content is None) != (self.content_type is None):
            raise ValueError("content_type belongs to content, and content needs it")
        return self


class SubmittedOut(BaseModel):
    """What became of a submission: the document and its job (null once retention has removed it)."""

    id: str
    job_id: int | None
    status: Status


class LineOut(BaseModel):
    """What became of one line: as SubmittedOut if `code` is 202 or 200, else `problem`."""

    line: int
    code: int
    id: str | None = None
    job_id: int | None = None
    status: Status | None = None
    problem: dict[str, Any] | None = None


class BatchOut(BaseModel):
    """What became of a batch, line by line; blank lines are left out, and counted."""

    items: list[LineOut]
    created: int
    duplicates: int
    refused: int


class DocumentOut(BaseModel):
    """A document. `applied` counts how often its job was finished: anything but 0 or 1 is a fault."""

    id: str
    job_id: int | None
    status: Status
    url: str | None
    title: str | None
    content_type: str | None
    tags: list[str]
    content_hash: str | None
    created_at: datetime
    processed_at: datetime | None
    applied: int
    error_class: str | None
    error: str | None
    meta: dict[str, Any] | None


class WholeDocumentOut(DocumentOut):
    """A document with its text."""

    text: str | None


class FoundOut(DocumentOut):
    """A document in a list; in a search with its rank (more is better) and a snippet, its matches between `**`."""

    rank: float | None = None
    snippet: str | None = None


class DocumentPage(BaseModel):
    """Part of a list; `next` is the cursor of the following part."""

    items: list[FoundOut]
    total: int
    next: str | None


class DocumentQuery(PageQuery):
    """What a list of documents may be narrowed by."""

    q: str | None = None
    tag: str | None = None
    status: Status | None = None
    url: str | None = None


def _submission(document: DocumentIn, content_limit: int, sender: str, request_id: str) -> Submission:
    """Raises Problem if the content is too large."""
    content = document.content
    # A character has at most four bytes.
    if content is not None and len(content) * 4 > content_limit < len(content.encode("utf-8", "replace")):
        raise Problem(413, f"the content is larger than {content_limit} bytes")
    return Submission(
        url=document.url,
        content=content,
        content_type=document.content_type,
        title=document.title,
        tags=document.tags,
        priority=PRIORITIES[document.priority],
        sensitive=None if document.sensitive is None else document.sensitive.given(),
        submitted_by=sender,
        request_id=request_id,
    )


def _take_in(shared: State, submissions: Sequence[Submission], render: Callable[[Sequence[Outcome]], Answer]) -> Answer:
    taken: Sequence[Outcome] = []

    def keep(outcomes: Sequence[Outcome]) -> Answer:
        nonlocal taken
        taken = outcomes
        return render(outcomes)

    answered = shared.documents.answer(submissions, keep, _repeat())
    shared.metrics.count_submissions(taken)
    return answered


def _repeat() -> Repeat | None:
    """The Idempotency-Key of the request, and what it stands for. Raises Problem."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    if not re.fullmatch(KEY["pattern"], key):
        raise Problem(422, "Idempotency-Key: must be 1 to 255 visible ASCII characters")
    asked = f"{request.path}\0".encode() + request.get_data()
    return Repeat(g.token.sha256, key, hashlib.sha256(asked).hexdigest())


def _one(outcomes: Sequence[Outcome]) -> Answer:
    [outcome] = outcomes
    if isinstance(outcome, Exception):
        return 503, outcome
    return 202 if outcome.created else 200, {"id": outcome.id, "job_id": outcome.job_id, "status": outcome.status}


@blueprint.post("/documents")
@require("ingest")
@describe(
    {202: SubmittedOut, 200: SubmittedOut},
    problems=(409,),
    body=DocumentIn,
    request_headers={"Idempotency-Key": KEY},
    answer_headers={"Location": "The document."},
)
def submit() -> Response:
    """Take in a document.

    202 means that the document and its job are stored durably; 200 that the document was known before. What is sent
    again with the same Idempotency-Key gets the same answer again; anything else with that key is refused.
    """
    shared, scope = state(), g._get_current_object()
    document = read_body(DocumentIn)
    submission = _submission(document, shared.settings.content_limit_bytes, scope.token.name, scope.request_id)
    status, answer = _take_in(shared, [submission], _one)
    if isinstance(answer, Exception):
        raise answer
    response = jsonify(answer)
    response.status_code = status
    response.headers["Location"] = f"{blueprint.url_prefix}/documents/{answer['id']}"
    return response


@blueprint.post("/documents:batch")
@require("ingest", counted=False)
@describe(
    {200: BatchOut},
    problems=(409,),
    body=DocumentIn,
    body_type=NDJSON,
    request_headers={"Idempotency-Key": KEY},
)
def submit_batch() -> Response:
    """Take in many documents, one in each line, each with its own outcome.

    What is taken in is stored durably and in one transaction. The `code` of an outcome is the status that the document
    would have been answered with alone. Each line counts as one request of the token.
    """
    shared = state()
    settings = shared.settings
    if request.mimetype != NDJSON:
        raise Problem(415, f"send the documents as {NDJSON}")
    request.max_content_length = settings.content_limit_bytes * BATCH_CONTENTS + BATCH_EXTRA_BYTES
    lines = [(number, line) for number, line in enumerate(request.get_data().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise Problem(422, "the body holds no document")
    if len(lines) > settings.batch_limit:
        raise Problem(413, f"a batch holds at most {settings.batch_limit} documents")
    granted, retry_after = spend(len(lines))
    over = over_rate(retry_after)
    sent = (settings.content_limit_bytes, g.token.name, g.request_id)
    checked: list[tuple[int, Submission | Problem]] = [
        (number, _line(line, *sent) if position < granted else over) for position, (number, line) in enumerate(lines)
    ]

    def render(outcomes: Sequence[Outcome]) -> Answer:
        following = iter(outcomes)
        items = [_outcome(number, item if isinstance(item, Problem) else next(following)) for number, item in checked]
        codes = [item["code"] for item in items]
        created, duplicates = codes.count(202), codes.count(200)
        refused = len(codes) - created - duplicates
        return 200, {"items": items, "created": created, "duplicates": duplicates, "refused": refused}

    submissions = [item for _, item in checked if isinstance(item, Submission)]
    return jsonify(_take_in(shared, submissions, render)[1])


def _line(line: bytes, content_limit: int, sender: str, request_id: str) -> Submission | Problem:
    try:
        return _submission(DocumentIn.model_validate_json(line), content_limit, sender, request_id)
    except ValidationError as error:
        return not_valid(error)
    except Problem as problem:
        return problem


def _outcome(number: int, outcome: Outcome | Problem) -> dict[str, Any]:
    if isinstance(outcome, Submitted):
        code, answer = _one([outcome])
        return {"line": number, "code": code, **answer}
    problem = outcome if isinstance(outcome, Problem) else problem_of(outcome)
    return {"line": number, "code": problem.status, "problem": problem.members()}


@blueprint.get("/documents")
@require("read")
@describe({200: DocumentPage}, query=DocumentQuery)
def index() -> Response:
    """List documents, newest first, or search them.

    With `q` a search, best first: all words must match; "a phrase", `or` and -without are understood. It can be
    narrowed by `tag`, but not by `status` or `url`. `total` stops at 10,000, in a search at 1,000.
    """
    query, documents = read_query(DocumentQuery), state().documents
    if query.q is None:
        filters = {"status": query.status, "tag": query.tag, "url": query.url}
        page = documents.list(query.limit, query.cursor, **filters)
    elif query.status is None and query.url is None:
        page = documents.search(query.q, query.limit, query.cursor, tag=query.tag)
    else:
        raise Problem(422, "q: cannot be combined with status or url")
    return jsonify(items=[_shown(item.as_dict()) for item in page.items], total=page.total, next=page.next)


@blueprint.get("/documents/<document_id>")
@require("read")
@describe({200: WholeDocumentOut}, problems=(404,))
def show(document_id: str) -> Response:
    """Show a document with its text."""
    found = state().documents.get(document_id)
    if found is None:
        raise Problem(404, f"there is no document {document_id}")
    return jsonify(found.as_dict())


@blueprint.delete("/documents/<document_id>")
@require("operate")
@describe({204: None}, problems=(404,))
def remove(document_id: str) -> tuple[str, int]:
    """Delete a document and its job, whatever their state."""
    if not state().documents.delete(
        document_id, lambda connection: note(connection, "deleted", "document", document_id)
    ):
        raise Problem(404, f"there is no document {document_id}")
    return "", 204


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    document.pop("text", None)
    return document
