"""API tokens: only their hashes are stored, with scopes, limits and an expiry."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import or_, select, update

from atlas import audit
from atlas.db import Database
from atlas.schema import token_uses, tokens
from atlas.settings import TokenLimits, TokenSpec

CACHE_SECONDS = 5.0
CACHE_SIZE = 1024
WINDOWS_MS = {"minute": 60_000, "hour": 3_600_000}


@dataclass(frozen=True)
class Token:
    """A token that may be used. `limits` is None for a token without any."""

    name: str
    sha256: str
    scopes: frozenset[str]
    limits: TokenLimits | None


class Tokens:
    """The tokens of the store. A disabled or expired one is refused within CACHE_SECONDS."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._cache: dict[str, tuple[float, Token]] = {}
        # By token and limits: the uses left of what the store granted, until when, and when it will grant more.
        self._held: dict[tuple[str, int, int], tuple[int, float, float]] = {}
        self._lock = threading.Lock()

    def authenticate(self, token: str) -> Token | None:
        """The token whose secret this is; None if there is none, or it is disabled or expired."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        with self._lock:
            until, cached = self._cache.get(digest, (0.0, None))
        if cached is not None and time.monotonic() < until:
            return cached
        found = self.find(digest)
        with self._lock:
            self._cache.pop(digest, None)
            if found is not None:
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[digest] = (time.monotonic() + CACHE_SECONDS, found)
        return found

    def find(self, digest: str) -> Token | None:
        """The token with this SHA-256, as the store has it now; None if there is none, or it may not be used."""
        with self.database.read() as connection:
            row = connection.execute(
                select(tokens).where(
                    tokens.c.sha256 == digest,
                    tokens.c.disabled_at.is_(None),
                    or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > self.database.clock_expression()),
                )
            ).one_or_none()
        if row is None:
            return None
        limits = None if row.limits is None else TokenLimits(**row.limits)
        return Token(row.name, row.sha256, frozenset(row.scopes), limits)

    def spend(self, token: Token, wanted: int = 1) -> tuple[int, int]:
        """Count requests against the limits of a token: how many of those wanted it may make, and, if that is not all,
        the seconds after which to try again.

        The store counts for all processes. Of a high limit a process takes a tenth of a second's worth at a time; what
        it does not use of that is lost to the others.
        """
        if token.limits is None:
            return wanted, 0
        key = (token.sha256, token.limits.per_minute, token.limits.per_hour)
        with self._lock:
            left, until, retry_at = self._held.get(key, (0, 0.0, 0.0))
            now = time.monotonic()
            if now < retry_at:
                return 0, math.ceil(retry_at - now)
            if left >= wanted and now < until:
                self._held[key] = (left - wanted, until, 0.0)
                return wanted, 0
        granted, lasts, retry = self._reserve(token.sha256, token.limits, wanted)
        now = time.monotonic()
        with self._lock:
            self._held[key] = (max(0, granted - wanted), now + lasts, 0.0 if granted else now + retry)
        return min(granted, wanted), 0 if granted >= wanted else math.ceil(retry)

    def _reserve(self, digest: str, limits: TokenLimits, wanted: int) -> tuple[int, float, float]:
        """How many uses the store grants, the seconds for which it does, and those until it would grant more."""
        granted = max(wanted, limits.per_minute // 600)
        with self.database.write() as connection:
            now = self.database.now(connection)
            windows = {name: now // length for name, length in WINDOWS_MS.items()}
            ends = {name: ((windows[name] + 1) * length - now) / 1000 for name, length in WINDOWS_MS.items()}
            new = {"token": digest, "minute": 0, "minute_uses": 0, "hour": 0, "hour_uses": 0}
            connection.execute(self.database.insert(token_uses).values(new).on_conflict_do_nothing())
            own = token_uses.c.token == digest
            row = connection.execute(select(token_uses).where(own).with_for_update()).one()._mapping
            uses = {name: row[f"{name}_uses"] if row[name] == window else 0 for name, window in windows.items()}
            retry = ends["minute"]
            for name, limit in (("minute", limits.per_minute), ("hour", limits.per_hour)):
                if limit - uses[name] < granted:
                    granted, retry = max(0, limit - uses[name]), ends[name]
            connection.execute(
                update(token_uses)
                .where(own)
                .values(windows | {f"{name}_uses": used + granted for name, used in uses.items()})
            )
        return granted, ends["minute"], retry

    def apply(self, wanted: Sequence[TokenSpec]) -> int:
        """Make the store hold exactly these tokens, disabling the others; how many changed."""
        changed = 0
        with self.database.write() as connection:
            now = self.database.now(connection)
            held = {row.sha256: row for row in connection.execute(select(tokens).with_for_update())}
            for spec in wanted:
                values = spec.model_dump() | {"disabled_at": None}
                row = held.get(spec.sha256)
                if row is not None and all(row._mapping[key] == value for key, value in values.items()):
                    continue
                statement = self.database.insert(tokens).values(values | {"created_at": now})
                connection.execute(statement.on_conflict_do_update(index_elements=["sha256"], set_=values))
                changed += 1
                detail = spec.model_dump(exclude={"name", "sha256"})
                audit.record(connection, audit.operator(), "applied", "token", spec.name, detail=detail)
            gone = set(held) - {spec.sha256 for spec in wanted}
            disabled = update(tokens).where(tokens.c.sha256.in_(gone), tokens.c.disabled_at.is_(None))
            for name in connection.scalars(disabled.values(disabled_at=now).returning(tokens.c.name)):
                changed += 1
                audit.record(connection, audit.operator(), "disabled", "token", name)
        with self._lock:
            self._cache.clear()
        return changed


def listed(database: Database) -> list[dict[str, Any]]:
    """The tokens of the store by name, without their hashes; times are in milliseconds."""
    columns = [tokens.c[name] for name in ("name", "scopes", "limits", "expires_at", "disabled_at", "created_at")]
    with database.read() as connection:
        return [dict(row) for row in connection.execute(select(*columns).order_by(tokens.c.name)).mappings()]
