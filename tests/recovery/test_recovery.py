"""Whatever is destroyed while documents arrive comes back from the repository, but for the last moments. About an hour.

    make recovery                                     # both stores, few documents
    ATLAS_RECOVERY_DOCUMENTS=100000 make recovery     # as make test-full
    PYTEST_ADDOPTS="-k 'Postgresql and (p99 or mistake or data_directory)'" make recovery       # a part

Each store has a lab of its own, in the shape of staging (PostgreSQL) or on one host (SQLite). In it, documents are taken in,
then more of them one by one, and at a moment drawn anew each time something is lost: every document by a mistake, the data
directory, the host of the database, every host. What is asserted, each time: nothing that had been archived is lost, no document
was changed, each was finished exactly once. What was measured is printed, and kept in reports/recovery-STORE.json.

With LAB_NAME an existing lab serves, and stays: LAB_NAME=mine PYTEST_ADDOPTS="-k Sqlite" make recovery
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ansible.module_utils.backup_core import parse_time, rfc3339
from backuptest import (
    DAMAGE,
    JOB_SECONDS,
    OTHER_KEY,
    REPOSITORY,
    damaged,
    other_credential,
    points,
    refused,
    run,
    shown,
    without_timers,
)
from labtest import PROJECT, Lab, poll, sql

from tests.load.traffic import Traffic
from tests.load.verdict import percentiles
from tests.recovery.ledger import Findings, Ledger

DOCUMENTS = int(os.environ.get("ATLAS_RECOVERY_DOCUMENTS", "1000"))
"""Taken in before anything is destroyed."""
RATE = 20.0
"""Documents per second while it is."""
LOG_SECONDS = 60.0
"""What PostgreSQL may lose."""
INTERVAL_SECONDS = 20.0
"""Between two copies of a SQLite store here; it may lose that, and what a copy takes."""
TIMER_SECONDS = 5.0
"""By which the timer may be late (AccuracySec)."""
QUICK = ["-e", f"backup_sqlite_interval={INTERVAL_SECONDS:.0f}s"]
CALM_SECONDS = 60.0
MOVE_SECONDS = 1800.0 + DOCUMENTS / 20
"""In which a repository is carried off, or brought back."""
PLAYBOOK_SECONDS = 3600.0
COPY = f"""systemctl stop atlas-backup-log 2> /dev/null
flock {REPOSITORY}/lock tar -C / --exclude={REPOSITORY[1:]}/scratch -cf - {REPOSITORY[1:]}
status=$?
systemctl start atlas-backup-log 2> /dev/null
[ $status -le 1 ]"""
"""As docs/how-to/backups.md says. tar ends with 1 where a file changed meanwhile: a report of the job before it."""
BACKUP_LOOP = """rm -f /run/proof-ends
while [ ! -e /run/proof-ends ]; do atlas-backup take --base > /dev/null || exit 1; echo taken; done"""
POINT = """
- hosts: app
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: backup, tasks_from: restore_point}
      vars: {backup_label: by-hand}
