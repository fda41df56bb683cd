"""Memory of the four services of a host: idle, and while many documents go through."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from running import children, proportional_memory
from scratch import wait_for
from sqlalchemy import func, select

from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.schema import job_events
from bench.load import WORDS
from bench.report import Row
from bench.stores import Bench, intake, say

SERVICES = ("api", "core", "services", "monitoring")
TARGET_MB = 350.0
FLAT = 1.1
WAVE = 2000
PART = "memory of the four services of a host on SQLite, shared pages counted by their share"


def measure(bench: Bench) -> Iterator[Row]:
    amount = bench.sized(100_000, 5_000)
    with bench.deployment("sqlite") as deployment, intake(deployment) as documents:
        pids = {service: deployment.start_ready(service)[0].pid for service in SERVICES}
        wait_for(lambda: _finished(documents.database), 60, "the first probe has come through")
        time.sleep(3)
        idle = _used(pids)
        yield Row(
            PART,
            "idle, after a probe",
            sum(idle.values()),
            "MB",
            target=f"≤ {TARGET_MB:.0f} MB",
            met=sum(idle.values()) <= TARGET_MB,
            note=_by_service(idle),
        )
        samples = [(0, idle)]
        for done in _process(documents, amount):
            samples.append((done, _used(pids)))
        say(f"  {amount:,} documents processed")
        totals = [(done, sum(used.values())) for done, used in samples if done]
        early = max(total for done, total in totals if done <= max(amount // 5, WAVE))
        late = max(total for done, total in totals if done > amount - amount // 5)
        yield Row(
            PART,
            f"while the last fifth of {amount:,} documents is processed",
            late,
            "MB",
            "the first fifth",
            early,
            late / early,
            f"flat (within {FLAT}×)",
            late / early <= FLAT,
            _by_service(samples[-1][1])
            + f"; peak {max(total for _, total in totals):.0f} MB; one in a hundred is HTML",
        )


def _process(documents: Documents, amount: int) -> Iterator[int]:
    """Hand documents in as fast as they are worked off; how many are done, each second."""
    submissions = (_submission(number) for number in range(amount))
    handed = 0
    began = _finished(documents.database)
    deadline = time.monotonic() + 1800
    while (done := _finished(documents.database) - began) < amount:
        assert time.monotonic() < deadline, f"{done} of {amount} documents were processed in half an hour"
        if handed - done < WAVE // 2:
            wave = list(itertools.islice(submissions, WAVE))
            handed += len(documents.submit_many(wave)) if wave else 0
        yield done
        time.sleep(0.5)
    yield amount


def _submission(number: int) -> Submission:
    text = f"Document {number}. " + (WORDS + ". ") * 9
    if number % 100:
        return Submission(content=text, content_type="text/plain")
    page = f"<html><head><title>Page {number}</title></head><body><article><p>{text}</p></article></body></html>"
    return Submission(content=page, content_type="text/html")


def _finished(database: Database) -> int:
    with database.read() as connection:
        query = select(func.count()).where(job_events.c.event == "finished")
        return connection.scalar(query) or 0


def _used(pids: dict[str, int]) -> dict[str, float]:
    """Megabytes of each service with its children."""
    return {
        service: sum(proportional_memory(member) for member in [pid, *children(pid)]) / 1024
        for service, pid in pids.items()
    }


def _by_service(used: dict[str, float]) -> str:
    return ", ".join(f"{service} {megabytes:.0f}" for service, megabytes in used.items())
