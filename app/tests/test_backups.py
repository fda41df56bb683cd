"""Copies of the store, what tells whether a release can live on one, and the report of the backup host."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from conftest import open_database
from cryptography.fernet import Fernet
from prometheus_client import CollectorRegistry, generate_latest
from pysqlite3 import dbapi2 as sqlite
from running import Deployment
from sqlalchemy import text

from atlas import admission, backups, snapshot
from atlas.api import create_app
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Extracted, Submission
from atlas.queue import Queue, Result
from atlas.settings import Identity, Settings

TEXT = "The lighthouse keeper writes down every passing vessel before breakfast."


def ingest(documents: Documents, queue: Queue, number: int, sensitive: dict[str, str] | None = None) -> str:
    """Take in one document and process it; returns its id."""
    content = f"{TEXT} Number {number}."
    identifier = documents.submit(Submission(content=content, content_type="text/plain", sensitive=sensitive)).id
    admission.admit(queue.database, queue.deployment)
    for job in queue.claim(10):
        queue.finish([Result(job, Extracted(content))], documents.store)
    return identifier


def test_a_copy_is_whole_while_others_write(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    assert deployment.command("db", "migrate").returncode == 0
    url = f"sqlite:///{tmp_path}/atlas.db"
    store, stop = open_database(url), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with store.write() as connection:
                for _ in range(2):  # a copy in which their number is odd saw half a transaction
                    connection.execute(
                        text("INSERT INTO idempotency_keys VALUES (:t, :k, 'h', 202, '{}', 1)"),
                        {"t": f"{number}", "k": str(_)},
                    )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            target = tmp_path / f"copy{number}.db"
            done = deployment.command("db", "snapshot", str(target), "--json")
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            copied = sqlite.connect(f"file:{target}?mode=ro&immutable=1", uri=True)
            rows = copied.execute("SELECT count(*) FROM idempotency_keys").fetchone()[0]
            assert rows == told["rows"]["idempotency_keys"] and rows % 2 == 0
            assert copied.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
            copied.close()
    finally:
        stop.set()
        writer.join()
        store.close()
        deployment.close()
    assert rows > 0
    assert sorted(path.name for path in tmp_path.glob("*copy*")) == [f"copy{number}.db" for number in range(5)]


def test_a_copy_of_a_damaged_store_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/atlas.db"
    deployment = Deployment(tmp_path)
    deployment.command("db", "migrate")
    database = open_database(url)
    with database.write() as connection:
        for number in range(300):
            connection.execute(
                text("INSERT INTO idempotency_keys VALUES (:t, 'k', :h, 202, '{}', 1)"),
                {"t": str(number), "h": "x" * 500},
            )
    with database.write() as connection:
        page = connection.scalar(text("SELECT rootpage FROM sqlite_master WHERE name = 'idempotency_keys'"))
    database.close()
    with (tmp_path / "atlas.db").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\x55" * 4096)
    done = deployment.command("db", "snapshot", str(tmp_path / "copy.db"))
    assert done.returncode == 1 and "damaged" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*copy*")) == []
    deployment.close()


def test_verify_finds_a_good_store_good(
    database: Database, documents: Documents, queue: Queue, keyring: Keyring
) -> None:
    ingest(documents, queue, 1, {"secret": "one"})
    last = ingest(documents, queue, 2)
    found = snapshot.verify(database, keyring)
    assert found["faults"] == []
    assert (found["sensitive"], found["searched"], found["rows"]["documents"]) == (1, last, 2)
    assert found["rows"] == snapshot.contents(database)["rows"]


def test_verify_misses_a_key(database: Database, documents: Documents, queue: Queue) -> None:
    ingest(documents, queue, 1, {"secret": "one"})
    other = Keyring([Fernet.generate_key().decode()])
    (fault,) = snapshot.verify(database, other)["faults"]
    assert fault == "1 sensitive fields of documents need a key that is not in the keyring"


def test_verify_refuses_a_schema_that_the_release_cannot_read(database: Database, keyring: Keyring) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(text("INSERT INTO schema_revisions VALUES ('9999', 'contract', 1)"))
    (fault,) = snapshot.verify(database, keyring)["faults"]
    assert "9999" in fault


def test_verify_notices_a_search_that_lost_a_document(
    database: Database, documents: Documents, queue: Queue, keyring: Keyring
) -> None:
    identifier = ingest(documents, queue, 1)
    if database.dialect == "sqlite":
        with database.write() as connection:
            connection.execute(text("INSERT INTO documents_index(documents_index) VALUES ('delete-all')"))
        assert snapshot.verify(database, keyring)["faults"] == [f"the search does not find the document {identifier}"]
    else:
        assert snapshot.verify(database, keyring)["searched"] == identifier


REPORT = {
    "expected_since": 1000.0,
    "jobs": {
        "backup": {"max_age_seconds": 100, "ok": True, "succeeded_at": 2000.0},
        "drill": {"max_age_seconds": 1000, "ok": True, "succeeded_at": 1990.0, "rpo_seconds": 2.5, "rto_seconds": 9.0},
    },
}


def report(path: Path, **jobs: object) -> str:
    target = path / "backup-status.json"
    target.write_text(json.dumps({**REPORT, "jobs": {**REPORT["jobs"], **jobs}}))  # type: ignore[dict-item]
    return str(target)


@pytest.mark.parametrize(
    ("now", "jobs", "problems"),
    [
        (2050, {}, []),
        (2101, {}, ["backup is overdue: last success 1970-01-01T00:33:20.000Z"]),
        (
            2050,
            {"backup": {"max_age_seconds": 100, "ok": False, "message": "wrong password"}},
            ["backup failed: wrong password"],
        ),
        (1050, {"backup": {"max_age_seconds": 100}}, []),  # just provisioned
        (1101, {"backup": {"max_age_seconds": 100}}, ["backup is overdue: last success never"]),
    ],
)
def test_report(tmp_path: Path, now: float, jobs: dict[str, object], problems: list[str]) -> None:
    found = backups.look(report(tmp_path, **jobs), now)
    assert found is not None and found["problems"] == problems


def test_no_report_where_one_is_expected_is_a_problem(tmp_path: Path) -> None:
    assert backups.look(None) is None
    for content in (None, "{", '{"jobs": {"backup": {}}, "expected_since": 1}', "[]"):
        target = tmp_path / "status.json"
        target.unlink(missing_ok=True)
        if content is not None:
            target.write_text(content)
        found = backups.look(str(target))
        assert found is not None and len(found["problems"]) == 1, content


def test_health_and_metrics_show_a_failed_backup_and_readiness_does_not(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    deployment.command("db", "migrate")
    path = report(tmp_path, backup={"max_age_seconds": 1e12, "ok": False, "message": "disk full"})
    settings = Settings(
        environment="development",
        database_url=f"sqlite:///{tmp_path}/atlas.db",
        backup_status_path=path,
        fernet_keys=Fernet.generate_key().decode(),  # type: ignore[arg-type]
    )
    client = create_app(settings, Identity(1, "r", "blue", "h")).test_client()
    health = client.get("/health").json
    assert health and health["status"] == "degraded"
    assert health["checks"]["backup"].startswith("backup failed: disk full")
    assert health["backup"]["jobs"]["drill"]["rpo_seconds"] == 2.5
    assert client.get("/readyz").status_code == 200
    metrics = client.get("/metrics").text
    assert 'atlas_backup_ok{job="backup"} 0.0' in metrics
    assert 'atlas_backup_rto_seconds{job="drill"} 9.0' in metrics
    registry = CollectorRegistry()
    registry.register(backups.BackupMetrics(None))
    assert generate_latest(registry) == b""
    deployment.close()
