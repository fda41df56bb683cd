"""Whether a host may leave the fleet, and what its leaving takes. Pure: everything comes in as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.module_utils.patch_plan import Facts, lock_finding, replaceable

OPEN = "{host}: deployment {number} did not end. Finish or undo it first: ansible-playbook -i {inventory} playbooks/deploy.yml"


def plan(
    facts: Facts,
    options: Mapping[str, Any],
    controller: Mapping[str, str],
    is_dead: Callable[[str], bool],
    now: float,
) -> dict[str, Any]:
    """Return what retiring ``options.host`` takes: findings that forbid it; its servers on the edges; whether it answers.

    *facts*: host → result of atlas_facts, for all app hosts and edges. *options*: host, hosts, edges, databases (names),
    keep_up (app hosts that have to be left), inventory. *controller*, *is_dead* and *now*: as for a deploy.
    """
    host, inventory = options["host"], options["inventory"]
    others = [edge for edge in options["edges"] if edge != host]
    leases = {edge: dict(facts.get(edge, {}).get("edge", {}).get("lease") or {}) for edge in options["edges"]}
    replaces = {edge: str(lease["deploy"]) for edge, lease in leases.items() if replaceable(lease, is_dead, now)}
    app, edge = host in options["hosts"], host in options["edges"]
    findings = [
        *_host(options),
        *(f"{name} cannot be asked; every other edge has to be. Check: ansible -i {inventory} {name} -m ping"
          for name in others if "edge" not in facts.get(name, {})),
        *(lock_finding(name, lease) for name, lease in leases.items() if lease and name not in replaces),
        *(OPEN.format(host=name, number=fact["transaction"].get("deployment"), inventory=inventory)
          for name, fact in facts.items() if fact.get("transaction")),
    ]  # fmt: skip
    if not findings and app:
        findings = _capacity(host, others, facts, options)
    return {
        **controller,
        "findings": findings,
        "replaces": replaces,
        "edges": others,
        "locks": [name for name in options["edges"] if "edge" in facts.get(name, {})],
        "host": host,
        "app": app,
        "edge": edge,
        "reachable": "edge" in facts.get(host, {}),
        "servers": [f"be_blue/{host}", f"be_green/{host}", f"be_mixed/{host}-blue", f"be_mixed/{host}-green"]
        if app
        else [],
    }


def _host(options: Mapping[str, Any]) -> list[str]:
    host = options["host"]
    if not host:
        return ["Say which host leaves: -e host=NAME."]
    if host in options["databases"]:
        return [f"{host} is a database: it holds the data. Move that first."]
    if host not in options["hosts"] and host not in options["edges"]:
        known = ", ".join(dict.fromkeys([*options["hosts"], *options["edges"]]))
        return [f"{host} is neither an app host nor an edge of this inventory, which has {known}."]
    if options["edges"] == [host]:
        return [f"{host} is the only edge: without it nobody reaches the service. Add another one first."]
    return []


def _capacity(host: str, edges: list[str], facts: Facts, options: Mapping[str, Any]) -> list[str]:
    found = []
    for edge in edges:
        state = facts[edge]["edge"]
        if state.get("error"):
            found.append(f"{edge}: HAProxy does not run: {state['error']}. See: systemctl status haproxy")
            continue
        up = [
            name
            for name in options["hosts"]
            if name != host and state["servers"].get(f"{state['memory']}/{name}", "").startswith("UP")
        ]
        if len(up) < options["keep_up"]:
            found.append(
                f"Without {host}, {edge} has {len(up)} app host(s) up ({', '.join(up) or 'none'}); "
                f"{options['keep_up']} have to be left (retire_keep_up). Add or mend one first."
            )
    return found


def farewell(plan_: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Return what is left for people to do, in lines."""
    host, inventory = options["host"], options["inventory"]
    lines = [f"{host} serves nobody any more."]
    if not plan_["reachable"]:
        lines.append(f"{host} did not answer: see to it that it never starts again with what is on it.")
    lines += [
        "What is left to do:",
        f"  1. Take {host} out of hosts.yml, and host_vars/{host} if there is one.",
        f"  2. ansible-playbook -i {inventory} playbooks/site.yml    # edges and firewalls forget it",
        f"  3. Wipe the machine: it holds encrypted credentials{' and the certificate with its key' if plan_['edge'] else ''}. "
        "If it leaves your hands, rotate the secrets.",
    ]
    if plan_["edge"]:
        lines.insert(2, "  0. Take its address out of DNS or whatever leads to the edges, if that is not done yet.")
    return lines