"""
pytestmark = pytest.mark.timeout(4 * 3600)


class Outcome(NamedTuple):
    """What was *found* of what was acknowledged until *at* (Unix time), *rpo* seconds of that lost, what the playbook *said*.

    *took*: seconds of the last increment before.
    """

    found: Findings
    at: float
    rpo: float
    said: str
    took: float


class Stage:
    """One store's lab: how it is hurt and mended, and what that showed."""

    def __init__(self, environment: str, lab: Lab, backup: str, app: str, database: str | None) -> None:
        self.environment, self.lab, self.backup, self.database = environment, lab, backup, database
        self.ledger = Ledger(lab, app, database)
        self.figures: dict[str, Any] = {"documents": DOCUMENTS}
        self.daily = ""
        """What the daily check said when the lab was new."""

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

    def carry_off(self, file: Path) -> None:
        """Copy the repository to *file*, as one does to a disk that is kept elsewhere."""
        with file.open("wb") as out:
            subprocess.run(
                self.lab.command(self.backup, "bash", "-"),
                input=COPY.encode(),
                stdout=out,
                check=True,
                timeout=MOVE_SECONDS,
            )

    def bring_back(self, file: Path) -> None:
        """Put that copy in place on the new backup host, as root's: nobody knows there whose it was."""
        with file.open("rb") as source:
            subprocess.run(
                self.lab.command(self.backup, "tar", "-C", "/", "--no-same-owner", "-xf", "-"),
                stdin=source, check=True, timeout=MOVE_SECONDS,
            )  # fmt: skip

    def playbook(self, name: str, *given: str) -> str:
        """Run a playbook that has to succeed; its output."""
        done = self.lab.playbook(name, *given, timeout=PLAYBOOK_SECONDS)
        assert done.returncode == 0, f"{name}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        return done.stdout

    # Watching

    def check_new(self) -> None:
        """Hold the daily check on a lab that has just been raised."""
        reported = [job for job, entry in self.report().items() if "at" in entry]
        done = self.lab.playbook("ops_daily")
        self.daily = done.stdout + done.stderr
        self.note("daily check when new", {"exit_code": done.returncode, "backups_that_had_reported": reported})

    def report(self) -> dict[str, Any]:
        """Return what the backup host reports: job to its last run."""
        status, found = run(self.lab, self.backup, "report")
        assert status == 0, found
        return dict(found.get("jobs") or {})

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
        hurt: Callable[[], float | None],
        command: str,
        mend: Callable[[], str],
        replace: Callable[[], None] | None = None,
        serves: bool = False,
    ) -> Outcome:
        """Do *hurt* under load, *replace* the hosts that are gone (not counted), and *mend* it with *command*.

        hurt: returns the Unix time until which nothing need be lost; None for that of the last acknowledgement.
        serves: the service goes on afterwards, and with what is lost.
        """
        moment = random.SystemRandom().uniform(3, 25)
        with Traffic(self.lab.folder / "access.json", RATE, slow_seconds=0) as traffic:
            time.sleep(moment)
            took = self.report().get("increment", {}).get("seconds", 0.0)
            began = time.time()
            until = hurt()
            gone_at = time.time()
            time.sleep(2)
        self.ledger.add(traffic)
        good = [one for one in traffic.outcomes if one.good]
        assert good, "nothing was under way"
        late = [one for one in good if one.began > gone_at]
        assert serves or not late, f"{len(late)} documents were acknowledged when their store was gone"
        (replace or self.replace)()
        said, rto = self.served_after(mend)
        self.ledger.settle(120 + len(self.ledger.acknowledged) / 20)
        found = self.ledger.compare()
        rpo = found.rpo(until or max(one.ended for one in good))
        figures = {
            "command": command, "moment": round(moment, 2), "acknowledged_under_load": len(good), "kept": found.kept,
            "lost": len(found.lost), "rpo_seconds": round(rpo, 2), "rto_seconds": round(rto, 1),
            "changed": len(found.changed), "not_once": len(found.not_once), "unanswered": found.unanswered,
        }  # fmt: skip
        self.note(name, figures)
        assert found.changed == [] and found.not_once == [], figures
        return Outcome(found, until or began, rpo, said, took)

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


def base_file(lab: Lab) -> str:
    """Where the newest base backup has the table of documents."""
    base = lab.ssh("backup1", f"ls -d {REPOSITORY}/barman/atlas/base/*/ | tail -1").stdout.strip()
    place = sql(lab, "db1", "SELECT pg_relation_filepath('documents')")
    return f"{base}data/{place}"


def log_file(lab: Lab) -> str:
    """The newest segment of the log that is closed."""
    return lab.ssh("backup1", f"ls {REPOSITORY}/barman/atlas/wals/*/{'?' * 24} | tail -1").stdout.strip()


@contextlib.contextmanager
def schema(lab: Lab) -> Iterator[None]:
    """The store says that it was migrated beyond the release."""
    sql(
        lab, "db1", "UPDATE alembic_version SET version_num = '9999';"
        "INSERT INTO schema_revisions (revision, phase, applied_at) VALUES ('9999', 'contract', 1)",
    )  # fmt: skip
    try:
        yield
    finally:
        sql(
            lab, "db1", "DELETE FROM schema_revisions WHERE revision = '9999';"
            "UPDATE alembic_version SET version_num = (SELECT max(revision) FROM schema_revisions)",
        )  # fmt: skip


