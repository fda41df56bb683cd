"""Whether a new release does as well as the old one: what is counted, and the verdict. Pure, with the standard library alone.

Four things are compared: failed requests and their mean time (HAProxy's counters of each server), the share of slow
requests (the services' own histograms), and failed jobs (the queue's events of each deployment). Shares are compared with
the bounds of Wilson's score interval (E. B. Wilson, 1927), so that few samples convict nobody and acquit nobody by chance.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 1024
"""Over so many requests HAProxy averages its times."""
Z = 1.64
"""Of Wilson's bounds: one in twenty is wrong by chance alone."""
QUIET = ("health.", "metrics.")
"""Endpoints of machines, not of users."""

Counters = dict[str, dict[str, float]]
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
        p, z2 = min(1.0, self.rate), Z * Z
        middle = p + z2 / (2 * n)
        spread = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return (middle + sign * spread) / (1 + z2 / n)


def add(shares: Iterable[Sequence[float]]) -> Share:
    """Return the sum of *shares*."""
    listed = [tuple(share) for share in shares]
    return Share(sum(share[0] for share in listed), sum(share[1] for share in listed))


# HAProxy


def counters(text: str) -> Counters:
    """Return server → its counters in the CSV *text* of ``show stat``: requests, errors, and the average time in ms."""
    found: Counters = {}
    for row in csv.DictReader(io.StringIO(text.removeprefix("# "))):
        if row.get("type") == "2":
            number = {key: float(value) if value else 0.0 for key, value in row.items() if key in _NUMBERS}
            lost = number.get("econ", 0) + number.get("eresp", 0)
            answers = sum(value for key, value in number.items() if key.startswith("hrsp_"))
            found[f"{row['pxname']}/{row['svname']}"] = {
                "requests": answers + lost,
                "errors": number.get("hrsp_5xx", 0) + lost,
                "average": number.get("rtime", 0),
                "averaged": number.get("req_tot", number.get("stot", 0)),
            }
    return found


_NUMBERS = {
    "econ",
    "eresp",
    "rtime",
    "req_tot",
    "stot",
    *(f"hrsp_{name}" for name in ("1xx", "2xx", "3xx", "4xx", "5xx", "other")),
}


def since(before: Mapping[str, Mapping[str, float]], after: Counters, servers: Iterable[str]) -> dict[str, Any]:
    """Return what happened on *servers* from *before* to *after*: requests, errors, and their mean time in ms or None.

    Counters that fell began anew in between (a reload); what they show is all there is.
    """
    requests = errors = milliseconds = timed = 0.0
    for name in servers:
        now = after.get(name)
        if now is None:
            continue
        was = before.get(name) or {}
        if now["requests"] < was.get("requests", 0):
            was = {}
        count = now["requests"] - was.get("requests", 0)
        requests += count
        errors += now["errors"] - was.get("errors", 0)
        mean = _mean(was, now)
        if mean is not None:
            milliseconds += mean * count
            timed += count
    return {"requests": requests, "errors": errors, "milliseconds": milliseconds / timed if timed else None}


