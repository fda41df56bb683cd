"""The state of the fleet for people and programs: what is in service, retained, warm and owed, and what is not as it should be.

Pure: everything comes in as data.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.module_utils import rotation
from ansible.module_utils.deploy_plan import Facts, Fleet, answered, when

CERTIFICATE_DAYS = 14


def status(
    facts: Facts, hosts: Sequence[str], edges: Sequence[str], pin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return per app host and edge what is in service, and where it is not what it should be.

    *facts*: host → result of atlas_facts, with settings and credentials compared where something is in service. *pin*: the
    release that the inventory pins, None where any may be deployed.
    """
    fleet = Fleet(facts, {"hosts": hosts, "edges": edges})
    app = {host: _app(host, facts, fleet) for host in hosts}
    for host, row in app.items():
        if pin and row["reachable"] and row["release"] and facts[host]["digest"] != pin.get("digest"):
            row["drift"].append(f"the inventory pins {pin.get('version')}-{str(pin.get('digest'))[:12]}")
    return {
        "in_service": {"slot": fleet.home, "deployment": fleet.number},
        "app": app,
        "edge": {edge: _edge(edge, facts, fleet) for edge in edges},
        "owed": fleet.owed,
    }


def rotations(facts: Facts, policy: Mapping[str, float], now: float) -> list[str]:
    """Return which rotations of secrets are not over, and which secrets are older than *policy* (kind → days) allows."""
    known = {host: fact for host, fact in facts.items() if answered(facts, host)}
    found = rotation.states({host: fact["rotations"] for host, fact in known.items()})
    moments = [fact["first_entry"] for fact in known.values() if fact["first_entry"]]
    rows = rotation.ages(found, policy, min(map(rotation.unix, moments), default=None), now)
    return rotation.half_rotated(found) + rotation.age_lines([row for row in rows if row["overdue"]])


def _app(host: str, facts: Facts, fleet: Fleet) -> dict[str, Any]:
    owed = fleet.owed.get(host)
    if not answered(facts, host):
        return {"reachable": False, "error": str(facts.get(host, {}).get("msg", "no answer")).strip(), "owed": owed}
    fact = facts[host]
    slot = fact["slot"]
    number = fact["slots"].get(slot) if slot else None
    here = {name: state for name, state in fact["units"].items() if slot and f"@{slot}." in name}
    services = {name.split("@")[0].removeprefix("atlas-"): state["state"] for name, state in here.items()}
    ready = fact.get("ready") or {}
    release = fact["deployments"].get(str(number), {}).get("release")
    warm = {name: until for name, until in fact["warm"].items() if until}
    return {
        "reachable": True,
        "release": release,
        "deployment": number,
        "slot": slot,
        "services": services,
        "memory_mb": sum((state["memory"] or 0) for state in here.values()) >> 20,
        "ready": ready.get("status") == 200,
        "disk_free_mb": fact["disk"]["opt_mb"],
        "retained": sorted(int(key) for key in fact["deployments"]),
        "good": fact["good"],
        "warm": {
            name: {"deployment": fact["slots"].get(name), "until": when(until), "until_unix": until}
            for name, until in warm.items()
        },
        "owed": owed,
        "debian": fact["debian"]["version"],
        "python": fact["python"],
        "journal": fact["journal"],
        "drift": _drift(fact, fleet, host, services, release),
    }


def _drift(
    fact: Mapping[str, Any], fleet: Fleet, host: str, services: Mapping[str, str], release: str | None
) -> list[str]:
    ready = fact.get("ready") or {}
    drift = [f"atlas-{name} is {state}" for name, state in services.items() if state != "active"]
    if fact["slot"] and ready.get("release") not in (None, release):
        drift.append(f"answers as release {ready.get('release')}")
    if fact["slot"] and fact["as_inventory"] is False:
        drift.append("settings or credentials differ from the inventory")
    if fact["stale_units"]:
        drift.append("units changed since they were started")
    if fact["transaction"]:
        drift.append(f"deployment {fact['transaction'].get('deployment')} did not end")
    elif fleet.home and fleet.current[host] != fleet.number:
        drift.append(f"others have deployment {fleet.number}")
    elif fleet.home and fleet.slot[host] != fleet.home:
        drift.append(f"others serve from slot {fleet.home}")
    return drift


