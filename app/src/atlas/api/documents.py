"""/v1/documents: take in, show, list and search."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from flask import Blueprint, Response, g, jsonify
from pydantic import BaseModel, ConfigDict, Field, model_validator

from atlas.api.auth import require
from atlas.api.openapi import PageQuery, describe, read_body, read_query
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.documents import QueueFull, Submission
from atlas.schema import PRIORITIES
from atlas.sensitive import Sensitive

blueprint = Blueprint("documents", __name__, url_prefix="/v1/documents")
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
    tags: Tags = []
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
    """With `q` a search, best first: all words must match; "a phrase", `or` and -without are understood."""

    q: str | None = None


@blueprint.post("")
@require("ingest")
@describe({202: SubmittedOut, 200: SubmittedOut}, body=DocumentIn, answer_headers={"Location": "The document."})
def submit() -> Response:
    """Take in a document.

    202 means that the document and its job are stored durably; 200 that the document was known before.
    """
    shared = state()
    document = read_body(DocumentIn)
    content, limit = document.content, shared.settings.content_limit_bytes
    if content is not None and len(content.encode("utf-8", "replace")) > limit:
        raise Problem(413, f"the content is larger than {limit} bytes")
    try:
        taken = shared.documents.submit(
            Submission(
                url=document.url,
                content=content,
                content_type=document.content_type,
                title=document.title,
                tags=document.tags,
                priority=PRIORITIES[document.priority],
                sensitive=None if document.sensitive is None else document.sensitive.given(),
                submitted_by=g.token.name,
                request_id=g.request_id,
            )
        )
    except QueueFull:
        shared.metrics.submissions.labels("refused").inc()
        raise
    shared.metrics.submissions.labels("created" if taken.created else "duplicate").inc()
    response = jsonify(id=taken.id, job_id=taken.job_id, status=taken.status)
    response.status_code = 202 if taken.created else 200
    response.headers["Location"] = f"{blueprint.url_prefix}/{taken.id}"
    return response


@blueprint.get("")
@require("read")
@describe({200: DocumentPage}, query=DocumentQuery)
def index() -> Response:
    """List documents, newest first, or search them."""
    query, documents = read_query(DocumentQuery), state().documents
    if query.q is None:
        page = documents.list(query.limit, query.cursor)
    else:
        page = documents.search(query.q, query.limit, query.cursor)
    return jsonify(items=[_shown(item.as_dict()) for item in page.items], total=page.total, next=page.next)


@blueprint.get("/<document_id>")
@require("read")
@describe({200: WholeDocumentOut}, problems=(404,))
def show(document_id: str) -> Response:
    """Show a document with its text."""
    found = state().documents.get(document_id)
    if found is None:
        raise Problem(404, f"there is no document {document_id}")
    return jsonify(found.as_dict())


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    document.pop("text", None)
    return document
