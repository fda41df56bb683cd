"""What every check of a raised lab shares: the lab's access data, an HTTP client, and commands on its hosts."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY") or Path(__file__).resolve().parents[3])
LAB_NAME = os.environ.get("LAB_NAME") or f"test-{os.environ.get('MOLECULE_SCENARIO_NAME', 'default')}"


@dataclass
class Answer:
    """An HTTP answer: *status* (0 = no connection), lower-case *headers*, and the *body* parsed where it is JSON."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


@dataclass
class Lab:
    """A raised lab, as its ``access.json`` describes it."""

    name: str
    url: str
    token: str
    hosts: dict[str, str]
    ssh_key: str

    @property
    def folder(self) -> Path:
        """The lab's own folder."""
        return PROJECT / ".lab" / self.name

    @property
    def inventory(self) -> Path:
        """The lab's derived inventory."""
        return self.folder / "inventory"

    def group(self, name: str) -> list[str]:
        """Return the inventory names of the hosts in group *name*."""
        return list(self.facts().get(name, {}).get("hosts", []))

    def facts(self) -> dict[str, Any]:
        """Return ``ansible-inventory --list`` of the lab, secrets included: never print it."""
        if not hasattr(self, "_facts"):
            listing = subprocess.run(
                ["ansible-inventory", "-i", str(self.inventory), "--list"],
                cwd=PROJECT, env=self._environment(), check=True, capture_output=True, text=True,
            )  # fmt: skip
            self._facts: dict[str, Any] = json.loads(listing.stdout)
        return self._facts

    def ssh(self, host: str, script: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run *script* as root on *host*; it travels on standard input, so that no argument list shows it."""
        return subprocess.run(
            [
                "ssh", "-i", self.ssh_key, "-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}",
                "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ControlPath=none",
                f"deploy@{self.hosts[host]}", "sudo", "-n",
                "python3" if script.startswith("#python") else "bash", "-",
            ],
            input=script, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def playbook(self, name: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run ``playbooks/NAME.yml`` on the lab; returns the finished process with its output."""
        return subprocess.run(
            ["ansible-playbook", "-i", str(self.inventory), f"playbooks/{name}.yml", *arguments],
            cwd=PROJECT, env=self._environment(), capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def operate(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``bin/lab ARGUMENTS``, the named operations on lab hosts."""
        return subprocess.run(
            [str(PROJECT / "bin" / "lab"), *arguments],
            cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    @staticmethod
    def _environment() -> dict[str, str]:
        return {**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}

    def http(
        self, method: str, path: str, body: Any = None, token: str | None = "", base: str = "", timeout: float = 15
    ) -> Answer:
        """Send one request to the edge (or to *base*) without any retry; ``token=None`` sends none."""
        request = urllib.request.Request(f"{base or self.url.rstrip('/')}{path}", method=method)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token or self.token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, data=data, timeout=timeout) as answer:
                return _answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return _answer(error.code, error.headers, error.read())
        except OSError:
            return Answer(0)


def _answer(status: int, headers: Any, raw: bytes) -> Answer:
    lowered = {key.lower(): value for key, value in headers.items()}
    body: Any = raw.decode(errors="replace")
    if "json" in lowered.get("content-type", ""):
        body = json.loads(raw)
    return Answer(status, lowered, body)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The lab under test."""
    access = json.loads((PROJECT / ".lab" / LAB_NAME / "access.json").read_text())
    yield Lab(LAB_NAME, access["url"], access["token"], access["hosts"], access["ssh_key"])


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Poll a condition until it returns something true, or fail at the deadline with what it returned last."""

    def poll(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.3) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            result = condition()
            if result:
                return result
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:.0f} s: {what} (last: {result!r})")
            time.sleep(pause)

    return poll
