#!/usr/bin/python
"""Module atlas_services: stops what serves on an app host for a while, and brings the same deployment back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_services
short_description: Stop the services of an app host, and start those of the slot in service again
description:
  - V(stopped) stops the services of both slots by name and waits until all have ended. The slot in service stays the one that
    boot starts.
  - V(retired) does the same, and has boot start neither.
  - V(started) starts those of the slot in service and waits at the health gate (units active, C(/readyz) with the right
    release, heartbeats of the workers).
options:
  state:
    description: What to bring about.
    type: str
    choices: [stopped, retired, started]
    required: true
  host:
    description: The name under which the host's workers send heartbeats (setting C(host)).
    type: str
    required: true
  timeout:
    description: Seconds that stopping, or becoming healthy, may take.
    type: int
    default: 90
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Stop the services for a while
  atlas_services:
    state: stopped
    host: app1
"""

RETURN = r"""
slot:
  description: The slot that was in service; null where there was none.
  type: str
  returned: always
seconds:
  description: How long it took.
  type: float
  returned: always
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ansible.module_utils.atlas_host import SLOTS, Gate, Host, HostError, units
from ansible.module_utils.basic import AnsibleModule


def apply(params: Mapping[str, Any], host: Host, check: bool) -> dict[str, Any]:
    """Bring the services to the state of *params*; return the module's result."""
    began, slot = time.monotonic(), host.in_service()
    if params["state"] == "retired":
        changed = slot is not None or any(host.active(each) for each in SLOTS)
        if changed and not check:
            with host.recorded("retired", "retire", slot=slot):
                # Before the stop: what boots meanwhile stays away.
                host.disable()
                _stop(host, params["timeout"])
        return {"changed": changed, "slot": slot, "seconds": round(time.monotonic() - began, 1)}
    number = host.slots()[slot] if slot else None
    if slot is None or number is None:
        raise HostError("No deployment is in service on this host.")
    if params["state"] == "stopped":
        changed = any(host.active(each) for each in SLOTS)
        if not check:
            _stop(host, params["timeout"])
    else:
        changed = len(host.active(slot)) < len(units(slot))
        if not check:
            release = str(host.deployments()[number]["release"])
            if changed:
                host.start(slot)
            host.wait_healthy(Gate(slot, number, release, params["host"]), params["timeout"], 0)
    return {"changed": changed, "slot": slot, "seconds": round(time.monotonic() - began, 1)}


def _stop(host: Host, timeout: float) -> None:
    for slot in SLOTS:
        if host.warm_until(slot):
            host.keep_warm(slot)  # it no longer has to be stopped later
        host.stop(slot, timeout)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["stopped", "retired", "started"], "required": True},
            "host": {"type": "str", "required": True},
            "timeout": {"type": "int", "default": 90},
        },
        supports_check_mode=True,
    )
    host = Host()
    try:
        with nullcontext() if module.check_mode else host.alone():
            result = apply(module.params, host, module.check_mode)
        module.exit_json(**result)
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")


if __name__ == "__main__":
    main()
