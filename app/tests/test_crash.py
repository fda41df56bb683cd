"""Crash test: API, workers, hosts and the database server die without a word, workers stop past their lease, the disk
fills up; of what was acknowledged nothing is lost and nothing is done twice.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Cluster, open_database, wait_for
from crash_worker import LEASE_SECONDS, work_for_ever
from running import TOKEN, Deployment, free_port
from scratch import scratch_cluster
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from atlas import admission, counts
from atlas.db import Database
from atlas.schema import documents, job_events, jobs
from atlas.settings import TokenSpec
from atlas.tokens import Tokens

DOCUMENTS = int(os.environ.get("ATLAS_CRASH_DOCUMENTS", "200"))
KILLS = max(6, DOCUMENTS // 60)
STOPS = max(2, DOCUMENTS // 400)
API_KILLS = max(2, DOCUMENTS // 200)
SERVER_KILLS = max(1, DOCUMENTS // 400)
CLIENTS = 3
HOSTS = ("a", "b")
WORKERS_PER_HOST = 2
SECONDS = 60 + DOCUMENTS / 10
# So few that a job that comes back is done again while its first worker is still stopped.
CONTROL_DOCUMENTS = 200


@pytest.fixture(scope="module")
def spawner() -> Iterator[Any]:
    """Starts worker processes by forking a server that has imported the code but opened no store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    yield context


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server for the tests of this module, which kill it."""
    with scratch_cluster() as running:
        yield running


class Fleet:
    """Worker processes, by owner (HOST-number); each is replaced when it is killed, unless its host is gone."""

    def __init__(self, spawner: Any, url: str, build: str) -> None:
        self.spawner, self.url, self.build = spawner, url, build
        self.processes: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        for host in HOSTS * WORKERS_PER_HOST:
            self.start(host)

    def start(self, host: str) -> None:
        owner = f"{host}-{next(self._numbers)}"
        role = "atlas" if self.url.startswith("postgresql") else None
        process = self.spawner.Process(target=work_for_ever, args=(self.url, role, owner, self.build), daemon=True)
        process.start()
        self.processes[owner] = process

    def kill(self, owner: str) -> None:
        process = self.processes.pop(owner)
        process.kill()
        process.join()

    def end(self) -> None:
        for owner in list(self.processes):
            self.kill(owner)


class Clients:
    """Send each document over HTTP again and again until it is acknowledged, those up to `allowed` at once."""

    def __init__(self, port: int, amount: int) -> None:
        self.acknowledged: dict[int, str] = {}
        self.allowed = self.cut = self.refused = 0
        self.unexpected: list[str] = []
        self._port = port
        self._numbers, self._lock = iter(range(amount)), threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _send_all(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", headers=headers, trust_env=False) as client:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                while number is not None and number >= self.allowed and not self._is_over.wait(0.005):
                    pass
                while number is not None and not self._is_over.is_set() and not self._is_taken(client, number):
                    self._is_over.wait(0.05)
                if number is None or self._is_over.is_set():
                    return

    def _is_taken(self, client: httpx.Client, number: int) -> bool:
        try:
            answer = client.post("/v1/documents", json={"content": f"document {number}", "content_type": "text/plain"})
        except httpx.TransportError:
            self.cut += 1
            return False
        if answer.status_code in (200, 202):
            self.acknowledged[number] = answer.json()["id"]
            return True
        self.refused += 1
        if answer.status_code != 503:
            self.unexpected.append(answer.text)
        return False

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)


class Scene:
    """A store, an API, its clients with so many documents, and workers on two hosts."""

    def __init__(
        self, spawner: Any, url: str, build: str, directory: Path, cluster: Cluster | None, amount: int
    ) -> None:
        self.amount = amount
        self.database = open_database(url)
        self.cluster = cluster
        self.chance = random.Random(7)
        is_postgresql = self.database.dialect == "postgresql"
        settings = {"api_workers": 2, "database_role": "atlas"} if is_postgresql else {}
        self.deployment = Deployment(directory, database_url=url, **settings)
        spec = json.loads((directory / "credentials/atlas_tokens").read_text())
        Tokens(self.database).apply([TokenSpec(**each) for each in spec])
        admission.admit(self.database, 1)
        self.port = free_port()
        self.fleet = Fleet(spawner, url, build)
        self.api, _, _ = self.deployment.start_ready("api", self.port)
        self.clients = Clients(self.port, amount)

    def close(self) -> None:
        self.clients.end()
        self.deployment.close()
        self.fleet.end()
        self.database.close()

    def held(self) -> dict[int, str]:
        """The jobs that are held by living workers, with their owners; none while the store is away."""
        try:
            with self.database.read() as connection:
                found = connection.execute(select(jobs.c.id, jobs.c.owner).where(jobs.c.state == "running"))
                return {job: owner for job, owner in found if owner in self.fleet.processes}
        except OperationalError:
            return {}

    def busy(self) -> list[str]:
        return sorted(set(self.held().values()))

    def disturb(self, faults: list[str]) -> None:
        """Let clients send, and meanwhile make faults; those of the middle come in the same order in each run."""
        make: dict[str, Callable[[], None]] = {
            name.removeprefix("_do_"): getattr(self, name) for name in dir(self) if name.startswith("_do_")
        }
        for position, fault in enumerate(faults, start=1):
            # A half is sent before the fault, and the other while it lasts.
            self._until = self.amount * position // len(faults)
            self.clients.allowed = (self.clients.allowed + self._until) // 2
            make[fault]()
            self.clients.allowed = self._until

    def _someone(self) -> str:
        found: list[str] = []

        def is_found() -> bool:
            found[:] = self.busy()
            return bool(found)

        wait_for(is_found, 60, "a worker holds a job")
        return self.chance.choice(found)

    def _do_worker(self) -> None:
        owner = self._someone()
        self.fleet.kill(owner)
        self.fleet.start(owner[0])

    def _do_stop(self) -> None:
        process = self.fleet.processes[self._someone()]
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(LEASE_SECONDS * 2)
        os.kill(process.pid, signal.SIGCONT)

    def _do_api(self) -> None:
        self.deployment.kill(self.api)
        before, self.clients.allowed = self.clients.cut, self._until
        wait_for(lambda: self.clients.cut > before, 30, "a client finds no API")
        self.api, _, _ = self.deployment.start_ready("api", self.port)

    def _do_backend(self) -> None:
        assert self.cluster is not None
        own = "SELECT pid FROM pg_stat_activity WHERE usename = 'atlas_a' ORDER BY pid"
        os.kill(self.chance.choice(self.cluster.execute(own))[0], signal.SIGKILL)

    def _do_server(self) -> None:
        assert self.cluster is not None
        self.cluster.crash()
        before, self.clients.allowed = self.clients.refused, self._until
        wait_for(lambda: self.clients.refused > before, 30, "a client is told that the store is away")
        self.cluster.start()

    def _do_host(self) -> None:
        """One host dies for good, in the middle of its work."""
        gone = [owner for owner in self.fleet.processes if owner.startswith(HOSTS[1])]
        held: list[int] = []

        def is_caught() -> bool:
            self._signal(gone, signal.SIGSTOP)
            held[:] = [job for job, owner in self.held().items() if owner in gone]
            if not held:
                self._signal(gone, signal.SIGCONT)
            return bool(held)

        wait_for(is_caught, 60, "the host holds a job")
        for owner in gone:
            self.fleet.kill(owner)
        self.orphans = held

    def _signal(self, owners: list[str], number: signal.Signals) -> None:
        for owner in owners:
            os.kill(self.fleet.processes[owner].pid, number)

    def settle(self) -> None:
        """Wait until everything is taken in and finished, and no worker still tries."""
        wait_for(lambda: len(self.clients.acknowledged) == self.amount, SECONDS, "every document is acknowledged")
        wait_for(lambda: len(finishes(self.database)) == self.amount, SECONDS, "every document is finished")
        # Whoever was stopped has time to try its late finish.
        wait_for(lambda: not self.held(), 30, "every worker is idle")

    def check(self) -> None:
        """Each acknowledged document was finished exactly once, and the store is sound."""
        acknowledged = self.clients.acknowledged.values()
        assert finishes(self.database) == dict.fromkeys(acknowledged, 1) and len(set(acknowledged)) == self.amount
        with self.database.read() as connection:
            assert counts.drift(connection) == []
            stored = select(documents.c.id).where(documents.c.processed_at.is_not(None))
            assert set(connection.scalars(stored)) == set(acknowledged)
            if self.database.dialect == "sqlite":
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


@contextmanager
def scene(
    spawner: Any,
    request: pytest.FixtureRequest,
    url: str,
    directory: Path,
    build: str = "fenced",
    amount: int = DOCUMENTS,
) -> Iterator[Scene]:
    directory = directory / "deployment"
    directory.mkdir()
    cluster = request.getfixturevalue("cluster") if url.startswith("postgresql") else None
    made = Scene(spawner, url, build, directory, cluster, amount)
    try:
        yield made
    finally:
        made.close()


def finishes(database: Database) -> dict[str, int]:
    """How often each document was finished; nothing while the store is away."""
    counted = select(job_events.c.document_id, func.count()).where(job_events.c.event == "finished")
    try:
        with database.read() as connection:
            return dict(connection.execute(counted.group_by(job_events.c.document_id)).all())
    except OperationalError:
        return {}


def test_every_acknowledged_document_is_finished_exactly_once(
    spawner: Any, request: pytest.FixtureRequest, database_url: str, tmp_path: Path
) -> None:
    with scene(spawner, request, database_url, tmp_path) as running:
        faults = ["worker"] * KILLS + ["stop"] * STOPS + ["api"] * API_KILLS
        faults += ["backend", "server"] * SERVER_KILLS if running.cluster else []
        running.chance.shuffle(faults)
        running.disturb([*faults, "host"])
        running.settle()
        running.check()
        with running.database.read() as connection:
            lost = connection.scalar(select(func.count()).where(job_events.c.event == "lost")) or 0
            heir = select(job_events.c.job_id, job_events.c.owner).where(job_events.c.event == "finished")
            heirs = dict(connection.execute(heir.where(job_events.c.job_id.in_(running.orphans))).all())
    assert lost >= KILLS, "the workers were killed in mid-job"
    assert heirs.keys() == set(running.orphans) and all(owner.startswith(HOSTS[0]) for owner in heirs.values())
    assert running.clients.cut >= API_KILLS and not running.clients.unexpected


def test_control_without_fencing_a_double_finish_shows(
    spawner: Any, request: pytest.FixtureRequest, database_url: str, tmp_path: Path
) -> None:
    with scene(spawner, request, database_url, tmp_path, "unfenced", CONTROL_DOCUMENTS) as running:
        running.disturb(["stop"] * 3)
        running.settle()
        with pytest.raises(AssertionError):
            running.check()
        assert max(finishes(running.database).values()) > 1


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """In a mount namespace of its own, where a small file system holds the store."""
    is_root = os.getuid() == 0
    done = subprocess.run(
        ["unshare", "--mount", *([] if is_root else ["--user", "--map-root-user"]), sys.executable]
        + [str(Path(__file__).with_name("full_disk.py")), str(tmp_path), str(DOCUMENTS)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["finishes"] == dict.fromkeys(found["acknowledged"], 1) and len(found["acknowledged"]) == DOCUMENTS
    assert found["integrity"] == "ok"
    assert set(found["refusals"]) == {"database or disk is full"} and found["times_full"] == 3
