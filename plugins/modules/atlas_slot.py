#!/usr/bin/python
"""Module atlas_slot: brings a slot into service on one host, or returns the host to what it was; every wait has an end."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_slot
short_description: Start, check, finish or undo a deployment in a slot
description:
  - V(started) records what the host was, stops the slot's services by name, points the slot at the deployment, starts them
    and waits at the health gate (units active, C(/readyz) with the right release, heartbeats of the workers), for
    O(minimum_healthy) seconds without a restart.
  - V(healthy) only waits at the gate.
  - V(finished) makes the slot the one that boot starts, stops the other slot and prunes what no rollback can need.
  - V(undone) returns the host to what it was before the deploy, from what it recorded; without a record it does nothing.
options:
  state:
    description: What to bring about.
    type: str
    choices: [started, healthy, finished, undone]
    required: true
  slot:
    description: The slot. Not needed for O(state=undone).
    type: str
    choices: [blue, green]
  number:
    description: The deployment's number.
    type: int
  release:
    description: The release that has to answer.
    type: str
  host:
    description: The name under which the host's workers send heartbeats (setting C(host)).
    type: str
    required: true
  deploy:
    description: The deploy on whose behalf this happens; it marks the record of what the host was.
    type: str
    default: ""
  timeout:
    description: Seconds until the slot has to be healthy.
    type: int
    default: 60
  stop_timeout:
    description: Seconds that services may take to stop.
    type: int
    default: 90
  minimum_healthy:
    description: Seconds for which the slot has to stay healthy.
    type: int
    default: 3
  keep:
    description: How many good deployments O(state=finished) keeps.
    type: int
    default: 3
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Start the new deployment
  atlas_slot:
    state: started
    slot: green
    number: 7
    release: 0.1.0-0123456789ab
    host: app1
"""

RETURN = r"""
seconds:
  description: How long it took until the gate opened.
  type: float
  returned: when services were waited for
log:
  description: Last lines of the guilty unit.
  type: list
  returned: on failure
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.module_utils.atlas_host import SLOTS, Gate, Host, HostError
from ansible.module_utils.basic import AnsibleModule


class Slot:
    """The states of the module on one host; with *check* it only tells what would change."""

    def __init__(self, params: Mapping[str, Any], host: Host, check: bool) -> None:
        self.params, self.host, self.check = params, host, check

    def _gate(self, slot: str, number: int, release: str, start: bool = False) -> float:
        gate = Gate(slot, number, release, self.params["host"])
        # Taken before the start and after the stop: what the services before these said is no part of the story.
        began = time.time()
        if start:
            self.host.start(slot)
        return round(self.host.wait_healthy(gate, self.params["timeout"], self.params["minimum_healthy"], began), 1)

    def started(self) -> dict[str, Any]:
        """Bring the deployment up in the slot."""
        slot, number, host = self.params["slot"], self.params["number"], self.host
        before = host.slots()
        result = {"changed": True, "diff": _diff(before, {**before, slot: number})}
        if self.check:
            return result
        previous = host.in_service()
        host.begin(
            {
                "deploy": self.params["deploy"],
                "deployment": number,
                "slot": slot,
                "slots": before,
                "in_service": previous,
                "started_at": time.time(),
            }
        )
        host.stop(slot, self.params["stop_timeout"])
        host.point(slot, number)
        return {**result, "seconds": self._gate(slot, number, self.params["release"], start=True)}

    def healthy(self) -> dict[str, Any]:
        """Only wait at the gate."""
        if self.check:
            return {"changed": False}
        return {
            "changed": False,
            "seconds": self._gate(self.params["slot"], self.params["number"], self.params["release"]),
        }

    def finished(self) -> dict[str, Any]:
        """Commit to the slot. Enabling its target is the point of no return; all after it can be repeated."""
        slot, number, host = self.params["slot"], self.params["number"], self.host
        before = {"in service": host.in_service()}
        if self.check:
            return {"changed": True, "diff": _diff(before, {"in service": slot})}
        was = host.transaction()
        notes = self._admit(number, slot, dismiss=_previous(was))
        host.enable(slot)
        if number not in host.good()[-1:]:
            host.record(
                "finished", deploy=self.params["deploy"], deployment=number, slot=slot, release=self.params["release"]
            )
        host.end()
        for other in SLOTS:
            if other != slot:
                host.stop(other, self.params["stop_timeout"])
        pruned = host.prune(self.params["keep"])
        return {"changed": True, "pruned": pruned, "notes": notes, "diff": _diff(before, {"in service": slot})}

    def undone(self) -> dict[str, Any]:
        """Return the host to what the transaction says it was."""
        host, was = self.host, self.host.transaction()
        if not was:
            return {"changed": False, "in_service": host.in_service()}
        slots, previous = was["slots"], was["in_service"]
        result = {"changed": True, "in_service": previous, "diff": _diff(host.slots(), slots)}
        if self.check:
            return result
        if previous == was["slot"] and slots[previous] == host.slots()[previous] and len(host.active(previous)) == 4:
            host.end()  # killed before the first change
            return result
        number = _previous(was)
        notes = (
            self._admit(number, previous, was["deployment"], first=[["tokens", "apply"]]) if number is not None else []
        )
        if host.slots() != slots or previous != was["slot"]:
            host.stop(was["slot"], self.params["stop_timeout"])
            host.point(was["slot"], slots[was["slot"]])
        if previous is not None and slots[previous] is not None:
            release = str(host.deployments().get(slots[previous], {}).get("release"))
            result["seconds"] = self._gate(previous, slots[previous], release, start=True)
        host.record(
            "undone", deploy=was["deploy"], deployment=was["deployment"], slot=was["slot"], back_to=slots.get(previous)
        )
        host.end()
        return {**result, "notes": notes}

    def _admit(self, number: int, slot: str, dismiss: int | None, first: Sequence[list[str]] = ()) -> list[str]:
        """Let the deployment *number* claim jobs and *dismiss* no longer; return what went wrong.

        Nothing here may keep the host from its state: running services are worth more than a tidy table.
        """
        commands = [*first, ["admission", "admit", str(number)]]
        if dismiss is not None and dismiss != number:
            commands.append(["admission", "dismiss", str(dismiss)])
        notes = []
        for argv in commands:
            try:
                self.host.command(number, slot, argv, 30)
            except HostError as error:
                notes.append(str(error))
        return notes


def _previous(was: Mapping[str, Any]) -> int | None:
    """Return the deployment that was in service before the transaction *was*."""
    number = was["slots"].get(was["in_service"]) if was.get("in_service") else None
    return None if number is None else int(number)


def _diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"before": _lines(before), "after": _lines(after)}]


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key}: {value if value is not None else 'nothing'}\n" for key, value in sorted(values.items()))


def main() -> None:
    """Run the module."""
    needed = ["slot", "number", "release"]
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["started", "healthy", "finished", "undone"], "required": True},
            "slot": {"type": "str", "choices": list(SLOTS)},
            "number": {"type": "int"},
            "release": {"type": "str"},
            "host": {"type": "str", "required": True},
            "deploy": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 60},
            "stop_timeout": {"type": "int", "default": 90},
            "minimum_healthy": {"type": "int", "default": 3},
            "keep": {"type": "int", "default": 3},
        },
        required_if=[("state", state, needed) for state in ("started", "healthy", "finished")],
        supports_check_mode=True,
    )
    slot = Slot(module.params, Host(), module.check_mode)
    try:
        module.exit_json(**getattr(slot, module.params["state"])())
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
