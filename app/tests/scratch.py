"""What tests and bench share and pytest is not needed for: a scratch PostgreSQL server, and waiting."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from atlas import migrations
from atlas.db import Database

# A server that is thrown away after tests need not survive the machine.
FOR_TESTS = {"fsync": "off", "shared_buffers": "32MB"}
KEEPER = Path(__file__).parents[2] / "roles/postgresql/files/audit.sql"


# How much longer something may take than on a machine that does nothing else.
PATIENCE = 5


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds; AssertionError with `what` when the time, on a quiet machine, is over."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for line in found for child in line.split()]


def _die_with_parent() -> None:
    # A server must not outlive tests that were killed.
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


class Cluster:
    """A PostgreSQL server of our own, run by an unprivileged user, reached by a socket in its scratch directory.

    `options` are those of postgresql.conf. The database template_atlas has the schema; the role atlas owns it, and
    atlas_a is a member that may log in.
    """

    def __init__(self, directory: str, options: Mapping[str, str]) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))
        if not found:
            raise FileNotFoundError("PostgreSQL is missing: apt-get install postgresql")
        self.directory = directory
        self.options = dict(options)
        self.process: subprocess.Popen[bytes] | None = None
        self._programs = found[-1]
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self._switch: dict[str, Any] = {"cwd": directory}
        if os.getuid() == 0:
            known = {entry.pw_name: entry for entry in pwd.getpwall()}
            account = known.get("postgres") or known["nobody"]
            self.user = account.pw_name
            self._switch |= {"user": self.user, "group": account.pw_gid, "extra_groups": []}
            os.chown(directory, account.pw_uid, -1)

    def create(self) -> None:
        """Make the server's files, start it, and prepare roles and schema."""
        options = ["--auth=trust", "--username", self.user, "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        command = [f"{self._programs}/initdb", "-D", f"{self.directory}/data", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._switch)
        self.start()
        self.execute("CREATE ROLE atlas NOLOGIN")
        self.execute("CREATE ROLE atlas_a LOGIN PASSWORD 'irrelevant' IN ROLE atlas")
        self.execute("CREATE DATABASE template_atlas OWNER atlas")
        self.execute(KEEPER.read_text(), "template_atlas")
        template = Database.from_url(self.url("template_atlas", "atlas_a"), role="atlas")
        migrations.migrate(template)
        template.close()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._start()
        wait_for(self._answers, 30, f"PostgreSQL answers: {self.directory}/log")

    def _start(self) -> None:
        options = {"listen_addresses": "", "max_connections": "120"} | self.options
        with open(f"{self.directory}/log", "ab") as log:
            self.process = subprocess.Popen(
                [f"{self._programs}/postgres", "-D", f"{self.directory}/data", "-k", self.directory]
                + [word for name, value in options.items() for word in ("-c", f"{name}={value}")],
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
                **self._switch,
            )

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End the server; SIGINT is fast and orderly, SIGKILL is a crash."""
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def crash(self) -> None:
        """SIGKILL the server with all its processes."""
        assert self.process is not None
        backends = children(self.process.pid)
        self.stop(signal.SIGKILL)
        for pid in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def url(self, database: str, role: str | None = None) -> str:
        return f"postgresql+psycopg://{role or self.user}@/{database}?host={self.directory}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """The rows that a statement returns."""
        dsn = f"host={self.directory} user={self.user} dbname={database}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            done = connection.execute(statement)  # type: ignore[call-overload]
            return done.fetchall() if done.description else []

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            # What a killed server leaves behind may keep the next one out for a moment.
            self._start()
        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False


@contextmanager
def scratch_cluster(parent: str = "/tmp", options: Mapping[str, str] = FOR_TESTS) -> Iterator[Cluster]:
    """A server in a directory of its own under `parent`, gone afterwards."""
    directory = tempfile.mkdtemp(prefix="atlas-pg-", dir=parent)
    try:
        cluster = Cluster(directory, options)
        try:
            cluster.create()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
