#!/usr/bin/python
"""Module deploy_edge: what a deploy does on one edge, each time in a single call: lock renewed, done, read back, recorded."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deploy_edge
short_description: Prepare, switch and finish traffic on an edge for a deploy
description:
  - V(prepared) waits until all O(servers) pass this edge's health checks, keeps the hosts in O(missing) out of every backend,
    and tells how the old servers have done since O(since).
  - V(switched) sends all traffic to O(backend), in the map's file and in memory, unless it is later than O(not_after). Those
    of O(servers) that are out of traffic come back before, if they are healthy.
  - V(drained) and V(ready) take O(servers) out of traffic and bring them back. In between they stay in DRAIN, where health
    checks go on, so that V(ready) knows how they are; O(healthy_for) tells which checks count.
  - V(settled) notes which hosts are owed a deployment and which no longer.
  - Every call but V(settled) renews the lock of O(deploy) first, and fails if that is lost.
options:
  state:
    description: What to bring about.
    type: str
    choices: [prepared, switched, drained, ready, settled]
    required: true
  deploy:
    description: The deploy that holds the lock.
    type: str
    required: true
  lease_seconds:
    description: How long the lock stays valid from now.
    type: int
    default: 3600
  servers:
    description: Servers as C(backend/server).
    type: list
    elements: str
    default: []
  old_servers:
    description: The servers in service before, as C(backend/server).
    type: list
    elements: str
    default: []
  since:
    description: Server to its counters at an earlier time, as atlas_facts has them.
    type: dict
    default: {}
  missing:
    description: Hosts that take no part, by their names in the inventory.
    type: list
    elements: str
    default: []
  done:
    description: Hosts that have what they were owed, for V(settled).
    type: list
    elements: str
    default: []
  number:
    description: The deployment that the O(missing) hosts are owed, for V(settled).
    type: int
  backend:
    description: The backend to put into service, for V(switched).
    type: str
  require_up:
    description: How many servers of O(backend) have to be UP.
    type: int
    default: 1
  not_after:
    description: Unix time after which V(switched) refuses, so that a call that was held up cannot switch late. 0 is never.
    type: float
    default: 0
  healthy_for:
    description: For how many seconds O(servers) have been healthy, for V(ready). Health checks that ended before do not count.
    type: float
    default: 0
  timeout:
    description: Seconds for everything together.
    type: float
    default: 60
  socket:
    description: HAProxy's runtime socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
  master_socket:
    description: HAProxy's master socket.
    type: path
    default: /run/haproxy-master.sock
  map_path:
    description: The map that names the backend in service.
    type: path
    default: /etc/haproxy/slot.map
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Send all traffic to slot green
  deploy_edge:
    state: switched
    deploy: "{{ deploy }}"
    backend: be_green
    require_up: 3
"""

