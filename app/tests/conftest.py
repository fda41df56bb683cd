"""Fixtures: a migrated store of each kind. PostgreSQL is a real cluster that the tests start and stop themselves."""

from __future__ import annotations

import ctypes
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.fernet import Fernet

from atlas import migrations
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.queue import Queue
from atlas.settings import Settings


def _die_with_parent() -> None:
    # A cluster must not outlive tests that were killed.
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


@dataclass
class Cluster:
    """A running PostgreSQL server, reached by a socket in its scratch directory."""

    directory: str
    user: str

    def url(self, database: str, role: str | None = None) -> str:
        return f"postgresql+psycopg://{role or self.user}@/{database}?host={self.directory}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        dsn = f"host={self.directory} user={self.user} dbname={database}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One server for all tests, owned by an unprivileged user."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))
    if not found:
        pytest.fail("PostgreSQL is missing: apt-get install postgresql", pytrace=False)
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:
        user = next(name for name in ("postgres", "nobody") if name in [entry.pw_name for entry in pwd.getpwall()])
    switch: dict[str, Any] = (
        {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    )
    directory = tempfile.mkdtemp(prefix="atlas-pg-", dir="/tmp")
    os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
    server = None
    try:
        options = ["--auth=trust", "--username", user, "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        subprocess.run(
            [f"{found[-1]}/initdb", "-D", f"{directory}/data", *options],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            **switch,
        )
        with open(f"{directory}/log", "wb") as log:
            server = subprocess.Popen(
                [f"{found[-1]}/postgres", "-D", f"{directory}/data", "-k", directory, "-c", "listen_addresses="]
                + ["-c", "fsync=off", "-c", "max_connections=120", "-c", "shared_buffers=32MB"],
                stdout=log,
                stderr=log,
                cwd=directory,
                preexec_fn=_die_with_parent,
                **switch,
            )
        cluster = Cluster(directory, user)
        wait_for(lambda: _answers(cluster), 20, f"PostgreSQL: {directory}/log")
        cluster.execute("CREATE ROLE atlas NOLOGIN")
        cluster.execute("CREATE ROLE atlas_a LOGIN PASSWORD 'irrelevant' IN ROLE atlas")
        cluster.execute("CREATE DATABASE template_atlas OWNER atlas")
        template = Database.from_url(cluster.url("template_atlas", "atlas_a"), role="atlas")
        migrations.migrate(template)
        template.close()
        yield cluster
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds; fail with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}", pytrace=False)
        time.sleep(0.05)


class Clock:
    """The clock of the store, set by hand (milliseconds)."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1000)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    yield from _store(request, tmp_path, "template0")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated store."""
    for url in _store(request, tmp_path, "template_atlas"):
        if url.startswith("sqlite"):
            database = Database.from_url(url)
            migrations.migrate(database)
            database.close()
        yield url


def _store(request: pytest.FixtureRequest, tmp_path: Path, template: str) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/atlas.db"
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    name = f"test_{time.monotonic_ns()}"
    cluster.execute(f"CREATE DATABASE {name} TEMPLATE {template} OWNER atlas")
    yield cluster.url(name, "atlas_a")
    cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


def open_database(url: str, clock: Callable[[], int] | None = None) -> Database:
    """A store opened as the service opens it."""
    return Database.from_url(url, role="atlas" if url.startswith("postgresql") else None, clock=clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(database_url: str, clock: Clock) -> Iterator[Database]:
    """A migrated store whose clock is the fixture `clock`."""
    database = open_database(database_url, clock)
    yield database
    database.close()


@pytest.fixture
def settings() -> Settings:
    return Settings(environment="development", database_url="sqlite:////nowhere/atlas.db", queue_limit=500)


@pytest.fixture
def keyring() -> Keyring:
    return Keyring([Fernet.generate_key().decode()])


@pytest.fixture
def queue(database: Database) -> Queue:
    """The queue as deployment 1 sees it, with the greatest possible jitter."""
    return Queue(database, "worker-1", 1, random_delay=lambda upper: upper)


@pytest.fixture
def documents(database: Database, queue: Queue, keyring: Keyring, settings: Settings) -> Documents:
    return Documents(database, queue, keyring, settings)
