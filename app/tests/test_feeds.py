"""Feeds: polled when due, their entries taken in once, their failures shown, their credentials kept."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Clock, wait_for
from flask import Flask
from flask.testing import FlaskClient
from running import Deployment, origin, send
from sqlalchemy import delete, func, select, update
from test_api import READ_ONLY, app, client, problem, store_of
from test_core import Running, running, store

from atlas import audit
from atlas.cli import cli
from atlas.db import Database
from atlas.documents import Documents
from atlas.extract import Entry
from atlas.feeds import Feeds, Polled, tally
from atlas.queue import Queue, Result, Which
from atlas.schema import documents as documents_table
from atlas.schema import feeds as table
from atlas.schema import jobs
from atlas.services import Housekeeping

__all__ = ["app", "client", "running", "store"]

PAGE = b"<html><body><article><p>A page that a feed led to.</p></article></body></html>"


class Site:
    """A server with a feed of numbered entries, that knows conditional requests."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.status = 200
        self.asked: list[tuple[str, str | None, str | None]] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        version = f'"{len(self.entries)}"'
        self.asked.append((handler.path, handler.headers["If-None-Match"], handler.headers["Authorization"]))
        if handler.path != "/feed":
            send(handler, PAGE)
        elif self.status != 200:
            send(handler, b"", self.status)
        elif handler.headers["If-None-Match"] == version:
            send(handler, b"", 304)
        else:
            body = f"<rss version='2.0'><channel><title>Site</title>{''.join(self.entries)}</channel></rss>"
            send(handler, body.encode(), Content_Type="text/html", ETag=version)

    def add(self, number: int, link: str | None = "") -> None:
        link = f"/{number}" if link == "" else link
        self.entries.append(
            f"<item><title>Entry {number}</title><guid isPermaLink='false'>id-{number}</guid>"
            + (f"<link>{link}</link>" if link else "")
            + f"<description>&lt;p&gt;Summary {number}.&lt;/p&gt;</description></item>"
        )

    def polls(self) -> list[tuple[str | None, str | None]]:
        return [asked[1:] for asked in self.asked if asked[0] == "/feed"]


def subscribe(feeds: Feeds, url: str, **values: Any) -> str:
    with feeds.database.write() as connection:
        feed_id, is_new = feeds.create(connection, url, "test", **values)
    assert is_new
    return feed_id


def make_due(feeds: Feeds) -> None:
    with feeds.database.write() as connection:
        connection.execute(update(table).values(next_at=0))


def shown(feeds: Feeds, feed_id: str) -> dict[str, Any]:
    found = feeds.get(feed_id)
    assert found is not None
    return found


def poll(feeds: Feeds, core: Running, feed_id: str) -> dict[str, Any]:
    """Poll the feed, and wait until its job, and those of its documents, have come to an end."""
    make_due(feeds)
    feeds.poll()
    wait_for(lambda: shown(feeds, feed_id)["job_state"] in ("done", "dead"), 20, "the feed was polled")
    wait_for(lambda: core.queue.stats().total("ready") + core.queue.stats().total("running") == 0, 20, "all is done")
    return shown(feeds, feed_id)


def test_new_entries_become_documents_once(running: Callable[..., Running]) -> None:
    core, site = running(), Site()
    feeds = Feeds(core.documents)
    for number in range(3):
        site.add(number)
    with origin(site.answer) as url:
        feed_id = subscribe(feeds, f"{url}/feed", tags=["news"], priority=2)
        found = poll(feeds, core, feed_id)
        assert (found["title"], found["error"], found["failures"]) == ("Site", None, 0) and found["polled_at"]
        taken = core.documents.list().items
        assert sorted(page.url or "" for page in taken) == [f"{url}/{number}" for number in range(3)]
        assert {(page.status, tuple(page.tags), page.title) for page in taken} == {
            ("processed", ("news",), f"Entry {number}") for number in range(3)
        }
        poll(feeds, core, feed_id)
        assert site.polls() == [(None, None), ('"3"', None)], "the second request is conditional"
        with core.queue.database.write() as connection:
            connection.execute(delete(documents_table).where(documents_table.c.url == f"{url}/0"))
        site.add(3)
        poll(feeds, core, feed_id)
        assert sorted(page.url or "" for page in core.documents.list().items) == [f"{url}/{n}" for n in (1, 2, 3)]
    with core.queue.database.read() as connection:
        priorities = connection.execute(select(jobs.c.priority).where(jobs.c.kind == "document")).scalars()
        assert set(priorities) == {2}
        assert connection.scalar(select(func.count()).where(jobs.c.kind == "feed")) == 1, "one job for a feed"


