"""An app host's files, its health gate, and the deployments and slots on it."""

from __future__ import annotations

import grp
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import atlas_deployment
import atlas_slot
import host_credentials
import pytest
from ansible.module_utils import atlas_host, haproxy_runtime, host_facts, rotation
from ansible.module_utils.atlas_host import Answer, Done, Gate, Host, HostError

ACTIVE = {
    name: {"Id": name, "ActiveState": "active", "SubState": "running", "MainPID": "7", "NRestarts": "0"}
    for name in atlas_host.units("blue")
}


class Fake:
    """Stands for systemd: remembers what it was asked, keeps units and enabled targets."""

    def __init__(self, boot: Path, runtime: Path) -> None:
        self.boot, self.runtime = boot, runtime
        self.calls: list[list[str]] = []
        self.active: set[str] = set()

    def __call__(
        self, argv: Sequence[str], stdin: bytes | None = None, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> Done:
        self.calls.append(list(argv))
        if argv[0] == "systemd-creds":
            return Done(0, "encrypted\n", "")
        if argv[:2] == ["systemctl", "show"]:
            blocks = []
            for name in argv[5:]:
                state = "active" if name in self.active else "inactive"
                blocks.append(f"Id={name}\nActiveState={state}\nSubState=x\nMainPID=7\nNRestarts=0")
            return Done(0, "\n\n".join(blocks), "")
        if argv[:2] == ["systemctl", "stop"]:
            self.active -= set(argv[2:])
            # A runtime directory goes with its service.
            for slot in atlas_host.SLOTS:
                for mark in self.marks(slot) if self.active.isdisjoint(atlas_host.units(slot)) else []:
                    mark.unlink()
        if argv[:2] == ["systemctl", "start"]:
            self.active |= set(argv[3:])
        if argv[:2] == ["systemctl", "enable"]:
            (self.boot / argv[-1]).symlink_to("/etc/systemd/system/atlas@.target")
        if argv[:2] == ["systemctl", "disable"]:
            (self.boot / argv[-1]).unlink()
        return Done(0, "", "")

    def marks(self, slot: str) -> list[Path]:
        return list((self.runtime / f"atlas-api-{slot}").iterdir())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for name in ("opt/archives", "opt/releases", "opt/deployments", "opt/slots", "state", "boot"):
        (tmp_path / name).mkdir(parents=True)
    for slot in atlas_host.SLOTS:
        (tmp_path / "run" / f"atlas-api-{slot}").mkdir(parents=True)
    fake = Fake(tmp_path / "boot", tmp_path / "run")
    return Host(tmp_path / "opt", tmp_path / "state", tmp_path / "boot", fake, runtime=tmp_path / "run")


def deployed(host: Host, number: int, release: str = "1.0-abc") -> None:
    """Put a deployment on *host*."""
    directory = host.deployment(number)
    directory.mkdir()
    (directory / "deployment.json").write_text(json.dumps({"id": number, "release": release}))
    (host.root / "releases" / release).mkdir(exist_ok=True)


def serving(host: Host, slot: str, number: int) -> None:
    """Bring the deployment *number* into service in *slot*."""
    deployed(host, number)
    host.point(slot, number)
    host.start(slot)
    host.enable(slot)
    host.record("finished", deployment=number)


def params(**other: Any) -> dict[str, Any]:
    defaults = {"host": "app1", "timeout": 5, "stop_timeout": 5, "minimum_healthy": 0, "keep": 3, "deploy": "d1"}
    return defaults | {"warm_seconds": 0, "rolled_back": None, "leave": False} | other


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "wait_healthy", lambda *_: 0.1)


def test_a_slot_is_pointed_by_one_rename_and_read_back(host: Host) -> None:
    host.point("blue", 3)
    host.point("blue", 4)
    assert host.slots() == {"blue": 4, "green": None}
    assert os.listdir(host.root / "slots") == ["blue"]


def test_the_slot_in_service_is_the_one_that_boot_starts(host: Host) -> None:
    assert host.in_service() is None
    host.enable("blue")
    host.enable("green")
    assert host.in_service() == "green" and not host.enable("green")


def test_a_transaction_keeps_what_was_before_the_first_change(host: Host) -> None:
    host.begin({"deploy": "d1", "deployment": 2, "slot": "blue", "slots": {"blue": 1}})
    host.begin({"deploy": "d1", "deployment": 2, "slot": "blue", "slots": {"blue": 2}})
    assert host.transaction()["slots"] == {"blue": 1}
    host.end()
    assert host.transaction() == {}


def test_a_torn_line_does_not_spoil_the_journal(host: Host) -> None:
    host.record("finished", deployment=1)
    with (host.state / "journal.jsonl").open("a") as file:
        file.write('{"event": "fini')
    assert host.good() == [1] and host.highest() == 1
    host.record("finished", deployment=2)
    host.record("finished", deployment=3)
    assert host.good() == [1, 2, 3], "nor does it swallow the next one"


