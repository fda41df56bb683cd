"""The doctor names each fault with the command that mends it, finds nothing on a sound host, and exits accordingly."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import open_database
from cryptography.fernet import Fernet
from running import Deployment, free_port
from sqlalchemy import insert, text, update

from atlas import admission, breakers, doctor, presence
from atlas.cli import cli
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.doctor import Finding, examine
from atlas.documents import Documents, Submission
from atlas.queue import Queue
from atlas.schema import jobs, workers
from atlas.schema import tokens as tokens_table
from atlas.settings import Identity, Settings, load_settings
from atlas.tokens import Tokens

HERE = Identity(7, "0.1.0-0123456789ab", "blue", "test1")
LEADER = "test1/blue/services/1"


class Host:
    """A host on which everything is as it should be, until a test changes that."""

    def __init__(self, directory: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        role = "atlas" if url.startswith("postgresql") else None
        self.deployment = Deployment(directory, database_url=url, database_role=role)
        for name, value in self.deployment.environment.items():
            if name.startswith("ATLAS_"):
                monkeypatch.setenv(name, value)
        self.database = open_database(url)
        self.listening = {8101, 8111}
        monkeypatch.setattr(doctor, "_listens", lambda port: port in self.listening)
        Tokens(self.database).apply(load_settings().tokens)
        admission.admit(self.database, 7)
        admission.lead(self.database, "services", LEADER, 7, 3600)
        for service in doctor.SERVICES:
            presence.beat(self.database, HERE, service, 0, {"leader": True, "warnings": []})

    def change(self, **settings: Any) -> None:
        path = self.deployment.directory / "settings.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))

    def execute(self, statement: Any) -> None:
        with self.database.write() as connection:
            connection.execute(statement)

    def submit(self) -> None:
        settings: Settings = load_settings()
        documents = Documents(
            self.database, Queue(self.database, "t"), Keyring.from_secret(settings.fernet_keys), settings
        )
        documents.submit(Submission(content="n", content_type="text/plain", sensitive={"notes": "n"}))


@pytest.fixture
def host(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path, database_url, monkeypatch)
    yield host
    host.database.close()
    host.deployment.close()


def found() -> list[Finding]:
    return list(examine())


def test_nothing_is_wrong_on_a_sound_host(host: Host) -> None:
    host.submit()
    assert found() == []
    done = CliRunner().invoke(cli, ["doctor"])
    assert (done.exit_code, done.output) == (0, "nothing is wrong\n")


def old_key(host: Host) -> None:
    host.submit()
    path = host.deployment.directory / "credentials/atlas_fernet_keys"
    path.write_text(f"{Fernet.generate_key().decode()}\n{path.read_text()}")


def lost_key(host: Host) -> None:
    host.submit()
    (host.deployment.directory / "credentials/atlas_fernet_keys").write_text(Fernet.generate_key().decode())


def open_breaker(host: Host) -> None:
    with host.database.write() as connection:
        now = host.database.now(connection)
        breakers.save(host.database, connection, [breakers.Host("a.test", "open", open_until=now + 10**6)], now)


def waiting(host: Host) -> None:
    host.submit()
    host.execute(update(jobs).values(run_at=1))


def dead(host: Host) -> None:
    host.submit()
    host.execute(update(jobs).values(state="dead", finished_at=1))


FAULTS: list[tuple[str, Callable[[Host], object], str, str, str]] = [
    ("error", lambda host: host.change(api_thread=1), "settings", "api_thread: is not a setting", "deploy.yml"),
    (
        "error",
        lambda host: (host.deployment.directory / "credentials/atlas_fernet_keys").unlink(),
        "credentials",
        "missing or empty",
        "deploy.yml",
    ),
    (
        "error",
        lambda host: admission.dismiss(host.database, 7),
        "admission",
        "no deployment",
        "atlas admission admit 7",
    ),
    (
        "error",
        lambda host: admission.step_down(host.database, "services", "test1/blue/services/1"),
        "leader",
        "nobody",
        "restart",
    ),
    (
        "error",
        lambda host: host.execute(update(workers).where(workers.c.service == "core").values(seen_at=0)),
        "services",
        "atlas-core@blue has not been heard of",
        "systemctl restart atlas-core@blue; journalctl -u atlas-core@blue",
    ),
    (
        "error",
        lambda host: presence.leave(host.database, HERE, "services"),
        "services",
        "atlas-services@blue does not run",
        "systemctl start atlas-services@blue",
    ),
    ("error", lambda host: host.listening.remove(8101), "ports", "atlas-api@blue does not listen on 8101", "ss -ltnp"),
    ("error", waiting, "queue", "the oldest job has waited", "atlas-core@blue"),
    ("error", lost_key, "keys", "1 sensitive fields are under a key that is not", "put the key back"),
    ("warning", old_key, "keys", "1 sensitive fields are under an older key", "atlas keys reencrypt"),
    ("warning", open_breaker, "breakers", "1 remote hosts", "/v1/breakers"),
    ("warning", dead, "dead-letters", "1 jobs failed for good", "/v1/dead-letters"),
    (
        "warning",
        lambda host: host.execute(update(tokens_table).values(expires_at=1)),
        "tokens",
        "test has expired",
        "expires_at",
    ),
    ("error", lambda host: Tokens(host.database).apply([]), "tokens", "there is no token", "atlas tokens apply"),
    (
        "warning",
        lambda host: presence.beat(host.database, HERE, "services", 0, {"warnings": ["a reader kept 9 pages"]}),
        "store",
        "a reader kept 9 pages",
        "journalctl -u atlas-services@blue",
    ),
    ("error", lambda host: host.change(backup_status_path="/nowhere"), "backup", "cannot be read", "backup.yml"),
    (
        "error",
        lambda host: host.execute(text("DELETE FROM schema_revisions")),
        "schema",
        "this release needs",
        "atlas db migrate",
    ),
]


@pytest.mark.parametrize(("level", "hurt", "check", "message", "mend"), FAULTS, ids=[fault[3][:30] for fault in FAULTS])
def test_each_fault_is_named_with_what_mends_it(
    host: Host, level: str, hurt: Callable[[Host], object], check: str, message: str, mend: str
) -> None:
    hurt(host)
    (only,) = found()
    assert (only.level, only.check) == (level, check)
    assert message in only.message and mend in only.mend
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == (1 if level == "error" else 0)
    assert [entry["check"] for entry in json.loads(done.output)] == [check]


def test_a_port_that_another_took(host: Host) -> None:
    presence.leave(host.database, HERE, "api")
    assert [(each.check, each.message) for each in found()] == [
        ("services", "atlas-api@blue does not run"),
        ("ports", "port 8101 is taken by another"),
    ]


def test_whether_a_port_listens_is_asked_of_it() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        assert doctor._listens(sock.getsockname()[1])
    assert not doctor._listens(free_port())


def test_a_clock_that_is_wrong(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Database.now
    monkeypatch.setattr(Database, "now", lambda self, connection: real(self, connection) + 5_000)
    assert ("clock", "the clock of the database is 5 s ahead of this host's") in [
        (each.check, each.message) for each in found()
    ]


@pytest.mark.parametrize(("free", "level"), [(16, None), (10, "warning"), (4, "error")])
def test_a_disk_that_fills_up(host: Host, monkeypatch: pytest.MonkeyPatch, free: int, level: str | None) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100 - free, free))
    assert [(each.check, each.level) for each in found()] == ([("disk", level)] if level else [])


def test_what_is_special_to_each_store(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    if host.database.dialect == "sqlite":
        monkeypatch.setattr(Database, "version", lambda _: "3.51.2")
        monkeypatch.setattr(doctor, "WAL_BYTES", 0)
        assert [each.check for each in found()] == ["sqlite", "wal"]
    else:
        assert found() == []


def test_an_audit_log_without_a_keeper(empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas import migrations

    store = open_database(empty_url)
    migrations.migrate(store)
    host = Host(tmp_path, empty_url, monkeypatch)
    assert [each.check for each in found()] == ([] if store.dialect == "sqlite" else ["audit"])
    for each in (store, host.database):
        each.close()
    host.deployment.close()


def test_a_database_that_is_away(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    run = CliRunner(env=deployment.environment).invoke
    missing = run(cli, ["doctor"])
    assert missing.exit_code == 1 and "atlas.db does not exist\n    mend: atlas db migrate" in missing.output
    path = tmp_path / "settings.yaml"
    away = {"database_url": f"postgresql+psycopg://atlas_a@127.0.0.1:{free_port()}/atlas"}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | away))
    done = run(cli, ["doctor"])
    assert done.exit_code == 1 and "does not answer" in done.output
    assert "systemctl status postgresql, on 127.0.0.1" in done.output and "Traceback" not in done.output
    deployment.close()


@pytest.mark.parametrize(("days", "expected"), [(3, ["test expires in 3.0 days"]), (8, [])])
def test_a_token_that_expires_within_a_week(host: Host, days: int, expected: list[str]) -> None:
    with host.database.read() as connection:
        expires_at = host.database.now(connection) + days * 86_400_000
    host.execute(update(tokens_table).values(expires_at=expires_at))
    assert [each.message for each in found()] == expected


def test_tokens_are_listed_without_their_hashes(host: Host) -> None:
    host.execute(update(tokens_table).values(expires_at=1_700_000_000_000))
    host.execute(insert(tokens_table).values(name="old", sha256="0" * 64, scopes=["read"], created_at=0, disabled_at=1))
    lines = CliRunner().invoke(cli, ["tokens", "list"]).output.splitlines()
    assert lines == [
        "old read without limits disabled 1970-01-01T00:00:00.001Z",
        "test ingest,read,operate without limits expires 2023-11-14T22:13:20.000Z",
    ]
    listed = json.loads(CliRunner().invoke(cli, ["tokens", "list", "--json"]).output)
    assert [token["name"] for token in listed] == ["old", "test"] and "sha256" not in listed[0]
