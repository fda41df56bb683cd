"""The atlas command: what roles call, and how it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import open_database
from running import Deployment
from sqlalchemy import func, select

from atlas import admission
from atlas.audit import operator, records
from atlas.breakers import Limits
from atlas.cli import cli
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.queue import Queue
from atlas.schema import documents, hosts, jobs
from atlas.settings import Settings


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path)
    yield deployment
    deployment.close()


def answer(deployment: Deployment, *arguments: str) -> object:
    done = deployment.command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_store_is_migrated_once(deployment: Deployment) -> None:
    before = answer(deployment, "db", "status")
    assert isinstance(before, dict) and before["current"] is None and before["compatible"] is False
    first = answer(deployment, "db", "migrate")
    assert first == {"from": None, "to": before["head"], "changed": True}
    assert answer(deployment, "db", "migrate") == {"from": before["head"], "to": before["head"], "changed": False}
    after = answer(deployment, "db", "status")
    assert isinstance(after, dict) and after["applied"].pop(before["head"]) == "expand"
    assert (after["current"], after["known"], after["compatible"]) == (before["head"], True, True)


def test_tokens_are_applied_once(deployment: Deployment) -> None:
    answer(deployment, "db", "migrate")
    assert answer(deployment, "tokens", "apply") == {"changed": 1}
    assert answer(deployment, "tokens", "apply") == {"changed": 0}


def test_a_token_has_the_usual_limits_unless_it_is_given_none(deployment: Deployment) -> None:
    path = deployment.directory / "credentials/atlas_tokens"
    specs = [{"name": name, "sha256": name * 64, "scopes": ["read"]} for name in ("a", "b")]
    path.write_text(json.dumps([specs[0], specs[1] | {"limits": None}]))
    for arguments in (["db", "migrate"], ["tokens", "apply"]):
        told(deployment, *arguments)
    limits = {token["name"]: token["limits"] for token in told(deployment, "tokens", "list")}
    assert limits == {"a": {"per_minute": 60, "per_hour": 1000}, "b": None}
    assert "a read at most 60/min, 1000/h" in run(deployment, "tokens", "list").stdout


def test_deployments_are_admitted_and_dismissed(deployment: Deployment) -> None:
    answer(deployment, "db", "migrate")
    assert answer(deployment, "admission", "admit", "3", "--concurrency", "1") == {"id": 3, "changed": True}
    assert answer(deployment, "admission", "admit", "3", "--concurrency", "1") == {"id": 3, "changed": False}
    (entry,) = answer(deployment, "admission", "list")  # type: ignore[misc]
    assert (entry["id"], entry["admitted"], entry["concurrency"]) == (3, True, 1)
    assert answer(deployment, "admission", "admit", "4", "--alone") == {"id": 4, "changed": True}
    assert answer(deployment, "admission", "admit", "4", "--alone") == {"id": 4, "changed": False}
    assert "4 admitted" in deployment.command("admission", "list").stdout
    assert answer(deployment, "admission", "dismiss", "3") == {"id": 3, "changed": False}
    assert "3 dismissed" in deployment.command("admission", "list").stdout


def test_version(deployment: Deployment) -> None:
    found = answer(deployment, "version")
    assert isinstance(found, dict) and found["version"] == "0.1.0"


def test_config_check_names_every_finding(deployment: Deployment) -> None:
    assert deployment.command("config", "check").returncode == 0
    path = deployment.directory / "settings.yaml"
    path.write_text(path.read_text() + "api_worker: 2\napi_threads: none\n")
    done = deployment.command("config", "check")
    assert done.returncode == 2 and done.stdout == ""
    assert sorted(line.split(": ")[:2] for line in done.stderr.splitlines()) == [
        ["settings.yaml", "api_threads"],
        ["settings.yaml", "api_worker"],
    ]


def test_config_check_reads_several_files_in_one_process(deployment: Deployment) -> None:
    good = deployment.directory / "settings.yaml"
    bad = deployment.directory / "bad.yaml"
    bad.write_text(good.read_text() + "api_threads: none\n")
    done = deployment.command("config", "check", "--json", str(good), str(bad), str(good))
    found = json.loads(done.stdout)
    assert done.returncode == 2 and [each["valid"] for each in found] == [True, False, True]
    assert found[1]["source"] == "bad.yaml" and found[1]["findings"][0].startswith("api_threads: ")
    assert deployment.command("config", "check", str(good), str(good)).returncode == 0
    assert deployment.command("config", "check", str(good), str(bad)).stderr.startswith("bad.yaml: api_threads: ")


@pytest.mark.parametrize(
    ("setting", "code", "expected"),
    [
        ({"ATLAS_SETTINGS": "/nowhere/settings.yaml"}, 2, "cannot be read: No such file"),
        ({"ATLAS_DEPLOYMENT": "/nowhere/deployment.json"}, 2, "is not a readable deployment"),
        ({"ATLAS_CREDENTIALS_DIRECTORY": "/nowhere"}, 2, "atlas_fernet_keys is missing or empty"),
        ({"ATLAS_PORT": "http"}, 2, "ATLAS_PORT: 'http' is not a port"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_line(
    deployment: Deployment, setting: dict[str, str], code: int, expected: str
) -> None:
    done = deployment.command("serve", "monitoring" if "ATLAS_PORT" in setting else "core", **setting)
    assert done.returncode == code and expected in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_database_that_is_away_is_one_line(deployment: Deployment) -> None:
    done = deployment.command("admission", "list")
    assert done.returncode == 1 and done.stderr.startswith("atlas: the database does not answer: ")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def store(deployment: Deployment, database_url: str) -> Iterator[Database]:
    """A store with three dead letters of two hosts, one of which has an open breaker; the deployment is told of it."""
    database = open_database(database_url)
    values = deployment.settings | {"database_url": database_url}
    values |= {"database_role": "atlas"} if database.dialect == "postgresql" else {}
    (deployment.directory / "settings.yaml").write_text(yaml.safe_dump(values))
    admission.admit(database, 1)
    queue = Queue(database, "w", 1, limits=Limits(failures=1))
    keys = (deployment.directory / "credentials/atlas_fernet_keys").read_text().split()
    entry = Documents(database, queue, Keyring(keys), Settings(environment="development", database_url=database_url))
    for url in ("http://a.test/1", "http://a.test/2", "http://b.test/1"):
        entry.submit(Submission(url=url, priority=0))
        [job] = queue.claim()
        assert queue.fail(job, "not_found", f"404 {url}") == "dead"
    entry.submit(Submission(url="http://b.test/2"))
    [job] = queue.claim()
    queue.fail(job, "timeout", "no answer")
    yield database
    database.close()


def numbers(database: Database) -> tuple[int, int]:
    """Dead letters, and documents."""
    with database.read() as connection:
        dead = connection.scalar(select(func.count()).where(jobs.c.state == "dead")) or 0
        return dead, connection.scalar(select(func.count()).select_from(documents)) or 0


def run(deployment: Deployment, *arguments: str) -> Result:
    """A command, in this process: there are many of them here."""
    return CliRunner().invoke(cli, arguments, env=deployment.environment)


def told(deployment: Deployment, *arguments: str) -> Any:
    done = run(deployment, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(deployment: Deployment, code: int, expected: str, *arguments: str) -> None:
    done = run(deployment, *arguments)
    assert done.exit_code == code and expected in done.stderr and done.stdout == ""


def test_the_queue_is_shown(deployment: Deployment, store: Database) -> None:
    found = told(deployment, "queue", "status")
    assert found["queue"]["dead"] == {"high": 3, "normal": 0, "low": 0}
    assert found["documents"]["dead"] == 3 and found["dead_letters"] == {"not_found": 3}
    assert "dead: 3, 3 high" in run(deployment, "queue", "status").stdout
    listed = told(deployment, "queue", "list", "--state", "ready")
    assert [job["host"] for job in listed] == ["b.test"]
    (waiting,) = listed
    shown = told(deployment, "queue", "show", str(waiting["id"]))
    assert shown == waiting
    assert [(event["event"], event["error_class"]) for event in shown["events"]] == [("failed", "timeout")]
    assert "timeout" in run(deployment, "queue", "show", str(waiting["id"])).stdout
    ids = [job["id"] for job in told(deployment, "queue", "list")]
    assert len(ids) == 4 and ids == sorted(ids, reverse=True)
    page = told(deployment, "queue", "list", "--limit", "1", "--before", str(ids[1]))
    assert [job["id"] for job in page] == [ids[2]]
    refused(deployment, 1, "there is no job 99", "queue", "show", "99")
    refused(deployment, 2, "is not a moment", "queue", "list", "--since", "yesterday")
    refused(deployment, 2, "not in the range", "queue", "show", str(2**63))


def test_dead_letters_are_requeued_and_discarded(deployment: Deployment, store: Database) -> None:
    listed = told(deployment, "dead-letters", "list", "--host", "a.test")
    assert [job["error"][:3] for job in listed] == ["404", "404"]
    first, second = (str(job["id"]) for job in listed)
    shown = told(deployment, "dead-letters", "show", first)
    assert [event["event"] for event in shown["events"]] == ["died"]
    for wrong in ([], [first, "--all"], ["--all", "--host", "a.test"]):
        refused(deployment, 2, "give a JOB_ID, or filters, or --all", "dead-letters", "discard", *wrong)
    refused(deployment, 1, "there is no dead letter 99", "dead-letters", "requeue", "99")
    assert numbers(store) == (3, 4)
    assert told(deployment, "dead-letters", "requeue", first) == {"count": 1, "change": "requeued"}
    assert numbers(store) == (2, 4)
    refused(deployment, 1, f"there is no dead letter {first}", "dead-letters", "show", first)
    assert told(deployment, "dead-letters", "discard", "--host", "a.test") == {"count": 1, "change": "discarded"}
    assert numbers(store) == (1, 3)
    assert told(deployment, "dead-letters", "requeue", "--all") == {"count": 1, "change": "requeued"}
    assert numbers(store) == (0, 3)
    assert told(deployment, "dead-letters", "list") == []
    recorded, _ = records(store, {"object_type": "job", "actor": operator()})
    done = [(entry["action"], entry["object_id"]) for entry in recorded]
    assert done == [("requeued", None), ("discarded", None), ("requeued", first)]
    assert recorded[1]["detail"] == {"host": "a.test", "ids": [int(second)]}


def test_breakers_are_listed_and_reset(deployment: Deployment, store: Database) -> None:
    listed = told(deployment, "breakers", "list", "--state", "open")
    assert [host["name"] for host in listed] == ["b.test"]
    assert "b.test open, failures: 1" in run(deployment, "breakers", "list").stdout
    refused(deployment, 1, "nothing is known of the host c.test", "breakers", "reset", "c.test")
    assert told(deployment, "breakers", "reset", "b.test") == {"name": "b.test"}
    with store.read() as connection:
        assert connection.scalars(select(hosts.c.state).where(hosts.c.name == "b.test")).all() == ["closed"]
    assert told(deployment, "breakers", "list", "--state", "open") == []
    assert [entry["action"] for entry in records(store, {"object_type": "breaker"})[0]] == ["reset"]
