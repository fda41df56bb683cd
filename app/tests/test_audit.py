"""The audit log: complete, kept by the store itself, found again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Cluster, open_database
from flask.testing import FlaskClient
from running import Deployment
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from test_api import READ_ONLY, app, client, problem

from atlas import audit, migrations
from atlas.cli import cli
from atlas.db import Database
from atlas.schema import audit as table

__all__ = ["app", "client"]

FORBIDDEN = [
    "UPDATE audit SET actor = 'nobody'",
    "DELETE FROM audit",
    "INSERT OR REPLACE INTO audit (id, at, actor, action, object_type, keep_days) VALUES (1, 0, 'x', 'x', 'x', 0)",
]
FORBIDDEN_TO_THE_ROLE = [
    "UPDATE audit SET actor = 'nobody'",
    "DELETE FROM audit",
    "TRUNCATE audit",
    "DROP TABLE audit",
    "DROP SCHEMA public CASCADE",
    "ALTER TABLE audit DISABLE TRIGGER ALL",
    "DROP TRIGGER audit_append_only ON audit",
    "CREATE OR REPLACE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN old; END'",
    "ALTER TABLE audit OWNER TO atlas",
    "GRANT DELETE ON audit TO atlas; DELETE FROM audit",
    "GRANT atlas_audit TO atlas",
    "SET ROLE atlas_audit",
    "SELECT establish_audit(ARRAY['DROP TABLE audit'])",
    "INSERT INTO audit (at, actor, action, object_type, keep_days) VALUES (0, 'x', 'x', 'x', 1)",
    "SELECT setval('audit_id_seq', 1)",
    "CREATE TRIGGER mine BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION refuse_update()",
    "CREATE RULE mine AS ON INSERT TO audit DO INSTEAD NOTHING",
]


def write(database: Database, *records: tuple[str, str, str, str | int | None]) -> None:
    with database.write() as connection:
        for values in records:
            audit.record(connection, *values)


def test_a_record_is_there_exactly_if_the_deed_was_done(database: Database) -> None:
    began = time.time_ns() // 1_000_000
    with database.write() as connection:
        audit.record(connection, "ops", "requeued", "job", 7, "192.0.2.1", "req-1", {"was": "dead"})
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        audit.record(connection, "ops", "requeued", "job", 8)
        raise ZeroDivisionError
    (only,), total = audit.records(database)
    assert total == 1 and began - 1000 <= only.pop("at") <= time.time_ns() // 1_000_000 + 1000
    assert only == {
        "id": only["id"],
        "actor": "ops",
        "action": "requeued",
        "object_type": "job",
        "object_id": "7",
        "address": "192.0.2.1",
        "request_id": "req-1",
        "detail": {"was": "dead"},
    }


def test_the_store_refuses_to_change_or_drop_a_record(database: Database) -> None:
    write(database, ("ops", "requeued", "job", 7))
    for statement in FORBIDDEN_TO_THE_ROLE if database.dialect == "postgresql" else FORBIDDEN:
        with pytest.raises(DBAPIError), database.write() as connection:
            connection.exec_driver_sql(statement)
    assert audit.purge(database) == 0
    (only,), _ = audit.records(database)
    assert (only["actor"], only["object_id"]) == ("ops", "7") and only["at"] > 0


def test_a_database_without_a_keeper_still_refuses_the_mistake(empty_url: str) -> None:
    store = open_database(empty_url)
    migrations.migrate(store)
    write(store, ("ops", "requeued", "job", 7))
    for statement in FORBIDDEN[:2]:
        with pytest.raises(DBAPIError, match="append-only"), store.write() as connection:
            connection.exec_driver_sql(statement)
    assert len(audit.records(store)[0]) == 1
    store.close()


def test_retention_is_written_into_the_record(database: Database) -> None:
    with database.write() as connection:
        for number in range(3):
            values = {"actor": "ops", "action": "requeued", "object_type": "job", "object_id": str(number)}
            connection.execute(insert(table).values(values | {"keep_days": 0}))
    write(database, ("ops", "requeued", "job", 9))
    database.clock = None
    time.sleep(0.01)
    assert audit.purge(database, 2) == 2
    assert audit.purge(database, 2) == 1
    assert [entry["object_id"] for entry in audit.records(database)[0]] == ["9"]
    with database.read() as connection:
        assert connection.scalar(select(table.c.keep_days)) == 365


def test_the_setting_decides_how_long(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, audit_retention_days=30)
    runner = CliRunner(env=deployment.environment)

    def run(*arguments: str) -> tuple[int, str]:
        done = runner.invoke(cli, arguments)
        return done.exit_code, done.output

    run("db", "migrate")
    run("admission", "admit", "7")
    store = Database.from_url(f"sqlite:///{tmp_path}/atlas.db")
    with store.read() as connection:
        assert set(connection.scalars(select(table.c.keep_days))) == {30}
    store.close()
    found = json.loads(run("audit", "--action", "admitted", "--json")[1])
    assert [entry["object_id"] for entry in found] == ["7"]
    assert "admitted deployment 7" in run("audit")[1]
    assert run("audit", "--since", "2999-01-01T00:00:00Z") == (0, "no record matches\n")
    code, wrong = run("audit", "--since", "yesterday")
    assert code == 2 and "RFC 3339" in wrong
    deployment.close()


def test_records_are_found_by_what_they_say(client: FlaskClient, database_url: str) -> None:
    store = open_database(database_url)
    write(store, *[("ops", "requeued", "job", n) for n in range(3)], ("cli:root", "rotated", "key", None))
    store.close()
    first = client.get("/v1/audit?object_type=job&limit=2").get_json()
    rest = client.get(f"/v1/audit?object_type=job&limit=2&cursor={first['next']}").get_json()
    assert first["total"] == rest["total"] == 3 and rest["next"] is None
    assert [entry["object_id"] for entry in first["items"] + rest["items"]] == ["2", "1", "0"]
    assert client.get("/v1/audit?actor=cli:root").get_json()["items"][0]["action"] == "rotated"
    at = first["items"][0]["at"]
    assert client.get("/v1/audit", query_string={"since": at}).get_json()["total"] >= 1
    assert client.get("/v1/audit", query_string={"until": "2020-01-01T00:00:00+02:00"}).get_json()["total"] == 0
    for query in ("since=soon", "since=2026-01-01T00:00:00", "until=9e9", "cursor=x", "limit=0"):
        problem(client.get(f"/v1/audit?{query}"), 422)
    problem(client.get("/v1/audit", headers={"Authorization": f"Bearer {READ_ONLY}"}), 403)


def test_the_keeper_may_be_given_twice(cluster: Cluster) -> None:
    from scratch import KEEPER

    cluster.execute(KEEPER.read_text(), "template_atlas")
    store = Database.from_url(cluster.url("template_atlas", "atlas_a"), role="atlas")
    with store.read() as connection:
        owner = connection.scalar(text("SELECT tableowner FROM pg_tables WHERE tablename = 'audit'"))
    store.close()
    assert owner == "atlas_audit"
