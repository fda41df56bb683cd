"""Secrets are found before they are committed, and an audit that got no answer is no clean bill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
IDENTITY = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
# Written in parts, so that this file does not hold what it looks for.
PEM = "-----BEGIN RSA PRIVATE " + "KEY-----\n"
AWS = "AKIA" + "Z7QXW3ERTY5UIOP2"
TOKEN = "atl_" + "Zx9" * 14 + "q"
VAULT_PASSWORD = "Zx9" * 14 + "-"
PASSWORD = 'database_password = "' + "kM3dh28fJx0QpLr7" + '"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the scanner and its hook, and one harmless file."""
    for name in ("bin/scan-secrets", "bin/hooks/pre-commit"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / ".gitignore").write_text(".venv\n")
    (tmp_path / "settings.py").write_text('name = "atlas"\n')
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def git(checkout: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *IDENTITY, "-C", str(checkout), *arguments], capture_output=True, text=True, env=clean, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def scan(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "bin/scan-secrets"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("settings.py", PASSWORD, True),
        ("settings.py", f"key = '{AWS}'\n", True),
        ("tests/fixture.py", f"key = '{AWS}'\n", True),
        ("docs/page.md", f"curl -H 'Authorization: Bearer {TOKEN}'\n", True),
        ("tests/key.txt", PEM, True),
        ("production.txt", VAULT_PASSWORD + "\n", True),  # as it lies in ~/.config/atlas/vault
        ("production.txt", "a" * 43 + "\n", False),
        ("inventories/shop/group_vars/all/vault.yml", "vault_x: 1\n", True),
        ("inventories/shop/group_vars/all/vault.yml", "$ANSIBLE_VAULT;1.2;AES256;shop\n3636\n", False),
        ("inventories/shop/group_vars/all/release.yml", f"release_pin:\n  digest: {'0a1b2c3d' * 8}\n", False),
        ("tests/fixture.py", PASSWORD, False),  # made up: the tests are full of them
        ("settings.py", PASSWORD.strip() + "  # pragma: allowlist secret\n", False),
    ],
)
def test_what_looks_like_a_secret_is_named_and_not_quoted(checkout: Path, name: str, text: str, found: bool) -> None:
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text(text)
    done = scan(checkout)
    assert done.returncode == int(found), done.stdout + done.stderr
    assert done.stdout.startswith(f"{name}:1: ") is found
    for secret in (AWS, TOKEN, VAULT_PASSWORD, PASSWORD.split('"')[1]):
        assert secret not in done.stdout + done.stderr


def test_the_hook_judges_what_would_be_committed(checkout: Path) -> None:
    git(checkout, "config", "core.hooksPath", "bin/hooks")
    (checkout / "settings.py").write_text(PASSWORD)
    git(checkout, "add", "settings.py")
    (checkout / "settings.py").write_text('name = "atlas"\n')  # taken out, but not staged
    refused = git(checkout, "commit", "-qm", "leak", status=1)
    assert "settings.py:1: " in refused.stdout + refused.stderr
    git(checkout, "add", "settings.py")
    (checkout / "settings.py").write_text(PASSWORD)
    (checkout / "other.py").write_text("x = 1\n")
    git(checkout, "add", "other.py")
    git(checkout, "commit", "-qm", "clean")


def test_the_hook_sees_a_file_that_was_a_link(checkout: Path) -> None:
    """As group_vars that every environment shares are, until one has its own."""
    link = checkout / "shared.py"
    link.symlink_to("settings.py")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "link")
    link.unlink()
    link.write_text(PASSWORD)
    git(checkout, "add", "-A")
    assert scan(checkout, "--staged").stdout.startswith("shared.py:1: ")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (PASSWORD, 'name = "atlas"\n', True),  # taken out again: what was committed stays known
        (PASSWORD, PASSWORD.strip() + "  # pragma: allowlist secret\n", False),
        ('name = "atlas2"\n', 'name = "atlas"\n', False),
    ],
)
def test_what_a_commit_held_is_found_after_it_was_taken_out(
    checkout: Path, before: str, after: str, found: bool
) -> None:
    for text in (before, after):
        (checkout / "settings.py").write_text(text)
        git(checkout, "commit", "-qam", "change")
    done = scan(checkout)
    assert done.returncode == int(found), done.stdout + done.stderr
    commit = git(checkout, "rev-parse", "--short", "HEAD~1").stdout.strip()
    assert (f"commit {commit}, settings.py: " in done.stdout) is found
    assert PASSWORD.split('"')[1] not in done.stdout + done.stderr


def test_a_vault_file_has_to_be_encrypted_in_every_commit(checkout: Path) -> None:
    vault = checkout / "inventories/shop/group_vars/all/vault.yml"
    vault.parent.mkdir(parents=True)
    for number, text in enumerate(("36" * 40, "37" * 40, None)):
        vault.write_text(f"$ANSIBLE_VAULT;1.2;AES256;shop\n{text}\n" if text else "vault_x: 1\n")
        git(checkout, "add", "-A")
        git(checkout, "commit", "-qm", "change")
        assert scan(checkout).returncode == number // 2
    vault.unlink()
    git(checkout, "commit", "-qam", "gone")
    assert ", inventories/shop/group_vars/all/vault.yml: a vault file that is not encrypted" in scan(checkout).stdout


def audit() -> Any:
    loader = SourceFileLoader("audit", str(PROJECT / "bin/audit"))
    spec = spec_from_loader("audit", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


FLAW = {"id": "PYSEC-1", "fix_versions": ["1.1"]}


@pytest.mark.parametrize(
    ("report", "status", "says"),
    [
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, 0, "No vulnerability is known"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": [FLAW]}]}, 1, "a 1: PYSEC-1, mended in 1.1"),
        ({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, 3, "COULD NOT ASK about a: not found"),
        (
            {"dependencies": [{"name": "a", "skip_reason": "x"}, {"name": "b", "version": "1", "vulns": [FLAW]}]},
            1,
            "COULD NOT ASK about a",
        ),
        ({"dependencies": []}, 3, "COULD NOT ASK: it lists no package"),
        ({"error": "no route"}, 3, "COULD NOT ASK: no route"),
    ],
)
def test_an_audit_that_could_not_ask_says_so(report: dict[str, Any], status: int, says: str) -> None:
    lines, found = audit().verdict({"lock": report})
    assert found == status
    assert any(says in line for line in lines)
    assert ("No vulnerability is known." in lines) == (status == 0)


def test_an_audit_tool_that_fails_or_answers_rubbish_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tool = audit(), tmp_path / "pip-audit"
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    assert "error" in module.ask(tmp_path / "lock")
    tool.write_text("#!/bin/sh\necho oops >&2\nexit 1\n")
    tool.chmod(0o755)
    assert module.ask(tmp_path / "lock") == {"error": "oops"}
    tool.write_text(f"#!/bin/sh\necho '{json.dumps({'dependencies': []})}'\n")
    assert module.ask(tmp_path / "lock") == {"dependencies": []}
