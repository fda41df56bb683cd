"""How long a search takes over many documents, by how common its words are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from urllib.parse import quote

from running import TOKEN

from atlas.documents import Documents, Extracted, Submission
from atlas.queue import Result
from bench import load
from bench.load import Plan
from bench.report import Row
from bench.stores import NAMES, STORES, Bench, intake, say

TARGET_MS = 50.0
VOCABULARY = 50_000
WORDS_EACH = 200
# Ranks in a vocabulary whose frequencies fall as in natural language, with the share of documents that hold them.
CLASSES = {
    "rare words (1 in 1,000)": range(18_000, 18_200),
    "common words (1 in 15)": range(200, 300),
    "very common words (nearly all)": range(0, 10),
}
_SYLLABLES = [first + second for first in "bdfgklmnprtvz" for second in "aeiou"]


def word(rank: int) -> str:
    """A word for each rank; none is in a dictionary, and each ends on a consonant that no stemmer takes off."""
    count = len(_SYLLABLES)
    return "".join(_SYLLABLES[rank // count**place % count] for place in range(3)) + "x"


def measure(bench: Bench) -> Iterator[Row]:
    amount = bench.sized(100_000, 5_000)
    for store in STORES:
        with bench.deployment(store) as deployment:
            with intake(deployment) as documents:
                _fill(documents, amount)
            bench.settle(deployment.settings["database_url"])
            say(f"  {store}: {amount:,} documents are processed")
            port = deployment.start_ready("api")[2]
            for name, ranks in CLASSES.items():
                queries = tuple(f"/v1/documents?q={quote(word(rank))}&limit=20" for rank in ranks)
                plan = Plan(port, 1, 120, "get", token=TOKEN, queries=queries, limit=bench.sized(200, 50))
                outcome = load.run(plan)
                outcome.expect(200)
                yield Row(
                    f"search over {amount:,} documents of {WORDS_EACH} words on {NAMES[store]}, p95 over HTTP",
                    name,
                    outcome.p95,
                    "ms",
                    target=f"≤ {TARGET_MS:.0f} ms",
                    met=outcome.p95 <= TARGET_MS,
                    note=f"median {outcome.p50:.1f} ms, p99 {outcome.p99:.1f} ms",
                )


def _fill(documents: Documents, amount: int) -> None:
    chance = random.Random(20)
    vocabulary = [word(rank) for rank in range(VOCABULARY)]
    weights: list[float] = []
    for rank in range(VOCABULARY):
        weights.append(1 / (rank + 1) + (weights[-1] if weights else 0))
    for start in range(0, amount, 500):
        texts = [
            " ".join(chance.choices(vocabulary, cum_weights=weights, k=WORDS_EACH))
            for _ in range(min(500, amount - start))
        ]
        documents.submit_many([Submission(content=text, content_type="text/plain") for text in texts])
        claimed = documents.queue.claim(500)
        work = documents.work([job.document_id or "" for job in claimed])
        results = [Result(job, Extracted(work[job.document_id or ""].content or "", "A title")) for job in claimed]
        assert not documents.queue.finish(results, documents.store)
