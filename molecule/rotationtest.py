"""What the proofs of rotations share: rotations that are killed, and old secrets that are tried."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from labtest import PROJECT, Lab, slot_in_service
from prooftest import Step, play

MARK = "ATLAS_TEST_RUN"
"""Variable of the environment by which all processes of a run are found."""
IDLE_SECONDS = 1800
"""How long a session stays that is not ended."""
TRY_DATABASE = """#python
import sys
sys.path.insert(0, "/opt/atlas/slots/{slot}/release/python%d.%d" % sys.version_info[:2])
import psycopg
try:
    psycopg.connect(host="{host}", dbname="atlas", user="{name}", password="{password}", connect_timeout=10).close()
    print("accepted")
except psycopg.OperationalError as error:
    print("refused", error)
"""
TRY_BACKUP_LOGIN = """
said=$(PGPASSWORD='{password}' psql -XAtq 'host={host} user={name} dbname=postgres' -c 'SELECT 1' 2>&1) && echo accepted || echo "refused $said"
"""
TRY_REPOSITORY = """export RESTIC_PASSWORD='{password}'
said=$(restic --no-cache --no-lock -r /var/lib/atlas-backup/restic cat config 2>&1) && echo accepted || echo "refused $said"
"""


def command(lab: Lab, *arguments: str) -> list[str]:
    """Return the command that rotates on *lab*."""
    return ["ansible-playbook", "-i", str(lab.inventory), "playbooks/rotate_secrets.yml", *arguments]


def rotate(lab: Lab, kinds: str, *arguments: str) -> Step:
    """Rotate *kinds*, to the end."""
    return play(lab, "rotate_secrets", "-e", f"rotate={kinds}", *arguments, timeout=1800)


@contextmanager
def begun(lab: Lab, kinds: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Begin a rotation of *kinds*, and leave nothing of it running."""
    run = f"rotation-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        command(lab, "-e", f"rotate={kinds}", *arguments), cwd=PROJECT, env={**lab.for_playbooks(), MARK: run},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        while kill_marked(run):
            time.sleep(0.1)
        process.wait()


def kill_marked(run: str) -> int:
    """SIGKILL for every process of *run*, and return how many there were: Ansible's workers are in sessions of their own."""
    count, wanted = 0, f"{MARK}={run}".encode()
    for found in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in found.read_bytes().split(b"\0"):
                os.kill(int(found.parent.name), signal.SIGKILL)
                count += 1
    return count


def killed(lab: Lab, kinds: str, seconds: float, *arguments: str) -> bool:
    """Begin a rotation of *kinds* and kill it, with all that it started, after *seconds*; tell whether it was still running."""
    with begun(lab, kinds, *arguments) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
    return False


def secrets(lab: Lab) -> dict[str, Any]:
    """Return what the vault of *lab* holds now. Never print it."""
    variables = Lab.open(lab.name).facts()["_meta"]["hostvars"][lab.group("app")[0]]
    return {name: value for name, value in variables.items() if name.startswith("vault_")}


def database_login(vault: Mapping[str, Any]) -> tuple[str, str]:
    """Return role and password with which the service logs in."""
    return vault.get("vault_atlas_database_login", "atlas_a"), vault["vault_atlas_database_password"]


def backup_login(vault: Mapping[str, Any]) -> tuple[str, str]:
    """Return role and password with which the backup host logs in."""
    return vault.get("vault_backup_login", "atlas_backup"), vault["vault_backup_database_password"]


def accepted(lab: Lab, vault: Mapping[str, Any]) -> dict[str, bool]:
    """Try the secrets of *vault* from where they are used; return which are accepted."""
    app, backup = lab.group("app")[0], lab.group("backup")[0]
    address = lab.hosts[lab.group("database")[0]]
    name, password = database_login(vault)
    script = TRY_DATABASE.format(slot=slot_in_service(lab, app), host=address, name=name, password=password)
    found = {"database": lab.ssh(app, script).stdout}
    name, password = backup_login(vault)
    found["backup login"] = lab.ssh(backup, TRY_BACKUP_LOGIN.format(host=address, name=name, password=password)).stdout
    password = vault["vault_backup_repository_password"]
    found["repository"] = lab.ssh(backup, TRY_REPOSITORY.format(password=password)).stdout
    tried = lab.http("GET", "/v1/documents", token=vault["vault_atlas_tokens"][0]["token"]).status
    found["token"] = {200: "accepted", 401: "refused"}.get(tried, f"status {tried}")
    for what, said in found.items():
        assert said.startswith(("accepted", "refused")), f"{what}: {said}"
    return {what: said.startswith("accepted") for what, said in found.items()}


def presented(lab: Lab, edge: str) -> str:
    """Return the certificate of *edge* as PEM; it has to be of the lab's authority."""
    return ssl.get_server_certificate((lab.hosts[edge], 443), ca_certs=lab.ca, timeout=10)


def half_rotated(lab: Lab) -> str:
    """Return what ``status.yml`` says of rotations that are not over."""
    said = play(lab, "status").succeeded().output
    return "\n".join(line.strip() for line in said.splitlines() if "half rotated" in line)


def backup_is_sound(lab: Lab, seconds: float = 120) -> None:
    """Assert that the backup host receives the log, takes a backup, and that a drill opens it with the keys it has."""
    host = lab.group("backup")[0]
    deadline = time.monotonic() + seconds
    for job in ("increment", "take", "drill"):
        while (done := lab.ssh(host, f"atlas-backup {job}", timeout=600)).returncode:
            assert time.monotonic() < deadline, f"{job}: {done.stderr}"
            time.sleep(2)


@contextmanager
def logged_in(lab: Lab, host: str, key: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Be logged in on *host* with the private *key*, in one session that does nothing; *options* of ssh come first."""
    words = ["ssh", *options, "-i", str(key), "-o", f"UserKnownHostsFile={lab.folder / 'known_hosts'}", "-o", "IdentitiesOnly=yes",
             "-o", "IdentityAgent=none", "-o", "BatchMode=yes", f"deploy@{lab.hosts[host]}", f"echo in; exec sleep {IDLE_SECONDS}"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "in\n", f"{key} is not let in on {host}"
        yield process
    finally:
        process.kill()
        process.wait()


def old_key_is_refused(lab: Lab, key: Path) -> None:
    """Assert that no host lets the private key *key* in, and every one lets the present one in."""
    for host, address in lab.hosts.items():
        assert lab.ssh(host, "true").returncode == 0, f"{host} does not let the new key in"
        tried = subprocess.run(
            ["ssh", "-i", str(key), "-o", f"UserKnownHostsFile={lab.folder / 'known_hosts'}", "-o", "IdentitiesOnly=yes",
             "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "ControlPath=none", f"deploy@{address}", "true"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert tried.returncode == 255 and "Permission denied" in tried.stderr, f"{host}: {tried.stderr}"
