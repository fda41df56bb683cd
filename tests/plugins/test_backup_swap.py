"""A restored store takes the place of the one in use, and the way back works from wherever it stopped."""

from __future__ import annotations

import base64
import getpass
import json
import shutil
from pathlib import Path
from typing import Any

import backup_restore
import pytest
from ansible.module_utils import backup_agent, backup_swap
from ansible.module_utils.atlas_host import Done, Host, HostError
from ansible.module_utils.backup_core import BackupError
from ansible.module_utils.backup_swap import Swap
from ansible.module_utils.backup_tar import receive
from ansible.module_utils.controller import controller
from backup import backup_lock, backup_stuck


@pytest.fixture
def swap(tmp_path: Path) -> Swap:
    store = backup_swap.sqlite(tmp_path / "lib", getpass.getuser())
    store.directory.mkdir()
    (store.directory / "atlas.db").write_text("old")
    (store.directory / "atlas.db-wal").write_text("old wal")
    return Swap(store, tmp_path / "state")


def deliver(swap: Swap, ticket: str) -> None:
    swap.open_door(ticket)
    swap.store.incoming.mkdir()
    (swap.store.incoming / "atlas.db").write_text("new")


def content(swap: Swap) -> dict[str, str]:
    return {path.name: path.read_text() for path in swap.store.directory.iterdir() if path.is_file()}


def test_the_store_is_exchanged_and_what_was_there_is_kept(swap: Swap) -> None:
    deliver(swap, "t1")
    swap.replace("t1")
    assert content(swap) == {"atlas.db": "new"}
    swap.finish()
    assert swap.close_door() is True
    assert (swap.store.safety("t1") / "atlas.db-wal").read_text() == "old wal"
    assert swap.unfinished() is None and not swap.store.incoming.exists()
    deliver(swap, "t2")
    swap.replace("t2")
    swap.finish()
    assert [path.name for path in swap.store.directory.glob("before-*")] == ["before-t2"]


