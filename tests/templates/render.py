"""Renders a role's template as Ansible does, with the role's own defaults and variables, without a host."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

PROJECT = Path(__file__).resolve().parents[2]
FACTS = {
    "bookworm": {"distribution": "Debian", "distribution_major_version": "12"},
    "trixie": {"distribution": "Debian", "distribution_major_version": "13"},
}


def trusted(value: Any) -> Any:
    """Allow templates in *value*, as Ansible does for a role's own variables."""
    if isinstance(value, dict):
        return {key: trusted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [trusted(item) for item in value]
    return trust_as_template(value) if isinstance(value, str) else value


load_plugins = functools.cache(init_plugin_loader)


def render(role: str, template: str, codename: str, **variables: Any) -> str:
    """Text of ``roles/ROLE/templates/TEMPLATE`` for a Debian release; *variables* are what group_vars would hand in."""
    load_plugins()
    loader = DataLoader()
    loader.set_basedir(str(PROJECT))
    values: dict[str, Any] = {"ansible_facts": FACTS[codename], "inventory_hostname": "host1"}
    for name in ("defaults", "vars"):
        path = PROJECT / "roles" / role / name / "main.yml"
        if path.exists():
            values |= trusted(loader.load_from_file(str(path)) or {})
    path = PROJECT / "roles" / role / "templates" / template
    question = trust_as_template("{{ lookup('ansible.builtin.template', template_path) }}")
    text = Templar(loader=loader, variables=values | variables | {"template_path": str(path)}).template(question)
    assert isinstance(text, str)
    return text