def test_a_line_that_the_disk_had_no_room_for_is_an_error(host: Host) -> None:
    host.record("finished", deployment=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((host.state / "journal.jsonl").stat().st_size + 10, limit[1]))
        with pytest.raises(OSError, match=r"journal\.jsonl"):
            host.record("finished", deployment=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    host.record("finished", deployment=3)
    assert host.good() == [1, 3]


def test_pruning_never_takes_what_a_rollback_needs(host: Host) -> None:
    for number in range(1, 7):
        deployed(host, number, f"1.0-{number}")
        if number != 5:  # 5 failed
            host.record("finished", deployment=number)
    host.point("blue", 6)
    host.prune(keep=1)
    assert list(host.deployments()) == [4, 6]
    assert host.releases() == ["1.0-4", "1.0-6"]


def test_a_slot_that_does_not_run_keeps_no_deployment_for_ever(host: Host) -> None:
    for number in range(1, 5):
        deployed(host, number)
        host.record("finished", deployment=number)
    host.point("blue", 4)
    host.enable("blue")
    host.point("green", 1)
    host.start("green")
    host.prune(keep=2)
    assert host.slots() == {"blue": 4, "green": 1}, "it runs"
    host.stop("green", 5)
    host.prune(keep=2)
    assert host.slots() == {"blue": 4, "green": None} and list(host.deployments()) == [3, 4]
    host.point("green", 3)
    host.prune(keep=2)
    assert host.slots() == {"blue": 4, "green": 3}


def test_a_finished_deployment_serves_and_boots_and_the_old_one_stops(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False)
    slot.started()
    assert host.in_service() == "blue" and host.active("blue") and host.active("green")
    slot.finished()
    assert host.in_service() == "green" and not host.active("blue") and host.active("green")
    assert host.transaction() == {} and host.good() == [1, 2]


def test_an_old_slot_that_would_not_stop_is_stopped_by_the_next_run(
    host: Host, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False)
    slot.started()

    def stuck(*_: Any) -> bool:
        raise HostError("it did not stop")

    with monkeypatch.context() as patch, pytest.raises(HostError, match="it did not stop"):
        patch.setattr(Host, "stop", stuck)
        slot.finished()
    assert host.transaction()["deployment"] == 2 and host.in_service() == "green" and host.good() == [1, 2]
    slot.finished()
    assert host.transaction() == {} and not host.active("blue") and host.good() == [1, 2]


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (HostError("systemctl did not end within 5 s."), "not within 5 s"),
        (Done(1, "", "Job for atlas-api@blue.service canceled.\n"), "Job for atlas-api@blue.service canceled."),
    ],
)
def test_services_that_do_not_stop_are_named_with_the_reason(
    host: Host, monkeypatch: pytest.MonkeyPatch, outcome: HostError | Done, why: str
) -> None:
    serving(host, "blue", 1)
    waited: list[float] = []

    def stuck(argv: Sequence[str], stdin: bytes | None = None, timeout: float = 60, env: Any = None) -> Done:
        if argv[:2] != ["systemctl", "stop"]:
            return fake(argv, stdin, timeout, env)
        waited.append(timeout)
        if isinstance(outcome, HostError):
            raise outcome
        return outcome

    fake = host.run
    monkeypatch.setattr(host, "run", stuck)
    with pytest.raises(HostError, match=f"atlas-monitoring@blue.service did not stop: {why}"):
        host.stop("blue", 5)
    assert waited == [5]
    monkeypatch.setattr(host, "run", fake)
    assert host.stop("blue", 5) and not host.stop("blue", 5), "there was nothing left to stop"


def test_what_the_old_slot_answered_is_kept_when_it_is_left(
    host: Host, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"blue": {"total": 700, "failed": 3}, "green": {"total": 5, "failed": 0}}
    monkeypatch.setattr(atlas_slot, "requests", counts.__getitem__)
    serving(host, "blue", 1)
    deployed(host, 2)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False)
    slot.started()
    slot.finished()
    was = json.loads((host.deployment(1) / "deployment.json").read_text())["release"]
    (entry,) = [each for each in host.journal() if each.get("deployment") == 2 and each["event"] == "finished"]
    assert entry["served"] == {"release": was, "total": 700, "failed": 3}


