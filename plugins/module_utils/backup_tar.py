"""Streams of files between hosts, as tar: what comes in is never trusted."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from ansible.module_utils.backup_core import BackupError

_BLOCK = 1 << 20
_END = "end-of-stream"
_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.\.(?:/|$))[A-Za-z0-9._+@=,:/ -]{1,240}")


def send(out: IO[bytes], files: Iterable[tuple[str, Path]], may_vanish: bool = False) -> None:
    """Write each file (name in the stream, path) to *out*; directories keep theirs, links are not followed.

    *may_vanish*: a file that is gone when its turn comes is left out.
    """
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BLOCK) as stream:
        for name, path in files:
            try:
                stream.add(path, arcname=name, recursive=False)
            except FileNotFoundError:
                if not may_vanish:
                    raise
        # A stream that is cut between two files looks like one that has ended.
        stream.addfile(tarfile.TarInfo(_END))


def receive(
    source: IO[bytes], directory: Path, limit: int, accept: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Unpack regular files and directories of the stream *source* into *directory*, at most *limit* bytes of them.

    Raises BackupError for anything that would end up elsewhere, for links and devices, and for a stream cut short.
    """
    names, left, is_complete = [], limit, False
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=_BLOCK) as stream:
            for member in stream:
                if member.name == _END:
                    is_complete = True
                    continue
                if not _NAME.fullmatch(member.name) or not accept(member.name):
                    raise BackupError(f"the stream holds {member.name!r}, which has no place here")
                target = directory / member.name
                if member.isdir():
                    target.mkdir(mode=0o700, parents=True, exist_ok=True)
                    continue
                if not member.isreg():
                    raise BackupError(f"the stream holds {member.name!r}, which is neither file nor directory")
                left -= member.size
                if left < 0:
                    raise BackupError(f"full disk: the stream is larger than the {limit >> 20} MB that may come in")
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                content = stream.extractfile(member)
                assert content is not None  # noqa: S101 - a regular file
                with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    shutil.copyfileobj(content, file, _BLOCK)
                os.utime(target, (member.mtime, member.mtime))
                names.append(member.name)
    except (tarfile.TarError, EOFError) as error:
        raise BackupError(f"the stream is damaged or was cut short: {error}") from None
    if not is_complete:
        raise BackupError("the stream is empty or was cut short")
    return names


def tree(directory: Path, top: str) -> Iterable[tuple[str, Path]]:
    """Name and path of all files and directories under *directory*, named below *top*."""
    yield top, directory
    for path in sorted(directory.rglob("*")):
        if path.is_file() or path.is_dir():
            yield f"{top}/{path.relative_to(directory)}", path
