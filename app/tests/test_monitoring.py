"""What is measured: the store as it is, and a document that goes the whole path; in the form that Prometheus reads."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Clock, open_database, wait_for
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from running import Deployment
from sqlalchemy import func, insert, select, text, update
from test_api import TEXT, app, client
from test_core import Running, running, store

from atlas import admission, breakers, monitoring
from atlas.backups import BackupMetrics
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.monitoring import Metrics, Probe, is_vulnerable, take_sample
from atlas.queue import Queue, Which
from atlas.schema import documents as documents_table
from atlas.schema import feeds, job_events, jobs
from atlas.settings import Settings

__all__ = ["app", "client", "running", "store"]

PROMTOOL = shutil.which("promtool", path=str(Path(__file__).parents[2] / ".cache/bin")) or shutil.which("promtool")


def values(exposed: str) -> dict[str, float]:
    """Each sample, as it is written but for the order of its labels."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
    }


def lint(exposed: str) -> None:
    assert PROMTOOL, "promtool is missing: bin/bootstrap --tests"
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=exposed, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(environment="development", database_url=database_url, queue_limit=500, retry_base_seconds=0.1)


def expose(documents: Documents, probe: Probe) -> str:
    metrics = Metrics(documents.database.dialect, probe)
    metrics.sample, metrics.is_database_up = take_sample(documents), True
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(BackupMetrics(None))
    return generate_latest(registry).decode()


@pytest.fixture
def probe(documents: Documents) -> Probe:
    return Probe(documents, 1, "test1/blue")


