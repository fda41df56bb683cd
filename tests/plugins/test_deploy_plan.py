"""What a deploy or a rollback decides from what its hosts say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible.module_utils import deploy_plan, deploy_status

NOW = 1_000_000.0
SCHEMA = {"head": "0002", "revisions": ["0001", "0002"]}
RELEASE = {
    "id": "1.0-abc",
    "version": "1.0",
    "digest": "d" * 64,
    "path": "dist/x.tar.gz",
    "error": "",
    "schema": SCHEMA,
}
CONTROLLER = {"holder": "me@here", "process": "m b n 1 2", "deploy": "me-1", "began": "0"}
SERVICES = ("api", "core", "services", "monitoring")


def app(slot: str | None = "blue", number: int = 4, **other: Any) -> dict[str, Any]:
    """Return the facts of an app host that is well; *same* tells whether it has the wanted content already."""
    names = [f"atlas-{name}@{slot}.service" for name in SERVICES]
    same = other.pop("same", False)
    old = {"release": "0.9-old", "schema": SCHEMA}
    return {
        "provisioned": True,
        "slot": slot,
        "slots": {"blue": None, "green": None} | ({slot: number} if slot else {}),
        "running": [slot] if slot else [],
        "warm": {},
        "stale_units": [],
        "as_inventory": same if slot else None,
        "digest": "d" * 64 if same else "0" * 64,
        "settings": {},
        "deployments": {str(number): old} if slot else {},
        "good": [number] if slot else [],
        "highest": number if slot else 0,
        "transaction": {},
        "units": {name: {"state": "active", "restarts": 0, "memory": 1 << 20} for name in names} if slot else {},
        "ready": {"status": 200, "release": "0.9-old"} if slot else None,
        "journal": [],
        "rotations": [],
        "first_entry": None,
        "edge": {"installed": False, "lease": {}, "owed": {}},
        "disk": {"opt_mb": 9000, "var_mb": 9000},
        "memory": {"total_mb": 4000, "available_mb": 3000},
        "debian": {"id": "debian", "version": "12"},
        "python": "3.11",
        "postgresql": False,
        "foreign_ports": [],
        "clock": NOW,
    } | other


def edge(active: str = "be_blue", file: str | None = None, **other: Any) -> dict[str, Any]:
    """Return the facts of an edge host that is well."""
    servers = {f"be_{slot}/app{n}": "UP" for slot in ("blue", "green") for n in (1, 2, 3)}
    balancer = {
        "installed": True,
        "file": file or active,
        "memory": active,
        "servers": servers | other.pop("servers", {}),
        "lease": {},
        "owed": {},
        "switched_by_deploy": True,
    }
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
        "contract": False,
        "rollback": {},
        "quorum": 0,
        "edge_quorum": 0,
        "disk_mb": 1024,
        "memory_mb": 256,
        "skew_seconds": 5.0,
        "hooks": [],
        "freeze_windows": [],
        "freeze_override": "",
        "asked_at": NOW - 2,
        "steps": [{"percent": 25, "seconds": 3, "samples": 0}, {"percent": 100, "seconds": 3, "samples": 0}],
        "capacity_percent": 60,
        "lease_seconds": 3600,
        "longest_seconds": 300,
        "inventory": "INV",
        "credentials": {"fernet_keys": 44, "tokens": 100},
    } | other


FROZEN = {"reason": "year end", "from": "1970-01-12", "to": "1970-01-14", "time_zone": "UTC"}
THREE: dict[str, Any] = {"hosts": ["app1", "app2", "app3"]}
TWO_EDGES: dict[str, Any] = {"edges": ["edge1", "edge2"]}


def fleet(**other: Any) -> dict[str, Any]:
    """Return the facts of two app hosts and an edge."""
    return {"app1": app(), "app2": app(), "edge1": edge()} | other


def settled(**other: Any) -> dict[str, Any]:
    """Return the facts of a fleet that has what is wanted."""
    return fleet(app1=app(same=True), app2=app(same=True)) | other


def decide(facts: dict[str, Any], dead: bool = False, release: Any = None, **other: Any) -> dict[str, Any]:
    """Return the plan for *facts*; *dead* tells whether the processes of leases are gone."""
    return deploy_plan.plan(facts, release or RELEASE, options(**other), CONTROLLER, lambda process: dead, NOW)


# Mode, slots, number


def test_rolling_stays_in_the_slot_that_serves() -> None:
    plan = decide(fleet())
    assert (plan["mode"], plan["rolling"], plan["slot"], plan["old_slot"], plan["number"]) == (
        "deploy", True, "blue", "blue", 5,
    )  # fmt: skip
    assert plan["findings"] == []


def test_blue_green_takes_the_other_slot() -> None:
    plan = decide(fleet(), strategy="blue_green")
    assert (plan["rolling"], plan["slot"], plan["old_slot"], plan["old_number"]) == (False, "green", "blue", 4)


def test_a_single_host_is_never_drained_first() -> None:
    plan = decide({"app1": app(), "edge1": edge()}, hosts=["app1"])
    assert (plan["rolling"], plan["slot"]) == (False, "green")


def test_nor_is_the_only_host_that_can_be_reached() -> None:
    plan = decide(fleet(app2={"unreachable": True}), quorum=1)
    assert (plan["rolling"], plan["hosts"], plan["missing"], plan["findings"]) == (False, ["app1"], ["app2"], [])


def test_the_first_deploy_fills_the_slot_that_the_edges_name() -> None:
    plan = decide({"app1": app(slot=None), "app2": app(slot=None), "edge1": edge("be_green")})
    assert (plan["mode"], plan["rolling"], plan["slot"], plan["first"], plan["number"]) == (
        "deploy", False, "green", True, 1,
    )  # fmt: skip


def test_numbers_are_never_used_twice_in_a_fleet() -> None:
    assert decide(fleet(app2=app(highest=17)))["number"] == 18


def test_equal_content_that_serves_means_nothing_to_do() -> None:
    plan = decide(settled())
    assert plan["nothing_to_do"] and deploy_plan.play_hosts("lock", plan, [], []) == []


@pytest.mark.parametrize(
    "other",
    [
        app(same=True, ready={"status": 503}),
        app(same=True, number=3),
        app(same=True, units={"atlas-core@blue.service": {"state": "failed", "restarts": 0, "memory": 0}}),
        app(same=True, stale_units=["atlas-core@blue.service"]),
        app(slot=None),
        app("green", 4, same=True),
    ],
    ids=["not ready", "another deployment", "a service failed", "units changed", "new", "other slot"],
)
def test_a_host_without_it_gets_what_the_others_serve(other: dict[str, Any]) -> None:
    plan = decide(settled(app3=other), **THREE)
    assert (plan["mode"], plan["hosts"], plan["number"], plan["slot"], plan["rolling"]) == (
        "join", ["app3"], 4, "blue", True,
    )  # fmt: skip
    assert deploy_plan.play_hosts("migrate", plan, [], []) == []
    assert deploy_plan.play_hosts("stage", plan, [], []) == ["app3"]


def test_settings_of_one_host_that_changed_are_a_new_deployment() -> None:
    """The number that serves cannot have two contents: a failure could not return to the one before."""
    plan = decide(settled(app3=app(digest="d" * 64, same=False)), **THREE)
    assert (plan["mode"], plan["hosts"], plan["number"]) == ("deploy", ["app1", "app2", "app3"], 5)
    changed_later = app(number=3, same=False)
    assert decide(settled(app3=changed_later), **THREE)["mode"] == "join", "it has another deployment to return to"


def test_units_that_changed_everywhere_are_a_deploy() -> None:
    stale = app(same=True, stale_units=["atlas-api@blue.service"])
    assert decide(fleet(app1=stale, app2=copy.deepcopy(stale)))["mode"] == "deploy"


def test_force_deploys_what_serves() -> None:
    assert decide(settled(), force=True)["mode"] == "deploy"


def test_a_new_edge_is_brought_in_line_although_nothing_else_is_to_do() -> None:
    green = {f"app{n}": app("green", same=True) for n in (1, 2)}
    facts = green | {"edge1": edge("be_green"), "edge2": edge("be_blue", switched_by_deploy=False)}
    plan = decide(facts, **TWO_EDGES)
    assert plan["findings"] == [] and plan["mode"] == "tidy"
    assert (plan["undo"]["traffic_to"], plan["undo"]["astray"]) == ("green", ["edge2"])
    assert deploy_plan.play_hosts("cleanup_edges", plan, [], []) == ["edge1", "edge2"]
    assert deploy_plan.play_hosts("finish", plan, [], []) == []


# Findings


@pytest.mark.parametrize(
    ("facts", "wanted", "release", "said"),
    [
        (fleet(app2={"unreachable": True, "msg": "no route"}), {}, None, "app2 cannot be reached: no route. Check"),
        (fleet(app2={"msg": "boom"}), {}, None, "app2 cannot be looked at: boom"),
        (fleet(edge2={"unreachable": True}), TWO_EDGES, None, "edge2 cannot be reached"),
        (fleet(), {"databases": ["db1"]}, None, "db1 cannot be looked at: no answer"),
        (fleet(app1=app(disk={"opt_mb": 10, "var_mb": 9000})), {}, None, "app1: 10 MB free at /opt/atlas"),
        (fleet(app1=app(memory={"total_mb": 1, "available_mb": 1})), {}, None, "app1: 1 MB of memory"),
        (fleet(app1=app(debian={"id": "debian", "version": "11"})), {}, None, "app1 runs debian 11"),
        (fleet(app1=app(provisioned=False)), {}, None, "app1 has no Atlas units"),
        (fleet(app1=app(foreign_ports=[8102])), {}, None, "app1: port 8102 is taken"),
        (fleet(app1=app(clock=NOW + 9)), {}, None, "app1: its clock is 9 s ahead of this machine's"),
        (fleet(edge1=edge() | {"clock": NOW - 62}), {}, None, "edge1: its clock is 60 s behind this machine's"),
        (fleet(app4=app()), {"hosts": ["app1", "app2", "app4"]}, None, "edge1: HAProxy does not know app4 yet"),
        (fleet(edge1=app(slot=None)), {}, None, "edge1 has no HAProxy"),
        (fleet(edge1=edge(error="dead")), {}, None, "edge1: HAProxy does not run: dead"),
        (fleet(db1=app(slot=None)), {"databases": ["db1"]}, None, "db1: PostgreSQL is not installed"),
        (fleet(edge2=edge("be_green")), TWO_EDGES, None, "The edges disagree"),
        (fleet(edge1=edge("be_green", file="be_blue")), {}, None, "The edges disagree"),
        (fleet(), {}, RELEASE | {"error": "not signed"}, "not signed"),
        (fleet(), {"strategy": "all_at_once"}, None, "deploy_strategy is 'all_at_once'"),
        (fleet(), {"credentials": {"tokens": 10}}, None, "atlas_credentials lacks fernet_keys"),
        (fleet(), {"steps": [{"percent": 50}]}, None, "deploy_canary_steps names 50;"),
        (fleet(), {"steps": [{"percent": 50}, {"percent": 50}, {"percent": 100}]}, None, "deploy_canary_steps"),
        (fleet(), {"freeze_windows": [FROZEN]}, None, "Deploys are frozen until Wed 1970-01-14 00:00 UTC"),
        (fleet(), {"lease_seconds": 300}, None, "deploy_lease_seconds is 300, but a single phase may take 300 s"),
    ],
)
def test_preflight_finds(facts: dict[str, Any], wanted: dict[str, Any], release: Any, said: str) -> None:
    findings = decide(facts, release=release, **wanted)["findings"]
    assert len(findings) == 1 and findings[0].startswith(said), findings


def test_a_clock_that_was_read_while_a_slow_host_answered_is_not_off() -> None:
    """It was asked 30 s ago; any time since then is right."""
    assert decide(fleet(app1=app(clock=NOW - 29), app2=app(clock=NOW + 4)), asked_at=NOW - 30)["findings"] == []


def test_preflight_reports_all_findings_at_once() -> None:
    facts = fleet(app1=app(foreign_ports=[8101], clock=NOW + 99), app2={"unreachable": True, "msg": "gone"})
    assert len(decide(facts, release=RELEASE | {"error": "not signed"})["findings"]) == 4


# Hosts and edges that are away


def test_the_quorum_is_explicit_and_the_finding_says_how_to_go_on() -> None:
    facts = fleet(app3={"unreachable": True, "msg": "gone"})
    (finding,) = decide(facts, **THREE)["findings"]
    assert finding.endswith("To go on without: -e deploy_quorum=2.")
    assert decide(facts, quorum=3, **THREE)["findings"]
    plan = decide(facts, quorum=2, **THREE)
    assert (plan["findings"], plan["hosts"], plan["missing"]) == ([], ["app1", "app2"], ["app3"])
    assert any("left out     app3" in line for line in deploy_plan.summary(plan, options(**THREE)))


OWED = {"app3": {"deployment": 5, "deploy": "x", "since": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize("other", [app(same=False, number=3), app("green", 3)], ids=["same slot", "other slot"])
def test_an_owed_host_is_brought_up_to_date_although_the_others_have_nothing_to_do(other: dict[str, Any]) -> None:
    servers = {"be_blue/app3": "MAINT"}
    plan = decide(settled(app3=other, edge1=edge(owed=OWED, servers=servers)), **THREE)
    assert plan["findings"] == []
    assert (plan["mode"], plan["hosts"], plan["slot"], plan["number"]) == ("join", ["app3"], "blue", 4)
    assert plan["undo"]["hosts"] == []


def test_an_owed_host_has_no_say_on_the_slot_in_service() -> None:
    facts = {"app1": app("green", 5), "app3": app("blue", 4), "app2": app("blue", 4), "edge1": edge("be_green")}
    facts["edge1"]["edge"]["owed"] = OWED | {"app2": OWED["app3"]}
    assert decide(facts, **THREE)["old_slot"] == "green"


def test_an_owed_edge_is_brought_in_line_with_the_others() -> None:
    facts = {"app1": app("green"), "app2": app("green"), "edge1": edge("be_green"), "edge2": edge("be_blue")}
    facts["edge1"]["edge"]["owed"] = {"edge2": {}}
    plan = decide(facts, **TWO_EDGES)
    assert plan["findings"] == [] and plan["undo"]["astray"] == ["edge2"]


# The lock

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
    plan = decide(settled(edge1=edge(lease=lease)), dead=dead, **wanted)
    assert plan["findings"] == [] and plan["replaces"] == {"edge1": "other-1"}
    assert plan["undo"]["interrupted"] and plan["mode"] == "tidy"
    assert deploy_plan.play_hosts("cleanup_lead", plan, [], []) == ["app1"]


# What a killed deploy left


def killed(slot: str, in_service: str | None, before: int | None = 4) -> dict[str, Any]:
    """Return the record of a deploy of number 5 that was killed."""
    slots = {"blue": before, "green": None}
    return {"deploy": "x", "deployment": 5, "slot": slot, "slots": slots, "in_service": in_service}


def test_a_killed_rolling_deploy_goes_back_where_it_had_begun() -> None:
    half = app(number=5, good=[4], transaction=killed("blue", "blue"))
    plan = decide(fleet(app1=half))
    assert (plan["undo"]["hosts"], plan["undo"]["forward"], plan["undo"]["traffic_to"]) == (["app1"], [], None)
    assert plan["number"] == 6 and plan["current"] == {"app1": 4, "app2": 4}


def test_a_host_that_was_drained_but_not_changed_comes_back_too() -> None:
    plan = decide(fleet(edge1=edge(lease=LEASE, servers={"be_blue/app2": "MAINT"})), dead=True)
    assert plan["undo"]["hosts"] == ["app2"] == plan["undo"]["belong"]
    older = app(number=3, transaction=killed("blue", "blue", 3))
    assert decide(fleet(app2=older))["undo"] | {"hosts": ["app2"], "belong": []} == decide(fleet(app2=older))["undo"]


@pytest.mark.parametrize("away", ["drained", "stopped"])
def test_who_serves_is_drained_last(away: str) -> None:
    """The first host serves the new deployment, the second is out of rotation: it has to be back before the first leaves."""
    first = app(number=5, good=[4], transaction=killed("blue", "blue"))
    second, servers = app(), {"be_blue/app2": "DRAIN"}
    if away == "stopped":
        second = app(ready=None, transaction=killed("blue", "blue"))
        servers = {}
    plan = decide(fleet(app1=first, app2=second, edge1=edge(lease=LEASE, servers=servers)), dead=True)
    assert plan["undo"]["hosts"] == ["app2", "app1"]


def test_a_host_that_an_edge_keeps_out_is_brought_back_although_its_content_is_right() -> None:
    servers = {"be_blue/app2": "MAINT", "be_green/app1": "MAINT"}
    plan = decide(settled(edge1=edge(servers=servers)))
    assert plan["undo"]["hosts"] == ["app2"] and plan["mode"] == "tidy"


@pytest.mark.parametrize(
    "balancer",
    [edge("be_green"), edge("be_mixed", file="be_blue"), edge("be_green", file="be_blue")],
    ids=["switched", "in its canary", "between file and memory"],
)
def test_a_killed_switch_sends_traffic_back_and_deploys_to_the_idle_slot(balancer: dict[str, Any]) -> None:
    half = app(transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    plan = decide(fleet(app1=half, app2=copy.deepcopy(half), edge1=balancer), strategy="blue_green")
    assert plan["findings"] == [] and plan["undo"]["belong"] == ["app1", "app2"]
    assert (plan["undo"]["traffic_to"], plan["old_slot"], plan["slot"]) == ("blue", "blue", "green")
    assert deploy_plan.play_hosts("cleanup_edges", plan, [], []) == ["edge1"]


def test_what_is_wanted_may_be_what_a_killed_deploy_left_in_service() -> None:
    half = app(same=True, transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    facts = fleet(app1=half, app2=copy.deepcopy(half), edge1=edge("be_mixed", file="be_blue"))
    plan = decide(facts, strategy="blue_green")
    assert plan["mode"] == "tidy" and plan["undo"]["hosts"] == ["app1", "app2"]
    rolled = app(number=5, same=True, good=[4], transaction=killed("blue", "blue"))
    assert decide(fleet(app1=rolled, app2=copy.deepcopy(rolled)))["mode"] == "deploy"


def test_edges_that_a_killed_deploy_left_apart_are_no_finding() -> None:
    half = app(transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    facts = fleet(app1=half, app2=copy.deepcopy(half), edge1=edge("be_green"), edge2=edge("be_blue"))
    plan = decide(facts, strategy="blue_green", **TWO_EDGES)
    assert plan["findings"] == [] and plan["undo"]["astray"] == ["edge1"]


def test_after_the_point_of_no_return_the_rest_goes_forward() -> None:
    done = app("green", 5, good=[4, 5])
    half = app(transaction=killed("green", "blue"), slots={"blue": 4, "green": 5})
    plan = decide(fleet(app1=done, app2=half, edge1=edge("be_green")), strategy="blue_green")
    assert (plan["undo"]["forward"], plan["undo"]["traffic_to"]) == (["app2"], None)
    assert plan["current"] == {"app1": 5, "app2": 5} and plan["slot"] == "blue"


def test_a_deployment_that_was_moving_to_the_other_slot_goes_back_although_it_was_good_before() -> None:
    """patch.yml renews the only app host like that; whether the idle slot ever came up nobody knows."""
    move = killed("green", "blue") | {"deployment": 4}
    for running in (["blue"], ["blue", "green"]):
        half = app(same=True, transaction=move, slots={"blue": 4, "green": 4}, running=running)
        plan = decide({"app1": half, "edge1": edge()}, hosts=["app1"])
        assert (plan["undo"]["forward"], plan["undo"]["slot"], plan["undo"]["traffic_to"]) == ([], "blue", None)
    done = app("green", same=True, transaction=move, slots={"blue": 4, "green": 4})
    plan = decide({"app1": done, "edge1": edge("be_green")}, hosts=["app1"])
    assert (plan["undo"]["forward"], plan["undo"]["slot"], plan["undo"]["traffic_to"]) == (["app1"], "green", None)


def test_the_edge_that_missed_the_switch_follows_hosts_that_finished() -> None:
    done = app("green", 5, good=[4, 5])
    facts = {"app1": done, "app2": copy.deepcopy(done), "edge1": edge(lease=LEASE), "edge2": edge("be_green")}
    assert decide(facts, dead=True, **TWO_EDGES)["undo"]["traffic_to"] == "green"


# Rollback


def rollback(facts: dict[str, Any], number: int | None = None, **other: Any) -> dict[str, Any]:
    return decide(facts, release={}, rollback={"deployment": number or ""}, **other)


def history(*numbers: int, **other: Any) -> dict[str, Any]:
    """Return the facts of a host that serves the last of *numbers*, all of them good."""
    deployments = {str(n): {"release": f"0.{n}", "digest": str(n), "schema": SCHEMA} for n in numbers}
    return app(number=numbers[-1], good=list(numbers), deployments=deployments, **other)


def test_a_rollback_goes_to_the_last_good_deployment_and_marks_what_it_leaves() -> None:
    plan = rollback(fleet(app1=history(3, 4, 5), app2=history(3, 4, 5)))
    assert plan["findings"] == []
    assert (plan["mode"], plan["number"], plan["rolled_back"], plan["rolling"]) == ("rollback", 4, 5, True)
    assert plan["release"]["id"] == "0.4"
    assert deploy_plan.play_hosts("stage", plan, [], []) == [] == deploy_plan.play_hosts("migrate", plan, [], [])


def test_a_deployment_that_was_not_good_everywhere_is_passed_over() -> None:
    bad = history(3, 4, 5) | {"good": [3, 5]}
    assert rollback(fleet(app1=history(3, 4, 5), app2=bad))["number"] == 3


def test_a_warm_slot_is_one_switch_away_whatever_the_strategy() -> None:
    warm = history(3, 4, slots={"blue": 4, "green": 3}, running=["blue", "green"])
    plan = rollback(fleet(app1=warm, app2=copy.deepcopy(warm)))
    assert (plan["warm"], plan["rolling"], plan["slot"], plan["number"]) == (True, False, "green", 3)
    assert deploy_plan.play_hosts("switch_traffic", plan, [], []) == [], (
        "nothing stands between the lock and the switch"
    )
    assert deploy_plan.play_hosts("switch_pointer", plan, [], []) == ["edge1"]
    cold = rollback(fleet(app1=warm, app2=copy.deepcopy(warm) | {"running": ["blue"]}), strategy="blue_green")
    assert (cold["warm"], cold["rolling"], cold["slot"]) == (False, False, "green")
    assert deploy_plan.play_hosts("switch_traffic", cold, [], []) == ["edge1", "app1", "app2"]
    short = rollback(fleet(app1=warm, app2=app()), 3, quorum=1)
    assert (short["warm"], deploy_plan.play_hosts("switch_traffic", short, [], [])) == (True, ["edge1", "app1"])


@pytest.mark.parametrize(
    ("facts", "number", "said"),
    [
        (fleet(), None, "There is no earlier deployment that was good"),
        (fleet(app1=history(3, 4), app2=history(3, 4)), 9, "Deployment 9 is not on the hosts any more; retained"),
        (fleet(app1=history(3, 4), app2=history(3, 4)), 4, "Deployment 4 is in service already"),
        (fleet(app1=history(3, 4), app2=app()), 3, "app2 does not have deployment 3. To go on without"),
    ],
)
def test_a_rollback_that_cannot_be_says_why(facts: dict[str, Any], number: int | None, said: str) -> None:
    (finding,) = rollback(facts, number)["findings"]
    assert finding.startswith(said)


def test_a_host_that_lacks_the_deployment_is_left_out_under_a_quorum() -> None:
    plan = rollback(fleet(app1=history(3, 4), app2=app()), 3, quorum=1)
    assert (plan["findings"], plan["hosts"], plan["missing"]) == ([], ["app1"], ["app2"])


def test_a_rollback_shows_what_it_changes_without_secrets() -> None:
    host = history(3, 4, settings={"3": "a: 1\nb: 2\n", "4": "a: 1\nb: 3\n"})
    facts = fleet(app1=host, app2=copy.deepcopy(host))
    assert deploy_plan.changes(facts, rollback(facts)) == [
        "app1, app2:",
        "  release      0.4 -> 0.3",
        "  settings     - b: 3",
        "  settings     + b: 2",
        "  credentials  those of deployment 3",
    ]


def test_revoked_credentials_are_replaced_by_the_current_ones_and_it_is_said() -> None:
    host = history(3, 4, slots={"blue": 4, "green": 3}, running=["blue", "green"])
    host["deployments"]["3"]["revoked"] = True
    facts = fleet(app1=host, app2=copy.deepcopy(host))
    plan = rollback(facts)
    assert plan["warm"] is False, "what runs has the revoked ones in memory"
    assert deploy_plan.play_hosts("renew", plan, [], []) == ["app1", "app2"]
    assert "  credentials  the current ones: those of deployment 3 were revoked" in deploy_plan.changes(facts, plan)


# Schema

NEWER = {"head": "0003", "revisions": ["0001", "0002", "0003"]}
APPLIED = {"0001": "expand", "0002": "expand", "0003": "contract"}


def test_the_database_is_asked_only_where_its_answer_matters() -> None:
    assert deploy_plan.asks_schema(fleet(), RELEASE, options()) == {}
    newer = app(deployments={"4": {"release": "2.0", "schema": NEWER}})
    asked = {"host": "app1", "slot": "blue", "number": 4}
    assert deploy_plan.asks_schema(fleet(app2=newer), RELEASE, options()) == asked
    assert deploy_plan.asks_schema(fleet(), RELEASE, options(contract=True)) == asked
    assert deploy_plan.asks_schema(fleet(), RELEASE | {"schema": NEWER}, options()) == asked, "it will be migrated"


@pytest.mark.parametrize("known", [{"applied": {"0001": "expand", "0002": "expand"}}, {"schema_current": "0002"}])
def test_a_release_of_another_history_is_refused_before_anything_is_touched(known: dict[str, Any]) -> None:
    foreign = RELEASE | {"schema": {"head": "8001", "revisions": ["0001", "8001"]}}
    (finding,) = decide(fleet(), release=foreign, **known)["findings"]
    assert finding.startswith("Release 1.0-abc does not fit the schema of the database, which is at 0002")
    assert "0002, which the release does not know" in finding and "8001" in finding
    older = RELEASE | {"schema": {"head": "0001", "revisions": ["0001"]}}
    assert decide(fleet(), release=older, applied={"0001": "expand", "0002": "expand"})["findings"] == []
    assert decide(fleet(), release=RELEASE | {"schema": NEWER}, **known)["findings"] == []


def test_a_release_older_than_what_the_database_needs_is_refused() -> None:
    (finding,) = decide(fleet(), applied=APPLIED)["findings"]
    assert finding.startswith(
        "Release 1.0-abc cannot serve on the database: it does not know the contract revision 0003"
    )
    assert decide(fleet(), applied=APPLIED | {"0003": "expand"})["findings"] == []


def test_a_schema_that_has_to_be_known_and_is_not_forbids_the_deploy() -> None:
    (finding,) = decide(fleet(), schema_error="no connection")["findings"]
    assert "cannot be asked for its schema" in finding and finding.endswith("no connection")


def test_so_is_a_rollback_to_one() -> None:
    facts = fleet(app1=history(3, 4), app2=history(3, 4))
    assert "0003" in rollback(facts, applied=APPLIED)["findings"][0]


def test_contract_is_refused_while_a_retained_deployment_needs_the_old_schema() -> None:
    applied = {"0001": "expand", "0002": "expand"}
    newer = RELEASE | {"schema": NEWER}
    (finding,) = decide(fleet(), release=newer, contract=True, applied=applied)["findings"]
    assert "deployment 4 (release 0.9-old, on app1, app2)" in finding and "0003" in finding
    ready = app(same=True, deployments={"4": {"release": "1.0-abc", "schema": NEWER}})
    plan = decide(fleet(app1=ready, app2=copy.deepcopy(ready)), release=newer, contract=True, applied=applied)
    assert (plan["findings"], plan["mode"], plan["contract"]) == ([], "deploy", True)
    done = decide(fleet(app1=ready, app2=copy.deepcopy(ready)), release=newer, contract=True, applied=APPLIED)
    assert done["nothing_to_do"]


def test_a_restore_point_comes_before_a_migration_and_only_there() -> None:
    schema = {"head": "0002", "revisions": ["0001", "0002"]}
    known = app(deployments={"4": {"release": "0.9-old", "schema": schema}})
    facts = fleet(app1=known, app2=copy.deepcopy(known))
    assert decide(facts, release=RELEASE | {"schema": NEWER})["migrates"] is True
    assert decide(facts, release=RELEASE | {"schema": schema})["migrates"] is False
    first = fleet(app1=app(slot=None), app2=app(slot=None), edge1=edge())
    assert decide(first, release=RELEASE | {"schema": NEWER})["migrates"] is False


# Who takes part


def failure(phase: str, host: str = "app1") -> dict[str, Any]:
    return {"host": host, "phase": phase, "message": "", "log": []}


@pytest.mark.parametrize(
    ("phase", "undo_edges", "undo_hosts", "undo_lead"),
    [
        ("lock", [], [], []),
        ("stage", [], [], []),
        ("migrate", [], [], ["app2"]),
        ("switch", ["edge1"], ["app2", "app1"], ["app2"]),
        ("verify", ["edge1"], ["app2", "app1"], ["app2"]),
        ("finish", [], [], []),
    ],
)
def test_what_a_failure_undoes(phase: str, undo_edges: list[str], undo_hosts: list[str], undo_lead: list[str]) -> None:
    plan = decide(fleet(), strategy="blue_green")
    touched = ["app1", "app2"] if phase in ("switch", "verify", "finish") else []

    def hosts(name: str) -> list[str]:
        return deploy_plan.play_hosts(name, plan, [failure(phase)], touched)

    assert (hosts("undo_edges"), hosts("undo_hosts"), hosts("undo_lead")) == (undo_edges, undo_hosts, undo_lead)
    assert hosts("switch_traffic") == hosts("switch_pointer") == hosts("finish") == hosts("stage") == []
    assert hosts("unlock") == ["edge1"] and hosts("result") == ["app1"]


def test_the_order_of_a_rolling_deploy() -> None:
    plan = decide(fleet())

    def hosts(name: str) -> list[str]:
        return deploy_plan.play_hosts(name, plan, [], [])

    assert (hosts("switch_first"), hosts("switch_watch"), hosts("switch_rolling")) == (
        ["app1"], ["edge1", "app1"], ["app2"],
    )  # fmt: skip
    assert hosts("switch_start") == hosts("switch_traffic") == hosts("switch_pointer") == []
    assert hosts("verify") == ["edge1", "app1", "app2"]


@pytest.mark.parametrize(("count", "percent", "at_once"), [(2, 60, 1), (3, 60, 1), (6, 60, 2), (6, 100, 1), (9, 50, 4)])
def test_capacity_never_falls_below_its_minimum(count: int, percent: int, at_once: int) -> None:
    assert deploy_plan.batch(count, options(capacity_percent=percent)) == at_once


def test_a_host_that_is_away_counts_against_the_capacity() -> None:
    ten: dict[str, Any] = {"hosts": [f"app{n}" for n in range(1, 11)]}
    servers = {f"be_{slot}/app{n}": "UP" for slot in ("blue", "green") for n in range(1, 11)}
    up = {f"app{n}": app() for n in range(1, 8)} | {"edge1": edge(servers=servers)}
    away = {f"app{n}": {"unreachable": True} for n in range(8, 11)}
    assert decide(up | {f"app{n}": app() for n in range(8, 11)}, **ten)["batch"] == 4
    assert decide(up | away, quorum=7, **ten)["batch"] == 1, "three of the four that may be out are out already"


def test_who_does_not_serve_is_brought_back_before_the_only_one_that_serves_is_drained() -> None:
    down: dict[str, Any] = {
        "ready": None,
        "units": {"atlas-api@blue.service": {"state": "failed", "restarts": 9, "memory": 0}},
    }
    plan = decide(fleet(app2=app(**down)))
    assert plan["rolling"] and plan["hosts"] == ["app2", "app1"]
    back = rollback(fleet(app1=history(3, 4), app2=history(3, 4, **down)))
    assert back["rolling"] and back["hosts"] == ["app2", "app1"]
    assert decide(fleet())["hosts"] == ["app1", "app2"]


# Status


def status(facts: dict[str, Any], hosts: tuple[str, ...] = ("app1", "app2")) -> dict[str, Any]:
    return deploy_status.status(facts, hosts, ["edge1"])


def test_status_names_what_is_not_as_it_should_be() -> None:
    facts = settled(
        app1=app(number=5, same=False, stale_units=["atlas-api@blue.service"]),
        app2=app(number=5, same=True),
        app3=app(number=3, ready={"status": 200, "release": "0.8"}, same=True),
        edge1=edge("be_blue", file="be_green", servers={"be_blue/app2": "MAINT", "be_blue/app3": "MAINT"}, owed=OWED),
    )
    state = status(facts, ("app1", "app2", "app3"))
    assert state["app"]["app1"]["drift"] == [
        "settings or credentials differ from the inventory",
        "units changed since they were started",
    ]
    assert state["app"]["app2"]["drift"] == []
    assert state["app"]["app3"]["drift"] == ["answers as release 0.8", "others have deployment 5"]
    assert state["app"]["app3"]["owed"]["deployment"] == 5
    assert state["edge"]["edge1"]["drift"] == ["slot.map says be_green", "app2 gets no traffic"]
    assert "owed deployment 5" in deploy_status.table(state)


def test_status_shows_maintenance_and_a_certificate_that_ends() -> None:
    state = status(settled(edge1=edge(maintenance="The database moves", certificate_days=13)))
    assert state["edge"]["edge1"]["drift"] == ["in maintenance: The database moves", "the certificate ends in 13 days"]
    assert "13 days left" in deploy_status.table(state)
    assert status(settled(edge1=edge(certificate_days=14)))["edge"]["edge1"]["drift"] == []


def test_status_of_a_fleet_that_is_well_has_no_drift() -> None:
    warm = app(
        same=True,
        slots={"blue": 4, "green": 3},
        warm={"green": 1_000},
        deployments={"3": {}, "4": {"release": "0.9-old"}},
    )
    lines = deploy_status.table(status(settled(app1=warm))).splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["none", "none"]
    assert "3 until 00:16:40 UTC" in lines[1] and " 3? 4 " in lines[1]


def test_status_names_a_release_that_is_not_the_pinned_one() -> None:
    facts = settled(app1=app(number=5, same=True), app2=app(number=5, same=True))
    for digest, drift in (("d" * 64, []), ("e" * 64, ["the inventory pins 1.1-eeeeeeeeeeee"])):
        state = deploy_status.status(facts, ["app1", "app2"], ["edge1"], {"version": "1.1", "digest": digest})
        assert [line for line in state["app"]["app1"]["drift"] if "pins" in line] == drift


def test_a_vault_file_from_before_a_rotation_deploys_nothing() -> None:
    """It would bring back what was retired, and leave unreadable what is under the new key."""
    entry = {"event": "rotation", "kind": "fernet", "by": "alex@desk", "at": "1970-01-12T00:00:00Z"}
    rotations = [
        {**entry, "step": "finished", "new": "newest", "order": 2},
        {**entry, "step": "begun", "new": "not yet anywhere", "order": 3},
    ]
    facts = settled(app1=app(rotations=rotations), app2=app(rotations=rotations[:1]))

    def refused(**other: Any) -> list[str]:
        return [text for text in decide(facts, **other)["findings"] if "vault file" in text]

    (told,) = refused(known_keys=["retired"])
    assert "lacks the key newest, which alex@desk brought in" in told and "git" in told
    assert refused(known_keys=["newest"]) == refused(known_keys=["newer", "newest"]) == refused() == []
    assert len(refused(known_keys=["retired"], rollback={"deployment": ""})) == 1

    rotations.append({**entry, "kind": "tokens", "step": "finished", "order": 4, "serial": 2})
    facts = settled(app1=app(rotations=rotations), app2={"unreachable": True})
    (told,) = refused(known_keys=["newest"], vault_serial=1)
    assert "tokens (finished 1970-01-12T00:00:00Z by alex@desk)" in told and "git pull" in told
    assert len(refused(known_keys=["retired"])) == 1, "a vault file without a serial"
    assert refused(known_keys=["newest"], vault_serial=2) == []

    rotations.append({**entry, "step": "added", "new": "coming", "order": 5, "serial": 2})
    (told,) = refused(known_keys=["newest"], vault_serial=2)
    assert "lacks the key coming" in told, "of two who rotated from the same file, each has a file with this serial"
    rotations.pop()

    rotations.append({"event": "finished", "deployment": 8, "at": "1970-01-12T00:01:00Z", "serial": 3})
    (told,) = refused(known_keys=["newest"], vault_serial=2)
    assert "deployment 8 (1970-01-12T00:01:00Z)" in told, "of a rotation that was killed before it noted that"
    for mode in ({}, {"rollback": {"deployment": ""}}):
        assert refused(known_keys=["newest"], vault_serial=3, **mode) == []


def test_status_names_what_is_half_rotated_or_overdue() -> None:
    begun = {"event": "rotation", "kind": "fernet", "step": "added", "at": "1970-01-12T00:00:00Z", "order": 1}
    facts = {"app1": app(rotations=[begun], first_entry="1970-01-01T00:00:00Z"), "app2": {"unreachable": True}}
    told = deploy_status.rotations(facts, {"tokens": 5, "fernet": 50}, NOW)
    assert len(told) == 2 and told[0].startswith("fernet   half rotated since 1970-01-12") and "tokens" in told[1]
    state = status(settled()) | {"secrets": told}
    assert told[0] in deploy_status.table(state)
    assert deploy_status.rotations({"app1": app()}, {"tokens": 5}, NOW) == []


def test_what_the_release_says_of_the_settings_stops_a_deploy() -> None:
    wrong = "main.yml:4: queue_limit: is not a number (app1)"
    assert wrong in decide(fleet(), release=RELEASE | {"settings": [wrong]})["findings"]
    told = decide(fleet(), release=RELEASE | {"settings": [], "unchecked": "Python 3.12"})
    assert told["findings"] == []
    assert any("hosts alone: Python 3.12" in line for line in deploy_plan.summary(told, options()))


def test_status_shows_hosts_that_cannot_be_reached() -> None:
    state = status({"app1": {"unreachable": True, "msg": "gone"}}, ("app1",))
    assert "not reachable" in deploy_status.table(state)


def test_a_freeze_is_overridden_with_a_reason_that_is_kept() -> None:
    assert (
        decide(fleet(), freeze_windows=[FROZEN], freeze_override="the site is down")["override"] == "the site is down"
    )
    assert decide(fleet(), freeze_override="out of habit")["override"] == "", "nothing was overridden"


def test_a_freeze_keeps_nobody_from_what_is_not_new() -> None:
    nothing = decide(settled(), freeze_windows=[FROZEN])
    assert nothing["nothing_to_do"] and nothing["findings"] == []
    back = decide(fleet(), release={}, rollback={"deployment": ""}, freeze_windows=[FROZEN])
    assert back["mode"] == "rollback" and not any("frozen" in finding for finding in back["findings"])


def test_the_holder_of_a_lock_is_named_with_what_is_known_of_its_process() -> None:
    lease = {"holder": "ada@laptop", "since": NOW - 60, "expires": NOW + 60, "reason": "deploy 1", "process": "p"}
    facts = {"edge1": edge(lease=lease), "edge2": edge(), "edge3": {"unreachable": True}}
    lines = deploy_status.locks(facts, lambda process: "alive" if process == "p" else "dead", NOW)
    assert "edge1        held by ada@laptop since 1970-01-12 13:45:40 UTC for: deploy 1" in lines
    assert "expires at 1970-01-12 13:47:40 UTC; its process RUNS" in lines[1]
    assert lines[2:] == ["edge2        free", "edge3        cannot be reached"]
    assert "expired" in deploy_status.locks({"edge1": edge(lease=lease)}, lambda _: "dead", NOW + 60)[1]
