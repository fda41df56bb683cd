"""Backups of a SQLite store: destroyed and restored; every kind of damage is named and destroys nothing good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backuptest import (
    DAMAGE,
    LABEL,
    OTHER_KEY,
    REPOSITORY,
    damaged,
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
from labtest import Lab

HOST = "dev1"
REFUSES = """#!/bin/sh
systemctl start $(ls /etc/systemd/system/multi-user.target.wants | grep atlas@) atlas-api@blue.service atlas-api@green.service
systemctl is-active atlas-api@blue.service atlas-api@green.service > /root/started
echo refused >&2
exit 1
"""


@pytest.fixture(scope="module", autouse=True)
def quiet(lab: Lab) -> Iterator[None]:
    """No job starts by itself while backups are hurt and counted."""
    with without_timers(lab, HOST):
        yield


@pytest.fixture(scope="module")
def kept(lab: Lab, wait_for: Callable[..., Any]) -> dict[str, dict[str, str]]:
    """Documents by the last thing that saved them: a label, an increment, or nothing."""
    named = labelled(lab, wait_for, ["a1", "a2", "a3"])
    saved = ingest(lab, ["b1", "b2"])
    processed(lab, saved, wait_for)
    assert unit(lab, HOST, "increment") == ""
    return {"labelled": named, "saved": saved, "lost": ingest(lab, ["c1"])}


def test_a_destroyed_store_comes_back_as_of_the_last_increment(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]
) -> None:
    lab.ssh(HOST, "systemctl kill -s KILL 'atlas-*@blue.service' 'atlas-*@green.service'; rm -rf /var/lib/atlas/*")
    done = lab.playbook("restore", "-e", "confirm=development")
    assert done.returncode == 0, done.stdout + done.stderr
    processed(lab, kept["labelled"] | kept["saved"], wait_for)
    assert gone(lab, kept["lost"]) == list(kept["lost"])
    assert lab.http("POST", "/v1/documents", {"content": "after it", "content_type": "text/plain"}).status in (200, 202)


def test_a_label_returns_its_moment(lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]) -> None:
    assert lab.playbook("restore", "-e", f"backup_restore_label={LABEL}").returncode != 0, "it asked nobody"
    assert gone(lab, kept["saved"]) == []
    done = lab.playbook("restore", "-e", "confirm=development", "-e", f"backup_restore_label={LABEL}")
    assert done.returncode == 0, done.stdout + done.stderr
    processed(lab, kept["labelled"], wait_for)
    assert gone(lab, kept["saved"]) == list(kept["saved"])
    safety = lab.ssh(HOST, "ls /var/lib/atlas/before-restore-*/atlas.db").stdout.split()
    assert len(safety) == 1


def test_a_restore_that_the_service_refuses_undoes_itself(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]
) -> None:
    later = ingest(lab, ["d1"])
    processed(lab, later, wait_for)
    # It is asked when the store is in place and not accepted yet. What a boot starts then must not serve it.
    lab.ssh(
        HOST,
        f"mv /usr/local/bin/atlas /root/atlas; cat > /usr/local/bin/atlas <<'END'\n{REFUSES}END\nchmod 755 /usr/local/bin/atlas",
    )
    try:
        done = lab.playbook("restore", "-e", "confirm=development", "-e", f"backup_restore_label={LABEL}")
    finally:
        lab.ssh(HOST, "mv /root/atlas /usr/local/bin/atlas")
    assert done.returncode != 0 and "Nothing was restored; the store is what it was" in done.stdout, done.stdout
    assert "refused" in done.stdout
    assert set(lab.ssh(HOST, "cat /root/started").stdout.split()) == {"inactive"}
    processed(lab, kept["labelled"] | later, wait_for)
    left = lab.ssh(HOST, "ls -d /var/lib/atlas/restore-incoming /var/lib/atlas-restore/door.json 2>/dev/null").stdout
    assert left == ""


def test_a_drill_fails_without_the_key(lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]) -> None:
    with other_credential(lab, HOST, "fernet_keys", OTHER_KEY):
        fails(lab, HOST, wait_for, "drill", "need a key that is not in the keyring")


def test_a_drill_fails_on_a_schema_that_the_release_cannot_read(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]
) -> None:
    change = """#python
