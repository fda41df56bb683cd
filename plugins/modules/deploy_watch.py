#!/usr/bin/python
"""Module deploy_watch: watches for some seconds how a new deployment does beside the old one, on an app host or an edge."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deploy_watch
short_description: Watch a new deployment in traffic
description:
  - On an app host (O(slot)) it fails as soon as a service of the slot restarts or is not active, and returns how
    jobs went.
  - On an edge (O(servers)) it gives the new servers O(weight) percent of the traffic, if that is wanted, and returns HAProxy's
    counters. Where the new servers certainly do worse, this edge takes the traffic back at once (O(back_to) or
    O(drain_on_failure)) and the watch ends there and then.
  - The verdict over all hosts is the filter deploy_verdict's.
options:
  seconds:
    description: For how long to watch.
    type: float
    required: true
  deploy:
    description: The deploy on whose behalf this happens; on an edge it holds the lock, which is renewed.
    type: str
    required: true
  lease_seconds:
    description: How long the lock stays valid from now.
    type: int
    default: 3600
  percent:
    description: Share of traffic, for the journal.
    type: int
    default: 100
  limits:
    description: What is allowed; see C(judge) in C(plugins/module_utils/canary.py).
    type: dict
    default: {}
  slot:
    description: The slot to watch on an app host.
    type: str
    choices: [blue, green]
  number:
    description: The deployment in O(slot).
    type: int
  release:
    description: The release that has to answer there.
    type: str
  host:
    description: The name under which the host's workers send heartbeats.
    type: str
    default: ""
  servers:
    description: The new servers of an edge, as C(backend/server).
    type: list
    elements: str
    default: []
  old_servers:
    description: The old servers beside them.
    type: list
    elements: str
    default: []
  old:
    description: How the old servers did before (requests, errors, histogram), where none serves beside the new ones.
    type: dict
    default: {}
  since:
    description: Server to its counters when the watch first began; empty is now.
    type: dict
    default: {}
  weight:
    description: Percent of traffic for the new servers, by weights in C(be_mixed). 0 leaves traffic as it is.
    type: int
    default: 0
  back_to:
    description: The backend to which this edge returns traffic if the new servers fail.
    type: str
    default: ""
  drain_on_failure:
    description: Whether this edge gives the new servers no more requests if they fail.
    type: bool
    default: false
  socket:
    description: HAProxy's runtime socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
  map_path:
    description: The map that names the backend in service.
    type: path
    default: /etc/haproxy/slot.map
author: Atlas
attributes:
  check_mode:
    support: full
    details: Watches nothing in check mode.
"""

EXAMPLES = r"""
- name: Watch slot green for half a minute
  deploy_watch:
    seconds: 30
    deploy: "{{ deploy }}"
    slot: green
    number: 7
    release: 0.1.0-0123456789ab
    host: app1
"""

RETURN = r"""
edge:
  description: Requests, errors and histogram of new and old servers, and the counters when the watch began.
  type: dict
  returned: on an edge
jobs:
  description: Deployment to failed and ended attempts at jobs of the last minutes.
  type: dict
  returned: on an app host
log:
  description: What the guilty unit logged.
  type: list
  returned: on failure
"""

import time
from collections.abc import Mapping
from typing import Any

from ansible.module_utils import canary, lease
from ansible.module_utils.atlas_host import MONITORING_PORTS, Gate, Host, HostError, get, units
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.haproxy_runtime import Balancer, RuntimeFailure

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 15.0
"""On a busy host an answer or a heartbeat may be late once; what is wrong with a release stays so for longer."""
KEY = "active"
JOBS: dict[str, Any] = {"jobs": [0, 0]}


