"""atlas-monitoring: the state of queue, store and services as metrics, and a probe through the whole path."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission, presence
from atlas.backups import BackupMetrics
from atlas.db import Database
from atlas.queue import NewJob, Queue, QueueStats
from atlas.runtime import Runtime, open_queue, service_port
from atlas.schema import PRIORITIES
from atlas.services import LEASE
from atlas.settings import Settings, SettingsError

SAMPLE_SECONDS = 5.0
PROBE_SECONDS = 60.0
PROBE_LIMIT_SECONDS = 60.0
_PRIORITY_NAMES = {value: name for name, value in PRIORITIES.items()}

log = structlog.get_logger("atlas.monitoring")


class Probe:
    """A marked job for this deployment's own workers, sent on its way every PROBE_SECONDS."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._job_id: int | None = None
        self._sent_at = float("-inf")
        self.up: bool | None = None
        self.seconds: float | None = None

    def step(self) -> None:
        if self._job_id is not None:
            self._look(self._job_id)
        elif time.monotonic() - self._sent_at >= PROBE_SECONDS:
            marker = f"probe {time.time_ns()}"
            content = f"<html><head><title>Probe</title></head><body><article><p>{marker}.</p></article></body></html>"
            payload = {"content": content, "expect": marker}
            job = NewJob("probe", payload=payload, priority=PRIORITIES["high"], target=self._queue.deployment)
            with self._queue.database.write() as connection:
                self._job_id = self._queue.enqueue(connection, job)
            self._sent_at = time.monotonic()

    def _look(self, job_id: int) -> None:
        job = self._queue.job(job_id)
        if job is not None and job["state"] == "done":
            # By the clock of the store, which stamped both: looking late does not count.
            self.up, self.seconds = True, max(0, job["finished_at"] - job["created_at"]) / 1000
        elif job is not None and job["state"] != "dead" and time.monotonic() - self._sent_at < PROBE_LIMIT_SECONDS:
            return
        else:
            self.up = False
            log.warning("the probe did not come through", job_id=job_id, error=job["error"] if job else None)
        self._job_id = None


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    stats: QueueStats
    services: list[presence.Presence]
    admitted: int
    leader: str | None
    engine: str
    wal_bytes: int | None
    outcomes: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


def take_sample(database: Database, queue: Queue, settings: Settings) -> Sample:
    wal = None
    if database.dialect == "sqlite":
        path = Path(f"{make_url(settings.database_url).database}-wal")
        with contextlib.suppress(FileNotFoundError):
            wal = path.stat().st_size
    admitted = sum(entry.admitted for entry in admission.admissions(database))
    leader, outcomes = admission.leader(database, LEASE), admission.outcomes(database)
    return Sample(queue.stats(), presence.roster(database), admitted, leader, database.version(), wal or 0, outcomes)


def is_vulnerable(version: str) -> bool:
    """Whether this SQLite can corrupt a database when its WAL is reset (3.7.0 to 3.51.2)."""
    numbers = tuple(int(part) for part in version.split(".")[:3])
    return (3, 7, 0) <= numbers < (3, 51, 3)


class Metrics(Collector):
    """The latest sample in the form that Prometheus reads."""

    def __init__(self, dialect: str, probe: Probe) -> None:
        self._dialect = dialect
        self._probe = probe
        self.sample: Sample | None = None
        self.is_database_up = False

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "atlas_database_up", "Whether the store answered at the last look.", self.is_database_up
        )
        sample = self.sample
        if sample is None:
            return
        yield GaugeMetricFamily("atlas_sample_timestamp_seconds", "When the store was last looked at.", sample.at)
        depth = GaugeMetricFamily("atlas_queue_jobs", "Jobs by state and priority.", labels=["state", "priority"])
        for state, counts in sample.stats.depth.items():
            for priority, count in counts.items():
                depth.add_metric([state, _PRIORITY_NAMES.get(priority, str(priority))], count)
        yield depth
        oldest = sample.stats.oldest_ready_seconds
        yield GaugeMetricFamily("atlas_queue_oldest_ready_seconds", "How long the oldest ready job has waited.", oldest)
        recent = GaugeMetricFamily(
            "atlas_queue_recent_events", "Job events of the last five minutes.", labels=["event"]
        )
        for event in sorted({"finished", "failed", "lost", "died", *sample.stats.events}):
            recent.add_metric([event], sample.stats.events.get(event, 0))
        yield recent
        done = GaugeMetricFamily(
            "atlas_queue_deployment_events", "The same of each deployment.", labels=["deployment", "event"]
        )
        for deployment, events in sample.outcomes.items():
            for event, count in events.items():
                done.add_metric([str(deployment), event], count)
        yield done
        seen = GaugeMetricFamily(
            "atlas_service_heartbeat_age_seconds", "Age of the last heartbeat.", labels=["host", "slot", "service"]
        )
        for service in sample.services:
            seen.add_metric([service.host, service.slot, service.service], service.age_seconds)
        yield seen
        yield GaugeMetricFamily("atlas_deployments_admitted", "Deployments that may claim jobs.", sample.admitted)
        leader = GaugeMetricFamily("atlas_leader", "The process that leads the services.", labels=["owner"])
        if sample.leader:
            leader.add_metric([sample.leader], 1)
        yield leader
        engine = GaugeMetricFamily("atlas_database_info", "The engine of the store.", labels=["dialect", "version"])
        engine.add_metric([self._dialect, sample.engine], 1)
        yield engine
        if self._dialect == "sqlite":
            yield GaugeMetricFamily("atlas_sqlite_wal_bytes", "Size of the write-ahead log.", sample.wal_bytes)
            vulnerable = is_vulnerable(sample.engine)
            yield GaugeMetricFamily("atlas_sqlite_vulnerable", "Whether SQLite has the WAL-reset bug.", vulnerable)
        if self._probe.up is not None:
            yield GaugeMetricFamily("atlas_probe_success", "Whether the last probe came through.", self._probe.up)
        if self._probe.seconds is not None:
            name, text = "atlas_probe_duration_seconds", "How long the last probe took through the whole path."
            yield GaugeMetricFamily(name, text, self._probe.seconds)


def run() -> None:
    """Serve until SIGTERM."""
    runtime = Runtime("monitoring")
    settings, database = runtime.settings, runtime.database
    queue = open_queue(database, runtime.owner, runtime.identity.deployment, settings)
    probe = Probe(queue)
    metrics = Metrics(database.dialect, probe)
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(BackupMetrics(settings.backup_status_path))
    number = service_port(runtime.identity.slot, "monitoring")
    try:
        server, _thread = start_http_server(number, "127.0.0.1", registry)
    except OSError as error:
        raise SettingsError([f"port {number} on 127.0.0.1 cannot be taken: {error.strerror}"], "monitoring") from None
    sampled_at = float("-inf")

    def step() -> float:
        nonlocal sampled_at
        try:
            probe.step()
            if time.monotonic() - sampled_at >= SAMPLE_SECONDS:
                metrics.sample = take_sample(database, queue, settings)
                sampled_at = time.monotonic()
            metrics.is_database_up = True
        except (SQLAlchemyError, OSError):
            metrics.is_database_up = False
            raise
        return 1.0

    if runtime.connect():
        runtime.loop(step)
    server.shutdown()
    server.server_close()
    runtime.close()
