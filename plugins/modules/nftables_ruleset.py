#!/usr/bin/python
"""Ansible's way to the host's firewall; what happens on the host is in module_utils/nftables_ruleset.py."""

from __future__ import annotations

DOCUMENTATION = """
module: nftables_ruleset
short_description: Put a whole nftables ruleset into force, with a way back
description:
  - Compares the whole live ruleset with the one given, so that a rule added by hand is a difference too.
  - C(applied) loads it in one transaction and arms a timer that restores the previous one.
  - C(confirmed), run over a fresh connection, cancels the timer, writes C(/etc/nftables.conf) and has the next boot load it.
options:
  ruleset:
    description: The ruleset as text. It must begin by flushing the old one.
    type: str
    required: true
  state:
    description: See the description.
    type: str
    choices: [applied, confirmed]
    required: true
  return_after:
    description: Seconds until the previous ruleset comes back.
    type: int
    default: 60
author: Atlas
"""

EXAMPLES = """
- name: Put the ruleset into effect
  nftables_ruleset:
    state: applied
    ruleset: "{{ lookup('ansible.builtin.template', 'nftables.conf.j2') }}"
"""

RETURN = """
live:
  description: The ruleset that was in force before.
  type: str
  returned: always
"""

from ansible.module_utils import nftables_ruleset as firewall
from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "ruleset": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["applied", "confirmed"], "required": True},
            "return_after": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    ruleset = module.params["ruleset"].rstrip("\n") + "\n"
    try:
        if not firewall.installed():
            if module.check_mode:
                module.exit_json(changed=True, live="", diff={"before": "", "after": ruleset})
            module.fail_json(msg="nftables is not installed on this host: run the role base, which installs it")
        before, after, changed = firewall.compared(ruleset)
        if changed and not module.check_mode:
            if module.params["state"] == "applied":
                firewall.apply(ruleset, module.params["return_after"])
            else:
                firewall.confirm(ruleset)
        module.exit_json(
            changed=changed, live=before, diff={"before": before, "after": after} if before != after else {}
        )
    except firewall.FirewallError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
