"""Who may ask: bearer tokens, their scopes, and their limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flask import g, request
from structlog.contextvars import bind_contextvars

from atlas.api.problems import Problem
from atlas.api.state import state
from atlas.tokens import Token

P = ParamSpec("P")
R = TypeVar("R")


def require(scope: str, counted: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a view answer only a token with this scope that keeps within its limits.

    Each request is one use of the token, unless the view itself counts them with `spend`.
    """

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(view)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            admit(_token(), scope, counted)
            return view(*args, **kwargs)

        guarded.scope = scope  # type: ignore[attr-defined]
        return guarded

    return decorate


def _token() -> Token:
    kind, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise Problem(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
    token = state().tokens.authenticate(secret.strip())
    if token is None:
        raise Problem(401, "the token is not valid", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    return token


def admit(token: Token, scope: str, counted: bool = True) -> None:
    """Let this request be the token's. Raises Problem if the token lacks the scope, or has used up its limits."""
    g.token = token
    bind_contextvars(token=token.name)
    if scope not in token.scopes:
        refusal = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}
        raise Problem(403, f"the token lacks the scope {scope}", refusal)
    if counted and token.limits is not None:
        spend(1)


def over_rate(retry_after: int) -> Problem:
    return Problem(429, "the token has used up its rate limit", {"Retry-After": str(retry_after)})


def spend(wanted: int) -> tuple[int, int]:
    """Count uses of the request's token: how many it may make, and when to try the others again (s). Raises Problem."""
    granted, retry_after = state().tokens.spend(g.token, wanted)
    if granted == 0:
        raise over_rate(retry_after)
    return granted, retry_after
