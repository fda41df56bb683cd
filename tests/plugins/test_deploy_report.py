"""The report of a deploy: what is noted, what is never noted, and the page that is made of it."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deploy_report
import pytest
from ansible.module_utils.deploy_report import Report, drawing, headline, page, steps

PROJECT = Path(__file__).resolve().parents[2]

T0 = 1_780_000_000.0
PLAN: dict[str, Any] = {
    "deploy": "20260525T000000Z-1", "holder": "eve@desk", "mode": "deploy", "number": 8, "old_number": 7, "slot": "green",
    "old_slot": "blue", "rolling": False, "hosts": ["app1", "app2"], "edges": ["edge1", "edge2"], "findings": [],
    "release": {"id": "1.2.3-abc", "file": "/srv/eve/secret-path", "error": ""}, "undo": {"interrupted": False},
    "nothing_to_do": False, "secret": "hunter2",
}  # fmt: skip
FIGURES = {
    "requests": [12, 228], "errors": [1, 0], "slow": [[0, 12], [2, 228]], "slow_limit_ms": 100.0,
    "jobs": [[0, 5], [1, 90]],
}  # fmt: skip


def deploy() -> Report:
    """Return a report of a deploy that went well."""
    report = Report("deploy", T0)
    report.facts({"__deploy_plan": PLAN, "atlas_credentials": {"token": "hunter2"}}, T0 + 1)
    report.note("edge1", "Lock | Take the lock", T0 + 1, T0 + 1.5, "changed")
    for host in ("app1", "app2"):
        report.note(host, "Stage | Upload the release", T0 + 1.5, T0 + 4, "changed")
        report.note(host, "Switch | Start", T0 + 4, T0 + 9, "changed")
    watched = {"edge": {"new": {"requests": 12, "errors": 1}, "old": {"requests": 228, "errors": 0}, "since": {"x": 1}}}
    report.result("edge1", "Watch | Deployment 8 for 5 s, 5 % of traffic", watched)
    report.facts(
        {"__deploy_verdict": {"verdict": "pass", "told": "12 of 240", "reasons": [], "figures": FIGURES}}, T0 + 14
    )
    for number, edge in enumerate(("edge1", "edge2")):
        report.note(edge, "Switch | Send all traffic to slot green", T0 + 14, T0 + 15, "changed")
        report.result(edge, "Switch | Send", {"switched_at": T0 + 14.5 + number / 100, "milliseconds": 0.31})
    report.note("app1", "Finish | Tidy up", T0 + 15, T0 + 16, "changed")
    return report


class Checker(html.parser.HTMLParser):
    """Counts tags and finds those that are not closed, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rendered(report: Report, folder: Path) -> tuple[str, Checker]:
    path = folder / "reports" / "x.html"
    deploy_report.write(report.as_dict(), path)
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return text, checker


def test_a_page_that_stands_alone(tmp_path: Path) -> None:
    text, found = rendered(deploy(), tmp_path)
    assert found.fetched == [] and "url(" not in text and "<script" not in text
    assert "1.2.3-abc is in service: deployment 8, slot green, on app1, app2." in text
    assert "eve@desk" in text and "20260525T000000Z-1" in text
    assert found.count["rect"] == 8
    assert ">0.31 <small>ms</small>" in text and "10 ms apart" in text
    assert "Deployment 8 for 5 s, 5 % of traffic" in text


def test_the_json_beside_it_has_the_same(tmp_path: Path) -> None:
    rendered(deploy(), tmp_path)
    found = json.loads((tmp_path / "reports" / "x.json").read_text())
    assert found["outcome"] == "done" and len(found["spans"]) == 8
    assert found["switches"][1] == {"host": "edge2", "at": T0 + 14.51, "milliseconds": 0.31}
    assert found["plan"]["release"] == "1.2.3-abc"


def test_only_known_fields_are_noted(tmp_path: Path) -> None:
    report = deploy()
    failure = {"host": "app1", "phase": "stage", "message": "no", "log": [], "credentials": "hunter2"}
    report.facts({"__deploy_failure": failure, "other": "hunter2"}, T0)
    report.result("edge1", "Watch | x", {"edge": {"new": {"requests": 1}}, "invocation": {"module_args": "hunter2"}})
    text, _ = rendered(report, tmp_path)
    everything = text + (tmp_path / "reports" / "x.json").read_text()
    assert "hunter2" not in everything and "secret-path" not in everything


def test_what_it_says_is_shown_as_text(tmp_path: Path) -> None:
    report = deploy()
    report.facts({"__deploy_failure": {"host": "app1", "phase": "switch", "message": "<b>no</b>", "log": ["<i>"]}}, T0)
    text, _ = rendered(report, tmp_path)
    assert "&lt;b&gt;no&lt;/b&gt;" in text and "&lt;i&gt;" in text


@pytest.mark.parametrize(
    ("change", "outcome", "said"),
    [
        ({"findings": ["app1 has no disk"]}, "refused", "refused before anything was touched"),
        ({"nothing_to_do": True}, "nothing", "in service already"),
        ({"mode": "tidy"}, "done", "was put right"),
        ({}, "done", "is in service"),
    ],
)
def test_the_outcome_follows_from_the_plan(change: dict[str, Any], outcome: str, said: str) -> None:
    report = deploy()
    report.facts({"__deploy_plan": {**PLAN, **change}}, T0)
    assert report.outcome == outcome
    assert said in headline(report.as_dict())


