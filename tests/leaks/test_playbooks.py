"""No playbook leaks a secret: every one runs at -vvv --diff, then everything is searched; a task without no_log is found.

    .venv/bin/pytest -x tests/leaks          # about half an hour. ATLAS_LEAKS_LAB=NAME: another lab, also one that is there

Part of `make test-full`. The tests are one story, in this order; the last one takes the lab down. What was said is in `.cache/leaks`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from labtest import PROJECT, Lab

from tests.leaks import finder, runs
from tests.leaks.runs import ENVIRONMENT, RUNS, Run

NAME = os.environ.get("ATLAS_LEAKS_LAB", "test-leaks")
LOGS = PROJECT / ".cache/leaks"
KNOWN: set[str] = set()
"""All that was ever secret in this lab."""
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab in the shape of staging with the service in it; what this raised goes, whatever happens."""
    raised = not (PROJECT / ".lab" / NAME / "access.json").exists()
    if raised:
        subprocess.run(["bin/up", ENVIRONMENT, NAME], cwd=PROJECT, check=True)
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True, mode=0o700)
    yield Lab.open(NAME)
    if raised:
        subprocess.run(["make", "down", f"LAB={NAME}"], cwd=PROJECT, check=True, capture_output=True)


def run_playbook(lab: Lab, run: Run, log: Path, playbook: Path | None = None) -> int:
    """Run it at -vvv --diff into *log*, and note the arguments of all processes meanwhile; return its exit status."""
    key = lab.folder / "ssh_key"
    places = {
        "lab": lab.name, "inventory": str(lab.inventory), "key": str(key),
        "public": key.with_name("ssh_key.pub").read_text().strip(), "folder": str(LOGS),
    }  # fmt: skip
    words = [word if word.startswith('{"') else word.format(**places) for word in run.arguments]
    inventory = "localhost," if run.playbook in runs.WITHOUT_INVENTORY else str(lab.inventory)
    path = playbook or Path("playbooks") / f"{run.playbook}.yml"
    lab.environment["ATLAS_SURVEY_KEY"] = "0" * 64
    with finder.Arguments(log.with_suffix(".arguments")):
        done = lab.run("ansible-playbook", "-i", inventory, str(path), "-vvv", "--diff", *words, timeout=3000)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


@pytest.mark.parametrize("number", range(len(RUNS) - 1), ids=[run.name for run in RUNS[:-1]])
def test_a_playbook_at_its_most_talkative_says_no_secret(lab: Lab, number: int) -> None:
    run = RUNS[number]
    KNOWN.update(finder.secrets_of(lab.folder))
    log = LOGS / f"{number:02}-{run.playbook}.log"
    status = run_playbook(lab, run, log)
    KNOWN.update(finder.secrets_of(lab.folder))
    assert status == 0 or run.may_fail, log.read_text()[-6000:]
    assert "PLAY RECAP" in log.read_text()
    assert finder.on_controller(KNOWN, [log, log.with_suffix(".arguments")]) == []


def test_nothing_that_was_ever_secret_is_on_any_host_or_left_on_the_controller(lab: Lab) -> None:
    KNOWN.update(finder.secrets_of(lab.folder))
    assert len(KNOWN) > 20, "rotations must have made others"
    assert finder.leaks(lab.folder, KNOWN, [LOGS]) == []


def test_a_play_without_no_log_is_found_in_each_place(lab: Lab, tmp_path: Path) -> None:
    """The negative control. What the vault holds goes to a file and to the log, a planted value everywhere else."""
    planted = "planted-" + secrets.token_urlsafe(24)
    tasks = [
        {"ansible.builtin.copy": {"content": "{{ atlas_tokens[0].token }}", "dest": "/var/tmp/leak", "mode": "0600"}},
        {"ansible.builtin.command": f"logger -t leak {planted}"},
        {"ansible.builtin.command": f"systemd-run --unit=leak sh -c 'sleep 600; exit' {planted}"},
    ]
    (tmp_path / "leaky.yml").write_text(
        yaml.safe_dump([{"name": "Leak", "hosts": "app[0]", "gather_facts": False, "tasks": tasks}])
    )
    log, host = tmp_path / "leaky.log", lab.group("app")[0]
    try:
        assert run_playbook(lab, Run("leaky"), log, tmp_path / "leaky.yml") == 0, log.read_text()
        found = finder.leaks(lab.folder, {*finder.secrets_of(lab.folder), planted}, [tmp_path])
    finally:
        process = lab.ssh(
            host, "systemctl show -P MainPID leak; systemctl stop leak; rm -f /var/tmp/leak"
        ).stdout.strip()
    wanted = {f"controller: {log}", f"controller: {log.with_suffix('.arguments')}"}
    wanted |= {f"{host}: {place}" for place in ("/var/tmp/leak", "the journal", f"/proc/{process}/cmdline")}
    assert wanted <= set(found), found


def test_taking_the_lab_down_says_no_secret(lab: Lab) -> None:
    """The last playbook; it was searched for what is secret before."""
    log = LOGS / "lab_down.log"
    assert run_playbook(lab, RUNS[-1], log) == 0, log.read_text()[-6000:]
    assert finder.on_controller(KNOWN, [log, log.with_suffix(".arguments")]) == []
    assert not lab.folder.exists()
