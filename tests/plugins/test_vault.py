"""The secrets of an environment: their form, the password client, and the inventory plugin that opens the vault."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml
from ansible.module_utils.vault_spec import SECRETS, generate, mirror_errors, password_weakness, value_errors

PROJECT = Path(__file__).resolve().parents[2]
STRONG = "kM3-dh_28fJx0QpLr7TzVw1NcYb5EuSa9GoHiKj4XyZ"


def test_generated_values_pass_their_own_checks_and_differ() -> None:
    first, second = generate(), generate()
    assert value_errors(first) == []
    assert all(first[name] != second[name] for name in first)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("vault_atlas_database_password", "secret", "too short"),
        ("vault_atlas_database_password", "", "empty"),
        ("vault_atlas_database_password", "ab" * 40, "not random"),
        ("vault_atlas_fernet_keys", ["c2hvcnQ="], "32 bytes"),
        ("vault_atlas_fernet_keys", [], "list"),
        ("vault_atlas_tokens", [{"name": "a", "token": "atl_short", "scopes": []}], "malformed"),
        ("vault_atlas_tokens", [{"name": "a", "token": "atl_" + "x" * 43, "scopes": ["root"]}], "unknown scopes: root"),
        ("vault_atlas_tokens", [{"name": "a"}], "needs name, token and scopes"),
        ("vault_atlas_database_login", "postgres", "must be one of atlas_a, atlas_b"),
        ("vault_atlas_database_next", {"name": "atlas_b"}, "must hold name, password"),
        ("vault_atlas_database_next", {"name": "root", "password": STRONG}, "must be one of"),
        (
            "vault_backup_previous",
            {"name": "atlas_backup", "password": STRONG, "repository_password": "a"},
            "too short",
        ),
        ("vault_haproxy_tls_pem", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "its private key"),
    ],
)
def test_a_weak_or_malformed_value_is_named_and_not_quoted(name: str, value: Any, says: str) -> None:
    (error,) = value_errors(generate() | {name: value})
    assert error.startswith(name)
    assert says in error
    assert "atl_x" not in error


def test_only_a_token_that_says_so_is_without_limits() -> None:
    given: tuple[dict[str, Any], ...] = ({"limits": None}, {}, {"limits": {"per_minute": 5}})
    entries = [{"name": "a", "token": "atl_" + "x" * 43, "scopes": ["read"]} | limits for limits in given]
    token_credentials = run_path(str(PROJECT / "plugins/filter/atlas.py"))["token_credentials"]
    made = json.loads(token_credentials(entries))
    assert [{key: entry[key] for key in entry.keys() & {"limits"}} for entry in made] == list(given)
    [operator] = generate()["vault_atlas_tokens"]
    assert json.loads(token_credentials([operator]))[0]["limits"] is None


def test_a_login_role_has_a_password_or_none() -> None:
    login_roles = run_path(str(PROJECT / "plugins/filter/atlas.py"))["login_roles"]
    assert login_roles(["a", "b"], [{"name": "b", "password": "x"}, {}]) == [
        {"name": "a"},
        {"name": "b", "password": "x"},
    ]


def test_missing_and_unknown_entries_are_named() -> None:
    vault = generate() | {"vault_other": 1}
    del vault["vault_atlas_tokens"]
    assert sorted(value_errors(vault)) == ["vault_atlas_tokens is missing", "vault_other is in no list of secrets"]


@pytest.mark.parametrize("password", ["0123456789" * 3, "0123456789abcdef" + "0" * 8, "a" * 200, "Tr0ub4dor&3"])
def test_short_passwords_are_refused(password: str) -> None:
    assert password_weakness(password)


@pytest.mark.parametrize("make", [lambda: secrets.token_urlsafe(32), lambda: secrets.token_hex(16)])
def test_generated_passwords_are_accepted(make: Any) -> None:
    assert all(password_weakness(make()) is None for _ in range(50))


def test_an_optional_entry_may_be_missing_where_it_is_mirrored() -> None:
    mirror = {"main.yml": "a: \"{{ vault_haproxy_tls_pem | default('') }}\""}
    assert value_errors(generate()) == [] and "vault_haproxy_tls_pem" not in generate()
    assert mirror_errors({}, mirror) == []
    assert len(mirror_errors({"vault_haproxy_tls_pem": ""}, {})) == 1


def test_mirrors_are_compared_on_both_sides() -> None:
    vault = {"vault_a": 1, "vault_b": 2}
    plain = {"main.yml": 'a: "{{ vault_a }}"\nc: "{{ vault_c }}"\n# b: "{{ vault_b }}"\n'}
    errors = mirror_errors(vault, plain)
    assert len(errors) == 2
    assert "main.yml uses vault_c" in errors[0]
    assert errors[1].startswith("vault_b ")


def test_the_projects_mirrors_match_the_specification() -> None:
    files = {str(path): path.read_text() for path in (PROJECT / "inventories/common/group_vars").rglob("*.yml")}
    assert mirror_errors({secret.name: None for secret in SECRETS}, files) == []


# --- the client -----------------------------------------------------------------------------------------------------


def client(tmp_path: Path, vault_id: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the client with an empty home and nothing else in the environment."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    shutil.copy(PROJECT / "bin/vault-client", tmp_path / "bin")
    return subprocess.run(
        [sys.executable, str(tmp_path / "bin/vault-client"), "--vault-id", vault_id],
        env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def private(path: Path, text: str, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def test_the_sources_are_asked_in_order(tmp_path: Path) -> None:
    private(tmp_path / "home/.config/atlas/vault/production", "from-file\n")
    assert client(tmp_path, "production").stdout == "from-file\n"
    command = "echo from-command"
    assert client(tmp_path, "production", ATLAS_VAULT_COMMAND=command).stdout == "from-command production\n"
    answer = client(
        tmp_path, "production", ATLAS_VAULT_COMMAND=command, ATLAS_VAULT_PASSWORD_PRODUCTION="from-variable"
    )
    assert answer.stdout == "from-variable\n"


def test_a_lab_has_its_own_file_and_no_other_source(tmp_path: Path) -> None:
    answer = client(tmp_path, "lab-x", ATLAS_VAULT_PASSWORD_LAB_X="never", ATLAS_VAULT_COMMAND="echo never")
    assert answer.returncode == 1
    assert "vault-password is missing" in answer.stderr
    assert "make up LAB=x" in answer.stderr
    private(tmp_path / ".lab/x/vault-password", "of-the-lab\n")
    assert client(tmp_path, "lab-x").stdout == "of-the-lab\n"


def test_no_source_is_one_message_that_names_all_three(tmp_path: Path) -> None:
    answer = client(tmp_path, "staging")
    assert answer.returncode == 1
    assert answer.stdout == ""
    for part in (
        "ATLAS_VAULT_PASSWORD_STAGING",
        "ATLAS_VAULT_COMMAND",
        ".config/atlas/vault/staging",
        "make vault ENV=staging",
    ):
        assert part in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    private(tmp_path / "home/.config/atlas/vault/staging", "x\n", 0o644)
    answer = client(tmp_path, "staging")
    assert answer.returncode == 1
    assert "chmod 600" in answer.stderr


def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "home/.config/atlas/vault/staging"
    path.mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    assert client(tmp_path, "staging").stderr == f"{path} cannot be read: Is a directory\n"
    path.rmdir()
    path.write_bytes(b"\xff\xfe\n")
    path.chmod(0o600)
    assert client(tmp_path, "staging").stderr == f"{path} cannot be read: it is not text\n"


def test_a_failing_command_is_reported_with_its_words(tmp_path: Path) -> None:
    answer = client(tmp_path, "staging", ATLAS_VAULT_COMMAND="sh -c 'echo locked >&2; exit 3'")
    assert answer.returncode == 1
    assert "locked" in answer.stderr


# --- a new vault ----------------------------------------------------------------------------------------------------


def new_vault(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Make the vault of an environment without one, with an empty home and nothing else in the environment."""
    for name in ("new-vault", "vault-client"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        shutil.copy(PROJECT / "bin" / name, tmp_path / "bin")
    shutil.copytree(PROJECT / "plugins/module_utils", tmp_path / "plugins/module_utils", dirs_exist_ok=True)
    private(tmp_path / "inventories/shop/hosts.yml", "all: {hosts: {one: {}}}\n")
    private(tmp_path / "inventories/shop/environment.yml", "plugin: environment\nvault_id: shop\n")
    return subprocess.run(
        [sys.executable, str(tmp_path / "bin/new-vault"), "shop"],
        env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_new_vault_gets_a_password_in_a_file_of_the_users_alone(tmp_path: Path) -> None:
    made = new_vault(tmp_path)
    assert made.returncode == 0, made.stderr
    file = tmp_path / "home/.config/atlas/vault/shop"
    assert file.stat().st_mode & 0o777 == 0o600 and password_weakness(file.read_text().strip()) is None
    vault = tmp_path / "inventories/shop/group_vars/all/vault.yml"
    assert vault.read_text().startswith("$ANSIBLE_VAULT;1.2;AES256;shop\n")


@pytest.mark.parametrize(
    ("manager", "says"),
    [("sh -c 'echo it is locked >&2; exit 3'", "it is locked"), ("true", "printed nothing"), ("/missing", "/missing")],
)
def test_beside_a_password_manager_no_password_is_written(tmp_path: Path, manager: str, says: str) -> None:
    """Its password, once it is unlocked, would be another: the vault would open for nobody who has only that."""
    made = new_vault(tmp_path, ATLAS_VAULT_COMMAND=manager)
    assert made.returncode == 1
    assert says in made.stderr and "Nothing was written" in made.stderr and "Traceback" not in made.stderr
    assert not (tmp_path / "home").exists() and not (tmp_path / "inventories/shop/group_vars").exists()


# --- the inventory plugin -------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the plugin needs, with an inventory of one host."""
    for name in ("plugins/inventory", "plugins/module_utils", "inventories/common"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    shutil.copy(PROJECT / "bin/vault-client", tmp_path / "bin")
    shutil.copy(PROJECT / "ansible.cfg", tmp_path)
    environment = tmp_path / "inventories/shop"
    (environment / "group_vars/all").mkdir(parents=True)
    (environment / "environment.yml").write_text("plugin: environment\nvault_id: shop\n")
    (environment / "hosts.yml").write_text("all: {hosts: {one: {ansible_connection: local}}}\n")
    mirrors = "".join(f'{secret.name.removeprefix("vault_")}: "{{{{ {secret.name} }}}}"\n' for secret in SECRETS)
    (environment / "group_vars/all/main.yml").write_text(mirrors)
    return tmp_path


def encrypt(checkout: Path, password: str, values: dict[str, Any], vault_id: str = "shop") -> Path:
    vault = checkout / "inventories/shop/group_vars/all/vault.yml"
    private(checkout / "password", password)
    tool = str(Path(sys.executable).with_name("ansible-vault"))
    arguments = ["encrypt", "--vault-id", f"{vault_id}@{checkout / 'password'}", "--output", str(vault), "-"]
    subprocess.run([tool, *arguments], input=yaml.safe_dump(values), text=True, capture_output=True, check=True)
    return vault


def ask(checkout: Path, password: str | None, expression: str = "atlas_database_password") -> tuple[int, str]:
    """Evaluate an expression with the inventory; exit status and all output."""
    return run(checkout, password, ["ansible", "one", "-m", "debug", "-a", f"var={expression}"])


def run(checkout: Path, password: str | None, command: list[str], **more: str) -> tuple[int, str]:
    """Run one of Ansible's commands on the inventory, with *more* in its environment; exit status and all output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ATLAS_", "ANSIBLE_"))}
    environment |= {"HOME": str(checkout / "home"), "ANSIBLE_CONFIG": str(checkout / "ansible.cfg")}
    if password:
        environment["ATLAS_VAULT_PASSWORD_SHOP"] = password
    environment |= more
    result = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), "-i", "inventories/shop", *command[1:]],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_right_password_opens_the_vault(checkout: Path) -> None:
    values = generate()
    encrypt(checkout, STRONG, values)
    status, output = ask(checkout, STRONG)
    assert status == 0, output
    assert values["vault_atlas_database_password"] in output


@pytest.mark.parametrize(
    ("password", "says"),
    [
        (None, "No password for the vault id shop"),
        ("Another-" + STRONG, "does not open"),
        ("short", "shop, from the variable ATLAS_VAULT_PASSWORD_SHOP, is too short"),
    ],
)
def test_no_wrong_or_short_password_is_one_clear_error(checkout: Path, password: str | None, says: str) -> None:
    encrypt(checkout, STRONG, generate())
    status, output = ask(checkout, password)
    assert status != 0
    assert says in output
    assert output.count("ERROR") == 1
    assert "Traceback" not in output


UNSET = "the variable ATLAS_VAULT_PASSWORD_SHOP (not set)"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("variable", "It comes from the variable ATLAS_VAULT_PASSWORD_SHOP. "),
        ("command", f"It comes from the command in ATLAS_VAULT_COMMAND (tried before: {UNSET}). "),
        (
            "file",
            "It comes from the file {home}/.config/atlas/vault/shop (tried before: "
            f"{UNSET}, the command in ATLAS_VAULT_COMMAND (not set)). ",
        ),
    ],
)
def test_a_wrong_password_is_told_with_where_it_comes_from(checkout: Path, wrong: str, says: str) -> None:
    vault, other = encrypt(checkout, STRONG, generate()), f"Another-{STRONG}"
    private(checkout / "home/.config/atlas/vault/shop", other if wrong == "file" else STRONG)
    manager = checkout / "manager"
    private(manager, f"#!/bin/sh\necho {other}\n", 0o700)
    more = {"ATLAS_VAULT_COMMAND": str(manager)} if wrong == "command" else {}
    touch = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.command": "touch touched"}]}
    (checkout / "play.yml").write_text(yaml.safe_dump([touch]))
    status, output = run(checkout, other if wrong == "variable" else None, ["ansible-playbook", "play.yml"], **more)
    assert status != 0 and output.count("ERROR") == 1 and "Traceback" not in output, output
    assert f"The password of the vault id shop does not open {vault}. {says.format(home=checkout / 'home')}" in output
    assert other not in output and not (checkout / "touched").exists()


def test_a_vault_without_a_needed_secret_is_refused(checkout: Path) -> None:
    values = generate()
    del values["vault_atlas_tokens"]
    encrypt(checkout, STRONG, values)
    status, output = ask(checkout, STRONG)
    assert status != 0
    assert "vault_atlas_tokens is missing" in output
    assert values["vault_atlas_database_password"] not in output


def test_a_vault_file_in_clear_is_refused(checkout: Path) -> None:
    (checkout / "inventories/shop/group_vars/all/vault.yml").write_text("vault_atlas_tokens: []\n")
    status, output = ask(checkout, STRONG)
    assert status != 0
    assert "is not encrypted" in output


def test_another_environments_vault_is_refused(checkout: Path) -> None:
    encrypt(checkout, STRONG, generate(), vault_id="production")
    status, output = ask(checkout, STRONG)
    assert status != 0
    assert "carries the vault id production" in output


def test_without_a_vault_file_a_secret_says_how_to_make_one(checkout: Path) -> None:
    status, output = ask(checkout, None, "ansible_connection")
    assert status == 0, output
    _, output = ask(checkout, None)
    assert "make vault ENV=shop" in output


def test_without_a_vault_file_no_playbook_touches_a_host(checkout: Path) -> None:
    """A role that needs no secret would go ahead, and the next one stop half-way."""
    marker = checkout / "touched"
    touch = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.command": f"touch {marker}"}]}
    (checkout / "play.yml").write_text(yaml.safe_dump([touch]))
    status, output = run(checkout, None, ["ansible-playbook", "play.yml"])
    assert status != 0
    assert "shop has no vault file: make vault ENV=shop. Nothing was done." in output
    assert not marker.exists()
    status, output = run(checkout, None, ["ansible-playbook", "--syntax-check", "play.yml"])
    assert status == 0, output
