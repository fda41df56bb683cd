#!/usr/bin/python
"""Module edge_probe: asks the balancer as a user would, again and again, and tells which release answers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: edge_probe
short_description: Check through the edge that a release serves
description:
  - Sends requests through the balancer for O(seconds). Succeeds if, after at most O(timeout) seconds, every answer in that
    time is 200 and comes from O(release).
options:
  port:
    description: Port of the balancer.
    type: int
    default: 80
  certificate:
    description: >-
      The certificate that the balancer has to present, in a file, where O(port) is encrypted. Empty where it is not.
    type: path
    default: ""
  path:
    description: What to ask for.
    type: str
    default: /readyz
  release:
    description: The release that has to answer.
    type: str
    required: true
  seconds:
    description: For how long every answer has to be right.
    type: int
    default: 3
  timeout:
    description: Seconds until that has to begin.
    type: int
    default: 15
author: Atlas
attributes:
  check_mode:
    support: full
    details: Asks nothing in check mode.
"""

EXAMPLES = r"""
- name: The new release answers through the edge
  edge_probe:
    release: 0.1.0-0123456789ab
"""

RETURN = r"""
answers:
  description: How many right answers in a row there were.
  type: int
  returned: on success
"""

import ssl
import time
from collections.abc import Callable

from ansible.module_utils.atlas_host import Answer, get
from ansible.module_utils.basic import AnsibleModule

PAUSE = 0.1


def watch(
    ask: Callable[[], Answer],
    release: str,
    seconds: float,
    timeout: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> tuple[int, str]:
    """Ask until *release* answered for *seconds* in a row; return (right answers, "") or (0, what was wrong last)."""
    began, since, count, wrong = clock(), clock(), 0, "no answer yet"
    while True:
        answer = ask()
        found = answer.headers.get("x-atlas-release", "no release at all")
        if answer.status == 200 and found == release:
            count += 1
            if clock() - since >= seconds:
                return count, ""
        else:
            count, since = 0, clock()
            wrong = f"{answer.status or 'no connection'} from {found}"
            if clock() - began > timeout:
                return 0, wrong
        sleep(PAUSE)
        if clock() - began > timeout + 2 * seconds + 5:
            return 0, wrong


def trusting(certificate: str) -> ssl.SSLContext | None:
    """Return a context that trusts the one certificate in the file *certificate*, whatever name it is for; None for ""."""
    if not certificate:
        return None
    context = ssl.create_default_context(cafile=certificate)
    # The balancer is asked by loopback, which no certificate names; who has this one's key is the balancer.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "default": 80},
            "certificate": {"type": "path", "default": ""},
            "path": {"type": "str", "default": "/readyz"},
            "release": {"type": "str", "required": True},
            "seconds": {"type": "int", "default": 3},
            "timeout": {"type": "int", "default": 15},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False)
    params = module.params
    tls = trusting(params["certificate"])
    count, wrong = watch(
        lambda: get(params["port"], params["path"], tls=tls),
        params["release"],
        params["seconds"],
        params["timeout"],
        time.monotonic,
        time.sleep,
    )
    if not count:
        module.fail_json(
            msg=f"Through this edge, {params['path']} should be answered by release {params['release']}, but the last wrong answer was {wrong}."
        )
    module.exit_json(changed=False, answers=count)


if __name__ == "__main__":
    main()
