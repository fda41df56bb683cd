"""Documents: taken in once, together with their job; stored when processed; found again by full-text search."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, delete, func, or_, select, tuple_, update

from atlas import counts
from atlas.crypto import Keyring
from atlas.db import Database, rfc3339, total
from atlas.group import GroupCommit
from atlas.queue import DAY_MS, NewJob, Queue, Result, clean, in_state, remove, remove_documents
from atlas.schema import PRIORITIES, PRIORITY_NAMES, document_tags, documents, idempotency_keys, job_events, jobs
from atlas.search import find
from atlas.settings import Settings
from atlas.urls import host_of, normalise_url

# The share of the queue's limit that is open to a priority: the least urgent is refused first.
SHARES = {PRIORITIES["high"]: 1.0, PRIORITIES["normal"]: 0.95, PRIORITIES["low"]: 0.8}
# How often a process looks at what others have added to the queue.
COUNT_SECONDS = 0.5
GROUP_ROWS = 1000
FEW = 10_000
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # pragma: allowlist secret
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]


class InvalidDocument(ValueError):
    """A submission that cannot be taken in; the message begins with the field."""


class QueueFull(Exception):
    """The queue has reached its limit for a priority; try again after `retry_after` seconds."""

    def __init__(self, limit: int, priority: str, retry_after: int = 5) -> None:
        super().__init__(f"the queue takes no more jobs of priority {priority}: it holds {limit} or more")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Submission:
    """A document on its way in: either `url` or `content` with its type. `sensitive` is stored encrypted."""

    url: str | None = None
    content: str | None = None
    content_type: str | None = None
    title: str | None = None
    tags: Sequence[str] = ()
    priority: int = PRIORITIES["normal"]
    sensitive: Mapping[str, Any] | None = None
    submitted_by: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class Submitted:
    """The answer to a submission. `created` is false for a duplicate, whose id is that of the first."""

    id: str
    job_id: int | None
    status: str
    created: bool


Outcome = Submitted | InvalidDocument | QueueFull
# A status code and what a request is answered with, as JSON holds it.
Answer = tuple[int, Any]


class KeyReused(Exception):
    """The Idempotency-Key stands for another request."""

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key was sent with another request: use a new one")


@dataclass(frozen=True)
class Repeat:
    """An Idempotency-Key: the token (its hash) that sent it, the key, and a hash of what it stands for."""

    token: str
    key: str
    request_hash: str


_STORED: tuple[str, ...] = ("id", "dedupe_key", "url", "content_type", "source", "title", "tags")
_STORED = (*_STORED, "sensitive", "sensitive_key", "submitted_by", "created_at")


class _Row(NamedTuple):
    """A submission that is fit to be stored, with the values of the columns _STORED but the last."""

    id: str
    dedupe_key: str
    url: str | None
    priority: int
    request_id: str | None
    stored: tuple[Any, ...]


class _Entry(NamedTuple):
    """What is answered as one: submissions (or why they are refused), how their outcomes are rendered, and the key."""

    rows: Sequence[_Row | InvalidDocument]
    render: Callable[[Sequence[Outcome]], Answer]
    repeat: Repeat | None = None


@dataclass(frozen=True)
class Work:
    """What a worker needs of a document."""

    id: str
    url: str | None
    content: str | None
    content_type: str | None
    sensitive: Mapping[str, Any]


@dataclass(frozen=True)
class Extracted:
    """What a worker made of a document: the `value` of its Result."""

    text: str
    title: str | None = None
    content_type: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A document as it is shown. `applied` counts its finishes: anything but 0 or 1 is a fault."""

    id: str
    job_id: int | None
    status: str
    url: str | None
    title: str | None
    content_type: str | None
    tags: Sequence[str]
    content_hash: str | None
    created_at: int
    processed_at: int | None
    applied: int
    error_class: str | None
    error: str | None
    meta: Mapping[str, Any] | None
    text: str | None = None
    rank: float | None = None
    snippet: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: times in RFC 3339, no empty search fields."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        values["tags"] = list(self.tags)
        values["created_at"], values["processed_at"] = rfc3339(self.created_at), rfc3339(self.processed_at)
        return {key: value for key, value in values.items() if value is not None or key not in ("rank", "snippet")}


@dataclass(frozen=True)
class Page:
    """Part of a list; `next` is the cursor of the following part. `total` stops at a limit."""

    items: Sequence[Document]
    total: int
    next: str | None


