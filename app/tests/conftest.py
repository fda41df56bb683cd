"""Fixtures: a migrated store of each kind. PostgreSQL is a real cluster that the tests start and stop themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from hypothesis import settings as property_tests
from scratch import Cluster, scratch_cluster, wait_for

from atlas import migrations
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.queue import Queue
from atlas.settings import Settings

__all__ = ["Cluster", "wait_for"]

# The same examples in each run; how long one takes is the machine's affair.
EXAMPLES = int(os.environ.get("ATLAS_EXAMPLES", "100"))
property_tests.register_profile("atlas", max_examples=EXAMPLES, derandomize=True, deadline=None)
property_tests.load_profile("atlas")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One server for all tests."""
    try:
        with scratch_cluster() as running:
            yield running
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)


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
