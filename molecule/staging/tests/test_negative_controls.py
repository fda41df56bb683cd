"""The zero-loss proof must be able to fail: each control breaks one thing that it relies on, and must turn it red.

What is broken is broken here, in copies of modules, in a release of a test, or on the lab's hosts. The product has no switch for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from labtest import Lab, slot_in_service, sql
from prooftest import archive, deploy, load, release_id, sabotaged, wait_until

RATE = 20.0
NO_DRAIN = """

assert Balancer.emptied
Balancer.emptied = lambda self, names, seconds: None
"""
NO_WAIT = """

assert Balancer.emptied
Balancer.emptied = lambda self, names, seconds: self.set_state(names, "drain")
"""
SIGKILL = """


def _kill(self, slot, timeout, stop=Host.stop):
    if running := self.active(slot):
        self.run(["systemctl", "kill", "--kill-whom=all", "--signal=KILL", *running])
    return stop(self, slot, timeout)


Host.stop = _kill
"""


def without_draining(lab: Lab, tmp_path: Path) -> None:
    """A host is stopped while it gets traffic: requests fail, or only the balancer's retries save them."""
    with load(lab, RATE) as traffic, sabotaged(lab, tmp_path, {"haproxy_runtime.py": NO_DRAIN}):
        deploy(lab, "plain", "rolling", "-e", "deploy_force=true").succeeded()
    assert traffic.verdict().findings


def sigkill_instead_of_sigterm(lab: Lab, tmp_path: Path) -> None:
    """Nobody waits for what is in flight. SIGTERM would let it end; SIGKILL cuts it off."""
    sabotage = {"haproxy_runtime.py": NO_WAIT, "atlas_host.py": SIGKILL}
    with load(lab, RATE, slow_seconds=5) as traffic, sabotaged(lab, tmp_path, sabotage):
        deploy(lab, "plain", "rolling", "-e", "deploy_force=true").succeeded()
    findings = traffic.verdict().findings
    assert findings and "requests failed" in findings[0], findings


def a_broken_health_check(lab: Lab, tmp_path: Path) -> None:
    """A release that calls itself ready and fails every document: whoever trusts /readyz hands users to it."""
    lie = release_id(archive("lies"))
    with load(lab, RATE) as traffic:
        deploy(lab, "lies", "rolling")
    deploy(lab, "plain", "rolling").succeeded()
    findings = traffic.verdict().findings
    assert findings and "requests failed" in findings[0] and "500" in findings[0], findings
    assert lie in traffic.answered_by()


def retries_of_everything_with_sigkill(lab: Lab, tmp_path: Path) -> None:
    """Documents are applied, their answers held back, the service killed: a balancer that repeats a POST doubles it.

    A commit that waits for a standby that does not exist is durable, and unanswered for as long as we like.
    """
    edges, host, database = lab.group("edge"), lab.group("app")[0], lab.group("database")[0]
    wide = """set -e
cp -p /etc/haproxy/haproxy.cfg /root/haproxy.cfg.saved
sed -i 's/retry-on conn-failure/retry-on all-retryable-errors/; /disable-l7-retry/d' /etc/haproxy/haproxy.cfg
! cmp -s /etc/haproxy/haproxy.cfg /root/haproxy.cfg.saved
systemctl reload haproxy"""
    hold = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'"
    release = "ALTER SYSTEM RESET synchronous_standby_names"
    try:
        assert [lab.ssh(edge, wide).returncode for edge in edges] == [0] * len(edges)
        kill = f"systemctl kill --kill-whom=all --signal=KILL atlas-api@{slot_in_service(lab, host)}.service"
        # So few that what is held back leaves the other host threads to answer with.
        with load(lab, RATE / 5, slow_seconds=0) as traffic:
            sql(lab, database, f"{hold};\nSELECT pg_reload_conf()")
            try:
                threading.Event().wait(1)
                assert lab.ssh(host, kill).returncode == 0
                threading.Event().wait(0.5)
            finally:
                sql(lab, database, f"{release};\nSELECT pg_reload_conf()")
            wait_until(lambda: lab.http("GET", "/readyz", token=None).status == 200, 60, "the service is back")
    finally:
        for edge in edges:
            lab.ssh(edge, "mv /root/haproxy.cfg.saved /etc/haproxy/haproxy.cfg && systemctl reload haproxy")
    findings = traffic.verdict().findings
    assert any("× 200" in finding for finding in findings), findings
    assert any("counters moved" in finding and "wretr" in finding for finding in findings), findings


ALL = [without_draining, sigkill_instead_of_sigterm, a_broken_health_check, retries_of_everything_with_sigkill]
SAMPLED = [without_draining, retries_of_everything_with_sigkill]


@pytest.mark.parametrize("control", ALL if os.environ.get("ATLAS_PROOF_BAD") == "all" else SAMPLED)
def test_the_proof_turns_red(lab: Lab, tmp_path: Path, control: Callable[[Lab, Path], None]) -> None:
    control(lab, tmp_path)
