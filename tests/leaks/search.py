"""Where secrets must not be: runs on a host of a lab, or on the controller, with the Python that is there.

Reads JSON from stdin: ``needles`` (hex; none with a line break), ``roots``, ``skip`` (directories), ``system`` (whether to look at
processes and the journal too). Prints one place per line, never what was found there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO


def main() -> None:
    """Print every place that holds one of the needles."""
    wanted = json.load(sys.stdin)
    needles = b"\n".join(bytes.fromhex(needle) for needle in wanted["needles"])
    skip = tuple(f"{directory}/" for directory in wanted["skip"])
    places = [place for place in grep(needles, ["-r", "--", *wanted["roots"]]) if not place.startswith(skip)]
    if wanted["system"]:
        mine = (f"/proc/{os.getpid()}/", f"/proc/{os.getppid()}/")
        processes = [f"/proc/{number}/" for number in os.listdir("/proc") if number.isdigit()]
        files = [process + name for process in processes if process not in mine for name in ("environ", "cmdline")]
        places += grep(needles, ["--", *files])
        with subprocess.Popen(
            ["journalctl", "--all", "--output=export", "--no-pager"], stdout=subprocess.PIPE
        ) as journal:
            places += ["the journal" for _ in grep(needles, ["--", "-"], journal.stdout)]
    for place in places:
        print(place)


def grep(needles: bytes, arguments: Sequence[str], stdin: IO[bytes] | None = None) -> list[str]:
    """Return the files with one of *needles*; what vanishes or cannot be read holds nothing. They travel in a pipe alone."""
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["grep", "-lasFZ", "-D", "skip", "-f", f"/proc/self/fd/{reading}", *arguments],
        stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        pass_fds=[reading], env={**os.environ, "LC_ALL": "C"},
    ) as process:  # fmt: skip
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(needles)
        output, errors = process.communicate()
    if errors or process.returncode > 2:
        sys.exit(f"search: {errors.decode(errors='replace').strip()}, status {process.returncode}")
    return [name.decode(errors="replace") for name in output.split(b"\0") if name]


if __name__ == "__main__":
    main()
