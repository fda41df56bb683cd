"""Filters of deploys and status: they read the release and the controller, and hand the rest to the pure deploy_plan."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ansible.module_utils

ansible.module_utils.__path__.append(str(Path(__file__).resolve().parent.parent / "module_utils"))

from ansible.module_utils import (  # noqa: E402
    canary,
    deploy_hooks,
    deploy_plan,
    deploy_status,
    release,
    release_pin,
    rotation,
    settings_check,
)
from ansible.module_utils.controller import controller, is_dead, judge  # noqa: E402

PROJECT = Path(__file__).resolve().parents[2]

DOCUMENTATION = """
name: deploy_plan
short_description: What a deploy is to do, from what its hosts say
description: See C(plugins/module_utils/deploy_plan.py).
positional: _input
options:
  _input:
    description: Host to result of atlas_facts.
    type: dict
    required: true
"""


def release_file(
    path: str, allowed_signers: str, directory: str, pin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the release at *path*, checked against its signature; where *path* is empty, the pinned or newest in *directory*.

    *pin*: what the inventory pins, None where any release may be deployed. Comes back with path, id, version, digest, schema
    and error: what is wrong with it, empty if nothing is.
    """
    found: dict[str, Any] = {"path": "", "id": None, "version": None, "digest": None, "error": ""}
    try:
        if pin is not None:
            release_pin.check(pin)
        archive = (
            Path(path) if path else newest(Path(directory)) if pin is None else release_pin.find(Path(directory), pin)
        )
    except release_pin.PinError as error:
        return {**found, "error": str(error)}
    if archive is None:
        return {**found, "error": f"There is no release in {directory}. Build one: make release"}
    found["path"] = path if path else os.path.relpath(archive)
    found["file"] = str(archive.resolve())
    try:
        if not archive.is_file():
            raise release.ReleaseError(
                f"{path}: there is no such release. Build one with: make release, and name it: -e release=FILE"
            )
        signer = release.check_signature(archive, archive.with_name(archive.name + ".sig"), allowed_signers)
        manifest = release.read_manifest(archive)
        digest = release.file_digest(archive)
        version = str(manifest["version"])
        if pin is not None:
            release_pin.check_release(pin, version, digest, signer)
    except (release.ReleaseError, release_pin.PinError, OSError) as error:
        return {**found, "error": str(error)}
    return {
        **found,
        "id": release.release_id(version, digest),
        "version": version,
        "digest": digest,
        "schema": manifest["schema"],
    }


def release_head(path: str) -> str:
    """Return the beginning of the release archive at *path* in base64: all of it but its dependencies, see release_on_host."""
    return base64.b64encode(release.head(Path(path))).decode()


def settings_checked(
    file: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], inventory: str
) -> dict[str, Any]:
    """Return *file*, a result of :func:`release_file`, with what its release says of *settings* (host → atlas_settings).

    ``settings``: what it refuses. ``unchecked``: why it could not be asked on this machine. *inventory*: its directory.
    """
    result: dict[str, Any] = {**file, "settings": [], "unchecked": ""}
    if not file.get("error"):
        try:
            command = settings_check.launcher(Path(file["file"]), file["digest"], PROJECT / ".cache" / "releases")
            result["settings"] = settings_check.findings(
                command, settings, Path(inventory), PROJECT, known_good=settings_check.memory(command)
            )
        except (settings_check.CheckError, subprocess.TimeoutExpired) as error:
            result["unchecked"] = str(error)
    return result


def newest(directory: Path) -> Path | None:
    """Return the release that was built last in *directory*."""
    archives = sorted(directory.glob("atlas-*.tar.gz"), key=lambda path: (path.stat().st_mtime, path.name))
    return archives[-1] if archives else None


