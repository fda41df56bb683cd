#!/usr/bin/python
"""Module rotation_record: notes a step of a rotation in a host's journal, and revokes the credentials of old deployments."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rotation_record
short_description: Note a step of a rotation
description:
  - Appends an entry to the journal of deployments, from which the next run of a rotation knows how far the last one came.
  - With O(revoke_others) the deployments that are not in service get current credentials if they ever come back (a rollback
    renews those with the file C(credentials.revoked)).
options:
  entry:
    description: The entry; kind and step, fingerprints, never a value.
    type: dict
    default: {}
  revoke_others:
    description: Whether the credentials of deployments that are not in service are good no longer.
    type: bool
    default: false
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Note that it has begun
  rotation_record:
    entry: {kind: fernet, step: begun, new: 0123456789ab}
"""

RETURN = r"""
revoked:
  description: The deployments whose credentials are good no longer.
  type: list
  returned: success
"""

from ansible.module_utils.atlas_host import Host, HostError
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rotation import EVENT


def revoke_others(host: Host) -> list[int]:
    """Mark the deployments that are not in service, and return those that were not marked before."""
    slot = host.in_service()
    current = host.slots()[slot] if slot else None
    revoked = []
    for number in host.deployments():
        mark = host.deployment(number) / "credentials.revoked"
        if number != current and not mark.exists():
            mark.touch(mode=0o644)
            revoked.append(number)
    return revoked


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "entry": {"type": "dict", "default": {}},
            "revoke_others": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    entry, wanted = module.params["entry"], module.params["revoke_others"]
    host = Host()
    try:
        if not module.check_mode:
            revoked = revoke_others(host) if wanted else []
            if entry:
                host.record(EVENT, **entry)
    except (HostError, OSError) as error:
        module.fail_json(msg=f"The journal cannot be written: {error}")
    module.exit_json(changed=bool(entry or wanted), revoked=[] if module.check_mode else revoked)


if __name__ == "__main__":
    main()