def test_the_old_slot_stays_warm_until_a_timer_of_the_host_stops_it(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc", warm_seconds=600), host, False)
    slot.started()
    slot.finished()
    assert host.in_service() == "green" and host.active("blue") and host.active("green")
    until = host.warm_until("blue")
    assert until is not None and 590 <= until - time.time() <= 601
    (timer,) = [call for call in host.run.calls if call[0] == "systemd-run"]  # type: ignore[attr-defined]
    assert "--on-active=600" in timer and timer[-1].split()[-4:] == atlas_host.units("blue")
    assert timer[-1].startswith(f"/usr/bin/touch {host.runtime}/atlas-api-blue/leaving; "), "it leaves first"
    slot.finished()
    assert host.active("blue") and host.warm_until("blue") == until, "a second call must not cool what is warm"


def test_a_warm_slot_is_engaged_without_a_restart_and_its_timer_is_taken_back(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc", warm_seconds=600), host, False).started()
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc", warm_seconds=600), host, False).finished()
    host.run.calls.clear()  # type: ignore[attr-defined]
    back = params(slot="blue", number=1, release="1.0-abc", deploy="d2", rolled_back=2, warm_seconds=600)
    atlas_slot.Slot(back, host, False).engaged()
    asked = [call[1:] for call in host.run.calls if call[0] == "systemctl"]  # type: ignore[attr-defined]
    assert ["stop", "atlas-cooling-blue.timer", "atlas-cooling-blue.service"] in asked and host.warm_until(
        "blue"
    ) is None
    assert not [
        call for call in asked if call[0] in ("start", "stop") and not set(call).isdisjoint(atlas_host.units("blue"))
    ]
    atlas_slot.Slot(back, host, False).finished()
    assert host.in_service() == "blue" and host.good() == [1] and host.abandoned() == 2
    assert 2 in host.deployments(), "what a rollback has just left can be returned to"


def test_a_slot_that_has_cooled_meanwhile_is_started(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    host.point("green", 2)
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False).engaged()
    assert len(host.active("green")) == 4


def test_what_was_rolled_back_is_good_again_once_it_serves_again(host: Host) -> None:
    host.record("finished", deployment=1)
    host.record("finished", deployment=2)
    host.record("finished", deployment=1, rolled_back=2)
    assert host.good() == [1]
    host.record("finished", deployment=2)
    assert host.good() == [1, 2] and host.abandoned() is None


def test_what_is_done_is_recorded_with_phase_outcome_and_seconds(host: Host) -> None:
    with host.recorded("started", "switch", deploy="d1") as entry:
        entry["more"] = 1
    with pytest.raises(HostError), host.recorded("started", "switch", deploy="d1"):
        raise HostError("no")
    good, bad = host.journal()
    assert (good["phase"], good["outcome"], good["more"], bad["outcome"], bad["message"]) == (
        "switch", "ok", 1, "failed", "no",
    )  # fmt: skip
    assert good["seconds"] >= 0


def test_the_journal_does_not_grow_for_ever(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_host, "JOURNAL_ENTRIES", 10)
    for number in range(10):
        host.record("finished", deployment=number)
    host.trim()
    assert len(host.journal()) == 10
    host.record("finished", deployment=10)
    host.trim()
    assert host.good() == [6, 7, 8, 9, 10]


def test_rotations_and_the_age_of_the_first_entry_outlast_the_trimming(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas_host, "JOURNAL_ENTRIES", 10)
    moments = (f"2030-01-{day:02}T00:00:00Z" for day in range(1, 32))
    monkeypatch.setattr(atlas_host, "now", lambda: next(moments))
    host.record("finished", deployment=0)
    host.record(rotation.EVENT, kind="tokens", step="finished", generation=1)
    for number in range(1, 25):
        host.record("finished", deployment=number)
        host.trim()
    journal = host.journal()
    assert len(journal) <= 12 and journal[0]["at"] == "2030-01-01T00:00:00Z"
    found = rotation.states({"app1": journal})["tokens"]
    assert (found["generation"], found["finished_at"]) == (1, rotation.unix("2030-01-02T00:00:00Z"))
    assert host.good()[-3:] == [22, 23, 24] and 0 not in host.good()


def test_a_balancer_that_reloads_at_this_moment_is_not_one_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "admin.sock")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    with socket.socket(socket.AF_UNIX) as listener:

        def serve() -> None:
            listener.bind(path)
            listener.listen()
            for _ in range(5):
                with listener.accept()[0] as connection:
                    if connection.recv(100).startswith(b"show map /etc/haproxy/slot.map"):
                        connection.sendall(b"0x1 active be_green\n")

        timer = threading.Timer(0.3, serve)
        timer.daemon = True
        timer.start()
        found = host_facts.balancer(path)
    assert found["memory"] == "be_green" and "error" not in found


def test_what_the_journal_of_systemd_holds_against_the_services_is_read_from_its_oldest_entry_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def line(at: float, **fields: str) -> str:
        return json.dumps({"__REALTIME_TIMESTAMP": str(int(at * 1e6)), **fields}) + "\n"

    restarted = line(300, UNIT="atlas-core@blue.service", _SYSTEMD_UNIT="init.scope")
    complained = line(200.5, _SYSTEMD_UNIT="atlas-monitoring@green.service")
    asked: list[list[str]] = []

    def journal(oldest: str, told: str, errors: str = "") -> Callable[..., Done]:
        def command(argv: Sequence[str], timeout: float) -> Done:
            asked.append(list(argv))
            return Done(0, oldest, "") if argv[0] == "sh" else Done(1, told, errors)

        return command

    found = host_facts.troubles(journal(line(100), restarted + complained))
    assert found == {
        "since": 100.0,
        "restarts": [["atlas-core@blue.service", 300.0]],
        "complaints": [["atlas-monitoring@green.service", 200.5]],
    }
    assert "UNIT=atlas-api@green.service" in asked[1]
    assert host_facts.troubles(journal(line(100), ""))["since"] == 100.0
    monkeypatch.setattr(host_facts, "TROUBLES", 2)
    assert host_facts.troubles(journal(line(100), restarted + complained))["since"] == 200.5, "there may be more"
    for command, why in (
        (journal("", ""), "it is empty"),
        (journal(line(100), "", "no permission\n"), "no permission"),
        (journal("", "no JSON"), "Expecting value"),
    ):
        unknown = host_facts.troubles(command)
        assert unknown["since"] is None and why in unknown["error"]


def test_a_balancer_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(haproxy_runtime, "RELOAD_SECONDS", 0.2)
    found = host_facts.balancer(str(tmp_path / "none.sock"))
    assert found["error"] == f"its socket {tmp_path}/none.sock does not answer (No such file or directory)"


@pytest.mark.parametrize(("age", "stale"), [(10, []), (-10, ["atlas-api@blue.service"])])
def test_units_that_are_younger_than_their_processes_are_noticed(tmp_path: Path, age: int, stale: list[str]) -> None:
    unit = tmp_path / "atlas-api@.service"
    unit.touch()
    started = unit.stat().st_mtime + age
    shown = {
        "ActiveState": "active",
        "ExecMainStartTimestamp": f"@{started:.0f}",
        "FragmentPath": str(unit),
        "DropInPaths": "",
    }
    assert atlas_host.changed_since_start({"atlas-api@blue.service": shown}) == stale


def test_undoing_a_switch_stops_the_new_slot_and_leaves_the_old(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False).started()
    result = atlas_slot.Slot(params(), host, False).undone()
    assert result["changed"] and host.slots() == {"blue": 1, "green": None}
    assert host.active("blue") and not host.active("green") and host.in_service() == "blue"


@pytest.fixture
def leaving(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """For each wait for edges to look elsewhere: which slot was leaving, and which slots were up."""
    seen: list[tuple[str, list[str]]] = []

    def wait(seconds: float) -> None:
        assert seconds == atlas_host.LEAVE_SECONDS
        (slot,) = [slot for slot in atlas_host.SLOTS if host.run.marks(slot)]  # type: ignore[attr-defined]
        seen.append((slot, [slot for slot in atlas_host.SLOTS if host.active(slot)]))

    monkeypatch.setattr(time, "sleep", wait)
    return seen


def test_the_new_slot_leaves_before_it_is_stopped_where_an_edge_is_out_of_reach(
    host: Host, healthy: None, leaving: list[tuple[str, list[str]]]
) -> None:
    """The slot that such an edge falls back to is up by then, whatever had become of it."""
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False).started()
    host.stop("blue", 5)
    assert atlas_slot.Slot(params(leave=True), host, False).undone()["number"] == 1
    assert leaving == [("green", ["blue", "green"])]
    assert host.active("blue") and not host.active("green")


def test_an_undone_rolling_step_does_not_leave_because_its_edges_have_drained_it(
    host: Host, healthy: None, leaving: list[tuple[str, list[str]]]
) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="blue", number=2, release="1.0-abc"), host, False).started()
    atlas_slot.Slot(params(leave=True), host, False).undone()
    assert leaving == [] and host.slots()["blue"] == 1


