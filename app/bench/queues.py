"""Jobs per second of our queue and of others on the same store."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench.report import Row
from bench.stores import NAMES, Bench, say

PEERS = {"sqlite": ["huey"], "postgresql": ["procrastinate", "pgqueuer"]}
ROUNDS = 3
# So many that each takes some seconds: (full, small).
JOBS = {
    "atlas_batch": (50_000, 10_000),
    "atlas_single": (3_000, 1_000),
    "huey": (20_000, 5_000),
    "procrastinate": (3_000, 1_000),
    "pgqueuer": (50_000, 10_000),
}


def measure(bench: Bench) -> Iterator[Row]:
    for store, peers in PEERS.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("atlas_batch", "atlas_single", *peers)}
        for _ in range(ROUNDS):
            for name, runs in found.items():
                with bench.url(store, "template_atlas" if name.startswith("atlas") else "template0") as url:
                    runs.append(_run(name, url, bench.sized(*JOBS[name])))
        rates = {name: statistics.median(run["rate"] for run in runs) for name, runs in found.items()}
        say("  " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates.items()))
        for name, what in (("atlas_batch", "batches of 100"), ("atlas_single", "one by one")):
            for peer in peers:
                ratio = rates[name] / rates[peer]
                is_target = name == "atlas_batch"
                yield Row(
                    f"no-op jobs on {NAMES[store]}, one worker process, durable commits",
                    what,
                    rates[name],
                    "jobs/s",
                    f"{peer} {found[peer][0]['version']}",
                    rates[peer],
                    ratio,
                    "> 1" if is_target else "report",
                    ratio > 1 if is_target else None,
                )


def _run(name: str, url: str, jobs: int) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "bench.contestants", name, url, str(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise AssertionError(f"{name} failed: {done.stderr[-2000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome | {"rate": jobs / outcome["seconds"]}
