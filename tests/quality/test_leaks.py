"""The search for leaked secrets finds them in every form, and a task without no_log is one that it finds."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import yaml

from tests.leaks import runs
from tests.leaks.finder import SHORTEST, Arguments, key_line, on_controller, request

PROJECT = Path(__file__).resolve().parents[2]
SECRET = "Planted+" + "value/of=this:test" + "-7Qz"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "abcd"])
@pytest.mark.parametrize("after", ["", "z", "zy"])
def test_a_secret_is_found_in_base64_wherever_it_begins(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "log").write_bytes(b"x" + base64.b64encode(f"{before}{SECRET}{after}".encode()) + b"y")
    assert on_controller([SECRET], [tmp_path]) == [str(tmp_path / "log")]


@pytest.mark.parametrize("form", [SECRET, urllib.parse.quote(SECRET, safe="")])
def test_a_secret_is_found_plain_and_url_encoded_also_across_a_block(tmp_path: Path, form: str) -> None:
    (tmp_path / "log").write_text("x" * ((1 << 20) - 5) + form)
    assert on_controller([SECRET], [tmp_path / "log"]) == [str(tmp_path / "log")]


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(SECRET[:-1] + base64.b64encode(SECRET[:-4].encode()).decode())
    assert on_controller([SECRET], [tmp_path]) == []


def test_processes_and_the_journal_are_searched(tmp_path: Path) -> None:
    """A process that carries the secret in its environment, and one in its arguments."""
    wait = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait]
    found = []
    for argv, environment in (([*command, SECRET], {}), (command, {"X": SECRET})):
        with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"up\n"
            text = request([SECRET], [], True)
            # The journal of this machine is not the test's business.
            said = f"MESSAGE={SECRET}" if environment else "nothing"
            tools = tmp_path / "journalctl"
            tools.write_text(f"#!/bin/sh\necho '{said}'\n")
            tools.chmod(0o755)
            done = subprocess.run(
                [sys.executable, str(PROJECT / "tests/leaks/search.py")], input=text, capture_output=True, text=True,
                env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True,
            )  # fmt: skip
            found.append([place for place in done.stdout.splitlines() if place.startswith(f"/proc/{process.pid}/")])
            assert ("the journal" in done.stdout.splitlines()) is bool(environment)
            process.communicate(b"")
    assert [[place.rsplit("/", 1)[1] for place in places] for places in found] == [["cmdline"], ["environ"]]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_task_without_no_log_leaks_at_vvv_and_is_found(tmp_path: Path, hidden: bool) -> None:
    """The negative control: the same task, with and without no_log."""
    task = {"ansible.builtin.copy": {"content": SECRET, "dest": str(tmp_path / "written")}, "no_log": hidden}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [task]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-vvv", "--diff"]
    done = subprocess.run(
        [*command, str(tmp_path / "play.yml")], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = tmp_path / "log"
    log.write_text(done.stdout + done.stderr)
    assert on_controller([SECRET], [log]) == ([] if hidden else [str(log)])


def test_no_playbook_is_forgotten_by_the_leak_test(tmp_path: Path) -> None:
    """What is new has to be run by it, or to be left out by name, with the reason; what is gone is not named."""
    assert runs.forgotten() == []
    assert all(runs.LEFT_OUT.values())
    named = {*(run.playbook for run in runs.RUNS), *runs.IN_ROTATIONS, *runs.LEFT_OUT}
    assert [name for name in sorted(named) if not (runs.PLAYBOOKS / f"{name}.yml").is_file()] == []
    for name in ("new", "site"):
        (tmp_path / f"{name}.yml").touch()
    assert runs.forgotten(tmp_path) == ["new"]


def test_a_private_key_is_known_by_a_line_that_no_other_key_has(tmp_path: Path) -> None:
    lines = []
    for name in ("a", "b"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
        lines.append(key_line((tmp_path / name).read_text()))
        assert lines[-1] not in (tmp_path / f"{name}.pub").read_text()
    assert lines[0] != lines[1] and min(map(len, lines)) > SHORTEST


def test_arguments_of_a_process_are_noted_while_it_runs(tmp_path: Path) -> None:
    with Arguments(tmp_path / "arguments"):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1)", SECRET], check=True)
    assert on_controller([SECRET], [tmp_path]) == [str(tmp_path / "arguments")]
