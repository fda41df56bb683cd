"""Every kind of secret is rotated under load and killed again and again; nothing is lost, and the old secret is refused.

    make rotations [LAB=NAME]          # about an hour; a lab that is there already is used and left

One lab in the shape of staging serves all of them. Part of `make test-full`. ATLAS_ROTATION_KILLS: kills of each kind (10).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "molecule")]

from labtest import Lab  # noqa: E402
from prooftest import load, wait_until  # noqa: E402
from rotationtest import (  # noqa: E402
    accepted,
    backup_is_sound,
    begun,
    half_rotated,
    killed,
    logged_in,
    old_key_is_refused,
    presented,
    rotate,
    secrets,
)

NAME = os.environ.get("ATLAS_ROTATION_LAB", "test-rotation")
KILLS = int(os.environ.get("ATLAS_ROTATION_KILLS", "10"))
KINDS = os.environ.get("ATLAS_ROTATION_KINDS", "database,backup,fernet,tls,ssh,vault").split(",")
RATE = 10.0
SEED = 6
SURVEY_SECONDS = 8.0
"""For so long a run only looks."""

pytestmark = pytest.mark.timeout(4 * 3600)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab in the shape of staging; what this raised goes, whatever happens."""
    raised = not (PROJECT / ".lab" / NAME / "access.json").exists()
    if raised:
        subprocess.run(["bin/up", "staging", NAME], cwd=PROJECT, check=True)
    yield Lab.open(NAME)
    if raised:
        subprocess.run(["make", "down", f"LAB={NAME}"], cwd=PROJECT, check=True, capture_output=True)


def refused(lab: Lab, kind: str, old: dict[str, Any], files: dict[str, Any]) -> None:
    """Assert that the *old* secret of *kind* is refused, and that the new one is not."""
    now = accepted(lab, secrets(lab))
    assert all(now.values()), now
    was = accepted(lab, old)
    gone = {"database": {"database"}, "backup": {"backup login", "repository"}}.get(kind, set())
    assert {what for what, is_good in was.items() if not is_good} == gone, was
    if kind == "fernet":
        assert not set(old["vault_atlas_fernet_keys"]) & set(secrets(lab)["vault_atlas_fernet_keys"])
    if kind == "tls":
        assert not {presented(lab, edge) for edge in lab.group("edge")} & files["certificates"]
    if kind == "ssh":
        old_key_is_refused(lab, files["key"])
    if kind == "vault":
        opened = lab.run(
            "ansible-vault", "view", "--vault-id", f"lab-{lab.name}@{files['password']}",
            str(lab.inventory / "group_vars/all/vault.yml"),
        )  # fmt: skip
        assert opened.returncode != 0 and "vault_" not in opened.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_that_is_killed_again_and_again_loses_nothing(lab: Lab, kind: str, tmp_path: Path) -> None:
    moments = random.Random(f"{SEED} {kind}")  # noqa: S311 - uneven, and the same each time
    files: dict[str, Any] = {"certificates": {presented(lab, edge) for edge in lab.group("edge")}}
    for name, source in (("key", "ssh_key"), ("password", "vault-password")):
        files[name] = tmp_path / name
        files[name].write_text((lab.folder / source).read_text())
        files[name].chmod(0o600)
    old = secrets(lab)
    kills = whole = 0
    with load(lab, RATE) as running:
        began = time.monotonic()
        rotate(lab, kind).succeeded()
        seconds = time.monotonic() - began
        while kills < KILLS:
            was_killed = killed(lab, kind, moments.uniform(SURVEY_SECONDS, seconds))
            kills, whole = kills + was_killed, whole + (not was_killed)
        state = half_rotated(lab)
        rotate(lab, kind).succeeded()
    verdict = running.verdict()
    print(
        f"{kind}: {seconds:.0f} s for one; {kills} kills, {whole} went through; at last {state or 'not under way'}\n{verdict}"
    )
    assert verdict.good, str(verdict)
    assert half_rotated(lab) == ""
    refused(lab, kind, old, files)
    backup_is_sound(lab)


