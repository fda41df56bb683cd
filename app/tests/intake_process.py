"""A process that takes in documents at the same moment as others: what test_intake starts several of.

Arguments: the URL of the store and a key of the keyring. Each line of its input names a scenario, and the line of its
output holds what it was answered, as JSON. The first line of output says that it is ready.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, KeyReused, Outcome, Repeat, Submission, Submitted
from atlas.queue import Queue
from atlas.settings import Settings, TokenLimits
from atlas.tokens import Token, Tokens

THREADS, COUNT = 4, 40


def main(url: str, key: str) -> None:
    database = Database.from_url(url, role="atlas" if url.startswith("postgresql") else None)
    settings = Settings(environment="development", database_url="sqlite:////nowhere/atlas.db", queue_limit=100_000)
    documents = Documents(database, Queue(database, "api"), Keyring([key]), settings)
    tokens, limited = Tokens(database), Token("t", "s" * 64, frozenset(), TokenLimits(per_minute=50, per_hour=70))

    def duplicate(n: int) -> object:
        url = f"http://{'EXAMPLE' if n % 2 else 'example'}.org:80/{n % COUNT}#{time.monotonic_ns()}"
        taken = documents.submit(Submission(url=url))
        return [taken.id, taken.job_id, taken.created]

    def repeated(n: int) -> object:
        """Everyone sends the same keys: half of those with bodies that differ."""
        body = f"{n % COUNT} {time.monotonic_ns() if n % 2 else ''}"
        submission = Submission(content=body, content_type="text/plain")

        def render(outcomes: list[Outcome]) -> tuple[int, object]:
            [taken] = outcomes
            assert isinstance(taken, Submitted)
            return 202, [taken.id, taken.job_id]

        try:
            return documents.answer([submission], render, Repeat("token", f"key {n % COUNT}", body))  # type: ignore[arg-type]
        except KeyReused:
            return None

    def spend(_n: int) -> object:
        return tokens.spend(limited)[0]

    acts = {"duplicate": duplicate, "repeated": repeated, "spend": spend}
    with ThreadPoolExecutor(THREADS) as pool:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(list(pool.map(acts[line.strip()], range(2 * COUNT)))), flush=True)
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
