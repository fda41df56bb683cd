"""What Ansible prints with the project's callback: all that tells something, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PLAYBOOK = """
- name: Nobody
  hosts: "{{ [] }}"
  tasks: [{name: Never, ansible.builtin.debug: {msg: never}}]
- name: Skipped
  hosts: localhost
  gather_facts: false
  tasks: [{name: Not this time, ansible.builtin.debug: {msg: never}, when: false}]
- name: Told
  hosts: localhost
  gather_facts: false
  tasks:
    - {name: A fact, ansible.builtin.set_fact: {a: 1}}
    - {name: An assertion, ansible.builtin.assert: {that: a == 1, quiet: true}}
    - {name: A message, ansible.builtin.debug: {msg: "first line\\n  second line"}}
    - {name: A change, ansible.builtin.command: "true"}
    - {name: In parts, ansible.builtin.include_tasks: part.yml}
    - {name: What went wrong, ansible.builtin.fail: {msg: "cause\\nremedy"}}
"""


FILTER = """
import os
IMPORTED_BY = os.getpid()
class FilterModule:
    def filters(self):
        return {"imported_by": lambda text: "this fork" if IMPORTED_BY == os.getpid() else "whoever forks"}
"""


def played(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the playbook ``play.yml`` in *folder* with the project's configuration."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local"]
    return subprocess.run(
        [*command, str(folder / "play.yml")], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False,
        env={**kept, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip


def test_plugins_of_templates_are_loaded_once_and_not_by_every_task(tmp_path: Path) -> None:
    (tmp_path / "filter_plugins").mkdir()
    (tmp_path / "filter_plugins" / "told.py").write_text(FILTER)
    task = "{name: Told, ansible.builtin.debug: {msg: \"imported by {{ 'x' | imported_by }}\"}}"
    (tmp_path / "play.yml").write_text(f"- {{hosts: localhost, gather_facts: false, tasks: [{task}]}}\n")
    run = played(tmp_path)
    assert "imported by whoever forks" in run.stdout.splitlines(), run.stdout + run.stderr


def test_output_tells_what_happened_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "part.yml").write_text("- {name: A part, ansible.builtin.command: 'false', failed_when: false}\n")
    run = played(tmp_path)
    assert run.returncode == 2, run.stderr
    lines = [line.rstrip("* ") for line in run.stdout.splitlines() if line and not line.startswith("localhost ")]
    assert re.fullmatch(r"PLAY \[Told\] \d+:\d\d", lines.pop(0))
    assert lines == [
        "TASK [A message]",
        "first line",
        "  second line",
        "TASK [A change]",
        "changed: [localhost]",
        "TASK [A part]",
        "changed: [localhost]",
        "TASK [What went wrong]",
        "cause",
        "remedy",
        "PLAY RECAP",
    ]