def test_undo_returns_everything(swap: Swap) -> None:
    deliver(swap, "t1")
    swap.replace("t1")
    (swap.store.directory / "atlas.db-shm").write_text("of the new one")
    assert swap.undo(served=False) is None
    assert content(swap) == {"atlas.db": "old", "atlas.db-wal": "old wal"}
    assert [path.name for path in swap.store.directory.iterdir() if path.is_dir()] == ["restore-incoming"]
    assert swap.unfinished() is None and swap.undo(served=True) is None


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_store_took_in_that_is_taken_out_again_is_kept(
    swap: Swap, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was well served it until another was not, or until a run that was killed was put right."""
    for ticket in ("t1", "t2"):
        deliver(swap, ticket)
        swap.replace(ticket)
        (swap.store.directory / "atlas.db-wal").write_text(f"documents of {ticket}")
        if killed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(backup_swap, "_remove", killer(backup_swap._remove, 2 if ticket == "t2" else 1))
                swap.undo(served=True)
        kept = swap.undo(served=True)
        assert kept and {path.name: path.read_text() for path in kept.iterdir()} == {
            "atlas.db": "new", "atlas.db-wal": f"documents of {ticket}",
        }  # fmt: skip
        assert content(swap) == {"atlas.db": "old", "atlas.db-wal": "old wal"}
        assert list(swap.store.directory.glob("undone-*")) == [kept] and not list(swap.store.directory.glob("before-*"))
        swap.close_door()


def killer(work: Any, point: int) -> Any:
    """Return *work*, which is killed instead at its call number *point*."""
    left = [point]

    def killed(*given: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return work(*given)

    return killed


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_undo_after_a_kill_between_two_renames(swap: Swap, moved: int) -> None:
    deliver(swap, "t1")
    had = ["atlas.db", "atlas.db-wal"]
    (swap.state / "swap.json").write_text(json.dumps({"ticket": "t1", "had": had}))
    swap.store.safety("t1").mkdir()
    for name in had[:moved]:
        (swap.store.directory / name).rename(swap.store.safety("t1") / name)
    swap.undo(served=True)
    assert swap.unfinished() is None
    assert content(swap) == {"atlas.db": "old", "atlas.db-wal": "old wal"}


def test_undo_on_a_host_that_had_no_store(swap: Swap) -> None:
    for path in swap.store.directory.iterdir():
        path.unlink()
    deliver(swap, "t1")
    swap.replace("t1")
    assert content(swap) == {"atlas.db": "new"}
    swap.undo(served=False)
    assert content(swap) == {}


def test_nothing_is_moved_for_a_delivery_that_did_not_come(swap: Swap) -> None:
    swap.open_door("t1")
    with pytest.raises(HostError, match=r"atlas\.db is missing"):
        swap.replace("t1")
    assert content(swap) == {"atlas.db": "old", "atlas.db-wal": "old wal"}


def test_root_gives_away_nothing_that_a_link_in_the_delivery_points_at(swap: Swap, tmp_path: Path) -> None:
    deliver(swap, "t1")
    (tmp_path / "shadow").write_text("root's")
    (tmp_path / "shadow").chmod(0o640)
    (swap.store.incoming / "atlas.db").unlink()
    (swap.store.incoming / "atlas.db").symlink_to(tmp_path / "shadow")
    with pytest.raises(HostError, match="is a link"):
        swap.replace("t1")
    assert (tmp_path / "shadow").stat().st_mode & 0o777 == 0o640
    swap.undo(served=False)
    assert content(swap) == {"atlas.db": "old", "atlas.db-wal": "old wal"}


@pytest.mark.parametrize("how", ["failed", "unreachable"])
def test_a_store_that_could_not_be_put_back_is_named(how: str) -> None:
    replaced: dict[str, Any] = {"changed": True}
    hosts = {"db1": {"__backup_replaced": replaced, "__backup_undone": {how: True}}, "db2": {}}
    assert backup_stuck(hosts, ["db1", "db2"]) == ["db1"]
    hosts["db1"]["__backup_replaced"] = {"skipped": True}
    assert backup_stuck(hosts, ["db1", "db2"]) == [], "nothing had been replaced there"
    hosts["db1"] = {"__backup_replaced": {how: True}, "__backup_undone": {"results": [{"changed": True}]}}
    assert backup_stuck(hosts, ["db1"]) == []


def test_no_store_is_replaced_under_services_that_somebody_started(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deploy, or a boot of the host, between the stop and the exchange: what they write would go into the copy beside it."""
    host = Host()
    steps = backup_restore.Steps({"store": "sqlite", "version": "", "ticket": "t1"}, host)
    steps.swap = swap
    deliver(swap, "t1")
    monkeypatch.setattr(host, "active", lambda slot: ["atlas-api@green.service"] if slot == "green" else [])
    with pytest.raises(HostError, match="The services in green were started"):
        steps.replaced()
    assert content(swap)["atlas.db"] == "old" and swap.unfinished() is None
    monkeypatch.setattr(host, "active", lambda slot: [])
    steps.replaced()
    assert content(swap) == {"atlas.db": "new"}


def test_no_service_starts_between_the_stop_and_the_end_of_a_restore(
    swap: Swap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the restore itself, until the host boots. What it undoes starts again, and on a host that was not held nothing does."""
    started: list[str] = []

    def systemctl(argv: list[str], **_: object) -> Done:
        started.extend(argv[-4:] if "start" in argv else [])
        return Done(0, "", "")

    held, trial = tmp_path / "restore" / "unaccepted", tmp_path / "trial"
    host = Host(tmp_path / "opt", tmp_path / "deploy", tmp_path / "boot", systemctl, (held, trial))
    monkeypatch.setattr(host, "in_service", lambda: "blue")
    monkeypatch.setattr(host, "slots", lambda: {"blue": 3, "green": None})
    monkeypatch.setattr(host, "wait_healthy", lambda *_: 1.0)
    steps = backup_restore.Steps({"store": "none", "version": "", "ticket": "t1", "timeout": 1, "host": "app1"}, host)
    assert steps.resumed()["changed"] is False and started == []
    steps.stopped()
    assert held.exists() and held.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HostError, match=r"did not end.*playbooks/restore\.yml"):
        host.start("blue")
    steps.started()
    assert held.exists() and trial.exists() and len(started) == 4
    trial.unlink()  # a boot
    with pytest.raises(HostError, match="did not end"):
        host.start("blue")
    assert steps.resumed()["changed"] is True
    assert not held.exists() and not trial.exists() and len(started) == 8
    steps.stopped()
    steps.started()
    assert steps.accepted() == {"changed": True} and not held.exists() and not trial.exists()
    assert steps.accepted() == {"changed": False}


def test_a_lock_is_taken_over_only_from_who_is_certainly_gone() -> None:
    mine = controller()
    *machine, _, started = mine["process"].split()

    def slurped(edge: str, process: str) -> dict[str, Any]:
        lease = json.dumps({"deploy": f"of {edge}", "process": process})
        return {"item": edge, "content": base64.b64encode(lease.encode()).decode()}

    leases = [
        slurped("edge1", mine["process"]),
        slurped("edge2", " ".join([*machine, "999999999", started])),
        slurped("edge3", "elsewhere boot space 1 1"),
        {"item": "edge4", "msg": "file not found"},
    ]
    lock = backup_lock(leases)
    assert lock["replaces"] == {"edge2": "of edge2"} and lock["holder"] == mine["holder"]


# The agent


@pytest.fixture
def agent(tmp_path: Path) -> backup_agent.Agent:
    root, state = tmp_path / "opt", tmp_path / "deploy"
    for path in (root / "slots", root / "deployments", root / "archives", state, tmp_path / "boot", tmp_path / "lib"):
        path.mkdir(parents=True)

    def answers(argv: list[str], **_: object) -> Done:
        if argv[1:3] == ["db", "snapshot"]:
            Path(argv[3]).write_text("copy")
            return Done(0, json.dumps({"schema": "1", "rows": {"documents": 2}, "bytes": 4}), "")
        return Done(1, "", "Error: the database does not answer\n")

    host = Host(root, state, tmp_path / "boot", answers)
    door = tmp_path / "door.json"
    return backup_agent.Agent(host, tmp_path / "lib", tmp_path / "lib" / "status.json", door, nice=False)


def deploy(agent: backup_agent.Agent) -> None:
    directory = agent.host.deployment(3)
    directory.mkdir()
    (directory / "deployment.json").write_text(json.dumps({"release": "0.1.0-abc", "digest": "d"}))
    (directory / "settings.yaml").write_text("environment: development\n")
    agent.host.point("blue", 3)
    (agent.host.boot / "atlas@blue.target").symlink_to("/x")
    for name in ("0.1.0-abc", "0.0.9-old"):
        (agent.host.root / "archives" / f"{name}.tar.gz").write_text(name)
        (agent.host.root / "archives" / f"{name}.tar.gz.sig").write_text("sig")


def exported(agent: backup_agent.Agent, tmp_path: Path, store: str, have: set[str]) -> Path:
    target = tmp_path / "received"
    target.mkdir()
    with (tmp_path / "stream").open("wb") as out:
        agent.export(store, have, out)
    with (tmp_path / "stream").open("rb") as source:
        receive(source, target, 1_000_000)
    return target


def test_an_export_holds_what_rebuilds_the_host(agent: backup_agent.Agent, tmp_path: Path) -> None:
    deploy(agent)
    agent.host.record("finished", deployment=3)
    target = exported(agent, tmp_path, "sqlite", {"0.0.9-old.tar.gz"})
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["deployed"] == {"deployment": 3, "release": "0.1.0-abc", "digest": "d"}
    assert (manifest["rows"], manifest["bytes"]) == ({"documents": 2}, 4)
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert names == [
        "archives/0.1.0-abc.tar.gz",
        "archives/0.1.0-abc.tar.gz.sig",
        "atlas.db",
        "deployments/3/deployment.json",
        "deployments/3/settings.yaml",
        "journal.jsonl",
        "manifest.json",
    ]
    assert list((tmp_path / "lib" / "backup").iterdir()) == [], "the copy of the store is left on the host"


def test_what_a_deploy_removes_during_an_export_is_left_out(agent: backup_agent.Agent, tmp_path: Path) -> None:
    deploy(agent)
    old = agent.host.deployment(2)
    shutil.copytree(agent.host.deployment(3), old)
    answers = agent.host.run

    def meanwhile(argv: list[str], **given: Any) -> Done:
        shutil.rmtree(old)
        for path in (agent.host.root / "archives").glob("0.0.9-old*"):
            path.unlink()
        return answers(argv, **given)

    agent.host.run = meanwhile
    target = exported(agent, tmp_path, "sqlite", set())
    assert [path.name for path in (target / "deployments").iterdir()] == ["3"]
    assert sorted(path.name for path in (target / "archives").iterdir()) == ["0.1.0-abc.tar.gz", "0.1.0-abc.tar.gz.sig"]


def test_before_the_first_deployment_there_is_only_a_manifest(agent: backup_agent.Agent, tmp_path: Path) -> None:
    target = exported(agent, tmp_path, "sqlite", set())
    assert json.loads((target / "manifest.json").read_text())["deployed"] == {}
    assert agent.contents() == {}


def test_a_command_that_fails_is_named(agent: backup_agent.Agent) -> None:
    deploy(agent)
    with pytest.raises(BackupError, match="atlas db contents: Error: the database does not answer"):
        agent.contents()


def test_a_closed_door_takes_nothing_in(agent: backup_agent.Agent, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="door is closed"):
        agent.take_in("t1", None)
    agent.door.write_text(json.dumps({"ticket": "t2", "directory": str(tmp_path / "in")}))
    with pytest.raises(BackupError, match="door is closed"):
        agent.take_in("t1", None)
    assert not (tmp_path / "in").exists()


def test_a_report_is_kept_and_junk_is_not(agent: backup_agent.Agent) -> None:
    agent.status('{"jobs": {}, "expected_since": 1}')
    with pytest.raises(BackupError, match="no report"):
        agent.status("[1]")
    assert json.loads(agent.status_file.read_text()) == {"jobs": {}, "expected_since": 1}


def test_root_follows_no_link_that_the_service_left_in_its_directory(agent: backup_agent.Agent, tmp_path: Path) -> None:
    deploy(agent)
    others = tmp_path / "others"
    others.mkdir()
    (others / "shadow").write_text("root's")
    (tmp_path / "lib" / "backup").symlink_to(others)
    with pytest.raises(OSError, match="backup"):
        exported(agent, tmp_path, "sqlite", set())
    (tmp_path / "lib" / ".status.json.partial").symlink_to(others / "shadow")
    agent.status('{"jobs": {}}')
    assert {path.name: path.read_text() for path in others.iterdir()} == {"shadow": "root's"}
    assert json.loads(agent.status_file.read_text()) == {"jobs": {}} and not agent.status_file.is_symlink()


@pytest.mark.parametrize(
    "words",
    [
        ["sh"],
        ["export", "sqlite", "have=;id"],
        ["export", "mysql", "have="],
        ["import", "../x"],
        ["contents", "x"],
        [""],
        ["status\nsh"],
    ],
)
def test_other_commands_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert backup_agent.main(words) == 2
    assert "not a command for the backup host" in capsys.readouterr().err
