"""What a deploy does, decided from what its hosts say: findings that forbid it, the slots, the number, what to clean up first.

Pure: everything comes in as data, nothing is read or changed. Used by the filters of the same names.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SUPPORTED_DEBIAN = ("12", "13")
CERTIFICATE_DAYS = 14
Facts = Mapping[str, Mapping[str, Any]]


def when(moment: float) -> str:
    """Return the Unix time *moment* for people."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def other(slot: str) -> str:
    """Return the slot that is not *slot*."""
    return "green" if slot == "blue" else "blue"


def plan(
    facts: Facts,
    compared: Facts,
    release: Mapping[str, Any],
    options: Mapping[str, Any],
    controller: Mapping[str, str],
    is_dead: Callable[[str], bool],
    now: float,
) -> dict[str, Any]:
    """Return the plan of a deploy.

    *facts*: host → result of atlas_facts. *compared*: app host → result of atlas_deployment (state compared).
    *release*: result of :func:`release_file`. *options*: hosts, edges, databases, strategy, force, unlock, disk_mb,
    memory_mb, inventory, credentials (names). *controller*: holder, process, deploy. *is_dead* tells of a lease's process
    whether it is certainly gone. *now*: Unix time.
    """
    hosts, edges = list(options["hosts"]), list(options["edges"])
    leases = {edge: dict(facts.get(edge, {}).get("edge", {}).get("lease") or {}) for edge in edges}
    replaces = {
        edge: str(lease["deploy"])
        for edge, lease in leases.items()
        if lease and _may_replace(lease, options, is_dead, now)
    }
    open_on = {host: facts[host]["transaction"] for host in hosts if facts.get(host, {}).get("transaction")}
    findings = [
        *_options(options),
        *([release["error"]] if release.get("error") else []),
        *_hosts(facts, options),
        *_edges(facts, leases, replaces, edges, interrupted=bool(open_on)),
    ]
    result: dict[str, Any] = {
        "findings": list(dict.fromkeys(findings)),
        "release": dict(release),
        **controller,
        "replaces": replaces,
    }
    reached = [host for host in hosts if "slots" in facts.get(host, {})]
    result["undo"] = undo(facts, open_on, reached, edges, interrupted=bool(open_on) or bool(replaces))
    active = next(
        (facts[edge]["edge"]["memory"] for edge in edges if facts.get(edge, {}).get("edge", {}).get("memory")), None
    )
    active = str(active or "be_blue").removeprefix("be_")
    if result["undo"]["traffic_to"]:
        active = result["undo"]["traffic_to"]
    serving = [host for host in reached if facts[host]["slot"] is not None]
    rolling = options["strategy"] == "rolling" and len(hosts) > 1 and bool(serving)
    current = {host: facts[host]["slots"].get(facts[host]["slot"]) if facts[host]["slot"] else None for host in reached}
    # What an unfinished deploy left is not what serves after it was undone.
    current |= {
        host: was["slots"].get(was["in_service"]) if was["in_service"] else None for host, was in open_on.items()
    }
    result |= {
        "number": max([0, *(int(facts[host]["highest"]) for host in reached)]) + 1,
        "rolling": rolling,
        "slot": active if rolling or not serving else other(active),
        "old_slot": active if serving else None,
        "current": current,
        "first": not serving,
        "old_numbers": sorted({number for number in current.values() if number is not None}),
    }
    same = all(compared.get(host, {}).get("unchanged") for host in hosts) and len(set(current.values())) == 1
    result["nothing_to_do"] = (
        same
        and not findings
        and not result["undo"]["needed"]
        and not options["force"]
        and all(_serves(facts[host]) for host in hosts)
        and all(facts[host]["slot"] == active for host in hosts)
        and all(not lease for lease in leases.values())
    )
    return result