def test_an_etag_that_cannot_be_sent_back_is_not(running: Callable[..., Running]) -> None:
    core, asked = running(), []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.headers["If-None-Match"])
        send(handler, b"<rss version='2.0'><channel><title>T</title></channel></rss>", ETag='"caf\xe9"')

    feeds = Feeds(core.documents)
    with origin(answer) as url:
        feed_id = subscribe(feeds, f"{url}/feed")
        for _ in range(2):
            assert poll(feeds, core, feed_id)["job_state"] == "done"
    assert asked == [None, None]


def test_no_entry_and_no_title_keeps_the_others_out(feeds: Feeds, queue: Queue, clock: Clock, admitted: None) -> None:
    feed_id = subscribe(feeds, "http://a.test/feed", interval_seconds=600)
    feeds.poll()
    (job,) = queue.claim()
    # As an address it fits, and no longer once it is written in the only way that may be sent.
    far = Entry("far", "http://a.test/" + "\u4e2d" * 1000, "Far", "")
    polled = Polled(feed_id, "A\0B", '"e"', None, [far, Entry("near", "http://a.test/near", "Near", "")])
    assert queue.finish([Result(job, polled)], feeds.store) == set()
    found = shown(feeds, feed_id)
    assert (found["title"], found["error"]) == ("A\ufffdB", None)
    assert [page.title for page in feeds._documents.list().items] == ["Near"]
    clock.advance(300)
    feeds.poll()
    assert queue.stats().total("ready") == 1, "it is not polled before its time"


def test_an_entry_without_a_page_is_kept_as_what_it_says(running: Callable[..., Running]) -> None:
    core, site = running(), Site()
    feeds = Feeds(core.documents)
    site.add(1, None)
    site.add(2, "javascript:alert(1)")
    site.entries.append("<item></item>")
    with origin(site.answer) as url:
        poll(feeds, core, subscribe(feeds, f"{url}/feed"))
    found = {page.title: core.documents.get(page.id) for page in core.documents.list().items}
    assert {title: page and page.text for title, page in found.items()} == {
        "Entry 1": "Summary 1.",
        "Entry 2": "Summary 2.",
    }


def test_a_failure_is_shown_and_leaves_one_dead_letter(running: Callable[..., Running]) -> None:
    core, site = running(), Site()
    feeds = Feeds(core.documents)
    site.status = 404
    with origin(site.answer) as url:
        feed_id = subscribe(feeds, f"{url}/feed", interval_seconds=300)
        found = poll(feeds, core, feed_id)
        assert (found["error_class"], found["error"], found["failures"]) == ("not_found", "the server answered 404", 0)
        with feeds.database.read() as connection:
            assert tally(connection, feeds.database.now(connection)) == {"enabled": 1, "overdue": 0, "failing": 1}
        assert found["polled_at"] is None
        assert poll(feeds, core, feed_id)["failures"] == 1 and poll(feeds, core, feed_id)["failures"] == 2
        assert core.queue.stats().total("dead") == 1
        site.status = 200
        site.add(1)
        found = poll(feeds, core, feed_id)
        assert (found["error"], found["failures"]) == (None, 0) and core.queue.stats().total("dead") == 0


def test_credentials_go_to_the_feed_and_to_pages_of_its_origin(running: Callable[..., Running]) -> None:
    core, site, other = running(), Site(), Site()
    feeds = Feeds(core.documents)
    with origin(site.answer) as url, origin(other.answer) as elsewhere:
        site.add(1)
        site.add(2, f"{elsewhere}/2")
        sensitive = {"username": "me", "password": "very-secret"}
        feed_id = subscribe(feeds, f"{url}/feed", sensitive=sensitive)
        assert poll(feeds, core, feed_id)["has_sensitive"] is True
    given = f"Basic {base64.b64encode(b'me:very-secret').decode()}"
    assert {(path, authorization) for path, _, authorization in site.asked} == {("/feed", given), ("/1", given)}
    assert [(path, authorization) for path, _, authorization in other.asked] == [("/2", None)]
    with core.queue.database.read() as connection:
        stored = connection.scalars(select(table.c.sensitive)).all()
        stored += connection.scalars(select(documents_table.c.sensitive)).all()
    assert sum(value is not None for value in stored) == 2 and "very-secret" not in str(stored)
    assert "sensitive" not in shown(feeds, feed_id)


@pytest.fixture
def feeds(documents: Documents) -> Feeds:
    return Feeds(documents)


