#!/usr/bin/python
"""Module host_credentials: keeps a directory of secrets, each encrypted for this host by systemd."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_credentials
short_description: Keep encrypted credentials on a host
description:
  - Encrypts each secret on the host with C(systemd-creds) under the name C(atlas_NAME), for units that load the directory
    with C(LoadCredentialEncrypted=atlas:DIRECTORY). Ciphertext differs each time, so a keyed fingerprint tells whether
    the content is the wanted one.
options:
  directory:
    description: Where the encrypted files lie; nothing else stays in it.
    type: path
    required: true
  credentials:
    description: Name to plaintext. Never logged.
    type: dict
    required: true
author: Atlas
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Keep what backups need
  host_credentials:
    directory: /etc/atlas/backup-credentials
    credentials:
      restic_password: "{{ backup_repository_password }}"
"""

RETURN = r"""
names:
  description: The names of the credentials.
  type: list
  returned: always
"""

import os
import shutil
from pathlib import Path

from ansible.module_utils.atlas_host import (
    HostError,
    fingerprint,
    fingerprint_key,
    put_in_place,
    run,
    write_atomically,
)
from ansible.module_utils.basic import AnsibleModule

STATE = Path("/var/lib/atlas-deploy")


def render(directory: Path, credentials: dict[str, str]) -> None:
    """Write *credentials*, encrypted, as the whole content of *directory*."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    for name, secret in credentials.items():
        done = run(["systemd-creds", "encrypt", f"--name=atlas_{name}", "-", "-"], stdin=secret.encode())
        if done.status:
            raise HostError(f"The credential {name} cannot be encrypted: {done.errors.strip()}")
        handle = os.open(partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(done.output)
            file.flush()
            os.fsync(file.fileno())
    put_in_place(partial, directory)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "credentials": {"type": "dict", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    directory = Path(module.params["directory"])
    credentials = {name: str(secret) for name, secret in module.params["credentials"].items()}
    mark_file = directory.with_name(f"{directory.name}.fingerprint")
    try:
        present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        if not module.check_mode:
            STATE.mkdir(mode=0o700, exist_ok=True)
        has_key = (STATE / "fingerprint.key").exists()
        mark = fingerprint(fingerprint_key(STATE), "", "", credentials) if has_key or not module.check_mode else ""
        known = mark_file.read_text().strip() if mark_file.exists() else "none"
        changed = present != sorted(credentials) or known != mark
        if changed and not module.check_mode:
            render(directory, credentials)
            write_atomically(mark_file, mark + "\n", 0o600)
    except (HostError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, names=sorted(credentials))


if __name__ == "__main__":
    main()
