"""/v1/documents: take in, show, list and search."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from flask import Blueprint, Response, g, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from atlas.api.auth import require
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.documents import QueueFull, Submission
from atlas.schema import PRIORITIES
from atlas.sensitive import Sensitive

blueprint = Blueprint("documents", __name__, url_prefix="/v1/documents")
LIST_LIMIT = 200


class DocumentIn(BaseModel):
    """A document as a client sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str | None = None
    content: str | None = None
    content_type: (
        Literal["text/html", "text/plain", "text/markdown", "application/rss+xml", "application/atom+xml"] | None
    ) = None
    title: Annotated[str, Field(max_length=1000)] | None = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=50)] = []
    priority: Literal["high", "normal", "low"] = "normal"
    sensitive: Sensitive | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.url is None) == (self.content is None):
            raise ValueError("give either url or content")
        if (self.content is None) != (self.content_type is None):
            raise ValueError("content_type belongs to content, and content needs it")
        return self


@blueprint.post("")
@require("ingest")
def submit() -> tuple[Response, int]:
    shared = state()
    document = parse(request.get_data(), shared.settings.content_limit_bytes)
    try:
        taken = shared.documents.submit(
            Submission(
                url=document.url,
                content=document.content,
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
    response.headers["Location"] = f"{blueprint.url_prefix}/{taken.id}"
    return response, 202 if taken.created else 200


def parse(body: bytes, content_limit: int) -> DocumentIn:
    """The document in a request's body. Raises Problem."""
    if request.mimetype != "application/json":
        raise Problem(415, "send the document as application/json")
    try:
        document = DocumentIn.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        if found[0]["type"] == "json_invalid":
            raise Problem(400, "the body is not valid JSON") from None
        errors = [
            {"field": ".".join(map(str, item["loc"])), "message": item["msg"].removeprefix("Value error, ")}
            for item in found
        ]
        detail = "; ".join(f"{item['field']}: {item['message']}".removeprefix(": ") for item in errors)
        raise Problem(422, detail, errors=errors) from None
    if document.content is not None and len(document.content.encode("utf-8", "replace")) > content_limit:
        raise Problem(413, f"the content is larger than {content_limit} bytes")
    return document


@blueprint.get("")
@require("read")
def index() -> Response:
    limit, cursor = page_arguments()
    documents = state().documents
    query = request.args.get("q")
    page = documents.list(limit, cursor) if query is None else documents.search(query, limit, cursor)
    return jsonify(items=[_shown(item.as_dict()) for item in page.items], total=page.total, next=page.next)


@blueprint.get("/<document_id>")
@require("read")
def show(document_id: str) -> Response:
    found = state().documents.get(document_id)
    if found is None:
        raise Problem(404, f"there is no document {document_id}")
    return jsonify(found.as_dict())


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    document.pop("text", None)
    return document


def page_arguments() -> tuple[int, str | None]:
    """The arguments limit (1 to 200) and cursor of a list. Raises Problem."""
    value = request.args.get("limit", "50")
    if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= LIST_LIMIT:
        raise Problem(422, f"limit: must be 1 to {LIST_LIMIT}")
    return int(value), request.args.get("cursor")
