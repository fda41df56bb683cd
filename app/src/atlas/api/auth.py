"""Who may ask: bearer tokens, their scopes, and their limits."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flask import g, request
from structlog.contextvars import bind_contextvars

from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.tokens import Token

P = ParamSpec("P")
R = TypeVar("R")
_WINDOWS = (("per_minute", 60), ("per_hour", 3600))


class Limiter:
    """Counts the requests of each token in windows of a minute and an hour, within this process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, int], tuple[int, int]] = {}

    def admit(self, token: Token) -> int:
        """Count one request: 0 if the token may make it, else the seconds after which to try again."""
        if token.limits is None:
            return 0
        now = self._clock()
        with self._lock:
            counted: dict[tuple[str, int], tuple[int, int]] = {}
            for name, seconds in _WINDOWS:
                window = int(now // seconds)
                began, count = self._counts.get((token.sha256, seconds), (window, 0))
                count = count if began == window else 0
                if count >= getattr(token.limits, name):
                    return max(1, int((window + 1) * seconds - now) + 1)
                counted[token.sha256, seconds] = (window, count + 1)
            self._counts.update(counted)
        return 0


_limiter = Limiter()


def require(scope: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a view answer only a token with this scope that keeps within its limits."""

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(view)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            _check(scope)
            return view(*args, **kwargs)

        guarded.scope = scope  # type: ignore[attr-defined]
        return guarded

    return decorate


def _check(scope: str) -> None:
    kind, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise Problem(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
    token = state().tokens.authenticate(secret.strip())
    if token is None:
        raise Problem(401, "the token is not valid", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    admit(token, scope)


def admit(token: Token, scope: str) -> None:
    """Let this request be the token's. Raises Problem if the token lacks the scope, or has used up its limits."""
    g.token = token
    bind_contextvars(token=token.name)
    if scope not in token.scopes:
        refusal = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}
        raise Problem(403, f"the token lacks the scope {scope}", refusal)
    wait = _limiter.admit(token)
    if wait:
        raise Problem(429, "the token has used up its rate limit", {"Retry-After": str(wait)})
