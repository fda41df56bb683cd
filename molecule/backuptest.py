"""What the checks of backups share: documents to lose, the backup program, and ways to hurt a repository."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from labtest import Lab

REPOSITORY = "/var/lib/atlas-backup"
JOB_SECONDS = 600 + int(os.environ.get("ATLAS_RECOVERY_DOCUMENTS", "0")) / 20
"""What one command of the backup host may take; a drill reads all documents, and the log of all that came after its base backup."""
RUN = uuid.uuid4().hex[:8]
"""Sets the documents and labels of this run apart from those of an earlier one on the same lab."""
LABEL = f"kept-{RUN}"
OTHER_KEY = base64.urlsafe_b64encode(b"k" * 32).decode()
"""A Fernet key that nobody uses."""
TIMERS = " ".join(f"atlas-backup-{job}.timer" for job in ("increment", "daily", "check", "drill"))
DAMAGE = {
    "flipped": "printf XXXX | dd of={file} bs=1 seek={at} conv=notrunc status=none",
    "missing": "rm {file}",
    "truncated": "truncate -s {at} {file}",
}
"""Ways to hurt a file, from the byte *at* on."""


@contextlib.contextmanager
def without_timers(lab: Lab, host: str) -> Iterator[None]:
    """Stop the timers of *host*, which have to be there, and wait for what they started; they run again afterwards."""
    assert lab.ssh(host, f"systemctl is-active {TIMERS} && systemctl is-enabled {TIMERS}").returncode == 0
    lab.ssh(host, f"systemctl stop {TIMERS}; while systemctl is-active -q 'atlas-backup@*'; do sleep 0.5; done")
    try:
        yield
    finally:
        lab.ssh(host, f"systemctl start {TIMERS}")


def unit(lab: Lab, host: str, job: str) -> str:
    """Run *job* as its timer does; returns what it said if it failed, else nothing."""
    name = f"atlas-backup@{job}.service"
    done = lab.ssh(host, f"systemctl start {name} || {{ journalctl -u {name} -n 5 -o cat; exit 1; }}", timeout=600)
    return done.stdout + done.stderr if done.returncode else ""


def ingest(lab: Lab, names: list[str]) -> dict[str, str]:
    """Take in one document for each name, each with a private note; returns id → text of what was acknowledged."""
    taken = {}
    for name in names:
        text = f"The lighthouse keeper writes down every passing vessel before breakfast, entry {name} of {RUN}"
        body = {"content": text, "content_type": "text/plain", "sensitive": {"notes": f"note of {name}"}}
        answer = lab.http("POST", "/v1/documents", body)
        assert answer.status == 202, answer
        taken[answer.body["id"]] = text
    return taken


def processed(lab: Lab, documents: dict[str, str], wait_for: Callable[..., Any]) -> None:
    """Wait until every one of *documents* is processed exactly once, with its text."""

    def look() -> bool:
        found = {name: lab.http("GET", f"/v1/documents/{name}").body for name in documents}
        return all(
            isinstance(body, dict)
            and body.get("status") == "processed"
            and body["text"] == documents[name]
            and body["applied"] == 1
            for name, body in found.items()
        )

    wait_for(look, 120, f"{len(documents)} documents are there, whole, and applied once")


def gone(lab: Lab, documents: dict[str, str]) -> list[str]:
    """Those of *documents* that are not there."""
    return [name for name in documents if lab.http("GET", f"/v1/documents/{name}").status == 404]


def run(lab: Lab, host: str, *arguments: str) -> tuple[int, Any]:
    """Run ``atlas-backup`` on *host*: status, and its JSON or what it said."""
    done = lab.ssh(host, f"atlas-backup {' '.join(arguments)}", timeout=JOB_SECONDS)
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


def refused(lab: Lab, host: str, job: str, name: str) -> None:
    """Run *job*, which has to fail and to name its cause *name*."""
    status, said = run(lab, host, job)
    assert status == 1, said
    assert name in said, said


def shown(lab: Lab, job: str, name: str) -> bool:
    """Whether /health shows that *job* failed, and its cause *name*."""
    health = lab.http("GET", "/health").body
    if not isinstance(health, dict) or health["status"] != "degraded":
        return False
    return any(line.startswith(f"{job} failed") and name in line for line in health["backup"]["problems"])


def fails(lab: Lab, host: str, wait_for: Callable[..., Any], job: str, name: str) -> None:
    """Run *job*, which has to fail and to name its cause *name*, there and in /health."""
    refused(lab, host, job, name)
    wait_for(lambda: shown(lab, job, name), 30, f"/health names the failure of {job}: {name}")


def points(lab: Lab, host: str) -> list[str]:
    """The snapshots in the repository."""
    status, found = run(lab, host, "points")
    assert status == 0, found
    return [point["snapshot"] for point in found]


def labelled(lab: Lab, wait_for: Callable[..., Any], names: list[str]) -> dict[str, str]:
    """Take in documents as :func:`ingest` does, and back them up as LABEL once they are processed."""
    documents = ingest(lab, names)
    processed(lab, documents, wait_for)
    done = lab.playbook("backup", "-e", f"backup_label={LABEL}")
    assert done.returncode == 0, done.stdout + done.stderr
    return documents


@contextlib.contextmanager
def other_credential(lab: Lab, host: str, name: str, value: str) -> Iterator[None]:
    """Give the backup program of *host* another *value*; the right one comes back."""
    lab.ssh(
        host,
        f"cd /etc/atlas/backup-credentials && cp -a {name} /root/{name}.kept"
        f" && printf %s '{value}' | systemd-creds encrypt --name=atlas_{name} - - > /root/{name}.new && cat /root/{name}.new > {name}",
    )
    try:
        yield
    finally:
        lab.ssh(host, f"mv /root/{name}.kept /etc/atlas/backup-credentials/{name}")


@contextlib.contextmanager
def damaged(lab: Lab, host: str, file: str, damage: str, at: int) -> Iterator[None]:
    """Hurt *file* on *host* in one of the ways of DAMAGE; it comes back as it was."""
    script = f"cp -a {file} /root/whole && chmod u+w {file} && {DAMAGE[damage].format(file=file, at=at)}"
    done = lab.ssh(host, script)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        lab.ssh(host, f"rm -f {file}; mv /root/whole {file}")


@contextlib.contextmanager
def full_disk(lab: Lab, host: str) -> Iterator[None]:
    """Leave no byte to the repository on *host*."""
    assert lab.operate("fill-disk", lab.name, host, REPOSITORY).returncode == 0
    try:
        yield
    finally:
        lab.operate("free-disk", lab.name, host, REPOSITORY)
