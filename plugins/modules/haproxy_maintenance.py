#!/usr/bin/python
"""Ansible's way to the maintenance mode of an edge; the map behind it is written by module_utils/haproxy_runtime.py."""

from __future__ import annotations

DOCUMENTATION = """
module: haproxy_maintenance
short_description: Answer users with a maintenance page, or serve them again
description:
  - At run time and in the file that a start or reload reads, so that it takes effect at once and lasts. Health and metrics
    stay visible. Recorded in the journal of the host.
options:
  state:
    description: C(present) for maintenance, C(absent) for service.
    type: str
    choices: [present, absent]
    required: true
  reason:
    description: What users are told.
    type: str
    default: Atlas is being maintained.
  map_path:
    description: The map's file, named exactly as in the configuration.
    type: path
    default: /etc/haproxy/maintenance.map
  socket:
    description: The runtime socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
author: Atlas
"""

EXAMPLES = """
- name: Keep users out while the database moves
  haproxy_maintenance:
    state: present
    reason: The database moves to a new machine, until about 14:00 UTC.
"""

RETURN = """
reason:
  description: What users are told from now on; empty when they are served.
  type: str
  returned: always
"""

import html
import json
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import Host
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.haproxy_runtime import Balancer, RuntimeFailure, entries


def wanted(params: dict[str, Any]) -> dict[str, str]:
    """Return the content of the map: the reason as it is, and ready for the two pages that carry it."""
    if params["state"] == "absent":
        return {}
    reason = " ".join(params["reason"].split())
    if not reason or len(reason) > 500:
        raise RuntimeFailure("A reason for users has 1 to 500 characters.")
    return {"reason": reason, "html": html.escape(reason), "json": json.dumps(reason)[1:-1]}


def apply(params: dict[str, Any], check: bool, host: Host) -> dict[str, Any]:
    """Bring file and process to the state of *params*; return the module's result."""
    path, content = Path(params["map_path"]), wanted(params)
    if not path.exists():
        raise RuntimeFailure(f"{path} does not exist: the role haproxy creates it; run playbooks/site.yml")
    balancer = Balancer(params["socket"])
    before = balancer.map_entries(str(path))
    changed = before != content or entries(path.read_text()) != content
    if changed and not check:
        balancer.write_map(str(path), content)
        host.record("maintenance", state="on" if content else "off", reason=content.get("reason", ""))
    states = (f"maintenance: {known.get('reason', 'off')}\n" for known in (before, content))
    return {
        "changed": changed,
        "reason": content.get("reason", ""),
        "diff": [dict(zip(("before", "after"), states, strict=True))],
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "required": True},
            "reason": {"type": "str", "default": "Atlas is being maintained."},
            "map_path": {"type": "path", "default": "/etc/haproxy/maintenance.map"},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**apply(module.params, module.check_mode, Host()))
    except RuntimeFailure as failure:
        module.fail_json(msg=str(failure))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
