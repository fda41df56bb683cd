"""What a rehearsal found: what the gates of promotion said, the reports of its deploy and rollback and the figures of its load, as a
verdict and as lines for people.

Pure. A report is what the callback deploy_report wrote (module_utils/deploy_report.py); load figures are those of tests/load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.promotion_plan import GATES, OF_SOURCE

PHASES = ("preflight", "lock", "stage", "migrate", "switch", "watch", "verify", "finish", "undo", "hooks")
Report = Mapping[str, Any]


@dataclass
class Rehearsal:
    """*deploy* and *rollback*: their reports, ``{}`` for one that did not run. *load*: figures and findings of the whole load.

    *before* and *during*: percentiles of latency in seconds, before the deploy and from its start on. *asked*: Unix time at
    which the rollback was asked for. *served*: the releases that answered after everything, by how many requests. *refused*: what
    speaks against the promotion, as GATE: REASON; nothing is deployed then.
    """

    environment: str
    candidate: str
    present: str
    deploy: Report = field(default_factory=dict)
    rollback: Report = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    during: Mapping[str, float] = field(default_factory=dict)
    asked: float = 0.0
    served: Mapping[str, int] = field(default_factory=dict)
    refused: Sequence[str] = ()

    @property
    def findings(self) -> list[str]:
        """Why the release should not go to the environment; empty where nothing speaks against it."""
        found = [f"the promotion was refused: {reason}" for reason in self.refused] or _failures(
            "the deploy", self.deploy
        )
        found += self.load.get("findings", [])
        if self.deploy.get("outcome") == "done":
            found += _failures("the rollback", self.rollback)
        elif self.present and set(self.served) != {self.present}:
            answered = ", ".join(f"{release} ({count})" for release, count in self.served.items()) or "nobody"
            what = "refused promotion" if self.refused else "failed deploy"
            found.append(f"after the {what} {self.present} should answer, but {answered} did")
        return found

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict with its figures, for JSON."""
        return {
            "environment": self.environment,
            "candidate": self.candidate,
            "present": self.present,
            "good": self.good,
            "findings": self.findings,
            "promotion": {"passed": self.passed, "refused": list(self.refused)},
            "load": {key: value for key, value in self.load.items() if key != "findings"},
            "latency": {"before": dict(self.before), "during": dict(self.during)},
            "deploy": {"seconds": seconds(self.deploy), "phases": phases(self.deploy), "canary": canary(self.deploy),
                       "switches": list(self.deploy.get("switches", []))},
            "rollback": {"seconds": seconds(self.rollback), "to_traffic": self.to_traffic},
        }  # fmt: skip

    @property
    def passed(self) -> list[str]:
        """The gates of the environment that let the release pass; those of the one before it are judged when it is promoted.

        Of an archive that is not good nothing more is known.
        """
        stopped = {reason.partition(":")[0] for reason in self.refused}
        if "signature" in stopped:
            return []
        return [gate for gate in GATES if gate not in stopped and gate not in OF_SOURCE]

    @property
    def to_traffic(self) -> float | None:
        """Seconds from asking for the rollback until the last edge had switched; None where none switched."""
        moments = [switch["at"] for switch in self.rollback.get("switches", [])]
        return max(moments) - self.asked if moments else None

    def told(self) -> list[str]:
        """Return the verdict in lines for people."""
        load, to_traffic = self.load, self.to_traffic
        lines = [
            f"Rehearsal of {self.environment}: {self.candidate}" + (f" after {self.present}" if self.present else ""),
            _line(
                "promotion",
                f"{'refused; passed: ' if self.refused else 'passed: '}{', '.join(self.passed) or 'nothing'}",
            ),
        ]
        if load.get("sent"):
            bound = f": fewer than {load['bound']:.1e} fail, with 95 % confidence" if "bound" in load else ""
            lines.append(
                _line(
                    "requests", f"{load['sent']} of {load['planned']} planned were sent, {load['failed']} failed{bound}"
                )
            )
        if self.before and self.during:
            (p50, p99), (b50, b99) = ((_ms(spread["p50"]), _ms(spread["p99"])) for spread in (self.during, self.before))
            lines.append(_line("latency", f"p50 {p50}, p99 {p99} from the deploy on; before it {b50} and {b99}"))
        if self.deploy:
            took = ", ".join(f"{phase} {value:.0f}" for phase, value in phases(self.deploy).items())
            lines.append(_line("deploy", f"{seconds(self.deploy):.0f} s" + (f": {took}" if took else "")))
        lines += [_line("canary", step) for step in canary(self.deploy)]
        switches = self.deploy.get("switches", [])
        if switches:
            moments = [switch["at"] for switch in switches]
            apart = f", {1000 * (max(moments) - min(moments)):.0f} ms apart" if len(moments) > 1 else ""
            lines.append(
                _line("switch", ", ".join(f"{one['host']} {one['milliseconds']:.1f} ms" for one in switches) + apart)
            )
        if self.rollback:
            after = f"served again after {to_traffic:.1f} s, " if to_traffic is not None else ""
            lines.append(_line("rollback", f"{after}{seconds(self.rollback):.0f} s in all"))
        verdict = "NOT GOOD" if self.findings else "GOOD: nothing speaks against this release"
        return [*lines, "", verdict, *(f"- {finding}" for finding in self.findings)]


def refused(output: str) -> list[str]:
    """Return what *output* of playbooks/promote.yml says against the promotion, as GATE: REASON; [] if it went through."""
    # It is in it more than once: as an error, and as what the playbook tells.
    return list(dict.fromkeys(re.findall(rf"^ *\d+\. ((?:{'|'.join(GATES)}): .*\S)", output, re.MULTILINE)))


def _line(name: str, text: str) -> str:
    return f"  {name:10}{text}"


def _ms(value: float) -> str:
    return f"{1000 * value:.0f} ms"


def _failures(what: str, report: Report) -> list[str]:
    if not report:
        return [f"{what} left no report: it ended before it could begin; see its output"]
    if report["outcome"] == "done":
        return []
    found = [str(finding) for finding in report["plan"].get("findings") or []]
    found += [f"{one['host']}, phase {one['phase']}: {str(one['message']).strip()}" for one in report["failures"]]
    return [f"{what} {'was refused' if report['outcome'] == 'refused' else 'failed'}: {one}" for one in found] or [
        f"{what} ended as {report['outcome']}"
    ]


def seconds(report: Report) -> float:
    """Return how long the playbook of *report* took."""
    return float(report["ended"] - report["began"]) if report else 0.0


def phases(report: Report) -> dict[str, float]:
    """Return phase → seconds from the first beginning to the last end in it, of phases that took a tenth of a second."""
    found = {}
    for phase in PHASES:
        spans = [span for span in report.get("spans", []) if span["phase"] == phase]
        took = max(span["ended"] for span in spans) - min(span["began"] for span in spans) if spans else 0.0
        if took >= 0.1:
            found[phase] = took
    return found


def canary(report: Report) -> list[str]:
    """Return what each step of the canary found, in words."""
    told: Sequence[Mapping[str, Any]] = [watch for watch in report.get("watches", []) if "told" in watch]
    return [f"{watch['verdict']}: {watch['told']}" for watch in told]
