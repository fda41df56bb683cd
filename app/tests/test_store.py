"""The store itself, migrations, admission, presence and tokens, on both databases."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from conftest import Clock, Cluster, open_database
from pysqlite3 import dbapi2 as sqlite
from sqlalchemy import Select, insert, select, text
from sqlalchemy.exc import DBAPIError

from atlas import admission, migrations, presence
from atlas.db import Database, rfc3339, total
from atlas.schema import deployments, job_events, metadata, schema_revisions
from atlas.settings import Identity, Settings, TokenLimits, TokenSpec
from atlas.tokens import Tokens


def on_each(count: int, url: str, work: Callable[[Database], object]) -> list[object]:
    """Run `work` at once on `count` stores, each opened on its own."""
    stores = [open_database(url) for _ in range(count)]
    barrier = threading.Barrier(count)

    def run(store: Database) -> object:
        barrier.wait()
        return work(store)

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, stores))
    finally:
        for store in stores:
            store.close()


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DBAPIError), database.read() as connection:
        connection.execute(insert(deployments).values(id=1, changed_at=0))


def test_a_failed_block_is_rolled_back(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as connection:
        connection.execute(insert(deployments).values(id=1, changed_at=0))
        raise RuntimeError
    assert admission.admissions(database) == []


def test_counting_a_list_leaves_nothing_behind(database: Database) -> None:
    def count() -> weakref.ref[Select[tuple[int]]]:
        matching = select(deployments.c.id)
        with database.read() as connection:
            assert total(connection, matching) == 0
        return weakref.ref(matching)

    asked = count()
    gc.collect()
    assert asked() is None


def test_the_clock_is_that_of_the_database(database_url: str) -> None:
    store = open_database(database_url)
    with store.read() as connection:
        query = (
            "SELECT unixepoch('subsec') * 1000"
            if store.dialect == "sqlite"
            else "SELECT extract(epoch FROM clock_timestamp()) * 1000"
        )
        assert store.now(connection) == pytest.approx(float(connection.scalar(text(query))), abs=1000)
    store.close()
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(None) is None


def test_sqlite_is_opened_for_durability(tmp_path: Path) -> None:
    store = Database.from_url(f"sqlite:///{tmp_path}/with # and é.db")
    with store.write() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys", "journal_size_limit")
        }
    store.close()
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "busy_timeout": 10_000,
        "foreign_keys": 1,
        "journal_size_limit": 67_108_864,
    }
    assert (tmp_path / "with # and é.db").exists()
    assert tuple(map(int, sqlite.sqlite_version.split("."))) >= (3, 51, 3), "free of the WAL-reset bug"


def test_a_writer_waits_for_another_process(tmp_path: Path) -> None:
    first, second = (Database.from_url(f"sqlite:///{tmp_path}/atlas.db") for _ in range(2))
    migrations.migrate(first)
    held = threading.Event()

    def hold() -> None:
        with first.write() as connection:
            connection.execute(insert(deployments).values(id=1, changed_at=0))
            held.set()
            threading.Event().wait(0.5)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        assert held.wait(60)
        with second.write() as connection:
            assert connection.execute(text("SELECT count(*) FROM deployments")).scalar() == 1
        holding.result()
    first.close()
    second.close()


def test_a_process_opens_no_more_connections_than_it_was_given(cluster: Cluster) -> None:
    """Its threads wait for each other instead: PostgreSQL has so many for all hosts together."""
    cluster.execute("CREATE DATABASE test_connections OWNER atlas")
    store = Database.from_url(cluster.url("test_connections", "atlas_a"), role="atlas", pool_size=2)
    busy = threading.Barrier(2)

    def work(number: int) -> int:
        with store.read() as connection:
            if number < 2:
                busy.wait(10)
            count = text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'atlas'"
            )
            connection.execute(text("SELECT pg_sleep(0.01)"))
            return int(connection.scalar(count) or 0)

    try:
        with ThreadPoolExecutor(12) as pool:
            seen = list(pool.map(work, range(60)))
    finally:
        store.close()
        cluster.execute("DROP DATABASE test_connections WITH (FORCE)")
    assert max(seen) == 2


def test_postgresql_works_as_the_role(cluster: Cluster) -> None:
    store = Database.from_url(cluster.url("template_atlas", "atlas_a"), role="atlas")
    with pytest.raises(DBAPIError), store.write() as connection:
        connection.execute(text("SELECT 1 / 0"))
    with store.write() as connection:
        assert connection.scalar(text("SELECT current_user")) == "atlas", "also after a rollback"
        assert connection.scalar(text("SELECT session_user")) == "atlas_a"
        owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'jobs'"
        assert connection.scalar(text(owner)) == "atlas"
        assert connection.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"
    store.close()


def test_the_login_travels_with_its_password() -> None:
    url = "postgresql+psycopg://atlas_a@127.0.0.1:1/atlas"
    given = {"environment": "development", "database_url": url, "database_password": "very-secret"}
    for more, login in (({}, "atlas_a"), ({"database_login": "atlas_b"}, "atlas_b")):
        url_used = Database(Settings(**given | more))._writer.url
        assert (url_used.username, url_used.password) == (login, "very-secret")


def test_the_password_stays_out_of_errors() -> None:
    store = Database.from_url("postgresql+psycopg://atlas_a@127.0.0.1:1/atlas", password="very-secret")
    with pytest.raises(DBAPIError) as error, store.read():
        pass
    assert "very-secret" not in f"{error.value!r} {error.value} {store._writer!r}"


def test_migrate_brings_an_empty_store_to_head_once(empty_url: str) -> None:
    store = open_database(empty_url)
    if store.dialect == "sqlite":
        with store.write():
            pass
    assert store.revision() is None
    before = migrations.status(store)
    assert (before.current, before.known, before.compatible) == (None, False, False)
    head = migrations.head()
    assert migrations.migrate(store) == (None, head)
    assert migrations.migrate(store) == (head, head)
    assert store.revision() == head
    status = migrations.status(store)
    assert (status.current, status.head, status.known, status.compatible) == (head, head, True, True)
    assert status.applied == {entry["revision"]: entry["phase"] for entry in migrations.revisions()}
    store.close()


def test_hosts_may_migrate_at_once(empty_url: str) -> None:
    outcomes = on_each(4, empty_url, migrations.migrate)
    head = migrations.head()
    assert sorted(outcomes, key=str) == [*[(head, head)] * 3, (None, head)]


def test_the_migrations_make_the_schema(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection)
        differences = compare_metadata(context, metadata)
    search = ("documents_index", "documents_search", "search", "alembic_version")
    assert [each for each in differences if not any(word in str(each) for word in search)] == []


@pytest.mark.parametrize(("phase", "compatible"), [("expand", True), ("contract", False)])
def test_an_older_release_knows_whether_it_can_serve(database: Database, phase: str, compatible: bool) -> None:
    with database.write() as connection:
        connection.execute(insert(schema_revisions).values(revision="9999", phase=phase, applied_at=0))
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    status = migrations.status(database)
    assert (status.current, status.known, status.compatible) == ("9999", False, compatible)
    if compatible:
        assert migrations.migrate(database) == ("9999", "9999")
    else:
        with pytest.raises(migrations.MigrationError, match="cannot serve"):
            migrations.migrate(database)


def test_a_contract_revision_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [{"revision": f"000{n}", "phase": phase} for n, phase in enumerate(("expand", "expand", "contract"), 1)]
    monkeypatch.setattr(migrations, "revisions", lambda: listed)
    assert migrations._target(None, contract=False) == "0002"
    assert migrations._target("0002", contract=False) == "0002"
    assert migrations._target("0002", contract=True) == "0003"
    listed.append({"revision": "0004", "phase": "expand"})
    with pytest.raises(migrations.MigrationError, match="0004 waits behind the contract revision 0003"):
        migrations._target("0002", contract=False)
    assert migrations._target("0002", contract=True) == "0004"


def test_a_release_serves_before_its_contract_revision_and_not_before_its_expand_revision(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = migrations.revisions()
    monkeypatch.setattr(migrations, "revisions", lambda: [*own, {"revision": "9998", "phase": "contract"}])
    assert migrations.status(database).compatible
    monkeypatch.setattr(migrations, "revisions", lambda: [*own, {"revision": "9998", "phase": "expand"}])
    assert not migrations.status(database).compatible


def test_a_failed_migration_changes_nothing(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_database(empty_url)
    with store.write() as connection:
        connection.execute(text("CREATE TABLE tokens (x int)"))
    with pytest.raises(migrations.MigrationError, match="nothing was changed.*tokens"):
        migrations.migrate(store)
    assert store.revision() is None
    with store.read() as connection, pytest.raises(DBAPIError):
        connection.execute(text("SELECT * FROM documents"))
    store.close()


@pytest.mark.parametrize("ends", [True, False])
def test_a_migration_lets_users_pass_while_somebody_reads_for_long(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Whoever comes after a migration that waits for a table would wait behind it, for as long as it does."""
    if database.dialect != "postgresql":
        pytest.skip("SQLite's readers hold up no writer")
    tried: list[float] = []
    done = threading.Event()

    def upgrade(config: Config, _target: str) -> None:
        tried.append(time.monotonic())
        config.attributes["connection"].execute(text("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE"))

    monkeypatch.setattr(migrations, "_target", lambda *_: "9000")
    monkeypatch.setattr(migrations.command, "upgrade", upgrade)
    monkeypatch.setattr(migrations, "LOCK_PAUSE_SECONDS", 0.3)
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 30.0 if ends else 2.0)
    waits: list[float] = []

    def use() -> None:
        users = open_database(database_url)
        while not done.is_set():
            began = time.monotonic()
            with users.read() as connection:
                connection.execute(text("SELECT count(*) FROM documents"))
            waits.append(time.monotonic() - began)
            time.sleep(0.02)
        users.close()

    reader = open_database(database_url)
    user = threading.Thread(target=use)
    with ThreadPoolExecutor(1) as pool:
        try:
            with reader.read() as connection:
                connection.execute(text("SELECT count(*) FROM documents"))
                user.start()
                migration = pool.submit(migrations.migrate, database)
                while ends and len(tried) < 3:
                    assert not migration.done()
                    time.sleep(0.05)
                if not ends:
                    with pytest.raises(migrations.MigrationError, match="nothing was changed.*lock timeout"):
                        migration.result(30)
            if ends:
                assert migration.result(30)[1] == "9000"
        finally:
            done.set()
            user.join()
    reader.close()
    assert len(tried) >= 3 and len(waits) > len(tried), "users came through between its attempts"
    assert max(waits) < 3, "one attempt holds them up for half a second, and all of them for no longer"


