"""Settings are checked on the controller by the service's own schema, and what is wrong is named with file and line."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import deploy
import pytest
from ansible.module_utils import release, settings_check

from tests.plugins import releases

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = ".".join(platform.python_version_tuple()[:2])
GOOD = {"environment": "staging", "host": "app1", "database_url": "sqlite:////var/lib/atlas/atlas.db"}
COMMON = """---
atlas_settings: "{{ atlas_settings_common | combine(atlas_settings_environment) }}"
atlas_settings_common:
  host: "{{ inventory_hostname }}"
  queue_limit: 5
"""
MAIN = """---
# A comment.
atlas_settings_environment:
  log_level: info

  queue_limit: many
  retries:
    timeout: {attempts: 0}
  no_such_setting: 1
"""


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `atlas` command of this checkout, in its own environment."""
    path = tmp_path_factory.mktemp("command") / "atlas"
    packages = PROJECT / f".cache/app-venv/lib/python{PYTHON}/site-packages"
    assert packages.is_dir(), "the app's environment is missing: make app-venv"
    path.write_text(
        f"import sys\nsys.path[:0] = [{str(PROJECT / 'app/src')!r}, {str(packages)!r}]\nfrom atlas.cli import main\nmain()\n"
    )
    return path


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    folder = tmp_path / "inventories/shop/group_vars/app"
    folder.mkdir(parents=True)
    (folder / "00-common.yml").write_text(COMMON)
    (folder / "main.yml").write_text(MAIN)
    (tmp_path / "inventories/shop/group_vars/all").mkdir()
    (tmp_path / "inventories/shop/group_vars/all/vault.yml").write_text("$ANSIBLE_VAULT;1.2;AES256;shop\n00\n")
    return tmp_path / "inventories/shop"


def test_good_settings_pass(command: Path) -> None:
    assert settings_check.ask(command, [GOOD, GOOD | {"host": "app2"}]) == [[], []]


def test_unknown_wrong_and_contradicting_settings_are_named_with_file_and_line(command: Path, inventory: Path) -> None:
    wrong = {"log_level": "info", "queue_limit": "many", "retries": {"timeout": {"attempts": 0}}, "no_such_setting": 1}
    settings = {"app1": GOOD | wrong, "app2": GOOD | wrong | {"host": "app2"}}
    found = settings_check.findings(command, settings, inventory, inventory.parents[1])
    path = "inventories/shop/group_vars/app/main.yml"
    assert len(found) == 3
    assert any(line.startswith(f"{path}:6: queue_limit: ") for line in found)
    assert any(line.startswith(f"{path}:8: retries.timeout.attempts: ") for line in found)
    assert f"{path}:9: no_such_setting: is not a setting (app1, app2)" in found


def test_a_contradiction_is_named_where_it_was_set(command: Path, inventory: Path) -> None:
    (inventory / "group_vars/app/main.yml").write_text("atlas_settings_environment:\n  heartbeat_seconds: 50\n")
    both = GOOD | {"heartbeat_seconds": 50}
    (found,) = settings_check.findings(command, {"app1": both}, inventory, inventory.parents[1])
    assert found.startswith("inventories/shop/group_vars/app/main.yml:2: heartbeat_seconds: must be at most half")


def test_a_setting_with_a_tag_of_ansibles_own_is_found_like_any(inventory: Path) -> None:
    (inventory / "group_vars/app/main.yml").write_text(
        "atlas_settings_environment:\n  user_agent: !unsafe 'a {{ b }}'\n"
    )
    assert [place.line for place in settings_check.places(inventory)["user_agent"]] == [2]


def test_a_release_is_asked_once_of_settings_that_it_is_content_with(
    command: Path, inventory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "1.0-abc" / release.LAUNCHER
    known_good = settings_check.memory(launcher)
    assert known_good.parent == tmp_path and known_good.name.startswith("."), "it is no part of the release"
    asked: list[str] = []
    ask = settings_check.ask

    def counted(command: Path, settings: list[dict[str, Any]]) -> list[list[str]]:
        asked.extend(each["host"] for each in settings)
        return ask(command, settings)

    monkeypatch.setattr(settings_check, "ask", counted)
    settings = {"app1": GOOD, "app2": GOOD | {"host": "app2", "queue_limit": "many"}}
    for _ in range(2):
        (found,) = settings_check.findings(command, settings, inventory, tmp_path, known_good=known_good)
        assert "queue_limit" in found and found.endswith("(app2)")
    assert sorted(asked) == ["app1", "app2", "app2"]
    settings["app1"] = GOOD | {"log_level": "debug"}
    settings_check.findings(command, settings, inventory, tmp_path, known_good=known_good)
    assert sorted(asked) == ["app1", "app1", "app2", "app2", "app2"], "other settings are another question"


def test_a_missing_setting_says_where_it_belongs(command: Path, inventory: Path) -> None:
    settings = {"app1": {key: value for key, value in GOOD.items() if key != "database_url"}}
    (found,) = settings_check.findings(command, settings, inventory, inventory.parents[1])
    assert "database_url: is missing (app1)" in found and "inventories/shop/group_vars/app/main.yml" in found


@pytest.mark.parametrize(("value", "line"), [(5, "00-common.yml:5"), ("many", "main.yml:6"), (9, "main.yml:6")])
def test_of_several_places_the_one_with_the_value_is_named(inventory: Path, value: Any, line: str) -> None:
    place = settings_check.where("queue_limit: x", {"queue_limit": value}, settings_check.places(inventory))
    assert place and f"{place.path.name}:{place.line}" == line


def test_a_release_is_unpacked_once_and_asked(tmp_path: Path) -> None:
    body = b"import sys\ndef main():\n    print('[{\"findings\": [\"queue_limit: ' + open(sys.argv[-1]).read()[2:4] + '\"]}]')\n"
    files = {"bin/atlas": (PROJECT / "app/bin/atlas").read_bytes(), f"python{PYTHON}/atlas/cli.py": body}
    archive = releases.make(tmp_path, python=PYTHON, files=files)
    digest = release.file_digest(archive)
    command = settings_check.launcher(archive, digest, tmp_path / "cache")
    before = command.stat().st_ino
    assert settings_check.ask(command, [{"xy": 1}]) == [["queue_limit: xy"]]
    assert settings_check.launcher(archive, digest, tmp_path / "cache").stat().st_ino == before
    command.write_text("import sys\nsys.exit('altered')\n")
    assert settings_check.ask(settings_check.launcher(archive, digest, tmp_path / "cache"), [{"xy": 1}]) == [
        ["queue_limit: xy"]
    ]


def test_a_release_that_cannot_be_asked_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(deploy, "PROJECT", tmp_path)
    archive = releases.make(tmp_path, python="3.98")
    file = deploy.release_file(str(archive), releases.signers(tmp_path), str(tmp_path))
    found = deploy.settings_checked(file, {"app1": GOOD}, str(tmp_path))
    assert found["settings"] == [] and "3.98" in found["unchecked"]
    with pytest.raises(settings_check.CheckError, match="boom"):
        (tmp_path / "broken").write_text("import sys\nsys.exit('boom')\n")
        settings_check.ask(tmp_path / "broken", [GOOD])
