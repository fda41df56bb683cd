"""/v1/audit: who did what to which object; and the record of what is done through this API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from sqlalchemy import Connection

from atlas.api.auth import require
from atlas.api.documents import page_arguments
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.audit import FILTERS, record, records, shown
from atlas.db import milliseconds

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


@blueprint.get("")
@require("operate")
def index() -> Response:
    limit, cursor = page_arguments()
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise Problem(422, "cursor: is not one that a page of this list gave")
    filters = {name: request.args.get(name) for name in FILTERS}
    before = None if cursor is None else int(cursor)
    since, until = moment_argument("since"), moment_argument("until")
    found, total = records(state().database, filters, limit + 1, before, since, until)
    following = str(found[limit - 1]["id"]) if len(found) > limit else None
    return jsonify(items=[shown(entry) for entry in found[:limit]], total=total, next=following)


def moment_argument(name: str) -> int | None:
    """The moment (ms) that a query argument gives in RFC 3339; None if it is not there. Raises Problem."""
    value = request.args.get(name)
    try:
        return None if value is None else milliseconds(value)
    except (ValueError, OverflowError):
        raise Problem(422, f"{name}: must be a moment in RFC 3339, like 2026-01-31T12:00:00Z") from None
