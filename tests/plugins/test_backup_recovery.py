"""How far a log goes is decided on a real PostgreSQL: to a time after its last commit, with a hole in it, without its end."""

from __future__ import annotations

import glob
import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ansible.module_utils import backup_core as core
from ansible.module_utils.backup_core import BackupError
from ansible.module_utils.backup_host import Backups
from ansible.module_utils.backup_proof import Proof, _ask
from ansible.module_utils.backup_wal import Wal, is_between_records

PROGRAMS = max(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))
OPTIONS = ["fsync=off", "archive_mode=on", "listen_addresses=", "shared_buffers=16MB", "autovacuum=off"]


def as_postgres() -> dict[str, Any]:
    """What makes a process one of an unprivileged user: PostgreSQL does not run as root."""
    account = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    switch = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    return {"cwd": "/", **switch}


class Past(NamedTuple):
    """A cluster's *base* backup and *log*; after *two* (Unix time) came a third row, and after *last* none up to *quiet*."""

    base: Path
    log: Path
    two: float
    last: float
    quiet: float
    lsn: str


@pytest.fixture(scope="module")
def past() -> Iterator[Past]:
    """Each of three rows is in a segment of its own, then comes a restore point."""
    with tempfile.TemporaryDirectory() as name:
        place, user = Path(name), as_postgres()
        if "user" in user:
            os.chown(place, user["user"], -1)
        place.chmod(0o755)
        data, log, base = place / "data", place / "log", place / "base"
        log.mkdir()
        log.chmod(0o777)
        run: Callable[..., Any] = partial(subprocess.run, check=True, capture_output=True, text=True, **user)
        run([f"{PROGRAMS}/initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C.UTF-8"])
        options = [*OPTIONS, f"unix_socket_directories={place}", f"archive_command=cp %p {log}/%f"]
        server = subprocess.Popen(
            [f"{PROGRAMS}/postgres", "-D", data, *(word for option in options for word in ("-c", option))],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user,
        )  # fmt: skip

        def sql(statement: str) -> str:
            done = run(["psql", "-XAtq", "-h", place, "-U", "postgres", "-d", "postgres", "-c", statement])
            return str(done.stdout.strip())

        def quiet_second() -> float:
            time.sleep(1.1)
            return float(int(time.time()))

        def in_time(condition: Callable[[], object]) -> None:
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.1)

        try:
            in_time(lambda: (place / ".s.PGSQL.5432").exists() and not _ask(place, "SELECT 1").status)
            sql("CREATE ROLE atlas; CREATE ROLE atlas_a LOGIN IN ROLE atlas; CREATE TABLE rows (number int)")
            run([f"{PROGRAMS}/pg_basebackup", "-h", place, "-U", "postgres", "-D", base, "-X", "none", "-c", "fast"])
            two = 0.0
            for number in (1, 2, 3):
                two = quiet_second() if number == 3 else two
                sql(f"INSERT INTO rows VALUES ({number})")
                if number < 3:
                    sql("SELECT pg_switch_wal()")
            last, quiet = time.time(), quiet_second()
            time.sleep(1.1)
            lsn = sql("SELECT pg_create_restore_point('quiet')")
            newest = sql(f"SELECT pg_walfile_name('{lsn}'), pg_switch_wal()").split("|")[0]
            in_time(lambda: (log / newest).exists())
        finally:
            server.terminate()
            server.wait(60)
        yield Past(base, log, two, last, quiet, lsn)


class Bare(Proof):
    """A proof of the database alone: no release looks at it, and what it finds are the rows."""

    def _release(self, *_: Any) -> Path:
        return Path("/")

    def _try(self, _: Path, scratch: Path, *given: Any) -> dict[str, Any]:
        return {"rows": int(_ask(scratch / "run", "SELECT count(*) FROM rows").output)}


class Restored:
    """A backup host whose log is that of *past*, but for what *hurt* does to the directory it is in."""

    def __init__(self, directory: Path, past: Past, hurt: Callable[[Path], object]) -> None:
        self.past, self.directory, self.scratch = past, directory, directory / "scratch"
        self.data = self.scratch / "pgdata"
        self.backups = Backups.__new__(Backups)
        self.backups.store, self.backups.proof = "postgresql", Bare(directory, 1, "")
        self.wal = self.backups.wal = Wal({"address": "192.0.2.40"}, directory)
        self.wal.home.mkdir(parents=True)
        self.hurt = hurt
        self.wal.barman = self._barman  # type: ignore[method-assign]

    def _barman(self, doing: str, *_: str) -> str:
        if doing == "restoring":
            shutil.copytree(self.past.base, self.data)
            shutil.copytree(self.past.log, self.data / "barman_wal")
            self.hurt(self.data / "barman_wal")
        return ""

    def to(self, at: float | None) -> int:
        """Restore to the time *at*, or to the end; how many rows there are then."""
        self.scratch.mkdir()
        target = {} if at is None else {"time": at, "timeline": 1}
        self.wal.recover("base", self.data, target)
        (self.scratch / "run").mkdir()
        user = as_postgres()
        for path in [self.directory, *self.directory.rglob("*")] if "user" in user else []:
            os.chown(path, user["user"], -1)
        found = self.backups._judge(self.scratch, {"deployed": {}}, exact=False, at=at)
        assert "recovery" not in (self.data / "postgresql.auto.conf").read_text()
        return int(found["rows"])


