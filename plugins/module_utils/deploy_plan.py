"""What a deploy or a rollback does, decided from what its hosts say: findings that forbid it, what to clean up first, the mode.

Pure: everything comes in as data, nothing is read or changed. Used by the filters of the same names.
"""

from __future__ import annotations

import datetime
import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.module_utils import deploy_hooks, freeze, rotation

SUPPORTED_DEBIAN = ("12", "13")
MODES = {
    "nothing": "what is wanted is in service",
    "tidy": "only what an earlier deploy left is put right",
    "join": "hosts without it get the deployment that is in service",
    "deploy": "a new deployment for all hosts",
    "rollback": "a retained deployment for all hosts",
}
Facts = Mapping[str, Mapping[str, Any]]
Options = Mapping[str, Any]


def when(moment: float) -> str:
    """Return the Unix time *moment* for people."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def other(slot: str) -> str:
    """Return the slot that is not *slot*."""
    return "green" if slot == "blue" else "blue"


def plan(
    facts: Facts,
    release: Mapping[str, Any],
    options: Options,
    controller: Mapping[str, str],
    is_dead: Callable[[str], bool],
    now: float,
) -> dict[str, Any]:
    """Return the plan of a deploy, or of a rollback where ``options.rollback`` is set.

    *facts*: host → result of atlas_facts. *release*: result of :func:`release_file`; unused by a rollback. *options*: see
    ``__deploy_options`` of the role deploy. *controller*: holder, process, deploy, began. *is_dead* tells of a lease's
    process whether it is certainly gone. *now*: Unix time.
    """
    fleet = Fleet(facts, options)
    leases = {edge: dict(facts[edge]["edge"].get("lease") or {}) for edge in fleet.edges}
    replaces = {
        edge: str(lease["deploy"])
        for edge, lease in leases.items()
        if lease and _may_replace(lease, options, is_dead, now)
    }
    cleanup = undo(fleet, interrupted=bool(fleet.open_on) or bool(replaces))
    result: dict[str, Any] = {
        **controller,
        "replaces": replaces,
        "undo": cleanup,
        "edges": fleet.edges,
        "missing": fleet.missing,
        "missing_edges": fleet.missing_edges,
        "current": fleet.current,
        "first": fleet.home is None,
        "old_slot": fleet.home,
        "old_number": fleet.number,
        "rolled_back": None,
        "reached": fleet.hosts,
    }
    findings = [
        *_options(options),
        *_reachable(facts, options, fleet),
        *_hosts(facts, options, fleet),
        *_edges(facts, fleet, leases, replaces, options, cleanup),
        *_clocks(facts, options, now),
        *_vault(facts, options),
        *deploy_hooks.findings(options["hooks"]),
    ]
    if options.get("rollback"):
        findings += _rollback(result, fleet, options)
    else:
        findings += [release["error"]] if release.get("error") else release.get("settings", [])
        _deploy(result, fleet, release, options)
        if result["mode"] == "deploy":
            findings += freeze.findings(options["freeze_windows"], options["freeze_override"], now)
            overridden = freeze.findings(options["freeze_windows"], "", now) if options["freeze_override"] else []
            result["override"] = options["freeze_override"] if overridden else ""
    findings += schema_findings(result, fleet, options)
    result["findings"] = list(dict.fromkeys(findings))
    result["hooks"] = [] if findings else sorted({event for hook in options["hooks"] for event in hook["events"]})
    return result


class Fleet:
    """Who answered, and what they have in service once what a killed deploy left is cleaned up.

    *hosts* and *edges* answered, *missing* and *missing_edges* did not. *open_on*: host → record of an unfinished deploy.
    *home*: the slot in service, None before the first deploy. *current*: host → its deployment in service. *number*: the
    deployment in service on most hosts.
    """

    def __init__(self, facts: Facts, options: Options) -> None:
        self.facts = facts
        self.hosts = [host for host in options["hosts"] if answered(facts, host)]
        self.edges = [edge for edge in options["edges"] if answered(facts, edge)]
        self.missing = [host for host in options["hosts"] if host not in self.hosts]
        self.missing_edges = [edge for edge in options["edges"] if edge not in self.edges]
        self.owed: dict[str, Any] = {}
        for edge in self.edges:
            self.owed |= facts[edge]["edge"].get("owed") or {}
        self.open_on = {host: dict(facts[host]["transaction"]) for host in self.hosts if facts[host]["transaction"]}
        # With the slot: a deployment that moves to the other slot was good before it began.
        wanted = {(was["slot"], int(was["deployment"])) for was in self.open_on.values()}
        finished = [h for h in self.hosts if facts[h]["good"] and (facts[h]["slot"], facts[h]["good"][-1]) in wanted]
        enabled = [
            host for host, was in self.open_on.items() if facts[host]["slot"] == was["slot"] != was["in_service"]
        ]
        # Once one host has finished a deployment the others finish it too: traffic already goes there.
        self.forward = bool(self.open_on) and bool(finished or enabled)
        self.slot = {host: self._slot(host) for host in self.hosts}
        self.current = {host: self._current(host) for host in self.hosts}
        self.home = self._home()
        at_home = [n for host, n in self.current.items() if n is not None and self.slot[host] == self.home]
        self.number = _most_common(at_home)

    def _slot(self, host: str) -> str | None:
        was = self.open_on.get(host)
        found = self.facts[host]["slot"] if was is None else was["slot"] if self.forward else was["in_service"]
        return None if found is None else str(found)

    def _current(self, host: str) -> int | None:
        was = self.open_on.get(host)
        if was is not None and self.forward:
            return int(was["deployment"])
        slots = self.facts[host]["slots"] if was is None else was["slots"]
        number = slots.get(self.slot[host]) if self.slot[host] else None
        return None if number is None else int(number)

    def _home(self) -> str | None:
        """Return the slot in service: what app hosts say that are not owed a deployment, and among those what edges say."""
        votes = [slot for host, slot in self.slot.items() if slot and host not in self.owed] or [
            slot for slot in self.slot.values() if slot
        ]
        if not votes:
            return None
        named = [str(self.facts[edge]["edge"].get("memory")).removeprefix("be_") for edge in self.edges]
        told = [slot for slot in named if slot in votes]
        found = _most_common(told) or _most_common(votes)
        return None if found is None else str(found)

    def out_of_rotation(self) -> set[str]:
        """Return the hosts that an edge keeps out of the slot in service: a deploy that ended did not leave them so."""
        found = set()
        for edge in self.edges:
            for name, value in (self.facts[edge]["edge"].get("servers") or {}).items():
                backend, server = name.split("/", 1)
                if backend == f"be_{self.home}" and value.startswith(("MAINT", "DRAIN")):
                    found.add(server)
        return found

    def astray(self) -> list[str]:
        """Return the edges that do not send traffic to the slot in service, by their map's file or memory."""
        wanted = f"be_{self.home}"
        return [
            edge
            for edge in self.edges
            if self.home
            and not self.facts[edge]["edge"].get("error")
            and {self.facts[edge]["edge"].get("memory"), self.facts[edge]["edge"].get("file")} != {wanted}
        ]

    def settled(self, host: str) -> bool:
        """Tell whether *host* serves the deployment that is in service, by units that run what site.yml installed."""
        fact = self.facts[host]
        was = self.open_on.get(host)
        untouched = was is None or (not self.forward and was["in_service"] not in (None, was["slot"]))
        return (
            untouched
            and host not in self.owed
            and self.slot[host] == self.home
            and self.current[host] == self.number
            and serves(fact)
            and not fact["stale_units"]
        )


