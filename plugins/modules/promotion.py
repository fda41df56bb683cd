#!/usr/bin/python
"""Module promotion: pins in one environment the release that is in service in another, if every gate lets it pass."""

from __future__ import annotations

DOCUMENTATION = r"""
module: promotion
short_description: Promote a release to the next environment
description:
  - Reads both inventories, each in a process of its own, and looks at their hosts; fetches the archive in service from a host of
    the source, verifies it, and has it check the target's settings.
  - Tells all that speaks against the promotion at once. Otherwise writes the target's C(group_vars/all/release.yml), and nothing else.
options:
  source:
    description: The environment whose release is promoted, or a directory with environment.yml.
    type: str
    default: ""
  release:
    description:
      - Instead of O(source), the archive of a release, to a lab alone. For a rehearsal; only the gates that the target decides are looked at.
    type: path
    default: ""
  target:
    description: The environment that gets it.
    type: str
    required: true
  project:
    description: Directory of this project.
    type: path
    required: true
  override:
    description: Gates that do not stop this promotion.
    type: list
    elements: str
    default: []
  reason:
    description: Why not. The pin keeps it.
    type: str
    default: ""
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Promote
  promotion:
    source: staging
    target: production
    project: "{{ playbook_dir | dirname }}"
"""

RETURN = r"""
lines:
  description: What the promotion changes, and what comes next.
  type: list
  returned: success
inventory:
  description: The target's inventory.
  type: str
  returned: success
pin:
  description: The pin as it was written.
  type: dict
  returned: success
"""

import getpass
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils import promotion_plan, release, release_pin, settings_check, survey
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.labs import write_file

ARCHIVES = Path("dist/pinned")
SIGNERS = Path(".keys/allowed_signers")
COMMITS = 50
DEFAULTS = {"from": "", "soak_hours": 24, "error_percent": 0.1, "requests": 100, "restarts": 0}


def read(names: list[str], project: Path) -> Sequence[dict[str, Any]]:
    """Return the surveys of source and target, or of the target alone, with what a promotion asks of their variables."""
    surveys: Sequence[dict[str, Any]] = (
        survey.both(names, project, archives=project / ARCHIVES)
        if len(names) == 2
        else [survey.take(survey.directory(name, project), project) for name in names]
    )
    for each in surveys:
        each["lab"] = (Path(each["inventory"]).parent / "lab.json").is_file()
        variables = next(iter(each["variables"].values()))
        each["pin"] = variables.get("release_pin") or {}
        each["freeze_windows"] = variables.get("deploy_freeze_windows") or []
        each["limits"] = {key: variables.get(f"promotion_{key}", value) for key, value in DEFAULTS.items()}
        signers = project / SIGNERS
        each["signers"] = variables.get("deploy_allowed_signers") or (signers.read_text() if signers.is_file() else "")
    return surveys


def release_in(file: Path) -> dict[str, Any]:
    """Return what :func:`promotion_plan.source_release` tells of a release in service, of the one in *file*. Raises Refused."""
    try:
        version, digest = str(release.read_manifest(file)["version"]), release.file_digest(file)
    except (release.ReleaseError, OSError) as error:
        raise Refused(f"Nothing was changed. {error}") from None
    name = release.release_id(version, digest)
    return {"deployment": None, "id": name, "version": version, "digest": digest, "since": None, "file": file}


def archive_of(found: Mapping[str, Any], project: Path, signers: str) -> dict[str, Any]:
    """Return what the archive of the release *found* says: file, signer, schema, commit, components, and error."""
    told: dict[str, Any] = {"file": None, "signer": None, "schema": {}, "commit": None, "components": {}, "error": ""}
    fetched = project / ARCHIVES / f"{found['id']}.tar.gz"
    try:
        if fetched.is_file() and release.file_digest(fetched) != found["digest"]:
            fetched.unlink()
            # Or the next survey would not fetch it again.
            fetched.with_name(f"{fetched.name}.sig").unlink(missing_ok=True)
            told["error"] = (
                f"The archive that a host keeps is not {found['id']}: its digest is another. Do not trust that host."
            )
            return told
        told["file"] = file = found.get("file") or release_pin.find(project / "dist", found)
        manifest = release.check_contents(file)
        told |= {"schema": manifest["schema"], "commit": manifest.get("commit")}
        told["signer"] = release.check_signature(file, file.with_name(file.name + ".sig"), signers)
        sbom = next((member.content for member in release.members(file) if member.path == release.SBOM), b"{}")
        told["components"] = survey.components(json.loads(sbom))
    except (release.ReleaseError, release_pin.PinError, OSError) as error:
        told["error"] = str(error)
    return told


