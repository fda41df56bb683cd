"""The settings of an environment, checked on the controller by the release that has to live with them.

The release's own ``atlas config check`` is the schema, so that there is no second list of settings. Owns how it is unpacked
and asked here, and in which file and line of the inventory stands what it names. Hosts ask it again before they switch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible.module_utils import release

KEPT = 8
"""Releases that stay unpacked, those used last; they share their dependencies."""

SECONDS = 120
PREFIX = "atlas_settings"


class CheckError(Exception):
    """The release cannot be asked on this machine; says why."""


class Place(NamedTuple):
    """Where the inventory sets a setting: *value* is what stands there, which may be a template."""

    path: Path
    line: int
    variable: str
    value: Any


def launcher(archive: Path, digest: str, cache: Path) -> Path:
    """Return the ``atlas`` command of *archive* (verified, of the SHA-256 *digest*), unpacked below *cache*."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would unpack the same
        try:
            manifest = release.read_manifest(archive)
            release.check_python(manifest, python)
            place = cache / release.release_id(str(manifest["version"]), digest)
            if not release.is_intact(place, manifest, python):
                release.unpack(archive, manifest, python, place)
            os.utime(place)
        except (release.ReleaseError, OSError) as error:
            raise CheckError(str(error)) from None
        for old in sorted(cache.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
            memory(old / release.LAUNCHER).unlink(missing_ok=True)
    return place / release.LAUNCHER


def memory(command: Path) -> Path:
    """Return the file in which the marks of all settings stand that the release of *command* (see launcher) was content with."""
    place = command.parents[release.LAUNCHER.count("/")]
    return place.with_name(f".content-{place.name}")


def mark(settings: Mapping[str, Any]) -> str:
    """Return what tells *settings* from others: the same release says the same of them again, with the same Python."""
    return hashlib.sha256((sys.version + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def ask(command: Path, settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return for each of *settings* what the release of *command* finds wrong with it: ``KEY: what``, or words alone.

    One process reads them all: its start takes a hundred times longer than a file.
    """
    with tempfile.TemporaryDirectory(prefix="settings-") as directory:
        files = [Path(directory, f"{number}.yaml") for number in range(len(settings))]
        for file, each in zip(files, settings, strict=True):
            file.write_text(json.dumps(each))  # which is YAML too
        # Nothing of this machine's environment: a deployment has none of it either.
        done = subprocess.run(
            [sys.executable, "-ISB", str(command), "config", "check", "--json", *map(str, files)],
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    try:
        answers = json.loads(done.stdout)
        return [[str(finding) for finding in answer["findings"]] for answer, _ in zip(answers, files, strict=True)]
    except (ValueError, KeyError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise CheckError(f"its config check ends with: {last[0]}") from None


def places(inventory: Path) -> dict[str, list[Place]]:
    """Return setting (nested ones as ``a.b``) → where group_vars and host_vars of *inventory* set it, later ones stronger."""
    found: dict[str, list[Place]] = {}
    for path in _files(inventory):
        try:
            text = path.read_text(encoding="utf-8")
            node = None if text.startswith("$ANSIBLE_VAULT") else yaml.compose(text)
        except (OSError, yaml.YAMLError):
            continue
        for variable, below in _entries(node):
            if variable.value.startswith(PREFIX):
                for key, line, value in _keys(below, ""):
                    found.setdefault(key, []).append(Place(path, line, variable.value, value))
    return found


def _files(inventory: Path) -> list[Path]:
    paths = [path for kind in ("group_vars", "host_vars") for path in (inventory / kind).rglob("*.yml")]
    return sorted(paths, key=lambda path: ("host_vars" in path.parts, "all" not in path.parts, str(path)))


def _entries(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _keys(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int, Any]]:
    for key, below in _entries(node):
        name = f"{prefix}{key.value}"
        try:
            value = yaml.safe_load(yaml.serialize(below))
        except yaml.YAMLError:  # a tag of Ansible's: !unsafe, !vault
            value = None
        yield name, key.start_mark.line + 1, value
        yield from _keys(below, f"{name}.")


def where(finding: str, settings: Mapping[str, Any], known: Mapping[str, Sequence[Place]]) -> Place | None:
    """Return the place that the *finding* on *settings* is about: of several the one that took effect, as far as it shows."""
    key = finding.split(":", 1)[0]
    while key and key not in known:
        key = key.rpartition(".")[0]
    candidates = known.get(key, [])
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    strongest = sorted(candidates, key=lambda place: (place.value == value, place.variable.endswith("_environment")))
    return strongest[-1] if strongest else None


def findings(
    command: Path,
    settings: Mapping[str, Mapping[str, Any]],
    inventory: Path,
    top: Path,
    known_good: Path | None = None,
) -> list[str]:
    """Return all that the release of *command* refuses of *settings* (host → settings), each with file and line.

    Files are named relative to *top*. *known_good*: see memory; what stands there is not asked again. Raises CheckError where the
    release cannot be asked.
    """
    seen = set(known_good.read_text().split()) if known_good and known_good.exists() else set()
    new = {host: each for host, each in settings.items() if mark(each) not in seen}
    answers = dict(zip(new, ask(command, list(new.values())) if new else [], strict=True))
    if known_good and (good := [mark(new[host]) for host, found in answers.items() if not found]):
        with known_good.open("a") as stream:
            stream.write("".join(f"{each}\n" for each in good))
    known = places(inventory)
    hosts: dict[str, list[str]] = {}
    for host, found in answers.items():
        for finding in found:
            place = where(finding, settings[host], known)
            if place:
                start = f"{os.path.relpath(place.path, top)}:{place.line}: "
            else:
                file = os.path.relpath(inventory / "group_vars/app/main.yml", top)
                start = (
                    f"{PREFIX} (set it in {file}: {PREFIX}_environment): " if "is missing" in finding else f"{PREFIX}: "
                )
            hosts.setdefault(start + finding, []).append(host)
    return [f"{finding} ({', '.join(names)})" for finding, names in hosts.items()]
