"""Watches an edge from beside HAProxy during a load: when its map switched, and how far its own counters moved.

Asks the runtime socket as an outsider, so that what a deploy says of itself is not the only word on it. The counters of
processes that a reload replaced are asked through the master socket as long as they live.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.load.verdict import HIDDEN

POLL_SECONDS = 0.02
REPORT_SECONDS = 0.5
ANSWER_SECONDS = 30.0

SCRIPT = f"""#python
import csv, io, json, re, socket, time

def ask(path, command):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(path)
        connection.sendall(command.encode() + b"\\n")
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

def moved(text):
    rows = csv.DictReader(io.StringIO(text.strip().removeprefix("# ")))
    backends = [row for row in rows if row["svname"] == "BACKEND" and row["pxname"].startswith("be_")]
    return {{name: sum(int(row[name] or 0) for row in backends) for name in {HIDDEN!r}}}

def look():
    pid = re.search(r"^Pid: (\\d+)", ask("/run/haproxy/admin.sock", "show info"), re.M)[1]
    found = {{pid: moved(ask("/run/haproxy/admin.sock", "show stat"))}}
    old = ask("/run/haproxy-master.sock", "show proc").partition("# old workers")[2].partition("# programs")[0]
    for other in re.findall(r"^(\\d+)\\s+worker", old, re.M):
        found[other] = moved(ask("/run/haproxy-master.sock", "@!" + other + " show stat"))
    return found

shown, due = None, 0.0
while True:
    line = ""
    try:
        lines = ask("/run/haproxy/admin.sock", "show map /etc/haproxy/slot.map").split("\\n")
        value = next((fields[2] for fields in map(str.split, lines) if fields[1:2] == ["active"]), "")
        if value != shown or time.monotonic() >= due:
            at = time.time()
            line = json.dumps({{"at": at, "map": value, "counters": look()}})
            shown, due = value, time.monotonic() + {REPORT_SECONDS}
    except (OSError, TypeError, LookupError, ValueError):
        pass  # a reload has just taken the socket away
    if line:
        print(line, flush=True)  # whoever listened is gone: this ends it
    time.sleep({POLL_SECONDS})
"""


class Witness:
    """What happens on one edge; *start* runs a script there, with its standard output in a pipe."""

    def __init__(self, start: Callable[[str], subprocess.Popen[str]]) -> None:
        self._process = start(SCRIPT)
        self._reports: list[dict[str, Any]] = []
        # Read all the time: a pipe holds minutes of it, and what stands behind that is lost with the process.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._await_report(0, "cannot be watched")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # the line at which it was ended
                self._reports.append(json.loads(line))

    def _await_report(self, since: float, otherwise: str) -> None:
        """Wait for a report made after *since*, Unix time; raise RuntimeError where none comes."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self._reports or self._reports[-1]["at"] <= since:
            if time.monotonic() > deadline or not self._reader.is_alive():
                raise RuntimeError(
                    f"the edge {otherwise}: nothing came from it in {ANSWER_SECONDS:g} s, or its script ended"
                )
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Take a last report, made from now on, and end; raise RuntimeError where it saw nothing of the end."""
        try:
            self._await_report(time.time(), "was not watched to the end")
        finally:
            self._process.terminate()
            self._process.wait(30)
            self._reader.join(30)
        times = [report["at"] for report in self._reports]
        blind = max((after - before for before, after in zip(times, times[1:], strict=False)), default=0.0)
        if blind > ANSWER_SECONDS:
            raise RuntimeError(f"the edge was not watched for {blind:.0f} s")

    @property
    def switches(self) -> list[tuple[float, str]]:
        """Each (Unix time, backend) from which on the map named another backend, as it was seen."""
        pairs = zip(self._reports, self._reports[1:], strict=False)
        return [(after["at"], after["map"]) for before, after in pairs if after["map"] != before["map"]]

    @property
    def counters(self) -> dict[str, int]:
        """By how much each of the balancer's counters moved, over all its processes."""
        last: dict[str, dict[str, int]] = {}
        for report in self._reports:
            last |= report["counters"]
        first = self._reports[0]["counters"]
        return {
            name: sum(values[name] - first.get(pid, {}).get(name, 0) for pid, values in last.items()) for name in HIDDEN
        }
