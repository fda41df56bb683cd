"""What was measured: rows with what they are compared with, as a table and as JSON."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pysqlite3 import dbapi2 as sqlite


@dataclass(frozen=True)
class Row:
    """One figure. `ratio` is Atlas over the other; `target` in words, and whether it was met (None: only a report)."""

    part: str
    what: str
    value: float
    unit: str
    against: str = ""
    other: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


BUSY = 0.25  # the load for each processor from which on others disturb the figures
HEADER = ("measured", "Atlas", "", "beside", "", "ratio", "target", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one part below the other."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        other = "" if row.other is None else number(row.other)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.what, number(row.value), row.unit, row.against, other, ratio, row.target, verdict))
    widths = [max(len(line[column]) for line in [HEADER, *lines]) for column in range(len(HEADER))]
    right = (1, 4, 5)

    def laid_out(line: tuple[str, ...]) -> str:
        cells = [
            text.rjust(width) if n in right else text.ljust(width)
            for n, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    shown = [laid_out(HEADER)]
    part = ""
    for row, line in zip(rows, lines, strict=True):
        if row.part != part:
            part = row.part
            shown += ["", part]
        shown.append(laid_out(line))
        if row.note:
            shown.append(f"      {row.note}")
    return "\n".join(shown)


def number(value: float) -> str:
    """Three figures that matter, with thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def machine(directory: Path) -> dict[str, Any]:
    """Where this was measured, with what a durable write costs there (milliseconds, median)."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    release = platform.freedesktop_os_release()["PRETTY_NAME"]
    return {
        "processors": os.cpu_count(),
        "processor": model,
        "system": release,
        "python": platform.python_version(),
        "sqlite": sqlite.sqlite_version,
        "fdatasync_ms": round(fdatasync_ms(directory), 3),
        "load_before": round(os.getloadavg()[0], 2),
    }


def fdatasync_ms(directory: Path) -> float:
    taken = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return 1000 * sorted(taken)[50]


def heading(where: dict[str, Any], size: str) -> str:
    """What stands above the table."""
    lines = [
        f"Atlas bench, size {size}: {where['processors']} × {where['processor']}, {where['system']}, Python"
        f" {where['python']}, SQLite {where['sqlite']}, a durable write takes {where['fdatasync_ms']} ms"
    ]
    if where["load_before"] > BUSY * where["processors"]:
        lines.append(
            f"The machine was busy (load {where['load_before']} before the start): take the figures with care."
        )
    return "\n".join(lines)


def as_dict(where: dict[str, Any], size: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {"size": size, "machine": where, "rows": [asdict(row) for row in rows]}
