"""Proves a restore where it can hurt nobody: the real release of that time is started on it, beside a scratch database.

Nothing here listens beyond loopback, and the scratch database only on a socket that this user alone can reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils import backup_core as core
from ansible.module_utils import release
from ansible.module_utils.atlas_host import get, run
from ansible.module_utils.backup_core import BackupError

START_SECONDS = 120.0
RECOVERY_SECONDS = 6 * 3600.0
PASSED_ON = ("HOME", "PATH", "LANG", "CREDENTIALS_DIRECTORY")
TOO_SHORT = "recovery ended before configured recovery target was reached"
CLUSTER = """\
listen_addresses = ''
unix_socket_directories = '{directory}'
unix_socket_permissions = 0700
hba_file = '{directory}/pg_hba.conf'
hot_standby = off
jit = off
shared_buffers = 64MB
max_connections = 100
"""


class Proof:
    """Judges restores. *port* is the one on loopback on which the release's API answers meanwhile."""

    def __init__(self, directory: Path, port: int, signers: str) -> None:
        self.directory, self.port, self.signers = directory, port, signers

    def judge(
        self,
        scratch: Path,
        manifest: Mapping[str, Any],
        store: str,
        compare: bool,
        recovered: Callable[[float | None], object] = lambda last: None,
    ) -> dict[str, Any]:
        """Start the release on what lies in *scratch*; what it found. Raises BackupError naming every fault.

        compare: whether the rows must be those of the manifest. recovered: told when the last commit of a recovered database
        was (Unix time, None if there was none in its log), before anything else is done; raises if that will not do.
        """
        deployed = manifest["deployed"]
        program = self._release(scratch, deployed)
        if store == "sqlite":
            # What will be put in service stays as it came; the release opens a copy.
            shutil.copyfile(scratch / "source" / "atlas.db", scratch / "trial.db")
            return self._try(program, scratch, f"sqlite:///{scratch}/trial.db", None, manifest, compare)
        with self._cluster(scratch) as socket:
            recovered(_last_commit(socket))
            url = f"postgresql+psycopg://{_login(socket)}@/atlas?host={socket}"
            found = self._try(program, scratch, url, "atlas", manifest, compare)
        self._settle(scratch / "pgdata")
        return found

    def _release(self, scratch: Path, deployed: Mapping[str, Any]) -> Path:
        """The program of the release that the backup was made with, verified and unpacked."""
        name = str(deployed["release"])
        directory = self.directory / "releases" / name
        archive = scratch / "archives" / f"{name}.tar.gz"
        if not archive.exists():
            raise BackupError(f"the backup lacks the release {name} that its data needs")
        python = ".".join(platform.python_version_tuple()[:2])
        try:
            release.check_digest(archive, str(deployed["digest"]))
            release.check_signature(archive, archive.with_name(f"{archive.name}.sig"), self.signers)
            about = release.read_manifest(archive)
            release.check_python(about, python)
            if not release.is_intact(directory, about, python):
                directory.parent.mkdir(mode=0o700, exist_ok=True)
                release.unpack(archive, about, python, directory)
        except release.ReleaseError as error:
            raise BackupError(f"the release {name} in the backup cannot be used: {error}") from None
        for other in directory.parent.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
        return directory / "bin" / "atlas"

    def _try(
        self, program: Path, scratch: Path, url: str, role: str | None, manifest: Mapping[str, Any], compare: bool
    ) -> dict[str, Any]:
        settings = scratch / "settings.yaml"  # JSON is YAML
        settings.write_text(
            json.dumps({"environment": "staging", "host": "drill", "database_url": url, "database_role": role})
        )
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
            "ATLAS_SETTINGS": str(settings),
            "ATLAS_SLOT": "blue",
            "ATLAS_PORT": str(self.port),
        }
        argv = [sys.executable, "-IB", str(program)]
        done = subprocess.run(
            [*argv, "db", "verify", "--json"], capture_output=True, text=True, timeout=RECOVERY_SECONDS, env=environment
        )
        try:
            found = dict(json.loads(done.stdout))
        except ValueError:
            raise core.explain("the release cannot read the restored store", done.stderr) from None
        faults = list(found.pop("faults"))
        differing = core.row_faults(manifest, found["rows"]) if compare and not faults else []
        if not faults and not differing:
            faults += self._serve(argv, environment)
        if faults or differing:
            kind = BackupError if faults else core.RowsDiffer
            raise kind(f"the restored store is not fit to serve: {'; '.join(faults or differing)}")
        return {**found, "release": manifest["deployed"]["release"]}

    def _serve(self, argv: list[str], environment: Mapping[str, str]) -> list[str]:
        """Start the API and wait for its readiness; what is wrong, if anything."""
        log = Path(environment["ATLAS_SETTINGS"]).with_name("api.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*argv, "serve", "api"],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                ready = get(self.port, "/readyz")
                if ready.status == 200:
                    return []
                time.sleep(0.2)
            answer = get(self.port, "/readyz")
            wrong = {name: value for name, value in (answer.body.get("checks") or {}).items() if value != "ok"}
            last = (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
            return [f"its API does not become ready: {json.dumps(wrong) if wrong else last[:300]}"]
        finally:
            _end(process, signal.SIGTERM)

    @contextlib.contextmanager
    def _cluster(self, scratch: Path) -> Iterator[Path]:
        """The scratch database, recovered; its socket directory."""
        data, directory = scratch / "pgdata", scratch / "run"
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / "pg_hba.conf").write_text("local all all trust\n")
        (directory / "postgresql.conf").write_text(CLUSTER.format(directory=directory))
        version = (data / "PG_VERSION").read_text().strip()
        program = f"/usr/lib/postgresql/{version}/bin/postgres"
        if not Path(program).exists():
            raise BackupError(
                f"this host has no PostgreSQL {version}: the backup host needs the Debian of the database host"
            )
        data.chmod(0o700)
        log = directory / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [program, "-D", str(data), "-c", f"config_file={directory}/postgresql.conf"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + RECOVERY_SECONDS
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    fatal = [
                        line
                        for line in log.read_text(errors="replace").splitlines()
                        if "FATAL" in line or "PANIC" in line
                    ]
                    error = core.explain("recovering the database", "\n".join(fatal) or log.read_text(errors="replace"))
                    raise core.EndsBefore(str(error)) if any(TOO_SHORT in line for line in fatal) else error
                asked = _ask(directory, "SELECT pg_is_in_recovery()")
                if asked.status == 0 and asked.output.strip() == "f":
                    break
                time.sleep(0.2)
            yield directory
        finally:
            _end(process, signal.SIGINT)

    @staticmethod
    def _settle(data: Path) -> None:
        """Remove what recovery left in a cluster that is to go into service: it was shut down cleanly."""
        settings = data / "postgresql.auto.conf"
        lines = settings.read_text().splitlines() if settings.exists() else []
        left = [line for line in lines if not line.lstrip().startswith(("restore_command", "recovery_", "#"))]
        settings.write_text("".join(f"{line}\n" for line in left))
        shutil.rmtree(data / "barman_wal", ignore_errors=True)
        for pattern in ("*.origin", ".barman*", "backup_label.old", "postmaster.opts", "recovery.done"):
            for path in data.glob(pattern):
                path.unlink()

    @staticmethod
    def stop_leftovers(scratch: Path) -> None:
        """End a scratch database that a killed run left."""
        pid_file = scratch / "pgdata" / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, IndexError):
            number = int(pid_file.read_text().splitlines()[0])
            if str(scratch) in Path(f"/proc/{number}/cmdline").read_text():
                os.kill(number, signal.SIGQUIT)
                for _ in range(100):
                    if not Path(f"/proc/{number}").exists():
                        break
                    time.sleep(0.1)


def _ask(socket: Path, statement: str) -> Any:
    """Run *statement* as the superuser of the scratch database; its status, output and errors."""
    return run(["psql", "-XAtq", "-h", str(socket), "-U", "postgres", "-d", "postgres", "-c", statement], timeout=30)


def _last_commit(socket: Path) -> float | None:
    """Return when the last transaction was committed that recovery replayed."""
    asked = _ask(socket, "SELECT extract(epoch FROM pg_last_xact_replay_timestamp())")
    return float(asked.output) if asked.output.strip() else None


def _login(socket: Path) -> str:
    """Return the role with which the service logged in then: of its two, one has a login, except while a rotation goes on."""
    asked = _ask(
        socket,
        "SELECT member.rolname FROM pg_auth_members JOIN pg_roles AS member ON member.oid = pg_auth_members.member "
        "JOIN pg_roles AS owner ON owner.oid = roleid WHERE owner.rolname = 'atlas' AND member.rolcanlogin ORDER BY 1 LIMIT 1",
    )
    if not asked.output.strip():
        raise BackupError(
            f"the restored database has no login of the service: {asked.errors.strip() or 'none is a member of atlas'}"
        )
    return str(asked.output.strip())


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
