"""`python -m bench [PART …] [--size small|full] [--json FILE]`: measure, then print the table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import growth, memory, queues, report, search, service
from bench.stores import Bench, bench, say

PARTS: dict[str, Callable[[Bench], Iterator[report.Row]]] = {
    "service": service.single,
    "batch": service.batch,
    "queues": queues.measure,
    "search": search.measure,
    "memory": memory.measure,
    "growth": growth.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[report.Row] = []
    with bench(options.size) as run:
        where = report.machine(run.directory)
        for part in options.parts or PARTS:
            say(f"{part} …")
            began = time.monotonic()
            rows += PARTS[part](run)
            say(f"  took {time.monotonic() - began:.0f} s")
    print(f"{report.heading(where, options.size)}\n\n{report.table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(where, options.size, rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
