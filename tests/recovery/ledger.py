"""What a service has acknowledged, and what of that its store holds: the two sides of every proof of recovery."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from labtest import Lab, sql

from tests.load.traffic import Traffic

BATCH = 250
WORDS = 150
"""A kilobyte of text."""
EXAMPLES = 5
VOCABULARY = [
    f"{first}{middle}{last}" for first in "bdklmt" for middle in "aeiou" for last in ("nar", "vo", "sik", "ptel")
]

# One line for each document of a proof, oldest first: id, whether it is processed, finishes, text. job_events is append-only.
DOCUMENTS = """
SELECT {array}(d.id, d.processed_at IS NOT NULL, coalesce(e.finished, 0), d.text)
FROM documents d LEFT JOIN
  (SELECT document_id, count(*) AS finished FROM job_events WHERE event = 'finished' GROUP BY document_id) e
  ON e.document_id = d.id
WHERE d.title LIKE 'load-%' ORDER BY d.seq"""
WAITING = "SELECT count(*) FROM documents WHERE title LIKE 'load-%' AND processed_at IS NULL"
DELETED = "DELETE FROM jobs; DELETE FROM documents;"
ASK_SQLITE = """#python
import sqlite3
store = sqlite3.connect("file:/var/lib/atlas/atlas.db?mode=ro", uri=True, timeout=60)
for row in store.execute({statement!r}):
    print(row[0])
