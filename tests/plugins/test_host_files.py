"""host_files as Ansible runs it: many files in one call, all valid or none written, and a second call changes nothing."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
ME, OURS = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name


def call(*files: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """Return the result of the module for *files*, which belong to whoever runs this."""
    wanted = [{"owner": ME, "group": OURS, **file} for file in files]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")} | {
        "ANSIBLE_LIBRARY": str(PROJECT / "plugins" / "modules"), "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_LOCALHOST_WARNING": "0",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ansible")), "localhost", "-c", "local", "-i", "localhost,", "--diff",
        "-e", f"ansible_python_interpreter={sys.executable}", "-m", "host_files", "-a", json.dumps({"files": wanted}),
    ]  # fmt: skip
    command += ["--check"] if check else []
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]["localhost"]
    return result


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_directory_and_what_lies_in_it_and_then_nothing(tmp_path: Path) -> None:
    folder, file = tmp_path / "made", tmp_path / "made" / "settings.conf"
    wanted = [
        {"path": str(folder), "state": "directory", "mode": "0750"},
        {"path": str(file), "content": "a\nb\n", "mode": "0640", "validate": "grep -q a %s"},
    ]
    seen = call(*wanted, check=True)
    assert seen["changed"] and seen["written"] == [str(folder), str(file)] and not folder.exists()
    assert [(one["before"], one["after"]) for one in seen["diff"]] == [("", "directory\n"), ("", "a\nb\n")]
    assert call(*wanted)["written"] == [str(folder), str(file)]
    assert (file.read_text(), mode(file), mode(folder)) == ("a\nb\n", 0o640, 0o750)
    again = call(*wanted)
    assert not again["changed"] and again["written"] == [] and again["diff"] == []
    assert [path.name for path in folder.iterdir()] == ["settings.conf"], "something was left beside it"


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    same, other, loose = tmp_path / "same", tmp_path / "other", tmp_path / "loose"
    for path in (same, other, loose):
        path.write_text("old\n")
    loose.chmod(0o666)
    before = same.stat().st_ino
    wanted = [
        {"path": str(same), "content": "old\n"},
        {"path": str(other), "content": "new\n"},
        {"path": str(loose), "content": "old\n"},
    ]
    assert call(*wanted, check=True)["written"] == [str(other), str(loose)]
    assert mode(loose) == 0o666 and other.read_text() == "old\n", "a check changed something"
    result = call(*wanted)
    assert result["written"] == [str(other), str(loose)]
    assert [(one["before"], one["after"]) for one in result["diff"]] == [
        ("old\n", "new\n"),
        ("mode: 0666\n", "mode: 0644\n"),
    ]
    assert other.read_text() == "new\n" and mode(loose) == 0o644 and same.stat().st_ino == before


def test_one_that_is_refused_keeps_all_from_being_written(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.write_text("right\n")
    wanted = [
        {"path": str(good), "content": "right\n", "validate": "grep -q right %s"},
        {"path": str(bad), "content": "left\n", "validate": "sh -c 'cat $0 >&2; exit 1' %s"},
    ]
    for check in (True, False):
        result = call(*wanted, check=check)
        assert result["failed"] and f"{bad} would be wrong, so nothing was changed: sh says: left." in result["msg"]
        assert not good.exists() and bad.read_text() == "right\n"
    told = call({"path": str(good), "content": "", "validate": "no-such-command %s"})
    assert told["failed"] and "cannot be checked" in told["msg"] and not good.exists()


def test_what_a_file_begins_with_does_not_overwrite_it(tmp_path: Path) -> None:
    path = tmp_path / "map"
    wanted = {"path": str(path), "content": "first\n", "initial": True, "mode": "0600"}
    assert call(wanted)["changed"] and path.read_text() == "first\n"
    path.write_text("later\n")
    assert not call(wanted)["changed"] and path.read_text() == "later\n"
    path.chmod(0o644)
    assert call(wanted)["changed"] and (path.read_text(), mode(path)) == ("later\n", 0o600)


def test_what_is_something_else_stays_and_is_named(tmp_path: Path) -> None:
    folder, binary = tmp_path / "folder", tmp_path / "binary"
    folder.mkdir()
    binary.write_bytes(b"\xff\xfe")
    assert f"{folder} is not a file" in call({"path": str(folder), "content": "x"})["msg"]
    assert f"{binary} is not a directory" in call({"path": str(binary), "state": "directory"})["msg"]
    assert f"{binary} is no text file" in call({"path": str(binary), "content": "x"})["msg"]
    assert "file without content" in call({"path": str(tmp_path / "empty")})["msg"]
    missing = tmp_path / "missing" / "file"
    assert str(missing.parent) in call({"path": str(missing), "content": "x"})["msg"]
    assert folder.is_dir() and binary.read_bytes() == b"\xff\xfe"
