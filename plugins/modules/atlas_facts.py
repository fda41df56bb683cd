#!/usr/bin/python
"""Module atlas_facts: all that a deploy or a status report asks of a host, in one call; changes nothing."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_facts
short_description: What is deployed on a host, and what state the host is in
description:
  - Returns slots, deployments, releases, the units, the transaction of an unfinished deploy, the end of the journal, disk,
    memory, clock, versions and ports of a host, and the balancer's map, counters and the deploy lease where there is a
    balancer.
options:
  settings:
    description: Text of the wanted settings.yaml, to be compared with what is in service.
    type: str
  credentials:
    description: Name to plaintext of the wanted credentials, to be compared with what is in service. Never logged.
    type: dict
  texts:
    description: Whether to return the settings of every retained deployment.
    type: bool
    default: false
  socket:
    description: The admin socket of the balancer.
    type: path
    default: /run/haproxy/admin.sock
  journal:
    description: How many of the journal's last entries to return.
    type: int
    default: 10
  troubles:
    description: Whether to return what systemd's journal holds against the services, and how many requests they have answered.
    type: bool
    default: false
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Look at the host
  atlas_facts:
  register: found
"""

RETURN = r"""
slot:
  description: The slot in service, or null.
  type: str
  returned: always
slots:
  description: Slot to deployment number.
  type: dict
  returned: always
deployments:
  description: Number to deployment.json.
  type: dict
  returned: always
as_inventory:
  description: Whether settings and credentials in service are the wanted ones; null where nothing is in service or wanted.
  type: bool
  returned: always
stale_units:
  description: Units in service whose unit files changed since they were started.
  type: list
  returned: always
troubles:
  description: >-
    With O(troubles), the Unix time from which on they are known (C(since), null with C(error) for never), and pairs of unit and Unix time:
    C(restarts) by systemd itself, C(complaints) of monitoring that the store does not answer or a probe did not come through.
  type: dict
  returned: always
requests:
  description: With O(troubles), how many requests the slot in service has answered since it started (C(total)), and how many with 5xx (C(failed)).
  type: dict
  returned: always
edge:
  description: The balancer, its map and the lease; C(installed) is false where there is none.
  type: dict
  returned: always
"""

from ansible.module_utils.atlas_host import HostError
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_facts import facts


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "str"},
            "credentials": {"type": "dict", "no_log": True},
            "texts": {"type": "bool", "default": False},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "journal": {"type": "int", "default": 10},
            "troubles": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, **facts(module.params))
    except HostError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