def test_the_state_of_the_store_is_exposed(
    documents: Documents, queue: Queue, database: Database, clock: Clock, probe: Probe
) -> None:
    admission.admit(database, 1)
    for number in range(4):
        documents.submit(Submission(content=f"n{number}", content_type="text/plain", sensitive={"notes": "n"}))
    first, *_ = queue.claim(3)
    queue.fail(first, "parse_error", "bad")
    clock.advance(61)
    queue.reap()
    assert len(queue.claim(1)) == 1
    common = {"tags": [], "priority": 1, "interval_seconds": 600, "created_at": 0}
    with database.write() as connection:
        for number, next_at in enumerate((0, clock.now - 30_000, clock.now + 1)):
            row = {"id": str(number), "url": str(number), "next_at": next_at, "failures": number, "enabled": True}
            connection.execute(insert(feeds).values(common | row))
        connection.execute(insert(feeds).values(common | {"id": "p", "url": "p", "next_at": 0, "enabled": False}))
        host = breakers.Host("down.test", "open", open_until=clock.now + 1000)
        breakers.save(database, connection, [host], clock.now)
    clock.advance(0.5)
    found = values(expose(documents, probe))
    fingerprint = documents.keyring.fingerprints[0]
    expected = {
        "atlas_database_up": 1,
        "atlas_queue_jobs priority=normal state=ready": 2,
        "atlas_queue_jobs priority=normal state=running": 1,
        "atlas_queue_jobs priority=normal state=dead": 1,
        "atlas_queue_jobs priority=high state=ready": 0,
        "atlas_queue_oldest_seconds state=dead": 61.5,
        "atlas_queue_oldest_seconds state=running": 61.5,
        "atlas_queue_recent_events event=died": 1,
        "atlas_queue_recent_events event=finished": 0,
        "atlas_queue_recent_lease_expiries": 2,
        "atlas_breakers state=open": 1,
        "atlas_feeds condition=enabled": 3,
        "atlas_feeds condition=overdue": 1,
        "atlas_feeds condition=failing": 2,
        f"atlas_sensitive_fields key={fingerprint}": 4,
        "atlas_deployments_admitted": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert 0 < found["atlas_queue_oldest_seconds state=ready"] <= 61.5
    if database.dialect == "sqlite":
        assert found["atlas_sqlite_wal_bytes"] > 0 and found["atlas_sqlite_vulnerable"] == 0


def test_a_requeue_of_lost_jobs_is_no_lease_that_ran_out(
    documents: Documents, queue: Queue, database: Database, clock: Clock
) -> None:
    admission.admit(database, 1)
    queue.attempts = 1
    documents.submit(Submission(content="n", content_type="text/plain"))
    assert queue.claim(1)
    clock.advance(61)
    assert queue.reap() == (0, 1)
    assert take_sample(documents).lease_expiries == 1
    assert queue.requeue(Which())
    assert take_sample(documents).lease_expiries == 1


def test_promtool_accepts_what_is_exposed(
    documents: Documents, probe: Probe, client: FlaskClient, app: Flask, database: Database
) -> None:
    documents.submit(Submission(content="n", content_type="text/plain", sensitive={"notes": "n"}))
    admission.admit(database, 1)
    admission.lead(database, "services", "somebody", 1, 30)
    probe.up, probe.seconds = True, 0.1
    exposed = expose(documents, probe)
    names = {line.split()[2] for line in exposed.splitlines() if line.startswith("# TYPE")}
    assert {"atlas_probe_duration_seconds", "atlas_breakers", "atlas_queue_jobs", "atlas_leader"} <= names
    lint(exposed)
    client.post("/v1/documents", json=TEXT)
    client.get("/v1/nothing")
    own = client.get("/metrics").text
    assert "atlas_http_requests_total" in own
    lint(own)
    with pytest.raises(AssertionError):
        lint("# HELP atlas_bad_total A gauge.\n# TYPE atlas_bad_total gauge\natlas_bad_total 1\n")


def run(probe: Probe, core: Running) -> None:
    """Send one probe, and look after it until it is judged."""
    waited = threading.Event()
    probe._sent_at = float("-inf")
    probe.step()
    for _ in range(1200):
        if probe._taken is None:
            return
        waited.wait(0.1)
        probe.step()
    pytest.fail("the probe was never judged")


def left(database: Database) -> list[int]:
    with database.read() as connection:
        tables = (documents_table, jobs, job_events)
        return [connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


@pytest.fixture
def core(running: Callable[..., Running]) -> Iterator[Running]:
    yield running()


def test_a_document_goes_the_whole_path_and_leaves_nothing(core: Running, store: Database) -> None:
    probe = Probe(core.documents, 7, "test1/blue")
    run(probe, core)
    assert probe.up is True and probe.seconds is not None and 0 <= probe.seconds < 60
    assert left(store) == [0, 0, 0]


def test_an_idle_slot_probes_its_own_workers(core: Running, store: Database) -> None:
    admission.dismiss(store, 7)
    run(probe := Probe(core.documents, 7, "test1/green"), core)
    assert probe.up is True


def test_what_a_killed_process_left_behind_is_replaced(core: Running, store: Database) -> None:
    killed = Probe(core.documents, 7, "test1/blue")
    killed.step()
    assert left(store)[0] == 1
    probe = Probe(core.documents, 7, "test1/blue")
    probe.step()
    assert probe._taken is None
    run(probe, core)
    assert probe.up is True and left(store) == [0, 0, 0]


def test_a_slot_that_stops_takes_its_probe_along(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    deployment.prepare()
    database = open_database(deployment.settings["database_url"])
    try:
        process, _, _ = deployment.start_ready("monitoring")
        wait_for(lambda: left(database)[0] == 1, 20, "a probe waits for a core that does not run")
        process.terminate()
        assert process.wait(60) == 0
        assert left(database) == [0, 0, 0]
    finally:
        database.close()
        deployment.close()


@pytest.mark.parametrize("fault", ["slow", "dead", "unfound", "full"])
def test_a_fault_on_the_path_is_seen(
    documents: Documents, queue: Queue, database: Database, probe: Probe, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    probe.up = True
    if fault == "full":
        monkeypatch.setattr(documents, "_most", lambda _: 0)
    probe.step()
    if fault == "slow":
        probe.step()
        assert probe.up is True, "not judged yet"
        monkeypatch.setattr(monitoring, "PROBE_LIMIT_SECONDS", 0)
    elif fault != "full":
        values = {"state": "dead" if fault == "dead" else "done", "finished_at": 1, "error": "broken"}
        with database.write() as connection:
            connection.execute(update(jobs).values(values))
    probe.step()
    assert probe.up is False and probe._taken is None and left(database)[:2] == [0, 0]


def test_a_store_that_is_away_is_a_metric() -> None:
    metrics = Metrics("sqlite", None)  # type: ignore[arg-type]
    registry = CollectorRegistry()
    registry.register(metrics)
    assert values(generate_latest(registry).decode()) == {"atlas_database_up": 0}


def test_the_versions_of_sqlite_with_the_bug_are_known(database: Database) -> None:
    assert [is_vulnerable(version) for version in ("3.6.23", "3.7.0", "3.51.2", "3.51.3", "3.52.0")] == [
        *(False, True, True, False, False)
    ]
    with database.read() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
