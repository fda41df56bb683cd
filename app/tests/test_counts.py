"""Counts that triggers keep: exact whatever is done, by whomever, and flat."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Clock, open_database
from sqlalchemy import delete, func, insert, select, update

from atlas import admission, counts, snapshot
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.queue import _OLDEST, NewJob, Queue, Result, Which
from atlas.schema import counts as table
from atlas.schema import documents as documents_table
from atlas.schema import jobs


def drift(database: Database) -> list[object]:
    with database.read() as connection:
        return list(counts.drift(connection))


def test_every_change_is_counted(documents: Documents, database: Database, clock: Clock) -> None:
    queue = documents.queue
    admission.admit(database, 1)
    taken = [documents.submit(Submission(url=f"http://a.test/{n}", priority=n % 3)) for n in range(6)]
    with database.write() as connection:
        queue.enqueue(connection, NewJob("feed", priority=2))
    assert drift(database) == []
    first, second, third, fourth = queue.claim(4)
    queue.finish([Result(first, "made")])
    queue.fail(second, "not_found", "404")
    queue.fail(third, "network", "gone")
    stats = queue.stats()
    assert [stats.total(state) for state in ("ready", "running", "dead")] == [4, 1, 1]
    assert stats.depth["dead"] == {second.priority: 1} | dict.fromkeys({0, 1, 2} - {second.priority}, 0)
    dead = counts.Count("dead", "document", second.priority, "not_found", 1)
    assert {*stats.detail} >= {dead, counts.Count("stored", "document", 0, "", 6)}
    clock.advance(61)
    queue.reap()
    assert drift(database) == []
    documents.delete(taken[5].id)
    queue.discard(Which())
    assert drift(database) == []
    # As an older release, or a person, would do it.
    with database.write() as connection:
        connection.execute(update(jobs).values(priority=0, state="dead", error_class="x"))
    with database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.kind == "feed").values(error_class=None))
        connection.execute(delete(documents_table).where(documents_table.c.id == taken[0].id))
    with database.read() as connection:
        found = {count[1:4]: count.n for count in counts.counted(connection) if count.state == "dead" and count.n}
        assert found == {("feed", 0, "unknown"): 1, ("document", 0, "x"): 3}
    assert drift(database) == []
    with database.write() as connection:
        connection.execute(delete(jobs))
        connection.execute(delete(documents_table))
    assert drift(database) == [] and not any(count.n for count in queue.stats().detail)


def test_what_is_rolled_back_is_not_counted(documents: Documents, database: Database) -> None:
    documents.submit(Submission(url="http://a.test/"))
    with pytest.raises(RuntimeError), database.write() as connection:
        connection.execute(delete(documents_table))
        raise RuntimeError
    assert drift(database) == [] and documents.queue.stats().total("ready") == 1


def test_processes_count_together_and_sessions_that_are_over_are_added_up(database_url: str, clock: Clock) -> None:
    def work(number: int) -> None:
        own = open_database(database_url, clock)
        queue = Queue(own, f"w{number}", 1)
        for _ in range(10):
            with own.write() as connection:
                queue.enqueue_many(connection, [NewJob(priority=number % 3)] * 3)
            queue.finish([Result(job) for job in queue.claim(2)])
        own.close()

    database = open_database(database_url, clock)
    admission.admit(database, 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    def shards() -> int:
        with database.read() as connection:
            return connection.scalar(select(func.count(table.c.shard.distinct()))) or 0

    before = Queue(database, "test").stats()
    assert before.total("ready") > 0 and drift(database) == []
    if database.dialect == "postgresql":
        assert shards() > 4
        counts.merge(database)
        # What is left is that of this session, which lives, and of those that are over.
        assert shards() <= 2 and drift(database) == []
        assert Queue(database, "test").stats().depth == before.depth
    database.close()


def test_statistics_read_no_queue(database: Database, queue: Queue) -> None:
    with database.write() as connection:
        queue.enqueue_many(connection, [NewJob(priority=n % 3) for n in range(20_000)])
    for statement in (_OLDEST, counts._ALL):
        with database.read() as connection:
            asked = str(statement.compile(connection, compile_kwargs={"literal_binds": True}))
            if database.dialect == "sqlite":
                plan = " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}"))
                assert "SCAN jobs" not in plan and ("B-TREE" not in plan or statement is counts._ALL), plan
            else:
                # Also before the table was analysed for the first time.
                plan = " ".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN ANALYZE {asked}"))
                assert max(int(number) for number in re.findall(r"actual time=\S+ rows=(\d+)", plan)) <= 10, plan


def test_a_wrong_count_is_named(database: Database, keyring: Keyring) -> None:
    with database.write() as connection:
        wrong = {"state": "ready", "kind": "document", "priority": 1, "error_class": "", "shard": 0, "n": 3}
        connection.execute(insert(table).values(wrong))
    faults = snapshot.verify(database, keyring)["faults"]
    assert faults == ["the count of ('ready', 'document', 1, '') is off by 3"]
