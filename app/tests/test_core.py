"""The dispatcher and its workers, on both stores; and atlas-core as a process that is killed."""

from __future__ import annotations

import itertools
import json
import os
import queue as queues
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import open_database, wait_for
from cryptography.fernet import Fernet
from running import Deployment, children, free_port, origin, send
from sqlalchemy import select as query
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from atlas import admission, breakers
from atlas.core import Core
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission, Submitted
from atlas.queue import NewJob, Queue, Result, Which
from atlas.schema import jobs
from atlas.settings import Settings
from atlas.wake import Ear

PAGE = b"<html><head><title>Served</title></head><body><article><p>The origin speaks.</p></article></body></html>"


@pytest.fixture
def store(database_url: str) -> Iterator[Database]:
    database = open_database(database_url)
    admission.admit(database, 7)
    yield database
    database.close()


def make_settings(**changes: Any) -> Settings:
    values = {"environment": "development", "database_url": "sqlite:////nowhere/atlas.db"}
    values |= {"fetch_allow_networks": ["127.0.0.0/8"], "retry_base_seconds": 0.05, "fetch_timeout_seconds": 60}
    return Settings(**values | changes)


class Running:
    """A Core whose steps are taken by a thread, as the main loop would take them."""

    def __init__(self, database: Database, keyring: Keyring, **changes: Any) -> None:
        settings = make_settings(**changes)
        self.queue = Queue(
            database, "core-1", 7, lease_seconds=settings.lease_seconds, random_delay=lambda upper: min(upper, 0.05)
        )
        self.documents = Documents(database, self.queue, keyring, settings)
        self.woken = os.eventfd(0)
        self.ear = Ear(database)
        self.core = Core(self.queue, self.documents, settings, self.wake, self.ear)
        self.halted = threading.Event()
        self.errors: list[Exception] = []
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def _loop(self) -> None:
        while not self.halted.is_set():
            try:
                delay = self.core.step()
            except OperationalError as error:
                self.errors.append(error)
                delay = 0.05
            sources = [self.woken] if self.ear.fd is None else [self.woken, self.ear.fd]
            if self.woken in select.select(sources, [], [], delay)[0]:
                os.eventfd_read(self.woken)

    def wake(self) -> None:
        os.eventfd_write(self.woken, 1)

    def halt(self, seconds: float = 60) -> None:
        if not self.halted.is_set():
            self.halted.set()
            self.wake()
            self.thread.join()
            self.core.stop(time.sleep, seconds)

    def submit(self, **fields: Any) -> str:
        return self.documents.submit(Submission(**fields)).id

    def status(self, document_id: str) -> str:
        document = self.documents.get(document_id)
        assert document is not None
        return document.status

    def wait(self, document_id: str, status: str) -> None:
        wait_for(lambda: self.status(document_id) == status, 20, f"{document_id} is {status}")


@pytest.fixture
def running(store: Database, keyring: Keyring) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**changes: Any) -> Running:
        started.append(Running(store, keyring, **changes))
        return started[-1]

    yield start
    for one in started:
        one.halt()


def test_content_and_pages_are_processed_once_and_found(running: Callable[..., Running]) -> None:
    core = running()
    with origin(lambda handler: send(handler, PAGE)) as url:
        page = core.submit(url=f"{url}/page")
        text = core.submit(content="Plain words.", content_type="text/plain", title="Given")
        core.wait(page, "processed")
        core.wait(text, "processed")
    shown = core.documents.get(page)
    assert shown is not None and shown.applied == 1
    assert (shown.title, shown.content_type) == ("Served", "text/html") and "origin speaks" in (shown.text or "")
    assert core.documents.search("plain words").items[0].title == "Given"


def test_a_failure_behind_a_redirect_is_charged_to_its_host(running: Callable[..., Running], store: Database) -> None:
    def fail(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"", 503, Retry_After="120")

    with origin(fail) as behind:

        def lead(handler: BaseHTTPRequestHandler) -> None:
            if handler.path == "/lead":
                send(handler, b"", 302, Location=f"{behind}/page")
            else:
                send(handler, PAGE)

        with origin(lead) as front:
            core = running()
            led = core.submit(url=f"{front}/lead")
            hosts = [address.removeprefix("http://") for address in (front, behind)]

            def charged() -> list[tuple[int, bool]]:
                with store.read() as connection:
                    known = breakers.load(connection, hosts)
                    now = store.now(connection)
                return [(known[name].failures, known[name].next_at > now + 60_000) for name in hosts]

            wait_for(lambda: charged()[1] == (1, True), 20, "the host behind is charged")
            assert charged()[0] == (0, False)
            core.wait(core.submit(url=f"{front}/page"), "processed")
            with store.read() as connection:
                assert connection.scalar(query(jobs.c.host).where(jobs.c.document_id == led)) == hosts[1]