def answered(facts: Facts, host: str) -> bool:
    """Tell whether *host* answered."""
    return "slots" in facts.get(host, {})


def _most_common(values: Sequence[Any]) -> Any:
    """Return the most frequent of *values*, the greatest of equals, or None."""
    counted = Counter(values)
    return max(counted, key=lambda value: (counted[value], value)) if counted else None


def serves(fact: Mapping[str, Any]) -> bool:
    """Tell whether all services of the slot in service run, and the API is ready."""
    ready = fact.get("ready") or {}
    return ready.get("status") == 200 and all(
        state["state"] == "active" for name, state in fact["units"].items() if f"@{fact['slot']}." in name
    )


def undo(fleet: Fleet, interrupted: bool) -> dict[str, Any]:
    """Return what a deploy that did not end needs, and edges or hosts that are not where they belong.

    *hosts*: all that need a look, also those that an edge had drained before anything changed on them; who serves comes
    last, since it leaves the rotation for it, and others have to be back by then. *belong*: those of them that have what is in
    service. *forward*: the deploy was past the point of no return there. *traffic_to*: the slot that the edges have to name,
    where one does not.
    """
    drained = fleet.out_of_rotation() - fleet.owed.keys()
    hosts = sorted(
        (host for host in fleet.hosts if host in fleet.open_on or host in drained),
        key=lambda host: (host not in drained and serves(fleet.facts[host]), host in fleet.open_on),
    )
    astray = fleet.astray()
    return {
        "needed": interrupted or bool(hosts) or bool(astray),
        "interrupted": interrupted,
        "hosts": hosts,
        "belong": [
            host
            for host in hosts
            if host not in fleet.owed and (fleet.slot[host], fleet.current[host]) == (fleet.home, fleet.number)
        ],
        "forward": sorted(fleet.open_on) if fleet.forward else [],
        "traffic_to": fleet.home if astray else None,
        "astray": astray,
        "transactions": fleet.open_on,
        "slot": fleet.home,
        "number": fleet.number,
    }


