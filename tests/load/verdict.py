"""Judges a load: what was lost, doubled, answered by the wrong release, or hidden by the balancer. Pure.

Zero failures among N requests bound the probability of a failure below 3/N with 95 % confidence (the rule of three).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.load.client import Outcome

HIDDEN = ("econ", "eresp", "wretr", "wredis")
"""The balancer's own counters (management guide, 9.1): connection errors, response errors, retries, redispatches."""
EXAMPLES = 5


class Span(NamedTuple):
    """What must hold for requests that began in (*since*, *until*), Unix times, through *edge* (None: any).

    *release* and *slot* are what must have answered them; empty for what does not matter.
    """

    since: float
    until: float
    release: str = ""
    slot: str = ""
    edge: int | None = None


@dataclass
class Verdict:
    """*findings* are the reasons to reject; *figures* what to publish."""

    findings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether there is nothing to object to."""
        return not self.findings

    def __str__(self) -> str:
        figures = self.figures
        lines = [
            f"{figures['sent']} of {figures['planned']} planned requests sent, {figures['failed']} failed"
            + (f": less than {figures['bound']:.1e} fail, with 95 % confidence" if "bound" in figures else ""),
            "seconds from the intended start: "
            + ", ".join(f"{name} {value:.3f}" for name, value in figures["latency"].items()),
            "kinds: " + ", ".join(f"{count} {kind}" for kind, count in figures["kinds"].items()),
        ]
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p99 and max of *values* (nearest rank); {} for none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] for name, share in ranks.items()}


def judge(
    planned: int,
    outcomes: Sequence[Outcome],
    applied: Mapping[str, int] | None = None,
    stored: int | None = None,
    spans: Sequence[Span] = (),
    counters: Mapping[str, Mapping[str, int]] | None = None,
) -> Verdict:
    """Return the verdict on a load of *planned* requests.

    *applied*: document → how often it was finished. *stored*: how many documents of this load the database holds.
    *spans*: who had to answer when. *counters*: edge → counter → by how much it moved. None where nobody looked.
    """
    verdict = Verdict(figures=figures(planned, outcomes))
    say = verdict.findings.append
    numbers = Counter(outcome.number for outcome in outcomes)
    if missing := planned - len(numbers.keys() & set(range(planned))):
        say(f"{missing} of {planned} planned requests have no outcome")
    if unplanned := numbers.keys() - set(range(planned)):
        say(f"{len(unplanned)} requests were sent without being planned: {sorted(unplanned)[:EXAMPLES]}")
    doubled = [number for number, count in numbers.items() if count > 1]
    if doubled:
        say(f"{len(doubled)} requests have more than one outcome: {doubled[:EXAMPLES]}")
    if not outcomes:
        say("nothing was sent, which proves nothing")
    failed = [outcome for outcome in outcomes if not outcome.good]
    if failed:
        kinds = Counter(f"{outcome.status or ''} {outcome.error}".strip() for outcome in failed)
        first = failed[0]
        say(
            f"{len(failed)} requests failed: {', '.join(f'{count} × {what}' for what, count in kinds.most_common())}; "
            f"the first is number {first.number} ({first.kind}) at {first.began:.3f}"
        )
    good_posts = [outcome for outcome in outcomes if outcome.good and outcome.wrote]
    twice = [name for name, count in Counter(outcome.identifier for outcome in good_posts).items() if count > 1]
    if twice:
        say(f"{len(twice)} documents were acknowledged to more than one request: {twice[:EXAMPLES]}")
    if applied is not None:
        wrong = {o.identifier: applied.get(o.identifier, 0) for o in good_posts if applied.get(o.identifier, 0) != 1}
        if wrong:
            say(f"{len(wrong)} documents were not applied exactly once: {dict(list(wrong.items())[:EXAMPLES])}")
    if stored is not None and stored != len(good_posts):
        say(f"the database holds {stored} documents of this load, but {len(good_posts)} were acknowledged")
    for span in spans:
        _judge_span(span, outcomes, say)
    for edge, moved in (counters or {}).items():
        if hidden := {name: moved.get(name, 0) for name in HIDDEN if moved.get(name, 0)}:
            say(f"{edge}: the balancer's own counters moved: {hidden}")
    return verdict


def _judge_span(span: Span, outcomes: Sequence[Outcome], say: Any) -> None:
    inside = [
        outcome
        for outcome in outcomes
        if span.since < outcome.began < span.until and outcome.release and span.edge in (None, outcome.edge)
    ]
    if not inside:
        say(f"no request began between {span.since:.3f} and {span.until:.3f}, so nobody saw who answers")
    for name, wanted in (("release", span.release), ("slot", span.slot)):
        wrong = [outcome for outcome in inside if wanted and getattr(outcome, name) != wanted]
        if wrong:
            first = wrong[0]
            say(
                f"{len(wrong)} of {len(inside)} requests that began after {span.since:.3f} were not answered by {name} {wanted}; "
                f"the first is number {first.number}, {first.began - span.since:.3f} s later, by {getattr(first, name)}"
            )


def figures(planned: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the numbers of a load; times in seconds."""
    failed = sum(not outcome.good for outcome in outcomes)
    quick = [outcome for outcome in outcomes if not outcome.kind.startswith("slow")]
    found: dict[str, Any] = {
        "planned": planned,
        "sent": len(outcomes),
        "failed": failed,
        "kinds": dict(sorted(Counter(outcome.kind for outcome in outcomes).items())),
        "connections_reused": sum(outcome.reused for outcome in outcomes),
        "latency": percentiles([outcome.latency for outcome in quick]),
        "latency_slow": percentiles([outcome.latency for outcome in outcomes if outcome.kind.startswith("slow")]),
        "sent_late": percentiles([outcome.began - outcome.due for outcome in outcomes]),
    }
    if outcomes and not failed:
        found["bound"] = 3 / len(outcomes)
    return found
