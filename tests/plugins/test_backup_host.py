"""The backup host's jobs, with restic replaced by a record of what it was asked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import backup_core as core
from ansible.module_utils import backup_host, release
from ansible.module_utils.backup_core import BackupError
from ansible.module_utils.backup_host import CURRENT, Backups
from ansible.module_utils.backup_wal import Wal

LIMITS = {"backup": 100, "increment": 100, "check": 100, "drill": 100}


class Recorded(Backups):
    """A backup host whose restic fails at the words in *broken*."""

    def __init__(self, directory: Path, snapshots: list[dict[str, Any]] | None = None, broken: str = "nothing") -> None:
        super().__init__(
            {
                "directory": str(directory),
                "store": "sqlite",
                "sources": {"app1": "192.0.2.31"},
                "limits": LIMITS,
                "database": {},
                "api_port": 1,
                "reserve_mb": 1,
                "keep": {"daily": 7, "weekly": 4, "increment_hours": 48, "labelled_days": 35},
            }
        )
        self.asked: list[str] = []
        self.told: list[dict[str, Any]] = []
        self.snapshots, self.broken = snapshots or [], broken

    def restic(self, doing: str, *arguments: str, password: str = CURRENT) -> str:
        self.asked.append(arguments[0])
        if arguments[0] == self.broken:
            raise core.explain(doing, "Fatal: no space left on device")
        return json.dumps(self.snapshots) if arguments[0] == "snapshots" else ""

    def fetch(self, source: str) -> dict[str, Any]:
        (self.directory / "staging" / source).mkdir(parents=True, exist_ok=True)
        return {"deployed": {"release": "r"}, "schema": "0001", "rows": {"documents": 2}, "taken_at": 1.0}

    def ask(self, host: str, command: str, text: str = "", timeout: float = 300) -> str:
        assert command == "status"
        self.told.append(json.loads(text))
        return ""


def snapshot(at: float, **tags: str) -> dict[str, Any]:
    return {
        "id": "a" * 64,
        "time": core.rfc3339(at),
        "hostname": "app1",
        "tags": [f"{key}={value}" for key, value in tags.items()],
    }


def test_a_day_is_backed_up_then_pruned_then_checked(tmp_path: Path) -> None:
    backups = Recorded(tmp_path)
    assert backups.job("backup", backups.daily) == {"rows": {"documents": 2}}
    wanted = [word for word in backups.asked if word != "snapshots"]
    assert wanted == ["backup", "forget", "forget", "forget", "prune", "check"]
    assert backups.told[-1]["jobs"]["backup"]["ok"] is True


@pytest.mark.parametrize("broken", ["backup", "snapshots"])
def test_nothing_is_removed_after_a_backup_that_failed(tmp_path: Path, broken: str) -> None:
    backups = Recorded(tmp_path, broken=broken)
    with pytest.raises(BackupError, match="full disk"):
        backups.job("backup", backups.daily)
    assert not {"forget", "prune"} & set(backups.asked)
    told = backups.told[-1]["jobs"]["backup"]
    assert told["ok"] is False and "full disk" in told["message"]
    assert json.loads((tmp_path / "journal.jsonl").read_text())["event"] == "backup"


@pytest.mark.parametrize("answer", ["not JSON", "[{}]"])
def test_a_job_that_fails_in_an_unforeseen_way_is_told(tmp_path: Path, answer: str) -> None:
    backups = Recorded(tmp_path)
    backups.job("check", lambda: {"backups": 1})
    backups.restic = lambda *_, **__: answer  # type: ignore[method-assign]
    with pytest.raises(BackupError, match="check failed: (JSONDecode|Key)Error: "):
        backups.job("check", backups.check)
    assert backups.told[-1]["jobs"]["check"]["ok"] is False


def test_what_a_killed_restore_took_out_goes_the_next_day(tmp_path: Path) -> None:
    backups, now = Recorded(tmp_path), time.time()
    for name, age in (("restore-killed", 2 * core.DAY), ("restore-under-way", 600.0)):
        (tmp_path / "scratch" / name / "source").mkdir(parents=True)
        os.utime(tmp_path / "scratch" / name, (now - age, now - age))
    backups.prune(now)
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["restore-under-way"]


def test_of_two_jobs_that_end_at_once_both_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = core.noted

    def slowly(*given: Any) -> dict[str, Any]:
        time.sleep(0.2)
        return noted(*given)

    monkeypatch.setattr(core, "noted", slowly)
    with ThreadPoolExecutor(2) as pool:
        drill = pool.submit(Recorded(tmp_path).note, "drill", {"ok": False, "message": "damaged"}, 1.0)
        increment = pool.submit(Recorded(tmp_path).note, "increment", {"ok": True}, 1.0)
    assert drill.result() is increment.result() is None
    jobs = json.loads((tmp_path / "status.json").read_text())["jobs"]
    assert jobs["drill"]["message"] == "damaged" and jobs["increment"]["ok"] is True


def test_a_check_that_takes_long_lets_copies_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large repository it reads part after part, and all of them."""
    monkeypatch.setattr(backup_host, "PART_BYTES", 100)
    for name in ("00", "ff"):
        (tmp_path / "restic" / "data" / name).mkdir(parents=True)
        (tmp_path / "restic" / "data" / name / "pack").write_bytes(b"x" * 120)
    checking, copying = Recorded(tmp_path, [snapshot(1.0, kind="daily")]), Recorded(tmp_path)
    said: list[str] = []

    def restic(doing: str, *arguments: str, password: str = CURRENT) -> str:
        said.append(arguments[1] if "reading" in doing else arguments[0])
        return Recorded.restic(checking, doing, *arguments)

    checking.restic = restic  # type: ignore[method-assign]
    copying.restic = lambda *given, **_: said.append(f"copy: {given[1]}") or ""  # type: ignore[func-returns-value,method-assign]
    with ThreadPoolExecutor(1) as pool:
        with checking.lock():
            copy = pool.submit(copying.job, "increment", copying.increment)
            time.sleep(2 * backup_host.POLL_SECONDS)
            checking.check()
        assert copy.result(10) == {"rows": {"documents": 2}}
    parts = [f"--read-data-subset={number}/3" for number in (1, 2, 3)]
    assert [word for word in said if word.startswith("--")] == parts
    assert said.index("check") < said.index("copy: backup") < said.index(parts[0])


