"""Every role has the same skeleton, its specification and its defaults agree, and it knows nothing of the inventory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (PROJECT / "roles").iterdir() if path.is_dir())
TEMPLATES = sorted(PROJECT.glob("roles/*/templates/**/*.j2"))
SKELETON = ("defaults/main.yml", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml", "README.md")

# These hold a format without comments, so that no heading can be in them.
WITHOUT_COMMENTS = {"roles/haproxy/templates/503.http.j2": "an HTTP message, sent as it is"}

each_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) or {}


def options(role: Path) -> dict[str, dict[str, Any]]:
    """All options of a role's entry points, by name."""
    found: dict[str, dict[str, Any]] = {}
    for entry in load(role / "meta/argument_specs.yml")["argument_specs"].values():
        found |= entry.get("options", {})
    return found


@each_role
def test_skeleton(role: Path) -> None:
    assert [name for name in SKELETON if not (role / name).is_file()] == []


@each_role
def test_specification_and_defaults_agree(role: Path) -> None:
    specified = {name: spec["default"] for name, spec in options(role).items() if "default" in spec}
    assert specified == load(role / "defaults/main.yml")


@each_role
def test_every_option_is_required_or_has_a_default(role: Path) -> None:
    for name, spec in options(role).items():
        assert spec.get("required", False) != ("default" in spec), name


@each_role
def test_every_option_is_described_and_prefixed(role: Path) -> None:
    for name, spec in options(role).items():
        assert name.startswith(f"{role.name}_"), name
        assert spec.get("description"), f"{name}: description is missing"
        assert spec.get("type"), f"{name}: type is missing"


@each_role
def test_role_does_not_name_the_inventory(role: Path) -> None:
    pattern = re.compile(r"\bgroups\s*[\[.]|\bgroup_names\b|\bin groups\b|['\"]groups['\"]")
    sources = [
        path for kind in ("tasks", "handlers", "templates", "defaults", "vars") for path in (role / kind).rglob("*.*")
    ]
    named = [f"{path}:{n}" for path in sources for n, line in enumerate(lines(path), 1) if pattern.search(line)]
    assert named == [], "a role names an inventory group: hand the hosts in through a variable"


@each_role
def test_registers_and_facts_are_internal(role: Path) -> None:
    named = []
    for path in (role / "tasks").rglob("*.yml"):
        for n, line in enumerate(lines(path), 1):
            match = re.match(r"\s*register:\s*(\S+)", line)
            if match and not match[1].startswith(f"__{role.name}_"):
                named.append(f"{path}:{n}: {match[1]}")
    assert named == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_template_says_that_ansible_manages_it(template: Path) -> None:
    relative = template.relative_to(PROJECT).as_posix()
    if relative in WITHOUT_COMMENTS or is_part(template):
        return
    head = [line for line in lines(template)[:3] if not line.startswith(("#!", "{#"))]
    assert re.match(r"\{\{ ansible_managed \| comment\b.*\}\}$", head[0]), (
        f"{relative}: begin with {{{{ ansible_managed | comment }}}}"
    )


def is_part(template: Path) -> bool:
    """Tell whether another template of the role includes this one: then that one carries the heading."""
    others = (path.read_text() for path in template.parent.rglob("*.j2") if path != template)
    return any(
        re.search(rf"\{{%-?\s*(include|import|from)\s+['\"]{re.escape(template.name)}['\"]", text) for text in others
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