def undo(
    facts: Facts,
    open_on: Mapping[str, Mapping[str, Any]],
    hosts: Sequence[str],
    edges: Sequence[str],
    interrupted: bool,
) -> dict[str, Any]:
    """Return what a deploy that did not end needs: per host forward (it was past the point of no return) or back.

    Once one host has finished a deployment, the others finish it too: traffic already goes there. *hosts* in the result
    are all that need a look, also those that an edge had drained before anything changed on them.
    """
    numbers = {int(was["deployment"]) for was in open_on.values()}
    finished = [host for host in hosts if facts[host]["good"][-1:] and facts[host]["good"][-1] in numbers]
    enabled = [host for host, was in open_on.items() if facts[host]["slot"] == was["slot"] != was["in_service"]]
    forward = bool(finished or enabled)
    back_to = {str(was["in_service"]) for was in open_on.values() if was.get("in_service")}
    switched = any(was["slot"] != was["in_service"] for was in open_on.values())
    drained = _out_of_rotation(facts, edges)
    return {
        "needed": interrupted or bool(drained & set(hosts)),
        "hosts": [host for host in hosts if host in open_on or host in drained],
        "switch_to": sorted(back_to)[0] if back_to and switched and not forward else None,
        "forward": sorted(open_on) if forward else [],
        "back": [] if forward else sorted(open_on),
        "traffic_to": sorted(back_to)[0] if back_to and not forward else None,
        "transactions": {host: dict(was) for host, was in open_on.items()},
    }


def _out_of_rotation(facts: Facts, edges: Sequence[str]) -> set[str]:
    """Return the hosts that an edge keeps out of the backend in service: a deploy that ended did not leave them so."""
    found = set()
    for edge in edges:
        state = facts.get(edge, {}).get("edge", {})
        for name, value in (state.get("servers") or {}).items():
            backend, server = name.split("/", 1)
            if backend == state.get("memory") and value.startswith(("MAINT", "DRAIN")):
                found.add(server)
    return found


def _may_replace(
    lease: Mapping[str, Any], options: Mapping[str, Any], is_dead: Callable[[str], bool], now: float
) -> bool:
    return bool(options["unlock"]) or float(lease.get("expires", 0)) <= now or is_dead(str(lease.get("process", "")))


def _options(options: Mapping[str, Any]) -> list[str]:
    found = []
    if options["strategy"] not in ("rolling", "blue_green"):
        found.append(f"deploy_strategy is {options['strategy']!r}; it must be rolling or blue_green.")
    if not options["hosts"]:
        found.append("deploy_hosts is empty: the inventory has no app host.")
    if not options["edges"]:
        found.append("deploy_edges is empty: the inventory has no edge host.")
    missing = {"fernet_keys", "tokens"} - {name for name, filled in options["credentials"].items() if filled}
    if missing:
        found.append(
            f"atlas_credentials lacks {', '.join(sorted(missing))}: check that the vault file has it (make vault ENV=NAME)."
        )
    return found


