"""The private key with which Ansible connects, as files on the controller: a next one made, put in place, the one before forgotten.

At every moment there is a key at the path, and none is lost that a host still asks for: ``PATH.next`` is the coming key,
``PATH.previous`` the one that was. Each has its public half in ``….pub``.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from pathlib import Path


class KeyFailure(Exception):
    """A key that cannot be made; the message has what ssh-keygen said."""


class KeyFile:
    """The key at *path*."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = path.with_name(f"{path.name}.next")
        self.previous = path.with_name(f"{path.name}.previous")

    def make(self) -> str:
        """Make the next key, unless it is made or in place already; return the fingerprint of the one that is coming."""
        if not self.next.exists() and not self.previous.exists():
            _keygen("-y", "-P", "", "-f", str(self.path))
            _public(self.next).unlink(missing_ok=True)
            comment = (self.public(self.path).split(None, 2) + ["", "", ""])[2]
            draft = self.path.with_name(f".{self.path.name}.draft")
            for file in (draft, _public(draft)):
                file.unlink(missing_ok=True)
            _keygen("-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(draft))
            _sync(draft)
            os.replace(_public(draft), _public(self.next))
            os.replace(draft, self.next)
            _sync(self.path.parent)
        return fingerprint(self.public(self.next if self.next.exists() else self.path))

    def put_in_place(self) -> None:
        """Let the next key be the key, and keep the one before; repeated, nothing changes."""
        if not self.next.exists():
            return
        if not self.previous.exists():
            for source, target in ((_public(self.path), _public(self.previous)), (self.path, self.previous)):
                if source.exists():
                    partial = target.with_name(f".{target.name}.partial")
                    shutil.copy2(source, partial)
                    os.replace(partial, target)
        if _public(self.next).exists():
            os.replace(_public(self.next), _public(self.path))
        os.replace(self.next, self.path)

    def forget(self) -> None:
        """Remove the one before."""
        for file in (self.previous, _public(self.previous)):
            file.unlink(missing_ok=True)

    def public(self, path: Path) -> str:
        """Return the public half of the private key in *path*, in one line. Raises KeyFailure."""
        found = _public(path)
        return found.read_text(encoding="utf-8").strip() if found.exists() else _keygen("-y", "-P", "", "-f", str(path))


def fingerprint(public: str) -> str:
    """Return the fingerprint of the key in the line *public*, as ``ssh-keygen -l`` prints it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _public(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def _sync(path: Path) -> None:
    """Have *path* on the disk: hosts will ask for this key, and soon for no other."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keygen(*arguments: str) -> str:
    done = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KeyFailure(f"ssh-keygen: {done.stderr.strip() or 'no answer'}")
    return done.stdout.strip()
