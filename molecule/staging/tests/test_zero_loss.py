"""The zero-loss proof: deploys, bad ones, killed ones, rollbacks and reloads go by, and a load of POSTs notices nothing.

Small in `make test`, full by `make proof`: see docs/proof.md. What must turn it red is tried in test_negative_controls.py.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from interruptions import HARMLESS, await_rest, killed
from labtest import Lab
from prooftest import (
    GOOD,
    HEALTH_GATED,
    Load,
    Step,
    archive,
    bad,
    deploy,
    fleet,
    load,
    release_id,
    releases_in_service,
    roll_back,
)  # fmt: skip

from tests.load.verdict import Span

ALL = os.environ.get("ATLAS_PROOF_BAD") == "all"
DEPLOYS = int(os.environ.get("ATLAS_PROOF_DEPLOYS", "4"))
KILLS = int(os.environ.get("ATLAS_PROOF_KILLS", "2"))
REQUESTS = int(os.environ.get("ATLAS_PROOF_REQUESTS", "1500"))
RATE = float(os.environ.get("ATLAS_PROOF_RATE", "15"))
STRATEGIES = ("rolling", "blue_green")
ACCIDENTS = list(HARMLESS) if ALL else []
BAD = list(HEALTH_GATED) if ALL else ["does not start", "a migration that fails half-way"]
ROLLBACK_EVERY = 4
PARTS = (2, 3, 1, 4, 0)
"""Fifths of a deploy, in the order in which kills meet them: a sample meets the switch."""
RELOAD_SECONDS = (5.0, 15.0)
SEED = int(os.environ.get("ATLAS_PROOF_SEED", "20"))
"""Draws the moments of kills and reloads: the same each time, unless other ones are asked for."""

pytestmark = pytest.mark.timeout(900 + 120 * (DEPLOYS + KILLS) + 2 * REQUESTS / RATE)


@contextmanager
def reloads(lab: Lab) -> Iterator[list[str]]:
    """Reload HAProxy on one edge after the other, at uneven times; collects the edges that did it."""
    done: list[str] = []
    stop = threading.Event()
    times = random.Random(SEED)  # noqa: S311 - uneven, and the same each time

    def run() -> None:
        edges = lab.group("edge")
        while not stop.wait(times.uniform(*RELOAD_SECONDS)):
            edge = edges[len(done) % len(edges)]
            if lab.ssh(edge, "systemctl reload haproxy").returncode == 0:
                done.append(edge)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(60)


class Campaign:
    """Goes through the steps, and remembers who had to answer when."""

    def __init__(self, lab: Lab, traffic: Load) -> None:
        self.lab, self.traffic = lab, traffic
        self.names = dict(zip((release_id(archive(name)) for name in GOOD), GOOD, strict=True))
        self.spans: list[Span] = []
        self.since: float | None = None
        self.steps: list[tuple[Step, str]] = []
        self.tasks: dict[str, int] = {}
        self.moments = random.Random(SEED)  # noqa: S311 - uneven, and the same each time
        self.kills = 0
        self.began = time.monotonic()
        (self.release,) = releases_in_service(lab)

    def say(self, what: str) -> None:
        """Show how far it is: this may take hours."""
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"  {minutes:3}:{seconds:02} {self.traffic.traffic.sent():7,} requests  {what}", flush=True)

    def other(self) -> str:
        """Return the good release that is not in service."""
        return next(release for release in self.names if release != self.release)

    def deploy(self, strategy: str) -> None:
        """Deploy the other good release."""
        release = self.other()
        step = deploy(self.lab, self.names[release], strategy).succeeded()
        # Of one that had nothing to undo: such tasks come on top of all others.
        self.tasks.setdefault(strategy, step.output.count("\nTASK ["))
        self._arrived(step, release, strategy)

    def roll_back(self) -> None:
        """Return to the last good deployment, which is of the other release."""
        self._arrived(roll_back(self.lab).succeeded(), self.other(), "rollback")

    def _arrived(self, step: Step, release: str, how: str) -> None:
        self.leave(step.began)
        assert releases_in_service(self.lab) == {release}
        await_rest(self.lab)
        self.release, self.since = release, step.ended
        self.steps.append((step, release))
        self.say(f"{len(self.steps)}: {how} to {self.names[release]}, {step.ended - step.began:.0f} s")

    def leave(self, at: float) -> None:
        """From *at* on another release may answer, until something has arrived."""
        if self.since is not None:
            self.spans.append(Span(self.since, at, release=self.release))
        self.since = None

    def refuse(self, kind: str, strategy: str) -> None:
        """Try a bad release: who answered before goes on answering, throughout."""
        before = fleet(self.lab)
        bad(self.lab, kind, strategy)
        assert fleet(self.lab) == before, kind
        self.say(f"refused: {kind}, {strategy}")

    def interrupt(self, kind: str, strategy: str) -> None:
        """Begin a deploy of the other release and cut it off; the next one has to put things right."""
        self.leave(time.time())
        if kind == "kill":
            # Each part of a deploy has its turn, and within it the moment is drawn.
            part = (PARTS[self.kills % len(PARTS)] + self.moments.random()) / len(PARTS)
            task = 1 + int(part * (self.tasks[strategy] - 3))
            assert killed(self.lab, self.names[self.other()], strategy, task, self.moments.random()), "it had ended"
            self.kills += 1
        else:
            HARMLESS[kind](self.lab, self.names[self.other()], strategy)
        self.say(f"cut off: {kind}, {strategy}")
        (self.release,) = [*releases_in_service(self.lab), self.release][:1]

    def switched(self) -> list[Span]:
        """Return a span from each edge's switch to the end of its deploy, as the witnesses saw it."""
        found = []
        for step, release in self.steps:
            for number, witness in enumerate(self.traffic.witnesses.values()):
                inside = [at for at, _ in witness.switches if step.began < at < step.ended]
                if inside:
                    found.append(Span(inside[-1], step.ended, release=release, edge=number))
        return found