def test_outcomes_are_counted_by_deployment(database: Database, clock: Clock) -> None:
    with database.write() as connection:
        at = database.now(connection)
        for deployment, event in ((3, "finished"), (3, "died"), (4, "finished"), (4, "finished")):
            values = {"job_id": 1, "event": event, "token": 1, "attempt": 1, "owner": "w", "deployment": deployment}
            connection.execute(insert(job_events).values(**values, at=at))
    assert admission.outcomes(database) == {3: {"finished": 1, "died": 1}, 4: {"finished": 2}}
    clock.advance(301)
    assert admission.outcomes(database) == {}


def test_one_deployment_is_admitted_alone(database: Database) -> None:
    admission.admit(database, 1)
    admission.admit(database, 2, concurrency=1)
    assert admission.admit(database, 3, alone=True)
    assert [entry.id for entry in admission.admissions(database) if entry.admitted] == [3]
    assert not admission.admit(database, 3, alone=True)


def test_admission_is_recorded_and_repeatable(database: Database, clock: Clock) -> None:
    assert admission.admit(database, 7, concurrency=1) is True
    assert admission.admit(database, 7, concurrency=1) is False
    assert [(entry.id, entry.admitted) for entry in admission.admissions(database)] == [(7, True)]
    clock.advance(5)
    assert admission.admit(database, 7) is True
    assert admission.dismiss(database, 7) is True
    assert admission.dismiss(database, 7) is False
    (only,) = admission.admissions(database)
    assert (only.id, only.admitted, only.changed_at) == (7, False, clock())
    with pytest.raises(ValueError, match="concurrency"):
        admission.admit(database, 7, concurrency=0)


