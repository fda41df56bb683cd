#!/usr/bin/python
"""Module ops_report: judges what the hosts said, on the controller, and keeps the report; the rules are in module_utils."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ops_report
short_description: Judge what hosts told an operations check, and keep the report
description:
  - Compares what M(ops_facts) found on every host with limits and with the last report, writes the new report, and returns findings
    and tables for people. Runs on the controller.
  - In check mode the report is written too; it is all that a check ever changes.
options:
  check:
    description: Which check it is.
    type: str
    required: true
    choices: [daily, weekly, monthly, quarterly]
  facts:
    description: Host to result of M(ops_facts); empty for C(quarterly).
    type: dict
    required: true
  policy:
    description: Limits and names, as the role C(ops) hands them over; for C(quarterly) its C(steps) too.
    type: dict
    required: true
  directory:
    description: Where reports are kept.
    type: path
    required: true
  secrets:
    description: Values that must not be in a report, whatever a host said.
    type: list
    elements: str
    default: []
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Judge it
  ops_report:
    check: daily
    facts: "{{ found }}"
    policy: "{{ policy }}"
    directory: reports/ops/production
  delegate_to: localhost
"""

RETURN = r"""
findings:
  description: What needs a person; each with C(kind), C(host), C(what), C(look), C(mend) and C(page).
  type: list
  returned: always
told:
  description: The findings for people.
  type: str
  returned: always
text:
  description: Tables for people.
  type: str
  returned: always
report:
  description: The file that was written.
  type: str
  returned: always
"""

import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ops_archive import hide, keep, load
from ansible.module_utils.ops_checks import JUDGES, judge, text
from ansible.module_utils.ops_runbook import told


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "check": {"type": "str", "required": True, "choices": list(JUDGES)},
            "facts": {"type": "dict", "required": True},
            "policy": {"type": "dict", "required": True},
            "directory": {"type": "path", "required": True},
            "secrets": {"type": "list", "elements": "str", "default": [], "no_log": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    directory, now = Path(params["directory"]), time.time()
    before = load(directory)
    report = hide(judge(params["check"], params["facts"], params["policy"], before, now), params["secrets"])
    same = [each["at"] for each in before if each.get("check") == params["check"]]
    try:
        path = keep(report, directory)
    except OSError as error:
        module.fail_json(
            msg=f"The report cannot be written: {error.filename}: {error.strerror}. Set ops_reports to another place."
        )
    findings = report["findings"]
    module.exit_json(
        changed=False,
        findings=findings,
        told=told(findings),
        text=text(report, max(same, default=None)),
        report=str(path),
    )


if __name__ == "__main__":
    main()
