"""What a patch run decides: who is drained, who boots, what is left, and what keeps it from beginning."""

from __future__ import annotations

from typing import Any

import patch
import pytest
from ansible.module_utils import patch_plan

NOW = 1_790_000_000.0
ALL = ["edge1", "edge2", "app1", "app2", "app3", "db1", "backup1"]
CONTROLLER = {"holder": "ada@laptop", "process": "m b s 1 2", "deploy": "20260921-1", "began": "0"}


def package(name: str, security: bool = True) -> dict[str, Any]:
    return {"name": name, "from": "1", "to": "2", "security": security}


def looked(*names: str, **other: Any) -> dict[str, Any]:
    return {"packages": [package(name) for name in names], "boot": [], "stale": []} | other


def app(**other: Any) -> dict[str, Any]:
    units = {f"atlas-{name}@blue.service": {"state": "active"} for name in ("api", "core")}
    return {"slot": "blue", "units": units, "transaction": {}, "edge": {"installed": False}} | other


def edge(lease: dict[str, Any] | None = None, **servers: str) -> dict[str, Any]:
    states = {f"be_blue/{name}": "UP" for name in ("app1", "app2", "app3")}
    states |= {f"be_blue/{name}": state for name, state in servers.items()}
    return {"slot": None, "transaction": {}, "edge": {"memory": "be_blue", "servers": states, "lease": lease or {}}}


FACTS = {"edge1": edge(), "edge2": edge(), "app1": app(), "app2": app(), "app3": app(), "db1": {}, "backup1": {}}


def decide(
    found: dict[str, Any] | None = None, facts: dict[str, Any] | None = None, dead: bool = False, **options: Any
) -> dict[str, Any]:
    everyone = options.get("everyone", ALL)
    wanted = {
        "everyone": everyone,
        "hosts": [name for name in everyone if name.startswith("app")],
        "edges": [name for name in everyone if name.startswith("edge")],
        "databases": [name for name in everyone if name.startswith("db")],
        "only": [],
        "downtime": [],
        "which": "security",
        "reboot": "auto",
        "inventory": "INV",
    }
    whole = {name: looked() for name in everyone} | (found or {})
    return patch_plan.plan(whole, FACTS | (facts or {}), wanted | options, CONTROLLER, lambda _: dead, NOW)


def test_nothing_to_patch_touches_nobody() -> None:
    plan = decide()
    assert plan["findings"] == [] and plan["order"] == []
    assert patch_plan.result(plan, {}) == ["Nothing to patch: no host was touched."]


def test_hosts_follow_each_other_from_who_serves_nobody_to_the_edges() -> None:
    plan = decide({name: looked("openssl") for name in ALL})
    assert plan["order"] == ["backup1", "db1", "app1", "app2", "app3", "edge1", "edge2"]
    assert [host for host in plan["order"] if plan["steps"][host]["drain"]] == ["app1", "app2", "app3"]
    assert decide({name: looked("openssl") for name in ALL}, only=["app2"])["order"] == ["app2"]


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 2), (4, 2), (6, 3)])
def test_half_of_the_app_hosts_serve_while_one_is_patched(count: int, expected: int) -> None:
    assert patch_plan.keep_up(count) == expected


def test_the_page_of_somebody_else_stays_as_it_is_and_that_of_a_killed_run_goes() -> None:
    found, told = (
        {"db1": looked("postgresql-15")},
        {"edge2": edge() | {"edge": {**edge()["edge"], "maintenance": "we move"}}},
    )
    plan = decide(found, downtime=["db1"])
    assert plan["steps"]["db1"]["pages"] == ["edge1", "edge2"] and plan["left_pages"] == []
    assert decide(found, told, downtime=["db1"])["steps"]["db1"]["pages"] == ["edge1"]
    assert decide(found)["steps"]["db1"]["pages"] == [], "no downtime is accepted"
    told["edge2"]["edge"]["maintenance"] = plan["page"]
    left = decide(facts=told)
    assert left["order"] == [] and left["left_pages"] == ["edge2"]
    assert decide(found, told, downtime=["db1"])["steps"]["db1"]["pages"] == ["edge1", "edge2"]


