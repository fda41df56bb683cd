"""The report of a deploy: what was noted while it ran, turned into JSON and into what the HTML page draws. Pure.

Only named, harmless fields of plans and results are noted: no arguments of tasks, no settings, no credentials.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

PLAN = (
    "deploy", "holder", "mode", "number", "old_number", "slot", "old_slot", "rolling", "warm", "first", "hosts", "edges",
    "missing", "missing_edges", "rolled_back", "nothing_to_do", "findings", "current",
)  # fmt: skip
VERDICT = ("verdict", "told", "reasons", "figures")
FAILURE = ("host", "phase", "message", "log")
PHASES = ("preflight", "confirm", "lock", "stage", "migrate", "switch", "watch", "verify", "finish", "undo", "hooks")
MODES = {"deploy": "Deploy", "join": "Deploy to hosts that lacked it", "tidy": "Clean-up", "rollback": "Rollback"}
WIDTH, LABEL, ROW, BAR = 1000, 130, 34, 20
"""Of the drawing, in its own units; the labels of hosts take LABEL of the width."""
GAP_SECONDS = 0.02


class Report:
    """What is noted of one run of a playbook. Times are Unix times."""

    def __init__(self, playbook: str, began: float) -> None:
        self.playbook, self.began, self.ended = playbook, began, began
        self.plan: dict[str, Any] = {}
        self.spans: list[dict[str, Any]] = []
        self.watches: list[dict[str, Any]] = []
        self.switches: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    def note(self, host: str, task: str, began: float, ended: float, outcome: str) -> None:
        """A task that does something ended on *host*: *outcome* is ok, changed, failed or unreachable."""
        phase, _, what = task.partition(" | ")
        self.spans.append(
            {
                "host": host,
                "phase": phase.lower() if what else "other",
                "task": what or task,
                "began": began,
                "ended": ended,
                "outcome": outcome,
            }
        )
        self.ended = max(self.ended, ended)

    def facts(self, facts: Mapping[str, Any], at: float) -> None:
        """A task set *facts*: the plan, a verdict and a failure are noted, and of those their known fields."""
        plan = facts.get("__deploy_plan")
        if isinstance(plan, Mapping):
            self.plan = {key: plan[key] for key in PLAN if key in plan}
            self.plan["release"] = dict(plan.get("release") or {}).get("id")
            self.plan["interrupted"] = bool(dict(plan.get("undo") or {}).get("interrupted"))
        failure = facts.get("__deploy_failure")
        if isinstance(failure, Mapping):
            found = {key: failure[key] for key in FAILURE if key in failure}
            if found not in self.failures:
                self.failures.append(found)
        verdict = facts.get("__deploy_verdict")
        if isinstance(verdict, Mapping) and verdict:
            self.watches.append({"at": at, **{key: verdict[key] for key in VERDICT if key in verdict}})

    def result(self, host: str, task: str, result: Mapping[str, Any]) -> None:
        """A module answered: an edge that switched, or one that watched."""
        if "switched_at" in result:
            self.switches.append(
                {"host": host, "at": result["switched_at"], "milliseconds": result.get("milliseconds")}
            )
        edge = result.get("edge")
        if isinstance(edge, Mapping) and isinstance(edge.get("new"), Mapping):
            sides = {side: dict(edge.get(side) or {}) for side in ("new", "old")}
            self.watches.append({"at": self.ended, "edge": host, "task": task.partition(" | ")[2], **sides})

    @property
    def outcome(self) -> str:
        """What came of it: refused, failed, unfinished, nothing, or done."""
        if self.plan.get("findings"):
            return "refused"
        if any(failure.get("phase") != "finish" for failure in self.failures):
            return "failed"
        if self.failures:
            return "unfinished"
        return "nothing" if self.plan.get("nothing_to_do") else "done"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {
            "deploy": self.plan.get("deploy"),
            "playbook": self.playbook,
            "began": self.began,
            "ended": self.ended,
            "outcome": self.outcome,
            "plan": self.plan,
            "failures": self.failures,
            "switches": self.switches,
            "watches": self.watches,
            "spans": self.spans,
        }


def page(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page's template needs of the dict *report*: words, and a drawing in units of WIDTH."""
    plan = report["plan"]
    return {
        "report": report,
        "title": f"{MODES.get(plan.get('mode'), 'Deploy')} {plan.get('release') or ''}".strip(),
        "headline": headline(report),
        "began": moment(report["began"]),
        "seconds": report["ended"] - report["began"],
        "tiles": tiles(report),
        "drawing": drawing(report),
        "steps": steps(report["watches"]),
        "hosts": per_host(report),
    }


