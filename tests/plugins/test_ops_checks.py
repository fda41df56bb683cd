"""What the operations checks find in what hosts say: a healthy fleet needs nobody, and each thing that is wrong is named."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible.module_utils.ops_checks import DAY, days_until_full, judge, text, within
from ansible.module_utils.ops_runbook import told

NOW = 1_790_000_000.0
POLICY: dict[str, Any] = {
    "environment": "staging",
    "inventory": "INVENTORY",
    "hosts": ["app1"],
    "edges": ["edge1"],
    "backup_host": "backup1",
    "release_pin": {},
    "rotation_days": {"tokens": 180},
    "certificate_days": 14,
    "disk_percent": 85,
    "disk_days": 14,
    "capacity_days": 90,
    "known_errors": [],
    "ignored_units": [],
    "slower_factor": 2.0,
    "error_percent": 0.1,
    "baseline": False,
    "update_days": 3,
    "manual_packages": ["haproxy"],
    "ports_expected": ["udp/68"],
    "exposure_max": 2.0,
}
COUNTERS = {
    "be_blue/app1": {"requests": 2000, "errors": 0, "histogram": {"+Inf": 2000, "10": 1000, "50": 1990, "100": 2000}}
}


def atlas(**other: Any) -> dict[str, Any]:
    return {
        "slot": None, "slots": {"blue": None, "green": None}, "deployments": {}, "units": {}, "ready": None, "warm": {}, "good": [],
        "disk": {"opt_mb": 9000, "var_mb": 9000}, "debian": {"version": "12"}, "python": "3.11", "journal": [], "rotations": [],
        "first_entry": "2026-09-01T00:00:00Z", "as_inventory": None, "stale_units": [], "transaction": {}, "provisioned": True,
        "memory": {"total_mb": 4096, "available_mb": 2048}, "digest": None,
        "edge": {"installed": False, "servers": {}, "counters": {}, "lease": {}, "owed": {}, "file": None, "memory": None},
    } | other  # fmt: skip


def app(check: str) -> dict[str, Any]:
    units = {
        f"atlas-{name}@blue.service": {"state": "active", "restarts": 0, "memory": 1}
        for name in ("api", "core", "services", "monitoring")
    }
    return host(check, atlas=atlas(
        slot="blue", slots={"blue": 1, "green": None}, deployments={"1": {"release": "r1"}}, units=units,
        ready={"status": 200, "release": "r1", "body": {}}, good=[1],
    ), doctor={"findings": [], "error": ""}, health={"status": "ok", "checks": {"database": "ok"}, "queue": {"dead": 0}},
        answers_ms=[4.0, 5.0, 6.0], probe_seconds=0.4, probe_success=1.0)  # fmt: skip


def edge(check: str) -> dict[str, Any]:
    state = {
        "installed": True, "servers": {"be_blue/app1": "UP"}, "counters": COUNTERS, "lease": {}, "owed": {}, "file": "be_blue",
        "memory": "be_blue", "certificate_days": 100,
    }  # fmt: skip
    return host(check, atlas=atlas(edge=state), edge_ms=[3.0])


def host(check: str, **other: Any) -> dict[str, Any]:
    """Return what a host without any part in the service says."""
    return {
        "check": check, "clock": NOW, "expected": {"accounts": ["deploy"], "ports": [22]}, "atlas": atlas(), "backup": {},
        "disks": {"/": {"total_mb": 10000, "used_mb": 5000, "inodes_percent": 10.0}},
        "failed_units": [], "errors": {"kinds": {"cron: job failed": {"count": 2, "last": NOW - 60}}, "cut": False}, "doctor": None,
        "health": None, "clusters": [], "updates": [], "updates_error": "", "stale": [], "boot": [], "answers_ms": [], "edge_ms": [],
        "probe_seconds": None, "accounts": [{"name": "deploy", "uid": 1000, "why": ["SSH keys"], "keys": ["SHA256:one"]}],
        "sockets": [{"protocol": "tcp", "port": 22, "addresses": ["192.0.2.1"], "by": ["sshd"], "loopback": False},
                    {"protocol": "tcp", "port": 8111, "addresses": ["127.0.0.1"], "by": ["python3"], "loopback": True}],
        "firewall": {"as_file": True, "ports": [22], "error": ""}, "exposure": {"atlas-api@blue.service": 0.9, "ssh.service": 9.6},
        "permissions": [], "setuid": ["/usr/bin/su"], "stores_mb": {},
    } | other  # fmt: skip


def backup(**drill: Any) -> dict[str, Any]:
    jobs = {
        name: {"ok": True, "succeeded_at": NOW - 100, "max_age_seconds": 3600, "message": ""}
        for name in ("backup", "increment", "check")
    }
    jobs["drill"] = {
        "ok": True,
        "succeeded_at": NOW - 100,
        "max_age_seconds": 8 * DAY,
        "rpo_seconds": 3.0,
        "rto_seconds": 20.0,
    } | drill
    return {"expected_since": NOW - DAY, "jobs": jobs}


def fleet(check: str) -> dict[str, Any]:
    clusters = [{"name": "15/main", "status": "online"}]
    return {
        "app1": app(check), "edge1": edge(check), "db1": host(check, clusters=clusters), "backup1": host(check, backup=backup()),
    }  # fmt: skip


def check(
    name: str, change: Callable[[dict[str, Any]], Any] = lambda _: None, before: Any = None, **policy: Any
) -> dict[str, Any]:
    facts = fleet(name)
    change(facts)
    earlier = [judge(name, fleet(name), POLICY, [], NOW - 7 * DAY)] if before is None else before
    return judge(name, copy.deepcopy(facts), POLICY | policy, earlier, NOW)


def found(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each["kind"], each["host"]) for each in report["findings"]]


@pytest.mark.parametrize("name", ["daily", "weekly", "monthly"])
def test_a_healthy_fleet_needs_nobody_the_first_time_and_later(name: str) -> None:
    assert found(check(name, before=[])) == []
    report = check(name)
    assert found(report) == []
    shown = text(report, NOW - 7 * DAY)
    assert shown.startswith(f"{name.capitalize()} check of staging, 2026-09-21") and "7 d ago" in shown
    assert "LOOK" not in shown


def put(host_: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts[host_].update(values)


def put_atlas(host_: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts[host_]["atlas"].update(values)


def put_edge(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts["edge1"]["atlas"]["edge"].update(values)


def doctor(name: str, message: str = "it is so") -> dict[str, Any]:
    return {"findings": [{"check": name, "level": "warning", "message": message, "mend": "atlas x"}], "error": ""}


FULL = {"/": {"total_mb": 10000, "used_mb": 9000, "inodes_percent": 10.0}}
INODES = {"/": {"total_mb": 10000, "used_mb": 1000, "inodes_percent": 99.0}}
FRESH = {"kinds": {"atlas-core: job failed (KeyError)": {"count": 1, "last": NOW}}, "cut": False}
LISTENS = [{"protocol": "tcp", "port": 4444, "addresses": ["192.0.2.1"], "by": ["nc"], "loopback": False}]
MALLORY = {"name": "mallory", "uid": 1001, "why": ["a password"], "keys": []}
OPEN = [{"path": "/etc/atlas/x", "mode": "0644", "owner": "root", "wrong": "everybody may read it"}]
CASES: list[tuple[str, str, str, Callable[[dict[str, Any]], Any], dict[str, Any]]] = [
    ("daily", "host-unreachable", "db1", lambda facts: facts.update(db1={"unreachable": True, "msg": "no route"}), {}),
    ("daily", "host-unreachable", "db1", lambda facts: facts.update(db1={"failed": True, "msg": "no python"}), {}),
    ("daily", "service-down", "app1", lambda facts: facts["app1"]["atlas"]["units"]["atlas-core@blue.service"].update(state="failed"), {}),
    ("daily", "service-down", "app1", put_atlas("app1", slot=None), {}),
    ("daily", "service-down", "app1", put("app1", health={}), {}),
    ("daily", "service-down", "app1", put("app1", doctor={"findings": [], "error": "nothing said"}), {}),
    ("daily", "probe-failed", "app1", put("app1", probe_success=0.0), {}),
    ("daily", "queue-stalled", "app1", put("app1", doctor=doctor("queue")), {}),
    ("daily", "schema-unfit", "app1", put("app1", health={"checks": {"schema": "is at 3"}, "queue": {"dead": 0}}), {}),
    ("daily", "dead-letters", "app1", put("app1", health={"checks": {}, "queue": {"dead": 3}}), {}),
    ("daily", "deployment-drift", "app1", put_atlas("app1", stale_units=["atlas-api@blue.service"]), {}),
    ("daily", "edge-drift", "edge1", put_edge(servers={"be_blue/app1": "DOWN"}), {}),
    ("daily", "edge-drift", "edge1", put_edge(maintenance="moving"), {}),
    ("daily", "certificate-ends", "edge1", put_edge(certificate_days=13), {}),
    ("daily", "database-down", "db1", put("db1", clusters=[{"name": "15/main", "status": "down"}]), {}),
    ("daily", "unit-failed", "db1", put("db1", failed_units=[{"unit": "x.service", "about": "X"}]), {}),
    ("daily", "new-errors", "app1", put("app1", errors=FRESH), {}),
    ("daily", "disk-full", "db1", put("db1", disks=FULL), {}),
    ("daily", "disk-full", "db1", put("db1", disks=INODES), {}),
    ("daily", "secrets-old", "app1", put_atlas("app1", first_entry="2025-01-01T00:00:00Z"), {}),
    ("daily", "rotation-unfinished", "app1",
     put_atlas("app1", rotations=[{"event": "rotation", "kind": "tokens", "at": "2026-09-01T00:00:00Z", "step": "begun"}]), {}),
    ("daily", "backup-failed", "backup1", put("backup1", backup={}), {}),
    ("daily", "drill-failed", "backup1", put("backup1", backup=backup(ok=False, message="no")), {}),
    ("weekly", "drill-failed", "backup1", put("backup1", backup=backup(succeeded_at=NOW - 9 * DAY, max_age_seconds=DAY / 2)), {}),
    ("weekly", "slower", "edge1", put("app1", answers_ms=[60.0, 61.0, 62.0]), {}),
    ("weekly", "slower", "edge1", put("app1", probe_seconds=11.0), {}),
    ("weekly", "errors-more", "edge1", put_edge(counters={"be_blue/app1": {"requests": 4000, "errors": 10, "histogram": {}}}), {}),
    ("weekly", "updates-pending", "db1", put("db1", updates=[{"name": "haproxy", "from": "1", "to": "2", "security": True}]), {}),
    ("weekly", "updates-unknown", "db1", put("db1", updates_error="no route"), {}),
    ("weekly", "boot-pending", "db1", put("db1", boot=["a kernel"]), {}),
    ("monthly", "account-unexpected", "db1", lambda facts: facts["db1"]["accounts"].append(MALLORY), {}),
    ("monthly", "account-unexpected", "db1", lambda facts: facts["db1"]["accounts"][0]["keys"].append("SHA256:two"), {}),
    ("monthly", "port-unexpected", "db1", lambda facts: facts["db1"]["sockets"].extend(LISTENS), {}),
    ("monthly", "firewall-differs", "db1", put("db1", firewall={"as_file": False, "ports": [22], "error": ""}), {}),
    ("monthly", "firewall-differs", "db1", put("db1", firewall={"as_file": True, "ports": [22, 4444], "error": ""}), {}),
    ("monthly", "unit-exposed", "db1", put("db1", exposure={"atlas-api@blue.service": 2.1}), {}),
    ("monthly", "unit-exposed", "db1", put("db1", exposure={"ssh.service": 9.7}), {"exposure_rose": True}),
    ("monthly", "permissions-open", "db1", put("db1", permissions=OPEN), {}),
    ("monthly", "setuid-new", "db1", put("db1", setuid=["/usr/bin/su", "/usr/local/bin/sh"]), {}),
    ("monthly", "deployment-drift", "app1", put_atlas("app1", as_inventory=False), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "where", "change", "how"), CASES, ids=[f"{each[1]}-{n}" for n, each in enumerate(CASES)]
)
def test_each_thing_that_is_wrong_is_named_on_its_host(
    name: str, kind: str, where: str, change: Callable[[dict[str, Any]], Any], how: dict[str, Any]
) -> None:
    before = None
    if how.get("exposure_rose"):
        facts = fleet(name)
        facts["db1"]["exposure"] = {"ssh.service": 9.0}
        before = [judge(name, facts, POLICY, [], NOW - DAY)]
    report = check(name, change, before)
    assert set(found(report)) == {(kind, where)}
    shown = told(report["findings"])
    assert f"docs/runbooks/{kind}.md" in shown and f"{where}: " in shown
    assert not any(word in shown for word in ("SUBJECT", "HOST ")), shown


def test_an_error_is_new_once() -> None:
    first = check("daily", put("app1", errors=FRESH))
    again = check("daily", put("app1", errors=FRESH), before=[first])
    assert found(first) == [("new-errors", "app1")] and found(again) == []
    quiet = check("daily", before=[first, again])
    assert found(check("daily", put("app1", errors=FRESH), before=[first, again, quiet])) == [], (
        "a quiet day forgets nothing"
    )
    assert found(check("daily", put("app1", errors=FRESH), known_errors=["^atlas-core: job failed"])) == []


def test_dead_letters_are_news_only_when_there_are_more() -> None:
    dead = put("app1", health={"checks": {}, "queue": {"dead": 3}})
    first = check("daily", dead)
    assert found(first) == [("dead-letters", "app1")]
    assert found(check("daily", dead, before=[first])) == []


def test_an_open_breaker_mends_itself() -> None:
    assert found(check("daily", put("app1", doctor=doctor("breakers")))) == []


def test_a_unit_that_may_fail_needs_nobody() -> None:
    failed = put("db1", failed_units=[{"unit": "x.service", "about": "X"}])
    assert found(check("daily", failed, ignored_units=["^x\\.service$"])) == []


def test_security_updates_install_themselves_within_days() -> None:
    waits = put("db1", updates=[{"name": "openssl", "from": "1", "to": "2", "security": True}])
    first = check("weekly", waits, before=[])
    assert found(first) == []
    first["at"] = NOW - 7 * DAY
    first["keeps"]["updates"]["db1"]["openssl"] = NOW - 7 * DAY
    assert found(check("weekly", waits, before=[first])) == [("updates-pending", "db1")]


def test_the_baseline_stays_until_another_is_wanted() -> None:
    slow = put("app1", answers_ms=[200.0])
    first = check("weekly", slow)
    assert "the baseline is 5.0 ms" in first["findings"][0]["what"]
    accepted = check("weekly", slow, before=[first], baseline=True)
    assert found(accepted) == [], "the run that makes it the baseline does not complain of it"
    assert found(check("weekly", slow, before=[accepted])) == []


def test_what_the_first_week_could_not_measure_joins_the_baseline_later() -> None:
    first = check("weekly", put("app1", probe_seconds=None), before=[])
    assert "probe" not in first["keeps"]["baseline"]["figures"]
    second = check("weekly", before=[first])
    slow = check("weekly", put("app1", probe_seconds=9.0), before=[second])
    assert "the baseline is 0.4 s" in slow["findings"][0]["what"]


def test_traffic_counts_from_the_last_report_on_and_anew_after_a_restart() -> None:
    grown = {
        "be_blue/app1": {
            "requests": 5000,
            "errors": 2,
            "histogram": {"+Inf": 5000, "10": 1000, "50": 1990, "100": 5000},
        }
    }
    report = check("weekly", put_edge(counters=grown))
    assert report["keeps"]["figures"]["median"] == 100, "of the 3,000 since then, not of all"
    fallen = {
        "be_blue/app1": {
            "requests": 1500,
            "errors": 0,
            "histogram": {"+Inf": 1500, "10": 1500, "50": 1500, "100": 1500},
        }
    }
    assert check("weekly", put_edge(counters=fallen))["keeps"]["figures"]["median"] == 10


def test_a_disk_that_grows_is_full_one_day() -> None:
    day = [(NOW + n * DAY, 1000.0 + 100 * n) for n in range(10)]
    assert days_until_full(day, 2900) == pytest.approx(10)
    assert days_until_full(day[:1], 2900) is None
    assert days_until_full([(NOW, 1.0), (NOW + 60, 900.0)], 1000) is None, "a minute says nothing of days"
    assert days_until_full([(NOW, 900.0), (NOW + 9 * DAY, 100.0)], 1000) is None


@pytest.mark.parametrize(("name", "kind"), [("daily", "disk-full"), ("monthly", "capacity-short")])
def test_a_disk_is_told_before_it_is_full(name: str, kind: str) -> None:
    was = fleet(name)
    was["db1"]["disks"]["/"]["used_mb"] = 4000
    before = [judge(name, was, POLICY, [], NOW - 2 * DAY)]
    report = check(name, before=before)
    assert found(report) == [(kind, "db1")]
    assert "full in 10 days" in report["findings"][0]["what"]
    other = copy.deepcopy(before)
    other[0]["keeps"]["disks"]["db1"]["/"]["total_mb"] = 4500
    assert found(check(name, before=other)) == [], "a disk that was enlarged begins anew"


def test_an_unreachable_host_is_told_once_and_forgets_nothing_of_others() -> None:
    report = check("daily", lambda facts: facts.update(app1={"unreachable": True, "msg": "down"}))
    assert found(report) == [("host-unreachable", "app1")]
    assert "cron: job failed" in report["keeps"]["kinds"]


def test_what_came_while_a_host_did_not_answer_is_news_too() -> None:
    name = "monthly"
    first = check(name, before=[])
    away = check(name, lambda facts: facts.update(app1={"unreachable": True, "msg": "down"}), before=[first])
    accounts = [{"name": "deploy", "uid": 1000, "why": ["SSH keys"], "keys": ["SHA256:another"]}]
    change = put("app1", accounts=accounts, setuid=["/usr/bin/another"], exposure={"atlas-api@blue.service": 1.8})
    assert {kind for kind, _ in found(check(name, change, before=[first, away]))} == {
        "account-unexpected", "setuid-new", "unit-exposed",
    }  # fmt: skip


def test_a_journal_is_read_on_from_where_it_was_read_and_not_from_when_it_was_judged() -> None:
    """Between the two lie minutes where there are many hosts, and days where one did not answer."""
    first = check("daily", put("app1", clock=NOW - 40), before=[])
    assert first["at"] == NOW and first["asked"]["app1"] == NOW - 40
    away = check("daily", lambda facts: facts.update(app1={"unreachable": True, "msg": "down"}), before=[first])
    assert away["asked"]["app1"] == NOW - 40 and away["asked"]["edge1"] == NOW


def test_within_is_the_least_bound() -> None:
    histogram = {"+Inf": 100, "10": 50, "50": 98, "100": 99, "1000": 99}
    assert (within(histogram, 0.5), within(histogram, 0.99)) == (10, 100)
    assert within(histogram, 0.999) == 2000, "beyond the last bound"


@pytest.mark.parametrize("name", ["daily", "weekly"])
@pytest.mark.parametrize(("minutes", "kinds"), [(10, []), (90, [("backup-failed", "backup1")])])
def test_backups_that_never_reported_are_found_unless_all_is_new(name: str, minutes: int, kinds: list[Any]) -> None:
    first = datetime.datetime.fromtimestamp(NOW - 60 * minutes, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def change(facts: dict[str, Any]) -> None:
        facts["backup1"]["backup"] = {}
        facts["app1"]["atlas"]["first_entry"] = first

    assert found(check(name, change)) == kinds


FAILED_PLAYBOOK = """
TASK [backup : Find the release] ***
ok: [dev1]

