"""Full-text search: FTS5 on SQLite, tsvector on PostgreSQL, one query language for both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, TextClause, bindparam, text

# A word that very many documents hold says little: only the newest of so many matches are ranked and counted.
WINDOW = 1000
_QUERY = "websearch_to_tsquery('english', CAST(:q AS text))"
_MATCH = {"sqlite": "documents_index MATCH :q", "postgresql": f"search @@ {_QUERY}"}
_TAGGED = {
    "sqlite": " AND rowid IN (SELECT seq FROM document_tags WHERE tag = :tag)",
    "postgresql": " AND seq IN (SELECT seq FROM document_tags WHERE tag = :tag)",
}
# Both stores stem English words; a match in the title weighs more.
_RANKED = {
    "sqlite": "SELECT seq, rank FROM (SELECT rowid AS seq, -bm25(documents_index, 4.0, 1.0) AS rank"
    " FROM documents_index WHERE {matching} ORDER BY rowid DESC LIMIT :window) ORDER BY rank DESC, seq",
    "postgresql": f"SELECT seq, ts_rank_cd(search, {_QUERY}, 1) AS rank FROM (SELECT seq, search FROM documents"
    " WHERE {matching} AND seq > :floor ORDER BY seq DESC LIMIT :window) m ORDER BY rank DESC, seq",
}
_SNIPPETS = {
    "sqlite": "SELECT rowid AS seq, snippet(documents_index, 1, '**', '**', '…', 24) FROM documents_index"
    " WHERE documents_index MATCH :q AND rowid IN :found",
    "postgresql": f"SELECT seq, ts_headline('english', left(text, 240000), {_QUERY},"
    " 'StartSel=**, StopSel=**, MaxWords=24, MinWords=12, ShortWord=0') FROM documents WHERE seq IN :found",
}


@dataclass(frozen=True)
class Match:
    """A document that matches: its `seq`, how well (more is better), and where (matches between `**`)."""

    seq: int
    rank: float
    snippet: str | None


def find(
    connection: Connection, query: str, limit: int, offset: int, tag: str | None = None
) -> tuple[int, list[Match]]:
    """How many documents match the query (and have the tag), at most WINDOW, and those of this part, best first."""
    dialect = connection.dialect.name
    wanted = query if dialect == "postgresql" else fts5_query(query)
    if not wanted.strip():
        return 0, []
    matching = _MATCH[dialect] + ("" if tag is None else _TAGGED[dialect])
    given = {"q": wanted} | ({} if tag is None else {"tag": tag})
    ranking = text(_RANKED[dialect].format(matching=matching))
    if dialect == "sqlite":
        ranked = connection.execute(ranking, given | {"window": WINDOW}).all()
    else:
        ranked = _ranked(connection, ranking, matching, given)
    ranks = {row.seq: float(row.rank) for row in ranked[offset : offset + limit]}
    with_found = text(_SNIPPETS[dialect]).bindparams(bindparam("found", expanding=True))
    snippets: dict[int, str] = dict(connection.execute(with_found, {"q": wanted, "found": list(ranks)}).all())
    return len(ranked), [Match(seq, rank, snippets.get(seq)) for seq, rank in ranks.items()]


def _ranked(connection: Connection, ranking: TextClause, matching: str, given: Mapping[str, Any]) -> Sequence[Row[Any]]:
    # To look at a vector costs more than the planner thinks. What it does estimate well is how many documents match:
    # that tells how far back the newest of them are, and beyond that nothing need be looked at.
    connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_custom_plan")
    plan = connection.scalar(text(f"EXPLAIN (FORMAT JSON) SELECT seq FROM documents WHERE {matching}"), given)
    newest = connection.scalar(text("SELECT max(seq) FROM documents")) or 0
    back = newest * 2 * WINDOW // max(1, plan[0]["Plan"]["Plan Rows"])
    while True:
        floor = newest - back
        found = connection.execute(ranking, {**given, "window": WINDOW, "floor": floor}).all()
        if len(found) >= WINDOW or floor <= 0:
            return found
        back = max(back, 1) * 8


def fts5_query(query: str) -> str:
    """The query in FTS5's language. Every word is quoted, so that no text is a syntax error."""
    include: list[list[str]] = []
    exclude: list[str] = []
    either = False
    for minus, phrase, word in re.findall(r'(-?)(?:"([^"]*)"|([^\s"]+))', query):
        if not minus and word.lower() == "or" and include:
            either = True
            continue
        if not re.search(r"\w", phrase or word):
            continue
        quoted = '"' + (phrase or word).replace('"', "") + '"'
        if minus:
            exclude.append(quoted)
        elif either:
            include[-1].append(quoted)
        else:
            include.append([quoted])
        either = False
    if not include:
        return ""
    positive = " AND ".join(f"({' OR '.join(words)})" for words in include)
    return " NOT ".join([f"({positive})", *exclude])