def _hosts(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    site = f"ansible-playbook -i {options['inventory']} playbooks/site.yml"
    found = []
    everyone = list(dict.fromkeys([*options["hosts"], *options["edges"], *options["databases"]]))
    for host in everyone:
        fact = facts.get(host, {})
        if fact.get("unreachable") or "slots" not in fact:
            reason = str(fact.get("msg", "no answer")).strip().splitlines()[-1:] or ["no answer"]
            kind = "cannot be reached" if fact.get("unreachable") else "cannot be looked at"
            why = reason[0].rpartition("Task failed: ")[2].rstrip(".")
            found.append(f"{host} {kind}: {why}. Check: ansible -i {options['inventory']} {host} -m ping")
            continue
        debian = fact["debian"]
        if debian["id"] != "debian" or debian["version"] not in SUPPORTED_DEBIAN:
            found.append(
                f"{host} runs {debian['id']} {debian['version']}; supported are Debian {' and '.join(SUPPORTED_DEBIAN)}."
            )
        if host in options["edges"] and not fact["edge"]["installed"]:
            found.append(f"{host} has no HAProxy. Provision it: {site}")
        if host in options["databases"] and not fact["postgresql"]:
            found.append(f"{host}: PostgreSQL is not installed or does not run. Provision it: {site}")
        if host in options["hosts"]:
            found += _app_host(host, fact, options, site)
    return found


def _app_host(host: str, fact: Mapping[str, Any], options: Mapping[str, Any], site: str) -> list[str]:
    found = []
    if not fact["provisioned"]:
        found.append(f"{host} has no Atlas units or no user atlas. Provision it: {site}")
    for name, path in (("opt_mb", "/opt/atlas"), ("var_mb", "/var/lib/atlas")):
        if fact["disk"][name] < options["disk_mb"]:
            found.append(
                f"{host}: {fact['disk'][name]} MB free at {path}, a deploy needs {options['disk_mb']} (deploy_disk_mb). "
                f"See what fills it: du -xh --max-depth=2 {path} /var/log"
            )
            break
    if fact["memory"]["available_mb"] < options["memory_mb"]:
        found.append(
            f"{host}: {fact['memory']['available_mb']} MB of memory available, a deploy needs {options['memory_mb']} (deploy_memory_mb)."
        )
    for port in fact["foreign_ports"]:
        found.append(
            f"{host}: port {port} is taken by a process that is not Atlas. See which: ss -ltnp 'sport = :{port}'"
        )
    return found


def _edges(
    facts: Facts,
    leases: Mapping[str, Mapping[str, Any]],
    replaces: Mapping[str, str],
    edges: Sequence[str],
    interrupted: bool,
) -> list[str]:
    found = []
    named: dict[str, str] = {}
    for edge in edges:
        state = facts.get(edge, {}).get("edge", {})
        if state.get("error"):
            found.append(f"{edge}: HAProxy does not run: {state['error']}. See: systemctl status haproxy")
        elif state.get("installed"):
            named[edge] = str(state.get("memory"))
            if state.get("memory") != state.get("file") and not interrupted:
                found.append(
                    f"{edge}: HAProxy sends traffic to {state.get('memory')} but /etc/haproxy/slot.map says {state.get('file')}. Make them equal."
                )
        lease = leases[edge]
        if lease and edge not in replaces:
            found.append(
                f"The lock on {edge} is held by {lease.get('holder')} since {when(lease.get('since', 0))} ({lease.get('reason')}); "
                f"it expires at {when(lease.get('expires', 0))}. Wait, or take it over if that deploy is certainly dead: -e deploy_unlock=true"
            )
    if len(set(named.values())) > 1 and not interrupted:
        found.append(
            f"The edges disagree on the slot in service: {', '.join(f'{edge}: {value}' for edge, value in named.items())}."
        )
    return found


def _serves(fact: Mapping[str, Any]) -> bool:
    ready = fact.get("ready") or {}
    return ready.get("status") == 200 and all(
        state["state"] == "active" for name, state in fact["units"].items() if f"@{fact['slot']}." in name
    )


def summary(plan_: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Return the plan in a few lines for people."""
    release, hosts = plan_["release"], options["hosts"]
    current = plan_["current"]
    now_there = {f"deployment {number}" if number is not None else "nothing" for number in current.values()}
    lines = [
        f"release      {release.get('id')}  ({release.get('path')})",
        f"in service   {', '.join(sorted(now_there)) or 'nothing'}"
        + (f", slot {plan_['old_slot']}" if plan_["old_slot"] else ""),
    ]
    if plan_["undo"]["needed"]:
        undone = plan_["undo"]["hosts"]
        lines.append(
            "first        clean up after a deploy that did not end" + (f" on {', '.join(undone)}" if undone else "")
        )
    if plan_["nothing_to_do"]:
        return [
            *lines,
            "nothing to do: release, settings and credentials are in service (deploy_force=true deploys them again)",
        ]
    how = (
        f"host by host in slot {plan_['slot']}"
        if plan_["rolling"]
        else f"slot {plan_['slot']} on all hosts at once, then one switch per edge"
    )
    return [*lines, f"deployment   {plan_['number']} on {', '.join(hosts)}: {how}"]


def status(facts: Facts, compared: Facts, hosts: Sequence[str], edges: Sequence[str]) -> dict[str, Any]:
    """Return the state of the fleet: per app host and edge what is in service, and where it is not what it should be."""
    app = {host: _app_status(facts.get(host, {}), compared.get(host, {})) for host in hosts}
    serving = {row.get("deployment") for row in app.values()}
    if len(serving) > 1:
        for row in app.values():
            row["drift"] = [*row.get("drift", []), "hosts have different deployments"]
    edge_rows: dict[str, Any] = {}
    for edge in edges:
        state = facts.get(edge, {}).get("edge")
        if not state:
            edge_rows[edge] = {"reachable": False}
            continue
        active = str(state.get("memory") or state.get("file") or "")
        edge_rows[edge] = {
            "reachable": True,
            "traffic_to": active.removeprefix("be_") or None,
            "servers": {name: value for name, value in state["servers"].items() if name.startswith(f"{active}/")},
            "lock": state["lease"] or None,
            "maintenance": state.get("maintenance"),
            "certificate_days": (days := state.get("certificate_days")),
            "drift": [
                *([f"in maintenance: {state['maintenance']}"] if state.get("maintenance") else []),
                *([f"the certificate ends in {days} days"] if days is not None and days < CERTIFICATE_DAYS else []),
                *([f"slot.map says {state['file']}"] if state.get("file") != state.get("memory") else []),
                *(f"{name} gets no traffic" for name in sorted(_out_of_rotation(facts, [edge]))),
            ],
        }
    return {"app": app, "edge": edge_rows}


def _app_status(fact: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
    if "slots" not in fact:
        return {"reachable": False, "error": str(fact.get("msg", "no answer")).strip()}
    slot = fact["slot"]
    number = fact["slots"].get(slot) if slot else None
    services = {
        name.split("@")[0].removeprefix("atlas-"): state["state"]
        for name, state in fact["units"].items()
        if slot and f"@{slot}." in name
    }
    ready = fact.get("ready") or {}
    release = fact["deployments"].get(str(number), {}).get("release")
    drift = [f"atlas-{name} is {state}" for name, state in services.items() if state != "active"]
    if slot and ready.get("release") not in (None, release):
        drift.append(f"answers as release {ready.get('release')}")
    if slot and compared and not compared.get("unchanged", True):
        drift.append("settings or credentials differ from the inventory")
    if fact["transaction"]:
        drift.append(f"deployment {fact['transaction'].get('deployment')} did not end")
    return {
        "reachable": True,
        "release": release,
        "deployment": number,
        "slot": slot,
        "services": services,
        "memory_mb": sum(
            (state["memory"] or 0) for name, state in fact["units"].items() if slot and f"@{slot}." in name
        )
        >> 20,
        "ready": ready.get("status") == 200,
        "disk_free_mb": fact["disk"]["opt_mb"],
        "retained": sorted(int(key) for key in fact["deployments"]),
        "debian": fact["debian"]["version"],
        "python": fact["python"],
        "journal": fact["journal"],
        "drift": drift,
    }


def table(state: Mapping[str, Any]) -> str:
    """Return the result of :func:`status` as a table for people."""
    rows = [["HOST", "RELEASE", "DEPLOYMENT", "SLOT", "SERVICES", "READY", "DISK FREE", "RETAINED", "DRIFT"]]
    for host, row in state["app"].items():
        if not row["reachable"]:
            rows.append([host, "-", "-", "-", "-", "-", "-", "-", "not reachable"])
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
                " ".join(map(str, row["retained"])) or "-",
                "; ".join(row["drift"]) or "none",
            ]
        )
    edges = [["EDGE", "TRAFFIC TO", "SERVERS", "CERTIFICATE", "LOCK", "DRIFT"]]
    for edge, row in state["edge"].items():
        if not row["reachable"]:
            edges.append([edge, "-", "-", "-", "-", "not reachable"])
            continue
        servers = " ".join(f"{name.split('/')[1]} {value}" for name, value in row["servers"].items())
        lock = row["lock"]
        held = f"{lock['holder']} since {when(lock['since'])}" if lock else "free"
        certificate = "none" if row["certificate_days"] is None else f"{row['certificate_days']} days left"
        drift = "; ".join(row["drift"]) or "none"
        edges.append([edge, row["traffic_to"] or "-", servers or "-", certificate, held, drift])
    return "\n".join([*_columns(rows), "", *_columns(edges)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