@pytest.mark.parametrize("leave", [True, False])
def test_the_old_slot_leaves_before_it_is_stopped_where_an_edge_is_out_of_reach(
    host: Host, healthy: None, leaving: list[tuple[str, list[str]]], leave: bool
) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc", leave=leave), host, False)
    slot.started()
    slot.finished()
    assert leaving == ([("blue", ["blue", "green"])] if leave else [])
    assert host.in_service() == "green" and not host.active("blue")


def test_a_slot_that_was_leaving_serves_again_when_it_is_kept(host: Host) -> None:
    serving(host, "blue", 1)
    (mark := host.runtime / "atlas-api-blue" / "leaving").touch()
    host.keep_warm("blue")
    assert not mark.exists()


def test_undoing_a_rolling_step_brings_the_old_deployment_back(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="blue", number=2, release="1.0-abc"), host, False).started()
    assert host.slots()["blue"] == 2
    result = atlas_slot.Slot(params(), host, False).undone()
    assert result["changed"] and host.slots()["blue"] == 1 and len(host.active("blue")) == 4
    assert (result["slot"], result["number"]) == ("blue", 1)


def test_undoing_a_first_deploy_leaves_nothing_running(host: Host, healthy: None) -> None:
    deployed(host, 1)
    atlas_slot.Slot(params(slot="blue", number=1, release="1.0-abc"), host, False).started()
    atlas_slot.Slot(params(), host, False).undone()
    assert host.slots() == {"blue": None, "green": None} and not host.active("blue")


def test_nobody_meets_a_run_halfway_that_goes_on_after_its_playbook_was_killed(host: Host) -> None:
    program = (
        "import sys, time, pathlib; sys.path[:0] = [sys.argv[1]]; from atlas_host import Host\n"
        "with Host(root=pathlib.Path(sys.argv[2])).alone():\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(Path(atlas_host.__file__).parent), str(host.root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(HostError, match="Somebody else still changes this host"), host.alone(0.2):
            pass
        threading.Timer(0.3, other.stdin.close).start()
        with host.alone(30):
            assert other.wait(5) == 0
    with host.alone(0):
        pass


def test_a_deploy_that_lost_the_lock_keeps_its_hands_off_what_another_one_has_begun(host: Host, healthy: None) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    deployed(host, 3)
    atlas_slot.Slot(params(slot="blue", number=3, release="1.0-abc", deploy="d2"), host, False).started()
    before = (host.slots(), host.transaction())
    for state in ("undone", "started", "engaged", "finished"):
        with pytest.raises(HostError, match="deploy d2 has begun to change this host"):
            getattr(atlas_slot.Slot(params(slot="blue", number=2, release="1.0-abc"), host, False), state)()
    assert (host.slots(), host.transaction()) == before
    assert atlas_slot.Slot(params(deploy=""), host, False).undone()["number"] == 1, "a clean-up takes whatever is there"


def test_undoing_leaves_one_slot_for_boot_to_start(host: Host, healthy: None) -> None:
    """Killed after the new slot was enabled, before the old one was disabled."""
    serving(host, "blue", 1)
    deployed(host, 2)
    atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False).started()
    (host.boot / "atlas@green.target").symlink_to("/etc/systemd/system/atlas@.target")
    assert host.in_service() == "blue"
    atlas_slot.Slot(params(), host, False).undone()
    assert os.listdir(host.boot) == ["atlas@blue.target"]


