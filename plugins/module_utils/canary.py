"""Whether a new release does as well as the old one: what is counted, and the verdict. Pure, with the standard library alone.

Three things are compared: failed requests and slow requests (HAProxy's counts of each server), and failed jobs (the queue's
events of each deployment). Shares are compared with the bounds of Wilson's score interval (E. B. Wilson, 1927), so that few
samples convict nobody and acquit nobody by chance.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

BOUNDS = ("10", "25", "50", "100", "250", "500", "1000", "2500", "5000")
"""Milliseconds within which HAProxy counts answers, as the role haproxy configures it."""
Z = 3.0
"""Of Wilson's bounds. A canary is looked at every second, and each look is a chance to be wrong: over a whole one, equal
releases are told apart in less than one of a hundred cases, and 10 % of failures are found after some 30 requests."""

Counters = dict[str, dict[str, Any]]
Histogram = dict[str, float]


class Share(NamedTuple):
    """*bad* of *all*."""

    bad: float
    all: float

    @property
    def rate(self) -> float:
        """The share itself, 0 of nothing."""
        return self.bad / self.all if self.all else 0.0

    def bound(self, sign: int) -> float:
        """Return the upper (*sign* 1) or lower (-1) bound of Wilson's interval; 1 or 0 where nothing was counted."""
        n = self.all
        if not n:
            return 1.0 if sign > 0 else 0.0
        # Counters that are read while they move may be off by one.
        p, z2 = min(1.0, max(0.0, self.rate)), Z * Z
        middle = p + z2 / (2 * n)
        spread = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return (middle + sign * spread) / (1 + z2 / n)


def add(shares: Iterable[Sequence[float]]) -> Share:
    """Return the sum of *shares*."""
    listed = [tuple(share) for share in shares]
    return Share(sum(share[0] for share in listed), sum(share[1] for share in listed))


# HAProxy


def counters(stat: str, times: str) -> Counters:
    """Return server → requests, errors and histogram.

    From the CSV *stat* of ``show stat``, and the table *times* in which HAProxy counts answers by how long they took.
    """
    histograms = _histograms(times)
    found: Counters = {}
    for row in csv.DictReader(io.StringIO(stat.removeprefix("# "))):
        if row.get("type") == "2":
            name = f"{row['pxname']}/{row['svname']}"
            number = {key: int(value) if value else 0 for key, value in row.items() if key in _NUMBERS}
            lost = number.get("econ", 0) + number.get("eresp", 0)
            answers = sum(value for key, value in number.items() if key.startswith("hrsp_"))
            found[name] = {
                "requests": answers + lost,
                "errors": number.get("hrsp_5xx", 0) + lost,
                "histogram": histograms.get(name, {}),
            }
    return found


_NUMBERS = {"econ", "eresp", *(f"hrsp_{name}" for name in ("1xx", "2xx", "3xx", "4xx", "5xx", "other"))}


def _histograms(times: str) -> dict[str, Histogram]:
    found: dict[str, Histogram] = {}
    for line in times.splitlines():
        key = re.search(r" key=(\S+) ", line)
        if key:
            gpc = {int(index): int(value) for index, value in re.findall(r"\bgpc(\d+)=(\d+)", line)}
            found[key[1]] = {bound: gpc.get(index, 0) for index, bound in enumerate(("+Inf", *BOUNDS))}
    return found


def since(before: Mapping[str, Mapping[str, Any]], after: Counters, servers: Iterable[str]) -> dict[str, Any]:
    """Return what happened on *servers* from *before* to *after*: requests, errors, histogram.

    Counters of a server began anew in between (a reload) if any of them fell; what they show then is all there is.
    """
    parts = []
    for name in servers:
        now, was = after.get(name), before.get(name) or {}
        if now is None:
            continue
        old = was.get("histogram") or {}
        fell = [now[key] < was.get(key, 0) for key in ("requests", "errors")]
        if any(fell) or any(value < old.get(bound, 0) for bound, value in now["histogram"].items()):
            was, old = {}, {}
        counted = {key: now[key] - was.get(key, 0) for key in ("requests", "errors")}
        parts.append({**counted, "histogram": {bound: n - old.get(bound, 0) for bound, n in now["histogram"].items()}})
    return combine(parts)


def merge(histograms: Iterable[Mapping[str, float]]) -> Histogram:
    """Return the sum of *histograms*."""
    total: Histogram = {}
    for one in histograms:
        for bound, value in one.items():
            total[bound] = total.get(bound, 0) + value
    return total


# The services' own metrics