def test_there_is_one_leader(database: Database, clock: Clock) -> None:
    admission.admit(database, 1)
    assert admission.lead(database, "services", "a", 1, 30)
    assert not admission.lead(database, "services", "b", 1, 30)
    clock.advance(29)
    assert admission.lead(database, "services", "a", 1, 30), "renewed"
    clock.advance(31)
    assert admission.leader(database, "services") is None
    assert admission.lead(database, "services", "b", 1, 30)
    assert admission.leader(database, "services") == "b"
    admission.step_down(database, "services", "b")
    assert admission.lead(database, "services", "a", 1, 30)


def test_a_dismissed_deployment_does_not_lead(database: Database) -> None:
    assert not admission.lead(database, "services", "a", 1, 30)
    admission.admit(database, 1)
    assert admission.lead(database, "services", "a", 1, 30)
    admission.dismiss(database, 1)
    assert admission.leader(database, "services") is None
    assert not admission.lead(database, "services", "a", 1, 30)


def test_only_one_of_many_becomes_leader(database_url: str) -> None:
    store = open_database(database_url)
    admission.admit(store, 1)
    store.close()
    names = iter("abcdef")
    won = on_each(6, database_url, lambda each: admission.lead(each, "services", next(names), 1, 30))
    assert sum(map(bool, won)) == 1


