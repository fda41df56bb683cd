"""The secrets of an environment: what its vault file holds, how each is made, and what is refused.

This is the one list; the vault file of a lab, of a real environment and the check at every run come from it.
Values are checked for form and for at least 128 random bits: ansible-vault derives its key with 10,000 rounds only,
so a short password falls to guessing.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MINIMUM_BITS = 128
SHORT = 16
"""Shorter strings of a vault file (names, scopes) are no secrets, and hiding them would hide half of an inventory."""
TOKEN_SCOPES = ("ingest", "read", "operate")
_TOKEN = re.compile(r"atl_[A-Za-z0-9_-]{43}")
_REFERENCE = re.compile(r"\bvault_[a-z0-9_]+\b")


def secret_strings(values: Any) -> set[str]:
    """Return the strings in *values* of a vault file that are secrets."""
    return {text for text in _strings(values) if len(text) >= SHORT}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield str(value)


def random_password() -> str:
    """256 random bits as 43 characters that are safe in URLs and shells."""
    return secrets.token_urlsafe(32)


def random_fernet_key() -> str:
    """A key for cryptography.fernet: 32 random bytes, URL-safe base64."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def random_token() -> str:
    """An API token: the prefix `atl_` and 256 random bits."""
    return "atl_" + secrets.token_urlsafe(32)


def password_weakness(password: str) -> str | None:
    """Why a password is refused, or None.

    The bound is the length times the bits of the smallest alphabet that covers it, so it never overrates a hexadecimal
    string; a handful of distinct characters is refused whatever the length.
    """
    if not password:
        return "is empty"
    if re.fullmatch(r"[0-9]+", password):
        alphabet = 10
    elif re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", password):
        alphabet = 16
    elif re.fullmatch(r"[a-z]+|[A-Z]+", password):
        alphabet = 26
    else:
        alphabet = 64
    bits = int(len(password) * math.log2(alphabet))
    if bits < MINIMUM_BITS:
        return f"is too short: {bits} bits at most, {MINIMUM_BITS} are the minimum"
    if len(set(password)) < 8:
        return "repeats a few characters: it is not random"
    return None