"""
DELETE_SQLITE = f"""#python
import sqlite3
sqlite3.connect("/var/lib/atlas/atlas.db", timeout=60).executescript("BEGIN IMMEDIATE; {DELETED} COMMIT")
"""
ASK_SECONDS = 600.0
POST_SECONDS = 60.0
DELETIONS = 5


class Acknowledged(NamedTuple):
    """A document that the service answered 202 for, *at* a Unix time."""

    at: float
    text: str


class Stored(NamedTuple):
    """A document as its store holds it."""

    processed: bool
    finished: int
    text: str | None


@dataclass
class Findings:
    """What a restored store lacks. *lost*: Unix times at which documents that are not there were acknowledged."""

    kept: int = 0
    lost: list[float] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    not_once: list[str] = field(default_factory=list)
    unanswered: int = 0
    """Documents that are there, and whose answer did not reach the client."""

    def rpo(self, destroyed_at: float) -> float:
        """Seconds of acknowledged work before *destroyed_at* that are gone; 0 for none."""
        return max(0.0, destroyed_at - min(self.lost)) if self.lost else 0.0


class Ledger:
    """Every acknowledgement of one lab, whose store is that of PostgreSQL on *database*, or of SQLite on *app*."""

    def __init__(self, lab: Lab, app: str, database: str | None) -> None:
        self.lab, self.app, self.database = lab, app, database
        self.acknowledged: dict[str, Acknowledged] = {}

    # What went in

    def fill(self, count: int) -> float:
        """Take in *count* documents in batches; returns documents per second, processed ones."""
        run, began = f"load-{uuid.uuid4().hex[:12]}", time.monotonic()
        todo = [(number, content(run, number)) for number in range(count)]
        while todo:
            now, todo = todo[:BATCH], todo[BATCH:]
            answer = self._post_batch(run, now)
            for (number, text), item in zip(now, answer["items"], strict=True):
                # 200: it was taken in with an answer that did not come.
                if item["code"] in (200, 202):
                    self.acknowledged[item["id"]] = Acknowledged(time.time(), text)
                elif item["code"] in (429, 503):
                    todo.append((number, text))
                else:
                    raise AssertionError(f"a document was answered with {item}")
            if answer["refused"]:
                time.sleep(1)
        self.settle(120 + count / 20)
        return count / (time.monotonic() - began)

    def _post_batch(self, run: str, documents: list[tuple[int, str]]) -> dict[str, Any]:
        lines = [
            json.dumps({"content": text, "content_type": "text/plain", "title": run, **private(number)})
            for number, text in documents
        ]
        request = urllib.request.Request(f"{self.lab.url}/v1/documents:batch", "\n".join(lines).encode(), method="POST")
        request.add_header("Authorization", f"Bearer {self.lab.token}")
        request.add_header("Content-Type", "application/x-ndjson")
        try:
            with urllib.request.urlopen(request, timeout=POST_SECONDS, context=self.lab.tls) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503):
                raise
            return {"items": [{"code": error.code}] * len(documents), "refused": len(documents)}

    def add(self, traffic: Traffic) -> None:
        """Take over what a load was answered."""
        for one in traffic.outcomes:
            if one.good and one.wrote:
                self.acknowledged[one.identifier] = Acknowledged(one.ended, f"{traffic.run} {one.number}")

    def sensitive(self) -> int:
        """Return how many of these documents have a sensitive field."""
        words = (one.text.split(maxsplit=2) for one in self.acknowledged.values())
        return sum(len(found) > 2 and bool(private(int(found[1]))) for found in words)

    # What is there

    def _ask(self, statement: str) -> list[str]:
        if self.database:
            return sql(self.lab, self.database, statement, ASK_SECONDS).splitlines()
        done = self.lab.ssh(self.app, ASK_SQLITE.format(statement=statement), ASK_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def delete_all(self) -> None:
        """Delete every document in the store itself, as a mistake does that no check of the service stops."""
        if self.database:
            for attempt in range(1, DELETIONS + 1):
                try:
                    sql(self.lab, self.database, f"BEGIN; {DELETED} COMMIT", ASK_SECONDS)
                    return
                except AssertionError as error:
                    # It takes seconds with many documents, and workers go on meanwhile: PostgreSQL ends one of two that wait for each other.
                    if attempt == DELETIONS or "deadlock detected" not in str(error):
                        raise
        done = self.lab.ssh(self.app, DELETE_SQLITE, ASK_SECONDS)
        assert done.returncode == 0, done.stderr

    def settle(self, seconds: float) -> None:
        """Wait until everything that is there is processed."""
        deadline = time.monotonic() + seconds
        while (waiting := int(self._ask(WAITING)[0])) > 0:
            assert time.monotonic() < deadline, f"{waiting} documents are not processed after {seconds:.0f} s"
            # To look costs the store a walk through all documents.
            time.sleep(1 + waiting / 1000)

    def stored(self) -> dict[str, Stored]:
        """Return every document of this proof that the store holds."""
        statement = DOCUMENTS.format(array="json_build_array" if self.database else "json_array")
        rows = (json.loads(line) for line in self._ask(statement))
        return {row[0]: Stored(bool(row[1]), row[2], row[3]) for row in rows}

    def compare(self) -> Findings:
        """Compare the store with all acknowledgements; what was lost is no longer expected from now on."""
        stored = self.stored()
        found = judge(self.acknowledged, stored)
        self.acknowledged = {name: one for name, one in self.acknowledged.items() if name in stored}
        return found


def judge(acknowledged: Mapping[str, Acknowledged], stored: Mapping[str, Stored]) -> Findings:
    """Compare what was acknowledged with what is there."""
    found = Findings(unanswered=len(stored.keys() - acknowledged.keys()))
    for name, one in acknowledged.items():
        held = stored.get(name)
        if held is None:
            found.lost.append(one.at)
            continue
        found.kept += 1
        if (held.text or "").split() != one.text.split():
            found.changed.append(name)
    found.not_once = [name for name, held in stored.items() if not held.processed or held.finished != 1]
    return found


def content(run: str, number: int) -> str:
    """Return the text of document *number*, the same in each run but for its first words."""
    words = random.Random(number).choices(VOCABULARY, k=WORDS)  # noqa: S311 - a text, not a secret
    return f"{run} {number} {' '.join(words)}"


def private(number: int) -> dict[str, Any]:
    """Return a sensitive field for every tenth document."""
    return {"sensitive": {"notes": f"note of {number}"}} if number % 10 == 0 else {}
