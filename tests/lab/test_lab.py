"""A lab on this machine: raised, repeated, hurt in each named way, found again, and gone without a trace."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible.module_utils.lab_images import ensure
from ansible.module_utils.lab_inventory import derive
from ansible.module_utils.labs import LABEL, Lab, LabError, Podman, environment_hosts

PROJECT = Path(__file__).resolve().parents[2]
NAME = "test-lab"
SOURCE = PROJECT / "inventories" / "development"
HOST = "dev1"
FOREIGN = f"atlas-lab-{NAME}-foreign"
pytestmark = pytest.mark.timeout(300)


def up(lab: Lab) -> list[str]:
    """Raise the lab; returns what was changed."""
    releases = environment_hosts(SOURCE)
    image, _ = ensure(lab.podman, "bookworm")
    record, changes = lab.up(SOURCE.name, releases, {"bookworm": image})
    return changes + derive(lab, record, SOURCE)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab of development, taken down at the end whatever happens."""
    lab = Lab(PROJECT, NAME)
    lab.down()
    try:
        up(lab)
        yield lab
    finally:
        lab.down()


def operate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROJECT / "bin/lab"), *arguments], capture_output=True, text=True, timeout=150, check=False
    )


def done(*arguments: str) -> None:
    result = operate(*arguments)
    assert result.returncode == 0, result.stderr


