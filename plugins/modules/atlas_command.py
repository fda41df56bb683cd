#!/usr/bin/python
"""Module atlas_command: runs commands of a deployment's release in transient units, with its settings and credentials."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_command
short_description: Run the atlas command of a deployment
description:
  - Runs each command in a transient unit with the settings and credentials of the deployment O(number), as the user of the
    service and under its restrictions, whether or not that deployment is in service. Stops at the first one that fails.
options:
  number:
    description: The deployment's number.
    type: int
    required: true
  slot:
    description: The slot that the command should take itself to be in.
    type: str
    choices: [blue, green]
    default: blue
  commands:
    description: Argument lists, for instance V([[db, migrate]]).
    type: list
    elements: list
    required: true
  timeout:
    description: Seconds that each command may take.
    type: int
    default: 120
  reads:
    description: Whether the commands change nothing.
    type: bool
    default: false
  deploy:
    description: The deploy on whose behalf this happens.
    type: str
    default: ""
  phase:
    description: The deploy's phase, for the journal.
    type: str
    default: migrate
author: Atlas
attributes:
  check_mode:
    support: full
    details: Only commands that change nothing (O(reads)) run in check mode.
"""

EXAMPLES = r"""
- name: Bring the schema to the release's head
  atlas_command:
    number: 7
    commands: [[db, migrate]]
"""

RETURN = r"""
outputs:
  description: What each command printed.
  type: list
  returned: success
"""

from contextlib import ExitStack

from ansible.module_utils.atlas_host import Host, HostError
from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "number": {"type": "int", "required": True},
            "slot": {"type": "str", "choices": ["blue", "green"], "default": "blue"},
            "commands": {"type": "list", "elements": "list", "required": True},
            "timeout": {"type": "int", "default": 120},
            "reads": {"type": "bool", "default": False},
            "deploy": {"type": "str", "default": ""},
            "phase": {"type": "str", "default": "migrate"},
        },
        supports_check_mode=True,
    )
    params = module.params
    changed = not params["reads"]
    if module.check_mode and changed:
        module.exit_json(changed=True, outputs=[])
    host = Host()
    outputs = []
    for argv in params["commands"]:
        words = [str(word) for word in argv]
        details = {"deploy": params["deploy"], "deployment": params["number"], "command": " ".join(words)}
        try:
            with ExitStack() as stack:
                entry = stack.enter_context(host.recorded("command", params["phase"], **details)) if changed else {}
                done = host.command(params["number"], params["slot"], words, params["timeout"])
                entry["output"] = done.output.strip()[-300:]
        except HostError as error:
            module.fail_json(msg=str(error), log=error.log)
        except OSError as error:
            module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")
        outputs.append(done.output.strip())
    module.exit_json(changed=changed, outputs=outputs)


if __name__ == "__main__":
    main()
