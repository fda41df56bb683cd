"""The backup host: it fetches copies, keeps them, checks them, proves them by restoring, and hands them out.

Every other host is asked over one SSH key that allows nothing but the agent's commands; none of them holds a credential of
the repository. Files and SQLite copies are in restic, PostgreSQL and its log in Barman; a restic snapshot is the one
catalogue: its manifest says what belongs to it. All jobs run as one user. One at a time works on the repository; those that
take long let others have their turn in between.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ansible.module_utils import backup_core as core
from ansible.module_utils import release
from ansible.module_utils.atlas_host import HostError, read_json, run, write_atomically
from ansible.module_utils.backup_core import BackupError, Point
from ansible.module_utils.backup_proof import Proof
from ansible.module_utils.backup_tar import receive, send, tree
from ansible.module_utils.backup_wal import Wal, to_the_end

CONFIG = Path("/etc/atlas/backup.json")
SIGNERS = Path("/etc/atlas/allowed_signers")
TOOL_SECONDS = 6 * 3600
LOCK_SECONDS = 1800
POLL_SECONDS = 0.2
TURN_SECONDS = 1.0
"""Who waits for the repository gets it in this time."""
PART_BYTES = 4 << 30
"""As much of the repository is read in one turn."""
PARTS_MAX = 256
"""restic's own limit."""
MARKS = 3
"""Attempts at a restore point, and at a drill, while housekeeping removes rows."""
CURRENT, NEXT, PREVIOUS = "restic_password", "restic_password_next", "restic_password_previous"
"""Credentials; the other two are there while the password is rotated."""
JOBS = {"increment": "increment", "daily": "backup", "check": "check", "drill": "drill"}
"""Job -> the name under which it reports."""


