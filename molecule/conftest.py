"""Fixtures of the checks that run on a raised lab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from labtest import LAB_NAME, Lab, poll


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab under test."""
    return Lab.open(LAB_NAME)


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Poll a condition until it returns something true, or fail at the deadline with what it returned last."""
    return poll
