"""The host's side of backups: the only commands that the backup host may run there, over a key that allows nothing else.

It hands out copies, takes the report, and takes in a restore while the operator's playbook holds a door open. It can
neither be made to run another command nor to write anywhere else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import Host, HostError, read_json, write_atomically
from ansible.module_utils.backup_core import BackupError, parse_report
from ansible.module_utils.backup_tar import receive, send

STATE = Path("/var/lib/atlas")
STATUS = STATE / "backup-status.json"
DOOR = Path("/var/lib/atlas-restore/door.json")
REPORT_BYTES = 65_536
COMMAND_SECONDS = 3600
FREE_MB = 256


class Agent:
    """One host. The parameters are for tests."""

    def __init__(
        self, host: Host | None = None, state: Path = STATE, status: Path = STATUS, door: Path = DOOR, nice: bool = True
    ) -> None:
        self.host, self.state, self.status_file, self.door = host or Host(), state, status, door
        self.environment = {"ATLAS_COMMAND_NICE": "15"} if nice else {}

    def _atlas(self, *arguments: str) -> dict[str, Any]:
        """Run the atlas command of the deployment in service; its JSON answer."""
        done = self.host.run(
            ["/usr/local/bin/atlas", *arguments, "--json"], timeout=COMMAND_SECONDS, env=self.environment
        )
        if done.status:
            lines = (done.errors + "\n" + done.output).strip().splitlines() or [f"exit status {done.status}"]
            raise BackupError(f"atlas {' '.join(arguments[:2])}: {lines[-1]}")
        return dict(json.loads(done.output))

    def deployed(self) -> dict[str, Any]:
        """The deployment in service, or {}."""
        slot = self.host.in_service()
        number = self.host.slots()[slot] if slot else None
        if number is None:
            return {}
        return {"deployment": number, **read_json(self.host.deployment(number) / "deployment.json")}

    def contents(self) -> dict[str, Any]:
        """Schema and rows of the store; {} before the first deployment."""
        return self._atlas("db", "contents") if self.deployed() else {}

    def export(self, store: str, have: Iterable[str], out: Any) -> None:
        """Write the manifest, the journal, the settings of every deployment, the archives of their releases that the
        backup host does not *have* yet, and a copy of a SQLite *store*."""
        deployed = self.deployed()
        manifest: dict[str, Any] = {"store": store, "taken_at": time.time(), "deployed": deployed}
        if not deployed:
            with tempfile.TemporaryDirectory() as scratch:
                send(out, [("manifest.json", _written(Path(scratch, "manifest.json"), manifest))])
            return
        with self._scratch() as directory:
            files = self._files(set(have))
            if store == "sqlite":
                copy = directory / "atlas.db"
                manifest["taken_at"] = time.time()
                manifest |= self._atlas("db", "snapshot", str(copy))
                files.append(("atlas.db", copy))
            manifest["archives"] = sorted(path.name for path in (self.host.root / "archives").glob("*.tar.gz"))
            with tempfile.TemporaryDirectory() as scratch:
                files.insert(0, ("manifest.json", _written(Path(scratch, "manifest.json"), manifest)))
                # A deploy that ends now removes what it no longer retains.
                send(out, files, may_vanish=True)

    @contextlib.contextmanager
    def _scratch(self) -> Any:
        """A directory of the service's user; one export at a time, and what a killed one left is removed."""
        directory = self.state / "backup"
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        # The service owns the place, and root works here: a link to elsewhere is not followed, not even if it comes later.
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(KeyError, PermissionError):
                user = pwd.getpwnam("atlas")
                os.fchown(handle, user.pw_uid, user.pw_gid)
            fcntl.flock(handle, fcntl.LOCK_EX)
            _empty(handle)
            yield directory
        finally:
            _empty(handle)
            os.close(handle)

    def _files(self, have: set[str]) -> list[tuple[str, Path]]:
        files = []
        journal = self.host.state / "journal.jsonl"
        if journal.exists():
            files.append(("journal.jsonl", journal))
        for number in self.host.deployments():
            for name in ("deployment.json", "settings.yaml"):
                files.append((f"deployments/{number}/{name}", self.host.deployment(number) / name))
        for path in sorted((self.host.root / "archives").glob("*.tar.gz")):
            signature = path.with_name(f"{path.name}.sig")
            if path.name not in have and signature.exists():
                # A deploy removes the archive first: what is kept never lacks its signature.
                files += [(f"archives/{signature.name}", signature), (f"archives/{path.name}", path)]
        return files

    def status(self, text: str) -> None:
        """Keep the report *text* where the service reads it."""
        report = parse_report(text)
        if "jobs" not in report:
            raise BackupError("this is no report")
        if not self.state.is_dir():
            return
        write_atomically(self.status_file, json.dumps(report, sort_keys=True) + "\n", 0o644)

    def take_in(self, ticket: str, source: Any) -> int:
        """Unpack a restore into the directory that the open door names; returns how many files came."""
        door = read_json(self.door)
        if not door or door.get("ticket") != ticket:
            raise BackupError("the door is closed: playbooks/restore.yml opens it while it runs")
        directory = Path(str(door["directory"]))
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(mode=0o700, parents=True)
        free = shutil.disk_usage(directory).free - (FREE_MB << 20)
        return len(receive(source, directory, max(0, free)))


def _empty(directory: int) -> None:
    """Remove the files in the open *directory*."""
    for name in os.listdir(directory):
        os.unlink(name, dir_fd=directory)


def _written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """Run what the backup host asked for; the words it may say are these and no others."""
    asked = " ".join(arguments)
    agent = Agent()
    verbs: list[tuple[str, Callable[[re.Match[str]], Any]]] = [
        (
            r"export (sqlite|postgresql) have=([A-Za-z0-9._+,-]*)",
            lambda match: agent.export(match[1], match[2].split(","), sys.stdout.buffer),
        ),
        (r"deployed", lambda match: print(json.dumps(agent.deployed()))),
        (r"contents", lambda match: print(json.dumps(agent.contents()))),
        (r"status", lambda match: agent.status(sys.stdin.read(REPORT_BYTES))),
        (r"import ([A-Za-z0-9-]{1,64})", lambda match: print(agent.take_in(match[1], sys.stdin.buffer))),
    ]
    try:
        for pattern, action in verbs:
            match = re.fullmatch(pattern, asked)
            if match:
                with contextlib.suppress(OSError):
                    os.nice(15)
                action(match)
                return 0
        print("atlas-backup-agent: not a command for the backup host", file=sys.stderr)
        return 2
    except (BackupError, HostError, OSError, ValueError) as error:
        print(f"atlas-backup-agent: {error}", file=sys.stderr)
        return 1