def laid_out(backups: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a restore of *backups* laid out without restic."""

    def lay_out(_: Any, scratch: Path) -> None:
        (scratch / "source").mkdir()
        (scratch / "source" / "manifest.json").write_text('{"taken_at": 1.0}')

    monkeypatch.setattr(backups, "_lay_out", lay_out)


def test_a_drill_that_takes_long_lets_copies_go_on_and_no_other_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_host, "LOCK_SECONDS", 1)
    backups, others = Recorded(tmp_path, [snapshot(1.0, kind="daily")]), Recorded(tmp_path)
    laid_out(backups, monkeypatch)

    def judge(*_: Any, **__: Any) -> dict[str, Any]:
        assert others.job("increment", others.increment) == {"rows": {"documents": 2}}
        with pytest.raises(BackupError, match="another backup job"), others.trial():
            pass
        return dict.fromkeys(("rows", "sensitive", "searched", "release"), 1)

    monkeypatch.setattr(backups.proof, "judge", judge)
    assert backups.job("drill", backups.drill)["sensitive"] == 1
    with others.trial(), others.lock():
        pass


def test_a_job_keeps_others_out_again_after_it_let_them_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_host, "LOCK_SECONDS", 0.5)
    backups, others = Recorded(tmp_path), Recorded(tmp_path)
    with backups.lock():
        backups.turn()
        with pytest.raises(BackupError, match="another backup job"), others.lock():
            pass


def test_nothing_is_removed_while_a_snapshot_is_dated_in_the_future(tmp_path: Path) -> None:
    backups = Recorded(tmp_path, [snapshot(time.time() + 3600, kind="daily")])
    with pytest.raises(BackupError, match="dated in the future: aaaaaaaa"):
        backups.job("backup", backups.daily)
    assert not {"forget", "prune"} & set(backups.asked)


def test_a_label_is_used_once(tmp_path: Path) -> None:
    backups = Recorded(tmp_path, [snapshot(1.0, kind="labelled", label="kept")])
    with pytest.raises(BackupError, match="label kept already"):
        backups.take("labelled", "kept")
    assert "backup" not in backups.asked


def test_a_repository_is_never_made_over_what_is_left_of_one(tmp_path: Path) -> None:
    backups = Recorded(tmp_path)
    assert backups.init() is True
    (tmp_path / "restic" / "data").mkdir(parents=True)
    with pytest.raises(BackupError, match="missing repository"):
        backups.init()
    (tmp_path / "restic" / "config").touch()
    assert backups.init() is False
    assert backups.asked == ["init"]


def test_an_archive_that_is_kept_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "check_signature", lambda *_: None)
    kept, came = tmp_path / "archives", tmp_path / "came" / "archives"
    for directory, content in ((kept, "old"), (came, "new")):
        directory.mkdir(parents=True)
        for name in ("a.tar.gz", "a.tar.gz.sig"):
            (directory / name).write_text(content)
    (came / "b.tar.gz").write_text("new")
    (came / "b.tar.gz.sig").write_text("new")
    Recorded(tmp_path)._keep_archives(came.parent, kept)
    assert {path.name: path.read_text() for path in kept.iterdir()} == {
        "a.tar.gz": "old", "a.tar.gz.sig": "old", "b.tar.gz": "new", "b.tar.gz.sig": "new",
    }  # fmt: skip


def test_before_the_first_deployment_no_job_counts(tmp_path: Path) -> None:
    backups = Recorded(tmp_path)
    backups.fetch = lambda source: {}  # type: ignore[method-assign]
    assert backups.job("increment", backups.increment) == {}
    assert backups.asked == []
    assert "ok" not in backups.told[-1]["jobs"]["increment"]


def test_an_empty_store_is_not_kept(tmp_path: Path) -> None:
    backups = Recorded(tmp_path)
    backups.fetch = lambda source: {"deployed": {"release": "r"}, "schema": None, "rows": {}}  # type: ignore[method-assign]
    with pytest.raises(BackupError, match="app1: the store is empty"):
        backups.job("increment", backups.increment)
    assert "backup" not in backups.asked


class Log(Wal):
    """A log whose database has the identity *found*."""

    def __init__(self, directory: Path, found: str = "7001") -> None:
        super().__init__({"address": "192.0.2.40"}, directory)
        self.found, self.marks = found, 0
        self.home.mkdir(parents=True)
        (self.home / "identity.json").write_text('{"systemid": "7001", "version": "15"}')

    def sql(self, statement: str) -> list[str]:
        assert "system_identifier" in statement
        return [self.found]

    def tend(self) -> dict[str, Any]:
        self.expect_same()
        return {"rpo_seconds": 0.1}

    def bases(self) -> dict[str, float]:
        return {"base": 1.0}

    def mark(self, patience: float = 1.0) -> dict[str, Any]:
        self.marks += 1
        return {"restore_point": f"point-{self.marks}", "marked_at": 1.0, "arrived_at": 1.5}


class Replicated(Recorded):
    """A backup host of PostgreSQL. *counts*: the documents that each look finds; *deployment*: the one in service."""

    counts: list[int]
    deployment = 4

    def __init__(self, directory: Path, **given: Any) -> None:
        super().__init__(directory, **given)
        self.wal, self.store = Log(directory), "postgresql"
        self.counts = [2] * 20

    def ask(self, host: str, command: str, text: str = "", timeout: float = 300) -> str:
        if command == "deployed":
            return json.dumps({"deployment": self.deployment})
        if command == "contents":
            return json.dumps({"schema": "0001", "rows": {"documents": self.counts.pop(0)}})
        return super().ask(host, command, text, timeout)

    def fetch(self, source: str) -> dict[str, Any]:
        return {**super().fetch(source), "deployed": {"release": "r", "deployment": self.deployment}}


def test_what_was_not_yet_in_order_is_kept_with_the_past_that_a_restore_ended(tmp_path: Path) -> None:
    """The last seconds of that past are in it alone: whoever restored to the wrong moment wants them back."""
    log = Log(tmp_path)
    log.barman = lambda *_: ""  # type: ignore[method-assign]
    whole, old, new = "000000010000000000000004", "000000010000000000000005", "000000020000000000000004"
    streaming, target = log.home / "streaming", tmp_path / "target"
    streaming.mkdir()
    (streaming / whole).write_text("the one before")
    (streaming / f"{old}.partial").write_text("the last seconds")
    log.restart()
    assert list(streaming.iterdir()) == [], "the receiver would go on from there"
    (streaming / f"{new}.partial").touch()  # as the receiver leaves it until the first byte comes
    target.mkdir()
    log.recover("base", target, {"time": 1.0})
    kept = {path.name: path.read_text() for path in (target / "barman_wal").iterdir()}
    assert kept == {whole: "the one before", old: "the last seconds"}
    log.forget(time.time() - 60)
    assert len(list((log.home / "past").iterdir())) == 2
    log.forget(time.time() + 60)
    assert list((log.home / "past").iterdir()) == []


def test_what_a_label_needs_stays_and_what_never_became_a_base_backup_goes(tmp_path: Path) -> None:
    now = time.time()
    days = {f"day{day:02d}": now - day * core.DAY for day in range(60)}
    backups = Replicated(tmp_path, snapshots=[snapshot(days["day34"] + 3600, kind="labelled", label="before-import")])
    listed = [{"backup_id": name, "status": "DONE", "end_time_timestamp": str(at)} for name, at in days.items()]
    listed += [{"backup_id": name, "status": name.upper()} for name in ("failed", "started")]
    deleted: list[str] = []
    log: Any = backups.wal
    log.bases = lambda: days
    log.barman = lambda *_: json.dumps({"atlas": listed})
    log.delete = deleted.append
    backups.prune(now)
    assert {"failed", "started", "day33", "day35"} <= set(deleted) and "day34" not in deleted


def test_what_a_deploy_brought_is_kept_with_the_next_look_at_the_log(tmp_path: Path) -> None:
    backups = Replicated(tmp_path)
    for deployment, stored in ((4, 1), (4, 1), (5, 2)):
        backups.deployment = deployment
        assert backups.job("increment", backups.increment) == {"rpo_seconds": 0.1}
        assert backups.asked.count("backup") == stored


def test_the_log_of_another_database_is_not_kept(tmp_path: Path) -> None:
    backups = Replicated(tmp_path)
    assert backups.wal is not None
    backups.wal.found = "7002"  # type: ignore[attr-defined]
    with pytest.raises(BackupError, match="192.0.2.40 is not the one that is backed up here"):
        backups.job("increment", backups.increment)
    with pytest.raises(BackupError, match="playbooks/recover.yml"):
        backups.wal.receive()


def test_a_receiver_that_restarts_is_no_failure_and_one_that_stays_away_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal, clock = Log(tmp_path), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(wal, "expect_same", lambda: None)
    monkeypatch.setattr(wal, "barman", lambda *_: "")
    for away, is_back in ((5.0, True), (3600.0, False)):
        clock[0] = 0.0
        monkeypatch.setattr(
            wal, "sql", lambda _, until=away: ["0.5", "0", "7.0", "0/5", "0/5", "0" * 24] if clock[0] >= until else []
        )
        if is_back:
            assert Wal.tend(wal) == {"rpo_seconds": 0.5, "behind_bytes": 0}
        else:
            with pytest.raises(BackupError, match="the log of the database is not received"):
                Wal.tend(wal)
    assert clock[0] < 60, "less than the time between two increments"


LOG = [
    "0000000100000000000000FE",
    "0000000100000000000000FF",
    "000000010000000100000000",
    # A restore ended the first timeline, and began the second elsewhere.
    "000000010000000100000007.partial",
    "000000020000000100000005",
    "000000020000000100000006",
]


def kept_log(directory: Path, catalogue: str) -> Log:
    """A log as Barman keeps it, with its list, the *catalogue*."""
    wal = Log(directory)
    wals = wal.home / "wals"
    files = {wals / name[:16] / name: hashlib.shake_256(name.encode()).digest(9000) for name in LOG}
    lines = []
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data))
        lines.append(f"{path.name}\t{path.stat().st_size}\t1900000000.0\tpygzip\n")
    (wals / "00000002.history").write_text("1\t0/0\n")
    lines.append("00000002.history\t6\t1900000000.0\tNone\n")
    (wals / catalogue).write_text("".join(lines))
    return wal


@pytest.mark.parametrize("catalogue", ["xlog.db", "atlas-xlog.db"])
def test_every_segment_of_the_log_is_read(tmp_path: Path, catalogue: str) -> None:
    """Debian 13 has another name for the list."""
    wal = kept_log(tmp_path, catalogue)
    assert wal.verify_log() == 7
    path = wal.home / "wals" / LOG[1][:16] / LOG[1]
    whole = path.read_bytes()
    for hurt in (b"", whole[:-2000], whole[:6000] + b"XXXX" + whole[6004:]):
        path.write_bytes(hurt)
        with pytest.raises(BackupError, match=rf"damaged repository \({LOG[1]}[: ]"):
            wal.verify_log()
    path.write_bytes(whole)
    assert wal.verify_log() == 7


@pytest.mark.parametrize("name", [*LOG, "00000002.history"])
def test_a_file_of_the_log_that_is_missing_is_named_wherever_it_was(tmp_path: Path, name: str) -> None:
    wal = kept_log(tmp_path, "xlog.db")
    next(wal.home.rglob(name)).unlink()
    with pytest.raises(BackupError, match=rf"damaged repository \({name} is missing\)"):
        wal.verify_log()
    # As the list is when it was built anew: that part of the past is given up.
    catalogue = wal.home / "wals" / "xlog.db"
    lines = catalogue.read_text().splitlines(keepends=True)
    catalogue.write_text("".join(line for line in lines if not line.startswith(f"{name}\t")))
    assert wal.verify_log() == 6


@pytest.mark.parametrize(
    ("listed", "named"),
    [(lambda text: "", LOG[0]), (lambda text: text.replace("pygzip", "py gzip", 1), "list"), (None, LOG[0])],
)
def test_log_that_no_restore_would_take_is_named(
    tmp_path: Path, listed: Callable[[str], str] | None, named: str
) -> None:
    """A restore takes what is listed, and without a list nothing at all."""
    wal = kept_log(tmp_path, "xlog.db")
    catalogue = wal.home / "wals" / "xlog.db"
    if listed:
        catalogue.write_text(listed(catalogue.read_text()))
    else:
        catalogue.unlink()
    with pytest.raises(BackupError, match=f"damaged repository .*{named}.* rebuild-xlogdb atlas"):
        wal.verify_log()


def test_a_repository_without_a_log_is_whole(tmp_path: Path) -> None:
    assert Log(tmp_path).verify_log() == 0


@pytest.mark.parametrize(
    ("to", "asked", "wanted"),
    [
        ({}, ["latest"], ["restore_command = 'cp barman_wal/%f %p'"]),
        (
            {"time": 1900000000.0, "timeline": 2},
            ["2"],
            [
                "restore_command = 'cp barman_wal/%f %p'",
                "recovery_target_time = '2030-03-17 17:46:40+00:00'",
                "recovery_target_action = 'promote'",
                "recovery_target_timeline = '2'",
            ],
        ),
        ({"name": "p1", "timeline": 2}, ["2", "--target-action", "promote", "--target-name", "p1"], None),
    ],
)
def test_all_of_the_log_is_laid_out_whatever_is_wanted(
    tmp_path: Path, to: dict[str, Any], asked: list[str], wanted: list[str] | None
) -> None:
    """Barman names a point itself; for all else it is given no target, by which it would leave log out."""
    wal = Log(tmp_path)
    target = tmp_path / "pgdata"
    target.mkdir()
    given: list[tuple[str, ...]] = []
    wal.barman = lambda doing, *arguments: given.append(arguments) or ""  # type: ignore[method-assign,func-returns-value]
    wal.recover("base", target, to)
    assert given[-1] == ("recover", "--target-tli", *asked, "atlas", "base", str(target))
    settings = target / "postgresql.auto.conf"
    assert (settings.read_text().splitlines() if settings.exists() else None) == wanted
    assert (target / "recovery.signal").exists() == (wanted is not None)


def test_a_moment_at_which_housekeeping_removed_rows_is_not_counted_by(tmp_path: Path) -> None:
    backups = Replicated(tmp_path)
    backups.counts = [9, 7, 8]
    taken = backups.take("labelled", "kept")
    assert taken["app1"]["rows"] == {"documents": [7, 8]} and taken["app1"]["restore_point"] == "point-2"


def test_a_drill_whose_rows_were_counted_at_a_bad_moment_is_held_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups = Replicated(tmp_path, snapshots=[snapshot(1.0, kind="daily")])
    good = {key: 1 for key in ("rows", "sensitive", "searched", "release", "restored_to")} | {"point_at": 1.0}
    outcomes: list[Any] = [core.RowsDiffer("table jobs has 7 rows"), good]

    def prepare(*_: Any) -> dict[str, Any]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return dict(outcome)

    monkeypatch.setattr(backups, "prepare", prepare)
    assert backups.drill()["rpo_seconds"] == 0.5
    outcomes += [core.RowsDiffer("table jobs has 7 rows")] * 3
    with pytest.raises(BackupError, match="table jobs has 7 rows"):
        backups.drill()
    outcomes += [BackupError("damaged repository"), good]
    with pytest.raises(BackupError, match="damaged"):
        backups.drill()


def test_hosts_of_other_names_find_what_the_old_ones_left(tmp_path: Path) -> None:
    old = {**snapshot(1.0, kind="daily"), "hostname": "old1"}
    backups = Recorded(tmp_path, [old])
    assert backups._point(None, None).source == "old1"
    backups.snapshots = [snapshot(1.0, kind="daily"), {**old, "time": core.rfc3339(2.0)}]
    assert backups._point(None, None).source == "app1"
