#!/usr/bin/python
"""Ansible module: the hosts of a lab, and the inventory that reaches them."""

from __future__ import annotations

DOCUMENTATION = """
module: lab_hosts
short_description: Raise a lab or take it down
description:
  - Raises one container per host of an environment and one origin host, on a network of their own, and derives the
    inventory that reaches them over SSH. Hosts that run already are left alone.
  - Touches only what carries the lab's label.
options:
  name:
    description: Name of the lab.
    required: true
    type: str
  root:
    description: The checkout that holds C(.lab).
    required: true
    type: path
  state:
    description: Whether the lab is there.
    default: present
    choices: [present, absent]
    type: str
  inventory:
    description: Inventory directory of the environment; required when present.
    type: path
  images:
    description: Debian release and image, as lab_image returns them; required when present.
    type: dict
  debian_release:
    description: Release for every host, instead of the one in hosts.yml.
    type: str
    choices: [bookworm, trixie]
"""

EXAMPLES = """
- name: Raise a lab in the shape of staging
  lab_hosts:
    name: staging
    root: "{{ playbook_dir }}/.."
    inventory: inventories/staging
    images: "{{ images }}"
"""

RETURN = """
changes:
  description: What was done.
  type: list
  returned: always
directory:
  description: The lab's directory.
  type: str
  returned: state is present
hosts:
  description: Host and address.
  type: dict
  returned: state is present
origin:
  description: Address of the origin host.
  type: str
  returned: state is present
origin_digest:
  description: Digest of the role that configures the origin host.
  type: str
  returned: state is present
origin_configured:
  description: Whether the origin host was configured by that very role.
  type: bool
  returned: state is present
"""

import hashlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab_inventory import derive
from ansible.module_utils.labs import RELEASES, Lab, LabError, check_machine, environment_hosts, machine_lock


def role_digest(role: Path) -> str:
    """Digest of a role's files: what was configured by an older role is configured again."""
    digest = hashlib.sha256()
    for path in sorted(path for path in role.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(role)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        {
            "name": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "state": {"type": "str", "default": "present", "choices": ["present", "absent"]},
            "inventory": {"type": "path"},
            "images": {"type": "dict"},
            "debian_release": {"type": "str", "choices": list(RELEASES)},
        },
        required_if=[("state", "present", ("inventory", "images"))],
        supports_check_mode=True,
    )
    result: dict[str, object] = {}
    try:
        check_machine()
        lab = Lab(Path(module.params["root"]), module.params["name"])
        if module.check_mode:
            wanted = module.params["state"] == "present"
            module.exit_json(changed=wanted != bool(lab.containers()), changes=[])
        with machine_lock(lab.root / ".lab"):
            if module.params["state"] == "absent":
                changes = lab.down()
            else:
                source = Path(module.params["inventory"]).resolve()
                releases = environment_hosts(source)
                if module.params["debian_release"]:
                    releases = dict.fromkeys(releases, module.params["debian_release"])
                record, changes = lab.up(source.name, releases, module.params["images"])
                changes += derive(lab, record, source)
                digest = role_digest(lab.root / "roles" / "origin")
                stamp = lab.directory / "origin-configured"
                if any(change.startswith("origin created") for change in changes):
                    stamp.unlink(missing_ok=True)
                result = {
                    "directory": str(lab.directory),
                    "hosts": record.addresses,
                    "origin": record.origin_address,
                    "origin_digest": digest,
                    "origin_configured": stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == digest,
                }
    except LabError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(changes), changes=changes, **result)


if __name__ == "__main__":
    main()