RETURN = r"""
seconds:
  description: How long it took.
  type: float
  returned: success
old:
  description: Requests, errors and histogram of the old servers since O(since).
  type: dict
  returned: with O(old_servers)
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible.module_utils import canary, lease
from ansible.module_utils.atlas_host import Host, now, read_json, write_atomically
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.haproxy_runtime import Balancer, RuntimeFailure, entries, is_already

KEY = "active"


class Edge:
    """The states of the module on one edge; with *check* it only tells what would change."""

    def __init__(self, params: Mapping[str, Any], balancer: Balancer, host: Host, check: bool) -> None:
        self.params, self.balancer, self.host, self.check = params, balancer, host, check

    def prepared(self) -> dict[str, Any]:
        """Have the new servers UP and the missing hosts out, and look at the old servers."""
        out = self._keep_out()
        if self.params["servers"] and not self.check:
            self.balancer.ready(self.params["servers"], self.params["timeout"])
        return {"changed": out, **self._old()}

    def _keep_out(self) -> bool:
        """Take the missing hosts out of every backend; tell whether one was in."""
        out = [
            name
            for name, server in self.balancer.servers().items()
            if self._host(name) in self.params["missing"] and server.status != "MAINT"
        ]
        if out and not self.check:
            self.balancer.maint(out)
        return bool(out)

    def _old(self) -> dict[str, Any]:
        if not self.params["old_servers"]:
            return {}
        runtime = self.balancer.runtime
        counters = canary.counters(runtime.ask("show stat"), runtime.ask("show table st_times"))
        return {"old": canary.since(self.params["since"], counters, self.params["old_servers"])}

    def _host(self, server: str) -> str:
        backend, _, name = server.partition("/")
        return name.rpartition("-")[0] if backend == "be_mixed" else name

    def switched(self) -> dict[str, Any]:
        """Switch, in time or not at all."""
        path, backend = self.params["map_path"], self.params["backend"]
        before = {
            "file": entries(Path(path).read_text()).get(KEY),
            "memory": self.balancer.map_value(path, KEY),
        }
        changed = set(before.values()) != {backend}
        result: dict[str, Any] = {
            "changed": changed,
            "diff": _diff(before, dict.fromkeys(before, backend)),
            **self._old(),
        }
        if not changed or self.check:
            return result
        late = time.time() - self.params["not_after"]
        if self.params["not_after"] and late > 0:
            raise RuntimeFailure(f"the order to switch came {late:.0f} s too late and was not obeyed")
        self._bring_back()
        began = time.perf_counter()
        self.balancer.switch(path, KEY, backend, self.params["require_up"])
        return {**result, "milliseconds": round((time.perf_counter() - began) * 1000, 2), "switched_at": time.time()}

    def _bring_back(self) -> None:
        """Have traffic go again to those servers that a deploy had drained; who is not healthy stays out."""
        names = self.params["servers"]
        for name, server in self.balancer.servers(names).items() if names else ():
            if not server.status.startswith("UP"):
                with suppress(RuntimeFailure):
                    self.balancer.ready([name], self.params["timeout"])

    def drained(self) -> dict[str, Any]:
        """Take the servers out of traffic, having looked how the old ones do."""
        names, old = self.params["servers"], self._old()
        self._keep_out()
        if not self.check:
            self.balancer.emptied(names, self.params["timeout"])
        return {"changed": True, **old}

    def ready(self) -> dict[str, Any]:
        """Bring the servers back."""
        names = self.params["servers"]
        changed = not is_already("ready", self.balancer.servers(names))
        if changed and not self.check:
            self.balancer.ready(names, self.params["timeout"], self.params["healthy_for"])
        return {"changed": changed}

    def settled(self) -> dict[str, Any]:
        """Note who is owed what."""
        path = lease.DIRECTORY / "owed.json"
        before = read_json(path)
        after = {name: owed for name, owed in before.items() if name not in self.params["done"]}
        for name in self.params["missing"]:
            owed = {"deployment": self.params["number"], "deploy": self.params["deploy"], "since": now()}
            after[name] = {**owed, "since": before.get(name, owed)["since"]}
        changed = after != before
        if changed and not self.check:
            write_atomically(path, json.dumps(after, sort_keys=True) + "\n")
        return {"changed": changed, "diff": _diff(before, after)}


def _diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"before": _lines(before), "after": _lines(after)}]


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in sorted(values.items()))


def run(params: Mapping[str, Any], edge: Edge) -> dict[str, Any]:
    """Bring about the state of *params*, renewing the lock before and recording after; return the module's result."""
    state, began = params["state"], time.monotonic()
    if edge.check:
        return dict(getattr(edge, state)())
    if state != "settled":
        lease.renew(params["deploy"], params["lease_seconds"])
    details = {"deploy": params["deploy"], "servers": params["servers"], "backend": params["backend"]}
    phase = "finish" if state == "settled" else "switch"
    with edge.host.recorded(state, phase, **{key: value for key, value in details.items() if value}) as entry:
        result = dict(getattr(edge, state)())
        entry |= {key: result[key] for key in ("old", "milliseconds", "switched_at") if key in result}
        entry["changed"] = result["changed"]
    return {**result, "seconds": round(time.monotonic() - began, 3)}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["prepared", "switched", "drained", "ready", "settled"],
                "required": True,
            },
            "deploy": {"type": "str", "required": True},
            "lease_seconds": {"type": "int", "default": 3600},
            "servers": {"type": "list", "elements": "str", "default": []},
            "old_servers": {"type": "list", "elements": "str", "default": []},
            "since": {"type": "dict", "default": {}},
            "missing": {"type": "list", "elements": "str", "default": []},
            "done": {"type": "list", "elements": "str", "default": []},
            "number": {"type": "int"},
            "backend": {"type": "str"},
            "require_up": {"type": "int", "default": 1},
            "not_after": {"type": "float", "default": 0},
            "healthy_for": {"type": "float", "default": 0},
            "timeout": {"type": "float", "default": 60},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "master_socket": {"type": "path", "default": "/run/haproxy-master.sock"},
            "map_path": {"type": "path", "default": "/etc/haproxy/slot.map"},
        },
        required_if=[("state", "switched", ["backend"]), ("state", "settled", ["number"])],
        supports_check_mode=True,
    )
    balancer = Balancer(module.params["socket"], module.params["master_socket"])
    try:
        module.exit_json(**run(module.params, Edge(module.params, balancer, Host(), module.check_mode)))
    except (RuntimeFailure, lease.LeaseError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
