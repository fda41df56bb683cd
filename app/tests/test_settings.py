"""Settings, identity and keyring: what is accepted, and how what is wrong is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from atlas.crypto import Keyring, KeyringError
from atlas.db import slot_connections
from atlas.settings import Settings, SettingsError, load_identity, load_settings

GOOD = {"environment": "staging", "database_url": "postgresql+psycopg://atlas_a@192.0.2.1:5432/atlas"}

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a settings file and credentials, and point the environment at them."""

    def write(content: object, **credentials: str) -> None:
        path = tmp_path / "settings.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        for name, value in credentials.items():
            (tmp_path / f"atlas_{name}").write_text(value)
        monkeypatch.setenv("ATLAS_SETTINGS", str(path))
        monkeypatch.setenv("ATLAS_CREDENTIALS_DIRECTORY", str(tmp_path))

    return write


def findings() -> list[str]:
    with pytest.raises(SettingsError) as error:
        load_settings()
    return error.value.findings


def test_file_credentials_and_arguments_are_joined(write: Write) -> None:
    token = {"name": "t", "sha256": "0" * 64, "scopes": ["read"], "limits": None}
    write(GOOD | {"database_role": "atlas"}, fernet_keys="b\na\n", database_password="pw\n", tokens=json.dumps([token]))
    settings = load_settings(queue_limit=5)
    assert (settings.queue_limit, settings.database_role, settings.api_threads) == (5, "atlas", 8)
    assert settings.fernet_keys.get_secret_value() == "b\na"
    assert settings.database_password == SecretStr("pw")
    assert settings.tokens[0].name == "t"
    assert "pw" not in repr(settings)


@pytest.mark.parametrize("given", [{}, {"api_workers": 2}, {"api_threads": 3, "core_concurrency": 9, "api_workers": 4}])
def test_the_inventories_know_how_many_connections_a_slot_opens(write: Write, given: dict[str, int]) -> None:
    """Too few in PostgreSQL's max_connections, and a deploy, when both slots run, would find none left."""
    write(GOOD | given, fernet_keys="a", database_password="pw", tokens="[]")
    inventory = run_path(str(Path(__file__).parents[2] / "plugins" / "filter" / "atlas.py"))
    assert inventory["slot_connections"](given) == slot_connections(load_settings())


def test_a_token_without_limits_has_the_usual_ones(write: Write) -> None:
    given = ({}, {"limits": {"per_minute": 7}}, {"limits": None})
    specs = [{"name": str(n), "sha256": str(n) * 64, "scopes": ["read"]} | limits for n, limits in enumerate(given)]
    for settings, usual in (({}, (60, 1000)), ({"token_requests_per_minute": 5, "token_requests_per_hour": 9}, (5, 9))):
        write(GOOD | settings, tokens=json.dumps(specs))
        without, partly, none = (token.limits for token in load_settings().tokens)
        assert without is not None and (without.per_minute, without.per_hour) == usual
        assert partly is not None and (partly.per_minute, partly.per_hour) == (7, usual[1])
        assert none is None


def test_systemd_names_the_credentials_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(GOOD, fernet_keys="a")
    monkeypatch.delenv("ATLAS_CREDENTIALS_DIRECTORY")
    assert load_settings().fernet_keys.get_secret_value() == ""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_settings().fernet_keys.get_secret_value() == "a"


def test_every_finding_names_its_key(write: Write) -> None:
    write({"environment": "test", "queue_limit": 0, "colour": "red", "fetch_allow_networks": ["10.0.0.0/8", "x"]})
    found = findings()
    assert "colour: is not a setting" in found
    assert "database_url: is missing" in found
    assert [finding.split(":")[0] for finding in sorted(found)] == [
        "colour",
        "database_url",
        "environment",
        "fetch_allow_networks.1",
        "queue_limit",
    ]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"database_url": "mysql://h/x"}, "database_url: must begin with"),
        ({"database_url": "what?"}, "database_url: is not a database URL"),
        ({"database_url": "sqlite:///atlas.db"}, "database_url: needs an absolute path"),
        ({"database_url": "postgresql+psycopg://u:very-secret@h/x"}, "database_url: holds a password"),
        ({"database_url": "sqlite:////a.db", "api_workers": 2}, "api_workers: must be 1 on SQLite"),
        ({"database_url": "sqlite:////a.db", "database_role": "atlas"}, "database_role: must be null on SQLite"),
        ({"database_role": "atlas; DROP"}, "database_role: "),
        ({"heartbeat_seconds": 50}, "heartbeat_seconds: must be at most half"),
        ({"database_password": "very-secret"}, "database_password: is a secret"),
    ],
)
def test_what_is_wrong_is_said(write: Write, change: dict[str, object], finding: str) -> None:
    write(GOOD | change)
    (found,) = findings()
    assert found.startswith(finding)
    assert "very-secret" not in found


@pytest.mark.parametrize(("content", "finding"), [("a: [", "line 1: is not valid YAML"), ("- a", "must hold settings")])
def test_a_file_that_is_no_settings_is_refused(write: Write, content: str, finding: str) -> None:
    write(content)
    assert finding in findings()[0]


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_SETTINGS", "/nowhere/settings.yaml")
    assert findings() == ["/nowhere/settings.yaml: cannot be read: No such file or directory"]
    monkeypatch.delenv("ATLAS_SETTINGS")
    assert findings() == ["ATLAS_SETTINGS: is not set; it names the settings file of the deployment"]


def test_bad_credentials_are_named_but_not_shown(write: Write) -> None:
    write(GOOD, tokens="{very-secret")
    assert findings() == ["tokens: is not valid JSON"]
    write(GOOD, tokens='[{"name": "t", "sha256": "very-secret", "scopes": ["read"]}]')
    (found,) = findings()
    assert found.startswith("tokens.0.sha256: ") and "very-secret" not in found


def test_identity_comes_from_the_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(environment="development", host="h", database_url="sqlite:////a.db")
    monkeypatch.setenv("ATLAS_SLOT", "green")
    assert load_identity(settings).slot == "green"
    path = tmp_path / "deployment.json"
    path.write_text('{"id": 12, "release": "0.1.0-abc", "version": "0.1.0"}')
    monkeypatch.setenv("ATLAS_DEPLOYMENT", str(path))
    identity = load_identity(settings)
    assert (identity.deployment, identity.release, identity.host) == (12, "0.1.0-abc", "h")
    path.write_text("{}")
    with pytest.raises(SettingsError, match="deployment.json"):
        load_identity(settings)


def test_a_keyring_reads_what_older_keys_wrote() -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    written = Keyring([old]).encrypt("text")
    both = Keyring.from_secret(SecretStr(f"{new}\n{old}\n"))
    assert both.decrypt(written) == "text"
    assert Keyring([new]).decrypt(both.encrypt("text")) == "text", "the newest key encrypts"
    with pytest.raises(KeyringError, match="not in the keyring"):
        Keyring([new]).decrypt(written)
    assert both.fingerprints == [*Keyring([new]).fingerprints, *Keyring([old]).fingerprints]


@pytest.mark.parametrize(("keys", "message"), [([], "there is no key"), (["very-secret"], "key 1 is not a Fernet key")])
def test_a_bad_keyring_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(KeyringError, match=message) as error:
        Keyring(keys)
    assert "very-secret" not in str(error.value)
