#!/usr/bin/python
"""Module atlas_slot: brings a slot into service on one host, or returns the host to what it was; every wait has an end."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_slot
short_description: Start, check, finish or undo a deployment in a slot
description:
  - V(started) records what the host was, stops the slot's services by name, points the slot at the deployment, starts them
    and waits at the health gate (units active, C(/readyz) with the right release, heartbeats of the workers, a job of their
    own done), for O(minimum_healthy) seconds without a restart.
  - V(engaged) does the same with a slot that is still warm, so that nothing is stopped or started.
  - V(finished) makes the slot the one that boot starts, has the other one stop after O(warm_seconds), and prunes what no
    rollback can need.
  - V(undone) returns the host to what it was before the deploy, from what it recorded; without a record it does nothing.
options:
  state:
    description: What to bring about.
    type: str
    choices: [started, engaged, finished, undone]
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
    description: >-
      The deploy on whose behalf this happens; it marks the record of what the host was, and does not touch another one's.
      O(state=undone) without it takes any.
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
  warm_seconds:
    description: For how long the slot that was in service stays warm after O(state=finished). 0 stops it at once.
    type: int
    default: 0
  leave:
    description: >-
      Have the slot that is about to stop leave first, because an edge out of reach may still send users there: its health checks
      find it not ready, and it looks elsewhere, for which it has 5 seconds. With O(state=undone) the other slot is up before that.
    type: bool
    default: false
  rolled_back:
    description: The deployment that this one takes the place of because it was not good.
    type: int
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
slot:
  description: The slot in service afterwards.
  type: str
  returned: with O(state=undone)
number:
  description: The deployment in service afterwards.
  type: int
  returned: with O(state=undone)
log:
  description: Last lines of the guilty unit.
  type: list
  returned: on failure
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ansible.module_utils.atlas_host import SLOTS, Gate, Host, HostError, read_json, requests
from ansible.module_utils.basic import AnsibleModule


class Slot:
    """The states of the module on one host; with *check* it only tells what would change."""

    def __init__(self, params: Mapping[str, Any], host: Host, check: bool) -> None:
        self.params, self.host, self.check = params, host, check

    def _gate(self, slot: str, number: int, release: str, start: bool = True) -> float:
        gate = Gate(slot, number, release, self.params["host"])
        # Taken before the start and after the stop: what the services before these said is no part of the story.
        began = time.time()
        if start:
            self.host.start(slot)
        seconds = self.host.wait_healthy(gate, self.params["timeout"], self.params["minimum_healthy"], began)
        self.host.note(processes=self.host.processes(slot), began=began)
        return round(seconds, 1)

    def _refuse_others(self) -> None:
        """Raise HostError where another deploy than ours has begun and not ended: what it recorded is not ours to use."""
        was, ours = self.host.transaction(), self.params["deploy"]
        if ours and was.get("deploy", ours) != ours:
            raise HostError(
                f"deploy {was['deploy']} has begun to change this host and has not ended. "
                "Run playbooks/deploy.yml: it cleans up first, or says who deploys."
            )

    def started(self) -> dict[str, Any]:
        """Bring the deployment up in the slot."""
        return self._bring_up(start=True)

    def engaged(self) -> dict[str, Any]:
        """Take a warm slot as it is."""
        return self._bring_up(start=False)

    def _bring_up(self, start: bool) -> dict[str, Any]:
        slot, number, host = self.params["slot"], self.params["number"], self.host
        before = host.slots()
        result = {"changed": True, "diff": _diff(before, {**before, slot: number})}
        if self.check:
            return result
        if not (host.deployment(number) / "deployment.json").is_file():
            raise HostError(f"deployment {number} is not on this host.")
        self._refuse_others()
        details = {"deploy": self.params["deploy"], "deployment": number, "slot": slot}
        with host.recorded("started" if start else "engaged", "switch", **details):
            transaction = {**details, "slots": before, "in_service": host.in_service(), "started_at": time.time()}
            host.begin(transaction)
            host.keep_warm(slot)
            # A warm slot may have begun to stop a moment ago.
            start = start or not host.serves(slot)
            if start:
                host.stop(slot, self.params["stop_timeout"])
                host.point(slot, number)
            result["seconds"] = self._gate(slot, number, self.params["release"], start)
        return result

    def finished(self) -> dict[str, Any]:
        """Commit to the slot. Enabling its target is the point of no return; all after it can be repeated."""
        slot, number, host = self.params["slot"], self.params["number"], self.host
        before = {"in service": host.in_service()}
        result = {"changed": True, "diff": _diff(before, {"in service": slot})}
        if self.check:
            return result
        details = {
            "deploy": self.params["deploy"],
            "deployment": number,
            "slot": slot,
            "release": self.params["release"],
            "rolled_back": self.params["rolled_back"],
            # From here on older vault files are refused, also if the rotation that this deploy is a part of gets no further.
            "serial": int(host.deployments().get(number, {}).get("vault_serial") or 0),
        }
        self._refuse_others()
        was_in_service = host.transaction().get("in_service")
        host.enable(slot)
        if number not in host.good()[-1:]:
            with host.recorded("finished", "finish", **details, served=self._served(was_in_service)):
                pass
        for other in SLOTS:
            if other == slot or not host.active(other):
                continue
            if self.params["warm_seconds"] and other == was_in_service:
                host.cool(other, self.params["warm_seconds"])
            elif host.warm_until(other) is None:
                if self.params["leave"]:
                    host.leave(other)
                host.stop(other, self.params["stop_timeout"])
        # Not before the old slot stops, now or later: the next run would not see to it.
        host.end()
        host.trim()
        return {**result, "pruned": host.prune(self.params["keep"])}

    def _served(self, slot: str | None) -> dict[str, Any]:
        """Return what the release in *slot* answered, which is about to be forgotten: release, total and failed; {} for none."""
        number = self.host.slots()[slot] if slot else None
        if slot is None or slot == self.params["slot"] or not number or not self.host.active(slot):
            return {}
        release = read_json(self.host.deployment(number) / "deployment.json").get("release")
        return {"release": release, **requests(slot)}

    def undone(self) -> dict[str, Any]:
        """Return the host to what the transaction says it was."""
        host, was = self.host, self.host.transaction()
        if not was:
            slot = host.in_service()
            return {"changed": False, "slot": slot, "number": host.slots()[slot] if slot else None}
        slots, previous = was["slots"], was["in_service"]
        number = slots[previous] if previous is not None else None
        result = {"changed": True, "slot": previous, "number": number, "diff": _diff(host.slots(), slots)}
        if self.check:
            return result
        self._refuse_others()
        if previous == was["slot"] and number == host.slots()[previous] and len(host.active(previous)) == 4:
            host.end()  # killed before the first change
            return result
        details = {"deploy": was["deploy"], "deployment": was["deployment"], "slot": was["slot"], "back_to": number}
        release = str(host.deployments().get(number, {}).get("release")) if number is not None else ""
        with host.recorded("undone", "undo", **details):
            if self.params["leave"] and number is not None and previous != was["slot"]:
                host.keep_warm(previous)
                self._gate(previous, number, release)
                host.leave(was["slot"])
            if host.slots() != slots or previous != was["slot"]:
                host.stop(was["slot"], self.params["stop_timeout"])
                host.point(was["slot"], slots[was["slot"]])
            if number is not None:
                host.keep_warm(previous)
                result["seconds"] = self._gate(previous, number, release)
            # A run that was cut off while it enabled one and disabled the other left both for boot to start.
            if previous is None:
                host.disable()
            else:
                host.enable(previous)
        host.end()
        return result


def _diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"before": _lines(before), "after": _lines(after)}]


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key}: {value if value is not None else 'nothing'}\n" for key, value in sorted(values.items()))


def main() -> None:
    """Run the module."""
    needed = ["slot", "number", "release"]
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["started", "engaged", "finished", "undone"], "required": True},
            "slot": {"type": "str", "choices": list(SLOTS)},
            "number": {"type": "int"},
            "release": {"type": "str"},
            "host": {"type": "str", "required": True},
            "deploy": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 60},
            "stop_timeout": {"type": "int", "default": 90},
            "minimum_healthy": {"type": "int", "default": 3},
            "keep": {"type": "int", "default": 3},
            "warm_seconds": {"type": "int", "default": 0},
            "leave": {"type": "bool", "default": False},
            "rolled_back": {"type": "int"},
        },
        required_if=[("state", state, needed) for state in ("started", "engaged", "finished")],
        supports_check_mode=True,
    )
    slot = Slot(module.params, Host(), module.check_mode)
    try:
        with nullcontext() if module.check_mode else slot.host.alone():
            result = getattr(slot, module.params["state"])()
        module.exit_json(**result)
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
