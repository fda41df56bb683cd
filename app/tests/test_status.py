"""The status page: who may see it, what it shows, and how it looks to a real browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import open_database, wait_for
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pydantic import SecretStr
from running import TOKEN, Deployment
from sqlalchemy import insert, select, update
from sqlalchemy.exc import OperationalError
from test_api import ALL, READ_ONLY, app, as_worker, digest, store_of
from werkzeug.test import TestResponse

from atlas.api import create_app
from atlas.api.chart import ceiling, chart
from atlas.api.session import COOKIE, SESSION_SECONDS
from atlas.api.state import Counted
from atlas.api.status import marked
from atlas.crypto import Keyring
from atlas.documents import Documents, Extracted, Submission
from atlas.presence import beat
from atlas.queue import Queue, QueueStats, Result
from atlas.schema import audit, hosts, queue_samples, sessions
from atlas.settings import Settings, TokenSpec
from atlas.tokens import Tokens

__all__ = ["app"]

ATTACK = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
CHROMIUM += " --disable-component-update --disable-sync"
expect.set_options(timeout=60_000)


@pytest.fixture
def browser_of(app: Flask) -> FlaskClient:
    """A browser that has signed in with all scopes."""
    client = app.test_client()
    assert sign_in(client).status_code == 303
    return client


def sign_in(client: FlaskClient, token: str = ALL, **options: Any) -> TestResponse:
    return client.post("/sign-in", data={"token": token}, **options)


def form_key(page: str) -> str:
    return page.partition('name="key" value="')[2].partition('"')[0]


def set_cookie(answer: TestResponse) -> str:
    return answer.headers.get("Set-Cookie", "")


def dead_letter(app: Flask, error: str = "gone") -> int:
    app.extensions["atlas"].documents.submit(Submission(url="http://a.test/page", request_id="r"))
    queue = as_worker(app)
    [job] = queue.claim()
    queue.fail(job, "not_found", error)
    return job.id


def test_without_signing_in_there_is_a_form_and_the_bare_health(app: Flask) -> None:
    dead_letter(app, "a secret of the source")
    client = app.test_client()
    answer = client.get("/?q=words")
    assert answer.status_code == 200 and 'name="token"' in answer.text and "0.1.0-0123456789ab" in answer.text
    assert ">ok<" in answer.text
    for hidden in ("test1", "green", "secret of the source", "Dead letters", "a.test", "development"):
        assert hidden not in answer.text
    app.extensions["atlas"].draining = lambda: True
    assert ">degraded<" in client.get("/").text
    for path in ("/requeue", "/sign-out"):
        assert client.post(path, data={"job": "1"}).status_code == 403


def test_signing_in_gives_a_cookie_that_is_not_the_token(app: Flask) -> None:
    client = app.test_client()
    refused = sign_in(client, "atl_wrong")
    assert refused.status_code == 403 and "not valid" in refused.text and not set_cookie(refused)
    answer = sign_in(client)
    cookie = set_cookie(answer)
    assert answer.status_code == 303 and ALL not in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert "Secure" not in cookie
    page = client.get("/").text
    assert "Dead letters" in page and "development" in page and ALL not in page and digest(ALL) not in page
    assert "Secure" in set_cookie(sign_in(client, headers={"X-Forwarded-Proto": "https"}))
    with store_of(app).read() as connection:
        actors = connection.scalars(select(audit.c.actor).where(audit.c.action == "signed_in")).all()
    assert actors == ["all", "all"]


def test_another_site_cannot_sign_somebody_in(app: Flask) -> None:
    client = app.test_client()
    for origin in ("https://evil.test", "null", "http://localhost.evil.test"):
        answer = sign_in(client, headers={"Origin": origin})
        assert answer.status_code == 403 and not set_cookie(answer)
    assert sign_in(client, headers={"Origin": "http://localhost"}).status_code == 303


def test_a_session_ends_with_its_token(app: Flask, browser_of: FlaskClient) -> None:
    assert "Dead letters" in browser_of.get("/").text
    Tokens(store_of(app)).apply([TokenSpec(name="other", sha256="0" * 64, scopes=["read"])])
    assert "Dead letters" not in browser_of.get("/").text
    assert browser_of.post("/requeue", data={"job": "1"}).status_code == 403


def test_a_session_ends_with_its_time(browser_of: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: began + SESSION_SECONDS - 5)
    assert "Dead letters" in browser_of.get("/").text
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: began + SESSION_SECONDS + 5)
    assert "Dead letters" not in browser_of.get("/").text


def test_sessions_hold_in_every_slot_and_die_with_the_key(app: Flask, browser_of: FlaskClient) -> None:
    cookie = browser_of.get_cookie(COOKIE)
    assert cookie is not None
    shared = app.extensions["atlas"]
    old = shared.settings.fernet_keys.get_secret_value()
    new = "bmV3LWtleS1vZi10aGlzLXRlc3QtMzItYnl0ZXMtISE" + "="
    for keys, is_known in (([old], True), ([new, old], True), ([new], False)):
        settings = shared.settings.model_copy(update={"fernet_keys": SecretStr("\n".join(keys))})
        other = create_app(settings, shared.identity)
        client = other.test_client()
        client.set_cookie(COOKIE, cookie.value)
        assert ("Dead letters" in client.get("/").text) is is_known
        other.extensions["atlas"].database.close()
    client = app.test_client()
    client.set_cookie(COOKIE, cookie.value[:10] + ("A" if cookie.value[10] != "A" else "B") + cookie.value[11:])
    assert "Dead letters" not in client.get("/").text


def test_scopes_hold_for_sessions(app: Flask) -> None:
    job_id = dead_letter(app)
    reader = app.test_client()
    assert sign_in(reader, READ_ONLY).status_code == 303
    page = reader.get("/").text
    assert str(job_id) in page and "Requeue" not in page and "scope operate" in page
    answer = reader.post("/requeue", data={"key": form_key(page), "job": str(job_id)})
    assert answer.status_code == 403 and "lacks the scope operate" in answer.text and answer.mimetype == "text/html"
    tokens = [TokenSpec(name="in", sha256=digest("atl_ingest"), scopes=["ingest"])]
    Tokens(store_of(app)).apply(tokens)
    assert sign_in(app.test_client(), "atl_ingest").status_code == 403


def test_a_form_must_be_of_this_session(app: Flask, browser_of: FlaskClient) -> None:
    job_id = dead_letter(app)
    other = app.test_client()
    sign_in(other, READ_ONLY)
    for key in ("", "wrong", form_key(other.get("/").text)):
        answer = browser_of.post("/requeue", data={"key": key, "job": str(job_id)})
        assert answer.status_code == 403
        assert browser_of.post("/sign-out", data={"key": key}).status_code == 403
    assert app.extensions["atlas"].queue.job(job_id)["state"] == "dead"


def test_requeue(app: Flask, browser_of: FlaskClient) -> None:
    job_id = dead_letter(app)
    key = form_key(browser_of.get("/").text)
    answer = browser_of.post("/requeue", data={"key": key, "job": str(job_id)}, follow_redirects=True)
    assert answer.status_code == 200 and f"Job {job_id} is in the queue again" in answer.text
    assert app.extensions["atlas"].queue.job(job_id)["state"] == "ready"
    for gone in (str(job_id), "x", "", "9" * 40):
        answer = browser_of.post("/requeue", data={"key": key, "job": gone})
        assert answer.status_code == 404 and "no longer there" in answer.text
    with store_of(app).read() as connection:
        done = connection.execute(select(audit.c.actor, audit.c.object_id).where(audit.c.action == "requeued")).all()
    assert [tuple(row) for row in done] == [("all", str(job_id))]


def test_a_session_that_was_signed_out_is_over_for_every_copy_of_its_cookie(
    app: Flask, browser_of: FlaskClient
) -> None:
    other, thief = app.test_client(), app.test_client()
    sign_in(other)
    cookie = browser_of.get_cookie(COOKIE)
    assert cookie is not None
    thief.set_cookie(COOKIE, cookie.value)
    assert "Dead letters" in thief.get("/").text
    key = form_key(browser_of.get("/").text)
    assert browser_of.post("/sign-out", data={"key": key}).status_code == 303
    assert browser_of.get_cookie(COOKIE) is None
    assert "Dead letters" not in thief.get("/").text
    assert thief.post("/requeue", data={"key": key, "job": "1"}).status_code == 403
    assert "Dead letters" in other.get("/").text, "another session of the same token goes on"


def test_sessions_that_are_over_are_forgotten(app: Flask, browser_of: FlaskClient) -> None:
    with store_of(app).write() as connection:
        connection.execute(update(sessions).values(until=1))
    assert "Dead letters" not in browser_of.get("/").text
    sign_in(app.test_client())
    with store_of(app).read() as connection:
        assert connection.scalars(select(sessions.c.until > 1)).all() == [True]


def test_the_page_allows_nothing_that_it_does_not_need(app: Flask, browser_of: FlaskClient) -> None:
    for answer in (browser_of.get("/"), app.test_client().get("/"), browser_of.get("/?q=x&cursor=zzz")):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["X-Frame-Options"] == "DENY" and answer.headers["Cache-Control"] == "no-store"
        assert "<script" not in answer.text and "style=" not in answer.text
    assert browser_of.get("/?q=x&cursor=zzz").status_code == 422
    assert "Content-Security-Policy" not in browser_of.get("/health").headers


def test_what_clients_wrote_is_shown_as_text(app: Flask, browser_of: FlaskClient) -> None:
    shared = app.extensions["atlas"]
    text = f"needle {ATTACK}"
    shared.documents.submit(Submission(content=text, content_type="text/plain", title=ATTACK, tags=[ATTACK]))
    queue = as_worker(app)
    queue.finish([Result(job, Extracted(text)) for job in queue.claim()], shared.documents.store)
    dead_letter(app, ATTACK)
    page = browser_of.get("/", query_string={"q": f'needle or "{ATTACK}'}).text
    assert "<mark>needle</mark>" in page and "1 document for" in page
    assert "<script" not in page and "<img" not in page and page.count("&lt;img src=x") >= 5


def test_breakers_services_and_failures_are_shown(app: Flask, browser_of: FlaskClient) -> None:
    page = browser_of.get("/").text
    for text in ("No history yet", "All closed", "None: every job", "No service has been seen", "None among"):
        assert text in page
    store, shared = store_of(app), app.extensions["atlas"]
    beat(store, shared.identity, "core", 1)
    with store.write() as connection:
        now = store.now(connection)
        open_host = {"name": "slow.test", "state": "open", "failures": 10, "open_until": now + 60_000}
        connection.execute(insert(hosts), [open_host | {"error": "no answer", "changed_at": now}])
        at = {"ready": 7, "running": 1, "dead": 2, "finished": 30, "failed": 0}
        moments = (now - 400_000, now - 60_000, now)
        connection.execute(insert(queue_samples), [at | {"at": moment} for moment in moments])
    job_id = dead_letter(app, "404 Not Found")
    page = browser_of.get("/").text
    for text in (
        "slow.test",
        "no answer",
        ">open<",
        "<desc",
        "at most 7 ready",
        "404 Not Found",
        ">in service<",
        "<dd>60</dd>",
    ):
        assert text in page
    assert f'aria-label="Requeue job {job_id}"' in page and "test1" in page and ">silent<" not in page
    health = app.test_client().get("/health").json
    assert health["breakers"] == {"closed": 0, "open": 1, "half_open": 0} and "slow.test" not in str(health)
    assert health["feeds"] == {"enabled": 0, "overdue": 0, "failing": 0} and health["queue"]["dead"] == 1


def test_without_a_store_nobody_is_signed_in(
    app: Flask, browser_of: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_arguments: object) -> None:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(app.extensions["atlas"].tokens, "find", away)
    assert 'name="token"' in browser_of.get("/").text
    answer = sign_in(browser_of, "atl_other")
    assert answer.status_code == 503 and "does not answer" in answer.text and answer.mimetype == "text/html"


def test_a_long_queue_is_counted_beside_the_requests(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = app.extensions["atlas"]
    counted = Counted(shared.queue)
    assert counted.get().total("ready") == 0
    shared.documents.submit(Submission(url="http://a.test/1"))
    assert counted.get().total("ready") == 1
    began, stats, may_end = threading.Event(), shared.queue.stats, threading.Event()

    def slowly() -> QueueStats:
        began.set()
        assert may_end.wait(60)
        return stats()

    monkeypatch.setattr(shared.queue, "stats", slowly)
    counted._took.extend([1.0, 1.0])
    counted._due = 0.0
    shared.documents.submit(Submission(url="http://a.test/2"))
    assert counted.get().total("ready") == 1, "a request waits for the count"
    assert began.wait(60) and counted.get().total("ready") == 1
    may_end.set()
    wait_for(lambda: counted.get().total("ready") == 2, 10, "the count has come in")


def test_a_keyring_gives_keys_for_other_purposes() -> None:
    first, second = (f"{letter * 42}A=" for letter in "kb")
    both = Keyring([first, second])
    assert both.derive("session") == Keyring([first]).derive("session") + Keyring([second]).derive("session")
    assert len({*both.derive("session"), *both.derive("other")}) == 4 and len(both.derive("x")[0]) == 32


@pytest.mark.parametrize(
    ("value", "top"), [(0, 4), (4, 4), (5, 10), (11, 20), (21, 40), (99, 100), (1_000_001, 2_000_000)]
)
def test_the_axis_ends_on_a_round_number(value: int, top: int) -> None:
    assert ceiling(value) == top


def sample(at: int, ready: int) -> dict[str, int]:
    return {"at": at, "ready": ready, "running": 0, "dead": 0}


def test_a_chart_of_none_one_and_many_samples() -> None:
    now = 1_800_000_000_000
    minute = 60_000
    assert chart([], now) is None
    one = chart([sample(now - minute, 3)], now)
    assert one is not None and one.lines["ready"] == "M983.3 50.0h0" and one.counts == ["4", "2", "0"]
    assert one.times[0] == "07:00" and one.times[-1] == "08:00" and "at most 3 ready at 07:59" in one.summary
    # A day, with one peak of a minute and half an hour in which nobody looked.
    many = [sample(now - minute * n, 90 if n == 400 else 5) for n in range(1440, -1, -1) if not 600 < n < 630]
    drawn = chart(many, now)
    assert drawn is not None and drawn.counts[0] == "100" and drawn.lines["ready"].count("M") == 2
    assert 200 < drawn.lines["ready"].count("L") < 260 and " 20.0" in drawn.lines["ready"]


def test_snippets_are_marked_and_escaped() -> None:
    assert marked("a **b** <c> **d") == "a <mark>b</mark> &lt;c&gt; <mark>d</mark>"


# In a real browser, on a real server.


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if not Path("/usr/bin/chromium").exists():
        pytest.fail("Chromium is missing: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Documents]]:
    """The address of a service with a document, and its store."""
    deployment = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        deployment.prepare()
        url = deployment.settings["database_url"]
        database = open_database(url)
        keys = (deployment.directory / "credentials/atlas_fernet_keys").read_text().split()
        settings = Settings(environment="development", database_url=url)
        documents = Documents(database, Queue(database, "worker", 7), Keyring(keys), settings)
        text = f"A durable page about archives. {ATTACK}"
        documents.submit(Submission(content=text, content_type="text/plain", title=f"Archives {ATTACK}"))
        documents.queue.finish([Result(job, Extracted(text)) for job in documents.queue.claim()], documents.store)
        with database.write() as connection:
            now = database.now(connection)
            at = {"running": 1, "dead": 0, "finished": 0, "failed": 0}
            samples = [at | {"at": now - 60_000 * n, "ready": n} for n in range(90)]
            connection.execute(insert(queue_samples), samples)
        _, _, port = deployment.start_ready("api")
        yield f"http://127.0.0.1:{port}", documents
        database.close()
    finally:
        deployment.close()


@pytest.mark.parametrize(("width", "script"), [(1280, True), (390, True), (1280, False)])
def test_a_visit(chromium: Browser, served: tuple[str, Documents], width: int, script: bool) -> None:
    address, documents = served
    documents.submit(Submission(url=f"http://a.test/{width}/{script}"))
    [job] = documents.queue.claim()
    documents.queue.fail(job, "not_found", f"404 {ATTACK}")
    context = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=script)
    page = context.new_page()
    page.set_default_timeout(120_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(address)
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    assert page.get_by_role("alert").inner_text() == "This token is not valid."
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("img", name="Jobs in the queue over time")).to_be_visible()
    check_page(page, width)

    page.get_by_label("Search the documents").fill("durable archives")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("mark")).to_have_text(["durable", "archives"])
    assert ATTACK in page.locator(".results h3").inner_text()
    check_page(page, width)

    assert ATTACK in page.locator(f'tr:has(button[aria-label="Requeue job {job.id}"])').inner_text()
    page.get_by_role("button", name=f"Requeue job {job.id}").click()
    assert page.get_by_role("status").inner_text() == f"Job {job.id} is in the queue again."
    found = documents.queue.job(job.id)
    assert found is not None and found["state"] == "ready"
    check_page(page, width)

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert context.cookies() == []
    page.go_back()
    expect(page.get_by_role("button", name="Sign out"), "no page is kept after signing out").to_have_count(0)
    # The browser says so when it meets the answer to a wrong token.
    assert [text for text in complaints if "403" not in text] == []
    context.close()
    documents.queue.claim()


def check_page(page: Page, width: int) -> None:
    """The page fits the window, and nothing that a client wrote became part of it."""
    assert page.locator("script, img:not([role])").count() == 0 and "Atlas" in page.title()
    box = page.locator("main").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
