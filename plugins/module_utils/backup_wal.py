"""PostgreSQL's part of backups: Barman pulls base backups and the write-ahead log over a replication connection.

The database host holds nothing of the repository. A restore point is a record in the log with a name; it counts once the
segment that holds it has arrived and is closed.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils import backup_core as core
from ansible.module_utils.atlas_host import HostError, read_json, run, write_atomically
from ansible.module_utils.backup_core import BackupError

BARMAN_CONFIG = "/etc/atlas/barman.conf"
SERVER = "atlas"
ARRIVAL_SECONDS = 60.0
TOOL_SECONDS = 6 * 3600
LAG_SECONDS = 60.0
RECEIVER_SECONDS = 20.0
"""A rotation restarts the receiver: it may be away for so long before that is a failure."""
RECEIVER = (
    "SELECT extract(epoch FROM clock_timestamp() - reply_time), pg_wal_lsn_diff(written, write_lsn),"
    " extract(epoch FROM clock_timestamp()), written, inserted, pg_walfile_name(inserted)"
    " FROM pg_stat_replication, pg_current_wal_lsn() AS written, pg_current_wal_insert_lsn() AS inserted"
    " WHERE application_name = 'barman_receive_wal'"
)
CONTACT_SECONDS = 10.0
"""A restore to a time asks the database, if it is still there, for the last of its log, and waits so long for it."""
CLOCK_SECONDS = 1.0
"""Longer than a commit takes from looking at the clock to its place in the log."""
PIECE_BYTES = 1 << 20
PAGE_BYTES = 8192
SEGMENT_BYTES = 16 << 20
REBUILD = f"On the backup host, as its user: barman -c {BARMAN_CONFIG} rebuild-xlogdb {SERVER}"
_SEGMENT = re.compile(r"[0-9A-F]{24}(\.partial)?")
_LOG = re.compile(rf"{_SEGMENT.pattern}|[0-9A-F]{{8}}\.history")


class Wal:
    """The database of the environment, and its backups under ``DIRECTORY/barman``. *database*: address, port, version."""

    def __init__(self, database: Mapping[str, Any], directory: Path) -> None:
        self.database, self.home = database, directory / "barman" / SERVER

    def _environment(self) -> dict[str, str]:
        # A service file, because libpq refuses a password file that systemd made readable by an access list.
        return {"PGSERVICEFILE": str(Path(os.environ.get("CREDENTIALS_DIRECTORY", "/"), "atlas_pg_service"))}

    def barman(self, doing: str, *arguments: str) -> str:
        """Output of barman; BackupError with the cause if it fails."""
        done = run(["barman", "-c", BARMAN_CONFIG, *arguments], timeout=TOOL_SECONDS, env=self._environment())
        if done.status:
            raise core.explain(doing, "\n".join(_telling(f"{done.output}\n{done.errors}")))
        return done.output

    def sql(self, statement: str) -> list[str]:
        """The fields of the first row of *statement*, asked of the database itself; [] without a row."""
        argv = [
            "psql",
            "service=atlas dbname=postgres connect_timeout=5",
            "-XAtq",
            "-F",
            "\t",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            statement,
        ]
        done = run(argv, timeout=60, env=self._environment())
        if done.status:
            raise core.explain("asking the database", done.errors)
        return done.output.splitlines()[0].split("\t") if done.output.strip() else []

    def bases(self) -> dict[str, float]:
        """Base backups that are whole, with the log that each needs: id -> when each ended."""
        listed = self._listed()
        waiting = [item["backup_id"] for item in listed if item.get("status") == "WAITING_FOR_WALS"]
        for name in waiting:
            # Barman notices that the log of a base backup has arrived only when it is told to look.
            self.barman(f"checking base backup {name}", "check-backup", SERVER, name)
        return {
            item["backup_id"]: float(item["end_time_timestamp"])
            for item in (self._listed() if waiting else listed)
            if item.get("status") == "DONE" and item.get("end_time_timestamp")
        }

    def broken(self) -> list[str]:
        """Base backups that failed or were killed: each may be as large as a whole one. Only while none is being made."""
        return [
            str(item["backup_id"]) for item in self._listed() if item.get("status") in ("EMPTY", "STARTED", "FAILED")
        ]

    def _listed(self) -> list[dict[str, Any]]:
        answer = json.loads(self.barman("listing base backups", "-f", "json", "list-backup", SERVER) or "{}")
        return list(answer.get(SERVER) or [])

    def base_backup(self, at_once: bool) -> None:
        """Make a base backup, which needs a log that flows: so see to that first.

        at_once: with a checkpoint now, which costs the database some writing, and not spread over minutes.
        """
        self.mark()
        self.barman(
            "making a base backup",
            "backup",
            "--immediate-checkpoint" if at_once else "--no-immediate-checkpoint",
            SERVER,
        )

    def delete(self, name: str) -> None:
        """Remove a base backup and the log that no other one needs."""
        self.barman("retention", "delete", SERVER, name)

    def forget(self, before: float) -> None:
        """Remove what was left of the past and ended *before* that Unix time, from when on no base backup needs it."""
        for path in (self.home / "past").iterdir() if (self.home / "past").is_dir() else ():
            if path.stat().st_mtime < before:
                path.unlink()

    def verify(self, name: str) -> None:
        """Compare every file of a base backup with the manifest that PostgreSQL made of it."""
        self.barman(f"verifying base backup {name}", "verify-backup", SERVER, name)

    def verify_log(self) -> int:
        """Read every file of the log; how many there are. A restore takes what Barman has listed: nothing else may be there, nor less.

        Log that never came, because the slot was lost, is no damage: the increment said so then, and a base backup follows it.
        """
        wals, listed = self.home / "wals", self._log_listed()
        there = {path.name: path for path in (*wals.glob("*/*"), *wals.glob("*")) if _LOG.fullmatch(path.name)}
        if odd := min(listed.keys() ^ there.keys(), default=None):
            raise _damaged(f"{odd} is missing" if odd in listed else f"{odd} is not in Barman's list. {REBUILD}")
        for name, path in sorted(there.items()):
            size, compression = listed[name]
            found = path.stat().st_size
            if found != size:
                raise _damaged(f"{name} has {found} bytes, and had {size}")
            if compression != "None":
                _unpack(path)
        return len(there)

    def _log_listed(self) -> dict[str, tuple[int, str]]:
        """Barman's list of the log, whose name differs between Debian 12 and 13: name -> size in bytes and compression."""
        try:
            lines = [
                line.split() for path in (self.home / "wals").glob("*xlog.db") for line in path.read_text().splitlines()
            ]
            return {name: (int(size), compression) for name, size, _, compression in lines}
        except ValueError as error:
            raise _damaged(f"Barman's list: {error}. {REBUILD}") from None

    def expect_same(self) -> None:
        """Refuse a database that is not the one whose log is kept here: its log would be written over the last of that.

        A restored database is the same one (PostgreSQL's system identifier); one that was made anew is not.
        """
        kept = str(read_json(self.home / "identity.json").get("systemid") or "")
        found = self.sql("SELECT system_identifier FROM pg_control_system()")[0] if kept else ""
        if found != kept:
            raise BackupError(
                f"the database at {self.database['address']} is not the one that is backed up here, but one made anew: "
                "nothing of it is kept. Restore into it: playbooks/recover.yml. If the old one is to be forgotten: "
                f"move {self.home} away"
            )

    def receive(self) -> None:
        """Become the program that receives the log, until that ends."""
        self.expect_same()
        argv = ["barman", "-c", BARMAN_CONFIG, "receive-wal", SERVER]
        os.execvpe(argv[0], argv, {**os.environ, **self._environment()})  # noqa: S606

    def mark(self, patience: float = ARRIVAL_SECONDS) -> dict[str, Any]:
        """Write a restore point and wait until it is safe in the repository: name, when it was and when it had arrived.

        patience: seconds until its arrival.
        """
        self.expect_same()
        name = time.strftime("atlas-%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() // 1_000_000 % 1000:03d}"
        statement = "SELECT extract(epoch FROM clock_timestamp()), lsn, pg_walfile_name(lsn)"
        at, lsn, segment = self.sql(f"{statement} FROM pg_create_restore_point('{name}') AS lsn")
        self.sql("SELECT pg_switch_wal()")
        # Barman leaves the newest segment alone until the next one has begun: in a quiet database with this.
        self.sql("SELECT pg_current_xact_id()")
        deadline = time.monotonic() + patience
        while not self._has(segment):
            if time.monotonic() > deadline:
                raise BackupError(
                    f"the log of the database does not arrive: segment {segment} is missing after {patience:.0f} s. "
                    "See: systemctl status atlas-backup-log"
                )
            time.sleep(0.1)
        arrived = time.time()
        kept = self.home / "wals" / segment[:16] / segment
        while not kept.exists():
            self.barman("putting the log in order", "archive-wal", SERVER)
            # To put much in order may take longer than that.
            if time.monotonic() > deadline and not kept.exists():
                raise BackupError(f"Barman does not archive segment {segment}. See: barman check {SERVER}")
            time.sleep(0.2)
        timeline = int(segment[:8], 16)
        self._note_received(timeline, float(at), lsn)
        return {
            "restore_point": name, "timeline": timeline, "lsn": lsn, "marked_at": float(at), "arrived_at": arrived
        }  # fmt: skip

    def _has(self, segment: str) -> bool:
        return (self.home / "streaming" / segment).exists() or (self.home / "wals" / segment[:16] / segment).exists()

    def tend(self) -> dict[str, Any]:
        """Put what has arrived in order, and tell how far behind the repository is."""
        try:
            self.expect_same()
            deadline = time.monotonic() + RECEIVER_SECONDS
            while not (row := self.sql(RECEIVER)) and time.monotonic() < deadline:
                time.sleep(1)
        except BackupError as error:
            raise BackupError(f"the log of the database is not received: {error}") from None
        if not row:
            raise BackupError("the log of the database is not received. See: systemctl status atlas-backup-log")
        self.barman("putting the log in order", "archive-wal", SERVER)
        age, behind = float(row[0] or 0), int(float(row[1] or 0))
        if behind > 0 and age > LAG_SECONDS:
            raise BackupError(f"the log of the database is {behind} bytes and {age:.0f} s behind")
        at, written, inserted, segment = row[2:]
        if behind <= 0 and is_between_records(written, inserted):
            self._note_received(int(segment[:8], 16), float(at), written)
        return {"rpo_seconds": round(age, 2), "behind_bytes": behind}

    def _note_received(self, timeline: int, at: float, lsn: str) -> None:
        """Remember that all that the database had acknowledged at the Unix time *at* of its own clock is here, up to *lsn*."""
        noted = read_json(self.home / "received.json")
        text = json.dumps({**noted, str(timeline): {"at": at, "lsn": lsn}}, sort_keys=True)
        write_atomically(self.home / "received.json", text + "\n", 0o600)

    def catch_up(self) -> None:
        """Have the last of the log here, if the database can still be asked for it."""
        try:
            self.mark(CONTACT_SECONDS)
        except (BackupError, HostError) as error:
            print(f"The log is taken as it is: {error}", file=sys.stderr)

    def expect_whole(self, data: Path, at: float | None, last: float | None) -> None:
        """Refuse a cluster in *data*, recovered with all of the log, if the log should go further: to the Unix time *at*, say.

        last: when the last commit in it was. Nothing is missing only if later than *at* all that the database had acknowledged
        was seen to be here, and is in it. For PostgreSQL a log with a hole ends there, as if nothing had followed.
        """
        timeline, end = _ended(data)
        until = f"the log can be read to {core.rfc3339(last)}" if last else "the log holds no commit that can be read"
        noted = read_json(self.home / "received.json").get(str(timeline)) or {}
        beyond = _beyond(data / "barman_wal", timeline, end)
        if beyond or _position(noted.get("lsn", "0/0")) > end:
            what = (
                f"{beyond} is there, and what leads to it is not" if beyond else f"it had arrived up to {noted['lsn']}"
            )
            raise _damaged(f"{until}, although {what}. {_instead(last, newest=False)}")
        if at is not None and noted.get("at", 0.0) < at + CLOCK_SECONDS:
            raise BackupError(
                f"{until}, and nothing shows that it was complete at {core.rfc3339(at)}. {_instead(last, newest=True)}"
            )

    def recover(self, base: str, target: Path, to: Mapping[str, Any]) -> None:
        """Lay out the cluster of a base backup in *target*, to be brought to a restore point, a time, or the end.

        *to*: the ``name`` of a restore point or a ``time`` (Unix), each with its ``timeline``, or nothing. Each restore
        begins another timeline, and Barman takes the log of the base backup's own alone unless it is told.
        """
        self.barman("putting the log in order", "archive-wal", SERVER)
        options = ["--target-tli", str(to.get("timeline", "latest"))]
        if "name" in to:
            options += ["--target-action", "promote", "--target-name", str(to["name"])]
        self.barman("restoring", "recover", *options, SERVER, base, str(target))
        log = target / "barman_wal"
        log.mkdir(exist_ok=True)
        for path in [*self._waiting("past"), *self._waiting("streaming")]:
            # What Barman has not put in order: the segment that is being received and perhaps the one before, or those that were when a
            # restore ended their past. PostgreSQL stops reading where they end.
            whole = log / path.name.removesuffix(".partial")
            if not whole.exists() and path.stat().st_size:
                shutil.copyfile(path, whole)
        if "name" not in to:
            _say_how_far(target, to)

    def _waiting(self, directory: str) -> list[Path]:
        """Return the segments in *directory* of the repository, whole ones first."""
        found = [path for path in (self.home / directory).glob("*") if _SEGMENT.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.suffix)

    def restart(self) -> None:
        """Take up the log of a database that was restored. What there is still belongs to another past, and is kept with it.

        The receiver goes on behind the last segment that it finds, and a restored database may not have come so far.
        """
        self.barman("putting the log in order", "archive-wal", SERVER)
        past = self.home / "past"
        past.mkdir(mode=0o700, exist_ok=True)
        for path in self._waiting("streaming"):
            path.replace(past / path.name)
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while True:
            try:
                self.barman("taking up the log", "receive-wal", "--reset", SERVER)
                return
            except (BackupError, HostError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)


def to_the_end(data: Path) -> None:
    """Have a cluster that did not find its time in the log recovered with all of it; it goes on from where it is."""
    settings = data / "postgresql.auto.conf"
    lines = settings.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("recovery_target_time ", "recovery_target_action"))]
    settings.write_text("".join(kept))


