#!/usr/bin/python
"""Module deploy_lease: one deploy at a time. The lock is a file on each edge host that names its holder and expires."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deploy_lease
short_description: Take, renew or give back the lock of deploys
description:
  - The lock is a lease on each edge host with a holder, a reason and an expiry. Whoever finds it taken is told by whom.
options:
  state:
    description:
      - What to do with the lease. V(retaken) is V(acquired) for a deploy that had it before; it fails if another one has had
        the lease since, even if that has given it back.
    type: str
    choices: [acquired, retaken, renewed, released]
    required: true
  deploy:
    description: Identity of the deploy that holds or wants the lease.
    type: str
    required: true
  holder:
    description: Who that is, for people, for instance V(ada@laptop).
    type: str
    default: ""
  process:
    description: Identity of the controlling process; lets the same controller see later that it is gone.
    type: str
    default: ""
  reason:
    description: What the lease is for.
    type: str
    default: ""
  seconds:
    description: How long the lease is valid unless it is renewed.
    type: int
    default: 1800
  replaces:
    description: A deploy whose lease may be taken over, because its process is gone or a person said so.
    type: str
    default: ""
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Take the lock
  deploy_lease:
    state: acquired
    deploy: 20260101T120000-4711
    holder: ada@laptop
    reason: deploy 0.1.0
"""

RETURN = r"""
lease:
  description: The lease after the call.
  type: dict
  returned: always
taken:
  description: Another deploy has the lease, or has had it since.
  type: bool
  returned: on failure
"""

from ansible.module_utils.atlas_host import Host
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lease import DIRECTORY, LeaseError, apply, had_by_another


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["acquired", "retaken", "renewed", "released"], "required": True},
            "deploy": {"type": "str", "required": True},
            "holder": {"type": "str", "default": ""},
            "process": {"type": "str", "default": ""},
            "reason": {"type": "str", "default": ""},
            "seconds": {"type": "int", "default": 1800},
            "replaces": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params, host = dict(module.params), Host()
    try:
        if params["state"] == "retaken":
            other = "" if module.check_mode else had_by_another(host.journal(), params["deploy"])
            if other:
                raise LeaseError(f"The lock was taken by another deploy meanwhile: {other}.")
            params["state"] = "acquired"
        result = apply(params, DIRECTORY, module.check_mode)
        if result["changed"] and not module.check_mode:
            who = {key: params[key] for key in ("deploy", "holder", "reason")}
            host.record("lock" if result["lease"] else "unlock", phase="lock", outcome="ok", **who)
        module.exit_json(**result)
    except LeaseError as error:
        module.fail_json(msg=str(error), taken=True)
    except OSError as error:
        module.fail_json(msg=f"The lock cannot be written: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