@pytest.mark.parametrize("place", [0, -1], ids=["bookworm", "trixie"])
def test_who_is_logged_in_with_a_leaked_key_is_cut_off_and_nobody_else(lab: Lab, tmp_path: Path, place: int) -> None:
    """A session, a connection that others may share, and what was left running in it. The run's own connections are not named."""
    host, left = lab.group("app")[place], "sleep 98765"
    leaked, other, shared = tmp_path / "leaked", tmp_path / "other", str(tmp_path / "shared")
    leaked.write_text(Path(lab.ssh_key).read_text())
    leaked.chmod(0o600)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", leaked], capture_output=True, text=True, check=True).stdout
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "another", "-f", other], check=True)
    keys = "~deploy/.ssh/authorized_keys"
    lab.ssh(host, f"echo '{other.with_suffix('.pub').read_text().strip()}' >> {keys}")
    try:
        with (
            logged_in(lab, host, leaked) as one,
            logged_in(lab, host, leaked, "-M", "-S", shared) as two,
            logged_in(lab, host, other) as three,
        ):
            subprocess.run(
                ["ssh", "-S", shared, "any", f"nohup setsid {left} >/dev/null 2>&1 </dev/null &"], check=True
            )
            assert lab.ssh(host, f"pgrep -fx '{left}'").returncode == 0
            said = rotate(lab, "ssh", "-e", "revoke=now", "-e", "confirm=staging").succeeded().output
            assert (one.poll(), two.poll(), three.poll()) == (255, 255, None), said
            assert lab.ssh(host, f"pgrep -fx '{left}'").returncode == 1
        # Elsewhere runs that were killed may have left connections, which end as well.
        named = [line for line in said.splitlines() if f"cut off: an SSH session of deploy on {host}, from " in line]
        assert len(named) == 2, said
        for line in named:
            assert ", since 20" in line and shown.split()[1] in line, line
        old_key_is_refused(lab, leaked)
    finally:
        lab.ssh(host, f"sed -i '/ another$/d' {keys}")


def test_a_rotation_of_all_kinds_that_was_killed_leaves_what_it_has_finished(lab: Lab) -> None:
    """Who got a new token in the first run keeps it in the second."""
    at_once = ("-e", "revoke=now", "-e", "confirm=staging")
    app = lab.group("app")[0]
    finished = r"""grep -c '"kind": "tokens".*"step": "finished"' /var/lib/atlas-deploy/journal.jsonl"""
    before = int(lab.ssh(app, finished).stdout or 0)
    with begun(lab, "all", *at_once):
        wait_until(lambda: int(lab.ssh(app, finished).stdout or 0) > before, 600, "tokens are rotated", pause=2)
    made = secrets(lab)
    said = rotate(lab, "all", *at_once).succeeded().output
    assert "tokens   was finished at " in said and "database was finished at " not in said, said
    assert secrets(lab)["vault_atlas_tokens"] == made["vault_atlas_tokens"]
    tried = accepted(lab, made)
    assert tried["token"] and not tried["database"] and not tried["backup login"], tried
    assert all(accepted(lab, secrets(lab)).values()) and half_rotated(lab) == ""


def test_tokens_overlap_and_are_refused_whenever_it_is_killed(lab: Lab) -> None:
    """Old and new are good together, under a load with the old one; then the old one is refused, also when that is killed."""
    moments = random.Random(SEED)  # noqa: S311
    at_once = ("-e", "revoke=now", "-e", "confirm=staging")
    seconds = 60.0
    for _ in range((KILLS + 1) // 2):
        old = secrets(lab)
        with load(lab, RATE) as running:
            killed(lab, "tokens", moments.uniform(SURVEY_SECONDS, seconds))
            began = time.monotonic()
            rotate(lab, "tokens").succeeded()
            seconds = time.monotonic() - began
            assert accepted(lab, old)["token"] and accepted(lab, secrets(lab))["token"]
        verdict = running.verdict()
        print(f"tokens: {verdict}")
        assert verdict.good, str(verdict)
        killed(lab, "tokens", moments.uniform(SURVEY_SECONDS, seconds), *at_once)
        said = rotate(lab, "tokens", *at_once).succeeded().output
        assert not accepted(lab, old)["token"] and accepted(lab, secrets(lab))["token"], said
    assert half_rotated(lab) == ""