# What is to be done


def _deploy(result: dict[str, Any], fleet: Fleet, release: Mapping[str, Any], options: Options) -> None:
    """Add to *result* mode, hosts, number and slots of a deploy of *release*."""
    facts = fleet.facts
    same = [
        host
        for host in fleet.hosts
        if fleet.settled(host) and facts[host]["as_inventory"] and facts[host]["digest"] == release.get("digest")
    ]
    todo = [host for host in fleet.hosts if host not in same]
    revisions = (release.get("schema") or {}).get("revisions", [])
    contract = bool(options["contract"] and set(revisions) - set(options.get("applied") or {}))
    known = (retained(fleet).get(int(fleet.number or 0), {}).get("schema") or {}).get("revisions", [])
    # What serves is never written anew in its place: there would be no way back from other settings.
    other_content = any(facts[h]["as_inventory"] is False and fleet.current[h] == fleet.number for h in todo)
    if options["force"] or contract or not same or other_content:
        mode, hosts = "deploy", fleet.hosts
    elif todo:
        mode, hosts = "join", todo
    else:
        mode, hosts = ("tidy" if result["undo"]["needed"] else "nothing"), []
    # With nobody left to serve meanwhile, a host is never taken out of rotation first.
    rolling = mode == "join" or (
        mode == "deploy" and options["strategy"] == "rolling" and fleet.home is not None and len(hosts) > 1
    )
    if rolling:
        hosts = weakest_first(fleet, hosts)
    slot = fleet.home or first_slot(fleet)
    if mode == "deploy" and fleet.home and not rolling:
        slot = other(slot)
    result |= {
        "mode": mode,
        "hosts": hosts,
        "number": highest(fleet) + 1 if mode == "deploy" else fleet.number,
        "rolling": rolling,
        "slot": slot,
        "watch_first": mode == "deploy" and rolling and len(options["steps"]) > 1,
        "batch": batch(len(options["hosts"]), options, len(fleet.missing)),
        "warm": False,
        "renew": [],
        "contract": contract,
        "migrates": mode == "deploy" and fleet.home is not None and bool(set(revisions) - set(known) or contract),
        "release": dict(release),
        "nothing_to_do": mode == "nothing",
    }


def weakest_first(fleet: Fleet, hosts: Sequence[str]) -> list[str]:
    """Return *hosts*, those first that do not serve: they have to be back before one leaves rotation that does."""
    return sorted(hosts, key=lambda host: serves(fleet.facts[host]))


def batch(count: int, options: Options, missing: int = 0) -> int:
    """Return how many of *count* hosts, *missing* of them away, may leave rotation at once with the least capacity kept."""
    return max(1, int(count * (100 - options["capacity_percent"]) / 100) - missing)


def first_slot(fleet: Fleet) -> str:
    """Return the slot that a first deploy fills: the one that the edges name."""
    named = [str(fleet.facts[edge]["edge"].get("file")).removeprefix("be_") for edge in fleet.edges]
    return str(_most_common([name for name in named if name in ("blue", "green")]) or "blue")


