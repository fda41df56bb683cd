"""The atlas command: what roles call, and how it says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Deployment


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