TABLE_NOT_WHOLE = [(base_file, "missing"), (base_file, "truncated")]
HURTS = {"key": lambda lab: other_credential(lab, "backup1", "fernet_keys", OTHER_KEY), "schema": schema}


@pytest.fixture(scope="class")
def postgresql() -> Iterator[Stage]:
    """Five hosts with PostgreSQL, and documents in it; the backup host has a base backup of before most of them."""
    with raised("staging", "postgresql") as lab:
        stage = Stage("staging", lab, "backup1", "app1", "db1")
        stage.check_new()
        stage.playbook("backup")
        stage.figures["documents_per_second"] = round(stage.ledger.fill(DOCUMENTS), 1)
        yield stage


@pytest.fixture(scope="class")
def sqlite() -> Iterator[Stage]:
    """One host with SQLite, and documents in it, which is copied often."""
    with raised("development", "sqlite") as lab:
        stage = Stage("development", lab, "dev1", "dev1", None)
        stage.check_new()
        stage.playbook("site", *QUICK)
        stage.figures["documents_per_second"] = round(stage.ledger.fill(DOCUMENTS), 1)
        status, found = run(lab, "dev1", "increment")
        assert status == 0, found
        yield stage


class TestPostgresql:
    """The log arrives as it is written."""

    def test_the_daily_check_of_a_new_environment_needs_nobody(self, postgresql: Stage) -> None:
        needs_nobody(postgresql)

    def test_p99_of_ingestion_under_a_backup_that_never_ends(self, postgresql: Stage) -> None:
        latency_under_backup(postgresql)

    @pytest.mark.parametrize(
        ("hurt", "cause"),
        [
            ("key", "need a key that is not in the keyring"),
            ("schema", "the schema is at 9999"),
        ],
    )
    def test_a_drill_fails(self, postgresql: Stage, hurt: str, cause: str) -> None:
        """/health is asked afterwards: on a schema that it cannot read the service takes no request."""
        lab = postgresql.lab
        with without_timers(lab, postgresql.backup):
            with HURTS[hurt](lab):
                refused(lab, postgresql.backup, "drill", cause)
            poll(lambda: shown(lab, "drill", cause), 60, "/health names the drill that failed")
            postgresql.well()

    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("part", [base_file, log_file])
    def test_damage_is_named_and_destroys_nothing(
        self, postgresql: Stage, part: Callable[[Lab], str], damage: str
    ) -> None:
        """What restic keeps is damaged in molecule/default/tests/test_backup.py."""
        lab, host = postgresql.lab, postgresql.backup
        with without_timers(lab, host):
            # Else autovacuum may write the page after the backup, and the log mends it.
            sql(lab, "db1", "VACUUM documents")
            assert run(lab, host, "take", "--base")[0] == 0
            before = points(lab, host)
            with damaged(lab, host, part(lab), damage, 6000):
                refused(lab, host, "check", "damaged repository")
                # PostgreSQL has words of its own for a table that is not whole.
                refused(lab, host, "drill", "" if (part, damage) in TABLE_NOT_WHOLE else "damaged repository")
            assert set(before) <= set(points(lab, host))
            assert run(lab, host, "check")[0] == 0
            postgresql.well()

    def test_a_backup_host_that_was_never_provisioned_is_named(self, postgresql: Stage, tmp_path: Path) -> None:
        lab, program = postgresql.lab, "/usr/local/sbin/atlas-backup"
        book = tmp_path / "point.yml"
        book.write_text(POINT)
        _ran(lab, postgresql.backup, f"mv {program} /root/")
        try:
            done = lab.run("ansible-playbook", "-i", str(lab.inventory), str(book))
        finally:
            _ran(lab, postgresql.backup, f"mv /root/atlas-backup {program}")
        assert done.returncode != 0
        assert "No restore point on backup1: it has no backup program yet. Run playbooks/site.yml" in done.stdout

    def test_a_mistake(self, postgresql: Stage) -> None:
        assert a_mistake(postgresql).rpo == 0

    def test_the_data_directory(self, postgresql: Stage) -> None:
        lab = postgresql.lab
        outcome = postgresql.survive(
            "data directory",
            lambda: _ran(lab, "db1", "systemctl kill -s KILL 'postgresql@*'; rm -rf /var/lib/postgresql/*/main"),
            "restore.yml", lambda: postgresql.playbook("restore", "-e", "confirm=staging"),
        )  # fmt: skip
        assert outcome.rpo <= LOG_SECONDS
        postgresql.well()

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
        assert outcome.rpo <= LOG_SECONDS
        postgresql.well()

    def test_every_host_but_the_backup_host(self, postgresql: Stage) -> None:
        hosts = [host for host in postgresql.lab.hosts if host != postgresql.backup]
        outcome = postgresql.survive(
            "every host but the backup host", lambda: postgresql.destroy(hosts),
            "recover.yml", lambda: postgresql.playbook("recover", "-e", "confirm=staging"),
        )  # fmt: skip
        assert outcome.rpo <= LOG_SECONDS
        postgresql.well()

    def test_every_host_with_a_copy_of_the_repository(self, postgresql: Stage, tmp_path: Path) -> None:
        everything_with_a_copy(postgresql, tmp_path, [])

    def test_the_quarterly_exercise(self, postgresql: Stage) -> None:
        quarterly_exercise(postgresql)