def highest(fleet: Fleet) -> int:
    """Return the highest deployment number that a host has used."""
    return max([0, *(int(fleet.facts[host]["highest"]) for host in fleet.hosts)])


def retained(fleet: Fleet) -> dict[int, dict[str, Any]]:
    """Return number → deployment.json of all deployments that are on some host."""
    found: dict[int, dict[str, Any]] = {}
    for host in fleet.hosts:
        found |= {int(number): dict(content) for number, content in fleet.facts[host]["deployments"].items()}
    return found


def last_good(fleet: Fleet) -> int | None:
    """Return the deployment before the one in service that was good to the end of its deploy and is on all hosts."""
    chains = [fleet.facts[host]["good"] for host in fleet.hosts]
    for number in reversed(max(chains, key=len, default=[])):
        has = [host for host in fleet.hosts if str(number) in fleet.facts[host]["deployments"]]
        if number != fleet.number and has and all(number in fleet.facts[host]["good"] for host in has):
            return int(number)
    return None


def _rollback(result: dict[str, Any], fleet: Fleet, options: Options) -> list[str]:
    """Add to *result* mode, hosts, number and slots of a rollback; return what forbids it."""
    wanted = options["rollback"].get("deployment")
    number = int(wanted) if wanted else last_good(fleet)
    known = retained(fleet)
    kept = ", ".join(map(str, sorted(set(known) - {fleet.number}))) or "none"
    found = []
    if number is None:
        found.append("There is no earlier deployment that was good to its end: nothing to roll back to.")
    elif number not in known:
        found.append(f"Deployment {number} is not on the hosts any more; retained besides the one in service: {kept}.")
    elif number == fleet.number and not result["undo"]["needed"]:
        found.append(f"Deployment {number} is in service already; retained besides it: {kept}.")
    hosts = [host for host in fleet.hosts if str(number) in fleet.facts[host]["deployments"]]
    lacking = [host for host in fleet.hosts if host not in hosts]
    if number in known and lacking:
        found += _quorum(options, hosts, [f"{host} does not have deployment {number}" for host in lacking])
    target = other(fleet.home) if fleet.home else "blue"
    renew = [host for host in hosts if fleet.facts[host]["deployments"][str(number)].get("revoked")]
    warm = (
        bool(hosts)
        and not renew
        and all(
            fleet.facts[host]["slots"].get(target) == number and target in fleet.facts[host]["running"]
            for host in hosts
        )
    )
    rolling = options["strategy"] == "rolling" and len(hosts) > 1 and not warm
    if rolling:
        hosts = weakest_first(fleet, hosts)
    content = known.get(number or 0, {})
    result |= {
        "mode": "rollback",
        "hosts": hosts,
        "missing": [*fleet.missing, *lacking],
        "number": number,
        "rolling": rolling,
        "slot": fleet.home if rolling else target,
        "warm": warm,
        "renew": renew,
        "watch_first": False,
        "batch": batch(len(options["hosts"]), options, len(fleet.missing)),
        "contract": False,
        "rolled_back": fleet.number,
        "release": {
            "id": content.get("release"),
            "version": content.get("version"),
            "digest": content.get("digest"),
            "schema": content.get("schema") or {},
            "path": "on the hosts",
        },
        "nothing_to_do": False,
    }
    return found


# Schema


