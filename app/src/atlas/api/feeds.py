"""/v1/feeds: subscriptions to RSS and Atom."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from flask import Blueprint, Response, g, jsonify
from pydantic import BaseModel, ConfigDict, Field

from atlas.api.audit import note
from atlas.api.auth import require
from atlas.api.documents import Priority, Tags, Title
from atlas.api.openapi import PageQuery, describe, read_body, read_query
from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.documents import InvalidDocument
from atlas.feeds import Feeds
from atlas.schema import PRIORITIES
from atlas.sensitive import Sensitive

blueprint = Blueprint("feeds", __name__, url_prefix="/v1/feeds")
_NULLABLE = ("title", "sensitive")


class FeedChange(BaseModel):
    """What may be changed of a feed. A member that is not given stays as it is; title and sensitive may be null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Title | None = None
    tags: Tags | None = None
    priority: Priority | None = None
    interval_seconds: Annotated[int, Field(ge=1, le=31 * 86_400)] | None = None
    enabled: bool | None = None
    sensitive: Sensitive | None = None

    def values(self) -> dict[str, Any]:
        """The columns to set. Raises InvalidDocument."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"url"}}
        for name, value in given.items():
            if value is None and name not in _NULLABLE:
                raise InvalidDocument(f"{name}: must not be null")
        if "priority" in given:
            given["priority"] = PRIORITIES[given["priority"]]
        if self.sensitive is not None:
            given["sensitive"] = self.sensitive.given()
        return given


class FeedIn(FeedChange):
    """A feed to subscribe to."""

    url: str


class FeedOut(BaseModel):
    """A feed, with the outcome of its latest poll: `error` is null if that was good or there was none."""

    id: str
    url: str
    title: str | None
    tags: list[str]
    priority: Priority
    interval_seconds: int
    enabled: bool
    has_sensitive: bool
    next_at: datetime
    polled_at: datetime | None
    failures: int
    job_id: int | None
    job_state: str | None
    error_class: str | None
    error: str | None
    created_by: str | None
    created_at: datetime


class FeedPage(BaseModel):
    """Part of a list; `next` is the cursor of the following part."""

    items: list[FeedOut]
    total: int
    next: str | None


def _feeds() -> Feeds:
    return Feeds(state().documents)


@blueprint.post("")
@require("operate")
@describe({201: FeedOut}, problems=(409,), body=FeedIn, answer_headers={"Location": "The feed."})
def create() -> Response:
    """Subscribe to a feed."""
    wanted = read_body(FeedIn)
    feeds = _feeds()
    with state().database.write() as connection:
        feed_id, is_new = feeds.create(connection, wanted.url, g.token.name, **wanted.values())
        if is_new:
            note(connection, "created", "feed", feed_id, {"url": wanted.url})
    if not is_new:
        raise Problem(409, f"the feed is there already: {feed_id}", id=feed_id)
    response = jsonify(feeds.get(feed_id))
    response.status_code = 201
    response.headers["Location"] = f"{blueprint.url_prefix}/{feed_id}"
    return response


@blueprint.get("")
@require("read")
@describe({200: FeedPage}, query=PageQuery)
def index() -> Response:
    """List feeds, newest first."""
    query = read_query(PageQuery)
    items, total, following = _feeds().list(query.limit, None if query.cursor is None else int(query.cursor))
    return jsonify(items=items, total=total, next=following)


@blueprint.get("/<feed_id>")
@require("read")
@describe({200: FeedOut}, problems=(404,))
def show(feed_id: str) -> Response:
    """Show a feed."""
    found = _feeds().get(feed_id)
    if found is None:
        raise _missing(feed_id)
    return jsonify(found)


@blueprint.patch("/<feed_id>")
@require("operate")
@describe({200: FeedOut}, problems=(404,), body=FeedChange)
def change(feed_id: str) -> Response:
    """Change a feed, and have it polled at once."""
    values = read_body(FeedChange).values()
    feeds = _feeds()
    with state().database.write() as connection:
        if not feeds.change(connection, feed_id, values):
            raise _missing(feed_id)
        note(connection, "changed", "feed", feed_id, {"fields": sorted(values)})
    return jsonify(feeds.get(feed_id))


@blueprint.delete("/<feed_id>")
@require("operate")
@describe({204: None}, problems=(404,))
def remove(feed_id: str) -> tuple[str, int]:
    """End a subscription; the documents it brought stay."""
    with state().database.write() as connection:
        if not _feeds().remove(connection, feed_id):
            raise _missing(feed_id)
        note(connection, "deleted", "feed", feed_id)
    return "", 204


def _missing(feed_id: str) -> Problem:
    return Problem(404, f"there is no feed {feed_id}")