class TestSqlite:
    """The store is copied every so often."""

    def test_the_daily_check_of_a_new_environment_needs_nobody(self, sqlite: Stage) -> None:
        needs_nobody(sqlite)

    def test_p99_of_ingestion_under_a_backup_that_never_ends(self, sqlite: Stage) -> None:
        latency_under_backup(sqlite)

    def test_a_mistake(self, sqlite: Stage) -> None:
        no_more_than_an_interval(sqlite, a_mistake(sqlite))

    def test_the_data_directory(self, sqlite: Stage) -> None:
        lab = sqlite.lab
        kill = "systemctl kill -s KILL 'atlas-*@blue.service' 'atlas-*@green.service'; rm -rf /var/lib/atlas/*"
        outcome = sqlite.survive(
            "data directory", lambda: _ran(lab, "dev1", kill),
            "restore.yml", lambda: sqlite.playbook("restore", "-e", "confirm=development"),
        )  # fmt: skip
        no_more_than_an_interval(sqlite, outcome)
        sqlite.well()

    def test_the_whole_host_with_a_copy_of_the_repository(self, sqlite: Stage, tmp_path: Path) -> None:
        everything_with_a_copy(sqlite, tmp_path, QUICK)

    def test_the_quarterly_exercise(self, sqlite: Stage) -> None:
        quarterly_exercise(sqlite)


def needs_nobody(stage: Stage) -> None:
    """A new environment has an hour until its backups have to have reported; `make up` ends before the first of them."""
    assert stage.figures["daily check when new"]["exit_code"] == 0, stage.daily
    assert "Nothing needs a person." in stage.daily


def quarterly_exercise(stage: Stage) -> None:
    """It has a lab of its own, beside the one that stands for the environment."""
    said = stage.playbook("ops_quarterly")
    assert "Nothing needs a person." in said
    report = json.loads(max((stage.lab.folder / "ops").glob("quarterly-*.json")).read_text())
    steps, documents = (section["rows"][1:] for section in report["sections"])
    stage.note("quarterly exercise", {step[0]: float(step[1]) for step in steps})
    before, after, lost, changed = map(int, documents[0])
    assert before == after > 100 and lost == changed == 0
    assert not (PROJECT / ".lab" / f"quarterly-{stage.environment}").exists()