@pytest.fixture
def restored(past: Past, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Restored]]:
    """Makes backup hosts whose processes are those of a user that PostgreSQL accepts."""
    with tempfile.TemporaryDirectory() as name, monkeypatch.context() as patch:
        Path(name).chmod(0o755)
        patch.setattr(subprocess, "Popen", partial(subprocess.Popen, **as_postgres()))

        def make(hurt: Callable[[Path], object] = lambda log: None, complete_at: float | None = None) -> Restored:
            made = Restored(Path(name), past, hurt)
            if complete_at is not None:
                made.wal._note_received(1, complete_at, past.lsn)
            return made

        yield make


def segment(log: Path, number: int) -> Path:
    """The segment of the row *number*."""
    return sorted(path for path in log.iterdir() if len(path.name) == 24)[number - 4]


def flip(path: Path) -> None:
    """Hurt the first record of a segment."""
    with path.open("r+b") as file:
        file.seek(60)
        file.write(b"XXXX")


def test_a_time_between_two_commits_is_reached(restored: Callable[..., Restored], past: Past) -> None:
    assert restored().to(past.two) == 2


def test_a_time_after_the_last_commit_of_a_log_that_is_complete_is_its_end(
    restored: Callable[..., Restored], past: Past
) -> None:
    assert restored(complete_at=past.quiet + 1).to(past.quiet) == 3


@pytest.mark.parametrize("complete_at", [None, 0.0])
def test_where_nothing_shows_that_the_log_is_complete_it_says_how_far_it_goes(
    restored: Callable[..., Restored], past: Past, complete_at: float | None
) -> None:
    """As when the database was lost at the last commit, and somebody asks for a later moment."""
    last, asked = core.rfc3339(past.last), core.rfc3339(past.quiet)
    with pytest.raises(BackupError) as caught:
        restored(complete_at=complete_at if complete_at is None else past.quiet + complete_at).to(past.quiet)
    assert str(caught.value) == (
        f"the log can be read to {last}, and nothing shows that it was complete at {asked}. "
        f"Restore to then or earlier (-e backup_restore_time={last}), or to the newest state (without a time)."
    )


@pytest.mark.parametrize(("hurt", "newest"), [(Path.unlink, False), (Path.unlink, True), (flip, False)])
def test_a_log_with_a_hole_is_never_taken_for_whole(
    restored: Callable[..., Restored], past: Past, hurt: Callable[[Path], object], newest: bool
) -> None:
    host = restored(lambda log: hurt(segment(log, 2)), complete_at=past.quiet + 1)
    with pytest.raises(
        BackupError, match="damaged repository .* is there, and what leads to it is not. Restore to then"
    ):
        host.to(None if newest else past.quiet)


@pytest.mark.parametrize("newest", [False, True])
def test_a_log_whose_end_had_arrived_and_is_gone_is_damaged(
    restored: Callable[..., Restored], past: Past, newest: bool
) -> None:
    def cut(log: Path) -> None:
        for path in [segment(log, 3), *(path for path in log.iterdir() if path.name > segment(log, 3).name)]:
            path.unlink()

    host = restored(cut, complete_at=past.quiet + 1)
    with pytest.raises(BackupError, match=f"damaged repository .* although it had arrived up to {past.lsn}"):
        host.to(None if newest else past.quiet)


def test_all_of_a_whole_log_is_the_newest_state(restored: Callable[..., Restored], past: Past) -> None:
    assert restored(complete_at=past.quiet + 1).to(None) == 3


def test_the_log_is_noted_as_complete_only_when_the_receiver_has_it_to_its_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = Wal({"address": "192.0.2.40"}, tmp_path)
    wal.home.mkdir(parents=True)
    monkeypatch.setattr(wal, "expect_same", lambda: None)
    monkeypatch.setattr(wal, "barman", lambda *_: "")
    noted = wal.home / "received.json"
    segment = "000000020000000000000005"
    for behind, written, inserted in (("8", "0/5000100", "0/5000100"), ("0", "0/5000100", "0/5000148")):
        monkeypatch.setattr(wal, "sql", lambda _, row=["0.5", behind, "7.0", written, inserted, segment]: row)
        wal.tend()
        assert not noted.exists()
    monkeypatch.setattr(wal, "sql", lambda _: ["0.5", "0", "7.0", "0/5000100", "0/5000100", segment])
    wal.tend()
    assert json.loads(noted.read_text()) == {"2": {"at": 7.0, "lsn": "0/5000100"}}


def test_a_log_that_takes_long_to_put_in_order_counts_as_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal, clock, segment = Wal({"address": "192.0.2.40"}, tmp_path), [0.0], "000000010000000000000005"
    for name in ("streaming", f"wals/{segment[:16]}"):
        (wal.home / name).mkdir(parents=True)
    (wal.home / "streaming" / segment).touch()

    def slowly(doing: str, *_: str) -> str:
        clock[0] += 600
        (wal.home / "streaming" / segment).rename(wal.home / "wals" / segment[:16] / segment)
        return ""

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(wal, "sql", lambda _: ["7.0", "0/5000100", segment])
    monkeypatch.setattr(wal, "barman", slowly)
    assert wal.mark()["lsn"] == "0/5000100"


@pytest.mark.parametrize(
    ("written", "inserted", "is_between"),
    [
        ("0/5000100", "0/5000100", True),
        ("0/5000000", "0/5000028", True),  # a segment has just been closed
        ("0/5002000", "0/5002018", True),
        ("0/5002000", "0/5002028", False),
        ("0/5000100", "0/5000128", False),
        ("0/5000128", "0/5000100", False),
    ],
)
def test_what_is_written_may_end_inside_a_record(written: str, inserted: str, is_between: bool) -> None:
    assert is_between_records(written, inserted) is is_between