def test_the_database_is_restarted_only_where_its_downtime_is_accepted() -> None:
    found = {
        "db1": looked("postgresql-15", "openssl", stale=["postgresql@15-main.service"], boot=["asked for by libc6"])
    }
    plan = decide(found)
    step = plan["steps"]["db1"]
    assert [each["name"] for each in step["packages"]] == ["openssl"] and step["keep"] == ["postgresql"]
    assert not step["may_boot"] and not step["boot"] and not step["downtime"]
    assert len(step["left"]) == 3 and all("-e patch_downtime=db1" in text for text in step["left"])
    for accepted in (["db1"], ["all"]):
        step = decide(found, downtime=accepted)["steps"]["db1"]
        assert step["downtime"] and step["boot"] and step["keep"] == [] and step["left"] == []
    only_kept = decide({"db1": looked("postgresql-15")})
    assert only_kept["order"] == [] and only_kept["steps"]["db1"]["left"]
    lines = patch_plan.result(only_kept, {})
    assert lines[0].startswith("Nothing to patch") and "postgresql-15" in lines[1]


def test_the_only_app_host_renews_by_its_idle_slot_and_boots_only_where_that_is_accepted() -> None:
    found = {"app1": looked("openssl", boot=["asked for by libc6"])}
    facts = {"edge1": edge()}
    step = decide(found, facts, everyone=["edge1", "app1"])["steps"]["app1"]
    assert step["flip"] and not step["drain"] and not step["may_boot"] and step["work"]
    assert "the only app host, so that means downtime" in step["left"][0]
    step = decide(found, facts, everyone=["edge1", "app1"], downtime=["app1"])["steps"]["app1"]
    assert step["may_boot"] and step["downtime"]
    kernel = {"app1": looked("linux-image-amd64")}
    assert decide(kernel, facts, everyone=["edge1", "app1"], downtime=["app1"])["steps"]["app1"]["downtime"]
    assert not decide({"app1": looked("tar")}, facts, everyone=["edge1", "app1"], downtime=["app1"])["steps"]["app1"][
        "downtime"
    ]


def test_a_single_host_with_everything_is_alone_in_all() -> None:
    facts = {"app1": app(edge=edge()["edge"])}
    plan = decide({"app1": looked(boot=["x"])}, facts, everyone=["app1"], hosts=["app1"], edges=["app1"], databases=[])
    assert "the only app host and edge" in plan["steps"]["app1"]["left"][0]


@pytest.mark.parametrize(
    ("reboot", "reasons", "boots"),
    [("always", [], True), ("auto", ["x"], True), ("auto", [], False), ("never", ["x"], False)],
)
def test_patch_reboot_decides_about_boots(reboot: str, reasons: list[str], boots: bool) -> None:
    plan = decide({"app1": looked(boot=reasons)}, reboot=reboot)
    assert bool(plan["steps"]["app1"]["boot"]) is boots
    assert ("app1" in plan["order"]) is boots
    if reboot == "never":
        assert "patch_reboot is never" in plan["steps"]["app1"]["left"][0]


def test_services_on_replaced_files_are_work() -> None:
    assert decide({"app2": looked(stale=["atlas-api@blue.service"])})["order"] == ["app2"]


def test_what_only_a_boot_renews_is_no_work_where_none_may_be() -> None:
    found = {"db1": looked(stale=["dbus.service"], boot=["dbus.service runs on replaced files"])}
    plan = decide(found)
    assert plan["order"] == [] and "-e patch_downtime=db1" in plan["steps"]["db1"]["left"][0]
    assert decide(found, downtime=["db1"])["order"] == ["db1"]
    assert decide(found, downtime=["db1"], reboot="never")["order"] == []


def test_what_an_earlier_run_left_out_comes_first() -> None:
    facts = {"edge1": edge(app3="MAINT"), "edge2": edge(app3="MAINT")}
    plan = decide({"app1": looked("openssl")}, facts)
    assert plan["findings"] == [] and plan["order"] == ["app3", "app1"]
    assert plan["steps"]["app3"]["keep_up"] == 0 and plan["steps"]["app1"]["keep_up"] == 2
    assert plan["serving"] == ["app1", "app2", "app3"]
    stopped = app(units={"atlas-api@blue.service": {"state": "inactive"}})
    assert decide(facts={"app2": stopped})["order"] == ["app2"]


