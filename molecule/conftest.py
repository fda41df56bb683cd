"""Fixtures of the checks that run on a raised lab."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from labtest import LAB_NAME, Lab


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab under test."""
    return Lab.open(LAB_NAME)


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Poll a condition until it returns something true, or fail at the deadline with what it returned last."""

    def poll(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.3) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            result = condition()
            if result:
                return result
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:.0f} s: {what} (last: {result!r})")
            time.sleep(pause)

    return poll
