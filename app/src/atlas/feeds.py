"""Feeds: subscriptions that are polled again and again, and whose new entries become documents.

A poll is a job like any other, so that leases, retries and the limits of hosts hold for it. What it found is stored in
the transaction that ends the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, case, delete, func, select, update

from atlas import counts
from atlas.db import rfc3339, total
from atlas.documents import Documents, InvalidDocument, QueueFull, Submission, checked_url, new_id
from atlas.extract import Entry
from atlas.queue import NewJob, Result, clean
from atlas.schema import PRIORITIES, PRIORITY_NAMES, feeds, jobs
from atlas.urls import host_of, normalise_url

BATCH = 100
URL_LIMIT = 2000  # they are unique by an index, in which PostgreSQL holds no more than 2,700 bytes
POSTPONED_MS = 60_000
LONGEST_WAIT_SECONDS = 86_400
GRACE_MS = 60_000
_FEED_JOB = feeds.outerjoin(jobs, jobs.c.id == feeds.c.job_id)
_SHOWN = [
    *(column for column in feeds.c if column.name not in ("sensitive", "sensitive_key", "seen", "error")),
    feeds.c.sensitive.is_not(None).label("has_sensitive"),
    jobs.c.state.label("job_state"),
    case((jobs.c.state != "done", jobs.c.error_class)).label("error_class"),
    func.coalesce(case((jobs.c.state != "done", jobs.c.error)), feeds.c.error).label("error"),
]
_HIDDEN = ("seq", "etag", "last_modified")


@dataclass(frozen=True)
class FeedWork:
    """What a worker needs to poll a feed."""

    url: str
    etag: str | None
    last_modified: str | None
    sensitive: Mapping[str, Any]


@dataclass(frozen=True)
class Polled:
    """What a worker found: the `value` of its Result. `entries` is None if the feed has not changed."""

    feed_id: str
    title: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    entries: Sequence[Entry] | None = None


def tally(connection: Connection, now: int) -> dict[str, int]:
    """How many feeds are enabled, and how many of these are overdue by more than a minute, or failing."""
    overdue = feeds.c.next_at < now - GRACE_MS
    failing = (feeds.c.failures > 0) | feeds.c.error.is_not(None) | (jobs.c.state == "dead")
    counted = (func.count(), func.count(case((overdue, 1))), func.count(case((failing, 1))))
    found = connection.execute(select(*counted).select_from(_FEED_JOB).where(feeds.c.enabled)).one()
    return dict(zip(("enabled", "overdue", "failing"), found, strict=True))


class Feeds:
    """The feeds of the store. Their entries go the way of all documents."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.database = documents.database
        self._settings = documents.settings

    def create(self, connection: Connection, url: str, created_by: str | None, **values: Any) -> tuple[str, bool]:
        """Subscribe to the feed at `url`: its id, and whether it is new. Raises InvalidDocument.

        `values` may hold title, tags, priority, interval_seconds, enabled and sensitive.
        """
        now = self.database.now(connection)
        row: dict[str, Any] = {"id": new_id(), "url": checked_url(url), "created_by": created_by}
        if len(row["url"]) > URL_LIMIT:
            raise InvalidDocument(f"url: must be at most {URL_LIMIT} characters for a feed")
        row |= {"created_at": now, "next_at": now}
        defaults = {
            "tags": [],
            "priority": PRIORITIES["normal"],
            "interval_seconds": self._settings.feed_interval_seconds,
        }
        statement = self.database.insert(feeds).values(row | defaults | self._columns(values))
        created = connection.scalar(statement.on_conflict_do_nothing(index_elements=["url"]).returning(feeds.c.id))
        if created is not None:
            return created, True
        return str(connection.scalar(select(feeds.c.id).where(feeds.c.url == row["url"]))), False

    def change(self, connection: Connection, feed_id: str, values: Mapping[str, Any]) -> bool:
        """Change a feed, and poll it at once; whether there is such a feed. Raises InvalidDocument."""
        columns = self._columns(values) | {"next_at": self.database.now(connection)}
        return connection.execute(update(feeds).where(feeds.c.id == feed_id).values(columns)).rowcount > 0

    def remove(self, connection: Connection, feed_id: str) -> bool:
        """End a subscription; its documents stay. Whether there was such a feed."""
        # The feed first, as `poll` does, or the two could wait for each other.
        gone = connection.execute(delete(feeds).where(feeds.c.id == feed_id).returning(feeds.c.job_id)).one_or_none()
        if gone is not None:
            connection.execute(delete(jobs).where(jobs.c.id == gone.job_id, jobs.c.state != "running"))
        return gone is not None

    def _columns(self, values: Mapping[str, Any]) -> dict[str, Any]:
        columns = dict(values)
        least = self._settings.feed_interval_min_seconds
        if columns.get("interval_seconds", least) < least:
            raise InvalidDocument(f"interval_seconds: must be at least {least}; see feed_interval_min_seconds")
        if "tags" in columns:
            columns["tags"] = [clean(tag) for tag in columns["tags"]]
        if columns.get("title") is not None:
            columns["title"] = clean(columns["title"])
        if "sensitive" in columns:
            columns["sensitive"], columns["sensitive_key"] = self._documents.sealed(columns["sensitive"])
        return columns

    def list(self, limit: int = 50, cursor: int | None = None) -> tuple[Sequence[dict[str, Any]], int, str | None]:
        """Feeds, newest first; how many there are (see db.total); and the cursor of the following page."""
        query = select(*_SHOWN).select_from(_FEED_JOB).order_by(feeds.c.seq.desc()).limit(limit + 1)
        with self.database.read() as connection:
            known = total(connection, select(feeds.c.seq))
            rows = connection.execute(query if cursor is None else query.where(feeds.c.seq < cursor)).all()
        following = str(rows[limit - 1].seq) if len(rows) > limit else None
        return [_shown(row) for row in rows[:limit]], known, following

    def get(self, feed_id: str) -> dict[str, Any] | None:
        with self.database.read() as connection:
            row = connection.execute(select(*_SHOWN).select_from(_FEED_JOB).where(feeds.c.id == feed_id)).one_or_none()
        return None if row is None else _shown(row)

    def poll(self) -> bool:
        """Enqueue a job for each feed that is due, at most BATCH; whether there may be more.

        A feed has one job at a time. One that fails waits twice as long each time, at most a day.
        """
        with self.database.write() as connection:
            now = self.database.now(connection)
            due = connection.execute(
                select(feeds, jobs.c.state.label("job_state"))
                .select_from(_FEED_JOB)
                .where(feeds.c.enabled, feeds.c.next_at <= now)
                .order_by(feeds.c.next_at)
                .limit(BATCH)
                # A leader that hung may find that another leads by now.
                .with_for_update(of=feeds, skip_locked=True)
            ).all()
            if not due or counts.in_state(connection, "ready") >= self._settings.queue_limit:
                return False
            for feed in due:
                failures, job_id = feed.failures + (feed.job_state == "dead"), feed.job_id
                if feed.job_state not in ("ready", "running"):
                    connection.execute(delete(jobs).where(jobs.c.id == job_id))
                    job = NewJob("feed", payload={"feed": feed.id}, priority=feed.priority, host=host_of(feed.url))
                    job_id = self._documents.queue.enqueue(connection, job)
                wait = min(feed.interval_seconds * 2**failures, max(feed.interval_seconds, LONGEST_WAIT_SECONDS))
                values = {"job_id": job_id, "next_at": now + wait * 1000, "failures": min(failures, 30)}
                connection.execute(update(feeds).where(feeds.c.id == feed.id).values(values))
        return len(due) == BATCH

    def work(self, feed_id: str) -> FeedWork | None:
        """What is to be polled; None if the feed is gone. Raises KeyringError."""
        with self.database.read() as connection:
            row = connection.execute(select(feeds).where(feeds.c.id == feed_id)).one_or_none()
        if row is None:
            return None
        return FeedWork(row.url, row.etag, row.last_modified, self._documents.opened(row.sensitive))

    def store(self, connection: Connection, results: Sequence[Result]) -> None:
        """Store what polls found: the `store` of `Queue.finish` for jobs of kind "feed"."""
        for polled in [result.value for result in results if isinstance(result.value, Polled)]:
            feed = connection.execute(select(feeds).where(feeds.c.id == polled.feed_id)).one_or_none()
            if feed is None:
                continue
            values: dict[str, Any] = {"polled_at": self.database.now(connection), "failures": 0, "error": None}
            if polled.entries is not None:
                # What stays in the feed is not new, also after its document was deleted.
                seen = set(feed.seen or ())
                new = {entry.key: self._submission(feed, entry) for entry in polled.entries if entry.key not in seen}
                wanted = {key: submission for key, submission in new.items() if submission is not None}
                outcomes = zip(wanted, self._documents.add(connection, list(wanted.values())), strict=True)
                # Only the queue may have room later; what cannot be taken in is passed over for good.
                refused = {key: outcome for key, outcome in outcomes if isinstance(outcome, QueueFull)}
                values |= {"seen": [entry.key for entry in polled.entries if entry.key not in refused]}
                values |= {"title": feed.title or (polled.title and clean(polled.title))}
                if refused:
                    # Asked without the ETag, the feed will say again what had no place.
                    values |= {
                        "error": str(next(iter(refused.values()))),
                        "next_at": values["polled_at"] + POSTPONED_MS,
                    }
                else:
                    values |= {"etag": polled.etag, "last_modified": polled.last_modified}
            connection.execute(update(feeds).where(feeds.c.id == feed.id).values(values))

    def _submission(self, feed: Any, entry: Entry) -> Submission | None:
        """The document of an entry: the page that it leads to, else what it says; None if that is nothing."""
        common: dict[str, Any] = {"title": entry.title and entry.title[:1000], "tags": feed.tags}
        common |= {"priority": feed.priority, "submitted_by": f"feed:{feed.id}"}
        try:
            url = normalise_url(entry.url or "")
        except ValueError:
            text = entry.text.encode()[: self._settings.content_limit_bytes].decode(errors="ignore")
            return Submission(content=text, content_type="text/plain", **common) if text else None
        # Pages of the feed's own origin ask for the same credentials.
        is_same_place = urlsplit(url)[:2] == urlsplit(feed.url)[:2]
        sensitive = self._documents.opened(feed.sensitive) if is_same_place else None
        return Submission(url=url, sensitive=sensitive, **common)


def _shown(row: Any) -> dict[str, Any]:
    found = {key: value for key, value in row._mapping.items() if key not in _HIDDEN}
    times = {name: rfc3339(found[name]) for name in ("next_at", "polled_at", "created_at")}
    return found | times | {"priority": PRIORITY_NAMES[found["priority"]]}