# A document has one job; when retention has removed it, what was stored tells the rest.
STATUS = case(
    (jobs.c.state == "ready", "queued"),
    (jobs.c.state == "running", "processing"),
    (documents.c.processed_at.is_not(None), "processed"),
    else_="dead",
)
_APPLIED = (
    select(func.count())
    .where(job_events.c.document_id == documents.c.id, job_events.c.event == "finished")
    .scalar_subquery()
)
_SHOWN = {name: documents.c[name] for name in list(documents.c.keys()) if name in Document.__dataclass_fields__}
_COLUMNS = _SHOWN | {
    "job_id": jobs.c.id,
    "status": STATUS,
    "applied": _APPLIED,
    "error_class": jobs.c.error_class,
    "error": jobs.c.error,
}
_SUMMARY = [column.label(name) for name, column in _COLUMNS.items() if name != "text"]
_FULL = [*_SUMMARY, documents.c.text]
_WITH_JOB = documents.outerjoin(jobs, jobs.c.document_id == documents.c.id)


class Documents:
    """The documents of the store. `queue` receives their jobs; `settings` gives the limits."""

    def __init__(self, database: Database, queue: Queue, keyring: Keyring, settings: Settings) -> None:
        self.database = database
        self.queue = queue
        self.keyring = keyring
        self.settings = settings
        self._group = GroupCommit(database, self._write, _fit)
        self._depth = 0
        self._depth_lock, self._count_lock = threading.Lock(), threading.Lock()
        self._count_at = float("-inf")

    def submit(self, submission: Submission) -> Submitted:
        """Take in one document; see `submit_many`. Raises InvalidDocument or QueueFull."""
        [outcome] = self.submit_many([submission])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def submit_many(self, submissions: Sequence[Submission]) -> list[Outcome]:
        """Take in documents, each with its job, in one transaction that is durable when this returns.

        Each has its own outcome: a document that is already known, or that another submission brings at the same
        moment, is not taken in again; one that is invalid, or has no place in the queue, is refused.
        """
        outcomes: list[Outcome] = self.answer(submissions, lambda outcomes: (200, outcomes))[1]
        return outcomes

    def answer(
        self,
        submissions: Sequence[Submission],
        render: Callable[[Sequence[Outcome]], Answer],
        repeat: Repeat | None = None,
    ) -> Answer:
        """As `submit_many`; the answer that `render` makes of the outcomes.

        With `repeat`, an answer whose status is below 300 is stored in the same transaction, and given again to
        whoever sends the same. Raises KeyReused if the key was sent with something else.
        """
        self._count()
        return self._group.submit(_Entry([self._checked(submission) for submission in submissions], render, repeat))

    def add(self, connection: Connection, submissions: Sequence[Submission]) -> list[Outcome]:
        """As `submit_many`, in the caller's transaction."""
        self._count()
        rows = [self._checked(submission) for submission in submissions]
        outcomes = iter(self._insert(connection, [row for row in rows if isinstance(row, _Row)]))
        return [row if isinstance(row, InvalidDocument) else next(outcomes) for row in rows]

    def _checked(self, submission: Submission) -> _Row | InvalidDocument:
        try:
            return self._row(submission)
        except InvalidDocument as error:
            return error

    def _write(self, connection: Connection, entries: Sequence[_Entry]) -> list[Answer | KeyReused]:
        answers = self._reserve(connection, entries) if any(entry.repeat for entry in entries) else {}
        fresh = [position for position in range(len(entries)) if position not in answers]
        rows = [row for position in fresh for row in entries[position].rows if isinstance(row, _Row)]
        outcomes = iter(self._insert(connection, rows))
        for position in fresh:
            entry = entries[position]
            answer = entry.render([row if isinstance(row, InvalidDocument) else next(outcomes) for row in entry.rows])
            answers[position] = answer
            if entry.repeat:
                self._remember(connection, entry.repeat, answer)
        return [answers[position] for position in range(len(entries))]

    def _reserve(self, connection: Connection, entries: Sequence[_Entry]) -> dict[int, Answer | KeyReused]:
        """Take the keys for this transaction; what was answered, by position, where a key is not new."""
        sent = {(entry.repeat.token, entry.repeat.key): n for n, entry in enumerate(entries) if entry.repeat}
        hashes = {pair: entries[n].repeat.request_hash for pair, n in sent.items()}  # type: ignore[union-attr]
        now = self.database.now(connection)
        rows: list[Any] = [(*pair, hashes[pair], 0, {}, now) for pair in sorted(sent)]
        names = ("token", "key", "request_hash", "status", "response", "created_at")
        ending = "ON CONFLICT (token, key) DO NOTHING"
        new = {
            tuple(row)
            for row in self.database.insert_rows(connection, idempotency_keys, names, rows, "token, key", ending)
        }
        answers: dict[int, Answer | KeyReused] = {}
        for pair in sent.keys() - new:
            row = connection.execute(select(idempotency_keys).where(_is(pair))).one_or_none()
            same = row is not None and row.request_hash == hashes[pair]
            answers[sent[pair]] = (row.status, row.response) if row and same else KeyReused()
        return answers

    def _remember(self, connection: Connection, repeat: Repeat, answer: Answer) -> None:
        status, response = answer
        key = _is((repeat.token, repeat.key))
        if status < 300:
            connection.execute(update(idempotency_keys).where(key).values(status=status, response=response))
        else:
            connection.execute(delete(idempotency_keys).where(key))

    def _insert(self, connection: Connection, rows: Sequence[_Row]) -> list[Outcome]:
        if not rows:
            return []
        now = self.database.now(connection)
        with self._depth_lock:
            depth, wanted = self._depth, []
            for row in rows:
                if depth < self._most(row.priority):
                    depth += 1
                    wanted.append((*row.stored, now))
        # In one order everywhere, so that overlapping batches cannot deadlock.
        wanted.sort(key=lambda stored: stored[1])
        ending = "ON CONFLICT (dedupe_key) DO NOTHING"
        created = {row[0] for row in self.database.insert_rows(connection, documents, _STORED, wanted, "id", ending)}
        new = [
            NewJob(document_id=row.id, priority=row.priority, request_id=row.request_id, host=host_of(row.url))
            for row in rows
            if row.id in created
        ]
        job_ids = {document: job for job, document in self.queue.enqueue_many(connection, new)} if new else {}
        with self._depth_lock:
            self._depth += len(new)
        known = {}
        if len(new) < len(rows):
            query = select(documents.c.dedupe_key, documents.c.id, jobs.c.id, STATUS).select_from(_WITH_JOB)
            keys = [row.dedupe_key for row in rows if row.id not in created]
            for key, document, job, status in connection.execute(query.where(documents.c.dedupe_key.in_(keys))):
                known[key] = Submitted(document, job, status, False)
        return [
            Submitted(row.id, job_ids[row.id], "queued", True)
            if row.id in created
            else known.get(row.dedupe_key) or QueueFull(self._most(row.priority), PRIORITY_NAMES[row.priority])
            for row in rows
        ]

    def _most(self, priority: int) -> int:
        return math.ceil(self.settings.queue_limit * SHARES[priority])

    def _count(self) -> None:
        """Look at the queue if that is due. What this process adds in between is known; what others do is not."""
        if time.monotonic() < self._count_at or not self._count_lock.acquire(blocking=False):
            return
        try:
            with self.database.read() as connection:
                depth = counts.in_state(connection, "ready")
            with self._depth_lock:
                self._depth = depth
            self._count_at = time.monotonic() + COUNT_SECONDS
        finally:
            self._count_lock.release()

    def _row(self, submission: Submission) -> _Row:
        if (submission.url is None) == (submission.content is None):
            raise InvalidDocument("url: give either url or content")
        if submission.priority not in PRIORITY_NAMES:
            raise InvalidDocument(f"priority: must be one of {', '.join(PRIORITIES)}")
        source = None if submission.content is None else clean(submission.content)
        url = None if submission.url is None else checked_url(submission.url)
        kind, identity = ("url", url or "") if source is None else ("content", f"{submission.content_type}\0{source}")
        document_id, dedupe_key = new_id(), _dedupe_key(kind, identity)
        stored = (
            document_id,
            dedupe_key,
            url,
            submission.content_type,
            source,
            None if submission.title is None else clean(submission.title),
            [clean(tag) for tag in submission.tags],
            *self.sealed(submission.sensitive),
            submission.submitted_by,
        )
        return _Row(document_id, dedupe_key, url, submission.priority, submission.request_id, stored)

    def work(self, ids: Sequence[str]) -> dict[str, Work]:
        """What is to be processed, by document id. Raises KeyringError if a sensitive field cannot be read."""
        names = ("id", "url", "content_type", "sensitive")
        columns = [*(documents.c[name] for name in names), documents.c.source.label("content")]
        with self.database.read() as connection:
            query = select(*columns).where(documents.c.id.in_(ids))
            rows = connection.execute(query).all()
        return {row.id: Work(**dict(row._mapping) | {"sensitive": self.opened(row.sensitive)}) for row in rows}

    def sealed(self, sensitive: Mapping[str, Any] | None) -> tuple[str, str] | tuple[None, None]:
        """Sensitive fields as they are stored: encrypted, with the fingerprint of the key."""
        if not sensitive:
            return None, None
        return self.keyring.encrypt(json.dumps(dict(sensitive))), self.keyring.fingerprints[0]

    def opened(self, sensitive: str | None) -> dict[str, Any]:
        """Sensitive fields in clear. Raises KeyringError."""
        return {} if sensitive is None else dict(json.loads(self.keyring.decrypt(sensitive)))

    def store(self, connection: Connection, results: Sequence[Result]) -> None:
        """Store what was extracted: the `store` of `Queue.finish`."""
        now = self.database.now(connection)
        values = [
            {
                "b_id": result.job.document_id,
                "b_title": None if result.value.title is None else clean(result.value.title),
                "b_text": clean(result.value.text),
                "b_hash": hashlib.sha256(clean(result.value.text).encode()).hexdigest(),
                "b_type": result.value.content_type,
                "b_meta": dict(result.value.meta),
            }
            for result in results
            if isinstance(result.value, Extracted)
        ]
        if values:
            statement = update(documents).where(documents.c.id == bindparam("b_id"))
            connection.execute(
                statement.values(
                    title=func.coalesce(documents.c.title, bindparam("b_title", type_=documents.c.title.type)),
                    text=bindparam("b_text"),
                    content_hash=bindparam("b_hash"),
                    content_type=func.coalesce(
                        bindparam("b_type", type_=documents.c.title.type), documents.c.content_type
                    ),
                    meta=bindparam("b_meta", type_=documents.c.meta.type),
                    processed_at=now,
                ),
                values,
            )

    def get(self, document_id: str) -> Document | None:
        with self.database.read() as connection:
            query = select(*_FULL).select_from(_WITH_JOB).where(documents.c.id == document_id)
            row = connection.execute(query).mappings().one_or_none()
        return Document(**row) if row else None

    def delete(self, document_id: str, note: Callable[[Connection], None] | None = None) -> bool:
        """Remove a document, its job and its events; whether it was there. `note` is called in the same transaction.

        A worker that has the job can no longer finish it.
        """
        with self.database.write() as connection:
            # The job first, as a worker that finishes does, or the two could wait for each other.
            connection.execute(delete(jobs).where(jobs.c.document_id == document_id))
            found = remove_documents(connection, documents.c.id == document_id) > 0
            if found and note is not None:
                note(connection)
        return found

    def list(
        self,
        limit: int = 50,
        cursor: str | None = None,
        *,
        status: str | None = None,
        tag: str | None = None,
        url: str | None = None,
    ) -> Page:
        """Documents that match all that is given, newest first, without their text.

        Raises InvalidDocument for a cursor that is none of ours, or a URL that no document can have.
        """
        source, wanted = _WITH_JOB, list[Any]()
        order: ColumnElement[int] = documents.c.seq
        if tag is not None:
            source, order = source.join(document_tags, document_tags.c.seq == documents.c.seq), document_tags.c.seq
            wanted.append(document_tags.c.tag == clean(tag))
        if url is not None:
            wanted.append(documents.c.dedupe_key == _dedupe_key("url", checked_url(url)))
        with self.database.read() as connection:
            if status is not None:
                wanted.append(status == STATUS)
            # Of a state that few jobs are in, those few are looked at; else the newest documents soon have it.
            state = {"queued": "ready", "processing": "running", "dead": "dead"}.get(status or "")
            if state is not None and counts.in_state(connection, state) <= FEW:
                wanted.append(documents.c.id.in_(select(jobs.c.document_id).where(in_state(state))))
                order = order + 0  # keeps SQLite from walking along all documents instead
            query = select(documents.c.seq, *_SUMMARY).select_from(source).where(*wanted).order_by(order.desc())
            if cursor is not None:
                query = query.where(order < _position(cursor))
            rows = connection.execute(query.limit(limit + 1)).all()
            counted = select(documents.c.id).select_from(source if wanted else documents).where(*wanted)
            found = total(connection, counted)
        return Page(_build(rows[:limit]), found, str(rows[limit - 1].seq) if len(rows) > limit else None)

    def search(self, query: str, limit: int = 20, cursor: str | None = None, *, tag: str | None = None) -> Page:
        """Documents that match, best first, each with its rank and a snippet (matches between `**`), without text.

        All words must match; "a phrase", `or` and -without are understood. Any text is a valid query. Of many matches
        the newest are ranked: see search.WINDOW.
        """
        offset = 0 if cursor is None else _position(cursor)
        with self.database.read() as connection:
            total, matches = find(connection, clean(query), limit + 1, offset, None if tag is None else clean(tag))
            goes_on, matches = len(matches) > limit, matches[:limit]
            found = [match.seq for match in matches]
            rows = connection.execute(
                select(documents.c.seq, *_SUMMARY).select_from(_WITH_JOB).where(documents.c.seq.in_(found))
            ).all()
        extra = {match.seq: {"rank": match.rank, "snippet": match.snippet} for match in matches}
        items = _build(sorted(rows, key=lambda row: found.index(row.seq)), extra)
        return Page(items, total, str(offset + limit) if goes_on else None)

    def clean(self, limit: int = 1000) -> dict[str, int]:
        """Remove what retention has ended, at most `limit` of each kind: how many of each."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            dead_before = now - int(self.settings.dead_letter_retention_hours * 3_600_000)
            done_before = now - int(self.settings.job_retention_days * DAY_MS)
            ended = or_(
                in_state("dead") & (jobs.c.finished_at < dead_before),
                in_state("done") & (jobs.c.finished_at < done_before),
            )
            # Locked: what is requeued at this moment has not ended.
            over = select(jobs.c.id).where(ended).limit(limit).with_for_update(skip_locked=True)
            old = connection.scalars(over).all()
            forgotten = now - int(self.settings.idempotency_retention_hours * 3_600_000)
            pairs = select(idempotency_keys.c.token, idempotency_keys.c.key)
            keys = pairs.where(idempotency_keys.c.created_at < forgotten).limit(limit)
            own = tuple_(idempotency_keys.c.token, idempotency_keys.c.key)
            unkept = connection.execute(delete(idempotency_keys).where(own.in_(keys)))
            removed = remove(connection, old)
            return {"jobs": len(old), "documents": removed, "idempotency_keys": unkept.rowcount}


def _fit(entries: Sequence[_Entry]) -> bool:
    """Whether these may share a transaction: they are not too many, and no key stands there twice."""
    keys = [(entry.repeat.token, entry.repeat.key) for entry in entries if entry.repeat]
    return sum(len(entry.rows) for entry in entries) <= GROUP_ROWS and len(set(keys)) == len(keys)


def _is(pair: tuple[str, str]) -> ColumnElement[bool]:
    return and_(idempotency_keys.c.token == pair[0], idempotency_keys.c.key == pair[1])


def _build(rows: Sequence[Any], extra: Mapping[int, Mapping[str, Any]] | None = None) -> list[Document]:
    built = []
    for row in rows:
        values = dict(row._mapping)
        seq = values.pop("seq")
        built.append(Document(**values, **(extra or {}).get(seq, {})))
    return built


def _dedupe_key(kind: str, identity: str) -> str:
    return f"{kind}:{hashlib.sha256(identity.encode()).hexdigest()}"


def _position(cursor: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", cursor):
        raise InvalidDocument("cursor: is not one that a page of this list gave")
    return int(cursor)


def new_id() -> str:
    """A new id: 26 characters that sort by time (48 bits of milliseconds, 80 random bits)."""
    # Nothing rests on an id being hard to guess; each process draws its own numbers.
    value = time.time_ns() // 1_000_000 << 80 | random.getrandbits(80)
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])


def checked_url(url: str) -> str:
    """The URL in its one form. Raises InvalidDocument."""
    try:
        return normalise_url(url)
    except ValueError as error:
        raise InvalidDocument(f"url: {error}") from None
