"""Filters of the operations checks: since when a journal is news, and what must not be in a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ansible.module_utils

_UTILITIES = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILITIES not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILITIES)

from ansible.module_utils import ops_archive  # noqa: E402

DOCUMENTATION = """
name: ops_since
short_description: The Unix time at which a host was last asked for a check, by its own clock; a day ago where it never was
description: See C(plugins/module_utils/ops_archive.py).
positional: _input, check, host
options:
  _input:
    description: The directory of reports.
    type: str
    required: true
  check:
    description: The check.
    type: str
    required: true
  host:
    description: The host.
    type: str
    required: true
"""


def since(directory: str, check: str, host: str) -> float:
    """Return the Unix time from which on errors on *host* are news for *check*."""
    return ops_archive.asked(Path(directory), check, host) or time.time() - 86_400


class FilterModule:
    """Ansible's entry point to the filters."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"ops_since": since, "ops_secrets": ops_archive.secrets}