import sqlite3
store = sqlite3.connect("/var/lib/atlas/atlas.db", timeout=20)
if {new!r}:
    store.execute("UPDATE alembic_version SET version_num = ?", ({new!r},))
    store.execute("INSERT INTO schema_revisions (revision, phase, applied_at) VALUES (?, 'contract', 1)", ({new!r},))
else:
    store.execute("DELETE FROM schema_revisions WHERE revision = '9999'")
    store.execute("UPDATE alembic_version SET version_num = (SELECT max(revision) FROM schema_revisions)")
store.commit()
"""
    try:
        assert lab.ssh(HOST, change.format(new="9999")).returncode == 0
        assert run(lab, HOST, "increment")[0] == 0
    finally:
        assert lab.ssh(HOST, change.format(new="")).returncode == 0
    fails(lab, HOST, wait_for, "drill", "the schema is at 9999")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_named_and_seen_by_the_drill(lab: Lab, wait_for: Callable[..., Any], damage: str) -> None:
    """It is done to the oldest file of the repository: that holds the release, which no backup is without."""
    before = points(lab, HOST)
    pack = lab.ssh(HOST, f"ls -tr {REPOSITORY}/restic/data/*/* | head -1").stdout.strip()
    assert pack
    with damaged(lab, HOST, pack, damage, 20000):
        fails(lab, HOST, wait_for, "check", "damaged repository")
        if damage == "flipped":
            fails(lab, HOST, wait_for, "drill", "damaged repository")
        assert points(lab, HOST) == before


def test_a_wrong_password_is_named_and_what_failed_and_is_overdue_is_shown(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]
) -> None:
    age = """#python
import json, pathlib
path = pathlib.Path("/var/lib/atlas-backup/status.json")
report = json.loads(path.read_text())
report["expected_since"] = 1.0
report["jobs"]["check"] |= {"ok": True, "succeeded_at": 1.0}
path.write_text(json.dumps(report))
"""
    before = points(lab, HOST)
    assert lab.ssh(HOST, age).returncode == 0
    with other_credential(lab, HOST, "restic_password", "not the password"):
        fails(lab, HOST, wait_for, "increment", "wrong password")
    assert points(lab, HOST) == before
    assert "check is overdue: last success 1970-01-01T00:00:01" in str(lab.http("GET", "/health").body["backup"])
    metrics = lab.http("GET", "/metrics").body
    assert 'atlas_backup_ok{job="increment"} 0.0' in metrics and 'atlas_backup_overdue{job="check"} 1.0' in metrics
    shown = lab.playbook("status").stdout
    assert "! increment failed: storing dev1: wrong password" in shown, shown
    assert "! check is overdue: last success 1970-01-01T00:00:01Z" in shown, shown


def test_a_full_disk_is_named(lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]) -> None:
    before = points(lab, HOST)
    with full_disk(lab, HOST):
        fails(lab, HOST, wait_for, "increment", "full disk")
    assert points(lab, HOST) == before


def test_a_lost_repository_is_named_and_not_made_anew(
    lab: Lab, wait_for: Callable[..., Any], kept: dict[str, dict[str, str]]
) -> None:
    lab.ssh(HOST, f"mv {REPOSITORY}/restic/config /root/config")
    try:
        assert "missing repository" in run(lab, HOST, "init")[1]
        fails(lab, HOST, wait_for, "increment", "missing repository")
    finally:
        lab.ssh(HOST, f"mv /root/config {REPOSITORY}/restic/config")


def test_mended_all_is_well_and_a_drill_proves_the_newest_backup(lab: Lab, kept: dict[str, dict[str, str]]) -> None:
    for job in ("increment", "daily", "check"):
        assert unit(lab, HOST, job) == ""
    status, found = run(lab, HOST, "drill")
    assert status == 0, found
    assert found["sensitive"] >= len(kept["labelled"])
    assert found["searched"] is not None
    health = lab.http("GET", "/health").body
    assert health["status"] == "ok", health
    job = health["backup"]["jobs"]["drill"]
    assert job["ok"] is True and job["problem"] is None
    assert job["rto_seconds"] > 0 and job["rpo_seconds"] < 600
    assert 'atlas_backup_ok{job="drill"} 1.0' in lab.http("GET", "/metrics").body
