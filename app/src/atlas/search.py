"""Full-text search: FTS5 on SQLite, tsvector on PostgreSQL, one query language for both."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, text

# Both stores stem English words; a match in the title weighs more. Per store: matches, their count, their snippets.
_SEARCH = {
    "sqlite": (
        "SELECT rowid AS seq, -bm25(documents_index, 4.0, 1.0) AS rank FROM documents_index"
        " WHERE documents_index MATCH :q ORDER BY bm25(documents_index, 4.0, 1.0), rowid LIMIT :limit OFFSET :offset",
        "SELECT count(*) FROM documents_index WHERE documents_index MATCH :q",
        "SELECT rowid AS seq, snippet(documents_index, 1, '**', '**', '…', 24) FROM documents_index"
        " WHERE documents_index MATCH :q AND rowid IN :found",
    ),
    "postgresql": (
        "SELECT seq, ts_rank_cd(search, q, 1) AS rank FROM documents, websearch_to_tsquery('english', :q) q"
        " WHERE search @@ q ORDER BY rank DESC, seq LIMIT :limit OFFSET :offset",
        "SELECT count(*) FROM documents WHERE search @@ websearch_to_tsquery('english', :q)",
        "SELECT seq, ts_headline('english', left(text, 240000), websearch_to_tsquery('english', :q),"
        " 'StartSel=**, StopSel=**, MaxWords=24, MinWords=12, ShortWord=0')"
        " FROM documents WHERE seq IN :found",
    ),
}


@dataclass(frozen=True)
class Match:
    """A document that matches: its `seq`, how well (more is better), and where (matches between `**`)."""

    seq: int
    rank: float
    snippet: str | None


def find(connection: Connection, query: str, limit: int, offset: int) -> tuple[int, list[Match]]:
    """How many documents match the query, and those of this part, best first."""
    dialect = connection.dialect.name
    wanted = query if dialect == "postgresql" else fts5_query(query)
    if not wanted.strip():
        return 0, []
    matching, counting, snipping = _SEARCH[dialect]
    ranks = {
        row.seq: float(row.rank)
        for row in connection.execute(text(matching), {"q": wanted, "limit": limit, "offset": offset})
    }
    total: int | None = connection.scalar(text(counting), {"q": wanted})
    with_found = text(snipping).bindparams(bindparam("found", expanding=True))
    snippets: dict[int, str] = dict(connection.execute(with_found, {"q": wanted, "found": list(ranks)}).all())
    return total or 0, [Match(seq, rank, snippets.get(seq)) for seq, rank in ranks.items()]


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
