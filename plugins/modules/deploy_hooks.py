#!/usr/bin/python
"""Module deploy_hooks: runs the hooks of a deploy that are due, on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: deploy_hooks
short_description: Run commands and call webhooks around the phases of a deploy
description:
  - Runs the hooks that are called by O(events), one after the other, with what is going on as JSON. A command gets it on
    standard input, and its main fields as variables of its environment; a webhook gets it as the body of a POST.
  - A command succeeds with exit code 0, a webhook with a status from 200 to 299; redirects are not followed.
  - The first hook that fails ends the module in failure, unless it is optional. Hooks of events after which nothing can be
    stopped are optional.
options:
  hooks:
    description: The hooks of the environment; see C(deploy_hooks) of the role deploy.
    type: list
    elements: dict
    required: true
    options:
      name:
        description: What people call it.
        type: str
        required: true
      events:
        description: When it is due.
        type: list
        elements: str
        required: true
      command:
        description: The program and its arguments. It runs in the top folder of the checkout.
        type: list
        elements: str
      url:
        description: Where to send a POST.
        type: str
      headers:
        description: Its headers.
        type: dict
      seconds:
        description: For how long to wait for an answer.
        type: float
        default: 30
      optional:
        description: Whether a failure is told and no more.
        type: bool
        default: false
  events:
    description: What has just happened, and what comes next.
    type: list
    elements: str
    required: true
  told:
    description: What the hooks are told beside the event.
    type: dict
    required: true
  directory:
    description: Where commands run.
    type: path
    required: true
author: Atlas
attributes:
  check_mode:
    support: full
    description: No hook runs in check mode.
"""

EXAMPLES = r"""
- name: Ask before traffic moves
  deploy_hooks:
    hooks:
      - {name: approval, events: [before_switch], command: [scripts/approve], seconds: 600}
    events: [after_migrate, before_switch]
    told: {environment: staging}
    directory: "{{ playbook_dir }}/.."
  delegate_to: localhost
"""

RETURN = r"""
ran:
  description: Name and event of each hook that ran.
  type: list
  returned: always
troubles:
  description: What went wrong with optional hooks, a sentence each.
  type: list
  returned: always
phase:
  description: The phase in which the deploy has failed by that.
  type: str
  returned: failure
log:
  description: The last lines that the failed hook wrote.
  type: list
  returned: failure
"""

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import urllib.error  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible.module_utils.deploy_hooks import TOO_LATE, due, phase  # noqa: E402
from ansible.module_utils.urls import open_url  # noqa: E402

LINES = 20


class HookError(Exception):
    """What a hook answered instead of success; *log*: its last lines."""

    def __init__(self, message: str, log: list[str] | None = None) -> None:
        super().__init__(message)
        self.log = log or []


def command(hook: Mapping[str, Any], told: Mapping[str, Any], directory: str) -> None:
    """Run the program of *hook*; raise HookError unless it ends in time and with 0."""
    fields = ("event", "environment", "deploy", "release", "deployment")
    known = {f"ATLAS_{name.upper()}": str(told.get(name) or "") for name in fields}
    try:
        done = subprocess.run(
            hook["command"],
            input=json.dumps(told),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=directory,
            env={**os.environ, **known},
            timeout=hook["seconds"],
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HookError(f"it did not end within {hook['seconds']:g} s", _lines(error.output)) from None
    except OSError as error:
        raise HookError(f"{hook['command'][0]}: {error.strerror}") from None
    if done.returncode:
        raise HookError(f"it ended with {done.returncode}", _lines(done.stdout))


def webhook(hook: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Send *told* to the url of *hook*; raise HookError unless the answer is a success. The url may be a secret: it is not told."""
    headers = {"Content-Type": "application/json", **(hook["headers"] or {})}
    try:
        with open_url(
            hook["url"],
            data=json.dumps(told),
            method="POST",
            headers=headers,
            timeout=hook["seconds"],
            follow_redirects="none",
            http_agent="atlas-deploy",
        ) as answer:
            if not 200 <= answer.status < 300:
                raise HookError(f"it answered {answer.status}")
    except urllib.error.HTTPError as error:
        raise HookError(f"it answered {error.code}") from None
    except urllib.error.URLError as error:
        raise HookError(f"it cannot be reached: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise HookError(f"it cannot be reached: {type(error).__name__}") from None


def _lines(output: str | bytes | None) -> list[str]:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text.rstrip().splitlines()[-LINES:]


def main() -> None:
    """Run the module."""
    hook = {
        "name": {"type": "str", "required": True},
        "events": {"type": "list", "elements": "str", "required": True},
        "command": {"type": "list", "elements": "str"},
        "url": {"type": "str", "no_log": True},
        "headers": {"type": "dict", "no_log": True},
        "seconds": {"type": "float", "default": 30},
        "optional": {"type": "bool", "default": False},
    }
    module = AnsibleModule(
        argument_spec={
            "hooks": {"type": "list", "elements": "dict", "required": True, "options": hook},
            "events": {"type": "list", "elements": "str", "required": True},
            "told": {"type": "dict", "required": True},
            "directory": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    given = module.params
    ran: list[str] = []
    troubles: list[str] = []
    for one in due(given["hooks"], given["events"]):
        ran.append(f"{one['name']} ({one['event']})")
        if module.check_mode:
            continue
        told = {"event": one["event"], **given["told"]}
        try:
            if one["command"]:
                command(one, told, given["directory"])
            else:
                webhook(one, told)
        except HookError as error:
            message = f"hook {one['name']} ({one['event']}): {error}"
            if not one["optional"] and one["event"] not in TOO_LATE:
                module.fail_json(
                    msg=f"{message}.", phase=phase(one["event"]), log=error.log, ran=ran, troubles=troubles
                )
            troubles.append(message)
    module.exit_json(changed=False, ran=ran, troubles=troubles)


if __name__ == "__main__":
    main()
