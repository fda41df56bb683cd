"""How the filters of a deploy find what they need in the variables of its hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deploy
import pytest
import yaml
from ansible.module_utils import deploy_hooks, deploy_plan

PROJECT = Path(__file__).resolve().parents[2]

LIMITS = {"samples": 20, "error_percent": 1.0, "slow_percent": 10.0, "slow_ms": 100, "job_percent": 10.0}
PLAN: dict[str, Any] = {
    "mode": "deploy",
    "hosts": ["app1", "app2"],
    "edges": ["edge1"],
    "reached": ["app1", "app2"],
    "rolling": False,
    "watch_first": False,
    "first": False,
    "renew": [],
    "batch": 2,
    "warm": False,
    "missing": [],
    "number": 7,
    "old_number": 6,
    "undo": {"traffic_to": None, "hosts": [], "interrupted": False, "number": 6},
}


def variables(**other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables of a fleet in the middle of a deploy."""
    return {host: {"__deploy_plan": PLAN, **other.get(host, {})} for host in ("edge1", "app1", "app2")} | {"db1": {}}


def counts(requests: int, errors: int = 0) -> dict[str, Any]:
    return {"requests": requests, "errors": errors, "histogram": {}}


def test_nothing_is_provisioned_with_a_vault_file_from_before_a_rotation() -> None:
    """It would give the database back the passwords of before: whatever serves would be refused."""
    entry = {
        "event": "rotation",
        "kind": "database",
        "step": "finished",
        "at": "2027-01-15T08:00:00Z",
        "order": 5,
        "serial": 4,
    }
    facts: list[dict[str, Any]] = [{"rotations": [entry]}, {"unreachable": True}, {}]  # one that is gone, and a new one
    assert "database (finished" in deploy.older_vault(facts, "3")
    assert deploy.older_vault(facts, 4) == deploy.older_vault(facts[1:], 0) == ""


NOTED = """#!/usr/bin/python
import json
print(json.dumps({noted!r}))
"""
FLEET = """
all:
  vars: {ansible_become: false, ansible_ssh_retries: 0, deploy_hosts: "{{ groups['app'] }}"}
  hosts: {db1: {ansible_host: 127.0.0.1, ansible_port: 1}}
  children: {app: {hosts: {gone: {ansible_host: 127.0.0.1, ansible_port: 1}, app1: {ansible_connection: local}}}}
"""


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        ({"rotations": [{"event": "finished", "deployment": 7, "at": "2027-01-15T08:00:00Z", "serial": 4}]}, "is older"),
        ({"failed": True, "msg": "torn"}, "cannot be read on app1: torn"),
        ({"rotations": []}, ""),
    ],
)  # fmt: skip
def test_nothing_is_provisioned_before_the_vault_file_was_looked_at_also_with_a_limit(
    tmp_path: Path, noted: dict[str, Any], says: str
) -> None:
    """The first play of site.yml alone: on app hosts of which one is gone, and which the limit leaves out."""
    first = yaml.safe_load((PROJECT / "playbooks/site.yml").read_text())[0]
    then = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.debug": {"msg": "goes on"}}]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([first, then]))
    (tmp_path / "hosts.yml").write_text(FLEET)
    (tmp_path / "library").mkdir()
    (tmp_path / "library/atlas_facts.py").write_text(NOTED.format(noted=noted))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    config = {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_LIBRARY": str(tmp_path / "library")}
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(tmp_path / "hosts.yml")]
    run = subprocess.run(
        [*command, str(tmp_path / "play.yml"), "--limit", "db1", "-e", "deploy_vault_serial=3"],
        cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False, env=kept | config,
    )  # fmt: skip
    assert says in run.stdout and "Connection refused" in run.stdout, run.stdout + run.stderr
    assert ("goes on" in run.stdout, run.returncode) == ((False, 2) if says else (True, 0)), run.stdout


def test_a_playbook_that_is_only_read_names_all_hosts_and_one_without_a_plan_none() -> None:
    assert deploy.play(None, "stage") == ["all"]
    assert deploy.play({"app1": {}}, "stage") == []
    assert deploy.batch(None) == 1 and deploy.batch(variables()) == 2


def test_a_failure_on_any_host_ends_the_phases() -> None:
    assert deploy.play(variables(), "switch_start") == ["app1", "app2"]
    failed = {"__deploy_failure": {"host": "app2", "phase": "stage", "message": "", "log": []}}
    assert deploy.play(variables(app2=failed), "switch_start") == []


@pytest.mark.parametrize("name", ["__deploy_started", "__deploy_drained"])
def test_what_was_touched_goes_back_and_nothing_else(name: str) -> None:
    failed = {"__deploy_failure": {"host": "edge1", "phase": "switch", "message": "", "log": []}}
    fleet = variables(edge1=failed, app1={name: {"failed": True}}, app2={name: {"skipped": True}})
    assert deploy.play(fleet, "undo_hosts") == ["app1"] == deploy.touched(fleet, ["app1", "app2"])


