"""What a patch run does on a host while an edge cannot be reached, by the role's own tasks.

They run on this machine; in place of what they would do to a host, modules note that they were called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
MODULES = (
    "atlas_services", "atlas_slot", "deploy_lease", "haproxy_maintenance", "haproxy_runtime", "host_packages",
)  # fmt: skip
NOTE = """#!/usr/bin/python
from ansible.module_utils import basic
params = basic._load_params()
with open({file!r}, "a") as stream:
    print({name!r}, params["state"], file=stream)
spec = {{key: {{"type": "raw"}} for key in params if not key.startswith("_ansible")}}
basic.AnsibleModule(argument_spec=spec).exit_json(changed=True, boot=[], stale=["atlas-api@blue.service"])
"""
STEP: dict[str, Any] = {
    "slot": "blue", "drain": False, "flip": False, "keep_up": 0, "keep": [], "pages": [], "edge": False, "app": True,
    "may_boot": False, "boot": [], "database": False, "downtime": False,
}  # fmt: skip


def patched(folder: Path, step: dict[str, Any], edges: dict[str, Any]) -> tuple[str, list[str]]:
    """Return what the run said, and the modules that were called, each with its state."""
    called = folder / "called"
    called.touch()
    for name in MODULES:
        (folder / f"{name}.py").write_text(NOTE.format(file=str(called), name=name))
    play = {
        "hosts": "app1",
        "gather_facts": False,
        "ignore_unreachable": True,
        "tasks": [{"ansible.builtin.import_role": {"name": "patch", "tasks_from": "host", "rolespec_validate": False}}],
    }
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    facts = {"slot": "blue", "slots": {"blue": 7}, "deployments": {"7": {"release": "1.0-a"}}}
    plan = {"deploy": "d1", "page": "", "steps": {"app1": STEP | step}, "serving": ["app1"]}
    variables = {"patch_edges": list(edges), "patch_app_hosts": ["app1"], "atlas_settings": {"host": "app1"}}
    hosts = {"app1": here | {"__patch_plan": plan, "__patch_facts": facts}} | {
        name: here | other for name, other in edges.items()
    }
    (folder / "hosts.yml").write_text(json.dumps({"all": {"vars": variables, "hosts": hosts}}))
    (folder / "play.yml").write_text(json.dumps([play]))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    own = {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_INVENTORY_ENABLED": "yaml",
        "ANSIBLE_LIBRARY": str(folder),
        "ANSIBLE_SSH_RETRIES": "0",
    }
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(folder / "hosts.yml"), str(folder / "play.yml")],
        cwd=PROJECT, env=kept | own, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr, called.read_text().splitlines()


@pytest.mark.parametrize(
    ("step", "lost", "not_done"),
    [
        ({"drain": True}, "haproxy_runtime drained", ["atlas_services stopped", "host_packages upgraded"]),
        ({"flip": True}, "haproxy_runtime ready", ["haproxy_runtime switched", "atlas_slot finished"]),
        ({"flip": True}, "haproxy_runtime switched", ["atlas_slot finished"]),
    ],
    ids=["drained", "in front of the idle slot", "switched"],
)
def test_nothing_is_stopped_that_an_edge_out_of_reach_may_send_users_to(
    tmp_path: Path, step: dict[str, Any], lost: str, not_done: list[str]
) -> None:
    """The first edge has obeyed; then the second one cannot be reached."""
    kind = f"{{{{ 'ssh' if '{lost}' in lookup('ansible.builtin.file', '{tmp_path}/called') else 'local' }}}}"
    second = {"ansible_connection": kind, "ansible_host": "127.0.0.1", "ansible_port": 1}
    said, called = patched(tmp_path, step, {"edge1": {}, "edge2": second})
    assert called.count(lost) == 1 and not set(not_done) & set(called), said
    assert "cannot be reached any more" in said


def test_the_old_processes_are_stopped_where_every_edge_switched(tmp_path: Path) -> None:
    said, called = patched(tmp_path, {"flip": True}, {"edge1": {}, "edge2": {}})
    assert called[-5:] == [
        "haproxy_runtime drained", "atlas_slot finished", "atlas_services started", *["haproxy_runtime ready"] * 2,
    ], said  # fmt: skip
