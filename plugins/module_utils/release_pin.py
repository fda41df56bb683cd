"""The release that an inventory pins: its form, whether an archive is the pinned one, and how the pin's file is written.

Pure but for :func:`find`, which reads archives. The pin is ``group_vars/all/release.yml`` of an environment: one variable,
``release_pin``, with version, digest and signer, and what its promotion has to tell a reviewer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils import release

PLACE = Path("group_vars/all/release.yml")
_FORMS = {
    "version": r"[0-9A-Za-z][0-9A-Za-z.+-]*",
    "digest": r"[0-9a-f]{64}",
    "signer": r"SHA256:[A-Za-z0-9+/]{43}",
}
_HEADING = "---\n# The release of this environment. Written by playbooks/promote.yml: review the change, commit it, deploy it.\n"


class PinError(Exception):
    """What is wrong with a pin, or with a release beside it, in words for the user."""


def check(pin: Mapping[str, Any]) -> None:
    """Raise PinError unless *pin* names version, digest (64 hex digits) and signer (the key's fingerprint)."""
    if not pin:
        raise PinError(
            "The inventory pins no release, and release_pin_required allows no other. Promote one: "
            "ansible-playbook playbooks/promote.yml -e from=ENVIRONMENT -e to=ENVIRONMENT"
        )
    wrong = [key for key, form in _FORMS.items() if not re.fullmatch(form, str(pin.get(key, "")))]
    if wrong:
        raise PinError(
            f"release_pin ({PLACE}) has no usable {', '.join(wrong)}. Promote again, or restore it from git."
        )


def name(pin: Mapping[str, Any]) -> str:
    """Return the ID of the release that *pin* names."""
    return release.release_id(str(pin["version"]), str(pin["digest"]))


def find(directory: Path, pin: Mapping[str, Any]) -> Path:
    """Return the archive of the pinned release below *directory*; raise PinError where there is none."""
    for archive in sorted(directory.rglob("*.tar.gz")):
        if release.file_digest(archive) == pin["digest"]:
            return archive
    raise PinError(
        f"The pinned release {name(pin)} is not in {directory}. A promotion puts it there, on the machine that runs it: "
        f"copy the archive and its signature from a host (/opt/atlas/archives/{name(pin)}.tar.gz and .sig), "
        "or name another copy: -e release=FILE"
    )


def check_release(pin: Mapping[str, Any], version: str, digest: str, signer: str) -> None:
    """Raise PinError unless the release of *version*, *digest* and *signer* is the pinned one."""
    if digest != pin["digest"]:
        raise PinError(
            f"Release {release.release_id(version, digest)} is not the one that the inventory pins, {name(pin)}, and "
            "release_pin_required allows no other. Without -e release=FILE the pinned one is deployed; another is promoted first."
        )
    if version != pin["version"]:
        raise PinError(f"Release {name(pin)} says that its version is {version}: correct release_pin ({PLACE}).")
    if signer != pin["signer"]:
        raise PinError(
            f"Release {name(pin)} is signed by {signer}, the inventory pins the signer {pin['signer']}. "
            "Find out who signed it again, and promote it if that is right."
        )


def text(pin: Mapping[str, Any]) -> str:
    """Return the content of the file that pins *pin*."""
    return _HEADING + yaml.safe_dump({"release_pin": dict(pin)}, sort_keys=False, width=120, allow_unicode=True)
