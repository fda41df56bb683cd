#!/usr/bin/python
"""Ansible's way to a running HAProxy; what is done and in which order is in module_utils/haproxy_runtime.py."""

from __future__ import annotations

DOCUMENTATION = """
module: haproxy_runtime
short_description: Drain, warm and ready servers of a running HAProxy, and switch the slot in service
description:
  - One call handles any number of servers at once, ends by its deadline, and reads back what it reports.
options:
  state:
    description:
      - C(drained) gives no new requests, waits until none is in flight, ends in MAINT.
      - C(maint) ends in MAINT at once.
      - C(warm) ends in DRAIN after a health check made from now on has passed.
      - C(ready) ends in UP, each server only after a fresh health check has passed.
      - C(switched) makes the map name another backend, in its file and in memory.
    type: str
    choices: [drained, maint, warm, ready, switched]
    required: true
  servers:
    description: Servers as C(backend/server). Required unless C(state=switched).
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds for everything together.
    type: float
    default: 60
  keep_up:
    description: How many other servers of the same backend must be UP before C(state=drained) drains any.
    type: int
    default: 0
  socket:
    description: The runtime socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description: The master socket, which knows the processes that a reload left behind. Not asked when it is absent.
    type: path
    default: /run/haproxy-master.sock
  check_interval:
    description: Seconds between two health checks, as configured (C(inter)).
    type: float
    default: 1
  map_path:
    description: The map's file, named exactly as in the configuration.
    type: path
    default: /etc/haproxy/slot.map
  map_key:
    description: Key of the map.
    type: str
    default: active
  map_value:
    description: The backend to put into service. Required for C(state=switched).
    type: str
  require_up:
    description: How many of its servers must be UP before the switch.
    type: int
    default: 1
author: Atlas
"""

EXAMPLES = """
- name: Drain a host
  haproxy_runtime:
    state: drained
    servers: [be_blue/app1, be_mixed/app1-blue]
    timeout: 30

- name: Put green into service
  haproxy_runtime:
    state: switched
    map_value: be_green
    require_up: 3
"""

RETURN = """
before:
  description: The servers, or the map's value in file and memory, before.
  type: dict
  returned: always
after:
  description: The same, read back afterwards.
  type: dict
  returned: always
seconds:
  description: How long it took.
  type: float
  returned: always
"""

import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.haproxy_runtime import Balancer, RuntimeFailure, entries, is_already


def look(balancer: Balancer, params: dict[str, Any]) -> dict[str, Any]:
    """Return what the module is about as it is now."""
    if params["state"] != "switched":
        return {name: server.report() for name, server in balancer.servers(params["servers"]).items()}
    path, key = params["map_path"], params["map_key"]
    if not Path(path).exists():
        raise RuntimeFailure(f"{path} does not exist: the role haproxy creates it; run playbooks/site.yml")
    return {"file": entries(Path(path).read_text()).get(key), "memory": balancer.map_value(path, key)}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["drained", "maint", "warm", "ready", "switched"], "required": True},
            "servers": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 60},
            "keep_up": {"type": "int", "default": 0},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "master_socket": {"type": "path", "default": "/run/haproxy-master.sock"},
            "check_interval": {"type": "float", "default": 1},
            "map_path": {"type": "path", "default": "/etc/haproxy/slot.map"},
            "map_key": {"type": "str", "default": "active"},
            "map_value": {"type": "str"},
            "require_up": {"type": "int", "default": 1},
        },
        required_if=[("state", "switched", ("map_value",))],
        supports_check_mode=True,
    )
    params = module.params
    state, names = params["state"], params["servers"]
    if state != "switched" and not names:
        module.fail_json(msg=f"state={state} needs servers, each as backend/server")
    begin = time.monotonic()
    balancer = Balancer(params["socket"], params["master_socket"], params["check_interval"])
    before: dict[str, Any] = {}
    try:
        before = look(balancer, params)
        if state == "switched":
            changed = set(before.values()) != {params["map_value"]}
            if changed and module.check_mode:
                balancer.require_up(params["map_value"], params["require_up"])
            elif changed:
                balancer.switch(params["map_path"], params["map_key"], params["map_value"], params["require_up"])
        else:
            changed = not is_already(state, balancer.servers(names))
            if changed and state == "drained" and params["keep_up"]:
                balancer.require_others(names, params["keep_up"])
            if not module.check_mode:
                if state == "warm":
                    balancer.warm(names, params["timeout"])
                elif changed and state == "maint":
                    balancer.maint(names)
                elif changed and state == "drained":
                    balancer.drained(names, params["timeout"])
                elif changed and state == "ready":
                    balancer.ready(names, params["timeout"])
        after = look(balancer, params)
    except RuntimeFailure as failure:
        module.fail_json(msg=str(failure), before=before, seconds=round(time.monotonic() - begin, 3))
    module.exit_json(
        changed=changed,
        before=before,
        after=after,
        seconds=round(time.monotonic() - begin, 3),
        diff={"before": before, "after": after},
    )


if __name__ == "__main__":
    main()