def test_presence_shows_who_was_seen(database: Database, clock: Clock) -> None:
    blue, green = Identity(1, "r1", "blue", "app1"), Identity(2, "r2", "green", "app1")
    presence.beat(database, blue, "core", 1, {"running": 2})
    clock.advance(4)
    presence.beat(database, green, "core", 2)
    clock.advance(1)
    presence.beat(database, green, "core", 2)
    seen = {each.slot: each for each in presence.roster(database)}
    assert (seen["blue"].age_seconds, seen["blue"].detail) == (5.0, {"running": 2})
    assert (seen["green"].age_seconds, seen["green"].deployment) == (0.0, 2)
    presence.leave(database, blue, "core")
    assert [each.slot for each in presence.roster(database)] == ["green"]


def spec(secret: str, **values: object) -> TokenSpec:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return TokenSpec.model_validate({"name": "t", "sha256": digest, "scopes": ["read"]} | values)


def test_tokens_authenticate_by_hash(database: Database) -> None:
    tokens = Tokens(database)
    assert tokens.apply([spec("one", scopes=["ingest", "read"], limits={"per_minute": 2}), spec("two")]) == 2
    one, two = tokens.authenticate("one"), tokens.authenticate("two")
    assert one is not None and two is not None
    assert (one.scopes, one.limits) == (frozenset({"ingest", "read"}), TokenLimits(per_minute=2))
    assert two.limits == TokenLimits(per_minute=60, per_hour=1000)
    assert tokens.authenticate("three") is None
    assert tokens.authenticate("\ud800") is None


def test_tokens_that_are_no_longer_listed_are_refused(database: Database) -> None:
    tokens = Tokens(database)
    tokens.apply([spec("one"), spec("two")])
    assert tokens.authenticate("one") is not None
    assert tokens.apply([spec("two")]) == 1
    assert tokens.apply([spec("two")]) == 0
    assert tokens.authenticate("one") is None
    assert tokens.apply([spec("one"), spec("two")]) == 1
    assert tokens.authenticate("one") is not None


def test_tokens_expire(database: Database, clock: Clock) -> None:
    tokens = Tokens(database)
    tokens.apply([spec("one", expires_at=clock() + 1000)])
    assert tokens.authenticate("one") is not None
    clock.advance(2)
    assert Tokens(database).authenticate("one") is None


def test_a_revoked_token_is_forgotten_in_seconds(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Tokens(database), Tokens(database)
    first.apply([spec("one")])
    assert second.authenticate("one") is not None
    first.apply([])
    assert second.authenticate("one") is not None, "still in the cache of the other process"
    monkeypatch.setattr("atlas.tokens.time.monotonic", lambda: float("inf"))
    assert second.authenticate("one") is None
