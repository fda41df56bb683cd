"""What backups decide: labels, which point to restore, what may go, what a failure means, what the report says.

Pure: no host, no clock of its own. Times are seconds since the Unix epoch.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

DAY = 86_400.0
FUTURE_SECONDS = 300.0
"""A snapshot dated further ahead than this was not made by a clock that can be trusted."""
_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")
_CAUSES = (
    ("wrong password", r"wrong password|no key found"),
    (
        "damaged repository",
        r"ciphertext verification failed|hash(?:es)? (?:does not|do not|is invalid)|does not match id|checksum mismatch|invalid data returned|"
        r"unexpected EOF|not referenced in any index|pack .* (?:does not exist|not found)|blob .* not found|truncated|"
        r"unable to load (?:tree|blob|index)|Pack ID does not match|repository contains errors|Load\(<|unexpected pack size|contains \d+ errors|wrong data|"
        r"present in the manifest but not on disk|has size \d+ on disk but size \d+ in the manifest|no such file or directory: .*/wals/|"
        r"end-of-stream marker|while decompressing|CRC check failed|not a gzipped file|"
        r"invalid page in block|page verification failed|recovery ended before configured recovery target|could not locate a valid checkpoint",
    ),
    ("full disk", r"no space left on device|disk quota exceeded"),
    ("missing repository", r"is there a repository at|repository does not exist|unable to open config file"),
    (
        "source cannot be reached",
        r"connection (?:refused|timed out|reset)|timeout expired|no route to host|host key verification|could not resolve",
    ),
    ("credentials of the source", r"permission denied \(publickey|password authentication failed|no password supplied"),
)


class BackupError(Exception):
    """A backup, a check or a restore cannot go on; the message names the cause. Nothing good was removed."""


class RowsDiffer(BackupError):
    """A restored store is well, but does not have the rows that its manifest says."""


class EndsBefore(BackupError):
    """A database was recovered with all of the log that is there, and its target is not in it."""


class Point(NamedTuple):
    """A moment that can be restored: the snapshot that describes it, and when it was."""

    snapshot: str
    at: float
    source: str
    label: str | None
    kind: str


def check_label(label: str) -> str:
    """Return *label* if it can be one."""
    if not _LABEL.fullmatch(label):
        raise BackupError(
            f"{label!r} cannot be a label: small letters, digits, dot, dash and underscore, at most 48, e.g. before-import"
        )
    return label


def parse_time(text: str) -> float:
    """Return RFC 3339 *text* as seconds; without an offset it is UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace("z", "+00:00"))
    except ValueError:
        raise BackupError(f"{text!r} is not a time: write it as 2030-01-31T02:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def check_past(at: float, now: float) -> float:
    """Return the time *at* if it can be restored: nobody knows yet what is written until a time that lies ahead."""
    if at > now:
        raise BackupError(
            f"{rfc3339(at)} lies ahead: it is {rfc3339(now)} now. Times are in UTC unless they have an offset (+02:00). "
            "For the newest state leave the time out."
        )
    return at


def rfc3339(at: float) -> str:
    """Return *at* as RFC 3339 in UTC, to the second below."""
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC).isoformat().replace("+00:00", "Z")


