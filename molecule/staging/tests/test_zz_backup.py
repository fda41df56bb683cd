"""Backups of PostgreSQL: to the second before a mistake, after the loss of the database; and what an intruder can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backuptest import (
    REPOSITORY,
    fails,
    full_disk,
    gone,
    ingest,
    labelled,
    other_credential,
    points,
    processed,
    run,
    unit,
    without_timers,
)
from labtest import Lab, sql

BACKUP, DATABASE, APP = "backup1", "db1", "app1"


@pytest.fixture(scope="module", autouse=True)
def quiet(lab: Lab) -> Iterator[None]:
    """No job starts by itself while backups are hurt and counted."""
    with without_timers(lab, BACKUP):
        yield


@pytest.fixture(scope="module")
def kept(lab: Lab, wait_for: Callable[..., Any]) -> dict[str, str]:
    """Documents that a labelled backup holds."""
    return labelled(lab, wait_for, ["a1", "a2", "a3"])


def test_a_drill_proves_backup_and_log(lab: Lab, kept: dict[str, str]) -> None:
    status, found = run(lab, BACKUP, "drill")
    assert status == 0, found
    assert found["sensitive"] >= len(kept) and found["searched"] is not None
    assert found["rpo_seconds"] < 60
    job = lab.http("GET", "/health").body["backup"]["jobs"]["drill"]
    assert job["ok"] is True and job["rto_seconds"] > 0


def test_a_mistake_is_undone_to_the_second_before_it(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, str]
) -> None:
    later = ingest(lab, ["b1", "b2"])
    processed(lab, later, wait_for)
    time.sleep(1.1)
    moment = sql(
        lab, DATABASE, "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')"
    )
    time.sleep(1.1)
    sql(lab, DATABASE, "DELETE FROM jobs; DELETE FROM documents")
    assert gone(lab, kept | later) == list(kept | later)
    done = lab.playbook("restore", "-e", "confirm=staging", "-e", f"backup_restore_time={moment}")
    assert done.returncode == 0, done.stdout + done.stderr
    processed(lab, kept | later, wait_for)


def test_this_very_second_can_be_restored_and_the_next_hour_cannot(lab: Lab, kept: dict[str, str]) -> None:
    """Perhaps nothing was committed since, by which PostgreSQL would know the second."""
    try:
        status, found = run(lab, BACKUP, "prepare", "probe", "--at", "$(date -u +%FT%TZ)")
        assert status == 0, found
        assert found["rows"]["documents"] >= len(kept)
    finally:
        assert run(lab, BACKUP, "discard", "probe")[0] == 0
    status, said = run(lab, BACKUP, "prepare", "probe", "--at", "$(date -u -d '1 hour' +%FT%TZ)")
    assert status == 1 and "lies ahead" in said, said


def test_a_lost_database_loses_nothing_whose_log_had_arrived(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, str]
) -> None:
    later = ingest(lab, ["c1", "c2", "c3"])
    wanted = sql(lab, DATABASE, "SELECT pg_current_wal_lsn()")
    arrived = f"SELECT count(*) FROM pg_stat_replication WHERE write_lsn >= '{wanted}'"
    wait_for(lambda: sql(lab, DATABASE, arrived) == "1", 60, "the log arrives in the promised time")
    # As if the base backup after the last restore had failed: an older one has to do, and the log of two timelines.
    newest = f"cd {REPOSITORY}/barman/atlas/base && sed -i s/^status=.*/status=FAILED/ $(ls | tail -n 1)/backup.info"
    assert lab.ssh(BACKUP, newest).returncode == 0
    lab.ssh(DATABASE, "systemctl kill -s KILL 'postgresql@*'; rm -rf /var/lib/postgresql/*/main")
    done = lab.playbook("restore", "-e", "confirm=staging")
    assert done.returncode == 0, done.stdout + done.stderr
    processed(lab, kept | later, wait_for)
    wait_for(lambda: run(lab, BACKUP, "increment")[0] == 0, 60, "the log of the restored database is received")


def test_an_app_host_holds_nothing_that_opens_or_reaches_the_repository(lab: Lab, kept: dict[str, str]) -> None:
    before = points(lab, BACKUP)
    address = lab.hosts[BACKUP]
    tried = lab.ssh(
        APP,
        f"find / -xdev -name 'id_*' -path '*/.ssh/*' 2>/dev/null; ls /etc/atlas/backup-credentials 2>/dev/null;"
        f" for port in 22 873 8000 5432; do timeout 3 bash -c '</dev/tcp/{address}/'$port 2>/dev/null && echo open $port; done; true",
    )
    assert tried.stdout == "", tried.stdout
    assert points(lab, BACKUP) == before


def test_a_stolen_app_host_can_neither_smuggle_nor_remove(lab: Lab, kept: dict[str, str]) -> None:
    before = points(lab, BACKUP)
    hostile = r"""#!/usr/bin/python3
import io, sys, tarfile
if sys.argv[1:2] != ["export"]:
    import runpy
    sys.exit(runpy.run_path("/root/agent")["main"](sys.argv[1:]))
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
info = tarfile.TarInfo("../../restic/config")
info.size = 4
out.addfile(info, io.BytesIO(b"junk"))
out.close()
"""
    lab.ssh(
        APP,
        f"cp -a /usr/local/sbin/atlas-backup-agent /root/agent; cat > /usr/local/sbin/atlas-backup-agent <<'END'\n{hostile}END\n",
    )
    try:
        status, said = run(lab, BACKUP, "take")
    finally:
        lab.ssh(APP, "cp -a /root/agent /usr/local/sbin/atlas-backup-agent")
    assert status == 1 and "has no place here" in said, said
    assert points(lab, BACKUP) == before
    assert run(lab, BACKUP, "check")[0] == 0


def test_a_wrong_password_and_a_full_disk_are_named(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, str]
) -> None:
    before = points(lab, BACKUP)
    with other_credential(lab, BACKUP, "restic_password", "not the password"):
        fails(lab, BACKUP, wait_for, "drill", "wrong password")
    with full_disk(lab, BACKUP):
        fails(lab, BACKUP, wait_for, "drill", "full disk")
    assert points(lab, BACKUP) == before


def test_a_backup_host_that_is_down_is_named(lab: Lab, kept: dict[str, str]) -> None:
    lab.operate("cut", lab.name, BACKUP)
    try:
        done = lab.playbook("backup", "-e", "ansible_ssh_retries=0", "-e", "ansible_ssh_timeout=5", timeout=120)
    finally:
        lab.operate("join", lab.name, BACKUP)
    assert done.returncode != 0 and BACKUP in done.stdout and "UNREACHABLE" in done.stdout


def test_at_last_all_is_well(lab: Lab, kept: dict[str, str], wait_for: Callable[..., Any]) -> None:
    """The backup host has just come back: for some seconds its neighbours may not be in reach yet."""
    wait_for(lambda: unit(lab, BACKUP, "increment") == "", 60, "the database is in reach again")
    for job in ("daily", "check", "drill"):
        assert unit(lab, BACKUP, job) == ""
    assert lab.http("GET", "/health").body["backup"]["problems"] == []