@pytest.mark.parametrize(("phase", "outcome"), [("stage", "failed"), ("switch", "failed"), ("finish", "unfinished")])
def test_the_outcome_follows_from_failures(phase: str, outcome: str) -> None:
    report = deploy()
    failure = {"host": "app1", "phase": phase, "message": "no", "log": []}
    for _ in range(2):
        report.facts({"__deploy_failure": failure}, T0)
    assert report.failures == [failure]
    assert report.outcome == outcome


def test_nothing_that_serves_was_touched_before_the_switch() -> None:
    report = Report("deploy", T0)
    report.facts({"__deploy_plan": PLAN, "__deploy_failure": {"host": "app1", "phase": "stage", "message": "no"}}, T0)
    assert "before anything that serves was touched" in headline(report.as_dict())
    report.note("app1", "Switch | Start", T0, T0 + 1, "failed")
    assert "the fleet was returned to what it was" in headline(report.as_dict())
    report.note("app1", "Undo | This host", T0, T0 + 1, "unreachable")
    assert "not everything could be returned" in headline(report.as_dict())


def test_the_timeline_is_to_scale() -> None:
    found = drawing(deploy().as_dict())
    assert [row["host"] for row in found["rows"]] == ["edge1", "edge2", "app1", "app2"]
    bars = found["rows"][3]["bars"]
    per_second = (found["width"] - found["left"]) / 16
    assert bars[0]["x"] == pytest.approx(found["left"] + 1.5 * per_second, abs=0.1)
    assert bars[1]["width"] == pytest.approx(5 * per_second, abs=1)
    assert [mark["host"] for mark in found["switches"]] == ["edge1", "edge2"]
    assert all(0 <= tick["x"] <= found["width"] for tick in found["ticks"]) and len(found["ticks"]) > 3


def test_steps_of_the_canary_show_both_sides() -> None:
    (step,) = steps(deploy().watches)
    assert step["task"] == "Deployment 8 for 5 s, 5 % of traffic" and step["verdict"] == "pass"
    new, old = step["sides"]
    assert (new["requests"], new["errors"]) == ("12", "1")
    assert (old["requests"], old["jobs"]) == ("228", "1 of 90")
    assert new["share"] == 5


def test_a_page_of_little(tmp_path: Path) -> None:
    report = Report("deploy", T0)
    report.facts({"__deploy_plan": {"deploy": "x", "findings": ["a", "b"], "release": {}}}, T0)
    text, found = rendered(report, tmp_path)
    assert found.count["li"] == 2 and "refused" in text
    assert page(report.as_dict())["hosts"] == []


PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  roles: [deploy]
"""
TASKS = """
- name: Preflight | Decide what to do
  ansible.builtin.set_fact:
    __deploy_plan: {deploy: "20260525T000000Z-9", mode: deploy, number: 3, hosts: [localhost], edges: [], findings: [],
      release: {id: 1.0-x}, nothing_to_do: false}
- name: "Stage | Wait for {{ __deploy_plan.number }}"
  ansible.builtin.command: {argv: [sleep, "0.3"]}
- name: Switch | Fail
  ansible.builtin.command: {argv: ["false"]}
  ignore_errors: true
- name: Switch | Note what went wrong
  ansible.builtin.set_fact:
    __deploy_failure: {host: localhost, phase: switch, message: it failed, log: [a line]}
"""


@pytest.mark.parametrize(("options", "written"), [([], True), (["--check"], False)])
def test_ansible_writes_one(tmp_path: Path, options: list[str], written: bool) -> None:
    """The plugin in a copy of the project, enabled as the project enables it, with a role deploy of its own."""
    (tmp_path / "roles" / "deploy" / "tasks").mkdir(parents=True)
    (tmp_path / "roles" / "deploy" / "tasks" / "main.yml").write_text(TASKS)
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "plugins").mkdir()
    for name in ("callback", "module_utils"):
        (tmp_path / "plugins" / name).mkdir()
        for source in (PROJECT / "plugins" / name).glob("*.*"):
            (tmp_path / "plugins" / name / source.name).write_text(source.read_text())
    lines = (PROJECT / "ansible.cfg").read_text().splitlines()
    kept = [line for line in lines if re.match(r"callback|stdout", line)]
    (tmp_path / "ansible.cfg").write_text("\n".join(["[defaults]", *kept, "roles_path = roles", ""]))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "-c", "local", "-e", f"ansible_python_interpreter={sys.executable}", "play.yml", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "reports" / "20260525T000000Z-9.html"
    assert path.exists() == written
    assert ("reports/20260525T000000Z-9.html" in done.stdout) == written
    if written:
        found = json.loads(path.with_suffix(".json").read_text())
        assert [(span["phase"], span["task"], span["outcome"]) for span in found["spans"]] == [
            ("stage", "Wait for 3", "changed"), ("switch", "Fail", "failed"),
        ]  # fmt: skip
        assert found["spans"][0]["ended"] - found["spans"][0]["began"] >= 0.3
        assert found["outcome"] == "failed" and found["failures"][0]["message"] == "it failed"


def test_old_reports_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_report, "KEPT", 2)
    for number in range(4):
        deploy_report.write(deploy().as_dict(), tmp_path / f"2026{number}.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20262.html", "20262.json", "20263.html", "20263.json"]
