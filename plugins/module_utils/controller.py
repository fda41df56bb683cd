"""The machine that runs a playbook: who it is for a lock, and whether the process that took a lock is certainly gone."""

from __future__ import annotations

import getpass
import os
import socket
import time
from pathlib import Path


def controller() -> dict[str, str]:
    """Return who deploys from where (holder), the controlling process, an identity for this deploy, and its start."""
    pid = playbook_process()
    return {
        "holder": f"{getpass.getuser()}@{socket.gethostname()}",
        "process": " ".join([*machine(), str(pid), started(pid) or "?"]),
        "deploy": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{pid}",
        "began": str(time.time()),
    }


def playbook_process() -> int:
    """Return the process of ansible-playbook, whose workers are copies of it: this one's eldest ancestor with the same command.

    Who started it (a shell, sudo, a job's script) has another command, and may well outlive it.
    """
    pid = os.getpid()
    while True:
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if Path(f"/proc/{parent}/cmdline").read_bytes() != Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except (OSError, ValueError):
            return pid
        pid = parent


def is_dead(process: str) -> bool:
    """Tell whether the controlling *process* of a lease is certainly gone: it was of this machine, and is no more."""
    return judge(process) == "dead"


def judge(process: str) -> str:
    """Return what can be said here of the controlling *process* of a lease: ``alive``, ``dead``, or ``elsewhere``."""
    try:
        known, boot, space, pid, began = process.split()
    except ValueError:
        return "elsewhere"
    ours = machine()
    if "?" in (known, boot, space, began) or known != ours[0] or (boot == ours[1] and space != ours[2]):
        return "elsewhere"
    return "alive" if boot == ours[1] and started(int(pid)) == began else "dead"


def machine() -> tuple[str, str, str]:
    """Return the identity of this machine, of its boot and of its process numbers."""

    def read(path: str) -> str:
        try:
            return Path(path).read_text().strip() or "?"
        except OSError:
            return "?"

    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = "?"
    return read("/etc/machine-id"), read("/proc/sys/kernel/random/boot_id"), space


def started(pid: int) -> str | None:
    """Return the start time of process *pid* as the kernel counts it; with the number it names one process for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
