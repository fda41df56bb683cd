"""/v1/statistics: see atlas.statistics."""

from __future__ import annotations

from flask import Blueprint, Response, g, jsonify
from pydantic import BaseModel

from atlas.api.auth import require
from atlas.api.openapi import describe
from atlas.api.state import state
from atlas.statistics import collect

blueprint = Blueprint("statistics", __name__, url_prefix="/v1")


class DocumentCounts(BaseModel):
    """Documents by status."""

    total: int
    queued: int
    processing: int
    processed: int
    dead: int


class QueueCounts(BaseModel):
    """Jobs by state and priority; `limit` is that of the waiting ones."""

    ready: dict[str, int]
    running: dict[str, int]
    dead: dict[str, int]
    limit: int
    oldest_ready_seconds: float


class Throughput(BaseModel):
    """What ended within a span, by whole minutes."""

    finished: int
    failed: int


class TokenUse(BaseModel):
    """What a token with limits has used in this minute and in this hour."""

    name: str
    minute: int
    hour: int


class StatisticsOut(BaseModel):
    """The state of the whole service.

    Jobs without a document (polls of feeds, probes) are in the queue alone. `tokens` is for those who may operate.
    """

    documents: DocumentCounts
    queue: QueueCounts
    throughput: dict[str, Throughput]
    dead_letters: dict[str, int]
    tokens: list[TokenUse]


@blueprint.get("/statistics")
@require("read")
@describe({200: StatisticsOut})
def statistics() -> Response:
    """Show statistics of documents, queue, failures and tokens."""
    shared = state()
    found = collect(shared.database, shared.counted.get(), shared.settings.queue_limit)
    return jsonify(found if "operate" in g.token.scopes else found | {"tokens": []})
