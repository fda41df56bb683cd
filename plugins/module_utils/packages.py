"""Debian packages of one host: what could be upgraded, what runs on replaced files, and whether only a boot helps.

The decisions are functions of texts and values; :class:`Packages` asks the host.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import Done, HostError, run

_INST = re.compile(r"Inst (\S+) \[([^\]]+)\] \((\S+) ([^)]*?)(?: \[[^\]]*\])?\)")
LOCK_SECONDS = 180
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    # What has to be restarted is decided here, with its traffic drained.
    "NEEDRESTART_SUSPEND": "1",
}
OPTIONS = (
    "-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}", "-o", "Dpkg::Use-Pty=0",
    "-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
)  # fmt: skip
# Restarting them breaks more than a boot does.
NEED_BOOT = ("dbus.service", "dbus-broker.service")
# They are renewed where their traffic is taken care of.
OURS = ("atlas-", "postgresql@")


@dataclass(frozen=True)
class Package:
    """One package that can be upgraded. *origins*: where the new version comes from, as apt says it."""

    name: str
    old: str
    new: str
    origins: str

    @property
    def security(self) -> bool:
        """Whether a security archive offers it."""
        return "-security" in self.origins.lower()


def parse_simulation(text: str) -> list[Package]:
    """Return what ``apt-get --simulate`` said it would upgrade; packages that are new, as dependencies, are left out."""
    found = (_INST.match(line) for line in text.splitlines())
    return [Package(match[1], match[2], match[3], match[4]) for match in found if match]


def choose(packages: Iterable[Package], which: str, keep: Sequence[str] = ()) -> tuple[list[Package], list[Package]]:
    """Return the packages to upgrade and those of them that are kept back: names that begin with one in *keep*.

    *which*: ``security`` or ``all``.
    """
    wanted = [package for package in packages if which == "all" or package.security]
    kept = [package for package in wanted if package.name.startswith(tuple(keep))]
    return [package for package in wanted if package not in kept], kept


def replaced(maps: str) -> bool:
    """Tell from the text of ``/proc/PID/maps`` whether the process runs on a program or library that was replaced."""
    return any(
        line.endswith(" (deleted)") and re.search(r" /(usr|lib|opt)[^ ]*/", line) is not None
        for line in maps.splitlines()
    )


def unit_of(cgroup: str) -> str | None:
    """Return the service in the text of ``/proc/PID/cgroup``; None for a session or a process of the kernel."""
    for line in cgroup.splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            names = [part for part in path.split("/") if part.endswith(".service")]
            if names and not names[0].startswith("user@"):
                return names[0]
    return None


def boot_reasons(
    asked: Iterable[str] | None, kernels: Mapping[str, float], booted: float, stale: Iterable[str]
) -> list[str]:
    """Return why the host should boot.

    *asked*: packages that wrote /run/reboot-required, None where there is none. *kernels*: name to the Unix time at which
    its file was put in place; *booted*: that of the last boot. *stale*: units on replaced files.
    """
    found = []
    if asked is not None:
        found.append(f"asked for by {', '.join(sorted(set(asked))) or 'a package'}")
    found += [
        f"kernel {name} is newer than the one that runs" for name, when in sorted(kernels.items()) if when > booted
    ]
    found += [f"{unit} runs on replaced files" for unit in sorted(stale) if unit in NEED_BOOT]
    return found


class Packages:
    """The packages of this host. *root* and *command* are parameters for tests alone."""

    def __init__(self, root: Path = Path("/"), command: Callable[..., Done] = run) -> None:
        self.root, self._run = root, command

    def _apt(self, *arguments: str, timeout: float = 300) -> str:
        done = self._run(["apt-get", *OPTIONS, *arguments], timeout=timeout, env=ENVIRONMENT)
        if done.status:
            said = [line for line in (done.errors + done.output).splitlines() if line.strip()]
            raise HostError(f"apt-get {arguments[0]} failed: {said[-1] if said else done.status}", said[-8:])
        return done.output

    def refresh(self, patience: float = LOCK_SECONDS) -> None:
        """Read the archives' lists; wait *patience* seconds for somebody else who does."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._apt("update", "-qq", "-o", "APT::Update::Error-Mode=any")
                return
            except HostError as error:
                if not any("Could not get lock" in line for line in error.log) or time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def upgradable(self) -> list[Package]:
        """Return what can be upgraded without removing anything; packages on hold are not among it."""
        return parse_simulation(self._apt("upgrade", "--simulate", "--with-new-pkgs"))

    def upgrade(self, packages: Sequence[Package], timeout: float) -> None:
        """Bring *packages* to their new versions, with the configuration files that are there."""
        self._run(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], timeout=timeout, env=ENVIRONMENT)
        names = [f"{package.name}={package.new}" for package in packages]
        self._apt("install", "-qq", "--yes", "--only-upgrade", *names, timeout=timeout)

    def stale(self) -> set[str]:
        """Return the services that run on replaced files; ``init`` for the first process itself.

        Of HAProxy the main process counts alone: an old worker that finishes its requests is meant to be old.
        """
        found = set()
        for directory in (self.root / "proc").glob("[0-9]*"):
            try:
                if not replaced((directory / "maps").read_text(errors="replace")):
                    continue
                unit = unit_of((directory / "cgroup").read_text())
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
            if directory.name == "1":
                found.add("init")
            elif unit and (unit != "haproxy.service" or parent == 1):
                found.add(unit)
        return found

    def boot_reasons(self, stale: Iterable[str]) -> list[str]:
        """Return why this host should boot."""
        asked = self.root / "run/reboot-required"
        packages = self.root / "run/reboot-required.pkgs"
        names = packages.read_text().split() if packages.exists() else []
        kernels = {
            path.name.removeprefix("vmlinuz-"): path.stat().st_ctime for path in (self.root / "boot").glob("vmlinuz-*")
        }
        stat = (self.root / "proc/stat").read_text()
        booted = float(re.search(r"^btime (\d+)$", stat, re.MULTILINE)[1])  # type: ignore[index]
        # A container has files of kernels, perhaps, but none of them is its own.
        own = kernels if os.uname().release in kernels else {}
        return boot_reasons(names if asked.exists() else None, own, booted, stale)

    def renew(self, stale: Iterable[str]) -> list[str]:
        """Have the services in *stale* run on what is installed, except ours and those that need a boot; return them.

        HAProxy reloads: its new processes take the sockets of the old ones over.
        """
        done = []
        for unit in sorted(stale):
            if unit in NEED_BOOT or unit.startswith(OURS):
                continue
            verb = {"init": ["daemon-reexec"], "haproxy.service": ["reload", unit]}.get(unit, ["try-restart", unit])
            answer = self._run(["systemctl", *verb], timeout=120)
            if answer.status:
                raise HostError(f"systemctl {' '.join(verb)} failed: {answer.errors.strip()}")
            done.append(unit)
        return done


def report(packages: Iterable[Package]) -> list[dict[str, Any]]:
    """Return *packages* for people and programs."""
    return [{"name": p.name, "from": p.old, "to": p.new, "security": p.security} for p in packages]
