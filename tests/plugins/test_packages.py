"""Packages of a host: what apt says, what runs on replaced files, why a host boots, and the order in which it is done."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import host_packages
import pytest
from ansible.module_utils import packages
from ansible.module_utils.atlas_host import Done, Host, HostError
from ansible.module_utils.packages import Package, Packages, choose, parse_simulation, replaced, unit_of

SIMULATED = """Reading package lists...
Inst linux-image-6.1.0-42-amd64 (6.1.159-1 Debian-Security:12/oldstable-security [amd64])
Inst haproxy [2.6.12-1+deb12u3] (2.6.12-1+deb12u4 Debian-Security:12/oldstable-security [amd64])
Inst tzdata [2025a-0+deb12u1] (2025b-0+deb12u2 Debian:12.12/oldstable, Debian:12-updates/oldstable-updates [all]) []
Inst libpq5 [15.1-1] (15.2-1 Debian:12.12/oldstable, Debian-Security:12/oldstable-security [amd64])
Conf haproxy (2.6.12-1+deb12u4 Debian-Security:12/oldstable-security [amd64])
"""
MAPS = "7f00-7f01 r-xp 00000000 08:01 42   {}\n"


def test_what_apt_would_upgrade_is_read() -> None:
    found = parse_simulation(SIMULATED)
    assert [(each.name, each.old, each.new, each.security) for each in found] == [
        ("haproxy", "2.6.12-1+deb12u3", "2.6.12-1+deb12u4", True),
        ("tzdata", "2025a-0+deb12u1", "2025b-0+deb12u2", False),
        ("libpq5", "15.1-1", "15.2-1", True),
    ]

    def names(chosen: list[Package]) -> list[str]:
        return [each.name for each in chosen]

    assert [names(part) for part in choose(found, "security")] == [["haproxy", "libpq5"], []]
    assert [names(part) for part in choose(found, "all", ["haproxy", "tz"])] == [["libpq5"], ["haproxy", "tzdata"]]
    assert [names(part) for part in choose(found, "all", [])] == [["haproxy", "tzdata", "libpq5"], []]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/x86_64-linux-gnu/libssl.so.3 (deleted)", True),
        ("/opt/atlas/releases/1/python/lib/x.so (deleted)", True),
        ("/lib/x86_64-linux-gnu/libc.so.6 (deleted)", True),
        ("/usr/lib/x86_64-linux-gnu/libssl.so.3", False),
        ("/memfd:x (deleted)", False),
        ("/dev/zero (deleted)", False),
        ("/tmp/usr/lib/x (deleted)", False),
    ],
)
def test_a_process_on_replaced_files_is_recognised(path: str, expected: bool) -> None:
    assert replaced(MAPS.format("/bin/sh") + MAPS.format(path)) is expected


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/haproxy.service\n", "haproxy.service"),
        (
            "9:name=systemd:/pod/system.slice/system-atlas.slice/atlas-api@blue.service\n0::/pod\n",
            "atlas-api@blue.service",
        ),
        ("0::/user.slice/user-0.slice/session-1.scope\n", None),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/x.service\n", None),
        ("4:memory:/system.slice/ssh.service\n", None),
    ],
)
def test_the_service_of_a_process_is_found(cgroup: str, unit: str | None) -> None:
    assert unit_of(cgroup) == unit


def test_why_a_host_boots_is_said() -> None:
    assert packages.boot_reasons(None, {}, 0, ["ssh.service"]) == []
    reasons = packages.boot_reasons(["libc6", "libc6"], {"6.1-1": 50.0, "6.1-2": 150.0}, 100.0, ["dbus.service"])
    assert reasons == [
        "asked for by libc6",
        "kernel 6.1-2 is newer than the one that runs",
        "dbus.service runs on replaced files",
    ]
    assert packages.boot_reasons([], {}, 0, []) == ["asked for by a package"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with processes: init and HAProxy's main process well, its old worker and sshd on replaced files."""
    for pid, parent, unit, path in (
        (1, 0, "init.scope", "/usr/lib/systemd/systemd"),
        (20, 1, "system.slice/haproxy.service", "/usr/sbin/haproxy"),
        (21, 20, "system.slice/haproxy.service", "/usr/sbin/haproxy (deleted)"),
        (30, 1, "system.slice/ssh.service", "/usr/lib/libcrypto.so.3 (deleted)"),
        (40, 1, "system.slice/atlas-api@blue.service", "/usr/bin/python3 (deleted)"),
        (50, 1, "user.slice/session-1.scope", "/usr/bin/bash (deleted)"),
    ):
        directory = tmp_path / "proc" / str(pid)
        directory.mkdir(parents=True)
        (directory / "maps").write_text(MAPS.format(path).replace("/usr/sbin/haproxy", "/usr/sbin/haproxy"))
        (directory / "cgroup").write_text(f"0::/{unit}\n")
        (directory / "stat").write_text(f"{pid} (a ) b) S {parent} 1 1\n")
    (tmp_path / "proc/60").mkdir()  # ended while it was looked at
    (tmp_path / "proc/stat").write_text("cpu 1\nbtime 1000\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "boot").mkdir()
    return tmp_path


class Machine:
    """Answers commands and remembers them."""

    def __init__(self, upgraded: bool = False) -> None:
        self.ran: list[str] = []
        self.upgraded = upgraded
        self.locked = 0

    def __call__(self, argv: list[str], timeout: float = 60, env: Any = None, stdin: Any = None) -> Done:
        line = " ".join(argv)
        self.ran.append(line)
        if "update" in argv and self.locked:
            self.locked -= 1
            return Done(100, "", "E: Could not get lock /var/lib/apt/lists/lock.\n")
        if "--only-upgrade" in argv:
            assert env["NEEDRESTART_SUSPEND"] == "1" and env["DEBIAN_FRONTEND"] == "noninteractive"
            self.upgraded = True
        return Done(0, "" if self.upgraded else SIMULATED, "") if "--simulate" in argv else Done(0, "", "")


def test_services_on_replaced_files_are_found(root: Path) -> None:
    """The old worker is meant to be old, the session is nobody's service."""
    assert Packages(root).stale() == {"ssh.service", "atlas-api@blue.service"}
    (root / "proc/20/maps").write_text(MAPS.format("/usr/sbin/haproxy (deleted)"))
    (root / "proc/1/maps").write_text(MAPS.format("/lib/systemd/libsystemd-shared.so (deleted)"))
    assert Packages(root).stale() == {"init", "haproxy.service", "ssh.service", "atlas-api@blue.service"}


def test_a_kernel_that_was_installed_after_the_boot_is_a_reason(root: Path) -> None:
    (root / "boot/vmlinuz-9.9.9").touch()
    assert Packages(root).boot_reasons([]) == [], "a container's files say nothing about the machine's kernel"
    (root / f"boot/vmlinuz-{os.uname().release}").touch()
    assert any("kernel 9.9.9" in reason for reason in Packages(root).boot_reasons([]))
    (root / "proc/stat").write_text(f"btime {int(time.time()) + 60}\n")
    assert Packages(root).boot_reasons([]) == []
    (root / "run/reboot-required").touch()
    (root / "run/reboot-required.pkgs").write_text("libc6\n")
    assert Packages(root).boot_reasons([]) == ["asked for by libc6"]


def test_services_are_renewed_each_in_its_way(root: Path) -> None:
    machine = Machine()
    stale = {
        "init",
        "haproxy.service",
        "ssh.service",
        "atlas-api@blue.service",
        "postgresql@15-main.service",
        "dbus.service",
    }
    assert Packages(root, machine).renew(stale) == ["haproxy.service", "init", "ssh.service"]
    assert machine.ran == [
        "systemctl reload haproxy.service",
        "systemctl daemon-reexec",
        "systemctl try-restart ssh.service",
    ]


def test_looking_changes_nothing_and_waits_for_the_lists(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    machine = Machine()
    machine.locked = 2
    looked = host_packages.apply(params("looked"), Packages(root, machine), Host(state=tmp_path / "s"), False)
    assert looked["changed"] is False and len(looked["packages"]) == 2
    assert not any("install" in line or "systemctl" in line for line in machine.ran)
    assert sum("update" in line for line in machine.ran) == 3
    machine.locked = 10**6
    with pytest.raises(HostError, match="Could not get lock"):
        Packages(root, machine).refresh(patience=0)


def params(state: str, **other: Any) -> dict[str, Any]:
    return {"state": state, "which": "security", "keep": [], "timeout": 60} | other


def test_an_upgrade_is_recorded_and_tells_what_it_did(root: Path, tmp_path: Path) -> None:
    host = Host(state=tmp_path / "state")
    checked = host_packages.apply(params("upgraded"), Packages(root, machine := Machine()), host, True)
    assert checked["changed"] and host.journal() == [] and not any("install" in line for line in machine.ran)
    done = host_packages.apply(params("upgraded", keep=["libpq"]), Packages(root, machine), host, False)
    assert done["changed"] and [each["name"] for each in done["packages"]] == ["haproxy"]
    assert [each["name"] for each in done["kept"]] == ["libpq5"]
    (install,) = [line for line in machine.ran if "--only-upgrade" in line]
    assert install.endswith("--only-upgrade haproxy=2.6.12-1+deb12u4")
    assert done["renewed"] == ["ssh.service"]
    assert host.journal()[-1]["packages"] == ["haproxy 2.6.12-1+deb12u3 -> 2.6.12-1+deb12u4"]
    (root / "proc/30/maps").write_text("")
    again = host_packages.apply(params("upgraded"), Packages(root, Machine(upgraded=True)), host, False)
    assert again["changed"] is False


def test_a_failed_upgrade_says_apts_own_words(root: Path) -> None:
    packages_ = Packages(root, lambda argv, **_: Done(100, "", "E: Unable to fetch\n" if "install" in argv else ""))
    with pytest.raises(HostError, match="apt-get install failed: E: Unable to fetch"):
        packages_.upgrade([Package("a", "1", "2", "")], 60)