class Backups:
    """The repository in the directory that the configuration names, and the sources that it fetches from."""

    def __init__(self, config: Mapping[str, Any], signers: str = "") -> None:
        self.config = config
        self.directory = Path(config["directory"])
        self.store: str = config["store"]
        self.sources: dict[str, str] = config["sources"]
        self.limits: dict[str, float] = config["limits"]
        self.signers = signers
        self.wal = Wal(config["database"], self.directory) if self.store == "postgresql" else None
        self.proof = Proof(self.directory, config["api_port"], signers)
        self._locked: TextIO | None = None

    # Tools

    def restic(self, doing: str, *arguments: str, password: str = CURRENT) -> str:
        """Output of restic; BackupError with the cause if it fails. *password*: name of the credential to open with."""
        environment = {
            "RESTIC_REPOSITORY": str(self.directory / "restic"),
            "RESTIC_PASSWORD_FILE": str(_credential(password)),
            "GOMAXPROCS": "1",
        }
        done = run(["restic", "--no-cache", *arguments], timeout=TOOL_SECONDS, env=environment)
        if done.status:
            raise core.explain(doing, f"{done.output}\n{done.errors}")
        return done.output

    def _ssh(self, host: str, command: str) -> list[str]:
        address = {**self.sources, **self.config.get("targets", {})}[host]
        options = {
            "IdentityFile": str(self.directory / ".ssh" / "id_ed25519"),
            "UserKnownHostsFile": str(self.directory / ".ssh" / "known_hosts"),
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "15",
            "LogLevel": "ERROR",
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return [
            "ssh",
            "-F",
            "none",
            *flags,
            "-p",
            str(self.config["ssh_port"]),
            f"{self.config['user']}@{address}",
            command,
        ]

    def ask(self, host: str, command: str, text: str = "", timeout: float = 300) -> str:
        """Answer of the agent on *host* to *command*, given *text*."""
        done = run(self._ssh(host, command), stdin=text.encode(), timeout=timeout)
        if done.status:
            raise core.explain(f"{host}, {command.split()[0]}", done.errors)
        return done.output

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One job at a time. A lock that a killed restic left is removed: nobody else works on the repository."""
        with (self.directory / "lock").open("a") as file:
            _wait_for(file)
            self._locked = file
            try:
                if (self.directory / "restic" / "config").exists() and any(
                    (self.directory / "restic" / "locks").iterdir()
                ):
                    self.restic("looking for stale locks", "unlock")
                yield
            finally:
                self._locked = None

    @contextlib.contextmanager
    def unlocked(self) -> Iterator[None]:
        """Let other jobs work on the repository meanwhile; what is done here does not."""
        file = self._locked
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
        try:
            yield
        finally:
            if file is not None:
                _wait_for(file)

    def turn(self) -> None:
        """Let those have the repository who wait for it."""
        with self.unlocked():
            time.sleep(TURN_SECONDS if self._locked else 0)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """One restore at a time is laid out and judged: they share a port and the unpacked release. To be had before the lock."""
        with (self.directory / "trial.lock").open("a") as file:
            _wait_for(file)
            yield

    # Keeping

    def init(self) -> bool:
        """Make the repository, in an empty directory alone: where there was one, its loss has to be noticed."""
        repository = self.directory / "restic"
        if (repository / "config").exists():
            return False
        if repository.exists() and any(repository.iterdir()):
            raise BackupError(
                f"missing repository: {repository} holds files but no config. Restore that file; nothing was changed."
            )
        self.restic("making the repository", "init")
        return True

    def keys(self) -> dict[str, Any]:
        """Bring the repository's passwords to the credentials: one that is next opens it too, one that was previous no longer.

        Keys of other people stay. The previous password is tried afterwards. Returns what was *added* and *removed*.
        """
        added, removed = False, False
        if _credential(NEXT).exists() and not self._opens(NEXT):
            self.restic("adding a password", "key", "add", "--new-password-file", str(_credential(NEXT)))
            added = True
        if _credential(PREVIOUS).exists() and self._opens(PREVIOUS):
            found = json.loads(self.restic("listing keys", "key", "list", "--json", password=PREVIOUS))
            own = [str(key["id"]) for key in found if key["current"]]
            self.restic("removing a password", "key", "remove", *own)
            removed = True
        if _credential(PREVIOUS).exists() and self._opens(PREVIOUS):
            raise BackupError("the previous password of the repository still opens it. See: restic key list")
        return {"added": added, "removed": removed}

    def _opens(self, password: str) -> bool:
        try:
            self.restic("opening the repository", "cat", "config", password=password)
        except BackupError as error:
            if "wrong password" in str(error):
                return False
            raise
        return True

    def room(self) -> int:
        """Bytes that may come in; BackupError if there are none."""
        free = shutil.disk_usage(self.directory).free - (int(self.config["reserve_mb"]) << 20)
        if free <= 0:
            raise BackupError(f"full disk: less than {self.config['reserve_mb']} MB are free at {self.directory}")
        return free

    def fetch(self, source: str) -> dict[str, Any]:
        """Bring a source's copy to ``staging/SOURCE``; its manifest, or {} before the first deployment."""
        final = self.directory / "staging" / source
        partial = final.with_name(f".{source}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True)
        archives = self.directory / "archives"
        archives.mkdir(mode=0o700, exist_ok=True)
        have = ",".join(sorted(path.name for path in archives.glob("*.tar.gz")))
        self._stream(source, f"export {self.store} have={have}", partial)
        manifest = read_json(partial / "manifest.json")
        if not manifest.get("deployed"):
            shutil.rmtree(partial)
            return {}
        if self.store == "sqlite" and (partial / "atlas.db").stat().st_size != manifest.get("bytes"):
            raise BackupError(f"{source}: the copy of the store is not of the size that its manifest says")
        self._keep_archives(partial, archives)
        old = final.with_name(f".{source}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        return manifest

    def _stream(self, source: str, command: str, target: Path) -> None:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self._ssh(source, command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
            assert process.stdout is not None  # noqa: S101 - tells the type checker
            fault: BackupError | None = None
            try:
                receive(process.stdout, target, self.room())
            except BackupError as error:
                fault = error
                process.kill()
            process.stdout.close()
            status = process.wait(60)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
        if said and (status or fault):
            raise core.explain(f"{source}, export", said)
        if fault:
            raise BackupError(f"{source}, export: {fault}")
        if status:
            raise BackupError(f"{source}, export: ended with status {status}")

    def _keep_archives(self, partial: Path, archives: Path) -> None:
        """Move new archives in, each only with a signature that is allowed here: the drill will execute them."""
        for path in sorted((partial / "archives").glob("*.tar.gz")):
            signature = path.with_name(f"{path.name}.sig")
            try:
                release.check_signature(path, signature, self.signers)
            except release.ReleaseError as error:
                raise BackupError(f"the archive {path.name} is not kept: {error}") from None
            # What is kept is never replaced, whoever asks.
            if not (archives / path.name).exists():
                signature.rename(archives / signature.name)
                path.rename(archives / path.name)
        shutil.rmtree(partial / "archives", ignore_errors=True)

    def take(self, kind: str, label: str | None = None, base: bool = False) -> dict[str, Any]:
        """Make a backup of all sources; {} if nothing is deployed yet. *base*: with a new base backup of PostgreSQL."""
        if label is not None and any(point.label == core.check_label(label) for point in self.points()):
            raise BackupError(f"There is a backup with the label {label} already. Choose another one.")
        self.room()
        extra: dict[str, Any] = {}
        if self.wal is not None:
            first = next(iter(self.sources))
            after = json.loads(self.ask(first, "contents"))
            if not after:
                return {}
            if base or not self.wal.bases():
                self.wal.base_backup(at_once=kind != "daily" or not self.wal.bases())
                after = json.loads(self.ask(first, "contents"))
            # Between two counts a number of rows can be only where both are, unless housekeeping removed some meanwhile.
            for _ in range(MARKS):
                before = after
                extra = self.wal.mark()
                after = json.loads(self.ask(first, "contents"))
                if all(after["rows"].get(table, 0) >= count for table, count in before["rows"].items()):
                    break
            extra |= {"schema": after["schema"], "rows": core.bounds(before["rows"], after["rows"])}
            core.check_filled(first, extra)
        taken: dict[str, Any] = {}
        for source in self.sources:
            manifest = self.fetch(source)
            if not manifest:
                continue
            taken[source] = core.check_filled(source, manifest | extra)
            path = self.directory / "staging" / source / "manifest.json"
            path.write_text(json.dumps(taken[source], indent=2, sort_keys=True) + "\n")
            tags = ["--tag", f"kind={kind}", *(["--tag", f"label={label}"] if label else [])]
            # What a rebuilt environment needs beside it: signed releases, and the keyring in escrow (the vault file).
            beside = [self.directory / name for name in ("archives", "escrow") if (self.directory / name).exists()]
            self.restic(f"storing {source}", "backup", "--host", source, *tags, str(path.parent), *map(str, beside))
        return taken

    def points(self) -> list[Point]:
        """What can be restored, oldest first."""
        return core.points(json.loads(self.restic("listing backups", "snapshots", "--json") or "[]"))

    def prune(self, now: float) -> None:
        """Let go of what retention no longer keeps; refused while anything is dated in the future."""
        keep = self.config["keep"]
        times = {point.snapshot[:8]: point.at for point in self.points()}
        times |= self.wal.bases() if self.wal else {}
        if ahead := core.from_the_future(times, now):
            raise BackupError(
                f"dated in the future: {', '.join(ahead)}. Nothing is removed until the clock or those are mended."
            )
        policies = {
            "increment": ["--keep-within", f"{keep['increment_hours']}h"],
            "daily": ["--keep-daily", str(keep["daily"]), "--keep-weekly", str(keep["weekly"])],
            "labelled": ["--keep-within", f"{keep['labelled_days']}d"],
        }
        for kind, policy in policies.items():
            self.restic("retention", "forget", "--quiet", "--group-by", "host", "--tag", f"kind={kind}", *policy)
        self.restic("retention", "prune", "--quiet")
        if self.wal is not None:
            needed = [point.at for point in self.points()]
            for name in [*self.wal.broken(), *core.expired(self.wal.bases(), keep["daily"], keep["weekly"], needed)]:
                self.wal.delete(name)
            self.wal.forget(min(self.wal.bases().values(), default=0.0))
        self._prune_archives(now - keep["labelled_days"] * core.DAY)
        # What a restore that was killed had taken out: a copy of everything, of whatever age.
        for path in (self.directory / "scratch").glob("*"):
            if path.stat().st_mtime < now - core.DAY:
                self.discard(path.name)

    def _prune_archives(self, before: float) -> None:
        manifests = (read_json(path) for path in (self.directory / "staging").glob("*/manifest.json"))
        used = {name for manifest in manifests for name in manifest.get("archives", [])}
        for path in (self.directory / "archives").glob("*.tar.gz"):
            if path.name not in used and path.stat().st_ctime < before:
                path.with_name(f"{path.name}.sig").unlink(missing_ok=True)
                path.unlink()

    # Jobs

    def increment(self) -> dict[str, Any]:
        """SQLite: a copy now. PostgreSQL: see that its log arrives, put it in order, and keep what a deploy has brought."""
        if self.wal is None:
            taken = self.take("increment")
            return {"rows": _rows(taken)} if taken else {}
        found = self.wal.tend()
        # The log brings the data of the newest release at once; without that release nobody could read them.
        source = next(iter(self.sources))
        kept = read_json(self.directory / "staging" / source / "manifest.json").get("deployed", {})
        deployed = json.loads(self.ask(source, "deployed"))
        if deployed and deployed.get("deployment") != kept.get("deployment"):
            self.take("increment")
        return found

    def daily(self) -> dict[str, Any]:
        """A whole backup, then retention, then a check of the repository's structure."""
        taken = self.take("daily", base=True)
        if not taken:
            return {}
        self.turn()
        self.prune(time.time())
        self.turn()
        self.restic("checking the repository", "check", "--quiet")
        return {"rows": _rows(taken)}

    def check(self) -> dict[str, Any]:
        """Read every byte of the repository, part by part: copies go on in between."""
        if not self.points():
            return {}
        # Structure first: restic asks for a file that is gone for a minute before it gives up.
        self.restic("checking the repository", "check", "--quiet")
        for part in self._parts():
            self.turn()
            self.restic("reading the repository", "check", part, "--quiet")
        if self.wal is not None:
            for name in self.wal.bases():
                self.turn()
                # Retention may have let go of it meanwhile.
                if name in self.wal.bases():
                    self.wal.verify(name)
            self.turn()
            self.wal.verify_log()
        return {"backups": len(self.points())}

    def _parts(self) -> list[str]:
        """The options of restic by which its checks read all of the repository, one after the other."""
        size = sum(path.stat().st_size for path in (self.directory / "restic" / "data").glob("*/*"))
        count = min(PARTS_MAX, size // PART_BYTES + 1)
        return (
            [f"--read-data-subset={number}/{count}" for number in range(1, count + 1)] if count > 1 else ["--read-data"]
        )

    def drill(self) -> dict[str, Any]:
        """Restore the newest backup to a scratch place and start its release on it; figures of RPO and RTO."""
        if not self.points():
            return {}
        for attempt in range(1, MARKS + 1):
            rpo = None
            if self.wal is not None:
                taken = self.take("increment")
                rpo = next((one["arrived_at"] - one["marked_at"] for one in taken.values()), None)
            ticket = "drill"
            began = time.time()
            try:
                found = self.prepare(ticket, None, None)
                break
            except core.RowsDiffer:
                # A running database can be counted only around a moment, and what was removed just then does not count
                # twice. A copy is exact.
                if self.wal is None or attempt == MARKS:
                    raise
            finally:
                self.discard(ticket)
        rto = time.time() - began
        rpo = began - found["point_at"] if rpo is None else rpo
        figures = {key: found[key] for key in ("rows", "sensitive", "searched", "release", "restored_to")}
        return {"rpo_seconds": round(rpo, 2), "rto_seconds": round(rto, 2), **figures}

    # Restoring

    def prepare(self, ticket: str, label: str | None, at: float | None, newest: bool = False) -> dict[str, Any]:
        """Materialise a point in ``scratch/TICKET``, and let its own release judge it; BackupError if it may not live.

        *newest* takes all that has arrived (PostgreSQL: beyond the last point, to the end of the log).
        """
        if at is not None:
            core.check_past(at, time.time())
        point = self._point(label, at)
        scratch = self.directory / "scratch" / ticket
        self.discard(ticket)
        scratch.mkdir(mode=0o700, parents=True)
        self._lay_out(point, scratch)
        manifest = read_json(scratch / "source" / "manifest.json")
        if self.wal is not None:
            if at is not None:
                self.wal.catch_up()
            exact = label is not None or (at is None and not newest)
            target = {"name": manifest["restore_point"]} if exact else {"time": at} if at is not None else {}
            if target:
                # What was in service then; whatever was restored since goes on from somewhere else.
                target["timeline"] = manifest.get("timeline", "latest")
            base = core.choose_base(self.wal.bases(), manifest["marked_at"] if exact else at)
            self.wal.recover(base, scratch / "pgdata", target)
            restored_to = target.get("name") or (core.rfc3339(at) if at else "the end of the log")
        else:
            exact, restored_to = True, point.label or core.rfc3339(manifest["taken_at"])
        # What was laid out leans on nothing else; to judge it may take longer than a copy may wait.
        with self.unlocked():
            found = self._judge(scratch, manifest, exact, at)
        return {
            **found,
            "ticket": ticket,
            "restored_to": restored_to,
            "point_at": manifest.get("marked_at") or manifest["taken_at"],
            "label": point.label,
        }

    def _judge(self, scratch: Path, manifest: Mapping[str, Any], exact: bool, at: float | None) -> dict[str, Any]:
        """What its release finds of what is laid out. *exact*: as the manifest says; else at a time, or at the end of the log."""
        if exact or self.wal is None:
            return self.proof.judge(scratch, manifest, self.store, compare=exact)
        data = scratch / "pgdata"
        whole = functools.partial(self.wal.expect_whole, data, at)
        if at is None:
            return self.proof.judge(scratch, manifest, self.store, compare=False, recovered=whole)
        try:
            return self.proof.judge(scratch, manifest, self.store, compare=False)
        except core.EndsBefore:
            # PostgreSQL knows only by a later commit that a time is reached. Where nothing was written since there is none.
            to_the_end(data)
            return self.proof.judge(scratch, manifest, self.store, compare=False, recovered=whole)

    def _point(self, label: str | None, at: float | None) -> Point:
        """The point to restore: of the first source, unless the repository was filled by hosts of other names."""
        known = self.points()
        return core.choose([point for point in known if point.source == next(iter(self.sources))] or known, label, at)

    def _lay_out(self, point: Point, scratch: Path) -> None:
        """Take the files of *point* out of the repository: source, archives and escrow under *scratch*."""
        self.restic("restoring", "restore", point.snapshot, "--target", str(scratch / "files"))
        # restic keeps the path that a file had.
        top = scratch / "files" / self.directory.relative_to("/")
        for name, place in (("staging/" + point.source, "source"), ("archives", "archives"), ("escrow", "escrow")):
            if (top / name).exists():
                (top / name).rename(scratch / place)
        shutil.rmtree(scratch / "files")

    def deliver(self, ticket: str, host: str) -> int:
        """Send a prepared restore to *host*, whose door must be open."""
        scratch = self.directory / "scratch" / ticket
        files = (
            list(tree(scratch / "pgdata", "pgdata")) if self.wal else [("atlas.db", scratch / "source" / "atlas.db")]
        )
        journal = scratch / "source" / "journal.jsonl"
        if journal.exists():
            files.append(("journal.jsonl", journal))
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self._ssh(host, f"import {ticket}"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors
            )
            assert process.stdin is not None  # noqa: S101 - tells the type checker
            with contextlib.suppress(BrokenPipeError):
                send(process.stdin, files)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            status = process.wait(TOOL_SECONDS)
            errors.seek(0)
            if status:
                raise core.explain(f"delivering to {host}", errors.read().decode(errors="replace"))
        return len(files)

    def discard(self, ticket: str) -> None:
        """Remove what was prepared under *ticket*."""
        self.proof.stop_leftovers(self.directory / "scratch" / ticket)
        shutil.rmtree(self.directory / "scratch" / ticket, ignore_errors=True)

    def release(self, ticket: str) -> Path:
        """The archive, taken out of the repository, of the release that the newest backup was made with."""
        point = self._point(None, None)
        scratch = self.directory / "scratch" / ticket
        self.discard(ticket)
        scratch.mkdir(mode=0o700, parents=True)
        self._lay_out(point, scratch)
        deployed = read_json(scratch / "source" / "manifest.json")["deployed"]
        return scratch / "archives" / f"{deployed['release']}.tar.gz"

    # Reporting

    def note(self, job: str, outcome: Mapping[str, Any] | None, seconds: float) -> None:
        """Write the *outcome* of *job* to report and journal, and tell every source. A full disk keeps nobody from hearing."""
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            # One job after the other: of two reports that are changed at once, one would be lost.
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._note(job, outcome, seconds)
        finally:
            os.close(handle)

    def _note(self, job: str, outcome: Mapping[str, Any] | None, seconds: float) -> None:
        path = self.directory / "status.json"
        report = read_json(path) or core.new_report(self.limits, time.time())
        if outcome is not None and job in self.limits:
            shown = {key: value for key, value in outcome.items() if not isinstance(value, (dict, list))}
            report = core.noted(report, self.limits, job, {**shown, "seconds": round(seconds, 2)}, time.time())
        text = json.dumps(report, sort_keys=True) + "\n"
        with contextlib.suppress(OSError):
            write_atomically(path, text, 0o600)
        if outcome is not None and (job != "increment" or not outcome.get("ok")):
            self.journal(job, seconds=round(seconds, 2), **outcome)
        for source in self.sources:
            try:
                self.ask(source, "status", text, timeout=60)
            except (BackupError, HostError) as error:
                print(f"{source} was not told: {error}", file=sys.stderr)

    def journal(self, event: str, **details: Any) -> None:
        """Append to the repository's own journal."""
        line = json.dumps({"at": core.rfc3339(time.time()), "event": event, **details}, sort_keys=True) + "\n"
        with contextlib.suppress(OSError):
            handle = os.open(self.directory / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(handle, line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)

    def job(self, job: str, work: Any) -> dict[str, Any]:
        """Run *work* under the lock and report it as *job*; raises BackupError after the report."""
        began = time.monotonic()
        try:
            with self.trial() if job == "drill" else contextlib.nullcontext(), self.lock():
                result: dict[str, Any] = work()
        # Whatever it was, and be it that a source sent what nobody can read: a job that failed must not look as if it went well.
        except Exception as error:
            failure = error if isinstance(error, BackupError) else core.explain(job, _said(error))
            self.note(job, {"ok": False, "message": str(failure)}, time.monotonic() - began)
            raise failure from None
        self.note(job, {"ok": True, **result} if result else None, time.monotonic() - began)
        return result


def _wait_for(file: TextIO) -> None:
    """Lock *file*, once who has it lets go."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise BackupError(f"another backup job has been running for {LOCK_SECONDS} s") from None
            time.sleep(POLL_SECONDS)


def _said(error: Exception) -> str:
    """What *error* says; with its class where it was not foreseen, because a KeyError says a word alone."""
    foreseen = (BackupError, HostError, OSError, release.ReleaseError)
    return str(error) if isinstance(error, foreseen) else f"{type(error).__name__}: {error}"


def _credential(name: str) -> Path:
    return Path(os.environ.get("CREDENTIALS_DIRECTORY", "/"), f"atlas_{name}")


def _rows(taken: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return dict(next(iter(taken.values())).get("rows") or {}) if taken else {}


def main(arguments: Sequence[str]) -> int:
    """Run one command of ``atlas-backup``; JSON on standard output, one line on standard error if it fails."""
    parser = argparse.ArgumentParser(prog="atlas-backup", description="Backups of an Atlas environment.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in (
        ("init", "make the repository where there is none"),
        ("increment", "SQLite: a copy now; PostgreSQL: see that its log arrives"),
        ("daily", "a whole backup, retention, check"),
        ("check", "read every byte of the repository"),
        ("drill", "restore the newest backup to a scratch place and start its release on it"),
        ("points", "list what can be restored"),
        ("keys", "bring the repository's passwords to the credentials, in a rotation"),
        ("report", "what was done and when"),
        ("receive-log", "PostgreSQL: receive its log, for as long as it comes"),
        ("restart-log", "PostgreSQL: take up its log anew, after a restore"),
    ):
        verbs.add_parser(name, help=text)
    take = verbs.add_parser("take", help="a backup now")
    take.add_argument("--label")
    take.add_argument("--base", action="store_true")
    prepare = verbs.add_parser("prepare", help="materialise a point and verify it")
    prepare.add_argument("ticket")
    prepare.add_argument("--label")
    prepare.add_argument("--at")
    for name in ("deliver", "discard", "release"):
        verb = verbs.add_parser(name)
        verb.add_argument("ticket")
        if name == "deliver":
            verb.add_argument("host")
    options = parser.parse_args(arguments)
    backups = Backups(read_json(CONFIG), SIGNERS.read_text() if SIGNERS.exists() else "")
    try:
        print(json.dumps(_perform(backups, options), sort_keys=True, default=str))
    except Exception as error:
        print(f"atlas-backup: {_said(error)}", file=sys.stderr)
        return 1
    return 0


def _perform(backups: Backups, options: argparse.Namespace) -> Any:
    verb = options.verb
    if verb in JOBS:
        return backups.job(JOBS[verb], getattr(backups, verb))
    if verb == "take":
        kind = "labelled"
        if options.label:
            core.check_label(options.label)
        # A restore point alone is no backup: it leans on the last one.
        is_whole = options.base or backups.wal is None
        return backups.job(
            "backup" if is_whole else "labelled", lambda: backups.take(kind, options.label, options.base)
        )
    if verb == "points":
        return [{**point._asdict(), "time": core.rfc3339(point.at)} for point in backups.points()]
    if verb == "report":
        return read_json(backups.directory / "status.json")
    if verb == "receive-log" and backups.wal is not None:
        backups.wal.receive()
    if verb == "deliver":
        return {"files": backups.deliver(options.ticket, options.host)}
    if verb == "prepare":
        at = core.parse_time(options.at) if options.at else None
        with backups.trial(), backups.lock():
            return backups.prepare(options.ticket, options.label, at, newest=not options.label and at is None)
    with backups.lock():
        if verb == "init":
            return {"changed": backups.init()}
        if verb == "keys":
            return backups.keys()
        if verb == "release":
            return {"path": str(backups.release(options.ticket))}
        if verb == "discard":
            backups.discard(options.ticket)
        if verb == "restart-log" and backups.wal is not None:
            backups.wal.restart()
    return {}
