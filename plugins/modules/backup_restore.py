#!/usr/bin/python
"""Module backup_restore: the steps of a restore on the hosts that use the store, each of which can be undone."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_restore
short_description: Put a restored store into service on a host
description:
  - V(opened) lets the backup host deliver; V(closed) ends that and removes what was not used.
  - V(stopped) stops the services of every slot, and keeps them from starting, at a boot too, until V(accepted) or V(resumed).
    V(started) starts those of the slot in service all the same, until the next boot, and waits at the health gate.
  - V(resumed) starts them, where they were kept from it, on the store that was there before.
  - V(replaced) keeps the store in use beside itself and puts the delivery in its place; V(undone) returns to what was
    kept; V(finished) accepts. What an earlier run left unfinished is undone before V(opened).
options:
  state:
    description: What to bring about.
    type: str
    choices: [opened, closed, stopped, started, replaced, undone, finished, accepted, resumed]
    required: true
  ticket:
    description: Name of this restore.
    type: str
    default: ""
  store:
    description: The store that lives on this host; V(none) where it lives elsewhere.
    type: str
    choices: [sqlite, postgresql, none]
    required: true
  version:
    description: Major version of PostgreSQL.
    type: str
    default: ""
  host:
    description: The name under which this host's workers send heartbeats (setting C(host)); for O(state=started).
    type: str
    default: ""
  served:
    description: Whether the services may have been started on what is V(undone); it is then kept beside the store.
    type: bool
    default: true
  timeout:
    description: Seconds until services have stopped, or are healthy.
    type: int
    default: 120
author: Atlas
attributes:
  check_mode:
    support: full
    details: Nothing happens in check mode.
"""

EXAMPLES = r"""
- name: Put the restored store in place
  backup_restore:
    state: replaced
    ticket: restore-20300131T020000
    store: sqlite
"""

RETURN = r"""
deployment:
  description: Number of the deployment in service, or null.
  type: int
  returned: for stopped, started and resumed
slot:
  description: The slot in service, or null.
  type: str
  returned: for stopped, started and resumed
kept:
  description: Where a restored store is that had served and was taken out again, or null.
  type: str
  returned: for opened and undone
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import SLOTS, Gate, Host, HostError, run
from ansible.module_utils.backup_swap import STATE, Swap, postgresql, sqlite
from ansible.module_utils.basic import AnsibleModule


class Steps:
    """The states of the module on one host."""

    def __init__(self, params: Mapping[str, Any], host: Host) -> None:
        self.params, self.host = params, host
        store = postgresql(params["version"]) if params["store"] == "postgresql" else sqlite()
        self.swap = None if params["store"] == "none" else Swap(store)

    def _needed(self) -> Swap:
        if self.swap is None:
            raise HostError("The store does not live on this host.")
        return self.swap

    def _database(self, action: str) -> None:
        """Start or stop the cluster, and wait for what was asked."""
        if self.params["store"] != "postgresql":
            return
        done = run(
            ["systemctl", action, f"postgresql@{self.params['version']}-main.service"], timeout=self.params["timeout"]
        )
        if done.status:
            raise HostError(f"PostgreSQL: systemctl {action} failed: {done.errors.strip()}")
        deadline = time.monotonic() + self.params["timeout"]
        while action == "start" and run(["pg_isready", "-q"]).status:
            if time.monotonic() > deadline:
                raise HostError(f"PostgreSQL does not answer after {self.params['timeout']} s.")
            time.sleep(0.2)

    def opened(self) -> dict[str, Any]:
        """Let the backup host deliver. What a killed restore left is put right first."""
        left = self.undone()
        self._needed().open_door(self.params["ticket"])
        return {"changed": True, "kept": left["kept"]}

    def closed(self) -> dict[str, Any]:
        """End that."""
        return {"changed": self._needed().close_door()}

    def stopped(self) -> dict[str, Any]:
        """Stop the services of every slot, and keep them from starting."""
        self.host.hold()
        stopped = [slot for slot in SLOTS if self.host.stop(slot, self.params["timeout"])]
        return {"changed": bool(stopped), **self._in_service()}

    def _in_service(self) -> dict[str, Any]:
        slot = self.host.in_service()
        return {"slot": slot, "deployment": self.host.slots()[slot] if slot else None}

    def started(self) -> dict[str, Any]:
        """Start the slot in service and wait at the gate; nothing to do before the first deployment."""
        found = self._in_service()
        number, slot = found["deployment"], found["slot"]
        if number is None:
            return {"changed": False, **found}
        self.host.try_out()
        release = str(self.host.deployments().get(number, {}).get("release"))
        self.host.start(slot)
        seconds = self.host.wait_healthy(Gate(slot, number, release, self.params["host"]), self.params["timeout"], 1)
        return {"changed": True, "seconds": round(seconds, 1), **found}

    def accepted(self) -> dict[str, Any]:
        """Let the services start for good: they run on the restored store."""
        return {"changed": self.host.release()}

    def resumed(self) -> dict[str, Any]:
        """Start them on the store that was there before, if they were kept from starting."""
        if not self.host.release():
            return {"changed": False, **self._in_service()}
        return {**self.started(), "changed": True}

    def replaced(self) -> dict[str, Any]:
        """Exchange the store."""
        swap = self._needed()
        started = [slot for slot in SLOTS if self.host.active(slot)] if self.params["store"] == "sqlite" else []
        if started:
            raise HostError(
                f"The services in {', '.join(started)} were started while the store was to be replaced. By a deploy, or a boot? "
                "Run playbooks/restore.yml again when nothing else changes this host."
            )
        self._database("stop")
        swap.replace(self.params["ticket"])
        self._database("start")
        return {"changed": True}

    def undone(self) -> dict[str, Any]:
        """Put back what was replaced."""
        if self.swap is None or self.swap.unfinished() is None:
            return {"changed": False, "kept": None}
        for slot in SLOTS if self.params["store"] == "sqlite" else ():
            self.host.stop(slot, self.params["timeout"])
        self._database("stop")
        kept = self.swap.undo(self.params["served"])
        self._database("start")
        return {"changed": True, "kept": str(kept) if kept else None}

    def finished(self) -> dict[str, Any]:
        """Accept the exchange, and note it."""
        swap = self._needed()
        swap.finish()
        swap.close_door()
        if self.host.state.is_dir():
            self.host.record(
                "restored", ticket=self.params["ticket"], kept=str(swap.store.safety(self.params["ticket"]))
            )
        return {"changed": True}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": [
                    "opened",
                    "closed",
                    "stopped",
                    "started",
                    "replaced",
                    "undone",
                    "finished",
                    "accepted",
                    "resumed",
                ],
                "required": True,
            },
            "ticket": {"type": "str", "default": ""},
            "store": {"type": "str", "choices": ["sqlite", "postgresql", "none"], "required": True},
            "version": {"type": "str", "default": ""},
            "host": {"type": "str", "default": ""},
            "served": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=module.params["state"] not in ("closed", "undone"))
    Path(STATE).mkdir(mode=0o700, exist_ok=True)
    steps = Steps(module.params, Host())
    try:
        module.exit_json(**getattr(steps, module.params["state"])())
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
