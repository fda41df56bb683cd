"""The queue over time as the geometry of a chart: lines in a box of WIDTH x HEIGHT, and what stands at its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

WIDTH, HEIGHT = 1000, 200
POINTS = 240
SERIES = ("ready", "running", "dead")
GAP_MS = 300_000


@dataclass(frozen=True)
class Chart:
    """`lines` are SVG paths by series; `counts` and `times` label the axes, from top and left, evenly spaced."""

    lines: Mapping[str, str]
    counts: Sequence[str]
    times: Sequence[str]
    summary: str


def chart(samples: Sequence[Mapping[str, int]], now: int) -> Chart | None:
    """The chart of samples, each with its time `at` (ms) and a count for each of SERIES, oldest first; None of none."""
    if not samples:
        return None
    start = min(samples[0]["at"], now - 3_600_000)
    step = max(1, (now - start) // POINTS)
    buckets: dict[int, dict[str, int]] = {}
    for sample in samples:
        # The highest of its neighbours stands for each, so that no peak is lost.
        bucket = buckets.setdefault((sample["at"] - start) // step, {"at": sample["at"]})
        bucket.update({name: max(bucket.get(name, 0), sample[name]) for name in SERIES})
    points = list(buckets.values())
    top = ceiling(max(point[name] for point in points for name in SERIES))
    # Between samples that are far apart nobody looked: there is no line.
    breaks = {0} | {n for n, (a, b) in enumerate(pairwise(points), 1) if b["at"] - a["at"] > max(GAP_MS, 2 * step)}

    def path(name: str) -> str:
        words = []
        for number, point in enumerate(points):
            x = round(WIDTH * (point["at"] - start) / (now - start), 1)
            y = round(HEIGHT * (1 - point[name] / top), 1)
            # A line of no length has round ends: a point that stands alone shows.
            words.append(f"M{x} {y}h0" if number in breaks else f"L{x} {y}")
        return "".join(words)

    last = samples[-1]
    most = max(samples, key=lambda sample: sample["ready"])
    return Chart(
        {name: path(name) for name in SERIES},
        [f"{count:,}" for count in (top, top // 2, 0)],
        [_clock(start + (now - start) * part // 4) for part in range(5)],
        f"From {_clock(start)} to {_clock(now)} UTC: at most {most['ready']:,} ready at {_clock(most['at'])};"
        f" at the end {', '.join(f'{last[name]:,} {name}' for name in SERIES)}.",
    )


def ceiling(value: int) -> int:
    """The least of 4, 10, 20, 40, 100, 200, … that the value does not exceed."""
    scale = 1
    while True:
        for step in (4, 10, 20):
            if value <= step * scale:
                return step * scale
        scale *= 10


def _clock(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%H:%M")
