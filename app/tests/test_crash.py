"""Crash test: real worker processes are killed in mid-job, and stopped past their lease; nothing is lost or doubled."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

import pytest
from conftest import open_database, wait_for
from crash_worker import LEASE_SECONDS, work_for_ever
from sqlalchemy import func, select

from atlas import admission
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.queue import Queue
from atlas.schema import job_events, jobs
from atlas.settings import Settings

DOCUMENTS = int(os.environ.get("ATLAS_CRASH_DOCUMENTS", "200"))
KILLS = max(6, DOCUMENTS // 60)
STOPS = 2
WORKERS = 4
SECONDS = 25 + DOCUMENTS / 20


@pytest.fixture(scope="module")
def spawner() -> Iterator[Any]:
    """Starts worker processes by forking a server that has imported the code but opened no store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    yield context


class Fleet:
    """Worker processes, by owner; each is replaced when it is killed."""

    def __init__(self, spawner: Any, url: str, build: str) -> None:
        self.spawner, self.url, self.build = spawner, url, build
        self.processes: dict[str, Any] = {}
        self.started = 0

    def start(self) -> None:
        self.started += 1
        owner = f"worker-{self.started}"
        role = "atlas" if self.url.startswith("postgresql") else None
        process = self.spawner.Process(target=work_for_ever, args=(self.url, role, owner, self.build), daemon=True)
        process.start()
        self.processes[owner] = process

    def busy(self, database: Database) -> list[str]:
        """The owners that hold a job now."""
        with database.read() as connection:
            held = connection.scalars(
                select(jobs.c.owner).where(jobs.c.state == "running").distinct().order_by("owner")
            )
            return [owner for owner in held if owner in self.processes]

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


@contextmanager
def fleet(spawner: Any, url: str, build: str) -> Iterator[Fleet]:
    running = Fleet(spawner, url, build)
    try:
        for _ in range(WORKERS):
            running.start()
        yield running
    finally:
        running.end()


def disturb(running: Fleet, entry: Documents, kills: int, stops: int) -> list[str]:
    """Submit documents, and meanwhile kill and stop workers that hold jobs; the ids that were acknowledged.

    The faults come in the same order in each run.
    """
    chance = random.Random(7)
    faults = ["kill"] * kills + ["stop"] * stops
    chance.shuffle(faults)
    acknowledged: list[str] = []
    for position, fault in enumerate(faults, start=1):
        wave = range(len(acknowledged), DOCUMENTS * position // len(faults))
        texts = [Submission(content=f"document {n}", content_type="text/plain") for n in wave]
        acknowledged += [answer.id for answer in entry.submit_many(texts)]
        wait_for(lambda: running.busy(entry.database), 20, "a worker holds a job")
        owner = chance.choice(running.busy(entry.database) or list(running.processes))
        process = running.processes[owner]
        if fault == "kill":
            process.kill()
            process.join()
            del running.processes[owner]
            running.start()
        else:
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(LEASE_SECONDS * 2)
            os.kill(process.pid, signal.SIGCONT)
    return acknowledged


def finishes(database: Database) -> dict[str, int]:
    with database.read() as connection:
        rows = connection.execute(
            select(job_events.c.document_id, func.count())
            .where(job_events.c.event == "finished")
            .group_by(job_events.c.document_id)
        )
        return {row[0]: row[1] for row in rows}


@pytest.fixture
def entry(database_url: str, keyring: Keyring, settings: Settings) -> Iterator[Documents]:
    """Where documents are taken in, by the real clock."""
    database = open_database(database_url)
    admission.admit(database, 1)
    limits = settings.model_copy(update={"queue_limit": DOCUMENTS})
    yield Documents(database, Queue(database, "test"), keyring, limits)
    database.close()


def test_every_document_is_finished_exactly_once(spawner: Any, database_url: str, entry: Documents) -> None:
    database = entry.database
    with fleet(spawner, database_url, "fenced") as running:
        acknowledged = disturb(running, entry, KILLS, STOPS)
        wait_for(lambda: len(finishes(database)) == DOCUMENTS, SECONDS, "every document is finished")
        # Whoever was stopped has time to try its late finish.
        wait_for(lambda: not running.busy(database), 10, "every worker is idle")
    assert finishes(database) == dict.fromkeys(acknowledged, 1)
    with database.read() as connection:
        lost = connection.scalar(select(func.count()).where(job_events.c.event == "lost"))
        if database.dialect == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    assert (lost or 0) >= KILLS, "the workers were killed in mid-job"


def test_control_without_fencing_a_double_finish_shows(spawner: Any, database_url: str, entry: Documents) -> None:
    with fleet(spawner, database_url, "unfenced") as running:
        acknowledged = disturb(running, entry, kills=0, stops=3)
        wait_for(lambda: len(finishes(entry.database)) == DOCUMENTS, SECONDS, "every document is finished")
        wait_for(lambda: not running.busy(entry.database), 10, "every worker is idle")
    with pytest.raises(AssertionError):
        assert finishes(entry.database) == dict.fromkeys(acknowledged, 1)
    assert max(finishes(entry.database).values()) > 1