class App:
    """An app host under watch."""

    def __init__(self, params: Mapping[str, Any], host: Host) -> None:
        self.params, self.host = params, host
        was = host.transaction()
        self.gate = Gate(params["slot"], params["number"], params["release"], params["host"])
        self.processes = was.get("processes") or host.processes(params["slot"])
        self.began = float(was.get("began") or time.time())

    def look(self) -> None:
        """Fail if a service restarted or is not active."""
        self.host.look_after(self.gate, self.processes, self.began)

    def report(self) -> dict[str, list[float]]:
        """Fail if the gate has become shut and stays so, or a service restarts meanwhile; return how jobs went, by deployment."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while fault := self.gate.fault(self.host.show(units(self.gate.slot))):
            if time.monotonic() > deadline:
                raise HostError(f"{fault[0]}: {fault[1]}.", self.host.log(fault[0], self.began))
            time.sleep(POLL_SECONDS)
            self.look()
        return canary.jobs(get(MONITORING_PORTS[self.gate.slot], "/metrics").text)


class Edge:
    """An edge under watch."""

    def __init__(self, params: Mapping[str, Any], balancer: Balancer) -> None:
        self.params, self.balancer = params, balancer
        self.failed = False
        self.looked_at = time.monotonic()
        if params["weight"]:
            self._share(params["weight"])
        self.since = params["since"] or self._counters()

    def _counters(self) -> canary.Counters:
        runtime = self.balancer.runtime
        return canary.counters(runtime.ask("show stat"), runtime.ask("show table st_times"))

    def _share(self, percent: int) -> None:
        """Give the new servers *percent* of traffic: in memory alone, so that whatever restarts HAProxy ends the trial."""
        with self.balancer.runtime.steady():
            for names, weight in ((self.params["old_servers"], 100 - percent), (self.params["servers"], percent)):
                for name in names:
                    self.balancer.runtime.order(f"set server {name} weight {weight}")
            self.balancer.runtime.order(f"set map {self.params['map_path']} {KEY} be_mixed")

    def counts(self) -> dict[str, Any]:
        """Return what happened on the servers since the watch began."""
        counters = self._counters()
        names = {"new": self.params["servers"], "old": self.params["old_servers"]}
        found = {side: canary.since(self.since, counters, servers) for side, servers in names.items()}
        return found if names["old"] or not self.params["old"] else {**found, "old": self.params["old"]}

    def look(self) -> None:
        """Take traffic back if the new servers certainly do worse."""
        if time.monotonic() - self.looked_at < 2 * POLL_SECONDS:
            return
        self.looked_at = time.monotonic()
        counts = self.counts()
        verdict = canary.judge(JOBS | counts["new"], JOBS | counts["old"], self.params["limits"])
        if verdict["verdict"] == "fail":
            self.failed = True
            self._withdraw()

    def _withdraw(self) -> None:
        if self.params["weight"]:
            with self.balancer.runtime.steady():
                self.balancer.runtime.order(f"set map {self.params['map_path']} {KEY} {self.params['back_to']}")
        elif self.params["back_to"]:
            self.balancer.switch(self.params["map_path"], KEY, self.params["back_to"], 1)
        elif self.params["drain_on_failure"]:
            self.balancer.set_state(self.params["servers"], "drain")


def watch(params: Mapping[str, Any], app: App | None, edge: Edge | None) -> dict[str, Any]:
    """Watch until the time is over or something has failed; return what was seen."""
    deadline = time.monotonic() + params["seconds"]
    while time.monotonic() < deadline and not (edge and edge.failed):
        for watched in (app, edge):
            if watched:
                watched.look()
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    result: dict[str, Any] = {"changed": False}
    if edge:
        result["edge"] = {**edge.counts(), "since": edge.since, "withdrawn": edge.failed}
    if app:
        app.look()
        result["jobs"] = app.report()
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "seconds": {"type": "float", "required": True},
            "deploy": {"type": "str", "required": True},
            "lease_seconds": {"type": "int", "default": 3600},
            "percent": {"type": "int", "default": 100},
            "limits": {"type": "dict", "default": {}},
            "slot": {"type": "str", "choices": ["blue", "green"]},
            "number": {"type": "int"},
            "release": {"type": "str"},
            "host": {"type": "str", "default": ""},
            "servers": {"type": "list", "elements": "str", "default": []},
            "old_servers": {"type": "list", "elements": "str", "default": []},
            "old": {"type": "dict", "default": {}},
            "since": {"type": "dict", "default": {}},
            "weight": {"type": "int", "default": 0},
            "back_to": {"type": "str", "default": ""},
            "drain_on_failure": {"type": "bool", "default": False},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "map_path": {"type": "path", "default": "/etc/haproxy/slot.map"},
        },
        required_by={"slot": ["number", "release"]},
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False)
    host = Host()
    details = {"deploy": params["deploy"], "percent": params["percent"]}
    try:
        if params["servers"]:
            lease.renew(params["deploy"], params["lease_seconds"])
        with host.recorded("watched", "verify", **details) as entry:
            app = App(params, host) if params["slot"] else None
            edge = Edge(params, Balancer(params["socket"])) if params["servers"] else None
            result = watch(params, app, edge)
            entry |= {key: result["edge"][key] for key in ("new", "old", "withdrawn")} if edge else {}
        module.exit_json(**result)
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except (RuntimeFailure, lease.LeaseError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
