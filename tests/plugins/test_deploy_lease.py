"""The lock of deploys, and the filters that read the controller and the release."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deploy
import edge_probe
import pytest
from ansible.module_utils import controller, lease, release
from ansible.module_utils.atlas_host import Answer


def wish(state: str = "acquired", **other: Any) -> dict[str, Any]:
    who = {
        "deploy": "d1",
        "holder": "ada@laptop",
        "process": "p",
        "reason": "deploy 1.0",
        "seconds": 60,
        "replaces": "",
    }
    return {"state": state} | who | other


def test_the_second_deploy_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    lease.apply(wish(), tmp_path, False)
    with pytest.raises(lease.LeaseError, match="ada@laptop since .*deploy 1.0.*deploy_unlock=true"):
        lease.apply(wish(deploy="d2", holder="bob@desk"), tmp_path, False)


def test_a_lease_that_was_given_back_is_free(tmp_path: Path) -> None:
    lease.apply(wish(), tmp_path, False)
    assert lease.apply(wish("released"), tmp_path, False)["changed"]
    assert lease.apply(wish(deploy="d2"), tmp_path, False)["lease"]["deploy"] == "d2"


def test_nobody_gives_back_what_is_not_theirs(tmp_path: Path) -> None:
    lease.apply(wish(), tmp_path, False)
    lease.apply(wish("released", deploy="d2"), tmp_path, False)
    with pytest.raises(lease.LeaseError):
        lease.apply(wish(deploy="d2"), tmp_path, False)


def test_an_expired_lease_is_free(tmp_path: Path) -> None:
    lease.apply(wish(seconds=-1), tmp_path, False)
    assert lease.apply(wish(deploy="d2"), tmp_path, False)["changed"]


def test_who_lost_the_lease_learns_whether_another_deploy_has_had_it() -> None:
    """One that has ended by now may have put something else into service."""
    mine = {"event": "lock", "deploy": "d1", "holder": "ada@laptop"}
    taken_away = {**mine, "event": "unlock"}
    theirs = {"event": "lock", "deploy": "d2", "holder": "bob@desk"}
    assert lease.had_by_another([mine, {"event": "switched", "deploy": "d1"}, taken_away], "d1") == ""
    assert lease.had_by_another([theirs, mine], "d1") == ""
    assert lease.had_by_another([mine, theirs, {**theirs, "event": "unlock"}], "d1") == "bob@desk"
    assert lease.had_by_another([], "d1") == "somebody", "nothing is known of an edge that was set up anew"


def test_only_the_named_lease_is_taken_over(tmp_path: Path) -> None:
    lease.apply(wish(), tmp_path, False)
    with pytest.raises(lease.LeaseError):
        lease.apply(wish(deploy="d3", replaces="d2"), tmp_path, False)
    assert lease.apply(wish(deploy="d3", replaces="d1"), tmp_path, False)["lease"]["deploy"] == "d3"


def test_a_renewal_moves_the_expiry_and_is_no_change(tmp_path: Path) -> None:
    before = lease.apply(wish(), tmp_path, False)["lease"]
    after = lease.apply(wish("renewed", seconds=600), tmp_path, False)
    assert not after["changed"] and after["lease"]["expires"] > before["expires"] + 500
    assert after["lease"]["since"] == before["since"]


def test_a_lost_lease_is_noticed_at_the_next_renewal(tmp_path: Path) -> None:
    lease.apply(wish(deploy="d2"), tmp_path, False)
    with pytest.raises(lease.LeaseError, match="another deploy"):
        lease.apply(wish("renewed"), tmp_path, False)


def test_check_mode_takes_nothing(tmp_path: Path) -> None:
    assert lease.apply(wish(), tmp_path, True)["changed"]
    assert not (tmp_path / "lease.json").exists()


def test_the_lease_is_for_root_alone(tmp_path: Path) -> None:
    lease.apply(wish(), tmp_path, False)
    assert stat.S_IMODE((tmp_path / "lease.json").stat().st_mode) == 0o600


def test_a_process_is_dead_only_when_that_is_certain() -> None:
    child = subprocess.Popen(["sleep", "60"])
    machine = " ".join(controller.machine())
    identity = f"{machine} {child.pid} {controller.started(child.pid)}"
    try:
        assert controller.judge(identity) == "alive" and not controller.is_dead(identity)
    finally:
        child.kill()
        child.wait()
    if "?" not in machine:
        assert controller.is_dead(identity)
    assert controller.judge("elsewhere " + identity.split(" ", 1)[1]) == "elsewhere"
    assert not controller.is_dead("elsewhere " + identity.split(" ", 1)[1])
    assert not controller.is_dead("") and not controller.is_dead("a b c")


def archive(directory: Path, version: str, when: float) -> Path:
    """Put a release into *directory*, built at the Unix time *when*."""
    manifest = {"version": version, "digests": {}, "pythons": ["3.11"], "schema": {"head": "1"}}
    path = directory / f"atlas-{version}.tar.gz"
    path.write_bytes(release.pack({release.MANIFEST: release.as_json(manifest)}, 0) + release.archive_end())
    release.sign(path, release.make_key(directory / "keys"))
    os.utime(path, (when, when))
    return path


def test_the_newest_release_is_taken_and_its_signature_checked(tmp_path: Path) -> None:
    now = time.time()
    archive(tmp_path, "1.0", now)
    archive(tmp_path, "0.9", now - 100)
    signers = (tmp_path / "keys" / "allowed_signers").read_text()
    found = deploy.release_file("", signers, str(tmp_path))
    assert (found["version"], found["error"], found["id"]) == ("1.0", "", f"1.0-{found['digest'][:12]}")


def test_what_is_wrong_with_a_release_comes_back_as_a_finding(tmp_path: Path) -> None:
    path = archive(tmp_path, "1.0", time.time())
    signers = (tmp_path / "keys" / "allowed_signers").read_text()
    assert "make release" in deploy.release_file("", signers, str(tmp_path / "empty"))["error"]
    assert "no such release" in deploy.release_file(str(tmp_path / "x.tar.gz"), signers, str(tmp_path))["error"]
    assert "deploy_allowed_signers is empty" in deploy.release_file("", "", str(tmp_path))["error"]
    path.with_name(path.name + ".sig").unlink()
    assert "not signed" in deploy.release_file("", signers, str(tmp_path))["error"]


def watch(statuses: list[tuple[int, str]]) -> tuple[int, str]:
    """Watch a balancer that answers with *statuses* in turn, the last one for ever; time passes by 0.1 s for each."""
    clock = [0.0]

    def ask() -> Answer:
        status, found = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        return Answer(status, {"x-atlas-release": found}, {})

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    return edge_probe.watch(ask, "new", 1, 5, lambda: clock[0], sleep)


def test_the_probe_wants_the_new_release_without_a_gap() -> None:
    assert watch([(200, "old"), (200, "new"), (503, "new"), (200, "new")])[0] >= 10


@pytest.mark.parametrize(
    ("answer", "said"), [((200, "old"), "200 from old"), ((503, "new"), "503 from new"), ((0, ""), "no connection")]
)
def test_the_probe_gives_up(answer: tuple[int, str], said: str) -> None:
    count, wrong = watch([answer])
    assert count == 0 and said in wrong


def test_an_answer_that_alternates_never_passes() -> None:
    assert watch([(200, "new"), (500, "new")] * 200)[0] == 0


def test_the_process_of_a_lock_is_the_playbooks_and_not_that_of_the_script_which_runs_it(tmp_path: Path) -> None:
    """The script may try again, and has to find the lock of its first try free."""
    program = tmp_path / "ansible-playbook"
    program.write_text(
        "import os, sys; sys.path[:0] = [sys.argv[1]]; import controller\n"
        "print(os.getpid(), flush=True)\n"
        "if os.fork() == 0: print(controller.playbook_process(), flush=True); os._exit(0)\n"
        "os.wait()\n"
    )
    command = f"{sys.executable} {program} {Path(controller.__file__).parent} || exit; exit"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    main, found = done.stdout.split()
    assert found == main
