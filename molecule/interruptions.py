"""How a deploy is cut off in tests: the controller killed, its network gone, a disk full, a host rebooted or lost."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from labtest import PROJECT, Lab
from prooftest import deploy_command, wait_until

END_SECONDS = 400.0
"""No deploy lasts longer, whatever was done to it: every wait ends."""
LEFT = """for file in transaction.json lease.json; do test ! -e /var/lib/atlas-deploy/$file || { echo "left $file"; cat /var/lib/atlas-deploy/$file; }; done
if test -S /run/haproxy/admin.sock; then
  sed -n 's/^active /active /p' /etc/haproxy/slot.map
  python3 - <<'PYTHON'
import socket
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/haproxy/admin.sock")
connection.sendall(b"show stat\\n")
print(b"".join(iter(lambda: connection.recv(65536), b"")).decode())
PYTHON
fi
"""


def await_rest(lab: Lab) -> None:
    """Assert that no host has anything left of a deploy, and that every app host gets traffic from every edge."""
    deadline = time.monotonic() + 60
    while unrest := _unrest(lab):
        assert time.monotonic() < deadline, "60 s after a deploy:\n" + "\n".join(unrest)
        time.sleep(0.3)


def _unrest(lab: Lab) -> list[str]:
    """Return what is still left of a deploy, and which app hosts get no traffic: a line each."""
    found = []
    for host in lab.group("app"):
        found += [f"{host}: {line}" for line in lab.ssh(host, LEFT).stdout.splitlines() if line.strip()]
    for host in lab.group("edge"):
        left, _, seen = lab.ssh(host, LEFT).stdout.partition("active ")
        active, _, stat = seen.partition("\n")
        rows = [row for row in csv.DictReader(io.StringIO(stat.strip().removeprefix("# "))) if row["type"] == "2"]
        states = {row["svname"]: row["status"] for row in rows if row["pxname"] == active.strip()}
        found += [f"{host}: {line}" for line in left.splitlines()]
        if list(states.values()) != ["UP"] * len(lab.group("app")):
            found.append(f"{host}: {active.strip() or 'no slot is active'}: {states}")
    return found


@contextmanager
def begun(
    lab: Lab,
    release: str,
    strategy: str,
    environment: Mapping[str, str] | None = None,
    output: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[str]]:
    """Begin a deploy in a session of its own, and leave nothing of it running."""
    process = subprocess.Popen(
        deploy_command(lab, release, strategy), cwd=PROJECT, env={**lab.for_playbooks(), **(environment or {})},
        stdout=output, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for ansible-playbook and its workers, all at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def killed(lab: Lab, release: str, strategy: str, task: int, seconds: float) -> bool:
    """Begin a deploy and kill it *seconds* after the beginning of its *task*-th task; tell whether it was still running."""
    with begun(lab, release, strategy, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            task -= line.startswith("TASK [")
            if task <= 0:
                break
        time.sleep(seconds)
        return process.poll() is None


def full_disk(lab: Lab, release: str, strategy: str) -> None:
    """The disk of an app host fills up in the middle of a deploy."""
    host = lab.group("app")[0]
    with begun(lab, release, strategy) as process:
        wait_until(lambda: locked(lab), 120, "the deploy is under way", pause=0.1)
        assert lab.operate("fill-disk", lab.name, host, "/opt/atlas").returncode == 0
        try:
            process.wait(END_SECONDS)
        finally:
            assert lab.operate("free-disk", lab.name, host, "/opt/atlas").returncode == 0


SSH = """#!/bin/sh
[ ! -e {folder}/cut ] || case "$*" in *"{target}"*) echo 'No route to host' >&2; exit 255;; esac
exec ssh "$@"
"""


@contextmanager
def severable(address: str = "") -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a folder, and an environment in which Ansible cannot connect to *address* (default: any) while it has a file cut."""
    with tempfile.TemporaryDirectory(prefix="atlas-cut-") as name:
        folder = Path(name)
        (folder / "ssh").write_text(SSH.format(folder=folder, target=address and f" {address} "))
        (folder / "ssh").chmod(0o755)
        yield folder, {"ANSIBLE_SSH_EXECUTABLE": str(folder / "ssh")}


def lost_network(lab: Lab, release: str, strategy: str) -> None:
    """The controller's network is gone: what was connected is cut off, and nothing else connects."""
    with severable() as (folder, own):
        own["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(folder / "control")
        with begun(lab, release, strategy, own) as process:
            wait_until(lambda: locked(lab), 120, "the deploy is under way", pause=0.1)
            time.sleep(3)
            (folder / "cut").touch()
            assert _cut(folder / "control"), "no connection was cut off"
            process.wait(END_SECONDS)
            assert process.returncode, "it went on without a network"
    wait_until(lambda: all(lab.ssh(host, "true").returncode == 0 for host in lab.group("app")), 60, "hosts answer")


def _cut(control: Path) -> int:
    """Kill the ssh connections that use the control sockets in *control*; return how many there were."""
    count = 0
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = found.read_text()
            if str(control) in command and command.partition("\0")[0].startswith("ssh"):
                os.kill(int(found.parent.name), signal.SIGKILL)
                count += 1
        except OSError:
            continue
    return count


def edge_out_of_reach(lab: Lab, release: str, strategy: str) -> str:
    """An edge has just switched when the controller can reach it no more; it serves on. Return what the deploy said."""
    edge = lab.group("edge")[1]
    look = "cat /etc/haproxy/slot.map"
    before = lab.ssh(edge, look).stdout
    with severable(lab.hosts[edge]) as (folder, own):
        # Each task connects anew, so that a deploy loses this edge alone.
        own["ANSIBLE_SSH_ARGS"] = "-o ControlMaster=no -o ControlPath=none -o ConnectTimeout=10"
        with begun(lab, release, strategy, own, output=subprocess.PIPE) as process:
            wait_until(
                lambda: lab.ssh(edge, look).stdout not in ("", before), END_SECONDS, "it has switched", pause=0.1
            )
            (folder / "cut").touch()
            said = process.communicate(timeout=END_SECONDS)[0]
            assert process.returncode, "it went through without an edge"
    return said


def locked(lab: Lab) -> bool:
    """Tell whether a deploy holds the lock of the first edge."""
    return lab.ssh(lab.group("edge")[0], "test -e /var/lib/atlas-deploy/lease.json").returncode == 0


def reboot(lab: Lab, release: str, strategy: str) -> None:
    """An app host reboots in the middle of a deploy."""
    with begun(lab, release, strategy) as process:
        wait_until(lambda: locked(lab), 120, "the deploy is under way", pause=0.1)
        assert lab.operate("reboot", lab.name, lab.group("app")[1]).returncode == 0
        process.wait(END_SECONDS)


def lost_edge(lab: Lab, release: str, strategy: str) -> None:
    """An edge loses its power in the middle of a deploy, and comes back when that is over."""
    edge = lab.group("edge")[1]
    with begun(lab, release, strategy) as process:
        wait_until(lambda: locked(lab), 120, "the deploy is under way", pause=0.1)
        time.sleep(4)
        assert lab.operate("kill", lab.name, edge).returncode == 0
        try:
            process.wait(END_SECONDS)
        finally:
            assert lab.operate("start", lab.name, edge).returncode == 0


Accident = Callable[[Lab, str, str], None]
HARMLESS: dict[str, Accident] = {"full disk": full_disk, "lost network": lost_network}
"""Those that take nothing from users."""
