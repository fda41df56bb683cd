"""The verdict of a rehearsal: what speaks against a release, and what people read."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.promotion_plan import GATES
from ansible.module_utils.rehearsal import Rehearsal, phases, refused

NEW, OLD = "1.1-new", "1.0-old"


def span(phase: str, began: float, ended: float) -> dict[str, Any]:
    return {"host": "app1", "phase": phase, "task": "", "began": began, "ended": ended, "outcome": "ok"}


def report(**other: Any) -> dict[str, Any]:
    """Return the report of a deploy that went well."""
    return {
        "outcome": "done",
        "plan": {},
        "failures": [],
        "began": 100.0,
        "ended": 160.0,
        "spans": [
            span("stage", 101, 111),
            span("stage", 102, 113),
            span("lock", 100.5, 100.55),
            span("switch", 113, 150),
        ],
        "switches": [
            {"host": "edge1", "at": 140.0, "milliseconds": 2.5},
            {"host": "edge2", "at": 140.03, "milliseconds": 3.0},
        ],
        "watches": [{"verdict": "pass", "told": "requests 60 (old 900)"}, {"edge": "edge1"}],
    } | other


def load(*findings: str) -> dict[str, Any]:
    """Return figures and findings of a load."""
    return {"planned": 1000, "sent": 1000, "failed": 0, "bound": 0.003, "findings": list(findings)}


def rehearsal(**other: Any) -> Rehearsal:
    """Return a rehearsal in which all went well."""
    spread = {"p50": 0.02, "p99": 0.1}
    back = report(began=200.0, ended=206.0, switches=[{"host": "edge1", "at": 202.5, "milliseconds": 2.0}])
    given = {
        "deploy": report(),
        "rollback": back,
        "load": load(),
        "before": spread,
        "during": spread,
        "asked": 200.0,
        "served": {OLD: 80},
    }
    return Rehearsal("production", NEW, OLD, **{**given, **other})


def test_what_went_well_is_good_and_has_its_figures() -> None:
    found = rehearsal()
    assert found.good and found.findings == []
    told = "\n".join(found.told())
    for text in ("1.1-new after 1.0-old", "passed: signature, schema, settings, freeze", "1000 of 1000 planned were sent, 0 failed",
                 "fewer than 3.0e-03", "p99 100 ms",
                 "60 s: stage 12, switch 37", "pass: requests 60 (old 900)", "edge1 2.5 ms, edge2 3.0 ms, 30 ms apart",
                 "served again after 2.5 s, 6 s in all", "GOOD"):  # fmt: skip
        assert text in told, told
    assert found.as_dict()["rollback"] == {"seconds": 6.0, "to_traffic": 2.5} and found.as_dict()["good"]


def test_phases_span_all_hosts_and_leave_out_what_took_no_time() -> None:
    assert phases(report()) == {"stage": 12, "switch": 37}


def test_what_a_gate_stops_is_not_good_and_not_deployed() -> None:
    reasons = ["settings: main.yml:3: mail_relay: is missing (app1)", "schema: The histories have parted"]
    found = rehearsal(refused=reasons, deploy={}, rollback={})
    assert found.findings == [f"the promotion was refused: {reason}" for reason in reasons]
    told = "\n".join(found.told())
    assert "refused; passed: signature, freeze" in told and "NOT GOOD" in told
    assert found.as_dict()["promotion"] == {"passed": ["signature", "freeze"], "refused": reasons}
    astray = rehearsal(refused=reasons, deploy={}, rollback={}, served={NEW: 3}).findings
    assert f"after the refused promotion {OLD} should answer, but {NEW} (3) did" in astray


def test_an_archive_that_is_not_good_passes_nothing() -> None:
    assert rehearsal(refused=["signature: it is not signed"], deploy={}, rollback={}).passed == []


def test_what_speaks_against_a_promotion_is_found_once_in_what_the_playbook_says() -> None:
    listed = "\n".join(f"{number}. {gate}: no, because of 1. this" for number, gate in enumerate(GATES, 1))
    output = f"[ERROR]: Against this promotion speaks:\n{listed}\n\nTASK [x] ***\nNothing was changed.\n{listed}\n\nPLAY RECAP"
    assert refused(output) == [f"{gate}: no, because of 1. this" for gate in GATES]
    assert refused("1. production is no lab: it takes no release from a file") == []


def test_a_release_that_preflight_refuses_is_not_good() -> None:
    refused = report(
        outcome="refused", plan={"findings": ["app1: mail_relay: Field required"]}, switches=[], watches=[], spans=[]
    )
    found = rehearsal(deploy=refused, rollback={})
    assert found.findings == ["the deploy was refused: app1: mail_relay: Field required"]
    assert "NOT GOOD" in found.told()


def test_a_release_that_fails_is_not_good_however_well_it_was_undone() -> None:
    failed = report(outcome="failed", failures=[{"host": "app2", "phase": "migrate", "message": "no such column\n"}])
    assert rehearsal(deploy=failed, rollback={}).findings == ["the deploy failed: app2, phase migrate: no such column"]
    astray = rehearsal(deploy=failed, rollback={}, served={NEW: 3, OLD: 70}).findings
    assert f"after the failed deploy {OLD} should answer, but {NEW} (3), {OLD} (70) did" in astray
    nobody = rehearsal(deploy=failed, rollback={}, served={}).findings
    assert any("nobody did" in finding for finding in nobody)


def test_a_lost_request_or_a_rollback_that_fails_is_not_good() -> None:
    assert rehearsal(load=load("3 requests failed: 3 × 503")).findings == ["3 requests failed: 3 × 503"]
    assert rehearsal(rollback={}).findings == [
        "the rollback left no report: it ended before it could begin; see its output"
    ]
    assert rehearsal(rollback=report(outcome="unfinished")).findings == ["the rollback ended as unfinished"]
