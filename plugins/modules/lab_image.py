#!/usr/bin/python
"""Ansible module: the images that the hosts of a lab start from."""

from __future__ import annotations

DOCUMENTATION = """
module: lab_image
short_description: Make the images of a lab's hosts
description:
  - Makes one image per Debian release that an environment names, from Debian packages; none is asked of a registry.
  - An image is made once and kept for all labs, until its recipe changes.
options:
  inventory:
    description: Inventory directory of the environment.
    required: true
    type: path
  debian_release:
    description: Release for every host, instead of the one in hosts.yml.
    type: str
    choices: [bookworm, trixie]
"""

EXAMPLES = """
- name: Make the images
  lab_image:
    inventory: inventories/staging
"""

RETURN = """
images:
  description: Debian release and the name of its image.
  type: dict
  returned: always
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab_images import ensure
from ansible.module_utils.labs import RELEASES, LabError, Podman, check_machine, environment_hosts


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        {"inventory": {"type": "path", "required": True}, "debian_release": {"type": "str", "choices": list(RELEASES)}},
        supports_check_mode=True,
    )
    try:
        check_machine()
        hosts = environment_hosts(Path(module.params["inventory"]))
        # The origin is a host of the first release.
        wanted = {
            RELEASES[0],
            *([module.params["debian_release"]] if module.params["debian_release"] else hosts.values()),
        }
        made = {release: ensure(Podman(), release, module.check_mode) for release in sorted(wanted)}
    except LabError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=any(new for _, new in made.values()), images={release: name for release, (name, _) in made.items()}
    )


if __name__ == "__main__":
    main()