def a_mistake(stage: Stage) -> Outcome:
    """Every document is deleted, and the service goes on; the store returns to the second before that."""
    at = 0

    def hurt() -> float:
        nonlocal at
        at = math.ceil(time.time())
        time.sleep(at + 0.1 - time.time())
        stage.ledger.delete_all()
        return at

    def mend() -> str:
        return stage.playbook(
            "restore", "-e", f"confirm={stage.environment}", "-e", f"backup_restore_time={rfc3339(at)}"
        )

    outcome = stage.survive("a mistake", hurt, "restore.yml -e backup_restore_time", mend, lambda: None, serves=True)
    stage.well()
    return outcome


def latency_under_backup(stage: Stage) -> None:
    """Compare the latency of POST without a backup and under one after the other. A report, and no target: but no request may fail."""
    lab, found = stage.lab, {}
    with (
        without_timers(lab, stage.backup),
        Traffic(lab.folder / "access.json", RATE, slow_seconds=0) as traffic,
    ):
        time.sleep(CALM_SECONDS)
        began = time.time()
        backing_up = lab.start(stage.backup, BACKUP_LOOP)
        time.sleep(CALM_SECONDS)
        ended = time.time()
        lab.ssh(stage.backup, "touch /run/proof-ends")
        taken = backing_up.communicate(timeout=JOB_SECONDS)[0].split().count("taken")
    stage.ledger.add(traffic)
    for name, since, until in (("without", began - CALM_SECONDS, began), ("under backup", began, ended)):
        values = percentiles([one.latency for one in traffic.outcomes if since <= one.due < until])
        found[name] = {key: round(1000 * value, 1) for key, value in values.items()}
    stage.note("latency of POST in ms", {**found, "backups": taken})
    # The timers begin anew.
    assert run(lab, stage.backup, "increment")[0] == 0
    assert taken > 0 and backing_up.returncode == 0
    assert traffic.judge().good, traffic.judge()


def everything_with_a_copy(stage: Stage, folder: Path, given: list[str]) -> None:
    """Nothing is left but a copy of the repository, in which the vault file is as well, and the password."""
    copy = folder / "repository.tar"
    vault = stage.lab.inventory / "group_vars" / "all" / "vault.yml"

    def destroy() -> float:
        copied_at = time.time()
        stage.carry_off(copy)
        stage.destroy(list(stage.lab.hosts))
        vault.unlink()
        shutil.rmtree(PROJECT / ".cache" / "recovered", ignore_errors=True)
        return copied_at

    def mend() -> str:
        stage.bring_back(copy)
        return stage.playbook("recover", "-e", f"confirm={stage.environment}", *given)

    def replace() -> None:
        escrow = ["tar", "-xOf", str(copy), f"{REPOSITORY[1:]}/escrow/vault.yml"]
        vault.write_bytes(subprocess.run(escrow, check=True, capture_output=True).stdout)
        stage.replace()

    outcome = stage.survive("every host", destroy, "recover.yml", mend, replace)
    if stage.database:
        assert outcome.rpo <= LOG_SECONDS
    else:
        no_more_than_an_interval(stage, outcome)
    stage.well()


def no_more_than_an_interval(stage: Stage, outcome: Outcome) -> None:
    """Assert that all is there that was acknowledged before the copy that was restored, and that it was as new as promised."""
    match = re.search(r"is at ([0-9TZ:-]+)\. What was replaced", outcome.said)
    assert match, outcome.said
    copied = parse_time(match[1])
    assert all(lost >= copied for lost in outcome.found.lost)
    # The copy under way may have been slower than the one before.
    assert outcome.at - copied <= INTERVAL_SECONDS + TIMER_SECONDS + 2 * outcome.took + 1, (
        outcome.at,
        copied,
        outcome.took,
    )


def _ran(lab: Lab, host: str, script: str) -> None:
    done = lab.ssh(host, script)
    assert done.returncode == 0, done.stderr


def _half_received(lab: Lab) -> str:
    """Name, size and digest of the segment that the backup host was receiving."""
    found = lab.ssh(
        "backup1", f"cd {REPOSITORY}/barman/atlas/streaming && sha256sum *.partial && stat -c %s *.partial"
    ).stdout
    assert ".partial" in found
    return found