def refused_settings(found: Mapping[str, Any], target: Mapping[str, Any], project: Path) -> list[str]:
    """Return what the release *found* refuses of the settings of *target*, or why it cannot be asked."""
    if not found.get("file") or found["error"]:
        return []  # which is another gate's business
    settings = {host: target["variables"][host]["atlas_settings"] for host in target["hosts"]}
    try:
        command = settings_check.launcher(found["file"], found["digest"], project / ".cache" / "releases")
        return settings_check.findings(command, settings, Path(target["inventory"]), project)
    except (settings_check.CheckError, subprocess.TimeoutExpired) as error:
        return [f"The release cannot be asked on this machine: {error}"]


def commits(before: Mapping[str, Any], found: Mapping[str, Any], project: Path) -> list[str]:
    """Return the commits from the release in service in the target to the one *found*, newest first."""
    old, new = (before["manifest"] or {}).get("commit"), found["commit"]
    if not old or not new or old == new:
        return []
    command = ["git", "-c", "safe.directory=*", "-C", str(project), "log", "--no-decorate", "--oneline", f"-{COMMITS}"]
    done = subprocess.run([*command, f"{old}..{new}", "--", "app", "bin"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def present(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return id, manifest and components of what is in service in *target*."""
    found = promotion_plan.source_release(target)
    return {"id": found["id"], "manifest": target["manifest"], "components": target["components"]}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "default": ""},
            "release": {"type": "path", "default": ""},
            "target": {"type": "str", "required": True},
            "project": {"type": "path", "required": True},
            "override": {"type": "list", "elements": "str", "default": []},
            "reason": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    if bool(params["source"]) == bool(params["release"]) or not params["target"]:
        module.fail_json(msg="Which release goes where? -e from=ENVIRONMENT -e to=ENVIRONMENT")
    try:
        module.exit_json(**promote(params, module.check_mode))
    except (survey.SurveyError, Refused) as error:
        module.fail_json(msg=str(error))


class Refused(Exception):
    """The promotion does not pass; the message has everything that speaks against it."""


def promote(params: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Decide, and write the pin unless this is a *check*; return the module's result."""
    project, now = Path(params["project"]), time.time()
    source: dict[str, Any] | None = None
    if params.get("release"):
        found = release_in(Path(params["release"]).resolve())
        (target,) = read([params["target"]], project)
    else:
        source, target = read([params["source"], params["target"]], project)
        found = promotion_plan.source_release(source)
    if found["id"]:
        found |= archive_of(found, project, target["signers"])
    settings = refused_settings(found, target, project)
    against = promotion_plan.findings(source, target, found, settings, now)
    refused = promotion_plan.refusals(source, target, params["override"], params["reason"])
    if not found.get("signer") and {"digest", "signature"} & set(params["override"]):
        refused.append("No override pins a release without a good signature: every host would refuse it.")
    decided = promotion_plan.decide(against, refused, params["override"], params["reason"])
    if decided["stops"]:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(decided["stops"], 1))
        raise Refused(f"Nothing was changed. Against this promotion speaks:\n{listed}")
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    pin = promotion_plan.pin(source, target, found, decided["overridden"], who, now)
    place = Path(target["inventory"]) / release_pin.PLACE
    before, after = place.read_text() if place.is_file() else "", release_pin.text(pin)
    changed = pin != target["pin"]
    if changed and not check:
        write_file(place, after)
    shown = os.path.relpath(place, project)
    lines = promotion_plan.changes(target, found, present(target), commits(target, found, project))
    lines += promotion_plan.notes(source, found) if source else []
    lines += [f"overridden    {gate}: {why}" for gate, why in decided["overridden"].items()]
    if not changed:
        lines.append(f"{target['environment']} pins it already: {shown} is unchanged.")
    else:
        lines.append(f"{shown} {'would be' if check else 'is'} written. Review it, commit it, then deploy it:")
    deploy = f"ansible-playbook -i {os.path.relpath(target['inventory'], project)} playbooks/deploy.yml"
    result = {"changed": changed, "pin": pin, "inventory": target["inventory"], "lines": [*lines, f"  {deploy}"]}
    return result | {"diff": {"before_header": shown, "after_header": shown, "before": before, "after": after}}


if __name__ == "__main__":
    main()
