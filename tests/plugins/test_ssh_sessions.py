"""Which SSH sessions an account has, and what belongs to them: processes as both releases of Debian have them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
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
)

DEPLOY, OTHER, SSHD = 1000, 1001, 105
KEY = "SHA256:Iqq2YhMObz45dNQa6DPQmqgpL13KSlzN4jHxY9qm27M"


def host(name: str) -> list[Process]:
    """Two sessions of deploy's (300 and 400, the second without a command), one of somebody else's, one that is not authenticated."""
    return [
        Process(1, 0, 0, "systemd", 1),
        Process(200, 1, 0, "sshd", 5),
        Process(300, 200, 0, name, 100, "session-1.scope"),
        Process(301, 300, DEPLOY, name, 100, "session-1.scope"),
        Process(302, 301, DEPLOY, "bash", 101, "session-1.scope"),
        Process(303, 302, 0, "sudo", 102, "session-1.scope"),
        Process(304, 1, DEPLOY, "sleep", 103, "session-1.scope"),
        Process(400, 200, 0, name, 200, "session-2.scope"),
        Process(401, 400, DEPLOY, name, 200, "session-2.scope"),
        Process(402, 401, DEPLOY, name, 201, "session-2.scope"),  # an internal sftp server
        Process(500, 200, 0, name, 300, "session-3.scope"),
        Process(501, 500, OTHER, name, 300, "session-3.scope"),
        Process(600, 200, 0, name, 400),
        Process(601, 600, SSHD, "sshd-auth" if name == "sshd-session" else name, 400),
        Process(700, 1, DEPLOY, "sshd", 500),  # a name that anybody may take
    ]


@pytest.mark.parametrize("name", ["sshd", "sshd-session"])
def test_the_sessions_of_an_account_are_those_it_is_authenticated_in(name: str) -> None:
    assert [each.pid for each in monitors(host(name), DEPLOY)] == [300, 400]
    assert [each.pid for each in monitors(host(name), OTHER)] == [500]
    assert monitors(host(name), 0) == []


def test_what_was_started_in_a_session_belongs_to_it_also_when_its_parent_is_gone() -> None:
    assert belonging(host("sshd"), [300], {"session-1.scope"}) == {300, 301, 302, 303, 304}
    assert belonging(host("sshd"), [300], set()) == {300, 301, 302, 303}
    assert belonging(host("sshd"), [], set()) == set()


def test_the_way_by_which_one_came_is_known() -> None:
    assert above(host("sshd"), 303) == {303, 302, 301, 300, 200, 1}


def entry(pid: int, seconds: float, message: object) -> str:
    return json.dumps(
        {"_PID": str(pid), "__MONOTONIC_TIMESTAMP": str(int(seconds * 1e6)), "__CURSOR": "s", "MESSAGE": message}
    )


def said(key: str, user: str = "deploy") -> str:
    return f"Accepted publickey for {user} from 192.0.2.7 port 51990 ssh2: ED25519 {key}"


def test_the_key_of_a_session_is_the_one_its_monitor_has_accepted_last() -> None:
    journal = [
        entry(300, 100.2, said(KEY)),
        entry(300, 100.3, "pam_unix(sshd:session): session opened for user deploy(uid=1000) by (uid=0)"),
        entry(400, 30.0, said("SHA256:ofAnEarlierProcess")),
        entry(500, 300.0, list(b"\xff")),
        entry(600, 400.0, f"Failed password: {said(KEY)}"),
    ]
    entries = accepted(journal, 1000.0)
    assert [(each.pid, each.key) for each in entries] == [(400, "SHA256:ofAnEarlierProcess"), (300, KEY)]
    one, two = monitors(host("sshd"), DEPLOY)
    assert key_of(one, entries, 1000.0) == KEY
    assert key_of(two, entries, 1000.0) == "", "its number was another's, whose key says nothing about it"
    again = [*entries, Accepted(300, 1.0, "SHA256:later")]
    assert key_of(one, again, 1000.0) == "SHA256:later"


def test_the_other_end_of_a_connection_is_read_from_the_kernels_tables() -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    tcp = head + "   1: 0100007F:5926 070200C0:CB16 01 00000000:00000000 02:000A 00000000     0        0 4711 2 0\n"
    six = head + "".join(
        f"   {at}: 00000000000000000000000001000000:0016 {remote}:CB16 01 00000000:00000000 02:000A 00000000  0   0 {4712 + at} 2\n"
        for at, remote in enumerate(["B80D0120000000000000000007000000", "0000000000000000FFFF0000070200C0"])
    )
    assert peers([tcp, six]) == {"4711": "192.0.2.7", "4712": "2001:db8::7", "4713": "192.0.2.7"}


def test_keys_are_named_as_sshd_names_them(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name], check=True)
        made.append((tmp_path / f"{name}.pub").read_text())
    keys = tmp_path / "authorized_keys"
    keys.write_text(f'# ours\n{made[0]}from="192.0.2.0/24",command="echo a b" {made[1]}')
    shown = subprocess.run(["ssh-keygen", "-l", "-E", "sha256", "-f", keys], capture_output=True, text=True, check=True)
    found = fingerprints(shown.stdout)
    assert len(found) == 2 and all(each.startswith("SHA256:") for each in found)


def test_this_process_is_seen_as_it_is() -> None:
    [me] = [process for process in running() if process.pid == os.getpid()]
    assert (me.parent, me.uid) == (os.getppid(), os.geteuid()) and me.started > 0
