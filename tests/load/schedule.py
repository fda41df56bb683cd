"""The open-loop schedule: which request is due when, of which kind, to which edge. Fixed before the first one is sent."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

FRESH, KEPT, SLOW_BODY, SLOW_ANSWER = "fresh", "kept", "slow_body", "slow_answer"
KINDS = (FRESH, KEPT, SLOW_BODY, SLOW_ANSWER)
SLOW_BODIES_PER_SECOND = 1.0
SLOW_ANSWERS_PER_SECOND = 0.5
"""At most: each slow request holds a thread of the service for as long as it lasts, so their share falls as the rate rises."""
LEAST_INTERVAL = 10
"""Of that many requests at most one has a slow body and one a slow answer, however low the rate."""


class Request(NamedTuple):
    """One request of the plan: *due* in seconds after the start, *edge* an index into the edges."""

    number: int
    due: float
    kind: str
    edge: int


class Schedule(NamedTuple):
    """Requests at a fixed *rate* per second over *edges* edges; the same numbers give the same requests."""

    rate: float
    edges: int = 1
    slow: bool = True

    def request(self, number: int) -> Request:
        """Return the request *number*, counted from 0. Each edge gets every kind in turn."""
        turn = number // self.edges
        return Request(number, number / self.rate, self._kind(turn), number % self.edges)

    def _kind(self, turn: int) -> str:
        # Drawn, not every so many: a proxy that takes its servers in turn would give all slow requests to one of them.
        bodies = max(LEAST_INTERVAL, math.ceil(self.rate / SLOW_BODIES_PER_SECOND))
        answers = max(2 * LEAST_INTERVAL, math.ceil(self.rate / SLOW_ANSWERS_PER_SECOND))
        if self.slow and _is_drawn(turn, bodies, SLOW_BODY):
            return SLOW_BODY
        if self.slow and _is_drawn(turn, answers, SLOW_ANSWER):
            return SLOW_ANSWER
        return KEPT if _is_drawn(turn, 2, KEPT) else FRESH

    def count(self, seconds: float) -> int:
        """Return how many requests are due in the first *seconds*."""
        return max(0, math.ceil(seconds * self.rate - 1e-9))


def _is_drawn(turn: int, interval: int, kind: str) -> bool:
    """Return whether *turn* is the one of *kind* among its *interval* neighbours."""
    block, place = divmod(turn, interval)
    return random.Random(f"{kind} {block}").randrange(interval) == place  # noqa: S311 - the same each time