def asks_schema(facts: Facts, release: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return host, slot and number of a deployment whose ``db status`` has to be asked for the schema.

    Nothing where the answer cannot matter.

    It matters for a release that lacks a revision which some deployment on the hosts has, for one that brings revisions
    (the database may have some that no deployment left on the hosts knows), and before contract revisions.
    """
    fleet = Fleet(facts, options)
    if fleet.number is None or release.get("error"):
        return {}
    if options.get("rollback"):
        number = options["rollback"].get("deployment") or last_good(fleet)
        schema = retained(fleet).get(int(number or 0), {}).get("schema") or {}
    else:
        schema = release.get("schema") or {}
    mine = set(schema.get("revisions", []))
    theirs: set[str] = set()
    for content in retained(fleet).values():
        theirs |= set((content.get("schema") or {}).get("revisions", []))
    serving = set((retained(fleet).get(fleet.number, {}).get("schema") or {}).get("revisions", []))
    brings = bool(mine - serving) and not options.get("rollback")
    if not options["contract"] and not brings and not theirs - mine:
        return {}
    host = next(host for host, number in fleet.current.items() if number == fleet.number)
    return {"host": host, "slot": fleet.slot[host], "number": fleet.number}


def schema_findings(result: Mapping[str, Any], fleet: Fleet, options: Options) -> list[str]:
    """Return why the schema forbids the plan *result*.

    ``options.applied`` has revision → phase and ``options.schema_current`` the revision that the database is at, if it was
    asked for.
    """
    applied: Mapping[str, str] = options.get("applied") or {}
    at = options.get("schema_current")
    release = result["release"]
    mine = (release.get("schema") or {}).get("revisions", [])
    if options.get("schema_error"):
        return [f"The database cannot be asked for its schema, on which this depends: {options['schema_error']}"]
    gap = [revision for revision, phase in applied.items() if phase == "contract" and revision not in mine]
    found = []
    if gap and mine:
        found.append(
            f"Release {release['id']} cannot serve on the database: it does not know the contract revision {', '.join(gap)}, "
            "which took away what it needs. Deploy a release that has it."
        )
    # Without a list of what was applied, the revision that the database is at has to do.
    unknown = [revision for revision in (applied or ([at] if at else [])) if revision not in mine]
    lacks = [revision for revision in mine if revision not in applied]
    if unknown and lacks and not gap and result["mode"] != "rollback":
        found.append(
            f"Release {release['id']} does not fit the schema of the database, which is at {at or unknown[-1]}: the histories "
            f"have parted. The database has {', '.join(unknown)}, which the release does not know, and lacks "
            f"{', '.join(lacks)}. Build the release from sources that have both, or deploy one that has {', '.join(unknown)}."
        )
    if not options["contract"]:
        return found
    pending = [revision for revision in mine if revision not in applied]
    for number, content in sorted(retained(fleet).items()):
        known = (content.get("schema") or {}).get("revisions", [])
        lacks = [revision for revision in pending if revision not in known]
        if lacks:
            on = [host for host in fleet.hosts if str(number) in fleet.facts[host]["deployments"]]
            found.append(
                f"Contract migrations would take from deployment {number} (release {content.get('release')}, on {', '.join(on)}) "
                f"the schema that it needs: it does not know revision {', '.join(lacks)}. Deploy newer releases until it is no "
                "longer retained (deploy_keep), then contract."
            )
    return found


# Findings


def _may_replace(lease: Mapping[str, Any], options: Options, is_dead: Callable[[str], bool], now: float) -> bool:
    return bool(options["unlock"]) or float(lease.get("expires", 0)) <= now or is_dead(str(lease.get("process", "")))


def _options(options: Options) -> list[str]:
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
    percents = [step["percent"] for step in options["steps"]]
    if not percents or percents[-1] != 100 or percents != sorted(set(percents)) or percents[0] < 1:
        found.append(
            f"deploy_canary_steps names {', '.join(map(str, percents)) or 'nothing'}; percents must rise from at least 1 to 100."
        )
    if options["lease_seconds"] <= options["longest_seconds"]:
        found.append(
            f"deploy_lease_seconds is {options['lease_seconds']}, but a single phase may take {options['longest_seconds']} s "
            "by its timeouts: the lock would be lost in the middle of it. Raise deploy_lease_seconds."
        )
    return found


def _vault(facts: Facts, options: Options) -> list[str]:
    """Refuse a vault file from before a rotation: it would bring back what was retired, and could not read what came since.

    The serial alone does not tell two files apart that two people's rotations made of the same one, nor one whose serial was set by
    hand; what could not be read without a key of the keyring stays unreadable, so that key is looked for as well.
    """
    journals = {host: facts[host].get("rotations", []) for host in options["hosts"] if answered(facts, host)}
    if older := rotation.older_vault(journals, options.get("vault_serial", 0)):
        return [older]
    entry = rotation.missing_key(journals, options["known_keys"]) if options.get("known_keys") else None
    if entry is None:
        return []
    return [
        f"The vault file here is older than what is in service: it lacks the key {entry.get('new')}, which {entry.get('by', 'somebody')} "
        f"brought in on {entry['at']} (rotation fernet). Get the newest one, from git or from who rotated. If that key was retired by "
        "hand, it belongs in vault_atlas_fernet_escrow."
    ]


def _reachable(facts: Facts, options: Options, fleet: Fleet) -> list[str]:
    found = []
    for names, missing, quorum, variable in (
        (fleet.hosts, fleet.missing, options["quorum"], "deploy_quorum"),
        (fleet.edges, fleet.missing_edges, options["edge_quorum"], "deploy_edge_quorum"),
        ([], [host for host in options["databases"] if not answered(facts, host)], 0, ""),
    ):
        said = [_silence(facts, host, options) for host in missing]
        found += _enough(said, len(names), quorum, variable)
    return found


def _quorum(options: Options, hosts: Sequence[str], said: Sequence[str]) -> list[str]:
    return _enough(said, len(hosts), options["quorum"], "deploy_quorum")


def _enough(said: Sequence[str], count: int, quorum: int, variable: str) -> list[str]:
    if not said or (quorum and count >= quorum):
        return []
    hint = f" To go on without: -e {variable}={count}." if variable and count else ""
    return [f"{text}.{hint if index == len(said) - 1 else ''}" for index, text in enumerate(said)]


def _silence(facts: Facts, host: str, options: Options) -> str:
    fact = facts.get(host, {})
    reason = str(fact.get("msg", "no answer")).strip().splitlines()[-1:] or ["no answer"]
    kind = "cannot be reached" if fact.get("unreachable") else "cannot be looked at"
    why = reason[0].rpartition("Task failed: ")[2].rstrip(".")
    return f"{host} {kind}: {why}. Check: ansible -i {options['inventory']} {host} -m ping"


def _hosts(facts: Facts, options: Options, fleet: Fleet) -> list[str]:
    site = f"ansible-playbook -i {options['inventory']} playbooks/site.yml"
    found = []
    for host in dict.fromkeys([*options["hosts"], *options["edges"], *options["databases"]]):
        if not answered(facts, host):
            continue
        fact = facts[host]
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


def _app_host(host: str, fact: Mapping[str, Any], options: Options, site: str) -> list[str]:
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
    fleet: Fleet,
    leases: Mapping[str, Mapping[str, Any]],
    replaces: Mapping[str, str],
    options: Options,
    cleanup: Mapping[str, Any],
) -> list[str]:
    found = []
    for edge in fleet.edges:
        state = facts[edge]["edge"]
        if state.get("error"):
            found.append(f"{edge}: HAProxy does not run: {state['error']}. See: systemctl status haproxy")
        elif state.get("installed"):
            unknown = [host for host in fleet.hosts if f"be_blue/{host}" not in state["servers"]]
            if unknown:
                site = f"ansible-playbook -i {options['inventory']} playbooks/site.yml"
                found.append(f"{edge}: HAProxy does not know {', '.join(unknown)} yet. Configure it: {site}")
        lease = leases[edge]
        if lease and edge not in replaces:
            found.append(
                f"The lock on {edge} is held by {lease.get('holder')} since {when(lease.get('since', 0))} ({lease.get('reason')}); "
                f"it expires at {when(lease.get('expires', 0))}. Wait, or take it over if that deploy is certainly dead: -e deploy_unlock=true"
            )
    # An edge that no deploy has switched yet, or that was away, is brought in line; one that somebody switched is not.
    meddled = [
        edge for edge in cleanup["astray"] if facts[edge]["edge"].get("switched_by_deploy") and edge not in fleet.owed
    ]
    if meddled and not cleanup["interrupted"] and not options["force"]:
        told = ", ".join(
            f"{edge}: {facts[edge]['edge'].get('memory')} (file: {facts[edge]['edge'].get('file')})"
            for edge in fleet.edges
        )
        found.append(
            f"The edges disagree on the slot in service, and no deploy was under way ({told}); the app hosts serve from "
            f"{fleet.home}. Find out who switched {', '.join(meddled)}; to have all of them follow the app hosts: "
            "-e deploy_force=true"
        )
    return found


def _clocks(facts: Facts, options: Options, now: float) -> list[str]:
    """Return the hosts whose clocks are certainly off.

    A host's clock was read somewhen between ``options.asked_at`` and *now*, by the controller's.
    """
    allowed, asked = options["skew_seconds"], options["asked_at"]
    found = []
    for host in dict.fromkeys([*options["hosts"], *options["edges"], *options["databases"]]):
        clock = facts.get(host, {}).get("clock")
        if clock is None:
            continue
        ahead, behind = float(clock) - now, asked - float(clock)
        if max(ahead, behind) > allowed:
            how = f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
            found.append(
                f"{host}: its clock is {how} this machine's, allowed are {allowed:g} s (deploy_skew_seconds). "
                "Set it right: timedatectl, systemctl restart systemd-timesyncd"
            )
    return found


# Who takes part in which play


def play_hosts(
    name: str, plan_: Mapping[str, Any], failures: Sequence[Mapping[str, Any]], touched: Sequence[str]
) -> list[str]:
    """Return the hosts of the play *name*, given what failed so far and the hosts that were *touched*.

    Phases go on only while nothing has failed. After the first host has finished there is no way back, only forward.
    """
    hosts, edges, cleanup = plan_["hosts"], plan_["edges"], plan_["undo"]
    everyone = list(dict.fromkeys([*edges, *hosts]))
    is_first = plan_["first"]
    go = not failures and bool(hosts)
    failed = {failure["phase"] for failure in failures} & {"migrate", "switch", "verify"}
    silent = {failure["host"] for failure in failures}
    lead = [host for host in plan_["reached"] if host not in silent][:1] or plan_["reached"][:1]
    rolling, watched = plan_["rolling"], plan_["watch_first"]
    table = {
        "lock": edges if plan_["mode"] != "nothing" else [],
        "cleanup_edges": edges if not failures and cleanup["traffic_to"] else [],
        "cleanup_hosts": cleanup["hosts"] if not failures else [],
        "cleanup_lead": lead if not failures and cleanup["interrupted"] and cleanup["number"] is not None else [],
        "renew": plan_["renew"] if go else [],
        "stage": hosts if go and plan_["mode"] in ("deploy", "join") else [],
        "migrate": hosts[:1] if go and plan_["mode"] == "deploy" else [],
        "switch_first": hosts[:1] if go and rolling and watched else [],
        "switch_watch": [*edges, *(host for host in hosts[:1] if host not in edges)]
        if go and rolling and watched
        else [],
        "switch_rolling": (hosts[1:] if watched else hosts) if go and rolling else [],
        "switch_start": hosts if go and not rolling else [],
        # A warm slot has been under the edges' health checks all the time.
        "switch_traffic": everyone if go and not rolling and (not plan_["warm"] or plan_["missing"]) else [],
        "switch_pointer": edges if go and not rolling else [],
        "verify": everyone if go else [],
        "finish": hosts if go else [],
        "finish_edges": edges if go else [],
        "undo_lock": edges if failed else [],
        "undo_edges": edges if failed and touched and not rolling and not is_first else [],
        # The last one first: it is out of rotation, and those before it serve until it is back.
        "undo_hosts": list(reversed(touched)) if failed else [],
        "undo_lead": lead if failed and not is_first else [],
        # One after the other where the slot in service was touched.
        "undo_serial": everyone if rolling or cleanup["interrupted"] else [],
        "unlock": edges if plan_["mode"] != "nothing" else [],
        "result": plan_["reached"][:1],
    }
    return list(table[name])


PLAYS = {
    "lock": ("lock",),
    "stage": ("stage", "renew"),
    "migrate": ("migrate",),
    "switch": ("switch_first", "switch_rolling", "switch_start"),
    "verify": ("verify",),
    "finish": ("finish",),
}
"""The plays of each phase that has hooks."""


def hook_events(events: Sequence[str], plan_: Mapping[str, Any], failures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return those of *events* that happen in this deploy and have hooks."""
    if failures:
        happens = {deploy_hooks.FAILED} if any(failure["phase"] != "finish" for failure in failures) else set()
    else:
        taken = [phase for phase, plays in PLAYS.items() if any(play_hosts(play, plan_, [], []) for play in plays)]
        happens = {f"{side}_{phase}" for phase in taken for side in ("before", "after")}
    return [event for event in events if event in happens and event in plan_["hooks"]]


# For people


def summary(plan_: Mapping[str, Any], options: Options) -> list[str]:
    """Return the plan in a few lines for people."""
    release = plan_["release"]
    numbers = sorted({number for number in plan_["current"].values() if number is not None})
    inside = ", ".join(f"deployment {number}" for number in numbers) or "nothing"
    lines = [
        f"release      {release.get('id')}  ({release.get('path')})",
        f"in service   {inside}" + (f", slot {plan_['old_slot']}" if plan_["old_slot"] else ""),
    ]
    if release.get("unchecked"):
        lines.append(f"settings     are checked on the hosts alone: {release['unchecked']}")
    cleanup = plan_["undo"]
    if cleanup["interrupted"]:
        where = f" on {', '.join(cleanup['hosts'])}" if cleanup["hosts"] else ""
        how = "finish" if cleanup["forward"] else "undo"
        lines.append(f"first        {how} a deploy that did not end{where}")
    elif cleanup["hosts"]:
        lines.append(f"first        bring back into rotation: {', '.join(cleanup['hosts'])}")
    if cleanup["astray"]:
        lines.append(f"first        send traffic of {', '.join(cleanup['astray'])} to slot {cleanup['traffic_to']}")
    for missing in (plan_["missing"], plan_["missing_edges"]):
        if missing:
            lines.append(f"left out     {', '.join(missing)}: owed, the next deploy brings it up to date")
    if plan_["mode"] in ("nothing", "tidy"):
        again = "release, settings and credentials are in service (deploy_force=true deploys them again)"
        return [*lines, f"nothing {'else ' if plan_['mode'] == 'tidy' else ''}to do: {again}"]
    return [*lines, f"deployment   {plan_['number']} on {', '.join(plan_['hosts'])}: {_how(plan_, options)}"]


def _how(plan_: Mapping[str, Any], options: Options) -> str:
    slot = plan_["slot"]
    if plan_["mode"] == "join":
        return f"the others have it; {plan_['batch']} at a time in slot {slot}"
    if plan_["rolling"]:
        return f"{plan_['batch']} at a time in slot {slot}"
    if plan_["warm"]:
        return f"slot {slot} is warm, one switch per edge"
    shares = [f"{step['percent']} %" for step in options["steps"][:-1]]
    canary = f", {', '.join(shares)} of traffic" if shares and is_canary(plan_) else ""
    return f"slot {slot} on all hosts at once{canary}, then one switch per edge"


def is_canary(plan_: Mapping[str, Any]) -> bool:
    """Tell whether a small share of traffic tries the deployment first: a new one, beside one that serves."""
    return plan_["mode"] == "deploy" and not plan_["first"]


def changes(facts: Facts, plan_: Mapping[str, Any]) -> list[str]:
    """Return what a rollback changes, in lines, hosts with equal changes together: release, settings, credentials."""
    found: dict[tuple[str, ...], list[str]] = {}
    for host in plan_["hosts"]:
        found.setdefault(tuple(_changes(facts[host], plan_["current"][host], plan_["number"])), []).append(host)
    lines = []
    for mine, hosts in found.items():
        lines += [f"{', '.join(hosts)}:", *(f"  {line}" for line in mine)]
    return lines


def _changes(fact: Mapping[str, Any], current: int | None, number: int) -> list[str]:
    was, will = (fact["deployments"].get(str(each), {}) for each in (current, number))
    before, after = (fact["settings"].get(str(each), "").splitlines() for each in (current, number))
    diff = difflib.unified_diff(before, after, lineterm="", n=0)
    lines = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
    same = was.get("credentials") and was.get("credentials") == will.get("credentials")
    return [
        f"release      {was.get('release')} -> {will.get('release')}",
        *(f"settings     {line[0]} {line[1:]}" for line in lines or ["  the same"]),
        "credentials  "
        + (
            f"the current ones: those of deployment {number} were revoked"
            if will.get("revoked")
            else "the same"
            if same
            else f"those of deployment {number}"
        ),
    ]
