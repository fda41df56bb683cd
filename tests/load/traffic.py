"""A load in a process of its own, so that neither a busy test nor a playbook delays a request. Owns its file of outcomes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.load.client import PREPARE_SECONDS, Outcome
from tests.load.verdict import Span, Verdict, judge

PROJECT = Path(__file__).resolve().parents[2]
END_SECONDS = 60.0
"""More than any request may take."""


class Traffic:
    """Open-loop load on the lab whose ``access.json`` is *access*, from entering the block to leaving it.

    *rate*: requests per second in all. *edges*: URLs of the edges, where there are several. *slow_seconds*: how long slow
    bodies and slowly read answers last; 0 for none of them. After the block, *outcomes* has one entry for each of the *planned* requests.
    """

    def __init__(self, access: Path, rate: float, edges: Sequence[str] = (), slow_seconds: float = 2.0) -> None:
        self.run = f"load-{uuid.uuid4().hex[:12]}"
        self.planned, self.outcomes = 0, list[Outcome]()
        self._folder = tempfile.TemporaryDirectory(prefix="atlas-load-")
        self._file = Path(self._folder.name) / "outcomes.jsonl"
        self._argv = [
            sys.executable, "-m", "tests.load", "--access", str(access), "--rate", str(rate), "--run", self.run,
            "--outcomes", str(self._file), f"--slow-seconds={slow_seconds:g}", *(f"--edge={edge}" for edge in edges),
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + PREPARE_SECONDS + END_SECONDS
        while not self.sent():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"the load did not begin: {self._process.communicate()[1].strip()}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            said = self._process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()
        self.planned, self.outcomes = read(self._file)
        self._folder.cleanup()
        if error is None and (self._process.returncode or not self.planned):
            raise RuntimeError(f"the load did not end as it should: {said[1].strip() or self._process.returncode}")

    def sent(self) -> int:
        """Return how many requests have their outcome by now."""
        try:
            return self._file.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    @property
    def documents(self) -> list[str]:
        """The documents that were acknowledged."""
        return [outcome.identifier for outcome in self.outcomes if outcome.good and outcome.wrote]

    def judge(
        self,
        applied: Mapping[str, int] | None = None,
        stored: int | None = None,
        spans: Sequence[Span] = (),
        counters: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Verdict:
        """Return :func:`tests.load.verdict.judge` of this load."""
        return judge(self.planned, self.outcomes, applied, stored, spans, counters)


def read(file: Path) -> tuple[int, list[Outcome]]:
    """Return (planned requests, outcomes) of a finished load's *file*; 0 planned if it was cut off."""
    planned, outcomes = 0, []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            value: Any = json.loads(line)
        except ValueError:
            continue  # the line at which the load was killed
        if isinstance(value, dict):
            planned = int(value["planned"])
        else:
            outcomes.append(Outcome(*value))
    return planned, outcomes
