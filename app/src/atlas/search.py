"""Full-text search: FTS5 on SQLite, tsvector on PostgreSQL, one query language for both."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, text

# A word that very many documents hold says little: only the newest of so many matches are ranked.
WINDOW = 2000
# Counting stops here, in searches and in lists.
TOTAL_MOST = 10_000
_TAGGED = " AND {seq} IN (SELECT seq FROM document_tags WHERE tag = :tag)"
# Both stores stem English words; a match in the title weighs more. Per store: matches, their count, their snippets.
_SEARCH = {
    "sqlite": (
        "SELECT seq, rank FROM (SELECT rowid AS seq, -bm25(documents_index, 4.0, 1.0) AS rank FROM documents_index"
        " WHERE documents_index MATCH :q{tagged} ORDER BY rowid DESC LIMIT :window)"
        " ORDER BY rank DESC, seq LIMIT :limit OFFSET :offset",
        "SELECT count(*) FROM (SELECT rowid FROM documents_index WHERE documents_index MATCH :q{tagged} LIMIT :most)",
        "SELECT rowid AS seq, snippet(documents_index, 1, '**', '**', '…', 24) FROM documents_index"
        " WHERE documents_index MATCH :q AND rowid IN :found",
    ),
    "postgresql": (
        "SELECT seq, ts_rank_cd(search, websearch_to_tsquery('english', :q), 1) AS rank FROM (SELECT seq, search"
        " FROM documents WHERE search @@ websearch_to_tsquery('english', :q){tagged} ORDER BY seq DESC LIMIT :window) m"
        " ORDER BY rank DESC, seq LIMIT :limit OFFSET :offset",
        "SELECT count(*) FROM (SELECT seq FROM documents"
        " WHERE search @@ websearch_to_tsquery('english', :q){tagged} LIMIT :most) m",
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


def find(
    connection: Connection, query: str, limit: int, offset: int, tag: str | None = None
) -> tuple[int, list[Match]]:
    """How many documents match the query (and have the tag), and those of this part, best first."""
    dialect = connection.dialect.name
    wanted = query if dialect == "postgresql" else fts5_query(query)
    if not wanted.strip():
        return 0, []
    tagged = "" if tag is None else _TAGGED.format(seq="rowid" if dialect == "sqlite" else "seq")
    matching, counting, snipping = (part.format(tagged=tagged) for part in _SEARCH[dialect])
    given = {"q": wanted} if tag is None else {"q": wanted, "tag": tag}
    part = given | {"window": WINDOW, "limit": limit, "offset": offset}
    ranks = {row.seq: float(row.rank) for row in connection.execute(text(matching), part)}
    total: int | None = connection.scalar(text(counting), given | {"most": TOTAL_MOST})
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
