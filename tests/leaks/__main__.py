"""Looks for the secrets of a lab where none may be: python -m tests.leaks --lab NAME [LOG...]

Every value of the lab's vault file is looked for plain, in base64 (wherever in a longer text it began) and URL-encoded: in the files, process
environments, argument lists and journal of every host of the lab, and in the files named as LOG. Exit status 1 if one is found.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
SEARCH = Path(__file__).with_name("search.py")
SHORTEST = 16
"""Shorter texts of a vault (names, scopes) are no secrets."""

ROOTS = ["/etc", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/usr/local", "/var"]
# What systemd decrypts for a unit, in memory that only root and the unit can read.
SKIP = ["/run/credentials"]


def strings(value: Any) -> Iterator[str]:
    """Yield every text in *value* that is long enough to be a secret."""
    if isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str) and len(value) >= SHORTEST:
        yield value


def forms(secret: str) -> set[bytes]:
    """Return *secret* plain, URL-encoded, and in base64 at each of the three offsets in a longer text."""
    raw = secret.encode()
    found = {raw, urllib.parse.quote(secret, safe="").encode()}
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + raw)
        # Both ends also depend on what stands beside the secret.
        inner = encoded[(0, 2, 3)[offset] :].rstrip(b"=")
        inner = inner[: len(inner) - len(inner) % 4] if (offset + len(raw)) % 3 == 0 else inner[:-1]
        found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def request(secrets: Sequence[str], roots: Sequence[str], system: bool) -> str:
    """Return what search.py reads."""
    needles = sorted({form.hex() for secret in secrets for form in forms(secret)})
    return json.dumps({"needles": needles, "roots": list(roots), "skip": SKIP, "system": system})


def on_controller(secrets: Sequence[str], logs: Sequence[Path]) -> list[str]:
    """Return which of *logs* (files or directories) hold one of *secrets*."""
    text = request(secrets, [str(log) for log in logs], False)
    return _lines(subprocess.run([sys.executable, str(SEARCH)], input=text, capture_output=True, text=True, check=True))


def on_host(access: dict[str, Any], directory: Path, address: str, secrets: Sequence[str]) -> list[str]:
    """Return the places on the host at *address* that hold one of *secrets*. They travel on stdin alone, as the script does."""
    ssh = [
        "ssh",
        "-i",
        access["ssh_key"],
        "-o",
        f"UserKnownHostsFile={directory / 'known_hosts'}",
        "-o",
        "IdentitiesOnly=yes",
    ]
    script = SEARCH.read_text().replace("json.load(sys.stdin)", f"json.loads({request(secrets, ROOTS, True)!r})")
    command = [*ssh, f"deploy@{address}", "sudo", "python3", "-"]
    return _lines(subprocess.run(command, input=script, capture_output=True, text=True, check=True))


def _lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stdout.splitlines()


def main() -> int:
    """Search, and print each place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lab", required=True)
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    arguments = parser.parse_args()
    directory = PROJECT / ".lab" / arguments.lab
    access = json.loads((directory / "access.json").read_text())
    vault = directory / "inventory/group_vars/all/vault.yml"
    view = [str(Path(sys.executable).with_name("ansible-vault")), "view", str(vault)]
    view += ["--vault-id", f"lab-{arguments.lab}@{directory / 'vault-password'}"]
    plain = subprocess.run(view, capture_output=True, text=True, check=True).stdout
    secrets = sorted({*strings(yaml.safe_load(plain)), (directory / "vault-password").read_text().strip()})
    found = [f"controller: {place}" for place in on_controller(secrets, arguments.logs)]
    for host, address in access["hosts"].items():
        found += [f"{host}: {place}" for place in on_host(access, directory, address, secrets)]
    print(
        "\n".join(found)
        or f"none of {len(secrets)} secrets was found on {len(access['hosts'])} hosts and in {len(arguments.logs)} logs"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