def finish(feeds: Feeds, queue: Queue, feed_id: str, *entries: Entry) -> None:
    """End the feed's running job as a worker would that found these entries."""
    claimed = [job for job in queue.claim(10) if job.kind == "feed"]
    assert len(claimed) == 1
    assert queue.finish([Result(claimed[0], Polled(feed_id, "T", '"e"', None, entries))], feeds.store) == set()


@pytest.fixture
def admitted(database: Database) -> Iterator[None]:
    from atlas import admission

    admission.admit(database, 1)
    yield


def test_a_feed_is_polled_when_it_is_due_by_one_job_at_a_time(
    feeds: Feeds, queue: Queue, clock: Clock, admitted: None
) -> None:
    feed_id = subscribe(feeds, "http://a.test/feed", interval_seconds=600)
    subscribe(feeds, "http://b.test/feed", enabled=False)
    feeds.poll()
    feeds.poll()
    assert queue.stats().total("ready") == 1
    (job,) = queue.claim(10)
    clock.advance(601)
    feeds.poll()
    assert queue.stats().total("ready") == 0, "the first poll still runs"
    assert queue.finish([Result(job, Polled(feed_id))], feeds.store) == set()
    clock.advance(599)
    feeds.poll()
    assert queue.stats().total("ready") == 0
    clock.advance(2)
    feeds.poll()
    assert queue.stats().total("ready") == 1


def test_two_leaders_poll_a_feed_once(
    feeds: Feeds, queue: Queue, admitted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe(feeds, "http://a.test/feed")
    with ThreadPoolExecutor(1) as pool:
        others: list[Future[bool]] = []

        def look(*_: Any) -> int:
            if not others:
                others.append(pool.submit(feeds.poll))
                wait({others[0]}, 0.5)
            return 0

        monkeypatch.setattr("atlas.feeds.counts.in_state", look)
        feeds.poll()
        assert others[0].result(60) is False
    assert len(queue.find(Which(state="ready"))[0]) == 1


def test_a_late_finisher_takes_nothing_in(feeds: Feeds, queue: Queue, clock: Clock, admitted: None) -> None:
    feed_id = subscribe(feeds, "http://a.test/feed")
    feeds.poll()
    (job,) = queue.claim(1)
    clock.advance(61)
    queue.reap()
    (again,) = queue.claim(1)
    entry = Entry("k1", "http://a.test/1", "One", "")
    late, timely = (Result(each, Polled(feed_id, None, None, None, [entry])) for each in (job, again))
    assert queue.finish([late], feeds.store) == {job.id}
    assert feeds._documents.list().total == 0
    assert queue.finish([timely], feeds.store) == set()
    assert feeds._documents.list().total == 1


def test_what_finds_no_place_in_the_queue_is_taken_in_later(
    feeds: Feeds, queue: Queue, clock: Clock, admitted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed_id = subscribe(feeds, "http://a.test/feed", priority=0)
    feeds.poll()
    entries = [Entry(f"k{n}", f"http://a.test/{n}", None, "") for n in range(501)]
    finish(feeds, queue, feed_id, *entries)
    found = shown(feeds, feed_id)
    assert "no more jobs" in found["error"] and feeds._documents.list().total == 500
    while claimed := queue.claim(500):  # as many at once as one host may be asked for
        queue.finish([Result(job) for job in claimed])
    clock.advance(61)
    feeds._documents._count_at = 0
    feeds.poll()
    finish(feeds, queue, feed_id, *entries)
    assert feeds._documents.list().total == 501 and shown(feeds, feed_id)["error"] is None
    monkeypatch.setattr("atlas.feeds.counts.in_state", lambda *_: 500)
    clock.advance(3601)
    assert feeds.poll() is False and shown(feeds, feed_id)["job_state"] == "done"


def test_a_feed_that_is_removed_meanwhile_brings_nothing(feeds: Feeds, queue: Queue, admitted: None) -> None:
    feed_id = subscribe(feeds, "http://a.test/feed")
    feeds.poll()
    (job,) = queue.claim(1)
    with feeds.database.write() as connection:
        assert feeds.remove(connection, feed_id) and not feeds.remove(connection, feed_id)
    assert feeds.work(feed_id) is None
    polled = Polled(feed_id, entries=[Entry("k", "http://a.test/1", None, "")])
    assert queue.finish([Result(job, polled)], feeds.store) == set()
    assert feeds._documents.list().total == 0


def test_the_leader_polls(feeds: Feeds, queue: Queue, documents: Documents, database: Database) -> None:
    subscribe(feeds, "http://a.test/feed")
    Housekeeping(database, documents, documents.settings).run_due()
    assert queue.stats().total("ready") == 1


def test_the_api_of_feeds(client: FlaskClient, app: Flask) -> None:
    wanted = {"url": "HTTP://A.test:80/feed#top", "tags": ["x"], "priority": "low", "interval_seconds": 900}
    made = client.post("/v1/feeds", json=wanted | {"sensitive": {"headers": {"X-Key": "very-secret"}}})
    assert made.status_code == 201, made.text
    feed = made.get_json()
    too_long = client.post("/v1/feeds", json={"url": f"http://a.test/{'x' * 2000}"})
    assert "2000 characters" in problem(too_long, 422)["detail"]
    assert (feed["url"], feed["priority"], feed["has_sensitive"]) == ("http://a.test/feed", "low", True)
    path = made.headers["Location"]
    assert path == f"/v1/feeds/{feed['id']}" and client.get(path).get_json() == feed
    assert problem(client.post("/v1/feeds", json=wanted), 409)["id"] == feed["id"]
    other = client.post("/v1/feeds", json={"url": "http://b.test/feed"}).get_json()
    assert (other["interval_seconds"], other["priority"], other["enabled"]) == (3600, "normal", True)
    first = client.get("/v1/feeds?limit=1").get_json()
    second = client.get(f"/v1/feeds?limit=1&cursor={first['next']}").get_json()
    assert [page["items"][0]["id"] for page in (first, second)] == [other["id"], feed["id"]] and second["next"] is None
    changed = client.patch(path, json={"enabled": False, "sensitive": None, "interval_seconds": 300}).get_json()
    assert (changed["enabled"], changed["has_sensitive"], changed["interval_seconds"]) == (False, False, 300)
    assert (changed["tags"], changed["priority"]) == (["x"], "low")
    assert client.delete(path).status_code == 204
    problem(client.delete(path), 404)
    problem(client.get(path), 404)
    problem(client.patch(path, json={}), 404)
    entries, _ = audit.records(store_of(app), {"object_type": "feed", "object_id": feed["id"]})
    assert [(entry["action"], entry["actor"]) for entry in entries] == [
        ("deleted", "all"),
        ("changed", "all"),
        ("created", "all"),
    ]
    assert "very-secret" not in str(entries) + made.text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "http://me:pw@a.test/"}, "url"),
        ({}, "url"),
        ({"url": "http://a.test/", "interval_seconds": 299}, "interval_seconds"),
        ({"url": "http://a.test/", "interval_seconds": 10**12}, "interval_seconds"),
        ({"url": "http://a.test/", "priority": None}, "priority"),
        ({"url": "http://a.test/", "tags": [""]}, "tags"),
        ({"url": "http://a.test/", "sensitive": {"headers": {"A": "b\nc"}}}, "sensitive"),
        ({"url": "http://a.test/", "next_at": 1}, "next_at"),
    ],
)
def test_a_bad_feed_is_refused_with_its_field(client: FlaskClient, body: dict[str, Any], field: str) -> None:
    assert field in problem(client.post("/v1/feeds", json=body), 422)["detail"]
    assert client.get("/v1/feeds").get_json()["total"] == 0