def moment(at: float) -> str:
    """Return the Unix time *at* for people."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def headline(report: Mapping[str, Any]) -> str:
    """Return in one sentence what happened."""
    plan, what = report["plan"], report["plan"].get("release") or "The release"
    if report["outcome"] == "refused":
        return f"{what} was refused before anything was touched."
    if report["outcome"] == "failed":
        undone = [span for span in report["spans"] if span["phase"] == "undo"]
        if not undone and not any(span["phase"] == "switch" for span in report["spans"]):
            return f"{what} failed before anything that serves was touched."
        if any(span["outcome"] in ("failed", "unreachable") for span in undone):
            return f"{what} failed, and not everything could be returned to what it was."
        return f"{what} failed, and the fleet was returned to what it was."
    if report["outcome"] == "unfinished":
        return f"{what} serves, but the deploy could not be finished everywhere."
    if report["outcome"] == "nothing":
        return f"Nothing was to do: deployment {plan.get('number')} was in service already."
    if plan.get("mode") == "tidy":
        return f"What an earlier deploy had left was put right; deployment {plan.get('number')} is in service."
    return f"{what} is in service: deployment {plan.get('number')}, slot {plan.get('slot')}, on {', '.join(plan.get('hosts', []))}."


def tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the figures on top: each a value, its unit and a caption."""
    plan = report["plan"]
    found = [_tile(f"{report['ended'] - report['began']:.1f}", "s", "from command to end")]
    hosts = len(plan.get("hosts") or [])
    if hosts:
        how = "host by host" if plan.get("rolling") else "all at once"
        found.append(
            _tile(str(hosts), "app host" + "s" * (hosts > 1), f"{how}, {len(plan.get('edges') or [])} edge(s)")
        )
    times = [switch["milliseconds"] for switch in report["switches"] if switch.get("milliseconds") is not None]
    if times:
        moments = [switch["at"] for switch in report["switches"]]
        skew = f", {1000 * (max(moments) - min(moments)):.0f} ms apart" if len(moments) > 1 else ""
        found.append(_tile(f"{max(times):.2f}", "ms", f"to switch an edge{skew}"))
    seen = [watch["figures"] for watch in report["watches"] if "figures" in watch]
    if seen:
        requests = sum(figures["requests"][0] for figures in seen)
        errors = sum(figures["errors"][0] for figures in seen)
        found.append(_tile(f"{requests:.0f}", "requests", f"watched on the new release, {errors:.0f} failed"))
    return found


def _tile(value: str, unit: str, caption: str) -> dict[str, str]:
    return {"value": value, "unit": unit, "caption": caption}


def drawing(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the timeline: rows of bars, marks of switches, ticks of seconds, and the height."""
    began, total = report["began"], max(report["ended"] - report["began"], 0.1)
    scale = (WIDTH - LABEL) / total

    def x(at: float) -> float:
        return float(round(LABEL + min(max(at - began, 0.0), total) * scale, 1))

    rows: list[dict[str, Any]] = []
    for number, host in enumerate(hosts(report)):
        bars = [
            {
                "x": x(span["began"]),
                "width": max(1.5, round((span["ended"] - span["began"]) * scale - 0.6, 1)),
                "phase": span["phase"] if span["phase"] in PHASES else "other",
                "bad": span["outcome"] in ("failed", "unreachable"),
                "label": f"{host}: {span['task']} ({span['phase']}), {span['ended'] - span['began']:.1f} s, {span['outcome']}",
            }
            for span in report["spans"]
            if span["host"] == host and span["ended"] - span["began"] >= GAP_SECONDS
        ]
        rows.append({"host": host, "y": number * ROW, "bars": bars})
    step = next((size for size in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600) if total / size <= 12), 1200)
    ticks = [{"x": x(began + second), "second": second} for second in range(0, int(total) + 1, step)]
    used = {bar["phase"] for row in rows for bar in row["bars"]}
    return {
        "rows": rows,
        "ticks": ticks,
        "switches": [{"x": x(each["at"]), "host": each["host"]} for each in report["switches"]],
        "height": len(rows) * ROW,
        "bar": BAR,
        "width": WIDTH,
        "left": LABEL,
        "legend": [phase for phase in (*PHASES, "other") if phase in used],
    }


def hosts(report: Mapping[str, Any]) -> list[str]:
    """Return the hosts in the order of the plan, edges first, then whoever else was seen."""
    plan = report["plan"]
    named = [*(plan.get("edges") or []), *(plan.get("hosts") or [])]
    seen = list(dict.fromkeys(span["host"] for span in report["spans"]))
    return [host for host in named if host in seen] + sorted(host for host in seen if host not in named)


def steps(watches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of the canary: what was tried, what was counted on either side, and the verdict."""
    found, task = [], ""
    for watch in watches:
        task = watch.get("task", task)
        figures = watch.get("figures")
        if not figures:
            continue
        sides = []
        for number, side in enumerate(("new", "old")):
            requests, errors = figures["requests"][number], figures["errors"][number]
            slow, jobs = figures["slow"][number], figures["jobs"][number]
            sides.append(
                {
                    "side": side,
                    "requests": f"{requests:.0f}",
                    "errors": f"{errors:.0f}",
                    "share": 100 * requests / max(1, sum(figures["requests"])),
                    "slow": f"{slow[0]:.0f} of {slow[1]:.0f}",
                    "jobs": f"{jobs[0]:.0f} of {jobs[1]:.0f}",
                }
            )
        found.append(
            {"task": task, "verdict": watch["verdict"], "reasons": list(watch.get("reasons") or []), "sides": sides}
        )
    return found


def per_host(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each host its tasks in order, each with when it began (seconds after the start) and how long it took."""
    return [
        {
            "host": host,
            "tasks": [
                {**span, "after": span["began"] - report["began"], "seconds": span["ended"] - span["began"]}
                for span in report["spans"]
                if span["host"] == host
            ],
        }
        for host in hosts(report)
    ]
