"""A worker process for the crash test: claims, works a little, finishes, and reaps."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cryptography.fernet import Fernet
from sqlalchemy import Connection, update
from sqlalchemy.exc import SQLAlchemyError

from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Extracted
from atlas.queue import Queue, Result
from atlas.schema import jobs
from atlas.settings import Settings

LEASE_SECONDS = 1.0


class Unfenced(Queue):
    """The negative control: whoever finishes is believed, whatever token it holds."""

    def finish(
        self, results: Sequence[Result], store: Callable[[Connection, Sequence[Result]], None] | None = None
    ) -> set[int]:
        ids = [result.job.id for result in results]
        forged = update(jobs).where(jobs.c.id.in_(ids)).values(state="running").returning(jobs.c.id, jobs.c.token)
        with self.database.write() as connection:
            tokens = dict(connection.execute(forged).all())
        believed = [replace(result, job=replace(result.job, token=tokens[result.job.id])) for result in results]
        return super().finish(believed, store)


def work_for_ever(url: str, role: str | None, owner: str, build: str) -> None:
    """Work until killed; `build` is "fenced" or "unfenced"."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    database = Database.from_url(url, role=role)
    settings = Settings(environment="development", database_url=url)
    kind = Queue if build == "fenced" else Unfenced
    queue = kind(database, owner, 1, lease_seconds=LEASE_SECONDS, attempts=1000)
    documents = Documents(database, queue, Keyring([Fernet.generate_key().decode()]), settings)
    while True:
        try:
            queue.reap()
            claimed = queue.claim(4)
            work = documents.work([job.document_id or "" for job in claimed])
            time.sleep(0.04 * len(claimed) or 0.05)
            results = [Result(job, Extracted(work[job.document_id or ""].content or "")) for job in claimed]
            queue.finish(results, documents.store)
        except SQLAlchemyError:
            # The store is away, or full. What was claimed comes back by its lease.
            time.sleep(0.1)
