"""API tokens: only their hashes are stored, with scopes, limits and an expiry."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select, update

from atlas import audit
from atlas.db import Database
from atlas.schema import tokens
from atlas.settings import TokenLimits, TokenSpec

CACHE_SECONDS = 5.0
CACHE_SIZE = 1024


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
