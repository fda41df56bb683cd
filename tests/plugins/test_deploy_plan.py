"""What a deploy decides from what its hosts say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible.module_utils import deploy_plan

NOW = 1_000_000.0
RELEASE = {"id": "1.0-abc", "version": "1.0", "digest": "d" * 64, "path": "dist/x.tar.gz", "error": ""}
CONTROLLER = {"holder": "me@here", "process": "m b n 1 2", "deploy": "me-1"}


def app(slot: str | None = "blue", number: int = 4, **other: Any) -> dict[str, Any]:
    """Return the facts of an app host that is well."""
    names = [f"atlas-{name}@{slot}.service" for name in ("api", "core", "services", "monitoring")]
    return {
        "provisioned": True,
        "slot": slot,
        "slots": {"blue": None, "green": None} | ({slot: number} if slot else {}),
        "deployments": {str(number): {"release": "0.9-old"}} if slot else {},
        "good": [number] if slot else [],
        "highest": number if slot else 0,
        "transaction": {},
        "units": {name: {"state": "active", "restarts": 0, "memory": 1 << 20} for name in names} if slot else {},
        "ready": {"status": 200, "release": "0.9-old"} if slot else None,
        "journal": [],
        "edge": {"installed": False, "lease": {}},
        "disk": {"opt_mb": 9000, "var_mb": 9000},
        "memory": {"total_mb": 4000, "available_mb": 3000},
        "debian": {"id": "debian", "version": "12"},
        "python": "3.11",
        "postgresql": False,
        "foreign_ports": [],
    } | other


def edge(
    active: str = "be_blue", lease: dict[str, Any] | None = None, servers: dict[str, str] | None = None, **other: Any
) -> dict[str, Any]:
    """Return the facts of an edge host that is well."""
    balancer = {"installed": True, "file": active, "memory": active, "servers": servers or {}, "lease": lease or {}}
    return app(slot=None) | {"provisioned": False, "edge": balancer | other}


def options(**other: Any) -> dict[str, Any]:
    """Return the options of a deploy to two app hosts behind one edge."""
    return {
        "hosts": ["app1", "app2"],
        "edges": ["edge1"],
        "databases": [],
        "strategy": "rolling",
        "force": False,
        "unlock": False,
        "disk_mb": 1024,
        "memory_mb": 256,
        "inventory": "INV",
        "credentials": {"fernet_keys": 44, "tokens": 100},
    } | other


def fleet(**other: Any) -> dict[str, Any]:
    """Return the facts of two app hosts and an edge."""
    return {"app1": app(), "app2": app(), "edge1": edge()} | other


def decide(
    facts: dict[str, Any],
    wanted: dict[str, Any] | None = None,
    same: bool = False,
    dead: bool = False,
    release: Any = None,
) -> dict[str, Any]:
    """Return the plan for *facts*; *same* tells whether the hosts have the wanted content already."""
    compared = {host: {"unchanged": same} for host in ("app1", "app2")}
    return deploy_plan.plan(
        facts, compared, release or RELEASE, wanted or options(), CONTROLLER, lambda process: dead, NOW
    )


def test_rolling_stays_in_the_slot_that_serves() -> None:
    plan = decide(fleet())
    assert (plan["rolling"], plan["slot"], plan["old_slot"], plan["number"]) == (True, "blue", "blue", 5)
    assert plan["findings"] == [] and not plan["nothing_to_do"]


def test_blue_green_takes_the_other_slot() -> None:
    plan = decide(fleet(), options(strategy="blue_green"))
    assert (plan["rolling"], plan["slot"], plan["old_slot"], plan["old_numbers"]) == (False, "green", "blue", [4])


def test_a_single_host_is_never_drained_first() -> None:
    facts = {"app1": app(), "edge1": edge()}
    compared = {"app1": {"unchanged": False}}
    plan = deploy_plan.plan(facts, compared, RELEASE, options(hosts=["app1"]), CONTROLLER, lambda process: False, NOW)
    assert (plan["rolling"], plan["slot"]) == (False, "green")


def test_the_first_deploy_fills_the_slot_that_the_edges_name() -> None:
    plan = decide({"app1": app(slot=None), "app2": app(slot=None), "edge1": edge()})
    assert (plan["rolling"], plan["slot"], plan["first"], plan["number"]) == (False, "blue", True, 1)


def test_numbers_are_never_used_twice_in_a_fleet() -> None:
    assert decide(fleet(app2=app(highest=17)))["number"] == 18


def test_equal_content_that_serves_means_nothing_to_do() -> None:
    assert decide(fleet(), same=True)["nothing_to_do"]


@pytest.mark.parametrize(
    "facts",
    [
        fleet(app2=app(ready={"status": 503})),
        fleet(app2=app(number=3)),
        fleet(app2=app(units={"atlas-core@blue.service": {"state": "failed", "restarts": 0, "memory": 0}})),
        fleet(edge1=edge("be_green")),
    ],
    ids=["not ready", "another deployment", "a service failed", "edges send traffic elsewhere"],
)
def test_equal_content_that_does_not_serve_is_deployed(facts: dict[str, Any]) -> None:
    assert not decide(facts, same=True)["nothing_to_do"]


def test_force_deploys_what_serves() -> None:
    assert not decide(fleet(), options(force=True), same=True)["nothing_to_do"]


@pytest.mark.parametrize(
    ("facts", "wanted", "release", "said"),
    [
        (fleet(app2={"unreachable": True, "msg": "no route"}), {}, None, "app2 cannot be reached: no route. Check"),
        (fleet(app2={"msg": "boom"}), {}, None, "app2 cannot be looked at: boom"),
        (fleet(app1=app(disk={"opt_mb": 10, "var_mb": 9000})), {}, None, "app1: 10 MB free at /opt/atlas"),
        (fleet(app1=app(memory={"total_mb": 1, "available_mb": 1})), {}, None, "app1: 1 MB of memory"),
        (fleet(app1=app(debian={"id": "debian", "version": "11"})), {}, None, "app1 runs debian 11"),
        (fleet(app1=app(provisioned=False)), {}, None, "app1 has no Atlas units"),
        (fleet(app1=app(foreign_ports=[8102])), {}, None, "app1: port 8102 is taken"),
        (fleet(edge1=app(slot=None)), {}, None, "edge1 has no HAProxy"),
        (fleet(db1=app(slot=None)), {"databases": ["db1"]}, None, "db1: PostgreSQL is not installed"),
        (fleet(edge2=edge("be_green")), {"edges": ["edge1", "edge2"]}, None, "The edges disagree"),
        (fleet(), {}, RELEASE | {"error": "not signed"}, "not signed"),
        (fleet(), {"strategy": "all_at_once"}, None, "deploy_strategy is 'all_at_once'"),
        (fleet(), {"credentials": {"tokens": 10}}, None, "atlas_credentials lacks fernet_keys"),
    ],
)
def test_preflight_finds(facts: dict[str, Any], wanted: dict[str, Any], release: Any, said: str) -> None:
    findings = decide(facts, options(**wanted), release=release)["findings"]
    assert len(findings) == 1 and findings[0].startswith(said), findings


def test_preflight_reports_all_findings_at_once() -> None:
    facts = fleet(app1=app(foreign_ports=[8101]), app2={"unreachable": True, "msg": "gone"})
    assert len(decide(facts, release=RELEASE | {"error": "not signed"})["findings"]) == 3


LEASE = {
    "deploy": "other-1",
    "holder": "ada@laptop",
    "reason": "deploy 0.9",
    "process": "p",
    "since": NOW - 60,
    "expires": NOW + 600,
}


def test_a_held_lock_is_a_finding_that_names_its_holder() -> None:
    (finding,) = decide(fleet(edge1=edge(lease=LEASE)))["findings"]
    assert "held by ada@laptop since 1970-01-12 13:45:40 UTC" in finding and "deploy_unlock=true" in finding


@pytest.mark.parametrize(
    ("lease", "wanted", "dead"),
    [(LEASE, {}, True), (LEASE, {"unlock": True}, False), (LEASE | {"expires": NOW - 1}, {}, False)],
    ids=["its process is gone", "a person unlocks", "expired"],
)
def test_a_dead_lock_is_taken_over_and_its_deploy_cleaned_up(
    lease: dict[str, Any], wanted: dict[str, Any], dead: bool
) -> None:
    plan = decide(fleet(edge1=edge(lease=lease)), options(**wanted), same=True, dead=dead)
    assert plan["findings"] == [] and plan["replaces"] == {"edge1": "other-1"}
    assert plan["undo"]["needed"] and not plan["nothing_to_do"]


def killed(slot: str, in_service: str | None, before: int | None = 4) -> dict[str, Any]:
    """Return the record of a deploy of number 5 that was killed."""
    slots = {"blue": before, "green": None}
    return {"deploy": "x", "deployment": 5, "slot": slot, "slots": slots, "in_service": in_service}


def test_a_killed_rolling_deploy_goes_back_where_it_had_begun() -> None:
    half = app(number=5, good=[4], transaction=killed("blue", "blue"))
    plan = decide(fleet(app1=half))
    assert (plan["undo"]["hosts"], plan["undo"]["back"], plan["undo"]["switch_to"]) == (["app1"], ["app1"], None)
    assert plan["number"] == 6 and plan["current"] == {"app1": 4, "app2": 4}


def test_a_host_that_was_drained_but_not_changed_comes_back_too() -> None:
    servers = {"be_blue/app1": "UP", "be_blue/app2": "MAINT", "be_green/app1": "DOWN"}
    plan = decide(fleet(edge1=edge(lease=LEASE, servers=servers)), dead=True)
    assert plan["undo"]["hosts"] == ["app2"]


def test_a_host_that_an_edge_keeps_out_is_brought_back_although_its_content_is_right() -> None:
    servers = {"be_blue/app1": "UP", "be_blue/app2": "MAINT", "be_green/app1": "MAINT"}
    plan = decide(fleet(edge1=edge(servers=servers)), same=True)
    assert plan["undo"]["hosts"] == ["app2"] and not plan["nothing_to_do"]
    state = deploy_plan.status(fleet(edge1=edge(servers=servers)), {}, ["app1", "app2"], ["edge1"])
    assert state["edge"]["edge1"]["drift"] == ["app2 gets no traffic"]


def test_a_killed_switch_sends_traffic_back_and_deploys_to_the_idle_slot() -> None:
    half = app(transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    plan = decide(fleet(app1=half, app2=copy.deepcopy(half), edge1=edge("be_green")), options(strategy="blue_green"))
    assert plan["findings"] == []
    assert (plan["undo"]["switch_to"], plan["old_slot"], plan["slot"]) == ("blue", "blue", "green")


def test_after_the_point_of_no_return_the_rest_goes_forward() -> None:
    done = app("green", 5, good=[4, 5])
    half = app(transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    undo = decide(fleet(app1=done, app2=half, edge1=edge("be_green")))["undo"]
    assert (undo["forward"], undo["back"], undo["switch_to"]) == (["app2"], [], None)


def test_status_names_what_is_not_as_it_should_be() -> None:
    facts = fleet(
        app2=app(number=3, ready={"status": 200, "release": "0.8"}, deployments={"3": {"release": "0.9-old"}})
    )
    state = deploy_plan.status(
        facts, {"app1": {"unchanged": False}, "app2": {"unchanged": True}}, ["app1", "app2"], ["edge1"]
    )
    assert "settings or credentials differ from the inventory" in state["app"]["app1"]["drift"]
    assert "answers as release 0.8" in state["app"]["app2"]["drift"]
    assert all("hosts have different deployments" in row["drift"] for row in state["app"].values())


def test_status_shows_maintenance_and_a_certificate_that_ends() -> None:
    facts = fleet(edge1=edge(maintenance="The database moves", certificate_days=13))
    state = deploy_plan.status(facts, {}, ["app1", "app2"], ["edge1"])
    assert state["edge"]["edge1"]["drift"] == ["in maintenance: The database moves", "the certificate ends in 13 days"]
    assert "13 days left" in deploy_plan.table(state)
    well = deploy_plan.status(fleet(edge1=edge(certificate_days=14)), {}, ["app1", "app2"], ["edge1"])
    assert well["edge"]["edge1"]["drift"] == []


def test_status_of_a_fleet_that_is_well_has_no_drift() -> None:
    state = deploy_plan.status(fleet(), {}, ["app1", "app2"], ["edge1"])
    lines = deploy_plan.table(state).splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["none", "none"] and "blue" in lines[1]


def test_status_shows_hosts_that_cannot_be_reached() -> None:
    state = deploy_plan.status({"app1": {"unreachable": True, "msg": "gone"}}, {}, ["app1"], ["edge1"])
    assert "not reachable" in deploy_plan.table(state)
