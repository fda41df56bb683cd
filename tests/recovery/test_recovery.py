"""Whatever is destroyed while documents arrive comes back from the repository, but for the last moments. Half an hour.

    make recovery                                     # few documents
    ATLAS_RECOVERY_DOCUMENTS=100000 make recovery     # as make test-full

In a lab in the shape of staging documents are taken in, then more of them one by one, and at a moment drawn anew each time
something is destroyed: the host of the database, every host but the backup host. What is asserted, each time: nothing that had
been archived is lost, no document was changed, each was finished exactly once. What was measured is printed, and kept in reports/recovery-STORE.json.

With LAB_NAME an existing lab serves, and stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from backuptest import REPOSITORY, run
from labtest import PROJECT, Lab, sql

from tests.load.traffic import Traffic
from tests.recovery.ledger import Findings, Ledger

DOCUMENTS = int(os.environ.get("ATLAS_RECOVERY_DOCUMENTS", "1000"))
"""Taken in before anything is destroyed."""
RATE = 20.0
"""Documents per second while it is."""
LOG_SECONDS = 60.0
"""What PostgreSQL may lose."""
PLAYBOOK_SECONDS = 3600.0
pytestmark = pytest.mark.timeout(4 * 3600)


class Outcome(NamedTuple):
    """What was *found*, when destruction began, when the *last* document was acknowledged (Unix times), what the playbook *said*."""

    found: Findings
    destroyed_at: float
    last: float
    said: str


class Stage:
    """One store's lab: how it is hurt and mended, and what that showed."""

    def __init__(self, environment: str, lab: Lab, backup: str, app: str, database: str | None) -> None:
        self.environment, self.lab, self.backup, self.database = environment, lab, backup, database
        self.ledger = Ledger(lab, app, database)
        self.figures: dict[str, Any] = {"documents": DOCUMENTS}

    # Hurting

    def destroy(self, hosts: Sequence[str]) -> None:
        """Let *hosts* vanish at once, with all that is on them."""
        with ThreadPoolExecutor(len(hosts)) as pool:
            for done in pool.map(lambda host: self.lab.operate("destroy", self.lab.name, host), hosts):
                assert done.returncode == 0, done.stderr

    def replace(self) -> None:
        """Put an empty host in the place of each that is gone."""
        named = ["-e", f"lab_environment={self.environment}", "-e", f"lab_name={self.lab.name}"]
        done = self.lab.run("ansible-playbook", "-i", "localhost,", "playbooks/lab.yml", *named)
        assert done.returncode == 0, done.stdout + done.stderr

    def playbook(self, name: str, *given: str) -> str:
        """Run a playbook that has to succeed; its output."""
        done = self.lab.playbook(name, *given, timeout=PLAYBOOK_SECONDS)
        assert done.returncode == 0, f"{name}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        return done.stdout

    # Watching

    def served_after(self, mend: Callable[[], str]) -> tuple[str, float]:
        """Run *mend*; its output, and after how many seconds a document from before was served again."""
        known = next(iter(self.ledger.acknowledged))
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(mend)
            while True:
                ended = running.done()
                if self.lab.http("GET", f"/v1/documents/{known}", timeout=5).status == 200:
                    break
                if ended:
                    running.result()
                    pytest.fail("the playbook is done, and a document that was archived is not served")
                time.sleep(0.5)
            seconds = time.monotonic() - began
            return running.result(), seconds

    def survive(
        self,
        name: str,
        destroy: Callable[[], None],
        command: str,
        mend: Callable[[], str],
        replace: Callable[[], None] | None = None,
    ) -> Outcome:
        """Destroy something under load, *replace* the hosts that are gone (not counted), and *mend* it with *command*."""
        moment = random.SystemRandom().uniform(3, 25)
        with Traffic(self.lab.folder / "access.json", RATE, slow_seconds=0) as traffic:
            time.sleep(moment)
            destroyed_at = time.time()
            destroy()
            gone_at = time.time()
            time.sleep(2)
        self.ledger.add(traffic)
        late = [one for one in traffic.outcomes if one.good and one.began > gone_at]
        assert not late, f"{len(late)} documents were acknowledged when their store was gone"
        acknowledged = [one.ended for one in traffic.outcomes if one.good]
        assert acknowledged, "nothing was under way"
        last = max(acknowledged)
        (replace or self.replace)()
        said, rto = self.served_after(mend)
        self.ledger.settle(120 + len(self.ledger.acknowledged) / 20)
        found = self.ledger.compare()
        figures = {
            "command": command, "moment": round(moment, 2), "acknowledged_under_load": len(acknowledged), "kept": found.kept,
            "lost": len(found.lost), "rpo_seconds": round(found.rpo(last), 2), "rto_seconds": round(rto, 1),
            "changed": len(found.changed), "not_once": len(found.not_once), "unanswered": found.unanswered,
        }  # fmt: skip
        self.note(name, figures)
        assert found.changed == [] and found.not_once == [], figures
        return Outcome(found, destroyed_at, last, said)

    def note(self, name: str, figures: dict[str, Any]) -> None:
        """Print *figures* and keep them."""
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
        self.figures[name] = figures
        file = PROJECT / "reports" / f"recovery-{'postgresql' if self.database else 'sqlite'}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(self.figures, indent=1) + "\n")

    def well(self) -> None:
        """Assert that the service takes in documents, and that its backups go on: a drill on the newest one."""
        body = {"content": f"after it, {time.time()}", "content_type": "text/plain"}
        assert self.lab.http("POST", "/v1/documents", body).status == 202
        status, found = run(self.lab, self.backup, "increment")
        assert status == 0, found
        status, found = run(self.lab, self.backup, "drill")
        assert status == 0, found
        assert found["sensitive"] >= self.ledger.sensitive()


