"""The reports of operations checks as files of the controller: DIRECTORY/CHECK-TIME.json, one for each run, oldest pruned.

A value of the vault file is hidden before, whatever the hosts said.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.vault_spec import SHORT, secret_strings

KEPT = 400
"""Reports of each check that stay: a year of days."""
HIDDEN = "(hidden: a secret)"


def load(directory: Path) -> list[dict[str, Any]]:
    """Return the reports in *directory*, oldest first; what cannot be read is none."""
    found = []
    for path in directory.glob("*-*.json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            found.append((float(report["at"]), report))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [report for _, report in sorted(found, key=lambda each: each[0])]


def asked(directory: Path, check: str, host: str) -> float | None:
    """Return when the last report of *check* in *directory* that knows *host* asked it, by the host's own clock (Unix time)."""
    for path in sorted(directory.glob(f"{check}-*.json"), reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            moment = report["asked"].get(host) if "asked" in report else report["at"]
            return None if moment is None else float(moment)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def keep(report: Mapping[str, Any], directory: Path) -> Path:
    """Write *report* to *directory*, whole or not at all, and return where."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(float(report["at"])))
    path = directory / f"{report['check']}-{moment}.json"
    partial = path.with_suffix(".partial")
    text = json.dumps(report, indent=1, sort_keys=True) + "\n"
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)
    for old in sorted(directory.glob(f"{report['check']}-*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def hide(value: Any, secrets: Iterable[str]) -> Any:
    """Return *value* with every one of *secrets* in it hidden."""
    known = sorted(secrets, key=len, reverse=True)

    def hidden(one: Any) -> Any:
        if isinstance(one, Mapping):
            return {str(hidden(str(key))): hidden(each) for key, each in one.items()}
        if isinstance(one, (list, tuple)):
            return [hidden(each) for each in one]
        if isinstance(one, str):
            for text in known:
                one = one.replace(text, HIDDEN)
        return one

    return hidden(value)


def secrets(values: Any) -> list[str]:
    """Return the strings in *values* of a vault file that are secrets, whole and by line."""
    whole = secret_strings(values)
    return sorted(whole | {line for text in whole for line in text.splitlines() if len(line) >= SHORT})
