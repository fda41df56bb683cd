"""Finds what is wrong on this host, says why it matters, and names the command that mends it."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission, backups, breakers, keys, migrations, presence
from atlas.crypto import Keyring, KeyringError
from atlas.db import Database
from atlas.monitoring import is_vulnerable
from atlas.runtime import PORTS, one_line, open_queue
from atlas.services import LEASE
from atlas.settings import Identity, Settings, SettingsError, load_identity, load_settings
from atlas.tokens import listed

SERVICES = ("api", "core", "services", "monitoring")
DISK_WARNING, DISK_ERROR = 0.85, 0.95
WAL_BYTES = 256 * 1024 * 1024
SKEW_SECONDS = 2.0
SILENT_SECONDS = 20.0
STALLED_SECONDS = 1200.0
EXPIRY_MS = 7 * 86_400_000
_DEPLOY = "ansible-playbook -i INV playbooks/deploy.yml"


@dataclass(frozen=True)
class Finding:
    """Something wrong. `level` is "error" (the service does not do what it should) or "warning"."""

    check: str
    level: str
    message: str
    mend: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def _error(check: str, message: str, mend: str) -> Finding:
    return Finding(check, "error", message, mend)


def _warning(check: str, message: str, mend: str) -> Finding:
    return Finding(check, "warning", message, mend)


def examine() -> Iterator[Finding]:
    """Everything that is wrong here; nothing is changed, and no secret is shown."""
    try:
        settings = load_settings()
        identity = load_identity(settings)
    except SettingsError as error:
        for finding in error.findings:
            yield _error("settings", f"{error.source}: {finding}", f"correct it in group_vars, then {_DEPLOY}")
        return
    try:
        keyring = Keyring.from_secret(settings.fernet_keys)
    except KeyringError as error:
        yield _error("credentials", str(error), f"{_DEPLOY}, which brings the credentials")
        return
    yield from _disk(settings)
    for problem in (backups.look(settings.backup_status_path) or {}).get("problems", ()):
        yield _error("backup", problem, "ansible-playbook -i INV playbooks/backup.yml")
    path = Path(make_url(settings.database_url).database or "")
    if settings.database_url.startswith("sqlite") and not path.exists():
        yield _error("database", f"{path} does not exist", "atlas db migrate")
        return
    database = Database(settings)
    try:
        yield from _store(database, settings, identity, keyring)
    except (SQLAlchemyError, OSError) as error:
        host = make_url(settings.database_url).host
        mend = f"systemctl status postgresql, on {host}" if host else f"ls -l {path.parent}; df -h {path.parent}"
        yield _error("database", f"does not answer: {one_line(error)}", mend)
    finally:
        database.close()


def _disk(settings: Settings) -> Iterator[Finding]:
    path = os.path.dirname(make_url(settings.database_url).database or "") or "/"
    if os.path.isdir(path):
        usage = shutil.disk_usage(path)
        used = 1 - usage.free / usage.total
        if used > DISK_WARNING:
            level = "error" if used > DISK_ERROR else "warning"
            message = f"{used:.0%} of the file system of {path} are used; without room nothing can be taken in"
            yield Finding("disk", level, message, f"du -xh --max-depth=2 {path}; journalctl --vacuum-size=200M")


def _store(database: Database, settings: Settings, identity: Identity, keyring: Keyring) -> Iterator[Finding]:
    before = time.time()
    with database.read() as connection:
        skew = database.now(connection) / 1000 - (before + time.time()) / 2
    if abs(skew) > SKEW_SECONDS:
        message = f"the clock of the database is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host's"
        yield _error("clock", message, "timedatectl status, on both hosts")
    schema = migrations.status(database)
    if not schema.compatible:
        message = f"is at {schema.current or 'nothing'}, this release needs {schema.head}"
        yield _error("schema", message, "atlas db migrate")
        return
    if database.dialect == "sqlite":
        yield from _sqlite(database, settings)
    else:
        yield from _keeper(database)
    yield from _services(database, identity)
    yield from _work(database, settings, identity)
    with database.read() as connection:
        found = keys.progress(connection, keyring)
        open_breakers = breakers.states(database, connection)["open"]
    if found.unknown:
        message = f"{found.unknown} sensitive fields are under a key that is not in the keyring"
        yield _error("keys", message, f"put the key back into fernet_keys, then {_DEPLOY}")
    if found.remaining > found.unknown:
        message = f"{found.remaining - found.unknown} sensitive fields are under an older key"
        yield _warning("keys", message, "atlas keys reencrypt")
    if open_breakers:
        message = f"{open_breakers} remote hosts are not asked, because they failed too often"
        yield _warning("breakers", message, "GET /v1/breakers, or the status page")
    yield from _tokens(database)


def _sqlite(database: Database, settings: Settings) -> Iterator[Finding]:
    version = database.version()
    if is_vulnerable(version):
        yield _error("sqlite", f"SQLite {version} can corrupt a database when its log is reset", _DEPLOY)
    log = Path(f"{make_url(settings.database_url).database}-wal")
    if log.exists() and log.stat().st_size > WAL_BYTES:
        message = f"the write-ahead log holds {log.stat().st_size >> 20} MiB: a reader keeps it from being written back"
        yield _warning("wal", message, f"fuser -v {log}")


def _keeper(database: Database) -> Iterator[Finding]:
    query = "SELECT pg_has_role(tableowner, 'MEMBER') FROM pg_tables WHERE tablename = 'audit'"
    with database.read() as connection:
        if connection.scalar(text(query)):
            message = "the audit log belongs to the role of the service, which could change it"
            yield _warning("audit", message, "see docs/decisions/0007-audit.md: hand it to atlas_audit")


def _services(database: Database, identity: Identity) -> Iterator[Finding]:
    here = {
        each.service: each.age_seconds
        for each in presence.roster(database)
        if (each.host, each.slot) == (identity.host, identity.slot)
    }
    for service in SERVICES:
        unit, port = f"atlas-{service}@{identity.slot}", PORTS.get(service, {}).get(identity.slot)
        if service not in here:
            yield _error("services", f"{unit} does not run", f"systemctl start {unit}; journalctl -u {unit} -n 50")
        elif here[service] > SILENT_SECONDS:
            message = f"{unit} has not been heard of for {here[service]:.0f} s"
            yield _error("services", message, f"systemctl restart {unit}; journalctl -u {unit} -n 50")
        if port is not None and _listens(port) != (service in here):
            message = f"port {port} is taken by another" if service not in here else f"{unit} does not listen on {port}"
            yield _error("ports", message, f"ss -ltnp 'sport = :{port}'")


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _work(database: Database, settings: Settings, identity: Identity) -> Iterator[Finding]:
    if not any(entry.admitted for entry in admission.admissions(database)):
        yield _error("admission", "no deployment may claim jobs", f"atlas admission admit {identity.deployment}")
    elif admission.leader(database, LEASE) is None:
        unit = f"atlas-services@{identity.slot}"
        yield _error("leader", "nobody leads: no feed is polled, nothing old is removed", f"systemctl restart {unit}")
    stats = open_queue(database, "doctor", identity.deployment, settings).stats()
    if stats.oldest_ready_seconds > STALLED_SECONDS:
        message = f"the oldest job has waited for {stats.oldest_ready_seconds / 60:.0f} min"
        yield _error("queue", message, f"systemctl status atlas-core@{identity.slot}")
    if stats.total("ready") > settings.queue_limit * 0.8:
        message = f"{stats.total('ready')} of {settings.queue_limit} places are taken; low priorities are refused"
        yield _warning("queue", message, "raise core_concurrency or queue_limit, or send less")
    if stats.total("dead"):
        yield _warning(
            "dead-letters", f"{stats.total('dead')} jobs failed for good", "GET /v1/dead-letters, or the status page"
        )
    for each in presence.roster(database):
        for warning in (each.detail or {}).get("warnings", ()):
            yield _warning("store", str(warning), f"journalctl -u atlas-{each.service}@{each.slot} on {each.host}")


def _tokens(database: Database) -> Iterator[Finding]:
    with database.read() as connection:
        now = database.now(connection)
    found: list[dict[str, Any]] = [token for token in listed(database) if token["disabled_at"] is None]
    if not found:
        yield _error("tokens", "there is no token: nobody may ask", "atlas tokens apply")
    for token in found:
        left = (token["expires_at"] or now + EXPIRY_MS) - now
        if left < EXPIRY_MS:
            when = "has expired" if left <= 0 else f"expires in {left / 86_400_000:.1f} days"
            mend = f"give it a new expires_at in the vault file, then {_DEPLOY}"
            yield _warning("tokens", f"{token['name']} {when}", mend)
