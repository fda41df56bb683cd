"""atlas-monitoring: the state of queue, store and services as metrics, and a probe through the whole path."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, make_url, select, update
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission, breakers, feeds, presence
from atlas.backups import BackupMetrics
from atlas.crypto import Keyring
from atlas.documents import Documents, Submission, Submitted
from atlas.keys import progress
from atlas.queue import QueueStats, in_state, remove_documents
from atlas.runtime import Runtime, one_line, open_queue, service_port
from atlas.schema import PRIORITIES, PRIORITY_NAMES, documents, job_events, jobs
from atlas.services import LEASE
from atlas.settings import SettingsError

SAMPLE_SECONDS = 5.0
PROBE_SECONDS = 60.0
PROBE_LIMIT_SECONDS = 60.0

log = structlog.get_logger("atlas.monitoring")


class Probe:
    """A marked document for this deployment's own workers, sent on its way every PROBE_SECONDS.

    It is taken in, queued, extracted, stored and found by search like any other, and then removed.
    """

    def __init__(self, documents: Documents, deployment: int, name: str) -> None:
        self._documents = documents
        self._deployment = deployment
        self._taken: Submitted | None = None
        self._sent_at = float("-inf")
        self.up: bool | None = None
        self.seconds: float | None = None
        # The same each time, so that what a killed process leaves behind is found, and there is never more than one.
        self._marker = f"probe{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        page = f"<html><head><title>Probe</title></head><body><article><p>{self._marker}.</p></article></body></html>"
        self._submission = Submission(
            content=page, content_type="text/html", priority=PRIORITIES["high"], submitted_by="service:monitoring"
        )

    def step(self) -> None:
        if self._taken is not None:
            self._look(self._taken)
        elif time.monotonic() - self._sent_at >= PROBE_SECONDS:
            self._send()

    def _send(self) -> None:
        with self._documents.database.write() as connection:
            [taken] = self._documents.add(connection, [self._submission])
            if isinstance(taken, Submitted) and not taken.created:
                remove_documents(connection, documents.c.id == taken.id)
                return
            self._sent_at = time.monotonic()
            if isinstance(taken, Exception):
                self._fail(str(taken))
                return
            connection.execute(update(jobs).where(jobs.c.id == taken.job_id).values(target=self._deployment))
        self._taken = taken

    def _look(self, taken: Submitted) -> None:
        job = self._documents.queue.job(taken.job_id or 0)
        if job is not None and job["state"] == "done":
            found = [document.id for document in self._documents.search(self._marker).items]
            if found == [taken.id]:
                # By the clock of the store, which stamped both: looking late does not count.
                self.up, self.seconds = True, max(0, job["finished_at"] - job["created_at"]) / 1000
            else:
                self._fail("it was processed, and search does not find it")
        elif job is not None and job["state"] != "dead" and time.monotonic() - self._sent_at < PROBE_LIMIT_SECONDS:
            return
        else:
            self._fail(job["error"] or f"it took more than {PROBE_LIMIT_SECONDS:.0f} s" if job else "it is gone")
        self.withdraw()

    def withdraw(self) -> None:
        """Remove the document that is on its way, if there is one."""
        if self._taken is not None:
            with self._documents.database.write() as connection:
                remove_documents(connection, documents.c.id == self._taken.id)
            self._taken = None

    def _fail(self, reason: str) -> None:
        self.up = False
        log.warning("the probe did not come through", reason=reason)


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment. Ages are in seconds, by state; `feeds` counts them by what is to be said of them."""

    stats: QueueStats
    services: list[presence.Presence]
    admitted: int
    leader: str | None
    engine: str
    wal_bytes: int
    outcomes: Mapping[int, Mapping[str, int]]
    ages: Mapping[str, float]
    breakers: Mapping[str, int]
    keys: Mapping[str, int]
    feeds: Mapping[str, int]
    lease_expiries: int
    at: float = field(default_factory=time.time)


