"""atlas-core: processes the queue.

The main thread alone speaks to the queue: it claims in batches, renews leases, and ends jobs in batches. Worker threads
fetch and extract. A job that outlives its time is no longer renewed, and the watchdog is no longer fed.
"""

from __future__ import annotations

import queue as queues
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from structlog.contextvars import bound_contextvars

from atlas.crypto import Keyring, KeyringError
from atlas.db import is_away
from atlas.documents import Documents, Extracted, Work
from atlas.extract import ExtractError, Extractor
from atlas.feeds import Feeds, Polled
from atlas.fetch import Fetcher, FetchError
from atlas.queue import Failure, Job, Queue, Result
from atlas.runtime import STOP_SECONDS, Runtime, one_line, open_queue
from atlas.sensitive import request_headers
from atlas.settings import Settings
from atlas.wake import Ear

# Looks at the queue come soon after one that found work or a ring, and ever later after others. A core that cannot
# hear the bell looks every half second.
POLL_SECONDS = (0.02, 5.0)
DEAF_SECONDS = 0.5
EXTRACTOR_IDLE_SECONDS = 30.0

log = structlog.get_logger("atlas.core")


class Processor:
    """Does the work of one job; knows nothing of the queue."""

    def __init__(self, settings: Settings, feeds: Feeds | None = None) -> None:
        self._feeds = feeds
        self.extractor = Extractor(settings.extract_timeout_seconds, settings.extract_memory_bytes)
        self._fetcher = Fetcher(
            settings.user_agent,
            settings.fetch_timeout_seconds,
            settings.fetch_limit_bytes,
            settings.fetch_allow_networks,
            settings.fetch_redirect_limit,
        )

    def process(self, job: Job, work: Work | None) -> Result | Failure:
        """What became of the job. Never raises."""
        asked: list[str] = []
        try:
            if job.kind == "feed" and self._feeds is not None:
                return Result(job, self._feed(self._feeds, str((job.payload or {})["feed"]), asked), asked)
            if job.kind != "document":
                return Failure(job, "unsupported", f"this release knows no job of kind {job.kind!r}")
            # Without a document there is nothing left to do: it was deleted.
            return Result(job, None if work is None else self._document(work, asked), asked)
        except FetchError as error:
            return Failure(job, error.error_class, str(error), error.retry_after, asked)
        except ExtractError as error:
            # A page that takes too long is no fault of its host.
            error_class = "parse_error" if error.error_class == "timeout" else error.error_class
            return Failure(job, error_class, str(error), asked=asked)
        except Exception as error:
            log.exception("a job failed unexpectedly")
            return Failure(job, "internal", f"{type(error).__name__}: {one_line(error)}")

    def _document(self, work: Work, asked: list[str]) -> Extracted:
        if work.url is None:
            return self.extractor.extract((work.content or "").encode("utf-8", "replace"), work.content_type, "utf-8")
        page = self._fetcher.fetch(work.url, request_headers(work.sensitive), asked=asked)
        return self.extractor.extract(page.body, page.content_type, page.charset, page.url)

    def _feed(self, feeds: Feeds, feed_id: str, asked: list[str]) -> Polled | None:
        work = feeds.work(feed_id)
        if work is None:
            return None
        page = self._fetcher.fetch(work.url, request_headers(work.sensitive), work.etag, work.last_modified, asked)
        if page.is_unchanged:
            return Polled(feed_id)
        found = self.extractor.feed(page.body, page.charset, page.url)
        return Polled(feed_id, found.title, page.etag, page.last_modified, found.entries)


