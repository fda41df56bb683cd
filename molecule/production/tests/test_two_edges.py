"""Maintenance of a fleet with two edges under load: patches with boots, and an edge that retires and comes back."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

import pytest
from interruptions import await_rest
from labtest import Lab
from patchtest import OFFER, PUBLISH, WITHDRAW, booted, on
from prooftest import load, wait_until

from tests.load.traffic import Traffic

LISTENS = "ss -Hltn 'sport = :443'"

pytestmark = pytest.mark.timeout(1800)


def edge_url(lab: Lab, edge: str) -> str:
    """Return the URL of the service at *edge*."""
    parts = urlsplit(lab.url)
    return parts._replace(netloc=parts.netloc.replace(str(parts.hostname), lab.hosts[edge])).geturl()


def test_all_hosts_are_patched_while_the_other_edge_serves(lab: Lab) -> None:
    """Each edge boots in its turn; the load keeps to the one that does not, as its users do."""
    first, second = lab.group("edge")
    app = lab.group("app")[0]
    hosts = [first, second, app]
    for host in hosts:
        on(lab, host, OFFER.format(boot="yes") + PUBLISH)
    before = {host: booted(lab, host) for host in hosts}
    try:
        for edge, other in ((first, second), (second, first)):
            with load(lab, 15, edges=[other]) as traffic:
                run = lab.playbook(
                    "patch", "-e", f"patch_hosts={edge}" + (f",{app}" if edge == first else ""), timeout=600
                )
                time.sleep(2)
            assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
            verdict = traffic.verdict()
            print(f"\n{verdict}")
            assert verdict.findings == []
    finally:
        for host in hosts:
            lab.ssh(host, WITHDRAW)
    for host in hosts:
        assert booted(lab, host) != before[host], host
        assert on(lab, host, "dpkg-query -W -f '${Version}' atlas-check") == "2", host
    await_rest(lab)


def test_an_edge_that_leaves_finishes_what_it_has(lab: Lab) -> None:
    """What it has accepted ends well, slow requests too; then it refuses at once, so that clients turn to another edge."""
    leaving, staying = lab.group("edge")
    with load(lab, 15, edges=[staying]) as traffic:
        held = Traffic(lab.folder / "access.json", 15, [edge_url(lab, leaving)], slow_seconds=4.0)
        with held:
            time.sleep(6)
            run = lab.playbook("retire", "-e", f"host={leaving}", timeout=300)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert lab.ssh(leaving, LISTENS).stdout.strip() == ""
        again = lab.playbook("site", "--limit", leaving, timeout=600)
        assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-2000:]
        join = lab.playbook("deploy", timeout=300)
        assert join.returncode == 0, join.stdout[-4000:] + join.stderr[-2000:]
        wait_until(lambda: lab.ssh(leaving, LISTENS).stdout.strip(), 30, "it listens again")
    verdict = traffic.verdict()
    print(f"\n{verdict}")
    assert verdict.findings == []
    failed = [outcome for outcome in held.outcomes if not outcome.good]
    good = [outcome for outcome in held.outcomes if outcome.good]
    print(f"the edge that left: {len(good)} answered, {len(failed)} refused")
    assert failed, "it never left"
    assert {outcome.error for outcome in failed} == {"refused"}
    assert max(outcome.ended for outcome in good if "slow" in outcome.kind) > min(outcome.began for outcome in failed)
    await_rest(lab)
