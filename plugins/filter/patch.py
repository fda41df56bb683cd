"""Filters of patch.yml: they hand what the hosts said to the pure patch_plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ansible.module_utils

ansible.module_utils.__path__.append(str(Path(__file__).resolve().parent.parent / "module_utils"))

from ansible.module_utils import patch_plan, retire_plan  # noqa: E402
from ansible.module_utils.controller import controller, is_dead  # noqa: E402

DOCUMENTATION = """
name: patch_plan
short_description: What a patch run is to do, from what its hosts say
description: See C(plugins/module_utils/patch_plan.py).
positional: _input
options:
  _input:
    description: Host to result of host_packages.
    type: dict
    required: true
"""


def plan(looked: patch_plan.Facts, facts: patch_plan.Facts, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`patch_plan.plan` for this controller and moment."""
    return patch_plan.plan(looked, facts, options, controller(), is_dead, time.time())


def play(hostvars: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """Return the hosts to patch, in their order; all where a playbook is only read, not run."""
    if hostvars is None:
        return ["all"]
    plans = (hostvars[host]["__patch_plan"] for host in hostvars if "__patch_plan" in hostvars[host])
    return list(next(plans, {"order": []})["order"])


def retire(facts: patch_plan.Facts, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`retire_plan.plan` for this controller and moment."""
    return retire_plan.plan(facts, options, controller(), is_dead, time.time())


def retire_play(hostvars: Mapping[str, Mapping[str, Any]] | None, name: str) -> list[str]:
    """Return the hosts of the play *name* of retire.yml: ``edges``, ``locks`` or ``host``; all where it is only read."""
    if hostvars is None:
        return ["all"]
    plans = (hostvars[host]["__retire_plan"] for host in hostvars if "__retire_plan" in hostvars[host])
    plan_: Mapping[str, Any] = next(plans, {})
    if name == "host":
        return [plan_["host"]] if plan_.get("reachable") else []
    return list(plan_.get(name, []))


class FilterModule:
    """Ansible's entry point to the filters above."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "patch_plan": plan,
            "patch_summary": patch_plan.summary,
            "patch_play": play,
            "patch_result": patch_plan.result,
            "retire_plan": retire,
            "retire_play": retire_play,
            "retire_farewell": retire_plan.farewell,
        }
