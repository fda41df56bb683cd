"""Surveys: what one inventory says and has in service, read in a process of its own, because two given together merge.

Owns how ``playbooks/survey.yml`` is run, how secrets are masked in it, and how two inventories are compared.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.vault_spec import secret_strings

SECONDS = 900
MASK = "secret"
PRIVATE_KEY = "PRIVATE KEY-----"  # pragma: allowlist secret


class SurveyError(Exception):
    """An inventory that cannot be read; the message has what Ansible said."""


def directory(name: str, project: Path) -> Path:
    """Return the inventory *name*: of an environment, or a directory. Raises SurveyError."""
    for path in (project / "inventories" / name, Path(name) if os.path.isabs(name) else project / name):
        if (path / "environment.yml").is_file():
            return path
    known = ", ".join(sorted(path.parent.name for path in (project / "inventories").glob("*/environment.yml")))
    raise SurveyError(
        f"There is no inventory {name!r}. Environments: {known}. A directory with environment.yml will do too."
    )


def take(
    inventory: Path,
    project: Path,
    key: str = "",
    look: bool = True,
    archives: Path | None = None,
    also: str = "release_",
) -> dict[str, Any]:
    """Return the survey of *inventory*. *key* (hex) makes fingerprints of secrets that two surveys can compare.

    *also*: a further beginning of names of variables that are wanted. With *look* its hosts are looked at too, and the archive in
    service is fetched to *archives*. Raises SurveyError.
    """
    with tempfile.TemporaryDirectory(prefix="atlas-survey-") as folder:
        file = Path(folder) / "survey.json"
        extra = {"survey_file": str(file), "survey_look": look, "survey_archives": str(archives or "")}
        owners = sorted(path.parent.name for path in project.glob("roles/*/tasks"))
        extra["survey_names"] = f"^({also}|(promotion|release|rotation|{'|'.join(owners)})_)"
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(inventory)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {
            "ATLAS_SURVEY_KEY": key or secrets.token_hex(32),
            "ANSIBLE_CONFIG": str(project / "ansible.cfg"),
        }
        try:
            done = subprocess.run(
                [*command, "playbooks/survey.yml", "-e", json.dumps(extra)],
                cwd=project,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SurveyError(
                f"{inventory} was not read within {SECONDS} s. Which host hangs: ansible -i {inventory} all -m ping"
            ) from None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = [line for line in (done.stderr + done.stdout).splitlines() if re.search("ERROR|msg:|fatal", line)]
            raise SurveyError(f"{inventory} cannot be read: {' '.join(said[:4])[:1500] or 'no answer'}") from None
    return {**found, "inventory": str(inventory)}


def both(
    names: Sequence[str], project: Path, look: bool = True, archives: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the surveys of the two inventories *names*, side by side; archives are fetched from the first alone."""
    key, places = secrets.token_hex(32), [directory(name, project) for name in names]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(take, places[0], project, key, look, archives)
        second = pool.submit(take, places[1], project, key, look)
        return first.result(), second.result()


def table(lines: Sequence[Mapping[str, Any]], one: str, other: str) -> list[str]:
    """Return the result of :func:`differences` for people."""
    rows = [("VARIABLE", one, other, "ON")]
    rows += [(line["name"], line["a"], line["b"], " ".join(line["groups"])) for line in lines]
    widths = [min(60, max(len(row[column]) for row in rows)) for column in range(3)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def components(sbom: Mapping[str, Any]) -> dict[str, str]:
    """Return name → version of what a CycloneDX bill of materials lists."""
    return {str(each["name"]): str(each["version"]) for each in sbom.get("components", [])}


# Secrets


def masked(variables: Mapping[str, Any], vault: Sequence[Any], key: str) -> dict[str, Any]:
    """Return *variables* with everything that holds a secret of *vault* replaced by ``{"secret": fingerprint}``.

    A value is secret if one of its strings contains one of the vault's, or its SHA-256, or a private key, which may be in a file of
    its own; all of a variable's credentials are.
    """
    known = secret_strings(vault)
    known |= {hashlib.sha256(text.encode()).hexdigest() for text in known}
    return {
        name: _fingerprint(value, key) if name.endswith("_credentials") else _mask(value, known, key)
        for name, value in variables.items()
    }


def _mask(value: Any, known: set[str], key: str) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _mask(each, known, key) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(each, known, key) for each in value]
    if isinstance(value, str) and (PRIVATE_KEY in value or any(text in value for text in known)):
        return _fingerprint(value, key)
    return value


def _fingerprint(value: Any, key: str) -> dict[str, str]:
    content = json.dumps(value, sort_keys=True, default=str).encode()
    return {MASK: hmac.new(key.encode(), content, hashlib.sha256).hexdigest()}


# Comparison


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what differs between two surveys: groups, name, and both values as text, ``-`` where one lacks it.

    Compared are the first hosts of each group, leaf by leaf; their own names and addresses are not a difference. A secret
    appears as *same* or *different*, always, because the same secret in two environments is worth a line too.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for group in sorted(one["groups"].keys() | other["groups"].keys()):
        left, right = _group(one, group), _group(other, group)
        for name in sorted(left.keys() | right.keys()):
            values = [side.get(name) for side in (left, right)]
            if any(isinstance(value, _Secret) for value in values):
                texts = _secret_texts(values)
            elif values[0] == values[1]:
                continue
            else:
                texts = ["-" if value is None else str(value) for value in values]
            found.setdefault((name, texts[0], texts[1]), []).append(group)
    counts = [
        (group, *(str(len(side["groups"].get(group, []))) for side in (one, other))) for group in _all(one, other)
    ]
    lines = [{"groups": [group], "name": "hosts", "a": a, "b": b} for group, a, b in counts if a != b]
    return lines + [{"groups": groups, "name": name, "a": a, "b": b} for (name, a, b), groups in sorted(found.items())]


def _all(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(one["groups"].keys() | other["groups"].keys())


class _Secret(str):
    """The fingerprint of a secret."""


def _secret_texts(values: Sequence[Any]) -> list[str]:
    if values[0] is None or values[1] is None:
        return ["-" if value is None else "a secret" for value in values]
    return ["secret", "same" if values[0] == values[1] else "different"]


def _group(survey: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return the leaves of the variables of the first host in *group*, in names that any environment shares."""
    members = survey["groups"].get(group, [])
    if not members:
        return {}
    addresses = {address: name for name, address in survey["addresses"].items()}
    places = {
        name: "/".join(each for each, hosts in sorted(survey["groups"].items()) if name in hosts)
        for name in survey["addresses"]
    }
    own = members[0]

    def neutral(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: neutral(each) for key, each in value.items()}
        if isinstance(value, list):  # of hosts that look alike, one stands for all
            once = {json.dumps(each, sort_keys=True): each for each in map(neutral, value)}
            return list(once.values())
        if not isinstance(value, str):
            return value
        if value in places:
            return "<this host>" if value == own else f"<{places[value]} host>"
        for address, host in addresses.items():
            value = value.replace(address, "<this host>" if host == own else f"<{places[host]} host>")
        return value

    variables = survey["variables"].get(own, {})
    return {path: leaf for name, value in variables.items() for path, leaf in _leaves(neutral(value), name)}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and set(value) == {MASK}:
        yield name, _Secret(value[MASK])
    elif isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}")
    elif isinstance(value, list) and value and any(isinstance(each, (dict, list)) for each in value):
        for index, each in enumerate(value, 1):
            yield from _leaves(each, f"{name}[{index}]")
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) if value else "[]"
    else:
        yield name, value
