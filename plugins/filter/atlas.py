"""Filters that turn inventory data into what roles take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

DOCUMENTATION = """
name: token_credentials
short_description: API tokens as the service stores them
description: Replaces each token by its SHA-256 digest and returns the list as JSON.
positional: _input
options:
  _input:
    description: >-
      Tokens, each with C(name), C(token), C(scopes) and C(limits). Without C(limits) a token has the usual ones; one
      that is to have none says C(limits: null).
    type: list
    elements: dict
    required: true
"""


def token_credentials(tokens: Iterable[Mapping[str, Any]]) -> str:
    """Return *tokens* as the JSON credential ``tokens``: name, sha256 (hex), scopes, limits if given.

    A token that replaces another (``previous``: token and expires_at, Unix time in ms) is followed by that one.
    """
    specs = []
    for token in tokens:
        spec = {
            "name": token["name"],
            "sha256": hashlib.sha256(token["token"].encode()).hexdigest(),
            "scopes": list(token["scopes"]),
        } | {key: token[key] for key in ("limits",) if key in token}
        specs.append(spec)
        previous = token.get("previous")
        if previous:
            old = hashlib.sha256(previous["token"].encode()).hexdigest()
            specs.append({**spec, "sha256": old, "expires_at": int(previous["expires_at"])})
    return json.dumps(specs, sort_keys=True)


def slot_connections(settings: Mapping[str, Any], api_workers: int = 1) -> int:
    """Return how many connections to PostgreSQL the services of a slot open at most, by its *settings*.

    *api_workers* is what the settings mean where they do not say. The service has the same as ``atlas.db.slot_connections``; one of
    its tests compares them.
    """
    api = int(settings.get("api_workers", api_workers)) * (int(settings.get("api_threads", 8)) + 3)
    return api + int(settings.get("core_concurrency", 4)) + 14


def key_fingerprint(key: str) -> str:
    """Return the name of a Fernet *key* in journals (``rotation.fingerprint``), which says nothing about it."""
    return hashlib.sha256(b"atlas-key:" + key.encode()).hexdigest()[:12]


def login_roles(names: Iterable[str], logins: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the roles *names* of PostgreSQL, each with the password that *logins* (name, password) give it, if they do.

    An empty entry of *logins* counts for nothing; a role without a password cannot log in.
    """
    passwords = {login["name"]: login["password"] for login in logins if login}
    return [{"name": name} | ({"password": passwords[name]} if name in passwords else {}) for name in names]


class FilterModule:
    """Ansible's entry point to the filters above."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "key_fingerprint": key_fingerprint,
            "token_credentials": token_credentials,
            "slot_connections": slot_connections,
            "login_roles": login_roles,
        }
