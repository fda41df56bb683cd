#!/usr/bin/python
"""Module ssh_sessions: ends the SSH sessions of an account that began with a key which is not let in any more."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ssh_sessions
short_description: End the SSH sessions that began with a key which is not let in any more
description:
  - Shutting a key out of C(authorized_keys) leaves the sessions that began with it, and the connections that they share, as they
    are. This ends those of one account, with all processes that were started in them.
  - Which key a session began with is in the journal of sshd. Where that does not tell (any more), the session is ended as well. The
    connection by which this module came is left.
options:
  user:
    description: The account, not root.
    type: str
    required: true
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: End the sessions of who is not let in any more
  ssh_sessions:
    user: deploy
"""

RETURN = r"""
ended:
  description: For each session C(user), C(address), C(since) (RFC 3339) and C(key), the fingerprint; V("") for what is not known.
  type: list
  returned: success
"""

import datetime
import os
import pwd
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ssh_sessions import (
    Accepted,
    Process,
    above,
    accepted,
    belonging,
    fingerprints,
    key_of,
    monitors,
    peers,
    running,
    sockets,
)

KEY_FILES = (".ssh/authorized_keys", ".ssh/authorized_keys2")
"""Where sshd looks for keys, unless told otherwise."""
SECONDS = 20.0


class SessionFailure(Exception):
    """Sessions that cannot be ended; the message says why."""


def let_in(account: pwd.struct_passwd) -> set[str]:
    """Return the keys with which *account* can log in."""
    found: set[str] = set()
    for name in KEY_FILES:
        file = Path(account.pw_dir) / name
        if file.is_file():
            shown = subprocess.run(
                ["ssh-keygen", "-l", "-E", "sha256", "-f", str(file)], capture_output=True, text=True, check=False
            )
            found |= fingerprints(shown.stdout)
    return found


def accepted_by(pids: list[int]) -> list[Accepted]:
    """Return the keys that processes of root's with these numbers have accepted since the host was booted."""
    subprocess.run(["journalctl", "--sync"], capture_output=True, check=False)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    matches = ["_UID=0", f"_BOOT_ID={boot}", *(f"_PID={pid}" for pid in pids)]
    shown = subprocess.run(
        ["journalctl", "--quiet", "--no-pager", "--output=json", "--output-fields=MESSAGE,_PID", *matches],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return accepted(shown.stdout.splitlines(), time.clock_gettime(time.CLOCK_MONOTONIC))


def shut_out(processes: list[Process], uid: int, good: set[str], own: set[int]) -> dict[Process, dict[str, str]]:
    """Return monitor → address, since and key, of each session of *uid* with none of the *good* keys, less the one above *own*."""
    others = [monitor for monitor in monitors(processes, uid) if monitor.pid not in own]
    if not others:
        return {}
    entries = accepted_by([monitor.pid for monitor in others])
    connected = peers(
        Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6") if Path(f"/proc/net/{table}").exists()
    )
    now, found = time.clock_gettime(time.CLOCK_BOOTTIME), {}
    for monitor in others:
        key = key_of(monitor, entries, now)
        if key not in good:
            since = datetime.datetime.fromtimestamp(time.time() - (now - monitor.started), datetime.UTC)
            found[monitor] = {
                "address": next((connected[inode] for inode in sockets(monitor.pid) if inode in connected), ""),
                "since": since.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "key": key,
            }
    return found


def end(user: str, check: bool) -> list[dict[str, str]]:
    """End the sessions of *user* that are to be ended, and return them; with *check* only return them. Raises SessionFailure."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise SessionFailure(f"There is no account {user}.") from None
    if account.pw_uid == 0:
        raise SessionFailure("A session of root's is not told from sshd itself: end it by hand.")
    ended: dict[Process, dict[str, str]] = {}
    deadline = time.monotonic() + SECONDS
    while True:
        processes = list(running())
        own = above(processes, os.getpid())
        ended |= shut_out(processes, account.pw_uid, let_in(account), own)
        alive = {monitor.pid for monitor in ended if monitor in processes}
        left = belonging(processes, alive, {monitor.scope for monitor in ended} - {""}) - own
        if check or not left:
            return [{"user": user, **of} for of in ended.values()]
        if time.monotonic() > deadline:
            raise SessionFailure(f"Processes of sessions of {user} do not end: {', '.join(map(str, sorted(left)))}")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={"user": {"type": "str", "required": True}}, supports_check_mode=True)
    try:
        ended = end(module.params["user"], module.check_mode)
    except (SessionFailure, OSError) as error:
        module.fail_json(msg=str(error))
    for each in [] if module.check_mode else ended:
        module.log(
            f"ended an SSH session of {each['user']} from {each['address']} since {each['since']}, key {each['key']}"
        )
    module.exit_json(changed=bool(ended), ended=ended)


if __name__ == "__main__":
    main()