def test_failures_keep_their_class_and_die_when_they_must(running: Callable[..., Running]) -> None:
    core = running()
    asked: list[str] = []

    def answer(handler: Any) -> None:
        asked.append(handler.path)
        if handler.path == "/later" and asked.count("/later") == 1:
            send(handler, b"", 429, Retry_After="0")
        else:
            send(handler, PAGE if handler.path == "/later" else b"", 200 if handler.path == "/later" else 500)

    with origin(answer) as url:
        later, broken = core.submit(url=f"{url}/later"), core.submit(url=f"{url}/broken")
        private = core.submit(url="http://10.0.0.1/")
        core.wait(later, "processed")
        core.wait(broken, "dead")
        core.wait(private, "dead")
    assert asked.count("/later") == 2 and asked.count("/broken") == 2
    classes = {job["document_id"]: job["error_class"] for job in core.queue.find(Which(state="dead"))[0]}
    assert classes == {broken: "server_error", private: "refused"}


def test_an_idle_deployment_does_only_what_is_meant_for_it(running: Callable[..., Running], store: Database) -> None:
    admission.dismiss(store, 7)
    core = running()
    document = core.submit(content="Waits.", content_type="text/plain")
    with store.write() as connection:
        [meant] = core.documents.add(connection, [Submission(content="Probe.", content_type="text/plain")])
        assert isinstance(meant, Submitted)
        connection.execute(update(jobs).where(jobs.c.id == meant.job_id).values(target=7))
    core.wait(meant.id, "processed")
    assert core.status(document) == "queued"
    admission.admit(store, 7)
    core.wait(document, "processed")


def _state(core: Running, job_id: int) -> str:
    job = core.queue.job(job_id)
    assert job is not None
    return str(job["state"])


def test_stopping_finishes_what_has_begun_and_gives_back_the_rest(running: Callable[..., Running]) -> None:
    core = running(core_concurrency=1, core_batch=4)
    entered, let_go = threading.Event(), threading.Event()

    def answer(handler: Any) -> None:
        entered.set()
        let_go.wait(120)
        send(handler, PAGE)

    with origin(answer) as url:
        documents = [core.submit(url=f"{url}/{number}") for number in range(4)]
        assert entered.wait(60)
        wait_for(lambda: sum(core.status(one) == "processing" for one in documents) >= 2, 10, "more are claimed")
        stopping = threading.Thread(target=core.halt)
        stopping.start()
        wait_for(lambda: sum(core.status(one) == "queued" for one in documents) == 3, 10, "three are given back")
        let_go.set()
        stopping.join()
    assert sorted(core.status(one) for one in documents) == ["processed", "queued", "queued", "queued"]
    assert not core.queue.stats().total("running")


def test_a_job_that_does_not_end_in_time_is_given_back(running: Callable[..., Running]) -> None:
    core = running(core_concurrency=1)
    entered, let_go = threading.Event(), threading.Event()
    with origin(lambda handler: (entered.set(), let_go.wait(120), send(handler, PAGE))) as url:  # type: ignore[func-returns-value]
        document = core.submit(url=url)
        assert entered.wait(60)
        began = time.monotonic()
        core.halt(seconds=0.5)
        assert time.monotonic() - began < 30 and core.status(document) == "queued"
        let_go.set()


