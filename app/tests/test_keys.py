"""The rotation of keys: resumable, while serving, and proven to be over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import open_database, wait_for
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient
from running import Deployment
from sqlalchemy import insert, select, update
from test_api import TEXT, app, client, store_of

from atlas import audit, keys
from atlas.cli import cli
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.feeds import Feeds
from atlas.queue import Queue
from atlas.schema import documents as documents_table
from atlas.schema import feeds as feeds_table
from atlas.settings import Settings

__all__ = ["app", "client"]

OLD, NEW, LOST = (Fernet.generate_key().decode() for _ in range(3))
ROTATED = Keyring([NEW, OLD])


def fill(database: Database, keyring: Keyring, count: int) -> dict[int, str]:
    """Documents with sensitive fields, and what each holds, by its seq."""
    clear = [json.dumps({"notes": f"secret {number}"}) for number in range(count)]
    rows = [
        {
            "id": f"{keyring.fingerprints[0]}-{number}",
            "dedupe_key": f"{keyring.fingerprints[0]}-{number}",
            "tags": [],
            "created_at": 0,
            "sensitive": keyring.encrypt(text),
            "sensitive_key": keyring.fingerprints[0],
        }
        for number, text in enumerate(clear)
    ]
    with database.write() as connection:
        added = connection.scalars(
            insert(documents_table).returning(documents_table.c.seq, sort_by_parameter_order=True), rows
        )
        return dict(zip(added.all(), clear, strict=True))


def held(database: Database) -> dict[int, tuple[str, str]]:
    columns = (documents_table.c.seq, documents_table.c.sensitive_key, documents_table.c.sensitive)
    with database.read() as connection:
        return {seq: (key, text) for seq, key, text in connection.execute(select(*columns))}


def test_everything_comes_under_the_newest_key(database: Database, queue: Queue, settings: Settings) -> None:
    old = Documents(database, queue, Keyring([OLD]), settings)
    new = Documents(database, queue, ROTATED, settings)
    expected = fill(database, Keyring([OLD]), 250)
    with database.write() as connection:
        feed_id, _ = Feeds(old).create(connection, "http://a.test/", None, sensitive={"username": "me"})
    new.submit(Submission(content="new", content_type="text/plain", sensitive={"notes": "n"}))
    old.submit(Submission(content="none", content_type="text/plain"))
    with database.read() as connection:
        before = keys.progress(connection, ROTATED)
    first, second = ROTATED.fingerprints
    assert before == keys.Progress({first: 1, second: 251}, remaining=251, unknown=0)
    assert keys.reencrypt(database, ROTATED) == (251, 0)
    assert keys.reencrypt(database, ROTATED) == (0, 0)
    with database.read() as connection:
        assert keys.progress(connection, Keyring([NEW])) == keys.Progress({first: 252}, 0, 0), "the old key may go"
    found = held(database)
    assert {seq: Keyring([NEW]).decrypt(found[seq][1]) for seq in expected} == expected
    work = Feeds(Documents(database, queue, Keyring([NEW]), settings)).work(feed_id)
    assert work is not None and work.sensitive == {"username": "me"}
    entries, total = audit.records(database, {"object_type": "key"})
    assert total == 2 and [entry["action"] for entry in entries] == ["reencrypted", "reencrypting"]
    assert [entry["detail"]["remaining"] for entry in entries] == [0, 251] and "secret" not in str(entries)


def test_what_cannot_be_read_is_counted_and_left_alone(database: Database) -> None:
    lost, broken = fill(database, Keyring([LOST]), 2), fill(database, Keyring([OLD]), 3)
    with database.write() as connection:
        chosen = documents_table.c.seq == min(broken)
        connection.execute(update(documents_table).where(chosen).values(sensitive="altered"))
    before = held(database)
    assert keys.reencrypt(database, ROTATED) == (2, 1)
    with database.read() as connection:
        after = keys.progress(connection, ROTATED)
    assert (after.remaining, after.unknown) == (3, 2)
    assert {seq: held(database)[seq] for seq in (*lost, min(broken))} == {
        seq: before[seq] for seq in (*lost, min(broken))
    }


@pytest.fixture
def rotating(database_url: str, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose keyring has a new key before the old one."""
    role = "atlas" if database_url.startswith("postgresql") else None
    deployment = Deployment(tmp_path, database_url=database_url, database_role=role)
    (tmp_path / "credentials/atlas_fernet_keys").write_text(f"{NEW}\n{OLD}\n")
    yield deployment
    deployment.close()


def run(deployment: Deployment, *arguments: str) -> Result:
    return CliRunner(env=deployment.environment).invoke(cli, ["keys", *arguments])


def test_a_run_that_is_killed_is_continued_by_the_next(rotating: Deployment, database_url: str) -> None:
    store = open_database(database_url)
    expected = fill(store, Keyring([OLD]), 4000)

    def remaining() -> int:
        with store.read() as connection:
            return keys.progress(connection, ROTATED).remaining

    assert run(rotating, "retire-check").exit_code == 1
    # With little of the processor, so that it is caught in the middle.
    command = ["nice", "-n", "19", sys.executable, "-m", "atlas", "keys", "reencrypt"]
    process = subprocess.Popen(command, env=rotating.environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: remaining() < 4000, 30, "the first batch is done")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = remaining()
    assert 0 < left < 4000 and process.returncode == -signal.SIGKILL
    service = Documents(
        store, Queue(store, "api"), ROTATED, Settings(environment="development", database_url=database_url)
    )
    assert len(service.work([f"{Keyring([OLD]).fingerprints[0]}-{number}" for number in (0, 3999)])) == 2, (
        "served meanwhile"
    )
    finished = run(rotating, "reencrypt", "--json")
    assert json.loads(finished.output) == {"changed": left, "unreadable": 0}
    found = held(store)
    assert {seq: Keyring([NEW]).decrypt(found[seq][1]) for seq in expected} == expected
    store.close()
    assert run(rotating, "retire-check").exit_code == 0
    assert run(rotating, "status").output.splitlines() == [
        f"{ROTATED.fingerprints[0]}: 4000 (newest)",
        f"{ROTATED.fingerprints[1]}: 0",
    ]


def test_health_says_how_far_the_rotation_is(client: FlaskClient, app: Flask) -> None:
    keyring = app.extensions["atlas"].keyring
    client.post("/v1/documents", json=TEXT | {"sensitive": {"notes": "n"}})
    with store_of(app).write() as connection:
        connection.execute(
            insert(feeds_table).values(
                id="f", url="u", tags=[], priority=1, interval_seconds=1, next_at=0, created_at=0, sensitive_key="gone"
            )
        )
    found = client.get("/health").get_json()["keyring"]
    assert found["fingerprints"] == keyring.fingerprints
    assert found["rows"] == {keyring.fingerprints[0]: 1, "gone": 1} and found["remaining"] == found["unknown"] == 1
