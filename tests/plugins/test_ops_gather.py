"""What a host says to an operations check: kinds of error, failed units, accounts, ports, permissions; and what it never says."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
from ansible.module_utils import ops_gather
from ansible.module_utils.ops_archive import HIDDEN, KEPT, asked, hide, keep, load, secrets

UNLIKE = [
    ("Failed to start apt-daily.service - X.", "Failed to start nginx.service - X."),
    ("connection refused", "connection reset"),
]
ALIKE = [
    ("job 4711 failed after 3.2 s", "job 12 failed after 11.9 s"),
    ("could not fetch https://a.example/x?y=1: timed out", "could not fetch http://b.example/: timed out"),
    ("peer 192.0.2.7:4431 went away", "peer 198.51.100.9:80 went away"),
    ("peer 2001:db8::1 went away", "peer fe80::42:1 went away"),
    ("document 0191e2a4-7b3c-7def-8123-456789abcdef is gone", "document 0291e2a4-7b3c-7def-8123-456789abcdee is gone"),
    ("release 61d32c2f093a is bad", "release ca8d47513a40 is bad"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_messages_that_differ_in_values_alone_are_of_one_kind(one: str, other: str) -> None:
    assert ops_gather.kind(one) == ops_gather.kind(other)


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_messages_of_other_words_are_of_another_kind(one: str, other: str) -> None:
    assert ops_gather.kind(one) != ops_gather.kind(other)


def test_of_our_services_the_event_and_the_exception_count() -> None:
    entry = {
        "event": "job failed",
        "level": "error",
        "id": 7,
        "exception": "Traceback …\n  File x\nsqlalchemy.exc.OperationalError: gone",
    }
    assert ops_gather.kind(json.dumps(entry)) == "job failed (OperationalError)"


@pytest.mark.parametrize(
    "message",
    [
        "login failed: password=hunter2hunter2",
        "refused Authorization: Bearer abcdefgh",
        "token abcdefgh is bad",
        "bad key Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4MDE=",
    ],
)
def test_a_kind_holds_no_secret(message: str) -> None:
    shown = ops_gather.kind(message)
    assert not any(secret in shown for secret in ("hunter2", "abcdefgh", "Zm9v")), shown


def test_lines_of_a_journal_are_counted_by_unit_without_slot_and_kind() -> None:
    def line(unit: str, message: object, at: int, by: str = "python3") -> str:
        entry = {"_SYSTEMD_UNIT": unit, "MESSAGE": message, "__REALTIME_TIMESTAMP": str(at * 1_000_000)}
        return json.dumps(entry | {"SYSLOG_IDENTIFIER": by})

    lines = [
        line("atlas-core@blue.service", "job 1 failed", 5),
        line("atlas-core@green.service", "job 2 failed", 9),
        line("init.scope", "Failed to start x.", 3, "systemd"),
        line("session-7.scope", list(b"bytes 1"), 3, "sshd"),
        "no json",
        json.dumps({"SYSLOG_IDENTIFIER": "kernel", "MESSAGE": "Out of memory", "__REALTIME_TIMESTAMP": "1000000"}),
    ]
    assert ops_gather.kinds(lines) == {
        "atlas-core: job N failed": {"count": 2, "last": 9.0},
        "systemd: Failed to start x.": {"count": 1, "last": 3.0},
        "sshd: bytes N": {"count": 1, "last": 3.0},
        "kernel: Out of memory": {"count": 1, "last": 1.0},
    }


def test_failed_units() -> None:
    text = "● a.service loaded failed failed The A\nb@1.timer loaded failed failed B\n"
    assert ops_gather.failed_units(text) == [
        {"unit": "a.service", "about": "The A"},
        {"unit": "b@1.timer", "about": "B"},
    ]


def test_accounts_that_may_do_something_and_why(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (etc / "sudoers.d").mkdir(parents=True)
    (etc / "passwd").write_text(
        "root:x:0:0::/root:/bin/bash\ndaemon:x:1:1::/:/usr/sbin/nologin\ndeploy:x:1000:1000::/home/deploy:/bin/sh\n"
        "toor:x:0:0::/root2:/bin/sh\neasy:x:1001:1001::/home/easy:/bin/sh\npostgres:x:100:100::/var/lib/postgresql:/bin/bash\n"
    )
    (etc / "shadow").write_text("root:*:1::\ndaemon:*:1::\ndeploy:!:1::\ntoor:$y$hash:1::\neasy::1::\npostgres:!:1::\n")
    (etc / "group").write_text("sudo:x:27:easy\nstaff:x:50:deploy\n")
    (etc / "sudoers.d" / "deploy").write_text("# comment\ndeploy ALL=(ALL) NOPASSWD: ALL\n")
    blob = base64.b64encode(b"a public key of somebody").decode()
    (tmp_path / "home/deploy/.ssh").mkdir(parents=True)
    (tmp_path / "home/deploy/.ssh/authorized_keys").write_text(
        f'restrict,command="x" ssh-ed25519 AAAA{blob} deploy\n# no key\n'
    )
    found = {each["name"]: each for each in ops_gather.accounts(tmp_path)}
    assert list(found) == ["root", "deploy", "toor", "easy"], "who cannot log in is not among them"
    assert found["deploy"]["why"] == ["SSH keys", "rights by sudo"]
    assert found["toor"]["why"] == ["root's own number", "a password"]
    assert found["easy"]["why"] == ["an empty password", "member of sudo"]
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(f"AAAA{blob}")).digest()).decode().rstrip("=")
    assert found["deploy"]["keys"] == [f"SHA256:{digest}"]
    assert "hash" not in json.dumps(found)


def test_a_socket_that_listens_here_is_seen_with_its_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine, socket.create_server(("0.0.0.0", 0)) as open_one:  # noqa: S104
        found = {each["port"]: each for each in ops_gather.sockets() if each["protocol"] == "tcp"}
        assert found[mine.getsockname()[1]]["loopback"] is True
        seen = found[open_one.getsockname()[1]]
    assert seen["loopback"] is False and seen["addresses"] == ["0.0.0.0"]  # noqa: S104
    assert seen["by"] == [Path("/proc/self/comm").read_text().strip()]


def test_ports_that_a_ruleset_accepts() -> None:
    ruleset = 'tcp dport 22 accept comment "ssh"\nip saddr 192.0.2.1 tcp dport { 80, 443 } accept\ntcp dport 25 drop\n'
    assert ops_gather.accepted(ruleset) == [22, 80, 443]


def test_what_too_many_may_read_or_write(tmp_path: Path) -> None:
    def file(name: str, mode: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        path.chmod(mode)

    file("etc/atlas/key", 0o644)
    file("etc/atlas/key.pub", 0o644)
    file("etc/atlas/closed", 0o640)
    file("hidden/key", 0o644)
    file("opt/tool", 0o777)
    (tmp_path / "hidden").chmod(0o700)
    (tmp_path / "opt/shared").mkdir()
    (tmp_path / "opt/shared").chmod(0o1777)
    for place in (tmp_path, tmp_path / "etc", tmp_path / "etc/atlas"):
        place.chmod(0o755)
    found = list(ops_gather.permissions(["/etc/atlas/*", "/hidden/*"], ["/opt"], tmp_path))
    assert [(each["path"].removeprefix(str(tmp_path)), each["mode"], each["wrong"]) for each in found] == [
        ("/etc/atlas/key", "0644", "everybody may read it"),
        ("/opt/tool", "0777", "everybody may write it"),
    ]


def test_programs_with_the_rights_of_their_owner(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "su").touch()
    (tmp_path / "su").chmod(0o4755)
    assert ops_gather.setuid([str(tmp_path)]) == {str(tmp_path / "su")}


def test_disks_are_named_once() -> None:
    found = ops_gather.disks(["/", "/", "/nowhere"])
    assert list(found) == ["/"] and 0 < found["/"]["used_mb"] <= found["/"]["total_mb"]


def report(at: float, check: str = "daily") -> dict[str, object]:
    return {"check": check, "at": at, "findings": [], "sections": [], "keeps": {}}


def test_reports_come_back_oldest_first_and_old_ones_go(tmp_path: Path) -> None:
    place = tmp_path / "ops" / "staging"
    path = keep(report(1_790_000_000.0), place)
    assert path.name == "daily-20260921T141320Z.json" and path.stat().st_mode & 0o777 == 0o600
    keep(report(1_780_000_000.0), place)
    keep(report(1_790_000_050.0, "weekly"), place)
    (place / "daily-torn.json").write_text("{")
    assert [each["at"] for each in load(place)] == [1_780_000_000.0, 1_790_000_000.0, 1_790_000_050.0]
    assert asked(place, "daily", "app1") == 1_790_000_000.0, "a report from before hosts were noted"
    assert asked(place, "monthly", "app1") is None and asked(tmp_path / "none", "daily", "app1") is None
    keep({**report(1_790_000_060.0), "asked": {"app1": 1_789_999_999.5}}, place)
    assert asked(place, "daily", "app1") == 1_789_999_999.5 and asked(place, "daily", "app2") is None
    for n in range(KEPT):
        os.link(path, place / f"daily-2025{n:04}.json")
    keep(report(1_790_000_100.0), place)
    assert len(list(place.glob("daily-2*.json"))) <= KEPT and len(list(place.glob("weekly-*.json"))) == 1


def test_no_secret_of_the_vault_stays_in_a_report() -> None:
    secret, lines = "s3cret-of-the-vault", "first-line-of-a-key\nsecond-line-of-a-key"
    known = secrets([{"token": secret, "scopes": ["read"]}, lines])
    shown = json.dumps(hide({"a": [f"x {secret} y, ready"], secret: {"b": "second-line-of-a-key"}, "n": 1}, known))
    assert secret not in shown and "second-line" not in shown and shown.count(HIDDEN) == 3
    assert "ready" in shown, "short strings of a vault are names"