TASK [backup : Restore] ***
changed: [dev2]
fatal: [dev1]: FAILED! => the repository is empty
  | a line of its log

PLAY RECAP ***
dev1 : ok=1 changed=0 failed=1
"""


def exercise(after: Any = None, **recover: Any) -> list[dict[str, Any]]:
    """Return the steps of a quarterly exercise, whose recovery was different in *recover*, and after which *after* is there."""
    documents = {"a": "hash-a", "b": "hash-b"}
    steps: list[dict[str, Any]] = [
        {"name": "Back up", "said": "ok"},
        {"name": "Note the documents", "said": json.dumps(documents), "documents": "before"},
        {"name": "Recover", "seconds": 300.0, "said": "ok", "recovery": True} | recover,
        {"name": "Note the documents again", "said": json.dumps(after or documents), "documents": "after"},
    ]
    return [{"rc": 0, "seconds": 1.0, "log": f"{number}.log"} | step for number, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "kind", "what"),
    [
        (exercise(), "", ""),
        (exercise({"a": "hash-a"}), "recovery-failed", "of 2 documents 1 are lost, 0 changed"),
        (exercise({"a": "hash-a", "b": "other"}), "recovery-failed", "of 2 documents 0 are lost, 1 changed"),
        (exercise(rc=2, said=FAILED_PLAYBOOK), "recovery-failed", "Recover: failed. fatal: [dev1]: FAILED! => the repository is empty"),
        (exercise(rc=1, said="first\nno space left\n"), "recovery-failed", "Recover: failed. no space left"),
        (exercise(rc=1, said=""), "recovery-failed", "Recover: failed. It said nothing."),
        (exercise(seconds=3700.0), "recovery-slow", "the recovery took 62 minutes, 60 are allowed"),
    ],
)  # fmt: skip
def test_a_recovery_loses_nothing_and_is_quick(steps: list[dict[str, Any]], kind: str, what: str) -> None:
    policy = POLICY | {"recovery_minutes": 60}
    first = judge("quarterly", {}, policy | {"steps": exercise()}, [], NOW - DAY)
    report = judge("quarterly", {}, policy | {"steps": steps}, [first], NOW)
    assert [(each["kind"], each["what"]) for each in report["findings"]] == ([(kind, what)] if kind else [])
    rows = {row[0]: row[1:] for row in report["sections"][0]["rows"]}
    assert rows["Back up"] == ["1", "1", "done"] and rows["Recover"][1] == "300"
    if "failed" in what:
        assert rows["Recover"][2] == "FAILED" and report["findings"][0]["look"] == "tail -n 50 2.log"
