"""A rehearsal of production finds what only production has: its store, its settings, its schema. Takes about 20 minutes.

    .venv/bin/pytest -x tests/rehearsal

One lab in the shape of production serves all of them. Part of `make test-full`. ATLAS_REHEARSAL_LAB=NAME: that lab, which stays
if it is there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import bad_releases

PROJECT = Path(__file__).resolve().parents[2]
LAB = os.environ.get("ATLAS_REHEARSAL_LAB", "test-rehearsal")
pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    """Take the lab down at the end, whatever happens, unless it was there."""
    was_there = (PROJECT / ".lab" / LAB / "access.json").exists()
    yield
    if not was_there:
        subprocess.run(["make", "down", f"LAB={LAB}"], cwd=PROJECT, check=True, capture_output=True)


def rehearse(release: Path) -> tuple[int, str, dict[str, Any]]:
    """Rehearse *release* after the good one; return the exit code, the output, and the figures."""
    present = bad_releases.build("good")
    run = subprocess.run(
        [sys.executable, "bin/rehearse", "production", "--lab", LAB, "--keep", "--present", str(present), "--release", str(release)],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(run.stdout[-4000:], run.stderr)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("figures: ")]
    figures = json.loads((PROJECT / line.removeprefix("figures: ").partition(";")[0]).read_text())
    return run.returncode, run.stdout, figures


def test_a_good_release_is_found_good() -> None:
    code, _, figures = rehearse(bad_releases.build("good_next"))
    assert code == 0 and figures["findings"] == []
    assert figures["promotion"] == {"passed": ["signature", "schema", "settings", "freeze"], "refused": []}
    assert figures["load"]["failed"] == 0 and figures["load"]["sent"] > 1000
    assert len(figures["deploy"]["switches"]) == 2 and figures["deploy"]["canary"]
    assert figures["rollback"]["to_traffic"] < 60


@pytest.mark.parametrize(
    ("name", "gate", "said"),
    [
        ("fails_with_postgresql", None, "phase switch"),
        ("needs_a_setting", "settings", "mail_relay is required in production"),
        ("foreign_schema", "schema", "8001"),
    ],
)
def test_what_would_hurt_production_alone_is_found(name: str, gate: str | None, said: str) -> None:
    """By the gate of the promotion that is there for it, or else in the deploy. And nobody notices: what was there goes on serving."""
    code, _, figures = rehearse(bad_releases.build(name))
    assert code == 1
    where = f"the promotion was refused: {gate}: " if gate else "the deploy failed: "
    assert any(finding.startswith(where) and said in finding for finding in figures["findings"]), figures["findings"]
    assert figures["load"]["failed"] == 0 and figures["load"]["sent"] > 100
