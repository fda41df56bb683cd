"""What takes two edges: one is lost in the middle of a deploy, and comes back with what it knew before."""

from __future__ import annotations

import time

import pytest
from interruptions import await_rest, lost_edge
from labtest import Lab
from prooftest import GOOD, archive, deploy, load, release_id, releases_in_service, wait_until

from tests.load.verdict import Span


@pytest.mark.parametrize("strategy", ["rolling", "blue_green"])
def test_an_edge_that_is_lost(lab: Lab, strategy: str) -> None:
    """Users of the other edge notice nothing; the next deploy brings both in line."""
    names = dict(zip((release_id(archive(name)) for name in GOOD), GOOD, strict=True))
    (current,) = releases_in_service(lab)
    wanted = next(name for name in names if name != current)
    first = lab.group("edge")[0]
    with load(lab, 20, edges=[first]) as traffic:
        lost_edge(lab, names[wanted], strategy)
        wait_until(lambda: lab.ssh(lab.group("edge")[1], "true").returncode == 0, 60, "the edge is back")
        step = deploy(lab, names[wanted], strategy).succeeded()
        assert releases_in_service(lab) == {wanted}
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(step.ended, time.time(), release=wanted)])
    print(f"\n{verdict}")
    assert verdict.findings == []
    with load(lab, 20) as both:
        time.sleep(3)
    assert both.verdict([Span(0, time.time(), release=wanted)]).findings == []
