#!/usr/bin/python
"""Module environment_diff: how the variables of two environments differ."""

from __future__ import annotations

DOCUMENTATION = r"""
module: environment_diff
short_description: Compare the variables of two environments
description:
  - Reads two inventories, each in a process of its own, and compares the variables of the first host of each group. Names and
    addresses of hosts are no difference, their number is. A secret appears as the same or different only. No host is touched.
options:
  a:
    description: An environment, or a directory with environment.yml.
    type: str
    required: true
  b:
    description: Another one.
    type: str
    required: true
  project:
    description: Directory of this project.
    type: path
    required: true
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Compare
  environment_diff:
    a: staging
    b: production
    project: "{{ playbook_dir | dirname }}"
"""

RETURN = r"""
differences:
  description: One entry for each difference, with name, a, b and the groups it is on.
  type: list
  returned: success
lines:
  description: The same as a table.
  type: list
  returned: success
"""

from pathlib import Path

from ansible.module_utils import survey
from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "a": {"type": "str", "required": True},
            "b": {"type": "str", "required": True},
            "project": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    names = [module.params["a"], module.params["b"]]
    if "" in names:
        module.fail_json(msg="Which two? -e a=ENVIRONMENT -e b=ENVIRONMENT")
    try:
        one, other = survey.both(names, Path(module.params["project"]), look=False)
    except survey.SurveyError as error:
        module.fail_json(msg=str(error))
    found = survey.differences(one, other)
    module.exit_json(
        changed=False, differences=found, lines=survey.table(found, one["environment"], other["environment"])
    )


if __name__ == "__main__":
    main()
