"""The lock of deploys: a lease, kept as a file on each edge host, that names its holder and expires."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import read_json, write_atomically

DIRECTORY = Path("/var/lib/atlas-deploy")


class LeaseError(Exception):
    """The lease belongs to somebody else, or is lost."""


def clock(moment: float) -> str:
    """Return the Unix time *moment* for people."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def held(lease: Mapping[str, Any], deploy: str, now: float) -> bool:
    """Tell whether *lease* keeps *deploy* out at the Unix time *now*."""
    return bool(lease) and lease.get("deploy") != deploy and float(lease.get("expires", 0)) > now


def decide(lease: Mapping[str, Any], params: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the lease that follows from *lease* and the wish *params* at the Unix time *now* ({}: none).

    Raises :class:`LeaseError` if the lease is another's (acquired), or is no longer ours (renewed).
    """
    deploy = params["deploy"]
    ours = lease.get("deploy") == deploy
    if params["state"] == "released":
        return {} if ours else dict(lease)
    if params["state"] == "renewed":
        if not ours:
            raise LeaseError(
                "The lock was taken by another deploy meanwhile"
                + (f": {lease.get('holder')}." if lease else " or removed.")
            )
        return {**lease, "expires": now + params["seconds"]}
    if held(lease, deploy, now) and lease.get("deploy") != params["replaces"]:
        raise LeaseError(
            f"Another deploy holds the lock: {lease.get('holder')} since {clock(lease.get('since', 0))} "
            f"({lease.get('reason')}); it expires at {clock(lease.get('expires', 0))}. Wait for it, "
            "or, if it is certainly dead, take the lock over: ansible-playbook playbooks/deploy.yml -e deploy_unlock=true"
        )
    since = lease["since"] if ours else now
    kept = {key: params[key] for key in ("deploy", "holder", "process", "reason")}
    return {**kept, "since": since, "expires": now + params["seconds"]}


def apply(params: Mapping[str, Any], directory: Path, check: bool) -> dict[str, Any]:
    """Bring the lease in *directory* to the state of *params*, one caller at a time; return the module's result."""
    if check and params["state"] == "renewed":
        return {"changed": False, "lease": {}}
    if not directory.is_dir():
        if params["state"] == "released" or check:
            return {"changed": params["state"] == "acquired", "lease": {}}
        directory.mkdir(mode=0o700)
    handle = os.open(directory / "lease.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        path = directory / "lease.json"
        lease = read_json(path)
        wanted = decide(lease, params, time.time())
        # A renewal is no change that a person asked to see.
        changed = (wanted.get("deploy") != lease.get("deploy")) if wanted else bool(lease)
        if not check and wanted != lease:
            if wanted:
                write_atomically(path, json.dumps(wanted, sort_keys=True) + "\n", 0o600)
            else:
                path.unlink(missing_ok=True)
        return {"changed": changed, "lease": wanted}
    finally:
        os.close(handle)


def had_by_another(journal: Sequence[Mapping[str, Any]], deploy: str) -> str:
    """Return who had the lease after *deploy*, by the *journal* of the host, or an empty text.

    Whoever has given it back by now may have left something else in service than *deploy* knows of.
    """
    locks = [entry for entry in journal if entry.get("event") == "lock"]
    last = locks[-1] if locks else {}
    return "" if last.get("deploy") == deploy else str(last.get("holder") or "somebody")


def renew(deploy: str, seconds: float, check: bool = False) -> None:
    """Keep the lease of *deploy* for so many *seconds* from now; raise LeaseError if it is another's by now."""
    apply({"state": "renewed", "deploy": deploy, "seconds": seconds}, DIRECTORY, check)
