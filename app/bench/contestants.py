"""The queues, each working off jobs that do nothing: `python -m bench.contestants NAME URL JOBS`.

Every one is a single process in the fastest configuration that its documentation would call sane, with commits as
durable as those of Atlas. The clock runs from the start of its worker to the end of the last job; the jobs are in the
queue by then. Writes {"seconds": …, "version": …} as JSON.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BATCH = 100


def atlas_batch(url: str, jobs: int) -> float:
    return _atlas(url, jobs, BATCH)


def atlas_single(url: str, jobs: int) -> float:
    return _atlas(url, jobs, 1)


def _atlas(url: str, jobs: int, batch: int) -> float:
    from atlas import admission
    from atlas.queue import NewJob, Queue, Result
    from bench.stores import opened

    database = opened(url)
    admission.admit(database, 1)
    queue = Queue(database, "bench", 1)
    with database.write() as connection:
        queue.enqueue_many(connection, [NewJob("noop")] * jobs)
    began = time.perf_counter()
    done = 0
    while claimed := queue.claim(batch):
        refused = queue.finish([Result(job) for job in claimed])
        done += len(claimed) - len(refused)
    seconds = time.perf_counter() - began
    assert done == jobs
    database.close()
    return seconds


def huey(url: str, jobs: int) -> float:
    """WAL, synchronous=FULL, no results, one worker thread (more of them wait for each other's lock)."""
    import huey as package

    queue = package.SqliteHuey("bench", filename=url.removeprefix("sqlite:///") + "-huey", fsync=True, results=False)
    done = threading.Event()
    count = 0

    @queue.task()
    def noop() -> None:
        nonlocal count
        count += 1
        if count == jobs:
            done.set()

    messages = [(queue.name, memoryview(queue.serialize_task(noop.s()))) for _ in range(jobs)]
    connection = queue.storage._create_connection()
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO task (queue, data) VALUES (?, ?)", messages)
    connection.execute("COMMIT")
    connection.close()
    consumer = package.consumer.Consumer(queue, workers=1, periodic=False, check_worker_health=False)
    began = time.perf_counter()
    consumer.start()
    assert done.wait(600)
    seconds = time.perf_counter() - began
    assert queue.storage.queue_size() == 0
    consumer.stop(graceful=True)
    return seconds


def procrastinate(url: str, jobs: int) -> float:
    """Jobs deleted once done, concurrency 20 on a pool of 20."""
    import procrastinate as package

    async def run() -> float:
        connector = package.PsycopgConnector(conninfo=_dsn(url), min_size=20, max_size=20)
        app = package.App(connector=connector)
        count = 0

        @app.task(name="noop")
        async def noop() -> None:
            nonlocal count
            count += 1

        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            for start in range(0, jobs, 1000):
                await noop.batch_defer_async(*[{}] * min(1000, jobs - start))
            began = time.perf_counter()
            await app.run_worker_async(wait=False, concurrency=20, delete_jobs="always", install_signal_handlers=False)
            seconds = time.perf_counter() - began
        assert count == jobs
        return seconds

    return asyncio.run(run())


def pgqueuer(url: str, jobs: int) -> float:
    """asyncpg under uvloop, batches of 100, durable tables (its default)."""
    import asyncpg
    import uvloop
    from pgqueuer import AsyncpgDriver, PgQueuer
    from pgqueuer.types import QueueExecutionMode

    async def run() -> float:
        connection = await asyncpg.connect(**_parts(url))
        queue = PgQueuer(AsyncpgDriver(connection))
        await queue.qm.queries.install()
        count = 0

        @queue.entrypoint("noop")
        async def noop(_job: Any) -> None:
            nonlocal count
            count += 1

        for start in range(0, jobs, 10_000):
            amount = min(10_000, jobs - start)
            await queue.qm.queries.enqueue(["noop"] * amount, [None] * amount, [0] * amount)
        await connection.execute("ANALYZE")
        began = time.perf_counter()
        await queue.qm.run(batch_size=BATCH, mode=QueueExecutionMode.drain)
        seconds = time.perf_counter() - began
        assert count == jobs
        return seconds

    return uvloop.run(run())


def _parts(url: str) -> dict[str, Any]:
    from sqlalchemy import make_url

    parsed = make_url(url)
    return {"host": parsed.query["host"], "user": parsed.username, "database": parsed.database}


def _dsn(url: str) -> str:
    parts = _parts(url)
    return f"host={parts['host']} user={parts['user']} dbname={parts['database']}"


CONTESTANTS: dict[str, Callable[[str, int], float]] = {
    "atlas_batch": atlas_batch,
    "atlas_single": atlas_single,
    "huey": huey,
    "procrastinate": procrastinate,
    "pgqueuer": pgqueuer,
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    name, url, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    version = None if name.startswith("atlas") else importlib.metadata.version(name)
    json.dump({"seconds": CONTESTANTS[name](url, jobs), "version": version}, sys.stdout)
