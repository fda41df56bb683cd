"""Which runs of playbooks the leak test looks at, in this order: every playbook, or why it is not among them.

A run is the name of a playbook and its arguments. In arguments stand for the lab: {lab} its name, {inventory} its inventory,
{key} the file of its SSH key, {public} that key's public half, {folder} a directory for answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
ENVIRONMENT = "staging"
"""The lab has its shape: everything that has secrets, on five hosts."""


class Run(NamedTuple):
    """One run. *may_fail*: it also does its work where it ends in failure, by what it finds."""

    playbook: str
    arguments: tuple[str, ...] = ()
    may_fail: bool = False

    @property
    def name(self) -> str:
        """What tells it from other runs of the same playbook."""
        return " ".join([self.playbook, *(word for word in self.arguments if "{" not in word and word != "-e")])


def _given(**variables: object) -> tuple[str, str]:
    return "-e", json.dumps(variables)


CONFIRM = ("-e", f"confirm={ENVIRONMENT}")
RUNS = (
    Run("lab", ("-e", "lab_name={lab}", "-e", f"lab_environment={ENVIRONMENT}")),
    Run("site"),
    Run("deploy", ("-e", "deploy_force=true")),
    Run("backup", ("-e", "backup_label=leaks")),
    Run("restore_drill"),
    Run("status"),
    Run("survey", ("-e", "survey_file={folder}/survey", "-e", "survey_look=true", "-e", "survey_names=^(atlas|backup|deploy|haproxy|release)_")),
    Run("config_diff", ("-e", "a={inventory}", "-e", "b={inventory}")),
    # To the lab itself: nothing is promoted so, but both inventories and their hosts are looked at, and all gates.
    Run("promote", ("-e", "from={inventory}", "-e", "to={inventory}"), may_fail=True),
    Run("maintenance", ("-e", "maintenance=on")),
    Run("maintenance", ("-e", "maintenance=off")),
    Run("rotate_certificates", ("-e", "rotate_answer={folder}/certificates")),
    Run("rotate_hosts", _given(
        rotate_acts=["revoke", "database", "backup", "tls", "cut"], rotate_commands=[["keys", "retire-check", "--json"]],
        rotate_entry={}, rotate_old=[], rotate_login="",
    ) + ("-e", "rotate_answer={folder}/cut")),
    Run("rotate_keys", ("-e", "rotate_let_in='{public}'", "-e", "rotate_key={key}")),
    Run("rotate_secrets"),
    Run("rotate_secrets", ("-e", "rotate=backup,fernet,tls,ssh,vault")),
    Run("rotate_secrets", ("-e", "rotate=tokens,database", "-e", "revoke=now", *CONFIRM)),
    Run("ops_daily", may_fail=True),
    Run("ops_weekly", may_fail=True),
    Run("ops_monthly", may_fail=True),
    Run("patch", ("-e", "patch_hosts=app1", "-e", "patch_reboot=never"), may_fail=True),
    Run("rollback", CONFIRM),
    Run("restore", (*CONFIRM, "-e", "backup_restore_label=leaks")),
    Run("recover", CONFIRM),
    Run("unlock"),
    Run("retire", ("-e", "host=app2")),
    Run("lab_down", ("-e", "lab_name={lab}")),
)  # fmt: skip
"""The last one, which takes the lab down, comes after the search of its hosts."""

WITHOUT_INVENTORY = ("lab", "lab_down", "promote", "config_diff")
"""They are told what they work on in other ways."""

LEFT_OUT = {
    "deploy_phases": "deploy.yml and rollback.yml are this with their preflight",
    "deploy_hooks": "part of deploy_phases.yml",
    "deploy_undo": "part of deploy_phases.yml",
}


def forgotten() -> list[str]:
    """Return the playbooks that are neither run nor left out by name."""
    known = {run.playbook for run in RUNS} | LEFT_OUT.keys()
    return sorted({path.stem for path in PLAYBOOKS.glob("*.yml")} - known)
