"""A controller that sleeps in the middle of a deploy, and wakes up when another deploy has been."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from interruptions import END_SECONDS, await_rest, begun
from labtest import Lab
from prooftest import deploy, good_in_turn, load, play, releases_in_service, wait_until

from tests.load.verdict import Span


def test_a_deploy_that_another_one_has_overtaken_changes_nothing_any_more(lab: Lab) -> None:
    """A person took its lock away; what it began has been undone, and what is in service is the other one's business."""
    (old, current), (new, _) = good_in_turn(lab)
    host = lab.group("app")[0]
    environment = lab.facts()["_meta"]["hostvars"][host]["atlas_environment"]
    with load(lab, 20) as traffic, begun(lab, new, "blue_green", output=subprocess.PIPE) as sleeper:
        begins = "test -e /var/lib/atlas-deploy/transaction.json"
        wait_until(lambda: lab.ssh(host, begins).returncode == 0, END_SECONDS, "it has begun on a host", pause=0.1)
        os.killpg(sleeper.pid, signal.SIGSTOP)
        play(lab, "unlock", "-e", f"confirm={environment}").succeeded()
        step = deploy(lab, old, "rolling", "-e", "deploy_force=true").succeeded()
        os.killpg(sleeper.pid, signal.SIGCONT)
        said = sleeper.communicate(timeout=END_SECONDS)[0]
        assert sleeper.returncode, "it went through"
        assert "The lock was taken by another deploy meanwhile" in said, said[-6000:]
        assert releases_in_service(lab) == {current}
        await_rest(lab)
        time.sleep(1)
    verdict = traffic.verdict([Span(step.ended, time.time(), release=current)])
    print(f"\n{verdict}")
    assert verdict.findings == []
