"""/v1/audit: who did what to which object; and the record of what is done through this API."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from pydantic import BaseModel
from sqlalchemy import Connection

from atlas.api.auth import require
from atlas.api.openapi import Moment, PageQuery, describe, read_query
from atlas.api.state import state
from atlas.audit import FILTERS, record, records, shown

blueprint = Blueprint("audit", __name__, url_prefix="/v1/audit")


def note(
    connection: Connection,
    action: str,
    object_type: str,
    object_id: str | int | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Record what this request does, in its transaction: see atlas.audit.record."""
    # HAProxy puts the client's address there, in the place of whatever the client sent.
    address = request.headers.get("X-Forwarded-For", request.remote_addr)
    record(
        connection,
        g.token.name,
        action,
        object_type,
        object_id,
        address=address and address[:45],
        request_id=g.request_id,
        detail=detail,
    )


class AuditOut(BaseModel):
    """A record of the audit log."""

    id: int
    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str | None
    address: str | None
    request_id: str | None
    detail: dict[str, Any] | None


class AuditPage(BaseModel):
    """Part of the log; `next` is the cursor of the following part."""

    items: list[AuditOut]
    total: int
    next: str | None


class AuditQuery(PageQuery):
    """Records that match all that is given."""

    actor: str | None = None
    action: str | None = None
    object_type: str | None = None
    object_id: str | None = None
    since: Moment | None = None
    until: Moment | None = None


@blueprint.get("")
@require("operate")
@describe({200: AuditPage}, query=AuditQuery)
def index() -> Response:
    """List who did what, newest first."""
    query = read_query(AuditQuery)
    filters = query.model_dump(include=set(FILTERS))
    before = None if query.cursor is None else int(query.cursor)
    found, total = records(state().database, filters, query.limit + 1, before, query.since, query.until)
    following = str(found[query.limit - 1]["id"]) if len(found) > query.limit else None
    return jsonify(items=[shown(entry) for entry in found[: query.limit]], total=total, next=following)
