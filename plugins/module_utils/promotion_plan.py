"""What a promotion is to do: which gates keep a release from the next environment, what changes there, and the new pin.

Pure: two surveys (``playbooks/survey.yml``), the release and the moment come in, nothing is read or changed.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ansible.module_utils import freeze, release_pin
from ansible.module_utils.deploy_plan import Facts, Fleet, answered, when
from ansible.module_utils.deploy_status import status

GATES = {
    "digest": "every app host of the source has the same release in service",
    "signature": "the release is signed by whom the target allows",
    "soak": "it has been in service for promotion_soak_hours",
    "health": "every host of the source is as it should be, and its services fared well throughout the soak",
    "errors": "no more of its requests failed than promotion_error_percent",
    "schema": "its migrations fit the target's database",
    "settings": "it accepts the target's settings",
    "freeze": "the target is not frozen",
}
OF_SOURCE = ("digest", "soak", "health", "errors")
"""Gates that judge how the source fares; the others judge whether the release fits the target."""
Finding = tuple[str, str]


def source_release(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return deployment, id, version, digest and since (Unix time, or None) of what most app hosts of *source* serve.

    *since*: the last host's moment from which on it served this release, other deployments of the same bytes included.
    """
    facts: Facts = source["facts"]
    fleet = Fleet(facts, source)
    serving = [host for host in fleet.hosts if fleet.current[host] == fleet.number and fleet.number is not None]
    if not serving:
        return {"deployment": None, "id": None, "version": None, "digest": None, "since": None}
    content = facts[serving[0]]["deployments"].get(str(fleet.number), {})
    moments = [_since(facts[host]["journal"], content.get("release")) for host in serving]
    known = [moment for moment in moments if moment is not None]
    return {
        "deployment": fleet.number,
        "id": content.get("release"),
        "version": content.get("version"),
        "digest": content.get("digest"),
        "since": max(known) if len(known) == len(moments) else None,
    }


def _since(journal: Sequence[Mapping[str, Any]], name: str | None) -> float | None:
    """Return the Unix time of the oldest of the last *finished* entries in a row that are of the release *name*."""
    found = None
    for entry in reversed(journal):
        if entry.get("event") != "finished" or entry.get("outcome", "ok") != "ok":
            continue
        if entry.get("release") != name:
            break
        found = _unix(entry["at"])
    return found


