"""What takes two edges: one is lost in the middle of a deploy, and comes back with what it knew before."""

from __future__ import annotations

import subprocess
import time

import pytest
from interruptions import await_rest, edge_out_of_reach, lost_edge, severable
from labtest import PROJECT, Lab, slot_in_service
from prooftest import deploy, deploy_command, good_in_turn, load, releases_in_service, wait_until

from tests.load.verdict import Span


@pytest.mark.parametrize("strategy", ["rolling", "blue_green"])
def test_an_edge_that_is_lost(lab: Lab, strategy: str) -> None:
    """Users of the other edge notice nothing; the next deploy brings both in line."""
    _, (new, wanted) = good_in_turn(lab)
    first = lab.group("edge")[0]
    with load(lab, 20, edges=[first]) as traffic:
        lost_edge(lab, new, strategy)
        wait_until(lambda: lab.ssh(lab.group("edge")[1], "true").returncode == 0, 60, "the edge is back")
        step = deploy(lab, new, strategy).succeeded()
        assert releases_in_service(lab) == {wanted}
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(step.ended, time.time(), release=wanted)])
    print(f"\n{verdict}")
    assert verdict.findings == []
    with load(lab, 20) as both:
        time.sleep(3)
    assert both.verdict([Span(0, time.time(), release=wanted)]).findings == []


def test_users_of_an_edge_out_of_reach_are_sent_back_too(lab: Lab) -> None:
    """Nobody can tell that edge; the slot that is undone leaves, so that its health checks do."""
    (old, current), (new, wanted) = good_in_turn(lab)
    apps, (first, second) = lab.group("app"), lab.group("edge")
    was = slot_in_service(lab, apps[0])
    undone = "green" if was == "blue" else "blue"
    with load(lab, 30) as traffic:
        said = edge_out_of_reach(lab, new, "blue_green")
        failed = time.time()
        assert f"Not known to send traffic there: {second}." in said, said[-4000:]
        for edge, slot in ((first, was), (second, undone)):
            assert lab.ssh(edge, "cat /etc/haproxy/slot.map").stdout == f"active be_{slot}\n", edge
        for app in apps:
            assert lab.ssh(app, f"systemctl is-active atlas-api@{{{was},{undone}}}").stdout.split() == [
                "active",
                "inactive",
            ]
        time.sleep(5)
        held = time.time()
        step = deploy(lab, old, "blue_green").succeeded()
        for edge in (first, second):
            assert lab.ssh(edge, "cat /etc/haproxy/slot.map").stdout == f"active be_{was}\n", edge
        assert releases_in_service(lab) == {current}
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(failed, held, release=current), Span(step.ended, time.time(), release=current)])
    print(f"\n{verdict}")
    assert verdict.findings == []


def test_users_of_an_edge_that_a_deploy_goes_without_move_when_the_old_slot_leaves(lab: Lab) -> None:
    """With a quorum of edges a deploy goes on without one; what it does not reach still serves users, from the slot that is to stop."""
    _, (new, wanted) = good_in_turn(lab)
    apps, second = lab.group("app"), lab.group("edge")[1]
    was = slot_in_service(lab, apps[0])
    with severable(lab.hosts[second]) as (folder, own), load(lab, 30) as traffic:
        (folder / "cut").touch()
        command = [
            *deploy_command(lab, new, "blue_green"),
            "-e",
            "deploy_edge_quorum=1",
            "-e",
            "deploy_warm_seconds=5",
        ]
        done = subprocess.run(command, cwd=PROJECT, env={**lab.for_playbooks(), **own}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
        assert lab.ssh(second, "cat /etc/haproxy/slot.map").stdout == f"active be_{was}\n"
        look = f"systemctl is-active --quiet atlas-api@{was}"
        wait_until(lambda: all(lab.ssh(app, look).returncode for app in apps), 60, "the old slot has stopped")
        stopped = time.time()
        time.sleep(5)
        deploy(lab, new, "blue_green").succeeded()
        assert lab.ssh(second, "cat /etc/haproxy/slot.map").stdout != f"active be_{was}\n"
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(stopped, time.time(), release=wanted)])
    print(f"\n{verdict}")
    assert verdict.findings == []