def ssh(lab: Lab, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as root over SSH, with the pinned host key."""
    access = json.loads((lab.directory / "access.json").read_text())
    options = [f"UserKnownHostsFile={lab.directory / 'known_hosts'}", "StrictHostKeyChecking=yes", "BatchMode=yes"]
    options += ["ConnectTimeout=3", "GlobalKnownHostsFile=/dev/null"]
    arguments = [part for option in options for part in ("-o", option)]
    return subprocess.run(
        ["ssh", "-i", access["ssh_key"], *arguments, f"deploy@{access['hosts'][HOST]}", "sudo", "-n", "sh"],
        input=script, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def listens(lab: Lab) -> bool:
    """Whether the host's sshd answers within a second."""
    address = json.loads((lab.directory / "access.json").read_text())["hosts"][HOST]
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            connection.settimeout(1)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return condition()


def test_a_host_is_a_booted_debian_with_systemd_and_our_key_alone(lab: Lab) -> None:
    result = ssh(
        lab, "ps -o comm= -p 1; systemctl is-system-running; hostname; . /etc/os-release; echo $VERSION_CODENAME"
    )
    assert result.stdout.split() == ["systemd", "running", HOST, "bookworm"], result.stderr
    assert ssh(lab, "command -v nft").returncode != 0, "roles bring the firewall, not the image"


def test_another_host_key_is_refused(lab: Lab) -> None:
    known = lab.directory / "known_hosts"
    saved = known.read_text()
    other = (lab.directory / "host_keys" / "origin.pub").read_text().split()[1]
    own = (lab.directory / "host_keys" / f"{HOST}.pub").read_text().split()[1]
    try:
        known.write_text(saved.replace(own, other))
        result = ssh(lab, "true")
        assert result.returncode == 255
        assert "HOST IDENTIFICATION HAS CHANGED" in result.stderr
    finally:
        known.write_text(saved)


def test_a_second_run_changes_nothing_and_restarts_nothing(lab: Lab) -> None:
    before = {host: item["StartedAt"] for host, item in lab.containers().items()}
    began = time.monotonic()
    assert up(lab) == []
    assert time.monotonic() - began < 3
    assert {host: item["StartedAt"] for host, item in lab.containers().items()} == before


def test_a_reboot_keeps_address_and_disk(lab: Lab) -> None:
    boot = "cat /proc/1/stat | cut -d' ' -f22"
    before = ssh(lab, f"echo kept > /root/file; {boot}").stdout
    done("reboot", NAME, HOST)
    after = ssh(lab, f"cat /root/file; {boot}").stdout.split()
    assert after[0] == "kept"
    assert after[1] != before.strip()


def test_pause_and_kill_silence_the_host_until_they_end(lab: Lab) -> None:
    done("pause", NAME, HOST)
    assert not listens(lab)
    done("unpause", NAME, HOST)
    assert listens(lab)
    done("kill", NAME, HOST)
    assert not listens(lab)
    time.sleep(2)
    assert lab.containers()[HOST]["State"] == "exited", "a killed host stays off"
    done("start", NAME, HOST)
    assert listens(lab)


def test_a_host_that_was_destroyed_comes_back_empty(lab: Lab) -> None:
    assert ssh(lab, "echo lost > /root/lost").returncode == 0
    done("destroy", NAME, HOST)
    assert not listens(lab) and HOST not in lab.containers()
    assert any(change.startswith(f"{HOST} created at") for change in up(lab))
    assert ssh(lab, "cat /root/lost").returncode != 0


def test_a_cut_host_runs_on_without_network(lab: Lab) -> None:
    done("cut", NAME, HOST)
    try:
        assert eventually(lambda: not listens(lab), 5)
        assert lab.containers()[HOST]["State"] == "running"
    finally:
        done("join", NAME, HOST)
    assert eventually(lambda: listens(lab))
    assert ssh(lab, "ip route show default").stdout.startswith("default via ")


def test_memory_is_limited(lab: Lab) -> None:
    eat = "python3 -c 'x = bytearray(400_000_000); print(len(x))'"
    assert "400000000" in ssh(lab, eat).stdout
    done("memory", NAME, HOST, "200m")
    try:
        assert "400000000" not in ssh(lab, eat).stdout
    finally:
        done("memory", NAME, HOST, "none")
    assert "400000000" in ssh(lab, eat).stdout


def test_a_full_disk_refuses_writes_and_shows_what_was_there(lab: Lab) -> None:
    assert ssh(lab, "mkdir -p /opt/atlas && echo before > /opt/atlas/file").returncode == 0
    done("fill-disk", NAME, HOST, "/opt/atlas")
    try:
        assert ssh(lab, "cat /opt/atlas/file").stdout == "before\n"
        assert ssh(lab, "df --output=avail /opt/atlas | tail -1").stdout.strip() == "0"
        full = ssh(lab, "head -c 10000 /dev/zero > /opt/atlas/more")
        assert full.returncode != 0
        assert "No space left" in full.stderr
    finally:
        done("free-disk", NAME, HOST, "/opt/atlas")
    assert ssh(lab, "ls /opt/atlas; echo after > /opt/atlas/file; cat /opt/atlas/file").stdout == "file\nafter\n"


def test_what_carries_no_label_of_ours_is_not_touched(lab: Lab) -> None:
    image, _ = ensure(lab.podman, "bookworm")
    lab.podman.run("create", "--name", FOREIGN, image, "true")
    try:
        for operation in ("kill", "reboot", "pause", "cut"):
            result = operate(operation, NAME, "foreign")
            assert result.returncode == 1
            assert "has no host 'foreign'" in result.stderr
        up(lab)
        lab.down()
        assert lab.podman.containers(f"name=^{FOREIGN}$"), "a container without our label was removed"
    finally:
        lab.podman.run("rm", "--force", FOREIGN)
        up(lab)


def test_a_lab_of_another_checkout_is_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="belongs to the checkout at"):
        Lab(tmp_path, NAME).down()
    assert listens(lab)


def test_leftovers_are_put_into_a_known_state(lab: Lab) -> None:
    lab.podman.run("stop", "--time", "0", f"atlas-lab-{NAME}-{HOST}")
    assert up(lab) == [f"{HOST} started"]
    # The directory is gone, and with it the keys: the containers are of no use.
    (lab.directory / "lab.json").unlink()
    assert f"atlas-lab-{NAME}-{HOST} removed" in up(lab)
    assert ssh(lab, "true").returncode == 0


def test_down_leaves_nothing_and_can_be_repeated(lab: Lab) -> None:
    command = ["make", "-C", str(PROJECT), "down", f"LAB={NAME}"]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert Podman().containers(f"label={LABEL}={NAME}") == []
        assert f"atlas-lab-{NAME}" not in [network["name"] for network in Podman().networks()]
        assert not (PROJECT / ".lab" / NAME).exists()
