"""No playbook leaks a secret: every one runs at -vvv --diff, then everything is searched; a task without no_log is found.

    .venv/bin/pytest -x tests/leaks          # about 20 minutes. ATLAS_LEAKS_LAB=NAME: in this lab, which stays if it is there already

Part of `make test-full`. The tests are one story, in this order; the last one takes the lab down. What was said is in `.cache/leaks`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.rotation import KINDS
from labtest import PROJECT, Lab
from prooftest import QUICK

from tests.leaks import finder
from tests.leaks.runs import ENVIRONMENT, HOSTS, IN_ROTATIONS, OF_THIS_MACHINE, RUNS, WITHOUT_INVENTORY, Run

NAME = os.environ.get("ATLAS_LEAKS_LAB", "test-leaks")
INVENTORIES = PROJECT / ".cache/leaks/inventories"
LOGS = PROJECT / ".cache/leaks/logs"
NAMES = [f"{number:02}-{run.playbook}" for number, run in enumerate(RUNS)]
FIRST: set[str] = set()
KNOWN: set[str] = set()
"""What was secret in this lab at first, and all that ever was. Not to be named in an assertion, which would say it."""
pytestmark = pytest.mark.timeout(3600)


def derive_environment() -> None:
    """Make a copy of the inventories in which the environment has few hosts, and waits for nothing."""
    shutil.rmtree(INVENTORIES, ignore_errors=True)
    shutil.copytree(PROJECT / "inventories", INVENTORIES, symlinks=True)
    groups = {group for of in HOSTS.values() for group in of}
    children: dict[str, Any] = {
        group: {"hosts": {host: {} for host, of in HOSTS.items() if group in of}} for group in groups
    }
    hosts = {"hosts": {host: {"debian_release": "bookworm"} for host in HOSTS}, "children": children}
    (INVENTORIES / ENVIRONMENT / "hosts.yml").write_text(yaml.safe_dump({"all": hosts}))
    # After main.yml. Credentials reach the hosts in the same way, whatever the strategy; this one takes less time.
    quick = {**QUICK, "deploy_strategy": "blue_green"}
    (INVENTORIES / ENVIRONMENT / "group_vars/all/quick.yml").write_text(yaml.safe_dump(quick))


def run_playbook(lab: Lab, run: Run, log: Path, playbook: Path | None = None) -> int:
    """Run it at -vvv --diff into *log*, and note the arguments of all processes meanwhile; return its exit status."""
    releases = sorted((PROJECT / "dist").glob("atlas-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    places = {
        "lab": lab.name, "inventory": lab.inventory, "inventories": INVENTORIES, "release": releases[-1], "folder": LOGS,
    }  # fmt: skip
    inventory = [] if run.playbook in WITHOUT_INVENTORY else ["-i", str(lab.inventory)]
    if run.playbook in OF_THIS_MACHINE:
        inventory = ["-i", "localhost,"]
    path = playbook or Path("playbooks") / f"{run.playbook}.yml"
    words = [*inventory, str(path), "-vvv", "--diff", *(word.format(**places) for word in run.arguments)]
    lab.environment["ATLAS_SURVEY_KEY"] = "0" * 64
    with finder.Arguments(log.with_suffix(".arguments")):
        done = lab.run("ansible-playbook", *words, timeout=3000)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The lab, raised by the first of the runs; it goes, whatever happens, unless it was there."""
    was_there = (PROJECT / ".lab" / NAME / "access.json").exists()
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True, mode=0o700)
    derive_environment()
    subprocess.run([sys.executable, "bin/build-release"], cwd=PROJECT, check=True, capture_output=True)
    log = LOGS / f"{NAMES[0]}.log"
    try:
        assert run_playbook(Lab(NAME, "", "", {}, ""), RUNS[0], log) == 0, log.read_text()[-6000:]
        lab = Lab.open(NAME)
        FIRST.update(finder.secrets_of(lab.folder))
        KNOWN.update(FIRST)
        yield lab
    finally:
        if not was_there:
            subprocess.run(["make", "down", f"LAB={NAME}"], cwd=PROJECT, check=True, capture_output=True)


@pytest.mark.parametrize("number", range(1, len(RUNS) - 1), ids=NAMES[1:-1])
def test_a_playbook_at_its_most_talkative_says_no_secret(lab: Lab, number: int) -> None:
    run, log = RUNS[number], LOGS / f"{NAMES[number]}.log"
    status = run_playbook(lab, run, log)
    KNOWN.update(finder.secrets_of(lab.folder))
    said = log.read_text()
    assert "PLAY RECAP" in said and (run.says in said if run.says else status == 0), said[-6000:]
    places = finder.on_controller(KNOWN, [LOGS, *finder.left_here(lab.folder)])
    assert places == []


def test_what_rotations_ran_was_as_talkative_and_is_in_their_log(lab: Lab) -> None:
    said = (lab.folder / "rotation.log").read_text()
    assert [playbook for playbook in IN_ROTATIONS if f"{playbook}.yml, exit status 0\n" not in said] == []
    assert said.count("ansible-playbook [core ") == said.count(".yml, exit status "), (
        "not all of them were run with -vvv"
    )


def test_nothing_that_was_ever_secret_is_on_any_host_or_left_on_the_controller(lab: Lab) -> None:
    made = len(KNOWN - FIRST)
    assert made >= len(KINDS), "every kind of rotation makes one at least"
    places = finder.leaks(lab.folder, KNOWN, [LOGS])
    assert places == []


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
    log = LOGS / f"{NAMES[-1]}.log"
    assert run_playbook(lab, RUNS[-1], log) == 0, log.read_text()[-6000:]
    places = finder.on_controller(KNOWN, [LOGS])
    assert places == []
    assert not lab.folder.exists()