def test_nothing_is_undone_where_nothing_was_begun(host: Host) -> None:
    assert atlas_slot.Slot(params(), host, False).undone()["changed"] is False


@pytest.mark.parametrize("state", ["started", "finished", "undone"])
def test_check_mode_changes_nothing(host: Host, state: str) -> None:
    serving(host, "blue", 1)
    deployed(host, 2)
    host.begin(
        {"deploy": "d0", "deployment": 2, "slot": "green", "slots": {"blue": 1, "green": None}, "in_service": "blue"}
    )
    before = (host.slots(), host.in_service(), host.transaction(), host.journal())
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, True)
    assert getattr(slot, state)()["changed"]
    assert (host.slots(), host.in_service(), host.transaction(), host.journal()) == before


# The health gate


def answers(
    workers: Sequence[Mapping[str, Any]] | None = None,
    status: int = 200,
    release: str = "1.0-abc",
    probe: str = "atlas_probe_success 1.0",
) -> Callable[[int, str], Answer]:
    """Return what stands for the API of a host."""
    beats = workers if workers is not None else [beat("core"), beat("services")]

    def ask(port: int, path: str) -> Answer:
        if port == 8111:
            return Answer(200, {}, {}, f"# HELP\n{probe}\n")
        assert port == 8101
        if path == "/readyz":
            return Answer(
                status, {"x-atlas-release": release}, {"checks": {"database": "locked"}} if status != 200 else {}
            )
        return Answer(200, {}, {"workers": beats})

    return ask


def beat(service: str, **other: Any) -> dict[str, Any]:
    return {"service": service, "host": "app1", "slot": "blue", "deployment": 5, "age_seconds": 1.0} | other


def gate(ask: Callable[[int, str], Answer]) -> Gate:
    return Gate("blue", 5, "1.0-abc", "app1", ask)


def test_the_gate_opens_when_all_is_well() -> None:
    assert gate(answers()).fault(ACTIVE) is None


@pytest.mark.parametrize(
    ("ask", "guilty", "said"),
    [
        (answers(status=503), "api", "/readyz says 503 (database: locked)"),
        (answers(status=0), "api", "/readyz says nothing (no connection)"),
        (answers(release="0.9-old"), "api", "answers as release 0.9-old, expected 1.0-abc"),
        (answers([beat("core")]), "services", "no live heartbeat"),
        (answers([beat("core", deployment=4), beat("services")]), "core", "no live heartbeat"),
        (answers([beat("core", age_seconds=99), beat("services")]), "core", "no live heartbeat"),
        (answers([beat("core", host="app2"), beat("services")]), "core", "no live heartbeat"),
        (answers([beat("core", slot="green"), beat("services")]), "core", "no live heartbeat"),
        (answers(probe=""), "core", "have not yet done the job"),
        (answers(probe="atlas_probe_success 0.0"), "core", "failed at the job"),
    ],
)
def test_the_gate_names_the_guilty_unit(ask: Callable[[int, str], Answer], guilty: str, said: str) -> None:
    fault = gate(ask).fault(ACTIVE)
    assert fault is not None and fault[0] == f"atlas-{guilty}@blue.service" and said in fault[1]


def test_the_gate_stays_shut_while_a_service_is_down() -> None:
    shown = ACTIVE | {"atlas-core@blue.service": {"ActiveState": "activating", "SubState": "auto-restart"}}
    assert gate(answers()).fault(shown) == ("atlas-core@blue.service", "is activating (auto-restart)")


def test_waiting_ends_and_says_why(host: Host) -> None:
    host.start("blue")
    with pytest.raises(HostError, match=r"atlas-api@blue.service: /readyz says 503 .*not healthy within 0.3 s"):
        host.wait_healthy(gate(answers(status=503)), timeout=0.3, minimum=0)


@pytest.mark.parametrize(("took", "pause"), [(0.1, 0.5), (0.4, 1.0)])
def test_a_host_that_is_slow_to_tell_is_asked_less_often(
    host: Host, monkeypatch: pytest.MonkeyPatch, took: float, pause: float
) -> None:
    """It is slow because four services start. One that does not answer at all is asked every second nevertheless."""
    pauses: list[float] = []

    def show(names: Sequence[str]) -> dict[str, dict[str, str]]:
        threading.Event().wait(took)
        return ACTIVE

    monkeypatch.setattr(host, "show", show)
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(HostError, match="not healthy"):
        host.wait_healthy(gate(answers(status=503)), timeout=1, minimum=0)
    assert pauses and pause <= min(pauses) and max(pauses) <= 1.0


