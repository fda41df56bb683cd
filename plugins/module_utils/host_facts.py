"""What one host has in service and what state it is in, asked of the host itself: for atlas_facts and ops_facts.

Runs on the host, with the standard library alone, and changes nothing.
"""

from __future__ import annotations

import calendar
import csv
import io
import json
import os
import platform
import pwd
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import (
    API_PORTS,
    MONITORING_PORTS,
    SLOTS,
    Done,
    Host,
    HostError,
    changed_since_start,
    fingerprint,
    fingerprint_key,
    get,
    read_json,
    requests,
    run,
    unit,
    units,
)
from ansible.module_utils.canary import counters
from ansible.module_utils.haproxy_runtime import RuntimeFailure, RuntimeSocket
from ansible.module_utils.rotation import noted

STATE = Path("/var/lib/atlas-deploy")
MAP = Path("/etc/haproxy/slot.map")
MAINTENANCE = "/etc/haproxy/maintenance.map"
CERTIFICATE = "/etc/haproxy/tls/edge.pem"
RESTARTED = "5eb03494b6584870a536b337290809b3"  # pragma: allowlist secret
"""What systemd logs when it starts a unit again because of Restart= (SD_MESSAGE_UNIT_RESTART_SCHEDULED)."""
COMPLAINTS = "Scheduled restart job|the probe did not come through|the database does not answer"
"""How it says that, and what the service's monitoring says that cannot use the service as its users do."""
TROUBLES = 5000
"""At most so many of both are read, the newest."""


def debian() -> dict[str, str]:
    """Return VERSION_ID and ID of the system."""
    lines = Path("/etc/os-release").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return {"id": values.get("ID", "").strip('"'), "version": values.get("VERSION_ID", "").strip('"')}


def memory() -> dict[str, int]:
    """Return the memory of the host in MB: total and available, within the limit of its own control group if it has one."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) // 1024 for name, rest in (line.split(":", 1) for line in lines)}
    total, available = values["MemTotal"], values["MemAvailable"]
    for path, used in (
        (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
    ):
        try:
            limit = int(path.read_text()) >> 20
            if limit < total:
                total, available = limit, min(available, limit - (int(used.read_text()) >> 20))
        except (OSError, ValueError):
            continue
    return {"total_mb": total, "available_mb": available}


def listening() -> list[int]:
    """Return the TCP ports that something listens on."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        ports |= {int(row.split()[1].rsplit(":", 1)[1], 16) for row in rows if row.split()[3] == "0A"}
    return sorted(ports)


