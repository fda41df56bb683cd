"""Small signed releases for tests: real archives by the real packer, with the trees that a test gives them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ansible.module_utils import release


def make(directory: Path, version: str = "1.0.0", python: str = "3.11", files: dict[str, bytes] | None = None) -> Path:
    """Return a release in *directory*, signed with the key in ``DIRECTORY/keys``, which is made at first use."""
    contents = {"bin/atlas": b"#!/bin/sh\n", "sbom.cdx.json": b"{}\n", f"python{python}/atlas/__init__.py": b""}
    contents |= files or {}
    parts: dict[str, dict[str, str]] = {}
    for path, content in contents.items():
        parts.setdefault(release.part_of(path), {})[path] = hashlib.sha256(content).hexdigest()
    manifest = {
        "version": version,
        "digests": {part: release.tree_digest(found) for part, found in parts.items()},
        "pythons": [python],
        "bytes": {f"python{python}": 1000},
        "schema": {"head": "0001", "revisions": ["0001"]},
    }
    archive = directory / f"atlas-{version}.tar.gz"
    packed = [release.pack({release.MANIFEST: release.as_json(manifest)}, 0), release.pack(contents, 0)]
    archive.write_bytes(b"".join([*packed, release.archive_end()]))
    release.sign(archive, release.make_key(directory / "keys"))
    return archive


def signers(directory: Path) -> str:
    """Return who may sign the releases in *directory*."""
    return (directory / "keys" / "allowed_signers").read_text()
