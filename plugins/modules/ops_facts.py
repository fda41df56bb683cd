#!/usr/bin/python
"""Module ops_facts: all that an operations check asks of a host, in one call; the questions are in module_utils/ops_gather.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ops_facts
short_description: What an operations check asks of a host, in one call
description:
  - C(daily) asks for failed units, errors in the journal by kind, what C(atlas doctor) finds, health, PostgreSQL and disks.
  - C(weekly) measures a few requests, and asks for security updates, replaced files, pending boots and the counters of traffic.
  - C(monthly) asks for accounts, listening ports, the firewall, the exposure of units, permissions and sizes, and compares settings and
    credentials with the wanted ones.
  - Changes nothing, and returns no secret.
options:
  check:
    description: Which check asks.
    type: str
    required: true
    choices: [daily, weekly, monthly]
  since:
    description: Unix time from which on errors in the journal count.
    type: float
    default: 0
  expected:
    description: What is expected of this host; returned as it is, beside what was found.
    type: dict
    default: {}
  settings:
    description: Text of the wanted settings.yaml, to be compared with what is in service.
    type: str
  credentials:
    description: Name to plaintext of the wanted credentials, to be compared with what is in service. Never logged.
    type: dict
  socket:
    description: The admin socket of the balancer.
    type: path
    default: /run/haproxy/admin.sock
  edge_port:
    description: The port on which the balancer answers in clear.
    type: int
    default: 80
  backup_directory:
    description: Where the backup host keeps its report.
    type: path
    default: /var/lib/atlas-backup
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Look at the host
  ops_facts:
    check: daily
    since: 1790000000
  register: found
"""

RETURN = r"""
atlas:
  description: The result of M(atlas_facts).
  type: dict
  returned: always
disks:
  description: File system to total and used MB and percent of inodes used.
  type: dict
  returned: always
errors:
  description: Kinds of error in the journal, how often and when last, and whether there was more than could be read.
  type: dict
  returned: daily
failed_units:
  description: Units that failed.
  type: list
  returned: daily
updates:
  description: Security updates that are not installed.
  type: list
  returned: weekly
accounts:
  description: Accounts that may log in or have the rights of root, and why.
  type: list
  returned: monthly
sockets:
  description: What listens, where, and by whom.
  type: list
  returned: monthly
permissions:
  description: Files that too many may read or write.
  type: list
  returned: monthly
"""

from ansible.module_utils.atlas_host import HostError
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ops_gather import CHECKS, gather


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "check": {"type": "str", "required": True, "choices": list(CHECKS)},
            "since": {"type": "float", "default": 0},
            "expected": {"type": "dict", "default": {}},
            "settings": {"type": "str"},
            "credentials": {"type": "dict", "no_log": True},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "edge_port": {"type": "int", "default": 80},
            "backup_directory": {"type": "path", "default": "/var/lib/atlas-backup"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, **gather(module.params))
    except HostError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
