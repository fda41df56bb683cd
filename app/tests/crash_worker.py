"""A worker process for the crash test: claims, works a little, finishes, and reaps."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Iterable

from cryptography.fernet import Fernet
from sqlalchemy import ColumnElement

from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Extracted
from atlas.queue import Job, Queue, Result
from atlas.schema import jobs
from atlas.settings import Settings

LEASE_SECONDS = 1.0


class Unfenced(Queue):
    """The negative control: whoever finishes is believed."""

    def _held(self, claimed: Iterable[Job]) -> ColumnElement[bool]:
        return jobs.c.id.in_([job.id for job in claimed])


def work_for_ever(url: str, role: str | None, owner: str, build: str) -> None:
    """Work until killed; `build` is "fenced" or "unfenced"."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    database = Database.from_url(url, role=role)
    settings = Settings(environment="development", database_url=url)
    kind = Queue if build == "fenced" else Unfenced
    queue = kind(database, owner, 1, lease_seconds=LEASE_SECONDS, attempts=1000)
    documents = Documents(database, queue, Keyring([Fernet.generate_key().decode()]), settings)
    while True:
        queue.reap()
        claimed = queue.claim(4)
        work = documents.work([job.document_id or "" for job in claimed])
        time.sleep(0.04 * len(claimed) or 0.05)
        results = [Result(job, Extracted(work[job.document_id or ""].content or "")) for job in claimed]
        queue.finish(results, documents.store)
