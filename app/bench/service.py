"""Durable POSTs: one by one against an empty view of the same server, and in batches."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path

from running import TOKEN, Deployment, children
from sqlalchemy import func, select

from atlas.schema import documents
from bench import load
from bench.load import Outcome, Plan
from bench.report import Row
from bench.stores import NAMES, Bench, opened, say

CONNECTIONS = 32
RATIO_TARGET, P99_TARGET, BATCH_TARGET = 0.7, 2.0, 20_000
SETTINGS = {"sqlite": {"api_workers": 1}, "postgresql": {"api_workers": 2}}


def count(deployment: Deployment) -> int:
    """How many documents the store holds."""
    database = opened(deployment.settings["database_url"])
    with database.read() as connection:
        found = connection.scalar(select(func.count()).select_from(documents))
    database.close()
    return found or 0


def processor_seconds(pid: int) -> float:
    """What a process and its children have used."""
    ticks = 0
    for member in (pid, *children(pid)):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def single(bench: Bench) -> Iterator[Row]:
    for store in ("sqlite", "postgresql"):
        with bench.deployment(store, **SETTINGS[store]) as deployment:
            yield from _single(bench, store, deployment)


def _single(bench: Bench, store: str, deployment: Deployment) -> Iterator[Row]:
    commands: dict[str, list[str]] = {"atlas": ["-m", "atlas", "serve", "api"], "empty": ["-m", "bench.empty"]}
    started = {name: deployment.start_ready(name, command=command) for name, command in commands.items()}
    seconds, rounds = bench.sized(8, 3), bench.sized(5, 3)
    first = 0
    acknowledged = 0

    def measure(name: str, seconds: float, rate: float | None = None) -> Outcome:
        nonlocal first, acknowledged
        # An open loop needs as many connections as may ever be waiting.
        plan = Plan(started[name][2], 256 if rate else CONNECTIONS, seconds, first=first, rate=rate, token=TOKEN)
        outcome = load.run(plan)
        first += outcome.numbers
        acknowledged += outcome.requests if name == "atlas" else 0
        outcome.expect(202)
        return outcome

    for name in commands:
        measure(name, 1)
    capacity: dict[str, list[Outcome]] = {name: [] for name in commands}
    busy = {name: -processor_seconds(process.pid) for name, (process, _, _) in started.items()}
    for turn in range(rounds):
        for name in commands:
            capacity[name].append(measure(name, seconds))
        say(f"  {store} capacity {turn + 1}/{rounds}: " + _rates({name: runs[-1:] for name, runs in capacity.items()}))
    rates = {name: statistics.median(run.rate for run in runs) for name, runs in capacity.items()}
    each = {
        name: 1e6 * (busy[name] + processor_seconds(started[name][0].pid)) / sum(run.requests for run in runs)
        for name, runs in capacity.items()
    }
    half: dict[str, list[Outcome]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in commands:
            half[name].append(measure(name, seconds, rates[name] / 2))
        say(f"  {store} p99 at half {turn + 1}/{rounds}: " + _p99s({name: runs[-1:] for name, runs in half.items()}))
    assert count(deployment) == acknowledged, "a document was acknowledged and not stored"
    p99 = {name: statistics.median(run.p99 for run in runs) for name, runs in half.items()}
    part = _title(store, deployment)
    is_target = store == "sqlite"
    cpu = max(run.cpu for runs in capacity.values() for run in runs)
    ratio = rates["atlas"] / rates["empty"]
    yield Row(
        part,
        "single-document POSTs",
        rates["atlas"],
        "/s",
        "empty Flask view",
        rates["empty"],
        ratio,
        f"≥ {RATIO_TARGET}" if is_target else "report",
        ratio >= RATIO_TARGET if is_target else None,
        f"{CONNECTIONS} connections, {rounds} × {seconds} s each in turn; the generator used {cpu:.0%} of a processor",
    )
    yield Row(
        part,
        "processor time for a POST",
        each["atlas"],
        "µs",
        "empty Flask view",
        each["empty"],
        each["atlas"] / each["empty"],
        "report",
        note="of the server's processes, which other load on the machine changes less than the rate",
    )
    ratio = p99["atlas"] / p99["empty"]
    yield Row(
        part,
        "p99 at half of capacity",
        p99["atlas"],
        "ms",
        "empty Flask view",
        p99["empty"],
        ratio,
        f"≤ {P99_TARGET:.0f}" if is_target else "report",
        ratio <= P99_TARGET if is_target else None,
        f"open loop, {rates['atlas'] / 2:,.0f}/s and {rates['empty'] / 2:,.0f}/s, from the intended start",
    )


def _rates(runs: dict[str, list[Outcome]]) -> str:
    return ", ".join(f"{name} {run.rate:,.0f}/s" for name, found in runs.items() for run in found)


def _p99s(runs: dict[str, list[Outcome]]) -> str:
    return ", ".join(f"{name} {run.p99:.1f} ms" for name, found in runs.items() for run in found)


def _title(store: str, deployment: Deployment) -> str:
    workers = deployment.settings["api_workers"]
    durable = "synchronous=FULL" if store == "sqlite" else "fsync and synchronous_commit on"
    return f"atlas serve api on {NAMES[store]}, {workers} worker process{'es'[: 2 * (workers > 1)]}, {durable}"


def batch(bench: Bench) -> Iterator[Row]:
    batches, rounds = bench.sized(60, 20), bench.sized(5, 3)
    for store in ("sqlite", "postgresql"):
        with bench.deployment(store, **SETTINGS[store]) as deployment:
            port = deployment.start_ready("api")[2]
            outcomes: list[Outcome] = []
            first = 0
            for _ in range(rounds):
                plan = Plan(port, 2, 60, "batch", first, token=TOKEN, path="/v1/documents:batch", limit=batches)
                outcomes.append(load.run(plan))
                first += outcomes[-1].numbers
            stored = count(deployment)
            statuses = sorted({status for outcome in outcomes for status in outcome.statuses})
            rate = statistics.median(outcome.rate for outcome in outcomes) * stored / (rounds * batches)
            yield Row(
                _title(store, deployment),
                "documents in batches of 1,000",
                rate,
                "/s",
                target=f"≥ {BATCH_TARGET:,}",
                met=rate >= BATCH_TARGET,
                note=f"{stored:,} of {first:,} sent are stored; {rounds} × {batches} batches over 2 connections, each"
                f" answered {', '.join(statuses)}",
            )