def _edge(edge: str, facts: Facts, fleet: Fleet) -> dict[str, Any]:
    owed = fleet.owed.get(edge)
    if not answered(facts, edge):
        return {"reachable": False, "owed": owed}
    state = facts[edge]["edge"]
    active = str(state.get("memory") or state.get("file") or "")
    servers = {name: value for name, value in state["servers"].items() if name.startswith(f"{active}/")}
    drift = [str(state["error"])] if state.get("error") else []
    days = state.get("certificate_days")
    if state.get("maintenance"):
        drift.append(f"in maintenance: {state['maintenance']}")
    if days is not None and days < CERTIFICATE_DAYS:
        drift.append(f"the certificate ends in {days} days")
    if state.get("file") != state.get("memory"):
        drift.append(f"slot.map says {state['file']}")
    if fleet.home and active not in ("be_mixed", f"be_{fleet.home}"):
        drift.append(f"the app hosts serve from slot {fleet.home}")
    drift += [
        f"{name.split('/')[1]} gets no traffic"
        for name, value in sorted(servers.items())
        if value.startswith(("MAINT", "DRAIN")) and name.split("/")[1] not in fleet.owed
    ]
    return {
        "reachable": True,
        "traffic_to": active.removeprefix("be_") or None,
        "servers": servers,
        "lock": state["lease"] or None,
        "maintenance": state.get("maintenance"),
        "certificate_days": days,
        "owed": owed,
        "drift": drift,
    }


def locks(facts: Facts, judge: Callable[[str], str], now: float) -> list[str]:
    """Return who holds the lock on each edge, in lines for people.

    *facts*: edge → result of atlas_facts. *judge*: see :func:`controller.judge`. *now*: Unix time.
    """
    lines = []
    said = {
        "dead": "its process is gone: the next deploy takes the lock over by itself",
        "alive": "its process RUNS on this machine: without the lock it fails, and undoes what it did",
        "elsewhere": "its process is on another machine: ask its holder whether it still runs",
    }
    for edge, fact in facts.items():
        lease = (fact.get("edge") or {}).get("lease")
        if not answered(facts, edge):
            lines.append(f"{edge:12} cannot be reached")
        elif not lease:
            lines.append(f"{edge:12} free")
        else:
            over = float(lease.get("expires", 0)) <= now
            lines += [
                f"{edge:12} held by {lease.get('holder')} since {when(lease.get('since', 0))} for: {lease.get('reason')}",
                f"{'':12} {'expired' if over else 'expires'} at {when(lease.get('expires', 0))}; {said[judge(str(lease.get('process', '')))]}",
            ]
    return lines


def table(state: Mapping[str, Any]) -> str:
    """Return the result of :func:`status` as a table for people."""
    rows = [["HOST", "RELEASE", "DEPLOYMENT", "SLOT", "SERVICES", "READY", "DISK FREE", "RETAINED", "WARM", "DRIFT"]]
    for host, row in state["app"].items():
        owed = f"owed deployment {row['owed'].get('deployment')}" if row["owed"] else ""
        if not row["reachable"]:
            rows.append([host, *["-"] * 8, _list(["not reachable", owed])])
            continue
        up = sum(value == "active" for value in row["services"].values())
        rows.append(
            [
                host,
                row["release"] or "nothing",
                str(row["deployment"] or "-"),
                row["slot"] or "-",
                f"{up} of {len(row['services']) or 4}",
                "yes" if row["ready"] else "no",
                f"{row['disk_free_mb'] / 1024:.1f} GB",
                " ".join(f"{number}{'' if number in row['good'] else '?'}" for number in row["retained"]) or "-",
                " ".join(f"{warm['deployment']} until {_clock(warm['until_unix'])}" for warm in row["warm"].values())
                or "-",
                _list([*row["drift"], owed]),
            ]
        )
    edges = [["EDGE", "TRAFFIC TO", "SERVERS", "CERTIFICATE", "LOCK", "DRIFT"]]
    for edge, row in state["edge"].items():
        owed = "owed a switch" if row["owed"] else ""
        if not row["reachable"]:
            edges.append([edge, "-", "-", "-", "-", _list(["not reachable", owed])])
            continue
        servers = " ".join(f"{name.split('/')[1]} {value}" for name, value in row["servers"].items())
        lock = row["lock"]
        held = f"{lock['holder']} since {when(lock['since'])} ({lock.get('reason', '')})" if lock else "free"
        certificate = "none" if row["certificate_days"] is None else f"{row['certificate_days']} days left"
        drift = _list([*row["drift"], owed])
        edges.append([edge, row["traffic_to"] or "-", servers or "-", certificate, held, drift])
    secrets = [*state["secrets"], ""] if state.get("secrets") else []
    note = "RETAINED: a number with ? was never good to the end."
    return "\n".join([*_columns(rows), "", *_columns(edges), "", *secrets, note])


def _list(texts: Sequence[str]) -> str:
    return "; ".join(text for text in texts if text) or "none"


def _clock(moment: int) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%H:%M:%S UTC")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