def test_nobody_is_drained_where_too_few_would_be_left() -> None:
    facts = {"edge2": edge(app3="DOWN")}
    (finding,) = decide({"app1": looked("openssl")}, facts)["findings"]
    assert finding.startswith("edge2 has 2 app host(s) up (app1, app2); 2 have to serve")
    assert decide({"app3": looked("openssl")}, facts)["findings"] == [], "one that is down can be patched"
    assert decide({"db1": looked("openssl")}, facts)["findings"] == []
    assert decide({"db1": looked("openssl")}, facts)["serving"] == ["app1", "app2"]


def test_all_findings_come_at_once_and_nothing_is_planned() -> None:
    facts = {"app2": app(transaction={"deployment": 7})}
    found = {
        "app1": {"unreachable": True, "msg": "no route"},
        "db1": {"failed": True, "msg": "apt-get update failed: E: x"},
    }
    plan = decide(found, facts, reboot="soon", only=["app1", "app9", "db1"], downtime=["db2"])
    text = "\n".join(plan["findings"])
    for said in (
        "patch_reboot is 'soon'",
        "patch_hosts names app9",
        "patch_downtime names db2",
        "app1 cannot be reached: no route",
        "db1 cannot be looked at: apt-get update failed",
        "deployment 7 did not end",
    ):
        assert said in text
    assert plan["order"] == [] and plan["steps"] == {}


def test_a_host_that_is_owed_a_deployment_is_not_brought_back_with_its_old_one() -> None:
    behind = edge(app2="MAINT")
    behind["edge"]["owed"] = {"app2": {"deployment": 5}}
    (finding,) = decide({"app1": looked("openssl")}, {"edge1": behind})["findings"]
    assert "app2 is owed a deployment" in finding
    assert decide({"app1": looked("openssl")}, {"edge1": behind, "edge2": behind}, only=["db1"])["findings"] == []
    (finding,) = decide({"edge2": looked("openssl")}, {"edge1": behind}, only=["edge2"])["findings"]
    assert "app2 is owed a deployment" in finding, "edge2 may boot, and would send traffic there"


def test_a_deploy_that_runs_keeps_it_out_and_a_dead_one_does_not() -> None:
    lease = {
        "deploy": "d1",
        "holder": "bob@desk",
        "since": NOW - 60,
        "expires": NOW + 60,
        "reason": "deploy 1",
        "process": "p",
    }
    held = {"edge1": edge(lease)}
    (finding,) = decide({"app1": looked("openssl")}, held)["findings"]
    assert "held by bob@desk since" in finding and "playbooks/unlock.yml" in finding
    assert decide({"app1": looked("openssl")}, held, dead=True)["replaces"] == {"edge1": "d1"}
    assert decide({"app1": looked("openssl")}, {"edge1": edge({**lease, "expires": NOW})})["findings"] == []


def test_people_are_told_the_plan_and_the_result() -> None:
    found = {"app1": looked("openssl", boot=["asked for by libc6"]), "db1": looked("postgresql-15")}
    plan = decide(found)
    lines = "\n".join(patch_plan.summary(plan))
    assert "app1         1 package(s), 1 for security, boots (asked for by libc6), drained meanwhile" in lines
    assert "edge1        nothing to do" in lines and "left: postgresql-15" in lines
    upgraded = {"packages": [package("openssl")], "boot": ["x"], "renewed": ["ssh.service"]}
    done = patch_plan.result(plan, {"app1": {"__patch_upgraded": upgraded, "__patch_booted": True}})
    assert done[0] == "app1         1 package(s) upgraded, booted, renewed ssh.service"
    assert "left: a boot (x)" in patch_plan.result(plan, {"app1": {"__patch_upgraded": upgraded}})[1]
    assert "to upgrade" in patch_plan.result(plan, {"app1": {"__patch_upgraded": upgraded}}, check=True)[0]


def test_the_play_has_the_hosts_of_the_plan() -> None:
    plan = decide({"app1": looked("openssl"), "edge1": looked("openssl")})
    assert patch.play({"edge1": {}, "app1": {"__patch_plan": plan}}) == ["app1", "edge1"]
    assert patch.play({"app1": {}}) == [] and patch.play(None) == ["all"]
