"""Filters of survey.yml: they gather what one inventory says and what its hosts said, without a secret."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ansible.module_utils

ansible.module_utils.__path__.append(str(Path(__file__).resolve().parent.parent / "module_utils"))

from ansible.module_utils import survey as core  # noqa: E402
from ansible.module_utils.deploy_plan import Fleet  # noqa: E402

DOCUMENTATION = """
name: survey
short_description: What an inventory says and what is in service there
description: See C(plugins/module_utils/survey.py).
positional: _input
options:
  _input:
    description: The variables of all hosts.
    type: dict
    required: true
"""


def host(hostvars: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """Return an app host that serves what is in service, as a list of one; none where nobody looked or nothing serves."""
    if hostvars is None:
        return ["all"]
    facts, hosts, edges = _looked(hostvars)
    fleet = Fleet(facts, {"hosts": hosts, "edges": edges})
    serving = [name for name, number in fleet.current.items() if number is not None and number == fleet.number]
    return serving[:1]


def gathered(hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the survey that promote.yml and config_diff.yml read: see :data:`core.KEYS`."""
    facts, hosts, edges = _looked(hostvars)
    variables = {name: hostvars[name].get("__survey_variables") or {} for name in hostvars if name != "localhost"}
    anyone = variables[(hosts or list(variables))[0]]
    lead = hostvars[host(hostvars)[0]] if host(hostvars) else {}
    parts = [_slurped(item) for item in (lead.get("__survey_parts") or {}).get("results", [])] or [{}, {}]
    return {
        "environment": anyone.get("deploy_environment"),
        "hosts": hosts,
        "edges": edges,
        "groups": {name: list(members) for name, members in groups.items() if name not in ("all", "ungrouped")},
        "addresses": {name: str(hostvars[name].get("ansible_host", name)) for name in variables},
        "variables": variables,
        "facts": facts,
        "schema": _schema(lead.get("__survey_schema")),
        "manifest": parts[0],
        "components": core.components(parts[1]),
    }


def _looked(hostvars: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str], list[str]]:
    for name in hostvars:
        found = hostvars[name].get("__survey_variables")
        if found:
            hosts, edges = list(found["deploy_hosts"]), list(found["deploy_edges"])
            looked = {each: hostvars[each].get("__survey_facts") or {} for each in dict.fromkeys([*hosts, *edges])}
            return {each: {} if fact.get("skipped") else fact for each, fact in looked.items()}, hosts, edges
    return {}, [], []


def _slurped(result: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(base64.b64decode(result["content"]))
    except (KeyError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _schema(result: Mapping[str, Any] | None) -> dict[str, Any]:
    if not result:
        return {}
    try:
        return {"applied": json.loads(result["outputs"][0]).get("applied", {})}
    except (KeyError, IndexError, ValueError):
        return {"error": str(result.get("msg", "no answer")).strip()}


class FilterModule:
    """Ansible's entry point to the filters above."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"survey": gathered, "survey_host": host, "survey_masked": core.masked}