def plan(
    facts: deploy_plan.Facts,
    file: Mapping[str, Any],
    options: Mapping[str, Any],
    schema: Mapping[str, Any],
) -> dict[str, Any]:
    """Return :func:`deploy_plan.plan` for this controller and moment. *schema*: result of ``db status``, if it was asked."""
    known = {**options, "applied": {}, "schema_current": None, "schema_error": ""}
    if not schema.get("skipped"):
        try:
            told = json.loads(schema["outputs"][0])
            known |= {"applied": told.get("applied", {}), "schema_current": told.get("current")}
        except (KeyError, IndexError, ValueError):
            known["schema_error"] = str(schema.get("msg", "no answer")).strip()
    return deploy_plan.plan(facts, file, known, controller(), is_dead, time.time())


def play(hostvars: Mapping[str, Mapping[str, Any]] | None, name: str) -> list[str]:
    """Return the hosts of the play *name* of a deploy, by what its plan and what happened so far say.

    All of them where a playbook is only read, not run: there are no variables of hosts then.
    """
    if hostvars is None:
        return ["all"]
    plan_ = _plan(hostvars)
    if plan_ is None:
        return []
    everyone = _takers(hostvars, plan_)
    failures = [variables["__deploy_failure"] for variables in everyone.values() if "__deploy_failure" in variables]
    touched = [host for host in plan_["hosts"] if _touched(everyone[host])]
    if name in ("undo_hosts", "undo_lead") and _taken(hostvars, plan_):
        return []
    return deploy_plan.play_hosts(name, plan_, failures, touched)


