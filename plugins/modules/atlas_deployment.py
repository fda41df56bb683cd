#!/usr/bin/python
"""Module atlas_deployment: renders one deployment's directory (release, settings, encrypted credentials), whole or not at all."""

from __future__ import annotations

DOCUMENTATION = r"""
module: atlas_deployment
short_description: Render a deployment on a host
description:
  - A deployment is a release, settings and a generation of credentials. The credentials are encrypted on the host, so that
    equal ones look different each time; a keyed fingerprint over the content tells whether a deployment is the wanted one.
  - The new release itself checks what was rendered (C(atlas config check)).
  - With O(renew) an existing deployment keeps release and settings, and gets these credentials in place of its own, which a
    rotation has revoked (it leaves the file C(credentials.revoked) in the deployment's directory).
options:
  number:
    description: The deployment's number, the same on all hosts of a deploy.
    type: int
    required: true
  release:
    description: ID of the release.
    type: str
    required: true
  version:
    description: Version of the release.
    type: str
    required: true
  digest:
    description: SHA-256 of the release's archive.
    type: str
    required: true
  schema:
    description: The release's schema as its manifest has it (head, revisions).
    type: dict
    default: {}
  settings:
    description: Text of the deployment's settings.yaml.
    type: str
    required: true
  credentials:
    description: Name to plaintext of the service's credentials. Never logged.
    type: dict
    required: true
  vault_serial:
    description: The serial of the vault file that the credentials are from. The journal notes it when the deployment comes into service.
    type: int
    default: 0
  check:
    description: Whether the release checks the settings. Its services do so anyhow when they start.
    type: bool
    default: true
  renew:
    description: Whether only the credentials of an existing deployment are replaced.
    type: bool
    default: false
  slot:
    description: The slot for which the release checks its settings.
    type: str
    choices: [blue, green]
    default: blue
  deploy:
    description: The deploy on whose behalf this happens.
    type: str
    default: ""
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Render the deployment
  atlas_deployment:
    number: 7
    release: 0.1.0-0123456789ab
    version: 0.1.0
    digest: "{{ digest }}"
    settings: "{{ atlas_settings | to_nice_yaml }}"
    credentials: "{{ atlas_credentials }}"
"""

RETURN = r"""
current:
  description: The deployment in service, or null.
  type: int
  returned: success
log:
  description: What the release said of its settings.
  type: list
  returned: on failure
"""

import grp
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import (
    Host,
    HostError,
    fingerprint,
    fingerprint_key,
    now,
    put_in_place,
    read_json,
    sync_directory,
    write_atomically,
)
from ansible.module_utils.basic import AnsibleModule

CHECK_SECONDS = 60


def encrypt(host: Host, name: str, secret: str) -> bytes:
    """Return *secret* encrypted for this host under the name ``atlas_NAME``; it travels on stdin alone."""
    done = host.run(["systemd-creds", "encrypt", f"--name=atlas_{name}", "-", "-"], stdin=secret.encode())
    if done.status:
        raise HostError(f"The credential {name} cannot be encrypted: {done.errors.strip()}")
    return done.output.encode()