def _fernet_weakness(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list of keys, newest first"
    for key in value:
        try:
            decoded = base64.urlsafe_b64decode(str(key))
        except (binascii.Error, ValueError):
            return "holds a key that is not URL-safe base64"
        if len(decoded) != 32:
            return "holds a key that is not 32 bytes long"
    if len(set(value)) != len(value):
        return "holds the same key twice"
    return None


def _password_weakness(value: Any) -> str | None:
    return password_weakness(value) if isinstance(value, str) else "must be a string"


def _tokens_weakness(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list of tokens"
    names = []
    for entry in value:
        if not isinstance(entry, Mapping) or not {"name", "token", "scopes"} <= set(entry):
            return "needs name, token and scopes in each entry"
        names.append(entry["name"])
        if not _TOKEN.fullmatch(str(entry["token"])):
            return f"holds a malformed token for {entry['name']!r}: expected atl_ and 43 characters"
        previous = entry.get("previous")
        if previous and not (
            _TOKEN.fullmatch(str(previous.get("token"))) and isinstance(previous.get("expires_at"), int)
        ):
            return f"needs token and expires_at in what {entry['name']!r} had before"
        unknown = set(entry["scopes"]) - set(TOKEN_SCOPES)
        if unknown:
            return f"gives {entry['name']!r} unknown scopes: {', '.join(sorted(unknown))}"
    return "names a token twice" if len(set(names)) != len(names) else None


def _pem_weakness(value: Any) -> str | None:
    blocks = set(re.findall(r"^-+BEGIN ([A-Z ]+)-+$", value if isinstance(value, str) else "", re.MULTILINE))
    if "CERTIFICATE" not in blocks or not any(block.endswith("PRIVATE KEY") for block in blocks):
        return "must hold a certificate, its chain and its private key, as PEM"
    return None


def _login_weakness(names: Collection[str], more: Collection[str] = ()) -> Callable[[Any], str | None]:
    """Check of a login beside the one in use: name, password, and *more* passwords that change with it."""
    keys = {"name", "password", *more}

    def weakness(value: Any) -> str | None:
        if not isinstance(value, Mapping) or set(value) != keys:
            return f"must hold {', '.join(sorted(keys))}"
        found = [_password_weakness(value[key]) for key in sorted(keys - {"name"})]
        return next(filter(None, found), _name_weakness(names)(value["name"]))

    return weakness


def _name_weakness(names: Collection[str]) -> Callable[[Any], str | None]:
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


DATABASE_LOGINS = ("atlas_a", "atlas_b")
BACKUP_LOGINS = ("atlas_backup", "atlas_backup_b")
"""Roles of PostgreSQL that take turns: the first is in use until the first rotation."""


SERIAL = "vault_serial"
"""In the vault file: how often a rotation has written it. No secret; absent until the first."""


def numbered(vault: Mapping[str, Any]) -> dict[str, Any]:
    """Return *vault* as a rotation writes it: with the serial after its own."""
    return {**vault, SERIAL: int(vault.get(SERIAL, 0)) + 1}


def _serial_weakness(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else "must be a whole number, 0 or more"


@dataclass(frozen=True)
class Secret:
    """One entry of the vault file; one that nobody can *make* is optional."""

    name: str
    make: Callable[[], Any] | None
    weakness: Callable[[Any], str | None]


SECRETS = (
    Secret("vault_atlas_fernet_keys", lambda: [random_fernet_key()], _fernet_weakness),
    Secret("vault_atlas_database_password", random_password, _password_weakness),
    Secret(
        "vault_atlas_tokens",
        lambda: [{"name": "operator", "token": random_token(), "scopes": list(TOKEN_SCOPES), "limits": None}],
        _tokens_weakness,
    ),
    Secret("vault_backup_repository_password", random_password, _password_weakness),
    Secret("vault_backup_database_password", random_password, _password_weakness),
    # Retired keys, deployed nowhere: a backup from before their rotation needs them.
    Secret("vault_atlas_fernet_escrow", None, _fernet_weakness),
    Secret("vault_haproxy_tls_pem", None, _pem_weakness),
    # Whose the password is: no secret, but the two change together. And, while a rotation goes on, what is good beside it.
    Secret("vault_atlas_database_login", None, _name_weakness(DATABASE_LOGINS)),
    Secret("vault_atlas_database_next", None, _login_weakness(DATABASE_LOGINS)),
    Secret("vault_atlas_database_previous", None, _login_weakness(DATABASE_LOGINS)),
    Secret("vault_backup_login", None, _name_weakness(BACKUP_LOGINS)),
    Secret("vault_backup_next", None, _login_weakness(BACKUP_LOGINS, ["repository_password"])),
    Secret("vault_backup_previous", None, _login_weakness(BACKUP_LOGINS, ["repository_password"])),
    Secret(SERIAL, None, _serial_weakness),
)
OPTIONAL = {secret.name for secret in SECRETS if secret.make is None}


def generate() -> dict[str, Any]:
    """New values for every secret that can be made, ready to be written as YAML or JSON."""
    return {secret.name: secret.make() for secret in SECRETS if secret.make}


def value_errors(vault: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a decrypted vault file; never quotes a value."""
    errors = [f"{name} is in no list of secrets" for name in vault if name not in {secret.name for secret in SECRETS}]
    for secret in SECRETS:
        if secret.name not in vault:
            errors += [f"{secret.name} is missing"] if secret.make else []
        else:
            weakness = secret.weakness(vault[secret.name])
            if weakness:
                errors.append(f"{secret.name} {weakness}")
    return errors


def mirror_errors(vault: Mapping[str, Any], plain: Mapping[str, str]) -> list[str]:
    """Compare the vault file with the plain group_vars that mirror it.

    plain: path of each group_vars file -> its text. Every vault_x named there must be in the vault, and every vault_x of
    the vault must be named there, so that neither side is a dead entry.
    """
    named: dict[str, str] = {}
    for path, text in plain.items():
        for line in text.splitlines():
            for name in _REFERENCE.findall(line.split("#", 1)[0]):
                named.setdefault(name, path)
    errors = [
        f"{path} uses {name}, which the vault file does not hold"
        for name, path in named.items()
        if name not in vault and name not in OPTIONAL
    ]
    errors += [f"{name} is in the vault file, but no group_vars file mirrors it" for name in vault if name not in named]
    return errors