def points(snapshots: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the points in ``restic snapshots --json``, oldest first."""
    found = []
    for item in snapshots:
        tags = dict(tag.split("=", 1) for tag in item.get("tags") or [] if "=" in tag)
        at = parse_time(re.sub(r"(\.\d{6})\d+", r"\1", str(item["time"])))
        found.append(
            Point(str(item["id"]), at, str(item["hostname"]), tags.get("label"), tags.get("kind", "increment"))
        )
    return sorted(found, key=lambda point: point.at)


def choose(known: Sequence[Point], label: str | None, at: float | None) -> Point:
    """Return the point to restore: that of *label*, the last one not after *at*, or the newest."""
    if not known:
        raise BackupError("There is no backup in the repository yet. Make one: playbooks/backup.yml")
    if label is not None:
        named = [point for point in known if point.label == label]
        if not named:
            labels = ", ".join(sorted({point.label for point in known if point.label})) or "none"
            raise BackupError(f"There is no backup with the label {label}. Labels: {labels}")
        return named[-1]
    before = [point for point in known if at is None or point.at <= at]
    if not before:
        raise BackupError(f"The oldest backup is of {rfc3339(known[0].at)}, which is after {rfc3339(at or 0)}.")
    return before[-1]


def choose_base(bases: Mapping[str, float], at: float | None) -> str:
    """Return the newest base backup (id → end) that ended not after *at*."""
    fitting = [name for name, end in bases.items() if at is None or end <= at]
    if not fitting:
        oldest = rfc3339(min(bases.values())) if bases else "none"
        raise BackupError(f"No base backup ended before {rfc3339(at) if at else 'now'} (the oldest: {oldest}).")
    return max(fitting, key=lambda name: bases[name])


def from_the_future(times: Mapping[str, float], now: float) -> list[str]:
    """Return the names whose time lies ahead: whoever dates backups ahead steers what retention keeps."""
    return sorted(name for name, at in times.items() if at > now + FUTURE_SECONDS)


def expired(times: Mapping[str, float], daily: int, weekly: int, needed: Iterable[float] = ()) -> list[str]:
    """Return the names that retention lets go: kept are the last of each of *daily* days and of *weekly* ISO weeks.

    The newest is always kept, and days and weeks without a backup do not count. So is the last one before each moment in
    *needed*: a point that is offered has to have what it is restored from.
    """
    days: dict[Any, str] = {}
    weeks: dict[Any, str] = {}
    for name in sorted(times, key=lambda key: times[key], reverse=True):
        moment = datetime.datetime.fromtimestamp(times[name], datetime.UTC)
        if moment.date() not in days and len(days) < daily:
            days[moment.date()] = name
        if moment.isocalendar()[:2] not in weeks and len(weeks) < weekly:
            weeks[moment.isocalendar()[:2]] = name
    kept = {*days.values(), *weeks.values(), *sorted(times, key=lambda key: times[key])[-1:]}
    kept |= {choose_base(times, at) for at in needed if at >= min(times.values(), default=at + 1)}
    return sorted(name for name in times if name not in kept)


def explain(doing: str, output: str) -> BackupError:
    """Return the error for a tool that failed while *doing* something, with the cause by its name where it is known."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for name, pattern in _CAUSES:
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return BackupError(f"{doing}: {name} ({line[:300]})")
    return BackupError(f"{doing} failed: {lines[-1][:300] if lines else 'no output'}")


def row_faults(manifest: Mapping[str, Any], found: Mapping[str, int]) -> list[str]:
    """Compare the *found* rows of each table with the manifest's ``rows``: a number, or the least and the most."""
    faults = []
    for table, wanted in sorted((manifest.get("rows") or {}).items()):
        least, most = wanted if isinstance(wanted, list) else (wanted, wanted)
        if table not in found:
            faults.append(f"table {table} is missing")
        elif not least <= found[table] <= most:
            span = str(least) if least == most else f"{least} to {most}"
            faults.append(f"table {table} has {found[table]} rows, the manifest says {span}")
    return faults


def check_filled(source: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return *manifest* unless its store is an empty one, as a service makes where its own has vanished."""
    if manifest.get("schema"):
        return manifest
    raise BackupError(
        f"{source}: the store is empty, although a release is in service. It was not kept. To return the one that was lost: "
        "playbooks/restore.yml"
    )


def bounds(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, list[int]]:
    """Return table → least and most rows, of two counts around one moment."""
    return {name: sorted((before[name], after[name])) for name in before if name in after}


# The report: one file for whoever asks how backups are (the service, status, the operator's playbooks)


def new_report(limits: Mapping[str, float], now: float) -> dict[str, Any]:
    """Return the report of a host that has done nothing yet. *limits*: job → seconds its last success may be old."""
    return {"expected_since": now, "jobs": {name: {"max_age_seconds": limit} for name, limit in limits.items()}}


def noted(
    report: Mapping[str, Any], limits: Mapping[str, float], job: str, outcome: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """Return *report* with the *outcome* of *job* (ok, message, and figures); an earlier success is remembered."""
    base = new_report(limits, now)
    since = report.get("expected_since", base["expected_since"])
    jobs = {name: {**(report.get("jobs") or {}).get(name, {}), **entry} for name, entry in base["jobs"].items()}
    was = jobs.get(job, {})
    succeeded = now if outcome.get("ok") else was.get("succeeded_at")
    jobs[job] = {"max_age_seconds": was.get("max_age_seconds", DAY), **dict(outcome), "at": now}
    if succeeded is not None:
        jobs[job]["succeeded_at"] = succeeded
    if not outcome.get("ok"):
        kept = {key: was[key] for key in ("rpo_seconds", "rto_seconds") if key in was}
        jobs[job] = {**kept, **jobs[job]}
    return {"expected_since": since, "written_at": now, "jobs": jobs}


def problems(report: Mapping[str, Any], now: float) -> list[str]:
    """Return one line for each job of *report* that failed or is overdue."""
    found = []
    since = float(report.get("expected_since", 0))
    if not report.get("jobs"):
        return ["backups have never reported"]
    for name, job in report["jobs"].items():
        succeeded = job.get("succeeded_at")
        if job.get("ok") is False:
            found.append(f"{name} failed: {job.get('message')}")
        elif now - max(float(succeeded or 0), since) > float(job["max_age_seconds"]):
            found.append(f"{name} is overdue: last success {rfc3339(succeeded) if succeeded else 'never'}")
    return found


def table(report: Mapping[str, Any], now: float) -> str:
    """Return *report* as a table for people."""
    rows = [["JOB", "STATE", "LAST SUCCESS", "AGE", "LIMIT", "RPO", "RTO", "MESSAGE"]]
    overdue = {line.split(" is overdue")[0] for line in problems(report, now) if " is overdue" in line}
    for name, job in (report.get("jobs") or {}).items():
        succeeded = job.get("succeeded_at")
        state = (
            "failed" if job.get("ok") is False else "overdue" if name in overdue else "ok" if succeeded else "waiting"
        )
        rows.append(
            [
                name,
                state,
                rfc3339(succeeded) if succeeded else "never",
                span(now - succeeded) if succeeded else "-",
                span(float(job["max_age_seconds"])),
                f"{job['rpo_seconds']:.1f} s" if job.get("rpo_seconds") is not None else "-",
                f"{job['rto_seconds']:.1f} s" if job.get("rto_seconds") is not None else "-",
                str(job.get("message") or "-"),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def span(seconds: float) -> str:
    """Return a length of time in its largest fitting unit."""
    for unit, size in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def parse_report(text: str) -> dict[str, Any]:
    """Return the report in *text*; {} where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
