#!/usr/bin/python
"""Ansible's way to the upgrades of a host; the decisions are in module_utils/packages.py."""

from __future__ import annotations

DOCUMENTATION = """
module: host_packages
short_description: See which packages of a host can be upgraded, upgrade them, and tell whether it has to boot
description:
  - C(looked) only reads the archives' lists and tells. C(upgraded) brings the packages to their new versions, with the
    configuration files that are there, and has services that run on replaced files use the new ones. HAProxy reloads for
    that; the services of Atlas and PostgreSQL are left to whoever took care of their traffic.
options:
  state:
    description: Whether to change something.
    type: str
    choices: [looked, upgraded]
    default: looked
  which:
    description: Security updates alone, or all.
    type: str
    choices: [security, all]
    default: security
  keep:
    description: Beginnings of names of packages that are kept back.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds that an upgrade may take.
    type: int
    default: 1800
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = """
- name: Upgrade
  host_packages:
    state: upgraded
    keep: [postgresql]
"""

RETURN = """
packages:
  description: Packages to upgrade, or that were; each with C(name), C(from), C(to) and C(security).
  type: list
  returned: always
kept:
  description: Packages that were kept back, in the same form.
  type: list
  returned: always
boot:
  description: Why the host should boot; empty if it need not.
  type: list
  returned: always
stale:
  description: Services that still run on replaced files.
  type: list
  returned: always
renewed:
  description: Services that were restarted or reloaded.
  type: list
  returned: always
"""

from collections.abc import Mapping
from typing import Any

from ansible.module_utils.atlas_host import Host, HostError
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.packages import Packages, choose, report


def apply(params: Mapping[str, Any], packages: Packages, host: Host, check: bool) -> dict[str, Any]:
    """Look, and upgrade where that is wanted; return the module's result."""
    upgrade = params["state"] == "upgraded"
    if not upgrade:
        packages.refresh()
    chosen, kept = choose(packages.upgradable(), params["which"], params["keep"])
    renewed: list[str] = []
    if upgrade and not check:
        if chosen:
            with host.recorded("upgraded", "patch", packages=[f"{p.name} {p.old} -> {p.new}" for p in chosen]):
                packages.upgrade(chosen, params["timeout"])
        renewed = packages.renew(packages.stale())
    stale = packages.stale()
    lines = "".join(f"{p.name} {{}}\n" for p in chosen)
    versions = ([p.old for p in chosen], [p.new for p in chosen])
    result = {
        "changed": upgrade and bool(chosen or renewed),
        "packages": report(chosen),
        "kept": report(kept),
        "boot": packages.boot_reasons(stale),
        "stale": sorted(stale),
        "renewed": renewed,
    }
    if upgrade:
        result["diff"] = [{"before": lines.format(*versions[0]), "after": lines.format(*versions[1])}]
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["looked", "upgraded"], "default": "looked"},
            "which": {"type": "str", "choices": ["security", "all"], "default": "security"},
            "keep": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 1800},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**apply(module.params, Packages(), Host(), module.check_mode))
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