def _unix(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp()


class Serving(NamedTuple):
    """A deployment that served in *slot*, *since* and *until* (Unix time; infinity for now)."""

    number: int
    slot: str
    since: float
    until: float


def servings(journal: Sequence[Mapping[str, Any]], name: str | None) -> list[Serving]:
    """Return the deployments by which the release *name* serves without another release between, oldest first.

    Each counts from when its services were started. A rolling deploy stops them in their place; they serve again if it is undone.
    """
    found: list[Serving] = []
    begun: dict[tuple[Any, Any], float] = {}
    for entry in journal:
        event, number, slot = entry.get("event"), entry.get("deployment"), entry.get("slot")
        last = found[-1] if found else None
        ended = _unix(entry["at"]) if event in ("started", "engaged", "undone", "finished") else 0.0
        if event in ("started", "engaged"):
            begun[number, slot] = ended - float(entry.get("seconds", 0))
            if last and last.slot == slot and last.number != number:
                found[-1] = last._replace(until=min(last.until, begun[number, slot]))
        elif event == "undone" and last and last.until < math.inf and last.number == entry.get("back_to"):
            found.append(last._replace(since=ended, until=math.inf))
        elif event == "finished" and entry.get("outcome", "ok") == "ok":
            if last:
                found[-1] = last._replace(until=min(last.until, ended))
            again = Serving(int(number or 0), str(slot), begun.get((number, slot), ended), math.inf)
            found = [*found, again] if entry.get("release") == name else []
    return found


def refusals(
    source: Mapping[str, Any] | None, target: Mapping[str, Any], override: Sequence[str], reason: str
) -> list[str]:
    """Return why this is no promotion at all: no gate, and nothing to override. *source*: None for a release from a file."""
    found = []
    allowed = target["limits"]["from"]
    if source is None:
        if not target["lab"]:
            found.append(
                f"{target['environment']} is no lab: it takes no release from a file, only what serves in {allowed or 'another environment'}, "
                "so that it has proved itself there. Promote that: -e from=ENVIRONMENT"
            )
    elif not allowed:
        found.append(f"Nothing is promoted to {target['environment']}: its inventory sets no promotion_from.")
    elif source["environment"] != allowed:
        found.append(
            f"{target['environment']} takes releases from {allowed} alone (promotion_from), and {source['environment']} is "
            f"another: no environment is skipped. Promote to {allowed} first."
        )
    unknown = [name for name in override if name not in GATES]
    if unknown:
        found.append(f"There is no gate {', '.join(unknown)}; the gates are {', '.join(GATES)}.")
    if override and not reason.strip():
        found.append("A gate is overridden with a reason, which the pin keeps: -e override=GATE -e reason='…'")
    return found


def findings(
    source: Mapping[str, Any] | None,
    target: Mapping[str, Any],
    release: Mapping[str, Any],
    settings: Sequence[str],
    now: float,
) -> list[Finding]:
    """Return all that speaks against promoting *release* from *source* to *target*, each with the gate it belongs to.

    *release*: result of :func:`source_release` with what the archive says: error, signer, schema. *settings*: what it refuses
    of the target's settings. Without *source*, for a release from a file, the gates OF_SOURCE are not looked at.
    """
    if source is not None and release["id"] is None:
        return [("digest", f"No release is in service in {source['environment']}. Deploy one there first.")]
    return [
        *(_digest(source, release) if source is not None else []),
        *([("signature", str(release["error"]))] if release.get("error") else []),
        *(_fares(source, target, release, now) if source is not None else []),
        *_schema(target, release),
        *(("settings", text) for text in settings),
        *(("freeze", text) for text in _frozen(target, now)),
    ]


def _fares(
    source: Mapping[str, Any], target: Mapping[str, Any], release: Mapping[str, Any], now: float
) -> list[Finding]:
    return [
        *_soak(source, target, release, now),
        *_health(source),
        *_fared(source, target, release),
        *_errors(source, target, release),
    ]


def _digest(source: Mapping[str, Any], release: Mapping[str, Any]) -> list[Finding]:
    facts: Facts = source["facts"]
    found = []
    for host in source["hosts"]:
        if not answered(facts, host):
            found.append(f"{host} does not answer: what it serves is not known.")
        elif facts[host]["digest"] != release["digest"]:
            slot = facts[host]["slot"]
            number = facts[host]["slots"].get(slot) if slot else None
            other = facts[host]["deployments"].get(str(number), {}).get("release")
            found.append(f"{host} serves {other or 'nothing'}, the others {release['id']}.")
    return [("digest", text) for text in found]


def _soak(
    source: Mapping[str, Any], target: Mapping[str, Any], release: Mapping[str, Any], now: float
) -> list[Finding]:
    wanted = float(target["limits"]["soak_hours"])
    if release["since"] is None:
        text = (
            f"Since when {release['id']} serves in {source['environment']} is in no journal; {wanted:g} h are required."
        )
        return [("soak", text)] if wanted else []
    hours = max(0.0, (now - release["since"]) / 3600)
    if hours >= wanted:
        return []
    text = (
        f"{release['id']} has been in service in {source['environment']} for {hours:.1f} h, {wanted:g} h are required "
        "(promotion_soak_hours)."
    )
    return [("soak", text)]


def _health(source: Mapping[str, Any]) -> list[Finding]:
    """Judge the hosts as they are at this moment."""
    state = status(source["facts"], source["hosts"], source["edges"])
    found = []
    for host, row in {**state["app"], **state["edge"]}.items():
        if not row["reachable"]:
            found.append(f"{host} does not answer.")
            continue
        found += [f"{host}: {text}." for text in row["drift"]]
        if row["owed"]:
            found.append(f"{host} is owed deployment {row['owed'].get('deployment')}.")
        if row.get("ready") is False:
            found.append(f"{host} is not ready.")
    return [("health", text) for text in found]


def _fared(source: Mapping[str, Any], target: Mapping[str, Any], release: Mapping[str, Any]) -> list[Finding]:
    """Judge how the services fared since the release is in service, by what systemd's journal on each host knows of that time."""
    found = []
    restarts, percent = int(target["limits"]["restarts"]), float(target["limits"]["error_percent"])
    for host in (host for host in source["hosts"] if answered(source["facts"], host)):
        fact = source["facts"][host]
        served, known = _known(fact, release)
        judged = max(served[0].since, fact["clock"] - 3600 * float(target["limits"]["soak_hours"]))
        unknown = f"so how the services fared since {when(judged)} is not known"
        if known is None:
            why = fact["troubles"]["error"]
            found.append(f"{host}: systemd's journal cannot be read, {unknown}. Look there, with journalctl: {why}")
            continue
        if known > judged:
            reach = f"reaches back to {when(known)} only, {unknown} (base_journal_retention, base_journal_max_use)"
            found.append(f"{host}: systemd's journal {reach}.")
        counted = Counter(unit.split("@")[0] for unit, _ in _within(served, fact["troubles"]["restarts"]))
        found += [
            f"{host}: {unit} restarted by itself {'once' if count == 1 else f'{count} times'} since {when(max(known, served[0].since))}."
            for unit, count in sorted(counted.items())
            if count > restarts
        ]
        bad = len({int(at // 60) for _, at in _within(served, fact["troubles"]["complaints"])})
        spans = [min(each.until, fact["clock"]) - max(each.since, known) for each in served]
        minutes = max(1.0, sum(max(0.0, span) for span in spans) / 60)
        if 100 * bad / minutes > percent:
            found.append(
                f"{host}: in {bad} of its {minutes:.0f} minutes in service a probe did not come through, or the store did not "
                f"answer (atlas-monitoring says which); {percent:g} % are allowed."
            )
    return [("health", text) for text in found]


def _known(fact: Mapping[str, Any], release: Mapping[str, Any]) -> tuple[list[Serving], float | None]:
    """Return when *release* served on a host, and since when (Unix time) its journal knows how; None for never.

    Where no entry of a deploy tells, whatever the slot in service did is put down to it.
    """
    served = servings(fact["journal"], release["id"]) or [Serving(0, str(fact["slot"]), 0.0, math.inf)]
    return served, fact["troubles"]["since"]


def _within(served: Sequence[Serving], pairs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return those of *pairs* (unit, Unix time) that are of a slot while it served."""
    return [
        (unit, at)
        for unit, at in pairs
        if any(f"@{each.slot}." in unit and each.since <= at <= each.until for each in served)
    ]


def notes(source: Mapping[str, Any], release: Mapping[str, Any]) -> list[str]:
    """Return what was judged only in part and stops nothing, in lines: a journal that covers the soak, and not all of the service."""
    lines = []
    for host in (host for host in source["hosts"] if answered(source["facts"], host)):
        served, known = _known(source["facts"][host], release)
        if known is not None and known > served[0].since:
            lines.append(
                f"health        of {host} is known since {when(known)}: systemd's journal there goes no further back"
            )
    return lines


def _errors(source: Mapping[str, Any], target: Mapping[str, Any], release: Mapping[str, Any]) -> list[Finding]:
    """Judge what its services answered, those of its earlier deployments since it is in service included."""
    counted = []
    for fact in (source["facts"].get(host, {}) for host in source["hosts"]):
        before = [
            entry for entry in fact.get("journal", []) if (entry.get("served") or {}).get("release") == release["id"]
        ]
        counted += [entry["served"] for entry in before if _unix(entry["at"]) >= (release["since"] or 0)]
        counted.append(fact.get("requests") or {})
    total, failed = (sum(int(each.get(key, 0)) for each in counted) for key in ("total", "failed"))
    least, percent = int(target["limits"]["requests"]), float(target["limits"]["error_percent"])
    if total < least:
        return [
            ("errors", f"It answered {total} requests, {least} are required before they tell (promotion_requests).")
        ]
    if total and 100 * failed / total > percent:
        share = f"{100 * failed / total:.2f} %"
        return [("errors", f"{failed} of its {total} requests failed, {share}; {percent:g} % are allowed.")]
    return []


def _schema(target: Mapping[str, Any], release: Mapping[str, Any]) -> list[Finding]:
    """Compare the revisions in the target's database with those that the release knows; there is none before a first deploy."""
    if target["schema"].get("error"):
        return [("schema", f"The database of {target['environment']} cannot be asked: {target['schema']['error']}")]
    applied: Mapping[str, str] = target["schema"].get("applied") or {}
    mine = (release.get("schema") or {}).get("revisions", [])
    unknown = [revision for revision in applied if revision not in mine]
    gone = [revision for revision in unknown if applied[revision] == "contract"]
    where = f"the database of {target['environment']}"
    if gone:
        text = f"{where} has the contract revision {', '.join(gone)}, without which {release['id']} was built: it cannot serve."
        return [("schema", text[0].upper() + text[1:])]
    pending = pending_revisions(target, release)
    if unknown and pending:
        return [
            (
                "schema",
                f"The histories have parted: {where} has {', '.join(unknown)}, which {release['id']} does not know, and lacks "
                f"{', '.join(pending)}.",
            )
        ]
    return []


def pending_revisions(target: Mapping[str, Any], release: Mapping[str, Any]) -> list[str]:
    """Return the revisions that a deploy of *release* would apply in *target*."""
    applied = target["schema"].get("applied") or {}
    return [revision for revision in (release.get("schema") or {}).get("revisions", []) if revision not in applied]


def _frozen(target: Mapping[str, Any], now: float) -> list[str]:
    return freeze.in_force(target["freeze_windows"], now)


def decide(
    found: Sequence[Finding],
    refused: Sequence[str],
    override: Sequence[str],
    reason: str,
) -> dict[str, Any]:
    """Return what stops the promotion (stops), and gate → reason of what does not (overridden)."""
    stops = [*refused]
    overridden = {}
    for gate, text in found:
        if gate in override and not refused:
            overridden[gate] = reason.strip()
        else:
            stops.append(f"{gate}: {text}")
    return {"stops": list(dict.fromkeys(stops)), "overridden": overridden}


def pin(
    source: Mapping[str, Any] | None,
    target: Mapping[str, Any],
    release: Mapping[str, Any],
    overridden: Mapping[str, str],
    who: str,
    now: float,
) -> dict[str, Any]:
    """Return the target's new pin: the present one where it names this release already. *source*: None for a file's release."""
    wanted = {key: release[key] for key in ("version", "digest", "signer")}
    present = target["pin"]
    if all(present.get(key) == value for key, value in wanted.items()):
        return dict(present)
    hours = None if release["since"] is None else round((now - release["since"]) / 3600, 1)
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {"from": source["environment"] if source else "a file", "at": moment, "by": who, "in_service_hours": hours}
    if release.get("commit"):
        told["commit"] = release["commit"]
    if overridden:
        told["overridden"] = dict(overridden)
    return {**wanted, "promoted": told}


def changes(
    target: Mapping[str, Any], release: Mapping[str, Any], before: Mapping[str, Any], commits: Sequence[str]
) -> list[str]:
    """Return what the promotion changes in *target*, in lines.

    *before*: manifest and components (of the SBOM) of what is in service there, empty for nothing. *commits*: one line each.
    """
    old = (before.get("manifest") or {}).get("version")
    lines = [f"release       {before.get('id') or 'nothing'} -> {release['id']}"]
    if old or commits:
        lines += [f"commit        {line}" for line in commits] or ["commit        the same, or not known here"]
    pending = pending_revisions(target, release)
    lines.append(f"schema        {'new revisions: ' + ', '.join(pending) if pending else 'the same'}")
    packages = dependency_changes(before.get("components") or {}, release.get("components") or {})
    lines += [f"dependency    {line}" for line in packages] if before.get("id") else []
    return lines


def dependency_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the differences between two bills of materials (name → version)."""
    found = [f"{name} {old[name]} -> {new[name]}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    found += [f"{name} {new[name]} is new" for name in sorted(new.keys() - old.keys())]
    return found + [f"{name} {old[name]} is gone" for name in sorted(old.keys() - new.keys())] or ["the same"]


def pinned(target: Mapping[str, Any]) -> str:
    """Return the ID of the release that *target* pins, or ``nothing``."""
    return release_pin.name(target["pin"]) if target["pin"] else "nothing"
