"""The witness on an edge sees all of a long load, or says that it did not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.load import witness
from tests.load.witness import Witness

MUCH = """
import json, time
def say(name, at):
    print(json.dumps({"at": at, "map": name, "counters": {"1": {"wretr": 0, "pad": 0}}}), flush=True)
begin = time.time() - 5
for number in range(4000):  # far more than a pipe holds
    say("be_blue", begin + number / 1e6)
say("be_green", begin + 0.005)
"""
REST = """
while True:
    time.sleep(0.05)
    say("be_green", time.time())
"""
GAP = """
say("be_green", time.time() + 100)
"""


@pytest.fixture
def watch() -> Iterator[Callable[[str], Witness]]:
    started: list[subprocess.Popen[str]] = []

    def begin(program: str) -> Witness:
        def start(_: str) -> subprocess.Popen[str]:
            started.append(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True))
            return started[-1]

        return Witness(start)

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_switch_after_more_reports_than_a_pipe_holds_is_seen(watch: Callable[[str], Witness]) -> None:
    seen = watch(MUCH + REST)
    seen.stop()
    assert [name for _, name in seen.switches] == ["be_green"]


def test_a_witness_that_died_or_looked_away_is_no_witness(
    watch: Callable[[str], Witness], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="not watched to the end"):
        watch(MUCH).stop()
    with pytest.raises(RuntimeError, match=r"not watched for 10\d s"):
        watch(MUCH + GAP + REST.replace("time.time()", "time.time() + 100")).stop()
    monkeypatch.setattr(witness, "ANSWER_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="cannot be watched"):
        watch("import time; time.sleep(9)")