def render(host: Host, wanted: Mapping[str, Any], credentials: Mapping[str, str]) -> None:
    """Write the deployment of *wanted* (number, settings text and the fields of deployment.json); it appears by one rename."""
    final = host.deployment(int(wanted["id"]))
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(mode=0o755)
        partial.chmod(0o755)
        (partial / "release").symlink_to(f"../../releases/{wanted['release']}")
        _write(partial / "settings.yaml", str(wanted["settings"]).encode(), 0o640)
        os.chown(partial / "settings.yaml", 0, grp.getgrnam("atlas").gr_gid)
        names = ("id", "release", "version", "digest", "schema", "fingerprint", "credentials", "vault_serial")
        content = {key: wanted[key] for key in (*names, "created_at")}
        _write(partial / "deployment.json", (json.dumps(content, indent=2) + "\n").encode(), 0o644)
        (partial / "credentials").mkdir(mode=0o700)
        for name, secret in credentials.items():
            _write(partial / "credentials" / name, encrypt(host, name, secret), 0o600)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def renew(host: Host, number: int, credentials: Mapping[str, str], serial: int) -> None:
    """Give the deployment *number* other credentials, of the vault file *serial*; until the last step it has the ones before."""
    directory = host.deployment(number)
    partial = directory / ".credentials.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for name, secret in credentials.items():
        _write(partial / name, encrypt(host, name, secret), 0o600)
    put_in_place(partial, directory / "credentials")
    content, key = read_json(directory / "deployment.json"), fingerprint_key(host.state)
    settings = _read(directory / "settings.yaml")
    content["fingerprint"] = fingerprint(key, str(content.get("digest")), settings, credentials)
    content |= {"credentials": fingerprint(key, "", "", credentials), "vault_serial": serial}
    write_atomically(directory / "deployment.json", json.dumps(content, indent=2) + "\n")
    (directory / "credentials.revoked").unlink(missing_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "number": {"type": "int", "required": True},
            "release": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "digest": {"type": "str", "required": True},
            "schema": {"type": "dict", "default": {}},
            "settings": {"type": "str", "required": True},
            "credentials": {"type": "dict", "required": True, "no_log": True},
            "vault_serial": {"type": "int", "default": 0},
            "check": {"type": "bool", "default": True},
            "renew": {"type": "bool", "default": False},
            "slot": {"type": "str", "choices": ["blue", "green"], "default": "blue"},
            "deploy": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    host = Host()
    try:
        with nullcontext() if module.check_mode else host.alone():
            result = apply(module.params, host, module.check_mode)
        module.exit_json(**result)
    except HostError as error:
        module.fail_json(msg=str(error), log=error.log)
    except OSError as error:
        module.fail_json(msg=str(error))


def apply(params: Mapping[str, Any], host: Host, check: bool) -> dict[str, Any]:
    """Bring *host* to the state of *params*; return the module's result."""
    credentials = {name: str(secret) for name, secret in params["credentials"].items()}
    settings, number = params["settings"], int(params["number"])
    if params["renew"]:
        if not check:
            with host.recorded("renewed", "stage", deploy=params["deploy"], deployment=number):
                renew(host, number, credentials, params["vault_serial"])
        return {"changed": True, "current": None, "number": number}
    slot = host.in_service()
    current = host.slots()[slot] if slot else None
    present = host.deployment(current) if current is not None else None
    before = read_json(present / "deployment.json") if present else {}
    result: dict[str, Any] = {"current": current, "number": number}
    if not host.state.is_dir():
        return {**result, "changed": True}
    has_key = (host.state / "fingerprint.key").exists()
    mark = (
        fingerprint(fingerprint_key(host.state), params["digest"], settings, credentials)
        if has_key or not check
        else ""
    )
    if mark and read_json(host.deployment(number) / "deployment.json").get("fingerprint") == mark:
        return {**result, "changed": False}
    names = (
        sorted(path.name for path in (present / "credentials").iterdir())
        if present and (present / "credentials").is_dir()
        else []
    )
    text = _read(present / "settings.yaml") if present else ""
    result["diff"] = [
        {
            "before_header": f"deployment {current}" if present else "no deployment",
            "after_header": f"deployment {number}",
            "before": f"{text}release: {before.get('release')}\ncredentials: {', '.join(names)}\n" if present else "",
            "after": f"{settings}release: {params['release']}\ncredentials: {', '.join(sorted(credentials))}\n",
        }
    ]
    if not check:
        details = {"deploy": params["deploy"], "deployment": number, "release": params["release"]}
        with host.recorded("staged", "stage", **details):
            fields = {key: params[key] for key in ("release", "version", "digest", "schema", "vault_serial")}
            own = {"id": number, "fingerprint": mark, "created_at": now(), "settings": settings}
            own["credentials"] = fingerprint(fingerprint_key(host.state), "", "", credentials)
            render(host, {**fields, **own}, credentials)
            if params["check"]:
                host.command(number, params["slot"], ["config", "check"], CHECK_SECONDS)
    return {**result, "changed": True}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
