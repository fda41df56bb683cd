"""Group commit: what many threads want to write at once becomes one transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from sqlalchemy import Connection

from atlas.db import Database, is_away

# SQLite's lock is unfair: a process that takes it again at once starves the others.
PAUSE_SECONDS = 0.001

T = TypeVar("T")
R = TypeVar("R")


class _Place(Generic[T, R]):
    def __init__(self, item: T) -> None:
        self.item = item
        self.result: R | BaseException | None = None
        self.turn = threading.Lock()
        self.turn.acquire()


class GroupCommit(Generic[T, R]):
    """`write(connection, items)` for the items of many threads; it gives a result, or an error, for each item.

    Whoever finds nobody writing writes for all who wait; who comes meanwhile is in the next transaction. `fits(items)`
    says whether the last of them may share a transaction with the others. PostgreSQL groups commits by itself.
    """

    def __init__(
        self,
        database: Database,
        write: Callable[[Connection, Sequence[T]], Sequence[R | BaseException]],
        fits: Callable[[Sequence[T]], bool] = lambda _items: True,
    ) -> None:
        self._database = database
        self._write = write
        self._fits = fits
        self._lock = threading.Lock()
        self._waiting: list[_Place[T, R]] = []
        self._is_led = False
        self._free_at = 0.0

    def submit(self, item: T) -> R:
        """The result for this item, once it is durable. Raises its error, and then nothing of it was kept."""
        place: _Place[T, R] = _Place(item)
        if self._database.dialect == "postgresql":
            [place.result] = self._run([item])
        else:
            with self._lock:
                self._waiting.append(place)
                leads, self._is_led = not self._is_led, True
            if not leads:
                place.turn.acquire()
            if place.result is None:
                self._lead()
        if isinstance(place.result, BaseException):
            raise place.result
        assert place.result is not None  # noqa: S101 - tells the type checker
        return place.result

    def _lead(self) -> None:
        pause = self._free_at - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        with self._lock:
            size = 1
            while size < len(self._waiting) and self._fits([place.item for place in self._waiting[: size + 1]]):
                size += 1
            group, self._waiting = self._waiting[:size], self._waiting[size:]
        results: Sequence[R | BaseException] = [RuntimeError("the writer was stopped")] * size
        try:
            results = self._run([place.item for place in group])
        finally:
            self._free_at = time.monotonic() + PAUSE_SECONDS
            for place, result in zip(group, results, strict=True):
                place.result = result
            with self._lock:
                self._is_led = bool(self._waiting)
                following = [*self._waiting[:1], *group]
            for place in following:
                place.turn.release()

    def _run(self, items: Sequence[T]) -> Sequence[R | BaseException]:
        try:
            with self._database.write() as connection:
                return self._write(connection, items)
        except Exception as error:
            # What is wrong with one item must not fail the others; a store that is away fails them all.
            if len(items) == 1 or is_away(error):
                return [error] * len(items)
            return [result for item in items for result in self._run([item])]