@contextlib.contextmanager
def raised(environment: str, store: str) -> Iterator[Lab]:
    """A lab for this module, gone afterwards; or the one that LAB_NAME names."""
    name = os.environ.get("LAB_NAME")
    if name:
        yield Lab.open(name)
        return
    name = f"test-recovery-{store}"
    try:
        subprocess.run(["make", "up", f"ENV={environment}", f"LAB={name}"], cwd=PROJECT, check=True, stdout=sys.stderr)
        yield Lab.open(name)
    finally:
        subprocess.run(["make", "down", f"LAB={name}"], cwd=PROJECT, check=True, capture_output=True)


@pytest.fixture(scope="class")
def postgresql() -> Iterator[Stage]:
    """Five hosts with PostgreSQL, and documents in it; the backup host has a base backup of before most of them."""
    with raised("staging", "postgresql") as lab:
        stage = Stage("staging", lab, "backup1", "app1", "db1")
        stage.playbook("backup")
        stage.figures["documents_per_second"] = round(stage.ledger.fill(DOCUMENTS), 1)
        yield stage


class TestPostgresql:
    """The log arrives as it is written."""

    def test_the_database_host(self, postgresql: Stage) -> None:
        """Before it is recovered it is provisioned, as one might who does not think of backups: its new log takes no old one's place."""
        lab = postgresql.lab

        def mend() -> str:
            kept = _half_received(lab)
            postgresql.playbook("site")
            status, said = run(lab, "backup1", "increment")
            assert status == 1 and "is not the one that is backed up here" in said, said
            sql(lab, "db1", "SELECT pg_switch_wal()")
            assert _half_received(lab) == kept
            return postgresql.playbook("recover", "-e", "confirm=staging")

        outcome = postgresql.survive(
            "database host", lambda: postgresql.destroy(["db1"]), "site.yml, recover.yml", mend
        )
        assert outcome.found.rpo(outcome.last) <= LOG_SECONDS
        postgresql.well()

    def test_every_host_but_the_backup_host(self, postgresql: Stage) -> None:
        hosts = [host for host in postgresql.lab.hosts if host != postgresql.backup]
        outcome = postgresql.survive(
            "every host but the backup host", lambda: postgresql.destroy(hosts),
            "recover.yml", lambda: postgresql.playbook("recover", "-e", "confirm=staging"),
        )  # fmt: skip
        assert outcome.found.rpo(outcome.last) <= LOG_SECONDS
        postgresql.well()


def _half_received(lab: Lab) -> str:
    """Name, size and digest of the segment that the backup host was receiving."""
    found = lab.ssh(
        "backup1", f"cd {REPOSITORY}/barman/atlas/streaming && sha256sum *.partial && stat -c %s *.partial"
    ).stdout
    assert ".partial" in found
    return found
