"""Puts a restored store in the place of the one in use, by renames, and back: what it replaces is kept beside it.

A file remembers how far it came, so that a restore that was killed is undone by the next run.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
from pathlib import Path
from typing import NamedTuple

from ansible.module_utils.atlas_host import HostError, read_json, sync_directory, write_atomically

STATE = Path("/var/lib/atlas-restore")


class Store(NamedTuple):
    """Where a store lives: its *files* in *directory*, which belong to *user*; *came* is what a delivery holds for each."""

    directory: Path
    files: tuple[str, ...]
    came: tuple[tuple[str, str], ...]
    user: str

    @property
    def incoming(self) -> Path:
        """Where a delivery is unpacked: on the same file system."""
        return self.directory / "restore-incoming"

    def safety(self, ticket: str) -> Path:
        """Where what was replaced is kept."""
        return self.directory / f"before-{ticket}"

    def aside(self, ticket: str) -> Path:
        """Where a restored store is kept that served and was taken out again."""
        return self.directory / f"undone-{ticket}"


def sqlite(directory: Path = Path("/var/lib/atlas"), user: str = "atlas") -> Store:
    """The store of the service on SQLite."""
    return Store(directory, ("atlas.db", "atlas.db-wal", "atlas.db-shm"), (("atlas.db", "atlas.db"),), user)


def postgresql(version: str, root: Path = Path("/var/lib/postgresql"), user: str = "postgres") -> Store:
    """The main cluster of a PostgreSQL version."""
    return Store(root / version, ("main",), (("pgdata", "main"),), user)


class Swap:
    """One exchange on one host, under a *ticket*. Whatever uses the store must be stopped."""

    def __init__(self, store: Store, state: Path = STATE) -> None:
        self.store, self.state = store, state

    def open_door(self, ticket: str) -> None:
        """Let the backup host deliver under *ticket*, until the door is closed."""
        self.state.mkdir(mode=0o700, exist_ok=True)
        door = {"ticket": ticket, "directory": str(self.store.incoming)}
        write_atomically(self.state / "door.json", json.dumps(door) + "\n", 0o600)

    def close_door(self) -> bool:
        """Close it and remove what was delivered and not used."""
        was_open = (self.state / "door.json").exists() or self.store.incoming.exists()
        (self.state / "door.json").unlink(missing_ok=True)
        shutil.rmtree(self.store.incoming, ignore_errors=True)
        return was_open

    def unfinished(self) -> str | None:
        """The ticket of an exchange that was neither finished nor undone."""
        return read_json(self.state / "swap.json").get("ticket")

    def replace(self, ticket: str) -> None:
        """Keep what is there and put the delivery in its place."""
        store, safety = self.store, self.store.safety(ticket)
        missing = [name for name, _ in store.came if not (store.incoming / name).exists()]
        if missing:
            raise HostError(f"Nothing was delivered to {store.incoming}: {', '.join(missing)} is missing.")
        had = [name for name in store.files if (store.directory / name).exists()]
        write_atomically(self.state / "swap.json", json.dumps({"ticket": ticket, "had": had}) + "\n", 0o600)
        safety.mkdir(mode=0o700, exist_ok=True)
        for name in had:
            (store.directory / name).rename(safety / name)
        for came, name in store.came:
            _give(store.incoming / came, store.user)
            (store.incoming / came).rename(store.directory / name)
        sync_directory(store.directory)

    def undo(self, served: bool) -> Path | None:
        """Put back what was replaced. What is taken out is kept if it may have *served*; returns where, or None.

        Documents that were taken in meanwhile are nowhere else. Only the newest of such copies stays.
        """
        ticket = self.unfinished()
        if ticket is None:
            return None
        store, safety, aside = self.store, self.store.safety(ticket), self.store.aside(ticket)
        for path in store.directory.glob("undone-*"):
            if path != aside:
                _remove(path)
        had = read_json(self.state / "swap.json").get("had", [])
        for name in store.files:
            if not (safety / name).exists() and name in had:
                continue  # it was not replaced, or is back already
            if served and (store.directory / name).exists():
                aside.mkdir(mode=0o700, exist_ok=True)
                (store.directory / name).rename(aside / name)
            _remove(store.directory / name)
            if (safety / name).exists():
                (safety / name).rename(store.directory / name)
        if safety.is_dir():
            safety.rmdir()
        sync_directory(store.directory)
        (self.state / "swap.json").unlink(missing_ok=True)
        return aside if aside.exists() else None

    def finish(self) -> None:
        """Accept the exchange. Only the newest copy of what was replaced is kept."""
        ticket = self.unfinished()
        (self.state / "swap.json").unlink(missing_ok=True)
        if ticket:
            for path in self.store.directory.glob("before-*"):
                if path != self.store.safety(ticket):
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _give(path: Path, user: str) -> None:
    """Make *path* and all below it the user's alone."""
    account = pwd.getpwnam(user)
    for entry in [path, *path.rglob("*")]:
        if entry.is_symlink():  # whoever owns the directory put it there: root would give away what it points at
            raise HostError(f"{entry} is a link; nothing that is delivered is one.")
        os.chown(entry, account.pw_uid, account.pw_gid)
        entry.chmod(0o700 if entry.is_dir() else 0o600)
