"""Documents, on both stores: taken in once with their job, stored, and found again."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import pytest
from conftest import Clock, open_database
from sqlalchemy import func, select

from atlas import admission
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import (
    Documents,
    Extracted,
    InvalidDocument,
    QueueFull,
    Submission,
    Submitted,
    new_id,
)
from atlas.queue import Queue, Result, Which
from atlas.schema import PRIORITIES, document_tags, jobs
from atlas.schema import documents as table
from atlas.search import fts5_query
from atlas.settings import Settings
from atlas.urls import normalise_url


def plain(content: str, **values: Any) -> Submission:
    return replace(Submission(content=content, content_type="text/plain"), **values)


def process(documents: Documents, **titles: str) -> None:
    """Finish every waiting job: the text is the content."""
    admission.admit(documents.database, 1)
    claimed = documents.queue.claim(100)
    work = documents.work([job.document_id or "" for job in claimed])
    results = []
    for job in claimed:
        item = work[job.document_id or ""]
        results.append(Result(job, Extracted(item.content or "", titles.get(item.content or ""))))
    assert documents.queue.finish(results, documents.store) == set()


def test_a_document_goes_from_queued_to_processed(documents: Documents, clock: Clock) -> None:
    admission.admit(documents.database, 1)
    submitted = documents.submit(plain("Hello", tags=("a", "b")))
    assert (submitted.status, submitted.created) == ("queued", True)
    shown = documents.get(submitted.id)
    assert shown is not None
    assert (shown.status, shown.applied, shown.job_id, shown.text) == ("queued", 0, submitted.job_id, None)
    (job,) = documents.queue.claim()
    shown = documents.get(submitted.id)
    assert shown is not None and shown.status == "processing"
    clock.advance(3)
    documents.queue.finish([Result(job, Extracted("Hello", "Greeting", meta={"language": "en"}))], documents.store)
    shown = documents.get(submitted.id)
    assert shown is not None
    assert (shown.status, shown.applied, shown.title, shown.text) == ("processed", 1, "Greeting", "Hello")
    assert shown.content_hash == "185f8db32271fe25f561a6fc938b2e264306ec304eda518007d1764826381969"
    assert shown.meta == {"language": "en"}
    out = shown.as_dict()
    assert (out["created_at"], out["processed_at"]) == ("2027-01-15T08:00:00.000Z", "2027-01-15T08:00:03.000Z")
    assert out["tags"] == ["a", "b"] and "rank" not in out
    assert documents.get("unknown") is None


def test_a_dead_document_tells_why_and_can_come_back(documents: Documents) -> None:
    admission.admit(documents.database, 1)
    submitted = documents.submit(Submission(url="http://h/missing"))
    (job,) = documents.queue.claim()
    documents.queue.fail(job, "not_found", "HTTP 404")
    shown = documents.get(submitted.id)
    assert shown is not None and (shown.status, shown.error_class, shown.error) == ("dead", "not_found", "HTTP 404")
    documents.queue.requeue(Which(ids=[job.id]))
    shown = documents.get(submitted.id)
    assert shown is not None and shown.status == "queued"


def test_a_duplicate_gets_the_first_id(documents: Documents) -> None:
    first = documents.submit(Submission(url="HTTP://Example.org:80/a#part"))
    again = documents.submit(Submission(url="http://example.org/a"))
    assert (again.id, again.job_id, again.created) == (first.id, first.job_id, False)
    content = documents.submit(plain("text"))
    assert documents.submit(plain("text")).id == content.id
    assert documents.submit(Submission(content="text", content_type="text/html")).id != content.id


def test_a_batch_holds_its_own_duplicates(documents: Documents) -> None:
    documents.submit(plain("known"))
    answers = documents.submit_many([plain("a"), plain("known"), plain("a"), plain("b")])
    assert [answer.created for answer in answers].count(True) == 2
    assert answers[1].created is False
    assert answers[0].id == answers[2].id != answers[3].id
    assert all(answer.job_id for answer in answers)


def test_concurrent_duplicates_make_one_document_and_one_job(
    database_url: str, keyring: Keyring, settings: Settings
) -> None:
    roomy = settings.model_copy(update={"queue_limit": 100_000})
    stores = [open_database(database_url) for _ in range(4)]
    entries = [Documents(store, Queue(store, "api"), keyring, roomy) for store in stores]
    barrier = threading.Barrier(4)

    def submit(n: int) -> set[tuple[str, bool]]:
        answers: list[Submitted] = []
        for turn in range(2):
            batch = [plain(f"same {turn} {number}") for number in range(1500)]
            barrier.wait(60)
            # Half of them in the opposite order: what could deadlock.
            answers += entries[n].submit_many(batch if n % 2 else batch[::-1])
        return {(answer.id, answer.created) for answer in answers}

    try:
        with ThreadPoolExecutor(4) as pool:
            answers = [pair for found in pool.map(submit, range(4)) for pair in found]
        with stores[0].read() as connection:
            counts = [connection.scalar(select(func.count()).select_from(counted)) for counted in (table, jobs)]
    finally:
        for store in stores:
            store.close()
    assert counts == [3000, 3000]
    assert len({document for document, _ in answers}) == 3000
    assert [created for _, created in answers].count(True) == 3000


def test_each_of_many_has_its_own_outcome(documents: Documents) -> None:
    documents.submit(plain("known"))
    known, bad, new = documents.submit_many([plain("known"), Submission(url="file:///etc/passwd"), plain("new")])
    assert isinstance(known, Submitted) and not known.created
    assert isinstance(bad, InvalidDocument) and "http" in str(bad)
    assert isinstance(new, Submitted) and new.created
    assert documents.list().total == 2


def test_a_full_queue_refuses_the_least_urgent_first(documents: Documents) -> None:
    documents.settings = documents.settings.model_copy(update={"queue_limit": 20})
    documents.submit_many([plain(f"{n}") for n in range(15)])
    taken: list[str] = []
    for priority in ("low", "normal", "high"):
        outcomes = documents.submit_many([plain(f"{priority} {n}", priority=PRIORITIES[priority]) for n in range(4)])
        taken += [priority for outcome in outcomes if isinstance(outcome, Submitted)]
    assert taken == ["low", "normal", "normal", "normal", "high"], "16, 19 and 20 are their limits"
    with pytest.raises(QueueFull, match="priority high"):
        documents.submit(plain("more", priority=PRIORITIES["high"]))
    assert documents.submit(plain("0", priority=PRIORITIES["low"])).created is False, "a known one needs no place"
    assert documents.list().total == 20


def test_the_queue_is_counted_again_when_it_has_been_worked_off(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents.settings = documents.settings.model_copy(update={"queue_limit": 2})
    documents.submit_many([plain("1"), plain("2")])
    with pytest.raises(QueueFull):
        documents.submit(plain("3"))
    process(documents)
    monkeypatch.setattr("atlas.documents.COUNT_SECONDS", 0)
    documents._count_at = 0
    assert documents.submit(plain("3")).created


def test_threads_share_transactions_and_keep_their_own_outcomes(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    if documents.database.dialect == "postgresql":
        assert documents.submit(plain("plain transactions")).created
        return
    monkeypatch.setattr("atlas.group.PAUSE_SECONDS", 0.05)
    sizes: list[int] = []
    insert = documents._insert

    def spy(connection: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if any(row.stored[4] == "poison" for row in rows):
            raise ArithmeticError("poison")
        return insert(connection, rows)

    monkeypatch.setattr(documents, "_insert", spy)
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(documents.submit, plain("poison" if n == 7 else f"{n}")) for n in range(40)]
        errors = [future.exception() for future in futures]
    assert [n for n, error in enumerate(errors) if error] == [7] and isinstance(errors[7], ArithmeticError)
    answers = [future.result() for n, future in enumerate(futures) if n != 7]
    assert len({answer.id for answer in answers}) == 39 and all(answer.created for answer in answers)
    assert max(sizes) > 5 and documents.list().total == 39
    for n, answer in enumerate(answers):
        found = documents.work([answer.id])[answer.id]
        assert found.content == f"{n if n < 7 else n + 1}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://EXAMPLE.org:443", "https://example.org/"),
        ("http://h:8080/a b".replace(" ", "%20"), "http://h:8080/a%20b"),
        ("http://h/ä?q=ü&b=1#x", "http://h/%C3%A4?q=%C3%BC&b=1"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://h/\ud800", "http://h/%ED%A0%80"),
        ("http://[::1]:81/", "http://[::1]:81/"),
    ],
)
def test_urls_have_one_form(url: str, expected: str) -> None:
    assert normalise_url(url) == expected
    assert normalise_url(expected) == expected


@pytest.mark.parametrize(
    "url",
    ["", "file:///etc/passwd", "ftp://h/", "http://", "http://u:p@h/", "http://h/\r\nx", "http://h:99999/", "x" * 5000]
    + ["http://[::1/", "//h/a", "http:\\\\h\\", "http://" + "a" * 300 + ".org/", f"http://{'a.' * 150}org/"],
)
def test_urls_that_cannot_be_fetched_are_refused(documents: Documents, url: str) -> None:
    with pytest.raises(InvalidDocument, match="^url: "):
        documents.submit(Submission(url=url))


def test_text_that_a_store_cannot_hold_is_mended(documents: Documents) -> None:
    submitted = documents.submit(plain("nul \0 surrogate \ud800", title="\0"))
    process(documents)
    shown = documents.get(submitted.id)
    assert shown is not None and (shown.text, shown.title) == ("nul \ufffd surrogate ?", "\ufffd")


def test_sensitive_fields_are_encrypted_in_the_store(documents: Documents, database: Database) -> None:
    submitted = documents.submit(plain("x", sensitive={"cookie": "very-secret"}))
    assert documents.work([submitted.id])[submitted.id].sensitive == {"cookie": "very-secret"}
    with database.read() as connection:
        row = connection.execute(select(table)).one()
    assert "very-secret" not in str(tuple(row))
    assert row.sensitive_key == documents.keyring.fingerprints[0]


def test_lists_go_through_pages(documents: Documents) -> None:
    ids = [documents.submit(plain(f"{n}")).id for n in range(5)]
    page = documents.list(limit=2)
    seen = [item.id for item in page.items]
    while page.next:
        page = documents.list(limit=2, cursor=page.next)
        seen += [item.id for item in page.items]
    assert (seen, page.total) == (ids[::-1], 5)
    with pytest.raises(InvalidDocument, match="^cursor: "):
        documents.list(cursor="1; DROP TABLE")


def test_lists_are_narrowed(documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [documents.submit(plain(f"{n}", tags=[f"t{n % 2}", "all", "all"])).id for n in range(6)]
    process(documents)
    ids.append(documents.submit(Submission(url="http://h/dead")).id)
    (job,) = documents.queue.claim()
    documents.queue.fail(job, "not_found", "404")
    ids += [documents.submit(plain(f"{n}", tags=["t0"])).id for n in (7, 8)]
    ids.append(documents.submit(Submission(url="http://h/late?b")).id)
    documents.queue.claim(1)

    def listed(**filters: Any) -> list[int]:
        page = documents.list(limit=2, **filters)
        seen = [item.id for item in page.items]
        assert page.total == len(set(seen)) or page.next
        while page.next:
            page = documents.list(limit=2, cursor=page.next, **filters)
            seen += [item.id for item in page.items]
        assert page.total == len(seen)
        return [ids.index(each) for each in seen]

    for few in (10_000, 0):
        monkeypatch.setattr("atlas.documents.FEW", few)
        assert listed(status="processed") == [5, 4, 3, 2, 1, 0]
        assert listed(status="dead") == [6] and listed(status="processing") == [7] and listed(status="queued") == [9, 8]
        assert listed(tag="t0") == [8, 7, 4, 2, 0] and listed(tag="all") == [5, 4, 3, 2, 1, 0]
        assert listed(tag="t0", status="processed") == [4, 2, 0]
        assert listed(url="HTTP://H:80/late?b#x") == [9] and listed(url="http://h/other") == []
        assert listed(tag="none") == [] and listed(tag="\0") == []
    with pytest.raises(InvalidDocument, match="^url: "):
        documents.list(url="file:///")
    assert [ids.index(item.id) for item in documents.search("4", tag="t0").items] == [4]
    assert documents.search("4", tag="t1").total == 0
    documents.delete(ids[4])
    assert listed(tag="t0", status="processed") == [2, 0]
    with documents.database.read() as connection:
        assert connection.scalar(select(func.count()).where(document_tags.c.tag == "t0")) == 4


def test_counting_stops_at_a_limit(documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.db.TOTAL_MOST", 3)
    monkeypatch.setattr("atlas.search.WINDOW", 4)
    ids = [documents.submit(plain(f"word {n}")).id for n in range(5)]
    process(documents)
    assert documents.list(limit=5).total == 3
    page = documents.search("word", limit=2)
    seen = [item.id for item in page.items]
    while page.next:
        page = documents.search("word", limit=2, cursor=page.next)
        seen += [item.id for item in page.items]
    assert (page.total, sorted(seen)) == (4, sorted(ids[1:])), "the newest four are ranked"


def test_a_common_word_that_only_old_documents_hold_is_found(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.search.WINDOW", 2)
    ids = [documents.submit(plain(f"{'old' if n < 20 else 'new'} {n}")).id for n in range(40)]
    process(documents)
    with documents.database.write() as connection:
        connection.exec_driver_sql("ANALYZE")
    assert {item.id for item in documents.search("old").items} == {ids[18], ids[19]}
    assert {item.id for item in documents.search("new").items} == {ids[38], ids[39]}


def test_a_deleted_document_does_not_come_back(documents: Documents, database: Database) -> None:
    admission.admit(documents.database, 1)
    submitted = documents.submit(plain("gone", tags=["x"]))
    (job,) = documents.queue.claim()
    noted: list[str] = []
    assert documents.delete(submitted.id, lambda _: noted.append(submitted.id))
    assert noted == [submitted.id]
    assert documents.work([submitted.id]) == {}
    assert documents.queue.finish([Result(job, Extracted("gone"))], documents.store) == {job.id}
    assert documents.get(submitted.id) is None and documents.queue.job(job.id) is None
    assert documents.list().total == documents.search("gone").total == 0
    assert not documents.delete(submitted.id, lambda _: noted.append("again")) and len(noted) == 1
    again = documents.submit(plain("gone"))
    assert again.created and again.id != submitted.id
    process(documents)
    assert documents.search("gone").total == 1
    assert documents.delete(again.id) and documents.search("gone").total == 0
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(jobs)) == 0


def test_search_ranks_pages_and_shows_where(documents: Documents) -> None:
    for content in ("The kernel is installed by apt.", "Nothing of interest here.", "Packages: how to install them."):
        documents.submit(plain(content))
    process(documents, **{"Nothing of interest here.": "Installing"})
    page = documents.search("install")
    assert page.total == 3
    assert page.items[0].title == "Installing", "a match in the title weighs more"
    assert {item.snippet for item in page.items[1:]} == {
        "The kernel is **installed** by apt.",
        "Packages: how to **install** them.",
    }
    ranks = [item.rank or 0 for item in page.items]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[1]
    first, second = documents.search("install", limit=2), documents.search("install", limit=2, cursor="2")
    assert [item.id for item in (*first.items, *second.items)] == [item.id for item in page.items]
    assert (first.next, second.next) == ("2", None)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("red apple", 1),
        ('"apple red"', 0),
        ('"red apple"', 1),
        ("apple -red", 1),
        ("red or green", 2),
        ("APPLES", 2),
        ("pear", 0),
    ],
)
def test_search_understands_its_language(documents: Documents, query: str, found: int) -> None:
    documents.submit_many([plain("a red apple"), plain("a green apple")])
    process(documents)
    assert documents.search(query).total == found


@pytest.mark.parametrize(
    "query",
    ["", "   ", '"', "'", "a AND", "NEAR(", "title:", "*", "-", "-x", "!!!", "a\0b", "(", ") OR (", "or", "\ud800"],
)
def test_any_text_is_a_valid_query(documents: Documents, query: str) -> None:
    documents.submit(plain("a and b"))
    process(documents)
    assert documents.search(query).total in (0, 1)


def test_a_document_that_changes_leaves_no_old_words(documents: Documents, database: Database) -> None:
    submitted = documents.submit(plain("ephemeral"))
    process(documents)
    with database.write() as connection:
        connection.execute(table.update().values(text="lasting"))
    assert (documents.search("ephemeral").total, documents.search("lasting").total) == (0, 1)
    with database.write() as connection:
        connection.execute(table.delete().where(table.c.id == submitted.id))
    assert documents.search("lasting").total == 0


def test_a_huge_text_can_be_stored(documents: Documents) -> None:
    words = " ".join(f"w{n:x}" for n in range(300_000))
    submitted = documents.submit(plain("x"))
    admission.admit(documents.database, 1)
    (job,) = documents.queue.claim()
    documents.queue.finish([Result(job, Extracted(words))], documents.store)
    shown = documents.get(submitted.id)
    assert shown is not None and shown.text == words
    assert documents.search("w1f").total == 1


def test_retention_removes_what_has_ended(documents: Documents, clock: Clock) -> None:
    admission.admit(documents.database, 1)
    kept = documents.submit(plain("kept"))
    process(documents)
    dead = documents.submit(Submission(url="http://h/missing"))
    (job,) = documents.queue.claim()
    documents.queue.fail(job, "not_found", "404")
    clock.advance(167 * 3600)
    assert documents.clean() == {"jobs": 0, "documents": 0, "idempotency_keys": 0}
    clock.advance(2 * 3600)
    assert documents.clean() == {"jobs": 1, "documents": 1, "idempotency_keys": 0}
    assert documents.get(dead.id) is None
    clock.advance(30 * 86_400)
    assert documents.clean() == {"jobs": 1, "documents": 0, "idempotency_keys": 0}
    shown = documents.get(kept.id)
    assert shown is not None and (shown.status, shown.job_id, shown.applied) == ("processed", None, 1)


def test_retention_leaves_what_is_requeued_at_the_same_moment(documents: Documents, clock: Clock) -> None:
    admission.admit(documents.database, 1)
    dead = documents.submit(Submission(url="http://h/missing"))
    (job,) = documents.queue.claim()
    documents.queue.fail(job, "not_found", "404")
    clock.advance(169 * 3600)
    with ThreadPoolExecutor(1) as pool:

        def clean_meanwhile(*_: object) -> None:
            cleaning.append(pool.submit(documents.clean))
            wait({cleaning[0]}, 0.5)

        cleaning: list[Future[dict[str, int]]] = []
        assert documents.queue.requeue(Which(ids=[job.id]), clean_meanwhile) == [job.id]
        assert cleaning[0].result(60)["jobs"] == 0
    shown = documents.get(dead.id)
    assert shown is not None and shown.status == "queued"


def test_ids_sort_by_time() -> None:
    ids = [new_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert {len(each) for each in ids} == {26}
    assert [each[:9] for each in ids] == sorted(each[:9] for each in ids)


def test_fts5_queries_are_quoted() -> None:
    assert fts5_query('a "b c" or d -e') == '(("a") AND ("b c" OR "d")) NOT "e"'