@pytest.fixture(autouse=True)
def left_as_found(lab: Lab) -> Iterator[None]:
    """Leave the release in service that the checks after this one expect."""
    yield
    if releases_in_service(lab) != {release_id(archive("plain"))}:
        deploy(lab, "plain", "rolling").succeeded()


def interruptions() -> dict[int, list[str]]:
    """Return deploy → what cuts off the attempts before it: evenly from the third on, so that each strategy was seen once."""
    kinds = ["kill"] * KILLS + ACCIDENTS
    found: dict[int, list[str]] = {}
    for number, kind in enumerate(kinds):
        found.setdefault(2 + number * (DEPLOYS - 2) // len(kinds), []).append(kind)
    return found


def test_deploys_of_every_kind_lose_nothing(lab: Lab) -> None:
    cut = interruptions()
    with load(lab, RATE) as traffic, reloads(lab) as reloaded:
        campaign = Campaign(lab, traffic)
        for number in range(DEPLOYS):
            strategy = STRATEGIES[number % 2]
            for kind in cut.get(number, []):
                campaign.interrupt(kind, strategy)
            campaign.deploy(strategy)
            if number < len(BAD):
                # Each kind meets one strategy, and follows a deploy of the other in half of the cases.
                campaign.refuse(BAD[number], STRATEGIES[number // 2 % 2])
            if number % ROLLBACK_EVERY == ROLLBACK_EVERY - 1:
                campaign.roll_back()
        while traffic.traffic.sent() < REQUESTS:
            time.sleep(0.5)
        campaign.leave(time.time())
    verdict = traffic.verdict([*campaign.spans, *campaign.switched()])
    print(
        f"\n{len(campaign.steps)} deploys and rollbacks, {campaign.kills} killed, {min(len(BAD), DEPLOYS)} bad ones, "
        f"{len(reloaded)} reloads\n{verdict}"
    )
    assert verdict.findings == []
    assert traffic.answered_by() <= set(campaign.names), "a bad release answered"
    assert campaign.kills == KILLS and len(reloaded) >= DEPLOYS / 2 and len(traffic.outcomes) >= REQUESTS