def _plan(hostvars: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the plan of this deploy, if it has one by now. All hosts have the same: to look at one of them takes less long."""
    found = (variables for host in hostvars if "__deploy_plan" in (variables := hostvars[host]))
    return next((dict(variables["__deploy_plan"]) for variables in found), None)


def _takers(hostvars: Mapping[str, Mapping[str, Any]], plan_: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the variables of the hosts that *plan_* knows."""
    return {host: hostvars[host] for host in dict.fromkeys([*plan_["edges"], *plan_["hosts"], *plan_["reached"]])}


def hook_events(hostvars: Mapping[str, Mapping[str, Any]] | None, events: Sequence[str]) -> list[str]:
    """Return those of *events* that are due and have hooks, by the plan and what failed so far; none without a plan."""
    plan_ = _plan(hostvars or {})
    # Few have hooks.
    if hostvars is None or plan_ is None or not plan_["hooks"]:
        return []
    everyone = _takers(hostvars, plan_).values()
    failures = [variables["__deploy_failure"] for variables in everyone if "__deploy_failure" in variables]
    return deploy_plan.hook_events(events, plan_, failures)


def hooks_play(hostvars: Mapping[str, Mapping[str, Any]] | None, events: Sequence[str]) -> list[str]:
    """Return the one host whose variables the hooks of *events* are run with, or none; all where a playbook is only read."""
    return play(hostvars, "result") if hostvars is None or hook_events(hostvars, events) else []


def _touched(variables: Mapping[str, Any]) -> bool:
    """Tell whether a deploy has begun to change a host: the first task that does so was not skipped there."""
    results = (variables.get(name) or {"skipped": True} for name in ("__deploy_drained", "__deploy_started"))
    return not all(result.get("skipped") for result in results)


def _taken(hostvars: Mapping[str, Mapping[str, Any]], plan_: Mapping[str, Any]) -> list[str]:
    """Return the edges whose lock another deploy than that of *plan_* has, or has had since."""
    return [edge for edge in plan_["edges"] if (hostvars[edge].get("__deploy_relocked") or {}).get("taken")]


def touched(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Return those of *hosts* that a deploy has begun to change."""
    return [host for host in hosts if _touched(hostvars[host])]


def all_well(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], name: str) -> bool:
    """Tell whether the result *name* of every one of *hosts* is there, and neither failed nor unreachable nor skipped."""
    return len(returned({host: hostvars[host].get(name) or {} for host in hosts})) == len(hosts)


def batch(hostvars: Mapping[str, Mapping[str, Any]] | None) -> int:
    """Return how many hosts a rolling deploy takes at a time."""
    plan_ = _plan(hostvars or {})
    return int(plan_["batch"]) if plan_ else 1


def verdict(
    hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], limits: Mapping[str, float]
) -> dict[str, Any]:
    """Return :func:`canary.verdict` on what *hosts* have just watched, with its figures in words for people."""
    everyone = {host: hostvars[host] for host in hosts}
    plan_ = next(variables["__deploy_plan"] for variables in everyone.values() if "__deploy_plan" in variables)
    watched = {host: variables.get("__deploy_watched") or {} for host, variables in everyone.items()}
    before = _before(hostvars, plan_)
    found = canary.verdict(watched, before, (plan_["number"], plan_["old_number"]), limits)
    return {**found, "told": canary.told(found)}


def _before(hostvars: Mapping[str, Mapping[str, Any]], plan_: Mapping[str, Any]) -> dict[str, Any]:
    """Return edge → how the old deployment did there since preflight, as it was seen before the switch, the later the better."""
    found: dict[str, Any] = {}
    for host in dict.fromkeys([*plan_["edges"], *plan_["hosts"][:1]]):
        # Prepared on each edge, or drained from the first host on each edge in turn.
        drained = (hostvars[host].get("__deploy_drained") or {}).get("results") or []
        seen = [hostvars[host].get(name) or {} for name in ("__deploy_switched", "__deploy_prepared")]
        results = [next((result for result in seen if result.get("old")), {}), *drained]
        found |= {f"{host} {index}": result["old"] for index, result in enumerate(results) if result.get("old")}
    return found


def changes(facts: deploy_plan.Facts, plan_: Mapping[str, Any]) -> list[str]:
    """Return :func:`deploy_plan.changes`."""
    return deploy_plan.changes(facts, plan_)


def status(
    facts: deploy_plan.Facts,
    hosts: Sequence[str],
    edges: Sequence[str],
    pin: Mapping[str, Any] | None = None,
    policy: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return :func:`deploy_status.status`, and what is to be said of the rotation of secrets."""
    state = deploy_status.status(facts, hosts, edges, pin)
    app = {host: facts.get(host, {}) for host in hosts}
    return {**state, "secrets": deploy_status.rotations(app, policy or {}, time.time())}


def older_vault(facts: Iterable[Mapping[str, Any]], serial: int | str) -> str:
    """Return :func:`rotation.older_vault` for the *facts* of the hosts that have any, "" where nothing is wrong."""
    journals = {str(index): fact.get("rotations", []) for index, fact in enumerate(facts)}
    return rotation.older_vault(journals, int(serial)) or ""


def locks(facts: deploy_plan.Facts) -> list[str]:
    """Return :func:`deploy_status.locks` as this controller and moment see it."""
    return deploy_status.locks(facts, judge, time.time())


def returned(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the hosts whose result of an undo (atlas_slot) says that it was done."""
    bad = ("failed", "unreachable", "skipped")
    return [host for host, result in results.items() if result and not any(result.get(key) for key in bad)]


class FilterModule:
    """Ansible's entry point to the filters above."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "release_file": release_file,
            "release_head": release_head,
            "settings_checked": settings_checked,
            "deploy_plan": plan,
            "deploy_asks_schema": deploy_plan.asks_schema,
            "deploy_summary": deploy_plan.summary,
            "deploy_changes": changes,
            "deploy_play": play,
            "deploy_batch": batch,
            "deploy_hook_events": hook_events,
            "deploy_hooks_play": hooks_play,
            "deploy_told": deploy_hooks.told,
            "deploy_touched": touched,
            "deploy_all_well": all_well,
            "deploy_verdict": verdict,
            "deploy_status": status,
            "deploy_returned": returned,
            "deploy_table": deploy_status.table,
            "deploy_locks": locks,
            "deploy_older_vault": older_vault,
        }