def _ended(data: Path) -> tuple[int, int]:
    """Return the timeline that a recovered cluster left, and the position in bytes behind the last record of it."""
    newest = max((data / "pg_wal").glob("*.history"), key=lambda path: path.name)
    timeline, position, *_ = newest.read_text().splitlines()[-1].split()
    return int(timeline), _position(position)


def is_between_records(written: str, inserted: str) -> bool:
    """Tell whether what was *written* ends with a whole record: the next one begins there, or behind the header of a page."""
    header = _position(inserted) - _position(written)
    return header in (0, 24) or (header == 40 and _position(written) % SEGMENT_BYTES == 0)


def _position(lsn: str) -> int:
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def _beyond(log: Path, timeline: int, end: int) -> str | None:
    """Return the first segment of *timeline* in the directory *log* that begins after *end* and holds something."""
    for path in sorted(log.glob(f"{timeline:08X}" + "?" * 16)):
        start = (int(path.name[8:16], 16) << 32) + int(path.name[16:], 16) * path.stat().st_size
        with path.open("rb") as file:
            # The receiver fills a file with zeros before the first byte comes.
            if start > end and any(file.read(PAGE_BYTES)):
                return path.name
    return None


def _instead(last: float | None, newest: bool) -> str:
    """Say what can be asked for instead."""
    ways = [f"to then or earlier (-e backup_restore_time={core.rfc3339(last)})"] if last else []
    ways += ["to the newest state (without a time)"] if newest else []
    ways += ["to an earlier label or time"] if not last else []
    return f"Restore {', or '.join(ways)}."


