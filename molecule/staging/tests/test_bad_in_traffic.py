"""Releases that only users can prove bad: a share of traffic shows it, and the deploy takes itself back.

Users meet at most the canary's share. All kinds by `make proof`, a sample in `make test`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
from interruptions import await_rest
from labtest import Lab
from prooftest import archive, deploy, fleet, load, release_id

RATE = 20.0
CANARY = {
    "deploy_canary_steps": [
        {"percent": 25, "seconds": 10, "samples": 20},
        {"percent": 100, "seconds": 10, "samples": 50},
    ],
    "deploy_canary_timeout": 60,
}
SHARE = {"blue_green": 0.25, "rolling": 0.5}
"""Of two hosts the first takes half of the traffic."""
MEMORY = "1400m"


class Kind(NamedTuple):
    """A release of bad_releases, what the deploy has to say of it (one of these), and whether users may meet it at all."""

    release: str
    expected: tuple[str, ...]
    users_see: bool = True


KINDS = {
    "crashes when it is used": Kind("crashes_when_used", ("",)),
    "fails sometimes": Kind("fails_sometimes", ("requests failed",)),
    "slow": Kind("slow", ("slow",), users_see=False),
    "fails every job but the probe": Kind("workers_fail", ("jobs failed",), users_see=False),
    # Killed while it is watched, or just when traffic would have gone to it.
    "leaks until it is killed": Kind(
        "leaks", ("worker processes after it had been healthy", "UP before traffic goes there; nothing was switched")
    ),
}
SAMPLED = [("fails sometimes", "blue_green")]
ALL = [(kind, strategy) for kind in KINDS for strategy in SHARE]
CASES = ALL if os.environ.get("ATLAS_PROOF_BAD") == "all" else SAMPLED


@contextmanager
def short_of_memory(lab: Lab) -> Iterator[None]:
    """Limit the memory of every app host."""
    try:
        for host in lab.group("app"):
            assert lab.operate("memory", lab.name, host, MEMORY).returncode == 0
        yield
    finally:
        for host in lab.group("app"):
            lab.operate("memory", lab.name, host, "none")


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_it_is_taken_back(lab: Lab, kind: str, strategy: str) -> None:
    release, expected, users_see = KINDS[kind]
    bad = release_id(archive(release))
    before = fleet(lab)
    with load(lab, RATE) as traffic, short_of_memory(lab) if release == "leaks" else nullcontext():
        step = deploy(lab, release, strategy, "-e", json.dumps(CANARY)).refused()
    assert any(text in step.output for text in expected), step.output[-6000:]
    assert fleet(lab) == before
    await_rest(lab)
    failed = [outcome for outcome in traffic.outcomes if not outcome.good]
    met = [outcome for outcome in traffic.outcomes if outcome.release == bad]
    print(
        f"\n{kind}, {strategy}: {len(met)} of {len(traffic.outcomes)} answered by it, {len(failed)} failed, {step.ended - step.began:.0f} s"
    )
    assert all(outcome.release in (bad, "") for outcome in failed), "the old release failed"
    assert users_see or not failed
    during = [outcome for outcome in traffic.outcomes if step.began < outcome.began < step.ended]
    assert len([outcome for outcome in during if outcome in failed]) <= SHARE[strategy] * len(during)
    after = [outcome for outcome in traffic.outcomes if outcome.began > step.ended]
    assert not [outcome for outcome in after if not outcome.good or outcome.release == bad]