def _mean(was: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """Return the least mean time that explains how HAProxy's sliding average moved; None where nothing was averaged.

    The average is over the requests so far, or over the last WINDOW with exponential weights; it comes in whole ms.
    """
    count = now["averaged"] - was.get("averaged", 0)
    if count <= 0:
        return None
    if now["averaged"] <= WINDOW:
        total = (now["average"] - 0.5) * now["averaged"] - (was.get("average", 0) + 0.5) * was.get("averaged", 0)
        return max(0.0, total / count)
    kept = math.pow(1 - 1 / WINDOW, count)
    return max(0.0, ((now["average"] - 0.5) - (was.get("average", 0) + 0.5) * kept) / (1 - kept))


# The services' own metrics


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Return (labels, value) of each sample of the metric *name* in the Prometheus *text*."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)(?: \d+)?", line)
        if match:
            found.append((dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")), float(match[2])))
    return found


def histogram(text: str) -> Histogram:
    """Return upper bound in seconds → users' requests that took no longer, from the *text* of the API's metrics."""
    found: Histogram = {}
    for labels, value in samples(text, "atlas_http_request_duration_seconds_bucket"):
        if not labels.get("endpoint", "").startswith(QUIET):
            found[labels["le"]] = found.get(labels["le"], 0) + value
    return found


def merge(histograms: Iterable[Mapping[str, float]]) -> Histogram:
    """Return the sum of *histograms*."""
    total: Histogram = {}
    for one in histograms:
        for bound, value in one.items():
            total[bound] = total.get(bound, 0) + value
    return total


def jobs(text: str) -> dict[str, list[float]]:
    """Return deployment → [failed, ended] attempts at jobs of the last minutes, from the *text* of monitoring's metrics."""
    found: dict[str, list[float]] = {}
    for labels, value in samples(text, "atlas_queue_deployment_events"):
        counted = found.setdefault(labels.get("deployment", ""), [0.0, 0.0])
        if labels.get("event") in ("finished", "failed", "lost", "died"):
            counted[0] += value * (labels["event"] != "finished")
            counted[1] += value
    return found


def slow_limit(old: Mapping[str, float], slack_ms: float) -> str | None:
    """Return the bound of a bucket beyond which a request counts as slow: twice the old median, at least *slack_ms* more.

    None where the old release has answered too little to tell.
    """
    bounds = sorted(old, key=float)
    if not bounds or old[bounds[-1]] < 10:
        return None
    half = old[bounds[-1]] / 2
    median = next(float(bound) for bound in bounds if old[bound] >= half)
    limit = max(2 * median, median + slack_ms / 1000)
    return next((bound for bound in bounds if float(bound) >= limit and bound != "+Inf"), None)


def slow(hist: Mapping[str, float], limit: str | None) -> Share:
    """Return how many requests of *hist* took longer than the bound *limit*."""
    total = hist.get("+Inf", 0.0)
    return Share(total - hist.get(limit, total), total) if limit else Share(0, 0)


# The verdict


def judge(new: Mapping[str, Any], old: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return verdict (pass, fail or inconclusive), reasons and figures for *new* against *old*.

    Both: requests, errors, milliseconds, histogram, jobs ([failed, ended]). *limits*: samples (fewer requests are
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
    times = new["milliseconds"], old["milliseconds"]
    if None not in times and new["requests"] >= 5 and times[0] > 3 * times[1] + 500:
        failed.append(f"answers took {times[0]:.0f} ms on average at HAProxy, of the old release {times[1]:.0f} ms")
    short = new["requests"] < limits["samples"]
    if short:
        unsure.append(f"{new['requests']:.0f} of {limits['samples']:.0f} requests needed to tell")
    verdict = "fail" if failed else "inconclusive" if unsure else "pass"
    figures = {
        "requests": [new["requests"], old["requests"]],
        "errors": [new["errors"], old["errors"]],
        "slow": [list(pairs["requests were slow"][0]), list(pairs["requests were slow"][1])],
        "slow_limit_ms": float(bound) * 1000 if bound else None,
        "milliseconds": [times[0], times[1]],
        "jobs": [list(new["jobs"]), list(old["jobs"])],
    }
    return {"verdict": verdict, "reasons": failed or unsure, "figures": figures}


def _of(share: Share) -> str:
    return f"{share.bad:.0f} of {share.all:.0f} ({100 * share.rate:.1f} %)"


def combine(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of *counts*, each with requests, errors and their mean milliseconds or None."""
    listed = [each for each in counts if each]
    timed = [each for each in listed if each.get("milliseconds") is not None and each["requests"]]
    total = sum(each["requests"] for each in timed)
    return {
        "requests": sum(each["requests"] for each in listed),
        "errors": sum(each["errors"] for each in listed),
        "milliseconds": sum(each["milliseconds"] * each["requests"] for each in timed) / total if total else None,
    }


def verdict(
    watched: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
    numbers: tuple[int | None, int | None],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """Return the verdict over all hosts.

    *watched*: host → result of deploy_watch. *before*: host → how the old release did before the switch (edge: counts,
    app: histogram), which counts where nothing of it was seen beside the new one. *numbers*: new and old deployment.
    A host that failed has said so itself: then the verdict is fail, without a reason.
    """
    bad = {host: result for host, result in watched.items() if result.get("failed") or result.get("unreachable")}
    silent = [host for host, result in bad.items() if result.get("unreachable")]
    edges = [result["edge"] for result in watched.values() if result.get("edge")]
    apps = [result["app"] for result in watched.values() if result.get("app")]
    counted: dict[str, list[float]] = next((app["jobs"] for app in apps if app["jobs"]), {})
    new: dict[str, Any] = combine(edge["new"] for edge in edges)
    old: dict[str, Any] = combine(edge["old"] for edge in edges)
    if not old["requests"]:
        old = combine(each.get("edge") or {} for each in before.values())
    new["histogram"] = merge(app["new"] for app in apps)
    old["histogram"] = merge(app["old"] for app in apps)
    if not old["histogram"].get("+Inf"):
        old["histogram"] = merge(each.get("app") or {} for each in before.values())
    for side, number in zip((new, old), numbers, strict=True):
        side["jobs"] = counted.get(str(number), [0, 0])
    found = judge(new, old, limits)
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
