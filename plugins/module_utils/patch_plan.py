"""What a patch run does, decided from what the hosts say: who is patched in which order, drained or not, booted or not.

Pure: everything comes in as data, nothing is read or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.module_utils.deploy_plan import when
from ansible.module_utils.packages import NEED_BOOT

Facts = Mapping[str, Mapping[str, Any]]
# What an upgrade of restarts the database, whoever uses it.
DATABASE_PACKAGES = ["postgresql"]
BOOT_PACKAGES = ("linux-image", "dbus")
PAGE = "A server is being updated. It takes a few minutes."
"""What users are told during a downtime; a page with another text is somebody else's."""


def keep_up(count: int) -> int:
    """Return how many of *count* app hosts have to serve while one is patched: half of them, and never all."""
    return min((count + 1) // 2, count - 1)


def plan(
    looked: Facts,
    facts: Facts,
    options: Mapping[str, Any],
    controller: Mapping[str, str],
    is_dead: Callable[[str], bool],
    now: float,
) -> dict[str, Any]:
    """Return what to do: findings that forbid it, the hosts that need something in their order, and a step for each.

    *looked*: host → result of host_packages. *facts*: host → result of atlas_facts. *options*: everyone, hosts, edges,
    databases (names), only (names, empty: all), downtime (names whose downtime is accepted, or ``all``), reboot (auto,
    always, never), inventory. *controller*, *is_dead* and *now*: as for a deploy.
    """
    leases = {edge: dict(facts.get(edge, {}).get("edge", {}).get("lease") or {}) for edge in options["edges"]}
    replaces = {edge: str(lease["deploy"]) for edge, lease in leases.items() if replaceable(lease, is_dead, now)}
    targets = [host for host in order(options) if not options["only"] or host in options["only"]]
    findings = [
        *_options(options),
        *_hosts(looked, facts, options, targets),
        *(lock_finding(edge, lease) for edge, lease in leases.items() if lease and edge not in replaces),
    ]
    steps = {} if findings else {host: step(host, looked[host], facts, options) for host in targets}
    if not findings:
        findings = _capacity(steps, facts, options)
    return {
        "findings": findings,
        "replaces": replaces,
        "steps": steps,
        "order": _sequence(steps) if not findings else [],
        "serving": _serving(steps, facts, options) if not findings else [],
        "page": PAGE,
        # Left by a run that was killed.
        "left_pages": [edge for edge in options["edges"] if _page(edge, facts) == PAGE],
        **controller,
    }


def order(options: Mapping[str, Any]) -> list[str]:
    """Return all hosts in the order in which they are patched: who serves nobody, databases, app hosts, edges."""
    serving = [*options["databases"], *options["hosts"], *options["edges"]]
    others = [host for host in options["everyone"] if host not in serving]
    return list(dict.fromkeys([*others, *serving]))


def step(host: str, looked: Mapping[str, Any], facts: Facts, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is done on *host*.

    work: whether anything is. drain: out of the edges' rotation and services stopped meanwhile. flip: services renewed by
    way of the idle slot. pages: edges that show users the page meanwhile. boot: why it boots, if it may. keep: beginnings
    of packages that stay. left: what is not done and why.
    """
    slot = facts.get(host, {}).get("slot")
    app, edge = host in options["hosts"] and slot is not None, host in options["edges"]
    database = host in options["databases"]
    alone = [
        name
        for name, mine, count in (
            ("app host", app, len(options["hosts"])),
            ("edge", edge, len(options["edges"])),
            ("database", database, 1),
        )
        if mine and count == 1
    ]
    accepted = not alone or host in options["downtime"] or "all" in options["downtime"]
    keep = DATABASE_PACKAGES if database and not accepted else []
    packages = [each for each in looked["packages"] if not each["name"].startswith(tuple(keep))]
    kept = [each["name"] for each in looked["packages"] if each not in packages]
    reasons = ["patch_reboot is always"] if options["reboot"] == "always" else list(looked["boot"])
    consent = f"it is the only {' and '.join(alone)}, so that means downtime: -e patch_downtime={host}"
    left = [f"{', '.join(kept)}: {consent}"] if kept else []
    boot = reasons if options["reboot"] != "never" and accepted else []
    boots = bool(boot) or any(each["name"].startswith(BOOT_PACKAGES) for each in packages)
    if reasons and not boot:
        left.append(f"a boot ({'; '.join(reasons)}): " + ("patch_reboot is never" if accepted else consent))
    stale = [unit for unit in looked["stale"] if boot or unit not in NEED_BOOT]
    if not accepted and (replaced := [unit for unit in stale if unit.startswith("postgresql@")]):
        stale = [unit for unit in stale if unit not in replaced]
        left.append(f"PostgreSQL runs on replaced files until it is restarted: {consent}")
    unfinished = app and _unfinished(host, facts, options)
    # Only what users would notice calls for the page that tells them.
    downtime = bool(alone) and accepted and bool(boots or (database and (packages or stale)))
    return {
        "work": bool(packages or boot or stale or unfinished),
        "packages": packages,
        "keep": keep,
        "app": app,
        "edge": edge,
        "database": database,
        "slot": slot,
        "drain": app and len(options["hosts"]) > 1,
        "keep_up": 0 if unfinished or not app else keep_up(len(options["hosts"])),
        "flip": app and len(options["hosts"]) == 1,
        "downtime": downtime,
        "pages": [edge for edge in options["edges"] if edge != host and _page(edge, facts) in (None, PAGE)]
        if downtime
        else [],
        "may_boot": options["reboot"] != "never" and accepted,
        "boot": boot,
        "stale": stale,
        "unfinished": unfinished,
        "left": left,
        "consent": consent if alone and not accepted else "",
    }


def _page(edge: str, facts: Facts) -> str | None:
    """Return what the maintenance page of *edge* tells users; None where there is none."""
    told = facts.get(edge, {}).get("edge", {}).get("maintenance")
    return None if told is None else str(told)


def _unfinished(host: str, facts: Facts, options: Mapping[str, Any]) -> bool:
    """Tell whether an earlier run ended before *host* served again."""
    fact = facts[host]
    down = any(state["state"] != "active" for name, state in fact["units"].items() if f"@{fact['slot']}." in name)
    states = (facts[edge]["edge"]["servers"].get(f"be_{fact['slot']}/{host}", "") for edge in options["edges"])
    return down or any(state.startswith(("MAINT", "DRAIN")) for state in states)


def _options(options: Mapping[str, Any]) -> list[str]:
    found = []
    if options["reboot"] not in ("auto", "always", "never"):
        found.append(f"patch_reboot is {options['reboot']!r}; it must be auto, always or never.")
    if options["which"] not in ("security", "all"):
        found.append(f"patch_packages is {options['which']!r}; it must be security or all.")
    for variable, names in (("patch_hosts", options["only"]), ("patch_downtime", options["downtime"])):
        unknown = [name for name in names if name not in options["everyone"] and name != "all"]
        if unknown:
            found.append(f"{variable} names {', '.join(unknown)}; the inventory has {', '.join(options['everyone'])}.")
    return found


def _hosts(looked: Facts, facts: Facts, options: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    found = []
    # An edge that cannot be asked cannot drain either, so that every edge counts.
    for host in dict.fromkeys([*targets, *options["edges"], *options["hosts"]]):
        answers = [looked.get(host, {})] if host in targets else []
        if host in options["hosts"] or host in options["edges"]:
            answers.append(facts.get(host, {}))
        bad = [answer for answer in answers if answer.get("unreachable") or answer.get("failed") or not answer]
        if bad:
            reason = (str(bad[0].get("msg", "no answer")).strip().splitlines() or ["no answer"])[-1].rstrip(".")
            kind = "cannot be reached" if bad[0].get("unreachable") else "cannot be looked at"
            found.append(f"{host} {kind}: {reason}. Check: ansible -i {options['inventory']} {host} -m ping")
            continue
        fact = facts.get(host, {})
        if fact.get("transaction"):
            found.append(
                f"{host}: deployment {fact['transaction'].get('deployment')} did not end. "
                f"Finish or undo it first: ansible-playbook -i {options['inventory']} playbooks/deploy.yml"
            )
        owed = [edge for edge in options["edges"] if host in (facts.get(edge, {}).get("edge", {}).get("owed") or {})]
        # An edge that no site.yml has given kept-out.state forgets at its boot whom it kept out.
        if owed and (host in targets or set(options["edges"]) & set(targets)):
            found.append(
                f"{host} is owed a deployment and kept out of traffic. Deploy first: "
                f"ansible-playbook -i {options['inventory']} playbooks/deploy.yml"
            )
        if host in options["edges"] and fact["edge"].get("error"):
            found.append(f"{host}: HAProxy does not run: {fact['edge']['error']}. See: systemctl status haproxy")
    return found


def replaceable(lease: Mapping[str, Any], is_dead: Callable[[str], bool], now: float) -> bool:
    """Tell whether there is a *lease* that has expired, or whose process is certainly gone."""
    return bool(lease) and (float(lease.get("expires", 0)) <= now or is_dead(str(lease.get("process", ""))))


def lock_finding(edge: str, lease: Mapping[str, Any]) -> str:
    """Return who holds the lock of *edge*, as a finding."""
    return (
        f"The lock on {edge} is held by {lease.get('holder')} since {when(lease.get('since', 0))} ({lease.get('reason')}). "
        "Wait for it; if that is certainly dead: playbooks/unlock.yml"
    )


def _capacity(steps: Mapping[str, Mapping[str, Any]], facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Return the edges on which too few app hosts serve for one more to be drained.

    Those that an earlier run left out of service come back first: they count as serving, and taking them out is no loss.
    """
    found, needed = [], keep_up(len(options["hosts"]))
    unfinished = {host for host, each in steps.items() if each["unfinished"]}
    drained = {host for host, each in steps.items() if each["work"] and each["drain"]} - unfinished
    for edge in options["edges"]:
        state = facts[edge]["edge"]
        up = [
            host for host in options["hosts"] if state["servers"].get(f"{state['memory']}/{host}", "").startswith("UP")
        ]
        if any(len({*up, *unfinished} - {host}) < needed for host in drained):
            found.append(
                f"{edge} has {len(up)} app host(s) up ({', '.join(up) or 'none'}); {needed} have to serve while one is patched. "
                f"See which does not and why: ansible-playbook -i {options['inventory']} playbooks/status.yml"
            )
    return found


def _sequence(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the hosts to patch in their order; those that an earlier run left out of service come first."""
    return sorted((host for host in steps if steps[host]["work"]), key=lambda host: not steps[host]["unfinished"])


def _serving(steps: Mapping[str, Mapping[str, Any]], facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """Return the app hosts that every edge has to send traffic to in the end: those that have it, and those brought back."""
    states = [facts[edge]["edge"] for edge in options["edges"]]
    return [
        host
        for host in options["hosts"]
        if steps.get(host, {}).get("unfinished")
        or all(state["servers"].get(f"{state['memory']}/{host}", "").startswith("UP") for state in states)
    ]


def summary(plan_: Mapping[str, Any]) -> list[str]:
    """Return the plan in a few lines for people."""
    lines = []
    for host, each in plan_["steps"].items():
        security = sum(package["security"] for package in each["packages"])
        what = f"{len(each['packages'])} package(s), {security} for security" if each["packages"] else "no package"
        if each["unfinished"]:
            what += ", back into service after a run that did not end"
        if each["boot"]:
            what += f", boots ({'; '.join(each['boot'])})"
        if each["work"]:
            what += ", drained meanwhile" if each["drain"] else ""
            what += ", WITH DOWNTIME" if each["downtime"] else ""
        lines.append(f"{host:12} {what if each['work'] else 'nothing to do'}")
        lines += [f"{'':12} {', '.join(package['name'] for package in each['packages'])}"] if each["packages"] else []
        lines += [f"{'':12} left: {text}" for text in each["left"]]
    return lines


def result(plan_: Mapping[str, Any], variables: Facts, check: bool = False) -> list[str]:
    """Return what was done, in lines for people. *variables*: host → its variables after the run. *check*: it was one."""
    lines, done = [], "to upgrade" if check else "upgraded"
    for host in plan_["order"]:
        upgraded = variables[host].get("__patch_upgraded") or {}
        booted = variables[host].get("__patch_booted")
        text = f"{len(upgraded.get('packages') or [])} package(s) {done}" + (", booted" if booted else "")
        if upgraded.get("renewed"):
            text += f", renewed {', '.join(upgraded['renewed'])}"
        lines.append(f"{host:12} {text}")
        if upgraded.get("boot") and not booted:
            why = plan_["steps"][host]["consent"] or "patch_reboot is never"
            lines.append(f"{'':12} left: a boot ({'; '.join(upgraded['boot'])}): {why}")
    lines += [f"{host:12} left: {text}" for host, step in plan_["steps"].items() for text in step["left"]]
    return lines if plan_["order"] else ["Nothing to patch: no host was touched.", *lines]
