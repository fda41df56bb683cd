"""Where secrets must not be: runs on a host of a lab, or on the controller, with the Python that is there.

Reads JSON from stdin: ``needles`` (hex), ``roots``, ``skip`` (directories), ``system`` (whether to look at processes and the
journal too). Prints one place per line, never what was found there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

CHUNK = 1 << 20


def main() -> None:
    """Print every place that holds one of the needles."""
    wanted = json.load(sys.stdin)
    needles = [bytes.fromhex(needle) for needle in wanted["needles"]]
    pattern = re.compile(b"|".join(map(re.escape, needles)))
    longest = max(map(len, needles))
    for root in wanted["roots"]:
        for path in files(root, set(wanted["skip"])):
            if holds(path, pattern, longest):
                print(path)
    if wanted["system"]:
        for path in processes():
            if holds(path, pattern, longest):
                print(path)
        journal = subprocess.run(
            ["journalctl", "--all", "--output=export", "--no-pager"], stdout=subprocess.PIPE
        ).stdout
        if pattern.search(journal):
            print("the journal")


def files(root: str, skip: set[str]) -> Iterator[str]:
    """Yield the regular files at or below *root*, but not below *skip*."""
    if os.path.isfile(root):
        yield root
    for directory, names, found in os.walk(root):
        names[:] = [name for name in names if os.path.join(directory, name) not in skip]
        for name in found:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield path


def processes() -> Iterator[str]:
    """Yield the environment and arguments of every process but this one."""
    for number in os.listdir("/proc"):
        if number.isdigit() and int(number) != os.getpid():
            yield from (f"/proc/{number}/environ", f"/proc/{number}/cmdline")


def holds(path: str, pattern: re.Pattern[bytes], longest: int) -> bool:
    """Tell whether the file at *path* holds *pattern*; what vanished or cannot be read holds nothing."""
    rest = b""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                if pattern.search(rest + chunk):
                    return True
                rest = (rest + chunk)[-longest:]
    except OSError:
        pass
    return False


if __name__ == "__main__":
    main()
