"""What every check of a raised lab shares: the lab's access data, an HTTP client, and questions to its hosts."""

from __future__ import annotations

import functools
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY") or Path(__file__).resolve().parents[1])
SERVICES = ("api", "core", "services", "monitoring")
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
    token: str = field(repr=False)
    hosts: dict[str, str]
    ssh_key: str
    ca: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """What playbooks get to see beside what this process sees."""

    @classmethod
    def open(cls, name: str) -> Lab:
        """Return the lab *name*, which was raised before."""
        access = json.loads((PROJECT / ".lab" / name / "access.json").read_text())
        return cls(name, access["url"], access["token"], access["hosts"], access["ssh_key"], access["ca"])

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
                cwd=PROJECT, env=self.for_playbooks(), check=True, capture_output=True, text=True,
            )  # fmt: skip
            self._facts: dict[str, Any] = json.loads(listing.stdout)
        return self._facts

    def ssh(self, host: str, script: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run *script* as root on *host*; it travels on standard input, so that no argument list shows it."""
        return subprocess.run(
            self._ssh(host, script), input=script, capture_output=True, text=True, timeout=timeout, check=False
        )

    def start(self, host: str, script: str) -> subprocess.Popen[str]:
        """Begin what :meth:`ssh` does, and leave it running; its standard output is a pipe."""
        process = subprocess.Popen(
            self._ssh(host, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        process.stdin.write(script)
        process.stdin.close()
        process.stdin = None
        return process

    def _ssh(self, host: str, script: str) -> list[str]:
        return self.command(host, "python3" if script.startswith("#python") else "bash", "-")

    def command(self, host: str, *words: str) -> list[str]:
        """Return the arguments of an ssh that runs *words* as root on *host*."""
        return [
            "ssh", "-i", self.ssh_key, "-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}",
            "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ControlPath=none",
            f"deploy@{self.hosts[host]}", "sudo", "-n", *words,
        ]  # fmt: skip

    def playbook(self, name: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run ``playbooks/NAME.yml`` on the lab; returns the finished process with its output."""
        return self.run(
            "ansible-playbook", "-i", str(self.inventory), f"playbooks/{name}.yml", *arguments, timeout=timeout
        )

    def run(self, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a program in the checkout, without what Molecule tells Ansible."""
        return subprocess.run(
            argv, cwd=PROJECT, env=self.for_playbooks(), capture_output=True, text=True, timeout=timeout, check=False
        )

    def operate(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``bin/lab ARGUMENTS``, the named operations on lab hosts."""
        return subprocess.run(
            [str(PROJECT / "bin" / "lab"), *arguments],
            cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """What a client of the lab trusts: its own authority, and no other."""
        return ssl.create_default_context(cafile=self.ca) if self.ca else None

    def for_playbooks(self) -> dict[str, str]:
        """Return the environment in which a playbook of this project runs, whatever the one of the tests is."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "MOLECULE_"))}
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
        return {**own, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0", **self.environment}

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
            with urllib.request.urlopen(request, data=data, timeout=timeout, context=self.tls) as answer:
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


def poll(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.3) -> Any:
    """Return what *condition* returns as soon as that is true; fail after *seconds* with what it returned last."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what} (last: {result!r})")
        time.sleep(pause)


def slot_in_service(lab: Lab, host: str) -> str:
    """Return the slot whose target boot starts: the one in service."""
    enabled = [
        slot
        for slot in ("blue", "green")
        if lab.ssh(host, f"systemctl is-enabled atlas@{slot}.target").stdout.strip() == "enabled"
    ]
    assert len(enabled) == 1, f"{host}: {enabled}"
    return enabled[0]


def properties(lab: Lab, host: str, unit: str) -> dict[str, str]:
    """Return ``systemctl show`` of *unit*."""
    shown = lab.ssh(host, f"systemctl show {unit}").stdout.splitlines()
    return dict(line.split("=", 1) for line in shown if "=" in line)


def sql(lab: Lab, host: str, statement: str, timeout: float = 120) -> str:
    """Run *statement* as the superuser on *host*."""
    script = f"cd / && runuser -u postgres -- psql -XAtd atlas -v ON_ERROR_STOP=1 <<'SQL'\n{statement}\nSQL\n"
    answer = lab.ssh(host, script, timeout)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def deployment(lab: Lab, host: str) -> int:
    """Return the id of the deployment in service on *host*."""
    slot = slot_in_service(lab, host)
    return int(json.loads(lab.ssh(host, f"cat /opt/atlas/slots/{slot}/deployment.json").stdout)["id"])
