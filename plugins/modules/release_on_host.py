#!/usr/bin/python
"""Ansible module release_on_host: puts a verified release on the host. A thin layer over module_utils/release.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_on_host
short_description: Verify a release archive and unpack it on the host
description:
  - Checks the archive's SHA-256 and its SSH signature before anything of it is read as an archive.
  - Unpacks what this host needs (the tree of its Python, the launcher, manifest and bill of materials) beside its final
    place, compares it with the manifest, compiles it, writes it to disk, and renames it into place. A release is there
    whole or not at all; what an interrupted run left is removed.
  - Keeps the archive and its signature under C(ROOT/archives/), from where they can be fetched and verified again.
  - Does nothing when the release is there and intact. One that was damaged is replaced.
  - With O(head), an archive that is not on the host is made there, from its head and the dependencies of another archive that
    is. They are nine tenths of a release, and change seldom. Digest and signature are those of the whole, as ever.
options:
  archive:
    description:
      - Path of the archive on the host. Where no such file exists, the one kept under C(ROOT/archives/) is used.
    type: path
    required: true
  signature:
    description: Path of the archive's signature on the host, as made by C(ssh-keygen -Y sign -n atlas-release).
    type: path
    required: true
  allowed_signers:
    description: Text of an OpenSSH allowed_signers file; the principal is C(atlas-release).
    type: str
    required: true
  digest:
    description: The archive's expected SHA-256, in hex.
    type: str
    required: true
  head:
    description: The archive's beginning in base64, as the filter P(release_head#filter) gives it.
    type: str
  signature_text:
    description: What the file O(signature) has to hold; goes with O(head).
    type: str
  root:
    description: Directory that holds C(archives/) and C(releases/).
    type: path
    default: /opt/atlas
attributes:
  check_mode:
    support: full
    description: Verifies, and predicts; an archive that is not on the host yet counts as a change.
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Put the release on the host
  release_on_host:
    archive: /opt/atlas/incoming/atlas-0.1.0.tar.gz
    signature: /opt/atlas/incoming/atlas-0.1.0.tar.gz.sig
    allowed_signers: "{{ deploy_allowed_signers }}"
    digest: 3b0c6d7c5f0e8b8f7a8a3b1a5b9f4a8e0d6c1f2b7e9a4d3c5b6a7f8091a2b3c4
"""

RETURN = r"""
incomplete:
  description: Whether the archive has to be copied to the host, because nothing there completes O(head). All else is missing then.
  type: bool
  returned: with O(head)
release_id:
  description: Name of the release, C(VERSION-DIGEST[:12]); null in check mode when the archive is not on the host.
  type: str
  returned: success
  sample: 0.1.0-3b0c6d7c5f0e
path:
  description: Directory of the release; null in check mode when the archive is not on the host.
  type: str
  returned: success
  sample: /opt/atlas/releases/0.1.0-3b0c6d7c5f0e
python:
  description: Version of the Python whose tree was unpacked.
  type: str
  returned: success
  sample: "3.11"
manifest:
  description: The release's manifest (version, commit, digests, pythons, schema); null in check mode when the archive is not on the host.
  type: dict
  returned: success
"""

import base64
import errno
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ansible.module_utils.atlas_host import Host, HostError, write_atomically
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release import (
    ReleaseError,
    check_digest,
    check_python,
    check_signature,
    check_space,
    complete,
    file_digest,
    is_intact,
    keep,
    read_manifest,
    release_id,
    unpack,
)


def run(module: AnsibleModule) -> dict[str, Any]:
    """Verify the archive, bring the host to the wanted state unless in check mode, and return the module's result."""
    parameters = module.params
    root, digest = Path(parameters["root"]), parameters["digest"]
    python = ".".join(platform.python_version_tuple()[:2])
    archive, signature = locate(Path(parameters["archive"]), Path(parameters["signature"]), root, digest)
    if module.check_mode and not archive.exists():
        return {
            "changed": True,
            "release_id": None,
            "path": None,
            "python": python,
            "manifest": None,
            "diff": difference([archive]),
        }

    if parameters["head"] is not None and not module.check_mode and not made(archive, signature, parameters):
        return {"changed": False, "incomplete": True}
    check_digest(archive, digest)
    check_signature(archive, signature, parameters["allowed_signers"])
    manifest = read_manifest(archive)
    check_python(manifest, python)

    name = release_id(manifest["version"], digest)
    directory = root / "releases" / name
    kept = root / "archives" / f"{name}.tar.gz"
    kept_signature = kept.with_name(f"{kept.name}.sig")
    missing = [target for target in (kept, kept_signature) if not target.exists()]
    if not is_intact(directory, manifest, python):
        missing.append(directory)
    if missing and not module.check_mode:
        for parent in (root, directory.parent, kept.parent):
            make_directory(parent)
        check_space(root, manifest, python)
        if directory in missing:
            unpack(archive, manifest, python, directory)
        for source, target in ((archive, kept), (signature, kept_signature)):
            if target in missing:
                keep(source, target)
    result = {
        "changed": bool(missing),
        "release_id": name,
        "path": str(directory),
        "python": python,
        "manifest": manifest,
    }
    return result | {"diff": difference(missing)}


def made(archive: Path, signature: Path, parameters: Mapping[str, Any]) -> bool:
    """Tell whether *archive* is on the host, having made it with its *signature* from what is there if it was not."""
    make_directory(archive.parent)
    if not signature.exists() or signature.read_text() != parameters["signature_text"]:
        write_atomically(signature, parameters["signature_text"])
    if archive.exists() and file_digest(archive) == parameters["digest"]:
        return True
    return complete(base64.b64decode(parameters["head"]), parameters["digest"], archive)


def locate(archive: Path, signature: Path, root: Path, digest: str) -> tuple[Path, Path]:
    """Return *archive* and *signature*, or the pair that is kept under *root* where *archive* does not exist."""
    kept = sorted((root / "archives").glob(f"*-{digest[:12]}.tar.gz"))
    if archive.exists() or not kept:
        return archive, signature
    return kept[0], kept[0].with_name(f"{kept[0].name}.sig")


def make_directory(path: Path) -> None:
    """Make *path* with mode 0755 whatever the umask; leave one that exists as it is."""
    if not path.exists():
        path.mkdir(parents=True)
        path.chmod(0o755)


def difference(missing: list[Path]) -> dict[str, str]:
    """Return what a diff shows: the paths that come into being."""
    return {"before": "", "after": "".join(f"{path}\n" for path in missing)}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "archive": {"type": "path", "required": True},
            "signature": {"type": "path", "required": True},
            "allowed_signers": {"type": "str", "required": True},
            "digest": {"type": "str", "required": True},
            "head": {"type": "str", "no_log": True},  # no secret, but long: no result repeats it
            "signature_text": {"type": "str"},
            "root": {"type": "path", "default": "/opt/atlas"},
        },
        required_together=[("head", "signature_text")],
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    try:
        with Host(root=root).alone() if root.is_dir() and not module.check_mode else nullcontext():
            result = run(module)
    except (ReleaseError, HostError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        cause = (
            "the disk is full; free space and run the playbook again" if error.errno == errno.ENOSPC else error.strerror
        )
        module.fail_json(msg=f"{error.filename or module.params['root']}: {cause}. The release was not put into place.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