def take_sample(opened: Documents) -> Sample:
    database = opened.database
    wal = 0
    if database.dialect == "sqlite":
        with contextlib.suppress(FileNotFoundError):
            wal = Path(f"{make_url(opened.settings.database_url).database}-wal").stat().st_size
    stats = opened.queue.stats()
    with database.read() as connection:
        now = database.now(connection)
        since = {"running": jobs.c.created_at, "dead": jobs.c.finished_at}
        oldest = {
            state: connection.scalar(select(func.min(at)).where(in_state(state))) or now for state, at in since.items()
        }
        # A job keeps its error when it is requeued or discarded.
        expired = job_events.c.event.in_(("lost", "died")) & (job_events.c.error_class == "lost")
        recent = expired & (job_events.c.at > now - admission.RECENT_MS)
        return Sample(
            stats,
            presence.roster(database),
            sum(entry.admitted for entry in admission.admissions(database)),
            admission.leader(database, LEASE),
            database.version(),
            wal,
            admission.outcomes(database),
            {"ready": stats.oldest_ready_seconds} | {state: max(0, now - at) / 1000 for state, at in oldest.items()},
            breakers.states(database, connection),
            progress(connection, opened.keyring).rows,
            feeds.tally(connection, now),
            connection.scalar(select(func.count()).select_from(job_events).where(recent)) or 0,
        )


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
        stats = sample.stats
        yield GaugeMetricFamily("atlas_sample_timestamp_seconds", "When the store was last looked at.", sample.at)
        yield _labelled(
            "atlas_queue_jobs",
            "Jobs by state and priority.",
            ["state", "priority"],
            {
                (state, PRIORITY_NAMES[priority]): count
                for state, counts in stats.depth.items()
                for priority, count in counts.items()
            },
        )
        yield _labelled("atlas_queue_oldest_seconds", "Age of the oldest job in a state.", ["state"], sample.ages)
        events = Counter(dict.fromkeys(("finished", "failed", "lost", "died"), 0))
        for found in sample.outcomes.values():
            events.update(found)
        yield _labelled("atlas_queue_recent_events", "Job events of the last five minutes.", ["event"], events)
        yield _labelled(
            "atlas_queue_deployment_events",
            "The same of each deployment.",
            ["deployment", "event"],
            {
                (str(deployment), event): n
                for deployment, found in sample.outcomes.items()
                for event, n in found.items()
            },
        )
        yield GaugeMetricFamily(
            "atlas_queue_recent_lease_expiries", "Leases that ran out in the last five minutes.", sample.lease_expiries
        )
        yield _labelled("atlas_breakers", "Remote hosts by the state of their breaker.", ["state"], sample.breakers)
        yield _labelled(
            "atlas_feeds", "Feeds that are enabled, and of these overdue, or failing.", ["condition"], sample.feeds
        )
        yield _labelled(
            "atlas_sensitive_fields", "Sensitive fields by the key that encrypted them.", ["key"], sample.keys
        )
        yield _labelled(
            "atlas_service_heartbeat_age_seconds",
            "Age of the last heartbeat.",
            ["host", "slot", "service"],
            {(seen.host, seen.slot, seen.service): seen.age_seconds for seen in sample.services},
        )
        yield GaugeMetricFamily("atlas_deployments_admitted", "Deployments that may claim jobs.", sample.admitted)
        leaders = {sample.leader: 1} if sample.leader else {}
        yield _labelled("atlas_leader", "The process that leads the services.", ["owner"], leaders)
        engine = {(self._dialect, sample.engine): 1}
        yield _labelled("atlas_database_info", "The engine of the store.", ["dialect", "version"], engine)
        if self._dialect == "sqlite":
            yield GaugeMetricFamily("atlas_sqlite_wal_bytes", "Size of the write-ahead log.", sample.wal_bytes)
            vulnerable = is_vulnerable(sample.engine)
            yield GaugeMetricFamily("atlas_sqlite_vulnerable", "Whether SQLite has the WAL-reset bug.", vulnerable)
        if self._probe.up is not None:
            yield GaugeMetricFamily("atlas_probe_success", "Whether the last probe came through.", self._probe.up)
        if self._probe.seconds is not None:
            name, text = "atlas_probe_duration_seconds", "How long the last probe took through the whole path."
            yield GaugeMetricFamily(name, text, self._probe.seconds)


def _labelled(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def run() -> None:
    """Serve until SIGTERM."""
    runtime = Runtime("monitoring")
    settings, database = runtime.settings, runtime.database
    queue = open_queue(database, runtime.owner, runtime.identity.deployment, settings)
    opened = Documents(database, queue, Keyring.from_secret(settings.fernet_keys), settings)
    identity = runtime.identity
    probe = Probe(opened, identity.deployment, f"{identity.host}/{identity.slot}")
    metrics = Metrics(database.dialect, probe)
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(BackupMetrics(settings.backup_status_path))
    number = service_port(identity.slot, "monitoring")
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
                metrics.sample = take_sample(opened)
                sampled_at = time.monotonic()
            metrics.is_database_up = True
        except (SQLAlchemyError, OSError):
            metrics.is_database_up = False
            raise
        return 1.0

    if runtime.connect():
        runtime.loop(step)
        try:
            # Nobody else may work on it, or look for it, before this slot is started again.
            probe.withdraw()
        except (SQLAlchemyError, OSError) as error:
            log.warning("the probe is left behind", reason=one_line(error))
    server.shutdown()
    server.server_close()
    runtime.close()
