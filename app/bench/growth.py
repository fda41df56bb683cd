"""What a longer queue costs: the same steps with 10³ to 10⁶ jobs waiting."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

from running import TOKEN

from atlas.documents import Submission
from atlas.queue import Result
from bench import load
from bench.load import Plan
from bench.report import Row, number
from bench.stores import NAMES, STORES, Bench, intake, say

FLAT = 1.5  # the factor that counts as flat
STEPS: dict[str, tuple[str, str]] = {
    "claim": ("claim and finish, batches of 100", "jobs/s"),
    "submit": ("submit one over HTTP, median", "ms"),
    "submit_p99": ("submit one over HTTP, p99", "ms"),
    "health": ("GET /health, p95", "ms"),
    "stats": ("queue statistics, median", "ms"),
}


def measure(bench: Bench) -> Iterator[Row]:
    sizes = [1000, 10_000, 100_000, 1_000_000][: bench.sized(4, 3)]
    for store in STORES:
        found = dict(_measured(bench, store, sizes))
        for name, (what, unit) in STEPS.items():
            first, last = found[sizes[0]][name], found[sizes[-1]][name]
            worse = first / last if unit == "jobs/s" else last / first
            yield Row(
                f"growth on {NAMES[store]}: with {sizes[-1]:,} jobs queued, beside {sizes[0]:,}",
                what,
                last,
                unit,
                f"with {sizes[0]:,}",
                first,
                last / first,
                f"flat (within {FLAT}×)",
                worse <= FLAT,
                ", ".join(f"{size:,}: {number(found[size][name])}" for size in sizes),
            )


def _measured(bench: Bench, store: str, sizes: list[int]) -> Iterator[tuple[int, dict[str, float]]]:
    with bench.deployment(store) as deployment, intake(deployment) as documents:
        port = deployment.start_ready("api")[2]
        queue = documents.queue
        texts = (Submission(content=f"Filling {n}", content_type="text/plain") for n in itertools.count())

        def fill(amount: int) -> None:
            for start in range(0, amount, 1000):
                documents.submit_many(list(itertools.islice(texts, min(1000, amount - start))))

        def work(batches: int) -> None:
            for _ in range(batches):
                queue.finish([Result(job) for job in queue.claim(100)])

        held, sent = 0, 0
        for size in sizes:
            fill(size - held)
            held = size
            bench.settle(deployment.settings["database_url"])
            work(1)
            fill(100)
            turns = []
            for _ in range(3):
                turns.append(500 / _seconds(lambda: work(5)))
                fill(500)
            plan = Plan(port, 1, 60, first=10**9 + sent, token=TOKEN, limit=bench.sized(500, 200))
            posted = load.run(plan)
            posted.expect(202)
            sent += posted.numbers
            work(-(-posted.numbers // 100))
            asked = load.run(Plan(port, 1, 60, "get", queries=("/health",), limit=bench.sized(50, 20)))
            asked.expect(200)
            yield (
                size,
                {
                    "claim": statistics.median(turns),
                    "submit": posted.p50,
                    "submit_p99": posted.p99,
                    "health": asked.p95,
                    "stats": 1000 * statistics.median(_seconds(queue.stats) for _ in range(9)),
                },
            )
            say(f"  {store} with {size:,} jobs: measured")


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
