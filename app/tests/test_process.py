"""What every process says: to systemd, and to the journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_for
from running import SOURCE, Ear

from atlas.watchdog import Notifier


@pytest.mark.parametrize("abstract", [True, False])
def test_the_service_manager_hears_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@atlas-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    ear = Ear(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    notifier = Notifier()
    assert "NOTIFY_SOCKET" not in os.environ and notifier.interval == 1
    notifier.ready("serving")
    notifier.ping()
    wait_for(lambda: len(ear.heard) == 3, 5, "three lines")
    assert [line for _, line in ear.heard] == ["READY=1", "STATUS=serving", "WATCHDOG=1"]
    ear.close()


def test_a_watchdog_meant_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier().timeout is None


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ping()
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    Notifier().ping()


def test_every_line_of_the_log_is_json_and_says_where_it_comes_from() -> None:
    code = """
import logging, structlog
from atlas import logs
from atlas.settings import Identity
logs.configure("info", "core", Identity(7, "0.1.0-abc", "blue", "test1"))
with structlog.contextvars.bound_contextvars(request_id="r1"):
    structlog.get_logger("atlas.x").info("ours", number=1)
    logging.getLogger("library").warning("theirs %s", "too")
    structlog.get_logger("atlas.x").debug("hidden")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("library").exception("broken")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)}, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["ours", "theirs too", "broken"] and done.stderr == ""
    stamp = {"service": "core", "host": "test1", "slot": "blue", "release": "0.1.0-abc", "request_id": "r1"}
    for line in lines:
        assert stamp.items() <= line.items() and line["time"].endswith("Z")
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert lines[0]["number"] == 1 and "ZeroDivisionError" in lines[2]["exception"]
