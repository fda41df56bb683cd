"""Writes reports/DEPLOY.html and .json of every deploy and rollback: who, what, and the timeline of each host and phase.

Owns the ear on Ansible; what is kept and drawn is module_utils/deploy_report.py's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible import context  # type: ignore[attr-defined]
from ansible.plugins.callback import CallbackBase
from jinja2 import Environment, FileSystemLoader

PROJECT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(PROJECT / "plugins" / "module_utils"))

from ansible.module_utils.deploy_report import Report, page  # noqa: E402

DOCUMENTATION = """
name: deploy_report
type: notification
short_description: An HTML report of every deploy
description:
  - Notes which task of the role deploy ran on which host from when to when, the plan, the canary's figures, and what failed.
  - Writes C(reports/DEPLOY.html) and C(reports/DEPLOY.json) in the checkout at the end, and says where.
  - Check mode, and a deploy that had nothing to do, leave no report.
requirements:
  - enabled in C(ansible.cfg)
"""

DIRECTORY = PROJECT / "reports"
KEPT = 200
"""Reports that stay; older ones go when a new one is written."""
QUIET = ("set_fact", "assert", "debug", "fail", "include_tasks", "import_role", "meta")
"""Actions that decide or say something and take no time worth drawing."""

TELLING = ("deploy_edge", "deploy_watch")
"""Modules whose results have something for the report."""


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Ansible's entry point."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "deploy_report"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._report = Report("", time.time())
        self._began: dict[tuple[str, str], float] = {}

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """The clock starts."""
        self._report = Report(Path(playbook._file_name).stem, time.time())

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        """A host begins with a task."""
        self._began[host.get_name(), task._uuid] = time.time()

    def v2_runner_on_ok(self, result: Any) -> None:
        """A host is done with a task."""
        self._ended(result, "changed" if result.is_changed() else "ok")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A host failed at a task."""
        self._ended(result, "failed")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host is gone."""
        self._ended(result, "unreachable")

    def _ended(self, result: Any, outcome: str) -> None:
        task, now = result.task, time.time()
        role = getattr(task, "_role", None)
        if role is None or role.get_name() != "deploy":
            return
        action = task.action.rpartition(".")[2]
        if action == "set_fact":
            self._report.facts(result.result.get("ansible_facts") or {}, now)
        if action in QUIET:
            return
        host, name = result.host.get_name(), result.task_name.rpartition(" : ")[2]
        self._report.note(host, name, self._began.get((host, task._uuid), now), now, outcome)
        if action in TELLING:
            for one in result.result.get("results") or [result.result]:
                self._report.result(host, name, one)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Everything is over."""
        plan = self._report.plan
        if not plan.get("deploy") or plan.get("nothing_to_do") or context.CLIARGS.get("check"):
            return
        path = DIRECTORY / f"{plan['deploy']}.html"
        try:
            write(self._report.as_dict(), path)
        except OSError as error:
            self._display.warning(f"The report could not be written: {error.filename}: {error.strerror}")
            return
        self._display.display(f"report: {path.relative_to(PROJECT)}")


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write *report* to *path* and its JSON beside it; raises OSError."""
    path.parent.mkdir(exist_ok=True)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    template = environment.get_template("deploy_report.html.j2")
    path.write_text(template.render(page(report)), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    for suffix in (".html", ".json"):
        for old in sorted(path.parent.glob(f"*{suffix}"))[:-KEPT]:
            old.unlink(missing_ok=True)
