"""Who is logged in over SSH, from where and with which key; and which processes a session consists of.

For each connection sshd keeps a process of root's, the monitor, and below it one that runs as the account once that is
authenticated. Both are called sshd up to OpenSSH 9.7 (Debian 12) and sshd-session since (Debian 13). The monitor logs the key
that it has accepted, so the journal knows which connection began with which. Pure, but for :func:`running` and :func:`sockets`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

NAMES = ("sshd", "sshd-session")
ACCEPTED = re.compile(r"Accepted publickey for \S+ from \S+ port \d+ ssh2: \S+ (SHA256:[A-Za-z0-9+/]+)")
SCOPE = re.compile(r"/(session-[^/\n]+\.scope)")
SLACK_SECONDS = 2.0
"""So much older than its process an entry of the journal may look: the two are counted by different clocks."""


class Process(NamedTuple):
    """A process. *uid*: what it acts as. *started*: seconds after boot. *scope*: its session of systemd, "" for none."""

    pid: int
    parent: int
    uid: int
    name: str
    started: float
    scope: str = ""


class Accepted(NamedTuple):
    """A key that was accepted, by the process *pid*, *age* seconds ago. *key*: its fingerprint, as ssh-keygen -l prints it."""

    pid: int
    age: float
    key: str


def monitors(processes: Iterable[Process], uid: int) -> list[Process]:
    """Return the monitors of the connections that are authenticated as the account *uid*, which is not root's."""
    known = {process.pid: process for process in processes}
    parents = {
        process.parent
        for process in known.values()
        if process.uid == uid and process.name in NAMES and process.uid != 0
    }
    found = [known[pid] for pid in parents if pid in known]
    return sorted(process for process in found if process.uid == 0 and process.name in NAMES)


def accepted(journal: Iterable[str], now: float) -> list[Accepted]:
    """Return the keys that were accepted, oldest first, from the journal in JSON, a line for each entry. *now*: monotonic, in seconds."""
    found = []
    for line in journal:
        entry = json.loads(line)
        said = ACCEPTED.match(entry["MESSAGE"]) if isinstance(entry.get("MESSAGE"), str) else None
        if said:
            age = now - int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6
            found.append(Accepted(int(entry["_PID"]), age, said[1]))
    return sorted(found, key=lambda entry: -entry.age)


def key_of(monitor: Process, entries: Sequence[Accepted], now: float) -> str:
    """Return the key that the connection of *monitor* began with, "" where that is not known. *now*: seconds after boot."""
    age = now - monitor.started + SLACK_SECONDS
    # Of one that is older, an earlier process had the number.
    return next((entry.key for entry in reversed(entries) if entry.pid == monitor.pid and entry.age <= age), "")


def belonging(processes: Sequence[Process], roots: Iterable[int], scopes: Iterable[str]) -> set[int]:
    """Return the processes *roots*, all below them, and all in the sessions *scopes* of systemd: also what left its parent."""
    found = {process.pid for process in processes if process.pid in set(roots) or process.scope in set(scopes)}
    while more := {process.pid for process in processes if process.parent in found} - found:
        found |= more
    return found


def above(processes: Iterable[Process], pid: int) -> set[int]:
    """Return *pid* and all processes that it descends from."""
    parents = {process.pid: process.parent for process in processes}
    found = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found


def peers(tables: Iterable[str]) -> dict[str, str]:
    """Return inode → address of the other end, of the TCP connections in *tables*: texts of /proc/net/tcp and tcp6."""
    found = {}
    for table in tables:
        for row in (line.split() for line in table.splitlines()[1:]):
            number = row[2].split(":")[0]
            words = [bytes.fromhex(number[at : at + 8])[::-1] for at in range(0, len(number), 8)]
            address = ipaddress.ip_address(b"".join(words))
            found[row[9]] = str(getattr(address, "ipv4_mapped", None) or address)
    return found


def fingerprints(shown: str) -> set[str]:
    """Return the keys in what ssh-keygen -l has shown of a file."""
    return {words[1] for words in map(str.split, shown.splitlines()) if len(words) > 1}


def running() -> Iterator[Process]:
    """Yield the processes of this host that have not ended."""
    per_second = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            name, _, rest = (folder / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
            fields = rest.split()
            uid = re.search(r"^Uid:\t\d+\t(\d+)", (folder / "status").read_text(errors="replace"), re.MULTILINE)
            scope = SCOPE.search((folder / "cgroup").read_text())
            if uid and fields[0] not in "ZX":
                started = int(fields[19]) / per_second
                yield Process(int(folder.name), int(fields[1]), int(uid[1]), name, started, scope[1] if scope else "")


def sockets(pid: int) -> list[str]:
    """Return the inodes of the sockets that a process has open."""
    found = []
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(file)
                if target.startswith("socket:["):
                    found.append(target[8:-1])
    return found
