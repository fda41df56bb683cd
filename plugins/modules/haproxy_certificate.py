#!/usr/bin/python
"""Ansible's way to the certificate of HAProxy; how it is exchanged is in module_utils/haproxy_runtime.py."""

from __future__ import annotations

DOCUMENTATION = """
module: haproxy_certificate
short_description: Give HAProxy a certificate, without a reload where it has one already
description:
  - Refuses a certificate that has expired, or whose private key is another's, before anything is changed.
  - Writes the file, readable by root alone. Where HAProxy runs with that file it takes the new certificate for the next
    connection; established ones go on. What HAProxy then presents is read back.
options:
  path:
    description: The file, named exactly as in the configuration.
    type: path
    required: true
  pem:
    description: Certificate, chain and private key.
    type: str
    required: true
  socket:
    description: The runtime socket, of level admin.
    type: path
    default: /run/haproxy/admin.sock
author: Atlas
"""

EXAMPLES = """
- name: A new certificate
  haproxy_certificate:
    path: /etc/haproxy/tls/edge.pem
    pem: "{{ haproxy_tls_pem }}"
"""

RETURN = """
certificate:
  description: C(names) that it is for, C(expires) (RFC 3339) and C(fingerprint) (SHA-256).
  type: dict
  returned: always
served:
  description: Fingerprint of the certificate that was there before, or null.
  type: str
  returned: always
loaded:
  description: Whether the running HAProxy presents it; false means that it will read the file when it starts or reloads.
  type: bool
  returned: always
"""

import datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.haproxy_runtime import (
    CertificateFailure,
    RuntimeFailure,
    RuntimeSocket,
    exchange_certificate,
    inspect_certificate,
    presented,
)


def apply(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Bring file and process to the certificate of *params*; return the module's result."""
    path, pem = Path(params["path"]), params["pem"].strip() + "\n"
    wanted = inspect_certificate(pem, datetime.datetime.now(datetime.UTC))
    old = path.read_text() if path.exists() else ""
    try:
        before = inspect_certificate(old).report() if old else {}
    except CertificateFailure:
        before = {"names": ["damaged"]}
    runtime = RuntimeSocket(params["socket"])
    try:
        now = presented(runtime, str(path)) if Path(params["socket"]).exists() else None
    except RuntimeFailure:
        now = None  # it does not run, and reads the file when it starts
    mode = path.stat().st_mode & 0o777 if old else 0o600
    changed = old != pem or mode != 0o600 or now not in (None, wanted.sha1)
    if changed and not check:
        exchange_certificate(runtime if now else None, path, pem, wanted.sha1)
    return {
        "changed": changed,
        "certificate": wanted.report(),
        "served": before.get("fingerprint"),
        "loaded": now is not None,
        "diff": [
            {
                "before": _lines(before),
                "after": _lines(wanted.report()),
                "before_header": str(path),
                "after_header": str(path),
            }
        ],
    }


def _lines(report: dict[str, Any]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in report.items())


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "pem": {"type": "str", "required": True, "no_log": True},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**apply(module.params, module.check_mode))
    except (RuntimeFailure, CertificateFailure) as failure:
        module.fail_json(msg=str(failure))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
