"""Where things are measured: scratch stores whose commits are durable, and deployments on them."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from running import Deployment
from scratch import Cluster, scratch_cluster
from sqlalchemy import make_url

from atlas import admission, migrations
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents
from atlas.queue import Queue
from atlas.settings import Settings

# A file system that survives the machine, unlike one in memory: a commit must cost what it costs.
PARENT = "/var/tmp"
# fsync and synchronous_commit keep their defaults: on.
SERVER = {"shared_buffers": "256MB", "max_wal_size": "4GB", "checkpoint_timeout": "15min"}
STORES = ("sqlite", "postgresql")
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


@dataclass
class Bench:
    """One run: its scratch directory, its server (started when it is first needed), and its size."""

    size: str
    directory: Path
    stack: ExitStack
    cluster: Cluster | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def sized(self, full: int, small: int) -> int:
        """The amount for this run's size."""
        return full if self.size == "full" else small

    def server(self) -> Cluster:
        if self.cluster is None:
            self.cluster = self.stack.enter_context(scratch_cluster(PARENT, SERVER))
        return self.cluster

    @contextmanager
    def url(self, store: str, template: str = "template_atlas") -> Iterator[str]:
        """A fresh store with the schema."""
        name = f"bench_{next(self.numbers)}"
        if store == "postgresql":
            self.server().execute(f"CREATE DATABASE {name} TEMPLATE {template} OWNER atlas")
            yield self.server().url(name, "atlas_a")
            self.server().execute(f"DROP DATABASE {name} WITH (FORCE)")
            return
        place = self.directory / name
        place.mkdir()
        url = f"sqlite:///{place}/atlas.db"
        database = Database.from_url(url)
        migrations.migrate(database)
        database.close()
        yield url
        shutil.rmtree(place)

    def settle(self, url: str) -> None:
        """Do what the server's own housekeeping does within a minute, so that no part is measured in between."""
        if url.startswith("postgresql"):
            self.server().execute("VACUUM ANALYZE", str(make_url(url).database))

    @contextmanager
    def deployment(self, store: str, **settings: Any) -> Iterator[Deployment]:
        """A deployment on a fresh store: default settings, but for a queue without a limit to speak of."""
        place = self.directory / f"deployment_{next(self.numbers)}"
        place.mkdir()
        with self.url(store) as url:
            role = {"database_role": "atlas"} if store == "postgresql" else {}
            deployment = Deployment(place, **{"database_url": url, "queue_limit": 10**8, **role, **settings})
            try:
                deployment.environment["PYTHONPATH"] += f":{Path(__file__).parents[1]}"
                deployment.prepare()
                yield deployment
            finally:
                deployment.close()


def role(url: str) -> str | None:
    return "atlas" if url.startswith("postgresql") else None


def opened(url: str) -> Database:
    """The store as the service opens it."""
    return Database.from_url(url, role=role(url))


@contextmanager
def intake(deployment: Deployment) -> Iterator[Documents]:
    """The documents and the queue of a deployment, used from this process as an admitted worker."""
    url = deployment.settings["database_url"]
    keys = (deployment.directory / "credentials/atlas_fernet_keys").read_text().split()
    database = opened(url)
    admission.admit(database, 1)
    settings = Settings(environment="development", database_url=url, queue_limit=10**8)
    yield Documents(database, Queue(database, "bench", 1), Keyring(keys), settings)
    database.close()


@contextmanager
def bench(size: str) -> Iterator[Bench]:
    """A run in a scratch directory of its own, which is removed in the end."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-", dir=PARENT)))
        yield Bench(size, directory, stack)


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)