def balancer(path: str) -> dict[str, Any]:
    """Return the balancer's state: the slot its file and its memory name, its servers, the deploy lease, and who is owed."""
    found: dict[str, Any] = {
        "installed": Path("/usr/sbin/haproxy").exists(),
        "file": None,
        "memory": None,
        "servers": {},
        "counters": {},
        "maintenance": None,
        "certificate_days": None,
        "lease": read_json(STATE / "lease.json"),
        "owed": read_json(STATE / "owed.json"),
        "switched_by_deploy": any(entry.get("event") == "switched" for entry in Host().journal()),
    }
    if not found["installed"]:
        return found
    try:
        rows = [line.split() for line in MAP.read_text().splitlines() if line.strip() and not line.startswith("#")]
        found["file"] = dict(row[:2] for row in rows if len(row) >= 2).get("active")
    except OSError:
        found["file"] = None
    ask = RuntimeSocket(path).ask
    try:
        rows = [line.split() for line in ask(f"show map {MAP}").splitlines()]
        found["memory"] = next((row[2] for row in rows if len(row) >= 3 and row[1] == "active"), None)
        rows = [line.split(maxsplit=2) for line in ask(f"show map {MAINTENANCE}").splitlines()]
        found["maintenance"] = next((row[2] for row in rows if len(row) == 3 and row[1] == "reason"), None)
        ends = re.search(r"^notAfter: (.+) GMT$", ask(f"show ssl cert {CERTIFICATE}"), re.MULTILINE)
        if ends:
            left = calendar.timegm(time.strptime(ends[1], "%b %d %H:%M:%S %Y")) - time.time()
            found["certificate_days"] = int(left // 86400)
        shown = ask("show stat")
        found["counters"] = counters(shown, ask("show table st_times"))
        for row in csv.DictReader(io.StringIO(shown.removeprefix("# "))):
            if row.get("type") == "2":
                found["servers"][f"{row['pxname']}/{row['svname']}"] = row["status"]
    except RuntimeFailure as failure:
        why = failure.__cause__
        found["error"] = f"its socket {path} does not answer ({getattr(why, 'strerror', None) or why})"
    return found


def free_mb(path: Path) -> int:
    """Return the free space in MB of the file system that holds *path*, or will."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free >> 20


def compared(host: Host, number: int | None, params: Mapping[str, Any]) -> bool | None:
    """Tell whether the deployment *number* has the wanted settings and credentials; None where there is nothing to compare."""
    if number is None or params["settings"] is None:
        return None
    content = read_json(host.deployment(number) / "deployment.json")
    credentials = {name: str(secret) for name, secret in (params["credentials"] or {}).items()}
    mark = fingerprint(fingerprint_key(host.state), str(content.get("digest")), params["settings"], credentials)
    return bool(content.get("fingerprint") == mark)


def texts(host: Host) -> dict[str, str]:
    """Return number → settings.yaml of every deployment; there are no secrets in it."""
    return {str(number): (host.deployment(number) / "settings.yaml").read_text() for number in host.deployments()}


def troubles(command: Callable[..., Done] = run) -> dict[str, Any]:
    """Return what systemd's journal holds against the services of both slots: *restarts* and *complaints*, each [unit, Unix time].

    *since*: the Unix time from which on it is known, None where the journal cannot be read, with *error*. A restart of a unit is there to
    stay, whatever becomes of the counter of the unit; who stopped and started it by hand is not in it.
    """
    found: dict[str, Any] = {"since": None, "restarts": [], "complaints": []}
    argv = ["journalctl", "--system", "--no-pager", "--quiet", "--output=json"]
    matches = [f"MESSAGE_ID={RESTARTED}", *(f"UNIT={name}" for slot in SLOTS for name in units(slot))]
    for slot in SLOTS:
        matches += ["+", f"_SYSTEMD_UNIT={unit('monitoring', slot)}"]
    query = [
        f"--lines={TROUBLES}",
        "--output-fields=UNIT,_SYSTEMD_UNIT",
        f"--grep={COMPLAINTS}",
        "--case-sensitive=yes",
    ]
    try:
        # It has no way to ask for the oldest entry alone.
        oldest = command(["sh", "-c", " ".join([*argv, "--output-fields=_BOOT_ID", "|", "head -n 1"])], timeout=120)
        told = command([*argv, *query, *matches], timeout=120)
        moments = [_moment(json.loads(line)) for line in oldest.output.splitlines()]
        entries = [json.loads(line) for line in told.output.splitlines()]
    except (HostError, ValueError, KeyError) as error:
        return found | {"error": str(error)}
    if told.errors.strip() or not moments:
        return found | {"error": told.errors.strip()[:300] or "it is empty"}
    for entry in entries:
        pair = [entry.get("UNIT") or entry["_SYSTEMD_UNIT"], _moment(entry)]
        found["restarts" if "UNIT" in entry else "complaints"].append(pair)
    cut = [_moment(entry) for entry in entries] if len(entries) >= TROUBLES else []
    return found | {"since": max(moments[0], min(cut, default=moments[0]))}


def _moment(entry: Mapping[str, Any]) -> float:
    return int(entry["__REALTIME_TIMESTAMP"]) / 1e6


def facts(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything about this host."""
    host, entries = Host(), params["journal"]
    journal = host.journal()
    provisioned = Path("/etc/systemd/system/atlas-api@.service").exists()
    names = [name for slot in SLOTS for name in units(slot)]
    shown = host.show(names) if provisioned else {}
    states = {
        name: {
            "state": shown[name].get("ActiveState"),
            "restarts": int(shown[name].get("NRestarts") or 0),
            "memory": int(shown[name]["MemoryCurrent"]) if shown[name].get("MemoryCurrent", "").isdigit() else None,
        }
        for name in names
        if name in shown
    }
    ports = listening()
    slot, slots = host.in_service(), host.slots()
    number = slots[slot] if slot else None
    running = [
        name for name in SLOTS if shown and all(states.get(each, {}).get("state") == "active" for each in units(name))
    ]
    here = {name: shown[name] for name in units(slot) if name in shown} if slot else {}
    ours = {
        port: states.get(f"atlas-{service}@{name}.service", {}).get("state")
        in ("active", "activating", "deactivating", "reloading")
        for service, table in (("api", API_PORTS), ("monitoring", MONITORING_PORTS))
        for name, port in table.items()
    }
    ready = get(API_PORTS[slot], "/readyz") if slot else None
    try:
        pwd.getpwnam("atlas")
        user = True
    except KeyError:
        user = False
    return {
        "provisioned": provisioned and user,
        "slot": slot,
        "slots": slots,
        "running": running,
        "warm": {name: host.warm_until(name) for name in running if name != slot},
        "stale_units": changed_since_start(here),
        "digest": read_json(host.deployment(number) / "deployment.json").get("digest") if number else None,
        "as_inventory": compared(host, number, params),
        "settings": texts(host) if params["texts"] else {},
        "deployments": {
            str(each): {**content, "revoked": (host.deployment(each) / "credentials.revoked").exists()}
            for each, content in host.deployments().items()
        },
        "releases": host.releases(),
        "good": host.good(),
        "highest": host.highest(),
        "transaction": host.transaction(),
        "units": states,
        "ready": {"status": ready.status, "release": ready.headers.get("x-atlas-release"), "body": ready.body}
        if ready
        else None,
        "requests": requests(slot) if slot and params.get("troubles") else None,
        "troubles": troubles() if params.get("troubles") else None,
        "journal": journal[-entries:] if entries else [],
        "rotations": noted(journal),
        "first_entry": journal[0]["at"] if journal else None,
        "edge": balancer(params["socket"]),
        "disk": {"opt_mb": free_mb(Path("/opt/atlas")), "var_mb": free_mb(Path("/var/lib/atlas"))},
        "memory": memory(),
        "debian": debian(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "postgresql": Path("/usr/lib/postgresql").is_dir()
        and run(["systemctl", "is-active", "--quiet", "postgresql"]).status == 0,
        "ports": ports,
        "foreign_ports": [port for port, is_ours in ours.items() if port in ports and not is_ours],
        "kernel": os.uname().release,
        "clock": time.time(),
    }