def _damaged(what: str) -> BackupError:
    return BackupError(f"reading the log: damaged repository ({what})")


def _unpack(path: Path) -> None:
    """Unpack *path*, which is compressed and has a checksum; BackupError if that is not what was packed."""
    try:
        with gzip.open(path) as file:
            while file.read(PIECE_BYTES):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(f"{path.name}: {error}") from None


def _say_how_far(target: Path, to: Mapping[str, Any]) -> None:
    """Have *target* recovered with all of the log, or to a time of it.

    Without a target Barman leaves recovery to PostgreSQL's crash recovery. With a time the Barman of Debian 12 leaves out the log behind
    the segment that was written then, and PostgreSQL knows that it has reached a time only by a later commit.
    """
    settings = target / "postgresql.auto.conf"
    text = settings.read_text() if settings.exists() else ""
    if "restore_command" not in text:
        text += "restore_command = 'cp barman_wal/%f %p'\n"
    if "time" in to:
        at = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime(float(to["time"])))
        text += f"recovery_target_time = '{at}'\nrecovery_target_action = 'promote'\n"
        text += f"recovery_target_timeline = '{to.get('timeline', 'latest')}'\n"
    settings.write_text(text)
    (target / "recovery.signal").touch()


def _telling(output: str) -> list[str]:
    """The lines that say what is wrong: Barman also prints progress."""
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"ERROR|FAILED|FATAL|EXCEPTION|password|refused|space left", line)]
    return telling or lines
