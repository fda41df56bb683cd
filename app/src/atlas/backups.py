"""What the backup host last reported: backups and restore drills, whether each went well, and whether one is overdue.

The report is a file that the backup host replaces after each of its jobs. It names how old the last success of each job
may be, so that silence, too, is seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from atlas.db import rfc3339


def look(path: str | None, now: float | None = None) -> dict[str, Any] | None:
    """Each job with its result, and `problems`: one line for each job that failed or is overdue.

    None if no backup is expected (no path). `now` is in seconds since the Unix epoch.
    """
    if path is None:
        return None
    now = time.time() if now is None else now
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        since, reported = float(content["expected_since"]), dict(content["jobs"])
        jobs = {name: _job(dict(job), since, now) for name, job in reported.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"problems": [f"the report of the backup host cannot be read: {type(error).__name__}"], "jobs": {}}
    problems = [f"{name} {job['problem']}" for name, job in jobs.items() if job["problem"]]
    return {"problems": problems, "jobs": jobs}


def _job(job: dict[str, Any], since: float, now: float) -> dict[str, Any]:
    succeeded = job.get("succeeded_at")
    is_overdue = now - max(float(succeeded or 0), since) > float(job["max_age_seconds"])
    last = rfc3339(round(succeeded * 1000)) if succeeded else None
    problem = None
    if job.get("ok") is False:
        problem = f"failed: {job.get('message') or 'no reason given'}"
    elif is_overdue:
        problem = f"is overdue: last success {last or 'never'}"
    shown = {key: job[key] for key in ("rpo_seconds", "rto_seconds") if job.get(key) is not None}
    return shown | {"ok": job.get("ok"), "succeeded_at": last, "overdue": is_overdue, "problem": problem}


class BackupMetrics(Collector):
    """The report in the form that Prometheus reads, looked at anew for each answer."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        report = look(self._path)
        if report is None:
            return
        gauges = {
            "ok": GaugeMetricFamily("atlas_backup_ok", "Whether the last run did not fail.", labels=["job"]),
            "overdue": GaugeMetricFamily("atlas_backup_overdue", "Whether a success is overdue.", labels=["job"]),
            "rpo_seconds": GaugeMetricFamily(
                "atlas_backup_rpo_seconds", "Seconds of work a restore loses.", labels=["job"]
            ),
            "rto_seconds": GaugeMetricFamily("atlas_backup_rto_seconds", "Seconds a restore takes.", labels=["job"]),
        }
        for name, job in report["jobs"].items():
            for key, gauge in gauges.items():
                if job.get(key) is not None:
                    gauge.add_metric([name], float(job[key]))
        yield GaugeMetricFamily(
            "atlas_backup_problems", "Backup jobs that failed or are overdue.", len(report["problems"])
        )
        yield from gauges.values()