def test_a_service_that_crashes_again_and_again_is_not_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    restarts = iter(range(100))

    def show(names: Sequence[str]) -> dict[str, dict[str, str]]:
        return {**ACTIVE, "atlas-core@blue.service": {"ActiveState": "activating", "NRestarts": str(next(restarts))}}

    monkeypatch.setattr(host, "show", show)
    with pytest.raises(HostError, match="atlas-core@blue.service ends again and again"):
        host.wait_healthy(gate(answers()), timeout=30, minimum=0)


@pytest.mark.parametrize(
    ("properties", "said"),
    [({"MainPID": "8"}, "restarted"), ({"ActiveState": "activating"}, "is activating"), ({}, None)],
)
def test_a_service_that_was_healthy_has_to_stay_the_same_process(
    host: Host, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str], said: str | None
) -> None:
    name = "atlas-core@blue.service"
    monkeypatch.setattr(host, "show", lambda _: {**ACTIVE, name: {**ACTIVE[name], **properties}})
    processes = dict.fromkeys(ACTIVE, "7")
    if said is None:
        host.look_after(gate(answers()), processes, 0)
        return
    with pytest.raises(HostError, match=f"{name} {said} after it had been healthy"):
        host.look_after(gate(answers()), processes, 0)


def test_a_worker_of_the_api_that_died_shows_without_a_restart(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hoards memory loses a worker to the kernel; gunicorn replaces it, and systemd never hears of it."""
    name = "atlas-api@blue.service"
    work = "sleep 60 & read line; kill $!; wait $!; sleep 60 & read line; kill $!"
    with subprocess.Popen(["sh", "-c", work], stdin=subprocess.PIPE) as arbiter:
        assert arbiter.stdin is not None
        pid = str(arbiter.pid)
        monkeypatch.setattr(host, "show", lambda _: {**ACTIVE, name: {**ACTIVE[name], "MainPID": pid}})
        before = children(host, pid, [])
        processes = host.processes("blue")
        assert processes[name] == f"{pid} {before[0]}"
        host.look_after(gate(answers()), processes, 0)
        arbiter.stdin.write(b"\n")
        arbiter.stdin.flush()
        children(host, pid, before)
        with pytest.raises(HostError, match=f"{name} lost 1 of 1 worker processes after it had been healthy"):
            host.look_after(gate(answers()), processes, 0)
        arbiter.communicate(b"\n")


def children(host: Host, pid: str, before: list[str]) -> list[str]:
    """Return the children of *pid* once there is one, and none of those *before*."""
    deadline = time.monotonic() + 30
    while not (found := host.children(pid)) or set(found) & set(before):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_a_restart_within_the_minimum_healthy_time_starts_it_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = iter(range(100))

    def show(names: Sequence[str]) -> dict[str, dict[str, str]]:
        return {
            **ACTIVE,
            "atlas-api@blue.service": {**ACTIVE["atlas-api@blue.service"], "MainPID": str(next(processes))},
        }

    monkeypatch.setattr(host, "show", show)
    with pytest.raises(HostError, match="do not stay the same"):
        host.wait_healthy(gate(answers()), timeout=0.3, minimum=0.5)


def test_the_log_of_a_failed_start_begins_after_the_stop(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the old services logged while they stopped is no part of it, not even in the same second."""
    serving(host, "blue", 1)
    deployed(host, 2)
    stopped: list[float] = []
    stop = host.stop

    def stopping(slot: str, timeout: float) -> bool:
        done = stop(slot, timeout)
        stopped.append(time.time())
        return done

    monkeypatch.setattr(host, "stop", stopping)
    monkeypatch.setattr(Gate, "quick_fault", lambda *_: ("atlas-api@blue.service", "is shut"))
    with pytest.raises(HostError, match="is shut"):
        atlas_slot.Slot(params(slot="blue", number=2, release="1.0-abc", timeout=0), host, False).started()
    calls = [call for call in host.run.calls if call[0] == "journalctl"]  # type: ignore[attr-defined]
    assert calls and float(calls[0][2].removeprefix("@")) >= round(stopped[0], 6)


TRACEBACK = ["Traceback (most recent call last):", *(f'  File "{n}"' for n in range(20)), "RuntimeError: broken"]


@pytest.mark.parametrize(
    "lines",
    [
        [*TRACEBACK, "systemd will restart it", "Traceback (most recent call last):", '  File "cut off"'],
        [json.dumps({"event": "failed", "level": "error", "host": "app1", "exception": "\n".join(TRACEBACK)})],
    ],
    ids=["plain, another one being written", "a field of JSON"],
)
def test_the_end_of_the_last_whole_traceback_tells_most(lines: list[str]) -> None:
    told = atlas_host.telling(lines, limit=4)
    assert told == ['  File "17"', '  File "18"', '  File "19"', "RuntimeError: broken"]


def test_lines_without_a_traceback_are_shown_without_what_everybody_knows() -> None:
    line = {"service": "core", "host": "app1", "level": "warning", "event": "job failed", "error": "no", "time": "x"}
    assert atlas_host.telling(["one", "two", json.dumps(line)], limit=2) == ["two", "warning: job failed error=no"]


# Deployments


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chown", lambda *_: None)
    monkeypatch.setattr(grp, "getgrnam", lambda _: type("G", (), {"gr_gid": 0}))


def wanted(**other: Any) -> dict[str, Any]:
    content = {
        "release": "1.0-abc",
        "version": "1.0",
        "digest": "d" * 64,
        "settings": "a: 1\n",
        "credentials": {"tokens": "SECRET"},
    }
    return (
        {
            "number": 1,
            "schema": {"head": "1"},
            "slot": "blue",
            "deploy": "d1",
            "check": True,
            "renew": False,
            "vault_serial": 4,
        }
        | content
        | other
    )


def test_a_deployment_appears_whole_and_once(host: Host, as_root: None) -> None:
    first = atlas_deployment.apply(wanted(), host, False)
    again = atlas_deployment.apply(wanted(), host, False)
    directory = host.deployment(1)
    assert (first["changed"], again["changed"]) == (True, False)
    assert sorted(os.listdir(directory)) == ["credentials", "deployment.json", "release", "settings.yaml"]
    assert os.readlink(directory / "release") == "../../releases/1.0-abc"
    assert (directory / "credentials").stat().st_mode & 0o777 == 0o700
    assert (directory / "settings.yaml").stat().st_mode & 0o777 == 0o640
    assert os.listdir(host.root / "deployments") == ["1"]


def test_no_secret_is_in_the_result_or_on_the_disk(host: Host, as_root: None) -> None:
    result = atlas_deployment.apply(wanted(), host, False)
    assert "SECRET" not in json.dumps(result)
    assert not any("SECRET" in path.read_text() for path in host.root.rglob("*") if path.is_file())
    argv = [word for call in host.run.calls for word in call]  # type: ignore[attr-defined]
    assert "SECRET" not in argv


@pytest.mark.parametrize("other", [{"settings": "a: 2\n"}, {"credentials": {"tokens": "OTHER"}}])
def test_a_change_of_settings_or_secrets_is_recognised(host: Host, as_root: None, other: dict[str, Any]) -> None:
    atlas_deployment.apply(wanted(), host, False)
    assert host_facts.compared(host, 1, wanted()) is True
    assert host_facts.compared(host, 1, wanted(**other)) is False
    assert host_facts.compared(host, None, wanted()) is None


def test_the_new_release_checks_its_settings_as_they_will_be(host: Host, as_root: None) -> None:
    atlas_deployment.apply(wanted(), host, False)
    commands = [call[1:] for call in host.run.calls if call[0] == "/usr/local/bin/atlas"]  # type: ignore[attr-defined]
    assert commands == [["config", "check"]]
    content = json.loads((host.deployment(1) / "deployment.json").read_text())
    assert content["schema"] == {"head": "1"} and host.journal()[-1]["event"] == "staged"


def test_a_deployment_notes_the_serial_of_its_vault_file_when_it_is_in_service_and_not_before(
    host: Host, as_root: None, healthy: None
) -> None:
    serving(host, "blue", 1)
    atlas_deployment.apply(wanted(number=2, vault_serial=5), host, False)
    slot = atlas_slot.Slot(params(slot="green", number=2, release="1.0-abc"), host, False)
    slot.started()
    assert rotation.older_vault({"app1": host.journal()}, 4) is None
    slot.undone()
    assert rotation.older_vault({"app1": host.journal()}, 4) is None
    slot.started()
    slot.finished()
    assert "deployment 2 (" in str(rotation.older_vault({"app1": host.journal()}, 4))
    assert rotation.older_vault({"app1": host.journal()}, 5) is None
    # Another one comes back, by a rollback, with credentials of now.
    atlas_deployment.apply(wanted(renew=True, settings="", vault_serial=6), host, False)
    slot = atlas_slot.Slot(params(slot="blue", number=1, release="1.0-abc", rolled_back=2), host, False)
    slot.started()
    slot.finished()
    assert [entry.get("serial") for entry in rotation.noted(host.journal())] == [6]


def test_revoked_credentials_are_replaced_and_nothing_else(host: Host, as_root: None) -> None:
    atlas_deployment.apply(wanted(), host, False)
    directory = host.deployment(1)
    (directory / "credentials.revoked").touch()
    before = {name: (directory / name).read_text() for name in ("settings.yaml", "deployment.json")}
    newer = {"tokens": "NEWER", "more": "SECRET"}
    atlas_deployment.apply(wanted(renew=True, settings="", credentials=newer), host, False)
    assert sorted(os.listdir(directory)) == ["credentials", "deployment.json", "release", "settings.yaml"]
    assert sorted(os.listdir(directory / "credentials")) == ["more", "tokens"]
    assert (directory / "settings.yaml").read_text() == before["settings.yaml"]
    assert host_facts.compared(host, 1, wanted(credentials=newer)) is True
    assert host_facts.compared(host, 1, wanted()) is False


def seen(directory: Path) -> dict[str, str]:
    """What a unit that starts finds, read as systemd does it: the directory is opened once, then each of its files."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        return {name: Path(f"/proc/self/fd/{handle}/{name}").read_text() for name in os.listdir(handle)}
    finally:
        os.close(handle)


def encrypting(argv: Sequence[str], stdin: bytes = b"") -> Done:
    """Stands for systemd-creds."""
    return Done(0, stdin.decode(), "")


def test_whoever_starts_while_credentials_are_replaced_finds_all_of_one_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_credentials, "run", encrypting)
    monkeypatch.setattr(atlas_host, "READ_SECONDS", 0.05, raising=False)
    directory, names = tmp_path / "credentials", [f"secret{number}" for number in range(6)]
    host_credentials.render(directory, dict.fromkeys(names, "0"))
    wrong: list[object] = []
    ended = threading.Event()

    def starting() -> None:
        while not ended.is_set():
            began, told = time.monotonic(), object()
            try:
                found = seen(directory)
                told = None if sorted(found) == names and len(set(found.values())) == 1 else found
            except OSError as error:
                told = error
            if told is not None and time.monotonic() - began < 0.05:
                wrong.append(told)

    units = [threading.Thread(target=starting) for _ in range(2)]
    for each in units:
        each.start()
    for generation in range(1, 60):
        host_credentials.render(directory, dict.fromkeys(names, str(generation)))
    ended.set()
    for each in units:
        each.join()
    assert wrong == [] and os.listdir(tmp_path) == ["credentials"]


def test_credentials_are_there_whenever_a_run_that_replaces_them_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_credentials, "run", encrypting)
    directory = tmp_path / "credentials"
    host_credentials.render(directory, {"old": "1", "both": "1"})
    last, generation = {"old": "1", "both": "1"}, 1
    for killed in range(1, 20):  # in the n-th call of the operating system that changes names or makes them durable
        generation += 1
        coming, calls = {"new": str(generation), "both": str(generation)}, iter(range(1, 100))

        def dying(function: Callable[..., Any], left: Any = calls, at: int = killed) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                if next(left) == at:
                    raise KeyboardInterrupt
                return function(*arguments, **more)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree"), (time, "sleep")):
                patch.setattr(module, name, dying(getattr(module, name)))
            patch.setattr(atlas_host, "READ_SECONDS", 0.0, raising=False)
            try:
                host_credentials.render(directory, coming)
            except KeyboardInterrupt:
                assert seen(directory) in (last, coming)
                last = seen(directory)
                continue
        break
    assert killed > 4 and seen(directory) == coming and os.listdir(tmp_path) == ["credentials"]


def test_credentials_are_replaced_although_the_run_before_ended_halfway(
    host: Host, as_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas_deployment.apply(wanted(), host, False)
    directory = host.deployment(1)

    def ending(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(time, "sleep", ending)
        atlas_deployment.apply(wanted(renew=True, settings="", credentials={"tokens": "NEWER"}), host, False)
    assert host_facts.compared(host, 1, wanted(credentials={"tokens": "NEWER"})) is not True
    atlas_deployment.apply(wanted(renew=True, settings="", credentials={"tokens": "NEWER"}), host, False)
    assert sorted(os.listdir(directory)) == ["credentials", "deployment.json", "release", "settings.yaml"]
    assert os.listdir(directory / "credentials") == ["tokens"]
    assert host_facts.compared(host, 1, wanted(credentials={"tokens": "NEWER"})) is True


def test_a_deployment_that_cannot_be_rendered_leaves_nothing(
    host: Host, as_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise HostError("no key")

    monkeypatch.setattr(atlas_deployment, "encrypt", fail)
    with pytest.raises(HostError):
        atlas_deployment.apply(wanted(), host, False)
    assert os.listdir(host.root / "deployments") == []


def test_check_mode_renders_nothing_and_shows_what_would_change(host: Host, as_root: None) -> None:
    result = atlas_deployment.apply(wanted(), host, True)
    assert result["changed"] and "a: 1" in result["diff"][0]["after"]
    assert os.listdir(host.root / "deployments") == [] and os.listdir(host.state) == []


def test_a_command_that_fails_says_its_error_and_not_where_a_column_is(host: Host) -> None:
    said = "Error: nothing was changed: no column x\nLINE 1: SELECT x\n               ^\n"
    host.run = lambda *_, **__: Done(1, "", said)
    with pytest.raises(HostError) as failed:
        host.command(7, "blue", ["db", "migrate"], 5)
    assert str(failed.value).endswith("(exit status 1): Error: nothing was changed: no column x")
    assert len(failed.value.log) == 3


def test_an_api_is_asked_for_its_counters_only_where_they_are_wanted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts them together from all its workers, while every deploy and rollback waits for all hosts to answer."""
    serving(host, "blue", 1)
    asked: list[str] = []

    def get(_port: int, path: str) -> atlas_host.Answer:
        asked.append(path)
        return atlas_host.Answer(200, {}, {})

    monkeypatch.setattr(host_facts, "Host", lambda: host)
    monkeypatch.setattr(host_facts, "get", get)
    monkeypatch.setattr(atlas_host, "get", get)
    monkeypatch.setattr(host_facts, "troubles", dict)
    look = {"journal": 0, "settings": None, "credentials": None, "texts": False, "socket": "/nowhere/admin.sock"}
    assert host_facts.facts(look)["requests"] is None and asked == ["/readyz"]
    assert host_facts.facts(look | {"troubles": True})["requests"] == {"total": 0, "failed": 0}
    assert asked == ["/readyz", "/readyz", "/metrics"]
