"""A host that is lost in the middle of a deploy: users lose at most what it had in hand, and the next run puts things right."""

from __future__ import annotations

import time

import pytest
from interruptions import await_rest, reboot
from labtest import Lab
from prooftest import deploy, good_in_turn, load, releases_in_service

from tests.load.verdict import Span

RATE = 20.0


@pytest.mark.parametrize("strategy", ["rolling", "blue_green"])
def test_an_app_host_that_reboots(lab: Lab, strategy: str) -> None:
    _, (new, wanted) = good_in_turn(lab)
    with load(lab, RATE) as traffic:
        reboot(lab, new, strategy)
        step = deploy(lab, new, strategy).succeeded()
        assert releases_in_service(lab) == {wanted}
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(step.ended, time.time(), release=wanted)])
    print(f"\n{verdict}")
    failed = [outcome for outcome in traffic.outcomes if not outcome.good]
    assert len(failed) <= RATE, "more than what a host has in hand in a second"
    assert [outcome for outcome in failed if outcome.wrote and outcome.status == 200] == []
    assert [
        finding for finding in verdict.findings if "exactly once" in finding or "were not answered" in finding
    ] == []
