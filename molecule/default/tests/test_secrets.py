"""Secrets change while the service serves, and none is said or left anywhere. Small; every kind and playbook: tests/rotation, tests/leaks.

Rotations run at -vvv --diff, and what they said is searched as well.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import yaml
from backuptest import ingest
from interruptions import locked
from labtest import PROJECT, Lab, slot_in_service
from prooftest import Step, load, play, query, wait_until
from rotationtest import begun, half_rotated, rotate, secrets

sys.path.insert(0, str(PROJECT))

from tests.leaks import finder

RATE = 10.0
KILL_SECONDS = 2.0
"""So long after its first deploy has begun, the new key is not everywhere."""
TALKATIVE = ("-vvv", "--diff")
OPENED = """#python
import sys
sys.path.insert(0, "/opt/atlas/slots/{slot}/release/python%d.%d" % sys.version_info[:2])
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
keyring = MultiFernet([Fernet(key) for key in {keys!r}])
count = 0
for sealed in {sealed!r}:
    try:
        keyring.decrypt(sealed)
        count += 1
    except InvalidToken:
        pass
print(count)
"""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def known(lab: Lab) -> set[str]:
    """All that was ever secret in this lab."""
    return finder.secrets_of(lab.folder)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what playbooks said is kept for the search."""
    return tmp_path_factory.mktemp("logs")


def keep(step: Step, logs: Path) -> Step:
    (logs / f"{time.monotonic_ns()}.log").write_text(step.output)
    return step.succeeded()


def opened(lab: Lab, keys: list[str]) -> int:
    """Return how many sensitive fields of the store *keys* open; it has some."""
    host = lab.group("app")[0]
    sealed = query(lab, "SELECT sensitive FROM documents WHERE sensitive IS NOT NULL").splitlines()
    assert len(sealed) >= 3
    script = OPENED.format(slot=slot_in_service(lab, host), keys=keys, sealed=sealed)
    return int(lab.ssh(host, script).stdout)


def test_the_keyring_is_replaced_under_load_and_a_kill(lab: Lab, known: set[str], logs: Path) -> None:
    ingest(lab, ["k1", "k2", "k3"])
    old = secrets(lab)["vault_atlas_fernet_keys"]
    assert opened(lab, old) >= 3
    with load(lab, RATE) as running:
        with begun(lab, "fernet"):
            wait_until(lambda: locked(lab), 120, "its deploy is under way", pause=0.1)
            time.sleep(KILL_SECONDS)
        assert "fernet" in half_rotated(lab)
        keep(rotate(lab, "fernet", *TALKATIVE), logs)
    verdict = running.verdict()
    assert verdict.good, str(verdict)
    new = secrets(lab)["vault_atlas_fernet_keys"]
    assert not set(old) & set(new)
    assert opened(lab, old) == 0 and opened(lab, new) >= 3
    assert half_rotated(lab) == ""


def test_tokens_are_replaced_and_the_old_ones_refused_at_once(lab: Lab, known: set[str], logs: Path) -> None:
    old = lab.token
    assert lab.http("GET", "/v1/documents").status == 200
    keep(rotate(lab, "tokens", "-e", "revoke=now", "-e", "confirm=development", *TALKATIVE), logs)
    lab.token = Lab.open(lab.name).token
    assert lab.http("GET", "/v1/documents").status == 200
    assert lab.http("GET", "/v1/documents", token=old).status == 401


def test_a_vault_file_from_before_that_provisions_nothing(lab: Lab) -> None:
    """Noted by the steps of the rotations, and by the deployments that they brought into service."""
    play(lab, "site", "-e", "vault_serial=0").refused(
        "(vault_serial 0)", "fernet (finished", "tokens (finished", "deployment "
    )


def test_no_secret_was_said_or_left_anywhere(lab: Lab, known: set[str], logs: Path) -> None:
    keep(play(lab, "site", *TALKATIVE), logs)
    ever = known | finder.secrets_of(lab.folder)
    assert len(ever) > len(known), "rotations made none"
    assert "PLAY RECAP" in (lab.folder / "rotation.log").read_text()
    assert finder.leaks(lab.folder, ever, [logs]) == []


def test_a_task_without_no_log_is_found(lab: Lab, tmp_path: Path) -> None:
    """The negative control: what it says, and what it leaves."""
    host = lab.group("app")[0]
    task = {"ansible.builtin.copy": {"content": "{{ atlas_tokens[0].token }}", "dest": "/var/tmp/leak", "mode": "0600"}}
    playbook, log = tmp_path / "leaky.yml", tmp_path / "leaky.log"
    playbook.write_text(yaml.safe_dump([{"hosts": "app", "gather_facts": False, "tasks": [task]}]))
    try:
        done = lab.run("ansible-playbook", "-i", str(lab.inventory), str(playbook), *TALKATIVE)
        log.write_text(done.stdout + done.stderr)
        assert done.returncode == 0, log.read_text()
        found = finder.leaks(lab.folder, finder.secrets_of(lab.folder), [log])
    finally:
        lab.ssh(host, "rm -f /var/tmp/leak")
    assert {f"controller: {log}", f"{host}: /var/tmp/leak"} <= set(found), found
