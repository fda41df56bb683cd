"""Looks for the secrets of a lab where none may be: on its hosts, in what playbooks said, and in what they left on the controller.

Every value of the lab's vault file, its password, and its private keys are looked for plain, in base64 (wherever in a longer text
it began) and URL-encoded.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
SEARCH = Path(__file__).with_name("search.py")
SHORTEST = 16
"""Shorter texts of a vault (names, scopes) are no secrets."""

ROOTS = ["/boot", "/dev/shm", "/etc", "/home", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/var"]
# What systemd decrypts for a unit, in memory that only root and the unit can read; and where HAProxy reads its key from.
SKIP = ["/run/credentials", "/etc/haproxy/tls"]
OWN = ("access.json", "host_keys/*", "ssh_key", "tls/*", "vault-password")
"""What a lab's folder is there to hold."""

_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.+?)\n-----END", re.DOTALL)


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


def key_line(pem: str) -> str:
    """Return a line of the private key in *pem* that no other key has; a log may hold its lines with anything between them."""
    found = _KEY.search(pem)
    assert found, "there is no private key"
    lines = found[1].split("\n")
    return lines[len(lines) // 2]


def secrets_of(lab: Path) -> set[str]:
    """Return what is secret now in the lab whose folder is *lab*."""
    vault, password = lab / "inventory/group_vars/all/vault.yml", lab / "vault-password"
    view = [str(Path(sys.executable).with_name("ansible-vault")), "view", str(vault)]
    plain = subprocess.run(
        [*view, "--vault-id", f"lab-{lab.name}@{password}"], capture_output=True, text=True, check=True
    ).stdout
    keys = [lab / "ssh_key", *(path for path in lab.glob("tls/*") if "PRIVATE KEY" in path.read_text())]
    return {*strings(yaml.safe_load(plain)), password.read_text().strip(), *(key_line(key.read_text()) for key in keys)}


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


def request(secrets: Iterable[str], roots: Sequence[str], system: bool) -> str:
    """Return what search.py reads."""
    needles = sorted({form.hex() for secret in secrets for form in forms(secret)})
    return json.dumps({"needles": needles, "roots": list(roots), "skip": SKIP, "system": system})


def on_controller(secrets: Iterable[str], logs: Sequence[Path]) -> list[str]:
    """Return which of *logs* (files or directories) hold one of *secrets*."""
    text = request(secrets, [str(log) for log in logs], False)
    done = subprocess.run([sys.executable, str(SEARCH)], input=text, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def on_host(lab: Path, host: str, secrets: Iterable[str]) -> list[str]:
    """Return the places on *host* of the lab in the folder *lab* that hold one of *secrets*. They travel on stdin alone."""
    access = json.loads((lab / "access.json").read_text())
    ssh = [
        "ssh",
        "-i",
        access["ssh_key"],
        "-o",
        f"UserKnownHostsFile={lab / 'known_hosts'}",
        "-o",
        "IdentitiesOnly=yes",
    ]
    script = SEARCH.read_text().replace("json.load(sys.stdin)", f"json.loads({request(secrets, ROOTS, True)!r})")
    command = [*ssh, f"deploy@{access['hosts'][host]}", "sudo", "python3", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{host} cannot be searched: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()


def left_here(lab: Path) -> list[Path]:
    """Return what playbooks leave on the controller: the lab's folder but for what it is there for, reports, logs, caches."""
    own = {path for pattern in OWN for path in lab.glob(pattern)}
    files = [path for path in lab.rglob("*") if path.is_file() and not path.is_symlink() and path not in own]
    places = [PROJECT / "reports", PROJECT / ".cache/rotation", PROJECT / ".cache/vault", Path.home() / ".ansible"]
    return files + [place for place in places if place.exists()]


def leaks(lab: Path, secrets: Iterable[str], logs: Sequence[Path] = ()) -> list[str]:
    """Return every place, as HOST: PLACE, where one of *secrets* is: on the hosts, in *logs*, in what is left on the controller."""
    secrets = list(secrets)
    found = [f"controller: {place}" for place in on_controller(secrets, [*logs, *left_here(lab)])]
    for host in json.loads((lab / "access.json").read_text())["hosts"]:
        found += [f"{host}: {place}" for place in on_host(lab, host, secrets)]
    return found


class Arguments(threading.Thread):
    """Notes the arguments of every process that this machine sees while it runs, those of its labs included.

    Processes that end sooner than SECONDS can escape it. They are written to *file* when the block ends.
    """

    SECONDS = 0.1
    LOOKS = 3
    """A process is looked at so often: its arguments change when it becomes another program."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self._file, self._seen, self._end = file, set[bytes](), threading.Event()

    def __enter__(self) -> Arguments:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()
        self._file.write_bytes(b"\n".join(sorted(self._seen)))

    def run(self) -> None:
        """Look until the end."""
        looked: dict[Path, int] = {}
        while not self._end.wait(self.SECONDS):
            present = set(Path("/proc").glob("[0-9]*"))
            looked = {process: looked.get(process, 0) for process in present}
            for process in (process for process, times in looked.items() if times < self.LOOKS):
                looked[process] += 1
                try:
                    self._seen.add((process / "cmdline").read_bytes().replace(b"\0", b" "))
                except OSError:
                    continue