def test_who_may_change_feeds(client: FlaskClient) -> None:
    reader = {"Authorization": f"Bearer {READ_ONLY}"}
    assert client.get("/v1/feeds", headers=reader).status_code == 200
    problem(client.post("/v1/feeds", json={"url": "http://a.test/"}, headers=reader), 403)
    problem(client.delete("/v1/feeds/x", headers=reader), 403)


def test_the_command(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    runner = CliRunner(env=deployment.environment)

    def run(*arguments: str) -> tuple[int, str]:
        done = runner.invoke(cli, arguments)
        return done.exit_code, done.output

    run("db", "migrate")
    code, added = run("feeds", "add", "http://a.test/feed", "--tag", "x", "--interval", "600")
    assert code == 0 and added.endswith("is new\n")
    feed_id = added.split()[1]
    assert "was there already" in run("feeds", "add", "http://a.test/feed")[1]
    code, wrong = run("feeds", "add", "ftp://a.test/feed")
    assert code == 2 and "must begin with http" in wrong
    assert f"{feed_id} http://a.test/feed every 600 s, polled never" in run("feeds", "list")[1]
    assert run("feeds", "poll", feed_id)[0] == 0
    assert run("feeds", "remove", feed_id)[0] == 0
    assert run("feeds", "remove", feed_id)[0] == 1
    assert run("feeds", "list") == (0, "there is no feed\n")
    assert [line.split()[2] for line in run("audit", "--type", "feed")[1].splitlines()] == ["deleted", "created"]
    deployment.close()
