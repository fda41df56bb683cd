"""Which runs of playbooks the leak test looks at, in this order: every playbook, or why it is not among them.

A run is the name of a playbook and its arguments. In arguments stand for the lab: {lab} its name, {inventory} its inventory,
{inventories} the directory of the environments that it is made from, {release} a release, {folder} a directory for answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
ENVIRONMENT = "staging"
"""Everything that has secrets: PostgreSQL, HTTPS, backups."""
HOSTS = {"host1": ("edge", "app", "backup"), "host2": ("app",), "host3": ("database",)}
"""Host of the lab → its groups: the fewest with which every playbook has something to do."""


class Run(NamedTuple):
    """One run. *says*: what a run that also ends in failure, by what it finds, has said when it did its work."""

    playbook: str
    arguments: tuple[str, ...] = ()
    says: str = ""


CONFIRM = ("-e", f"confirm={ENVIRONMENT}")
RUNS = (
    Run("lab", ("-e", "lab_name={lab}", "-e", f"lab_environment={ENVIRONMENT}", "-e", "lab_inventories={inventories}")),
    # On empty hosts, where all that is written is a difference.
    Run("site"),
    Run("deploy", ("-e", "release={release}")),
    Run("backup", ("-e", "backup_label=leaks")),
    Run("restore_drill"),
    Run("status"),
    Run("survey", ("-e", "survey_file={folder}/survey", "-e", "survey_look=true", "-e", "survey_names=^(atlas|backup|deploy|haproxy|release)_")),
    Run("config_diff", ("-e", "a={inventory}", "-e", "b={inventory}")),
    # From the lab to itself nothing is promoted, but both inventories and their hosts are looked at, and all gates.
    Run("promote", ("-e", "from={inventory}", "-e", "to={inventory}"), says="Against this promotion speaks"),
    Run("promote", ("-e", "release={release}", "-e", "to={inventory}")),
    Run("maintenance", ("-e", "maintenance=on")),
    Run("maintenance", ("-e", "maintenance=off")),
    Run("rotate_secrets"),
    Run("rotate_secrets", ("-e", "rotate=all", "-e", "revoke=now", *CONFIRM)),
    Run("ops_daily", says="report: "),
    Run("ops_weekly", says="report: "),
    Run("ops_monthly", says="report: "),
    Run("patch", ("-e", "patch_hosts=host2", "-e", "patch_reboot=never")),
    Run("rollback", CONFIRM),
    Run("recover", CONFIRM),
    Run("unlock"),
    Run("retire", ("-e", "host=host2")),
    Run("lab_down", ("-e", "lab_name={lab}")),
)  # fmt: skip
"""The first one raises the lab; the last one, which takes it down, comes after the search of its hosts."""

WITHOUT_INVENTORY = ("promote", "config_diff")
"""They read inventories by themselves, and refuse one."""
OF_THIS_MACHINE = ("lab", "lab_down")

IN_ROTATIONS = ("rotate_certificates", "rotate_hosts", "rotate_keys")
"""Run by rotate_secrets.yml, as talkative as itself; what they said is in the lab's rotation.log."""

LEFT_OUT = {
    "ops_quarterly": "runs only playbooks that are looked at here, in a lab of its own, which takes its secrets with it when it ends",
}


def imported(playbook: str) -> Iterator[str]:
    """Yield the playbooks that are part of *playbook*, by import."""
    for play in yaml.safe_load((PLAYBOOKS / f"{playbook}.yml").read_text()):
        if part := play.get("ansible.builtin.import_playbook"):
            yield Path(part).stem
            yield from imported(Path(part).stem)


def forgotten(folder: Path = PLAYBOOKS) -> list[str]:
    """Return the playbooks in *folder* that are neither run, by themselves or as part of another, nor left out by name."""
    run = {run.playbook for run in RUNS}
    known = run | {part for playbook in run for part in imported(playbook)} | {*IN_ROTATIONS} | LEFT_OUT.keys()
    return sorted({path.stem for path in folder.glob("*.yml")} - known)
