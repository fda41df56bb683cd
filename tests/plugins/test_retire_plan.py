"""Who may leave the fleet, what that takes, and what people are told."""

from __future__ import annotations

from typing import Any

import patch
import pytest
from ansible.module_utils import retire_plan

NOW = 1_790_000_000.0
CONTROLLER = {"holder": "ada@laptop", "process": "m b s 1 2", "deploy": "20260921-1", "began": "0"}


def host(**other: Any) -> dict[str, Any]:
    return {"transaction": {}, "edge": {"installed": False, "servers": {}, "memory": None}} | other


def edge(lease: dict[str, Any] | None = None, error: str = "", **states: str) -> dict[str, Any]:
    servers = {f"be_blue/{name}": states.get(name, "UP") for name in ("app1", "app2")}
    return host(edge={"installed": True, "servers": servers, "memory": "be_blue", "lease": lease or {}, "error": error})


FACTS = {"app1": host(), "app2": host(), "edge1": edge(), "edge2": edge()}


def decide(leaves: str, facts: dict[str, Any] | None = None, dead: bool = False, **options: Any) -> dict[str, Any]:
    wanted = {
        "host": leaves,
        "hosts": ["app1", "app2"],
        "edges": ["edge1", "edge2"],
        "databases": ["db1"],
        "keep_up": 1,
    }
    return retire_plan.plan(
        FACTS | (facts or {}), wanted | {"inventory": "INV"} | options, CONTROLLER, lambda _: dead, NOW
    )


def test_an_app_host_leaves_every_backend_of_every_edge() -> None:
    plan = decide("app2")
    assert plan["findings"] == [] and plan["edges"] == plan["locks"] == ["edge1", "edge2"]
    assert plan["servers"] == ["be_blue/app2", "be_green/app2", "be_mixed/app2-blue", "be_mixed/app2-green"]
    assert plan["app"] and not plan["edge"] and plan["reachable"]


def test_an_edge_leaves_while_another_serves() -> None:
    plan = decide("edge1")
    assert plan["findings"] == [] and plan["edges"] == ["edge2"] and plan["servers"] == [] and plan["edge"]
    assert plan["locks"] == ["edge1", "edge2"]


def test_a_dead_host_can_be_retired_and_people_are_warned() -> None:
    gone = {"unreachable": True}
    plan = decide("app2", {"app2": gone, "edge1": edge(app2="DOWN"), "edge2": edge(app2="DOWN")})
    assert plan["findings"] == [] and not plan["reachable"]
    assert patch.retire_play({"edge1": {"__retire_plan": plan}}, "host") == []
    assert any(
        "never starts again" in line for line in retire_plan.farewell(plan, {"host": "app2", "inventory": "INV"})
    )
    plan = decide("edge1", {"edge1": gone})
    assert plan["findings"] == [] and plan["locks"] == ["edge2"]


@pytest.mark.parametrize(
    ("leaves", "facts", "options", "said"),
    [
        ("", {}, {}, "Say which host leaves"),
        ("db1", {}, {}, "holds the data"),
        ("backup1", {}, {}, "neither an app host nor an edge"),
        ("edge1", {}, {"edges": ["edge1"]}, "the only edge"),
        (
            "app2",
            {"edge2": edge(app1="DOWN")},
            {},
            "Without app2, edge2 has 0 app host(s) up (none); 1 have to be left",
        ),
        ("app2", {}, {"keep_up": 2}, "edge1 has 1 app host(s) up (app1); 2 have to be left"),
        ("app2", {"edge2": {"unreachable": True}}, {}, "edge2 cannot be asked"),
        ("app2", {"edge2": edge(error="dead")}, {}, "edge2: HAProxy does not run: dead"),
        ("app2", {"app1": host(transaction={"deployment": 9})}, {}, "app1: deployment 9 did not end"),
    ],
)
def test_what_forbids_it_is_named(leaves: str, facts: dict[str, Any], options: dict[str, Any], said: str) -> None:
    findings = decide(leaves, facts, **options)["findings"]
    assert any(said in finding for finding in findings), findings


def test_a_deploy_that_runs_keeps_it_out_and_a_dead_one_does_not() -> None:
    lease = {
        "deploy": "d1",
        "holder": "bob@desk",
        "since": NOW - 60,
        "expires": NOW + 60,
        "reason": "deploy 1",
        "process": "p",
    }
    assert "held by bob@desk" in decide("app2", {"edge1": edge(lease)})["findings"][0]
    assert decide("app2", {"edge1": edge(lease)}, dead=True)["replaces"] == {"edge1": "d1"}


def test_people_are_told_what_is_left_to_do() -> None:
    lines = "\n".join(retire_plan.farewell(decide("edge1"), {"host": "edge1", "inventory": "INV"}))
    assert "out of DNS" in lines and "out of hosts.yml" in lines and "-i INV playbooks/site.yml" in lines
    assert "DNS" not in "\n".join(retire_plan.farewell(decide("app1"), {"host": "app1", "inventory": "INV"}))


def test_the_plays_have_their_hosts() -> None:
    variables = {"edge1": {"__retire_plan": decide("app2")}}
    assert patch.retire_play(variables, "host") == ["app2"]
    assert patch.retire_play(variables, "edges") == patch.retire_play(variables, "locks") == ["edge1", "edge2"]
    assert patch.retire_play(None, "host") == ["all"] and patch.retire_play({"edge1": {}}, "host") == []