@pytest.mark.parametrize("rolling", [True, False])
@pytest.mark.parametrize(
    ("relocked", "is_taken"),
    [
        ({"changed": True}, False),
        ({"failed": True, "taken": True}, True),
        ({"failed": True}, False),
        ({"unreachable": True}, False),
    ],
    ids=["free", "taken", "disk full", "edge gone"],
)
def test_nothing_is_undone_once_another_deploy_has_had_the_lock(
    rolling: bool, relocked: dict[str, Any], is_taken: bool
) -> None:
    failed = {"host": "app1", "phase": "verify", "message": "", "log": []}
    app = {"__deploy_started": {"changed": True}, "__deploy_plan": PLAN | {"rolling": rolling}}
    edge = {"__deploy_failure": failed, "__deploy_plan": app["__deploy_plan"], "__deploy_relocked": relocked}
    fleet = variables(edge1=edge, app1=app, app2=app)
    assert deploy.play(fleet, "undo_lock") == ["edge1"]
    assert deploy.play(fleet, "undo_hosts") == ([] if is_taken else ["app2", "app1"])
    assert deploy.play(fleet, "undo_lead") == ([] if is_taken else ["app2"]), "nor are its workers dismissed"


def test_all_of_a_batch_have_to_be_well() -> None:
    well, hosts = {"__deploy_started": {"changed": True}}, ["app1", "app2"]
    assert deploy.all_well(variables(app1=well, app2=well), hosts, "__deploy_started")
    for bad in ({"failed": True}, {"unreachable": True}, {"skipped": True}, {}):
        assert not deploy.all_well(variables(app1=well, app2={"__deploy_started": bad}), hosts, "__deploy_started")


def test_the_verdict_is_on_what_all_hosts_watched() -> None:
    watched = {"__deploy_watched": {"edge": {"new": counts(50), "old": counts(100)}}}
    jobs = {"__deploy_watched": {"jobs": {"7": [1, 9], "6": [0, 9], "5": [9, 9]}}}
    found = deploy.verdict(variables(edge1=watched, app1=jobs), ["edge1", "app1"], LIMITS)
    assert found["verdict"] == "pass" and found["figures"]["jobs"] == [[1, 9], [0, 9]]
    assert found["told"].startswith("requests 50 (old 100), failed 0")


@pytest.mark.parametrize("kind", ["prepared on the edge", "switched on the edge", "drained from the first host"])
def test_after_a_switch_the_old_release_counts_as_it_did_before(kind: str) -> None:
    edge: dict[str, Any] = {"__deploy_watched": {"edge": {"new": counts(50, 5), "old": counts(0)}}}
    app: dict[str, Any] = {}
    if kind == "prepared on the edge":
        edge["__deploy_prepared"] = {"old": counts(100, 30)}
    elif kind == "switched on the edge":
        edge |= {"__deploy_prepared": {"old": counts(10)}, "__deploy_switched": {"old": counts(100, 30)}}
    else:
        app["__deploy_drained"] = {"results": [{"old": counts(60, 20)}, {"old": counts(40, 10)}]}
    found = deploy.verdict(variables(edge1=edge, app1=app), ["edge1", "app1", "app2"], LIMITS)
    assert found["figures"]["errors"] == [5, 30] and found["verdict"] == "pass"


@pytest.mark.parametrize(
    ("answer", "applied", "error"),
    [
        ({"skipped": True}, {}, ""),
        ({"outputs": ['{"applied": {"0001": "expand"}}']}, {"0001": "expand"}, ""),
        ({"outputs": ['{"current": "0001"}']}, {}, ""),
        ({"failed": True, "msg": "no connection"}, {}, "no connection"),
        ({"unreachable": True, "msg": "gone"}, {}, "gone"),
    ],
    ids=["not asked", "answered", "by an older release", "failed", "unreachable"],
)
def test_what_the_database_said_of_its_schema(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], applied: dict[str, str], error: str
) -> None:
    monkeypatch.setattr(deploy_plan, "plan", lambda _facts, _file, options, *_: dict(options))
    found = deploy.plan({}, {}, {}, answer)
    assert (found["applied"], found["schema_error"]) == (applied, error)


WITH_HOOKS = PLAN | {"hooks": ["after_finish", "after_migrate", "before_switch", "failed"]}
FAILURE = {"host": "app1", "phase": "switch", "message": "bad", "log": []}


def test_only_events_that_happen_and_have_hooks_are_due() -> None:
    fleet = variables() | {"app1": {"__deploy_plan": WITH_HOOKS}, "edge1": {"__deploy_plan": WITH_HOOKS}}
    assert deploy.hook_events(fleet, ["after_migrate", "before_switch"]) == ["after_migrate", "before_switch"]
    assert deploy.hook_events(fleet, ["after_switch", "before_verify"]) == [], "nobody asked for these"
    assert deploy.hook_events(fleet, ["after_finish", "failed"]) == ["after_finish"]
    assert deploy.hooks_play(fleet, ["before_switch"]) == ["app1"] and deploy.hooks_play(fleet, ["before_verify"]) == []
    assert deploy.hooks_play(None, []) == ["all"] and deploy.hooks_play({"app1": {}}, ["failed"]) == []


def test_after_a_failure_only_the_event_of_failure_is_due() -> None:
    events = list(deploy_hooks.EVENTS)
    assert deploy_plan.hook_events(events, WITH_HOOKS, [FAILURE]) == ["failed"]
    unfinished = FAILURE | {"phase": "finish"}
    assert deploy_plan.hook_events(events, WITH_HOOKS, [unfinished]) == [], "it serves: that is no failed deploy"


def test_a_rollback_has_no_migration_and_nothing_to_do_has_no_event() -> None:
    rollback = WITH_HOOKS | {"mode": "rollback"}
    assert deploy_plan.hook_events(["after_migrate", "before_switch"], rollback, []) == ["before_switch"]
    nothing = WITH_HOOKS | {"mode": "nothing", "hosts": []}
    assert deploy_plan.hook_events(list(deploy_hooks.EVENTS), nothing, []) == []