def jobs(text: str) -> dict[str, list[float]]:
    """Return deployment → [failed, ended] attempts at jobs of the last minutes, from the *text* of monitoring's metrics."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"atlas_queue_deployment_events\{(.*)\} (\S+)", line)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if match else {}
        if match and labels.get("event") in ("finished", "failed", "lost", "died"):
            counted = found.setdefault(labels.get("deployment", ""), [0.0, 0.0])
            counted[0] += float(match[2]) * (labels["event"] != "finished")
            counted[1] += float(match[2])
    return found


def slow_limit(old: Mapping[str, float], slack_ms: float) -> str | None:
    """Return the bound in ms beyond which a request counts as slow: twice the old median, at least *slack_ms* more.

    None where the old release has answered too little to tell.
    """
    bounds = sorted(old, key=float)
    if not bounds or old[bounds[-1]] < 10:
        return None
    half = old[bounds[-1]] / 2
    median = next(float(bound) for bound in bounds if old[bound] >= half)
    limit = max(2 * median, median + slack_ms)
    return next((bound for bound in bounds if float(bound) >= limit and bound != "+Inf"), None)


def slow(hist: Mapping[str, float], limit: str | None) -> Share:
    """Return how many requests of *hist* took longer than the bound *limit*."""
    total = hist.get("+Inf", 0.0)
    return Share(total - hist.get(limit, total), total) if limit else Share(0, 0)


# The verdict


def judge(new: Mapping[str, Any], old: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return verdict (pass, fail or inconclusive), reasons and figures for *new* against *old*.

    Both: requests, errors, histogram, jobs ([failed, ended]). *limits*: samples (fewer requests are
    inconclusive), error_percent, slow_percent and job_percent (how much more of them is allowed), slow_ms.
    """
    bound = slow_limit(old["histogram"], limits["slow_ms"])
    pairs = {
        "requests failed": (
            Share(new["errors"], new["requests"]),
            Share(old["errors"], old["requests"]),
            "error_percent",
        ),
        "requests were slow": (slow(new["histogram"], bound), slow(old["histogram"], bound), "slow_percent"),
        "jobs failed": (Share(*new["jobs"]), Share(*old["jobs"]), "job_percent"),
    }
    failed, unsure = [], []
    for what, (mine, theirs, limit) in pairs.items():
        allowed = limits[limit] / 100
        if mine.rate <= theirs.rate + allowed:
            continue
        is_jobs = limit == "job_percent"
        # Without an old release to compare with, most jobs have to fail: pages that cannot be fetched are nobody's fault.
        known = theirs.bound(1) if theirs.all else 0.5 if is_jobs else allowed
        enough = mine.bad >= 2 or mine.all >= max(1, limits["samples"])
        said = f"{_of(mine)} {what}, of the old release {_of(theirs)}"
        if enough and mine.bound(-1) > known:
            failed.append(said)
        elif not is_jobs:
            unsure.append(said)
    short = new["requests"] < limits["samples"]
    if short:
        unsure.append(f"{new['requests']:.0f} of {limits['samples']:.0f} requests needed to tell")
    verdict = "fail" if failed else "inconclusive" if unsure else "pass"
    figures = {
        "requests": [new["requests"], old["requests"]],
        "errors": [new["errors"], old["errors"]],
        "slow": [list(pairs["requests were slow"][0]), list(pairs["requests were slow"][1])],
        "slow_limit_ms": int(bound) if bound else None,
        "jobs": [list(new["jobs"]), list(old["jobs"])],
    }
    return {"verdict": verdict, "reasons": failed or unsure, "figures": figures}


def _of(share: Share) -> str:
    return f"{share.bad:.0f} of {share.all:.0f} ({100 * share.rate:.1f} %)"


def combine(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of *counts*, each with requests, errors and a histogram."""
    listed = [each for each in counts if each]
    total: dict[str, Any] = {key: sum(each[key] for each in listed) for key in ("requests", "errors")}
    return {**total, "histogram": merge(each["histogram"] for each in listed)}


def verdict(
    watched: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
    numbers: tuple[int | None, int | None],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """Return the verdict over all hosts.

    *watched*: host → result of deploy_watch. *before*: edge → how the old release did there before the switch, which counts
    where nothing of it was seen beside the new one. *numbers*: new and old deployment. A host that failed has said so
    itself: then the verdict is fail, without a reason. It is fail as well where one edge has taken its traffic back, whatever
    the others saw: it sends users to the old deployment by now.
    """
    bad = {host: result for host, result in watched.items() if result.get("failed") or result.get("unreachable")}
    silent = [host for host, result in bad.items() if result.get("unreachable")]
    edges = [result["edge"] for result in watched.values() if result.get("edge")]
    new, old = (combine(edge[side] for edge in edges) for side in ("new", "old"))
    if not old["requests"]:
        old = combine(before.values())
    counted: dict[str, list[float]] = next((each["jobs"] for each in watched.values() if each.get("jobs")), {})
    for side, number in zip((new, old), numbers, strict=True):
        side["jobs"] = counted.get(str(number), [0, 0])
    found = judge(new, old, limits)
    back = [host for host, result in watched.items() if (result.get("edge") or {}).get("withdrawn")]
    if back and found["verdict"] != "fail":
        said = [f"{host} took its traffic back, because there it certainly did worse" for host in back]
        found |= {"verdict": "fail", "reasons": said}
    if bad:
        return {**found, "verdict": "fail", "reasons": [f"{host} cannot be reached any more" for host in silent]}
    return found


def told(found: Mapping[str, Any]) -> str:
    """Return the figures of a verdict in one line for people."""
    figures = found["figures"]
    parts = []
    for title, key in (("requests", "requests"), ("failed", "errors")):
        parts.append(f"{title} {figures[key][0]:.0f} (old {figures[key][1]:.0f})")
    if figures["slow_limit_ms"]:
        shares = [Share(*share) for share in figures["slow"]]
        parts.append(
            f"over {figures['slow_limit_ms']:.0f} ms {100 * shares[0].rate:.0f} % (old {100 * shares[1].rate:.0f} %)"
        )
    jobs_ = [Share(*share) for share in figures["jobs"]]
    parts.append(f"jobs failed {jobs_[0].bad:.0f} of {jobs_[0].all:.0f} (old {jobs_[1].bad:.0f} of {jobs_[1].all:.0f})")
    return ", ".join(parts)