def test_results_survive_a_store_that_is_away(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    core = running()
    real, failures = core.queue.finish, iter(range(3))

    def finish(*arguments: Any) -> Any:
        if next(failures, None) is not None:
            raise OperationalError("finish", {}, Exception("away"))
        return real(*arguments)

    monkeypatch.setattr(core.queue, "finish", finish)
    document = core.submit(content="Kept.", content_type="text/plain")
    core.wait(document, "processed")
    shown = core.documents.get(document)
    assert shown is not None and shown.applied == 1 and len(core.errors) == 3


def test_a_store_that_goes_away_among_unreadable_fields_holds_up_nothing(
    running: Callable[..., Running], store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = running()
    elsewhere = Documents(store, core.queue, Keyring([Fernet.generate_key().decode()]), make_settings())
    real, calls = core.documents.work, itertools.count(1)

    def work(ids: Any) -> Any:
        if next(calls) == 2:
            raise OperationalError("work", {}, Exception("away"))
        return real(ids)

    monkeypatch.setattr(core.documents, "work", work)
    sensitive = Submission(content="Locked.", content_type="text/plain", sensitive={"notes": "n"})
    core.wait(elsewhere.submit(sensitive).id, "dead")
    assert len(core.errors) == 1


def test_a_text_that_search_cannot_hold_does_not_hold_up_the_others(running: Callable[..., Running]) -> None:
    core = running()
    # More words than a tsvector may hold, though not more text: each is indexed as a whole and in its parts.
    letters = [chr(0x4E00 + n) for n in range(20_000)]
    words = " ".join(f"{letters[n % 20_000]}{letters[n // 7]}-{letters[n * 7 % 20_000]}" for n in range(48_000))
    odd = core.submit(content=words, content_type="text/plain")
    good = core.submit(content="Plain words.", content_type="text/plain")
    core.wait(good, "processed")
    core.wait(odd, "processed" if core.queue.database.dialect == "sqlite" else "dead")


def test_a_worker_may_take_the_last_job_while_the_core_stops(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = running()

    class Raced(queues.SimpleQueue[Any]):
        """Whoever asks whether there is something is too late to get it."""

        def empty(self) -> bool:
            return False

    core.halted.set()
    core.wake()
    core.thread.join()
    # The workers wait at the queue they know; what is put into this one is taken by nobody.
    monkeypatch.setattr(core.core, "_todo", Raced())
    stopping = threading.Thread(target=core.core.stop, args=(time.sleep, 0.5), daemon=True)
    stopping.start()
    stopping.join(10)
    assert not stopping.is_alive()


def test_a_result_that_cannot_be_stored_does_not_hold_up_the_others(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = running()
    real = core.documents.store
    poisoned: list[str] = []

    def store(connection: Any, results: Any) -> None:
        if any(result.job.document_id in poisoned for result in results):
            raise ValueError("poison")
        real(connection, results)

    monkeypatch.setattr(core.documents, "store", store)
    poisoned.append(core.submit(content="poison", content_type="text/plain"))
    good = [core.submit(content=f"good {number}", content_type="text/plain") for number in range(5)]
    for one in good:
        core.wait(one, "processed")
    core.wait(poisoned[0], "dead")


def test_a_long_job_keeps_its_lease_and_is_given_up_beyond_its_time(running: Callable[..., Running]) -> None:
    core = running(
        lease_seconds=1, heartbeat_seconds=0.2, reaper_seconds=0.2, job_timeout_seconds=6, fetch_timeout_seconds=120
    )
    entered, let_go = threading.Event(), threading.Event()
    with origin(lambda handler: (entered.set(), let_go.wait(120), send(handler, PAGE))) as url:  # type: ignore[func-returns-value]
        taken = core.documents.submit(Submission(url=url))
        assert entered.wait(60) and taken.job_id is not None
        time.sleep(2)
        assert _events(core, taken.job_id) == [] and core.core.healthy()
        wait_for(lambda: not core.core.healthy(), 10, "a job beyond its time is noticed")
        wait_for(lambda: "lost" in _events(core, taken.job_id or 0), 10, "its lease runs out")
        let_go.set()
        core.wait(taken.id, "processed")
    # Both attempts came to an end in this very process; the fence let one of them in.
    shown = core.documents.get(taken.id)
    assert shown is not None and shown.applied == 1


def test_an_idle_core_is_woken_by_what_is_committed(
    running: Callable[..., Running], database_url: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.core.POLL_SECONDS", (60.0, 60.0))
    monkeypatch.setattr("atlas.core.DEAF_SECONDS", 60.0)
    core = running(reaper_seconds=60, heartbeat_seconds=30)
    wait_for(lambda: core.ear.fd is not None, 10, "it listens")
    # Another process of the same host, or of another one.
    elsewhere = open_database(database_url)
    documents = Documents(elsewhere, Queue(elsewhere, "api", 7), keyring, make_settings())
    for number in range(5):
        time.sleep(0.05)
        taken = documents.submit(Submission(content=f"Text {number}", content_type="text/plain"))
        core.wait(taken.id, "processed")
    admission.dismiss(elsewhere, 7)
    waiting = documents.submit(Submission(content="Waits", content_type="text/plain")).id
    time.sleep(0.2)
    assert core.status(waiting) == "queued"
    admission.admit(elsewhere, 7)
    core.wait(waiting, "processed")
    elsewhere.close()


def test_a_delayed_job_begins_when_it_is_due(
    running: Callable[..., Running], store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.core.POLL_SECONDS", (60.0, 60.0))
    core = running(reaper_seconds=60)
    wait_for(lambda: core.ear.fd is not None, 10, "it listens")
    time.sleep(0.05)  # a ring so soon after another would be left out
    with store.write() as connection:
        job_id = core.queue.enqueue(connection, NewJob(delay_seconds=1))
    wait_for(lambda: _state(core, job_id) == "done", 20, "the job is done")
    job = core.queue.job(job_id)
    assert job is not None and 0 <= job["finished_at"] - job["run_at"] < 40_000


def test_the_bell_rings_for_work_alone(store: Database, database_url: str) -> None:
    queue, other = Queue(store, "w", 7), open_database(database_url)
    ear = Ear(other)
    assert ear.heard() and not ear.heard()

    def rings() -> bool:
        time.sleep(0.05)  # also because a ring so soon after another would be left out
        return ear.heard()

    assert not rings()
    with store.write() as connection:
        queue.enqueue(connection, NewJob())
    wait_for(ear.heard, 10, "the ring is heard")
    assert not rings()
    with other.write() as connection:
        assert Queue(other, "v", 7).enqueue(connection, NewJob())
    wait_for(ear.heard, 10, "also that of the same process")
    (job,) = queue.claim()
    queue.heartbeat([job])
    queue.finish([Result(job)])
    assert not rings()
    with suppress(RuntimeError), store.write() as connection:
        queue.enqueue(connection, NewJob())
        raise RuntimeError
    assert not rings()
    ear.close()
    other.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _events(core: Running, job_id: int) -> list[str]:
    job = core.queue.job(job_id)
    assert job is not None
    return [event["event"] for event in job["events"]]


def test_a_killed_core_loses_nothing(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, lease_seconds=2, heartbeat_seconds=0.5, reaper_seconds=0.5)
    calls: list[str] = []

    def answer(handler: Any) -> None:
        calls.append(handler.path)
        if len(calls) == 1:
            time.sleep(30)
        send(handler, PAGE)

    try:
        deployment.prepare()
        _, _, port = deployment.start_ready("api")
        with origin(answer) as url, deployment.client(port) as client:
            core, _, _ = deployment.start_ready("core")
            html = {"content": PAGE.decode(), "content_type": "text/html"}
            first = client.post("/v1/documents", json=html).json()["id"]
            wait_for(
                lambda: client.get(f"/v1/documents/{first}").json()["status"] == "processed", 20, "the helper is up"
            )
            document = client.post("/v1/documents", json={"url": f"{url}/page"}).json()["id"]
            wait_for(lambda: calls, 15, "the job is in the middle")
            helpers = children(core.pid)
            assert helpers
            core.send_signal(signal.SIGKILL)
            core.wait()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), 10, "the helpers are gone")
            assert client.get(f"/v1/documents/{document}").json()["status"] == "processing"
            deployment.start_ready("core", free_port())
            wait_for(lambda: client.get(f"/v1/documents/{document}").json()["status"] == "processed", 20, "done again")
            shown = client.get(f"/v1/documents/{document}").json()
            events = [event["event"] for event in client.get(f"/v1/jobs/{shown['job_id']}").json()["events"]]
        assert shown["applied"] == 1 and events == ["lost", "finished"]
    finally:
        deployment.close()


def test_an_idle_core_rests_and_the_watchdog_of_a_stopped_one_starves(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        deployment.prepare()
        core, ear, port = deployment.start_ready("core", watchdog_seconds=1)
        wait_for(lambda: ear.count("WATCHDOG=1") >= 3, 10, "the watchdog is fed")
        before = _cpu_seconds(core.pid)
        time.sleep(3)
        assert _cpu_seconds(core.pid) - before <= 0.3, "a look at the queue every 0.3 s, for the watchdog's sake"
        os.kill(core.pid, signal.SIGSTOP)
        wait_for(lambda: ear.is_silent("WATCHDOG=1", 2), 10, "the watchdog starves")
        os.kill(core.pid, signal.SIGCONT)
        first = json.loads(deployment.log("core", port).splitlines()[0])
        assert first["event"] == "ready"
    finally:
        deployment.close()
