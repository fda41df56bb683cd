"""Ansible's screen output without what tells nobody anything, and with what goes on at the moment on a terminal.

Left out are plays without hosts and without a task that ran, included files, and facts and assertions that went well.
Messages for people are printed as they are. Each play says how long the run has taken so far.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ansible import constants as C  # noqa: N812 - as Ansible's own plugins do
from ansible.playbook.task_include import TaskInclude
from ansible.plugins.callback.default import CallbackModule as Default
from ansible.template import Templar, trust_as_template

DOCUMENTATION = """
name: atlas
type: stdout
short_description: Screen output that reads well during a deploy
description:
  - As the default output, without plays and tasks that did nothing, and with messages printed as they are.
  - On a terminal the last line says what is being done at the moment.
extends_documentation_fragment:
  - default_callback
  - result_format_callback
requirements:
  - set as stdout in configuration
"""

SILENT = ("set_fact", "assert", "validate_argument_spec")
SPOKEN = ("debug", "fail", "assert")
NEEDED = {"stdout", "stderr", "module_stdout", "module_stderr", "exception"}
"""Of a failure with one of these the message is not all."""


def action(result: Any) -> str:
    """Return the short name of the action of *result*'s task."""
    return str(result.task.action).rpartition(".")[2]


class CallbackModule(Default):  # type: ignore[misc]
    """The default output with some events told differently."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "atlas"

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._untold: Any = None
        self._on_terminal = sys.stdout.isatty()
        self._has_status = False

    # What goes on, on a terminal

    def _status(self, text: str) -> None:
        if self._on_terminal:
            sys.stdout.write(f"\r\033[K... {text[: self._display.columns - 5]}")
            sys.stdout.flush()
            self._has_status = True

    def _clear(self) -> None:
        if self._has_status:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()
            self._has_status = False

    # Plays and tasks

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Make ready to template here, once: every task on every host is a fork of this process, and would do so again (80 ms)."""
        super().v2_playbook_on_start(playbook)
        Templar().template(trust_as_template("{{ 1 | int }}"))

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Remember the play; it is announced with its first task that does something."""
        self._play, self._untold = play, play

    def _announce(self) -> None:
        self._clear()
        if self._untold is not None:
            play, self._untold = self._untold, None
            seconds = int(time.monotonic() - self._began)
            check = " [CHECK MODE]" if play.check_mode else ""
            self._display.banner(f"PLAY [{play.get_name().strip()}]{check} {seconds // 60}:{seconds % 60:02}")

    def _print_task_banner(self, task: Any) -> None:
        self._announce()
        super()._print_task_banner(task)

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Say on a terminal what is begun."""
        super().v2_playbook_on_task_start(task, is_conditional)
        self._status(task.get_name().strip())

    def v2_playbook_on_no_hosts_matched(self) -> None:
        """Say nothing of a play that has nothing to do."""

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Say nothing of how the code is divided."""

    # Results

    def _say(self, result: Any, color: str, stderr: bool = False) -> None:
        if self._last_task_banner != result.task._uuid:
            self._print_task_banner(result.task)
        self._display.display(str(result.result["msg"]).rstrip(), color=color, stderr=stderr)

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print messages as they are, and nothing of facts and assertions."""
        name, told = action(result), result.result
        if isinstance(result.task, TaskInclude):
            return
        if name in SILENT and not told.get("changed") and self._display.verbosity == 0:
            return
        self._clear()
        if name == "debug" and isinstance(told.get("msg"), str) and not result.task.loop:
            self._say(result, C.COLOR_OK)
        else:
            super().v2_runner_on_ok(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Print messages as they are; where they come from interests nobody who reads them."""
        self._clear()
        told = result.result
        plain = isinstance(told.get("msg"), str) and not result.task.loop and self._display.verbosity == 0
        if plain and action(result) in SPOKEN:
            self._say(result, C.COLOR_ERROR, self.get_option("display_failed_stderr"))
        elif plain and not NEEDED & told.keys():
            log = [f"  | {line}" for line in told.get("log") or []]
            told["msg"] = "\n".join([f"fatal: [{self.host_label(result)}]: FAILED! => {told['msg']}", *log])
            self._say(result, C.COLOR_ERROR, self.get_option("display_failed_stderr"))
            if ignore_errors:
                self._display.display("...ignoring", color=C.COLOR_SKIP)
        else:
            super().v2_runner_on_failed(result, ignore_errors)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """As the default, on a line of its own."""
        self._clear()
        super().v2_runner_on_unreachable(result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        """As the default, on a line of its own."""
        if self.get_option("display_skipped_hosts"):
            self._clear()
        super().v2_runner_on_skipped(result)

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """As the default, on a line of its own."""
        self._clear()
        super().v2_runner_item_on_ok(result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """As the default, on a line of its own."""
        self._clear()
        super().v2_playbook_on_stats(stats)
