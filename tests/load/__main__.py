"""Open-loop load on a lab, judged: python -m tests.load --lab NAME --rate 50 --seconds 60 [--json]

Ends with 0 if nothing was lost or doubled, with 1 if something was, with 2 if there could be no load.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import sys
import uuid
from pathlib import Path
from typing import TextIO

from tests.load.client import Client, Edge, Outcome
from tests.load.schedule import Schedule
from tests.load.verdict import Verdict, judge

PROJECT = Path(__file__).resolve().parents[2]
SETTLE_SECONDS = 120.0


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--lab", help="name of a lab: its .lab/NAME/access.json is read")
    where.add_argument("--access", type=Path, help="a file like a lab's access.json")
    parser.add_argument(
        "--edge", action="append", default=[], help="URL of an edge, once for each; default: the lab's url"
    )
    parser.add_argument("--rate", type=float, default=20, help="requests per second (default: 20)")
    parser.add_argument("--seconds", type=float, help="how long; default: until SIGTERM or Ctrl-C")
    parser.add_argument(
        "--slow-seconds",
        type=float,
        default=2,
        help="how long slow bodies and slow readers take; 0: there are none (default: 2)",
    )
    parser.add_argument("--timeout", type=float, default=30, help="seconds that a request may take (default: 30)")
    parser.add_argument("--run", default=f"load-{uuid.uuid4().hex[:12]}", help="title of the documents")
    parser.add_argument("--outcomes", type=Path, help="write each outcome to this file, and judge nothing")
    parser.add_argument("--json", action="store_true", help="print figures and findings as JSON")
    return parser.parse_args()


async def load(options: argparse.Namespace, file: TextIO | None) -> Verdict | None:
    """Send the load; judge it unless the outcomes go to *file*."""
    access = json.loads((options.access or PROJECT / ".lab" / options.lab / "access.json").read_text())
    edges = [Edge.of(url, access.get("ca")) for url in options.edge or [access["url"]]]
    client = Client(edges, access["token"], options.run, options.timeout, options.slow_seconds)
    schedule = Schedule(options.rate, len(edges), options.slow_seconds > 0)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if schedule.slow:
        await client.prepare()
    outcomes: list[Outcome] = []

    def record(outcome: Outcome) -> None:
        if file is None:
            outcomes.append(outcome)
        else:
            file.write(json.dumps(outcome) + "\n")

    # A collection of what grows with every outcome would stop the clock.
    gc.freeze()
    planned = await client.run_schedule(schedule, options.seconds, record, stop)
    if file is not None:
        file.write(json.dumps({"planned": planned}) + "\n")
        return None
    documents = [outcome.identifier for outcome in outcomes if outcome.good and outcome.wrote]
    return judge(planned, outcomes, await client.applied(documents, SETTLE_SECONDS))


def main() -> int:
    """Run the command."""
    options = arguments()
    try:
        if options.outcomes:
            with options.outcomes.open("w", buffering=1) as file:
                asyncio.run(load(options, file))
            return 0
        verdict = asyncio.run(load(options, None))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        print(f"There could be no load: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    assert verdict is not None
    print(json.dumps({"findings": verdict.findings, **verdict.figures}, indent=2) if options.json else verdict)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
