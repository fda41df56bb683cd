"""Filters that show backups to people; what they say is decided in module_utils/backup_core.py."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ansible.module_utils

_UTILITIES = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILITIES not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILITIES)

from ansible.module_utils import backup_core  # noqa: E402
from ansible.module_utils.controller import controller, is_dead  # noqa: E402

DOCUMENTATION = """
name: backup_table
short_description: The report of the backup host as a table
description: See C(plugins/module_utils/backup_core.py).
positional: _input, now
options:
  _input:
    description: The report.
    type: dict
    required: true
  now:
    description: Seconds since the Unix epoch.
    type: float
    required: true
"""


def backup_table(report: Mapping[str, Any], now: float) -> str:
    """Return the report as a table, and under it what needs a person."""
    lines = [backup_core.table(report, now), *(f"! {line}" for line in backup_core.problems(report, now))]
    return "\n".join(lines)


def backup_tried(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], name: str) -> list[str]:
    """Return those of *hosts* on which the step that registered *name* was tried, whatever came of it."""
    found = {host: hostvars[host].get(name) for host in hosts}
    return [host for host, result in found.items() if result and not result.get("skipped")]


def backup_stuck(hostvars: Mapping[str, Mapping[str, Any]], targets: Sequence[str]) -> list[str]:
    """Return those of *targets* whose store was replaced, as far as is known, and could not be put back."""
    return backup_failed(hostvars, backup_tried(hostvars, targets, "__backup_replaced"), "__backup_undone")


def backup_failed(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], name: str) -> list[str]:
    """Return those of *hosts* on which the step that registered *name* failed, or that did not answer it."""
    found = {host: hostvars[host].get(name) or {} for host in hosts}
    return [host for host, result in found.items() if result.get("unreachable") or result.get("failed")]


def backup_lock(leases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return who this controller is for a lock (holder, process), and edge → deploy whose lock it *replaces*: it is certainly dead.

    *leases*: results of reading ``lease.json``, with the edge as item.
    """
    found = {str(each["item"]): _lease(each) for each in leases}
    replaces = {edge: lease["deploy"] for edge, lease in found.items() if is_dead(str(lease.get("process", "")))}
    return {**controller(), "replaces": replaces}


def _lease(slurped: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(base64.b64decode(slurped["content"])))
    except (KeyError, ValueError, TypeError):
        return {}


class FilterModule:
    """Names the filters."""

    def filters(self) -> dict[str, Any]:
        """Return name → filter."""
        return {
            "backup_failed": backup_failed,
            "backup_lock": backup_lock,
            "backup_stuck": backup_stuck,
            "backup_table": backup_table,
            "backup_tried": backup_tried,
            "backup_problems": lambda report, now: backup_core.problems(report, now),
        }