class Core:
    """The dispatcher between the queue and `concurrency` worker threads."""

    def __init__(
        self, queue: Queue, documents: Documents, settings: Settings, wake: Callable[[], None], ear: Ear
    ) -> None:
        self._queue = queue
        self._documents = documents
        self._settings = settings
        self._wake = wake
        self._ear = ear
        self._feeds = Feeds(documents)
        self.processor = Processor(settings, self._feeds)
        self._capacity = max(settings.core_batch, settings.core_concurrency)
        # By id and token: a job that was lost may come back while its first attempt still runs.
        self._held: dict[tuple[int, int], Job] = {}
        self._begun: dict[tuple[int, int], float] = {}
        self._todo: queues.SimpleQueue[tuple[Job, Work | None] | None] = queues.SimpleQueue()
        self._ended: queues.SimpleQueue[Result | Failure] = queues.SimpleQueue()
        self._unsaved: list[Result | Failure] = []
        self._renewed_at = self._reaped_at = time.monotonic()
        self._poll = POLL_SECONDS[0]
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
            for number in range(settings.core_concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def healthy(self) -> bool:
        """Whether every worker thread lives and none has been at one job for longer than a job may take."""
        begun = list(self._begun.values())
        oldest = time.monotonic() - min(begun) if begun else 0.0
        return oldest < self._settings.job_timeout_seconds and all(thread.is_alive() for thread in self._threads)

    def step(self) -> float:
        """Save what ended, renew, reap, claim; the seconds until the next step unless there is a reason before."""
        try:
            self._save()
            self._renew()
            if time.monotonic() - self._reaped_at > self._settings.reaper_seconds:
                self._reaped_at = time.monotonic()
                ready, dead = self._queue.reap()
                if ready or dead:
                    log.warning("jobs were taken from lost workers", ready=ready, dead=dead)
                self.processor.extractor.rest(EXTRACTOR_IDLE_SECONDS)
            is_rung = self._ear.heard()
            due = self._claim()
        except (SQLAlchemyError, OSError):
            self._ear.close()
            raise
        soonest, latest = POLL_SECONDS
        self._poll = soonest if is_rung or due is None else min(latest, self._poll * 2)
        wanted = [self._poll, due or latest, self._settings.reaper_seconds]
        wanted += [DEAF_SECONDS] if self._ear.fd is None else []
        wanted += [self._settings.heartbeat_seconds / 2] if self._held else []
        return min(wanted)

    def _claim(self) -> float | None:
        """Claim if there is anything: None if it gave work, else the seconds until more is due (0: already is)."""
        places = self._capacity - len(self._held)
        if places * 2 < self._capacity:
            return 0
        # A read is cheap; a claim takes the store's write lock.
        due = self._queue.due_in()
        if due != 0:
            return due or POLL_SECONDS[1]
        claimed = self._queue.claim(places)
        # Held before anything can fail, so that the leases are renewed and given back.
        self._held.update({_key(job): job for job in claimed})
        try:
            work = self._read_work(claimed)
        except SQLAlchemyError:
            # Nobody works on them: their leases would be renewed for ever.
            for job in claimed:
                self._held.pop(_key(job), None)
            self._queue.release(claimed)
            raise
        for job in claimed:
            if _key(job) in self._held:
                self._todo.put((job, work.get(job.document_id or "")))
        return None if claimed else 0

    def _read_work(self, claimed: list[Job]) -> dict[str, Work]:
        try:
            return self._documents.work([job.document_id for job in claimed if job.document_id])
        except KeyringError:
            found: dict[str, Work] = {}
            for job in claimed:
                try:
                    found.update(self._documents.work([job.document_id] if job.document_id else []))
                except KeyringError as error:
                    self._held.pop(_key(job))
                    self._queue.fail(job, "internal", str(error))
            return found

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            job, work = item
            self._begun[_key(job)] = time.monotonic()
            with bound_contextvars(request_id=job.request_id, job_id=job.id, document_id=job.document_id):
                ended = self.processor.process(job, work)
            self._begun.pop(_key(job), None)
            self._ended.put(ended)
            self._wake()

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_at < self._settings.heartbeat_seconds:
            return
        overdue = time.monotonic() - self._settings.job_timeout_seconds
        renewable = [job for job in list(self._held.values()) if self._begun.get(_key(job), overdue + 1) > overdue]
        lost = self._queue.heartbeat(renewable)
        self._renewed_at = time.monotonic()
        if lost:
            log.warning("jobs were lost to another worker", jobs=sorted(lost))

    def _save(self) -> None:
        while not self._ended.empty():
            self._unsaved.append(self._ended.get())
        results = [item for item in self._unsaved if isinstance(item, Result)]
        if results:
            self._finish(results)
        failures = [item for item in self._unsaved if isinstance(item, Failure)]
        for item, state in zip(failures, self._queue.fail_many(failures), strict=True):
            log.info(
                "job failed", **_of(item.job), error_class=item.error_class, error=item.message, state=state or "lost"
            )
            self._forget(item)

    def _finish(self, results: list[Result]) -> None:
        try:
            refused = self._queue.finish(results, self._store)
        except Exception as error:
            if is_away(error):
                raise  # keep the results and try again
            if len(results) > 1:
                for result in results:
                    self._finish([result])
                return
            log.exception("a result cannot be stored", **_of(results[0].job))
            self._queue.fail(results[0].job, "internal", f"the result cannot be stored: {one_line(error)}")
            self._forget(results[0])
            return
        for result in results:
            log.info("job lost" if result.job.id in refused else "job finished", **_of(result.job))
            self._forget(result)

    def _store(self, connection: Connection, results: Sequence[Result]) -> None:
        self._documents.store(connection, results)
        self._feeds.store(connection, results)

    def _forget(self, item: Result | Failure) -> None:
        self._unsaved.remove(item)
        self._held.pop(_key(item.job), None)

    def stop(self, tick: Callable[[float], None], seconds: float = STOP_SECONDS) -> None:
        """Give back what was not begun, wait for the rest, and give back what is not done in time.

        `tick(seconds)` waits, and keeps the watchdog quiet.
        """
        deadline = time.monotonic() + seconds
        self._ear.close()
        unbegun: list[Job] = []
        with suppress(queues.Empty):
            # Never waits: a worker may take the last one at the same moment.
            while item := self._todo.get_nowait():
                unbegun.append(item[0])
        for _ in self._threads:
            self._todo.put(None)
        while time.monotonic() < deadline:
            try:
                self._queue.release(unbegun)
                for job in unbegun:
                    self._held.pop(_key(job), None)
                unbegun = []
                self._save()
                self._renew()
                if not self._held:
                    break
            except SQLAlchemyError as error:
                log.warning("the database does not answer", reason=one_line(error))
                tick(1.0)
            tick(0.25)
        if self._held:
            log.warning("jobs are given back unfinished", jobs=sorted(job.id for job in self._held.values()))
            try:
                self._queue.release(list(self._held.values()))
            except SQLAlchemyError as error:
                log.warning("jobs wait for the end of their lease", reason=one_line(error))
        self.processor.extractor.close()


def _key(job: Job) -> tuple[int, int]:
    return job.id, job.token


def _of(job: Job) -> dict[str, object]:
    return {
        "job_id": job.id,
        "document_id": job.document_id,
        "request_id": job.request_id,
        "attempt": job.attempts,
        "token": job.token,
    }


def run() -> None:
    """Serve until SIGTERM."""
    runtime = Runtime("core")
    settings = runtime.settings
    queue = open_queue(runtime.database, runtime.owner, runtime.identity.deployment, settings)
    documents = Documents(runtime.database, queue, Keyring.from_secret(settings.fernet_keys), settings)
    if runtime.connect():
        core = Core(queue, documents, settings, runtime.wake, runtime.ear)
        runtime.loop(core.step, core.healthy)

        def tick(seconds: float) -> None:
            runtime.ping()
            runtime.wait(seconds)

        core.stop(tick)
    runtime.close()
