"""Every module documents exactly the options that it takes, and supports check mode."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (PROJECT / "plugins/modules").glob("[!_]*.py"))
COMPARED = ("type", "required", "default", "choices", "elements")

each_module = pytest.mark.parametrize("name", MODULES)


class CapturedError(Exception):
    """Stops a module once it has told what it takes."""


def arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the module gives to AnsibleModule, without running it any further."""
    given: dict[str, Any] = {}

    def capture(*positional: Any, **keywords: Any) -> None:
        given.update(zip(["argument_spec"], positional, strict=False))
        given.update(keywords)
        raise CapturedError

    module = importlib.import_module(name)
    monkeypatch.setattr(module, "AnsibleModule", capture)
    with pytest.raises(CapturedError):
        module.main()
    return given


def documentation(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(importlib.import_module(name).DOCUMENTATION)
    return loaded


@each_module
def test_documentation_is_complete(name: str) -> None:
    module = importlib.import_module(name)
    about = documentation(name)
    assert about["module"] == name
    assert about["short_description"]
    assert about["description"]
    assert yaml.safe_load(module.EXAMPLES)
    assert yaml.safe_load(module.RETURN), "RETURN is missing"


@each_module
def test_documented_options_are_those_that_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(documentation(name).get("options", {}), arguments(name, monkeypatch)["argument_spec"], name)


@each_module
def test_check_mode_is_supported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments(name, monkeypatch).get("supports_check_mode") is True


def compare(documented: dict[str, Any], taken: dict[str, Any], where: str) -> None:
    assert documented.keys() == taken.keys(), where
    for option, spec in taken.items():
        about = documented[option]
        assert about.get("description"), f"{where}.{option}: description is missing"
        for key in COMPARED:
            missing = {"type": "str", "required": False}.get(key)
            assert about.get(key, missing) == spec.get(key, missing), (
                f"{where}.{option}: {key} differs from the documentation"
            )
        if "options" in spec:
            # Modules and roles have different words for it.
            compare(about.get("suboptions") or about["options"], spec["options"], f"{where}.{option}")
