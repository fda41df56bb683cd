"""What must survive on a staging fleet: killed workers, reboots, and a release that cannot serve."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from labtest import PROJECT, SERVICES, Lab, deployment, properties, slot_in_service, sql


@contextmanager
def posts(lab: Lab, every: float) -> Iterator[list[tuple[float, int, str, str]]]:
    """POST a unique document on a fixed schedule meanwhile; collects (start, status, id, release) without any retry."""
    outcomes: list[tuple[float, int, str, str]] = []
    stop = threading.Event()

    def one() -> None:
        start = time.time()
        answer = lab.http("POST", "/v1/documents", {"content": uuid.uuid4().hex, "content_type": "text/plain"})
        identifier = answer.body["id"] if answer.status == 202 else ""
        outcomes.append((start, answer.status, identifier, answer.headers.get("x-atlas-release", "")))

    def schedule() -> None:
        threads: list[threading.Thread] = []
        due = time.monotonic()
        while not stop.is_set():
            thread = threading.Thread(target=one)
            thread.start()
            threads.append(thread)
            due += every
            stop.wait(max(0.0, due - time.monotonic()))
        for thread in threads:
            thread.join(30)

    runner = threading.Thread(target=schedule)
    runner.start()
    try:
        yield outcomes
    finally:
        stop.set()
        runner.join(60)


def settle(lab: Lab, identifiers: list[str], wait_for: Callable[..., Any]) -> None:
    """Wait until every document in *identifiers* is processed, and assert exactly one finish each."""
    host = lab.group("database")[0]
    inside = ",".join(f"'{identifier}'" for identifier in identifiers)
    pending = f"SELECT count(*) FROM jobs WHERE document_id IN ({inside}) AND state <> 'done'"
    wait_for(lambda: sql(lab, host, pending) == "0", 120, "every acknowledged document is processed", pause=1)
    finishes = sql(
        lab, host,
        "SELECT count(*), count(DISTINCT document_id) FROM job_events "
        f"WHERE event = 'finished' AND document_id IN ({inside})",
    )  # fmt: skip
    assert finishes == f"{len(identifiers)}|{len(identifiers)}"


def test_killing_a_worker_in_mid_job_loses_nothing(lab: Lab, wait_for: Callable[..., Any]) -> None:
    """300 documents while atlas-core is killed with SIGKILL five times: each is finished exactly once."""
    host = lab.group("app")[0]
    unit = f"atlas-core@{slot_in_service(lab, host)}.service"
    identifiers: list[str] = []
    killed = 0
    for number in range(300):
        body = {"content": f"{uuid.uuid4().hex} " * 400, "content_type": "text/plain"}
        answer = lab.http("POST", "/v1/documents", body)
        assert answer.status == 202
        identifiers.append(answer.body["id"])
        if number % 50 == 25:
            killed += lab.ssh(host, f"systemctl kill --kill-whom=all -s KILL {unit}").returncode == 0
    assert killed >= 5
    settle(lab, identifiers, wait_for)
    wait_for(lambda: properties(lab, host, unit)["ActiveState"] == "active", 60, "the worker is back")


@pytest.mark.parametrize("group", ["edge", "app", "database", "backup"])
def test_a_rebooted_host_brings_everything_back(lab: Lab, wait_for: Callable[..., Any], group: str) -> None:
    host = lab.group(group)[0]
    boot = lab.ssh(host, "cat /proc/1/stat | cut -d' ' -f22").stdout
    assert lab.operate("reboot", lab.name, host).returncode == 0
    wait_for(lambda: lab.ssh(host, "true").returncode == 0, 60, f"{host} answers again", pause=1)
    assert lab.ssh(host, "cat /proc/1/stat | cut -d' ' -f22").stdout != boot, "it did not reboot"
    if group == "app":
        slot = slot_in_service(lab, host)
        for service in SERVICES:
            unit = f"atlas-{service}@{slot}.service"
            wait_for(
                lambda unit=unit: properties(lab, host, unit)["ActiveState"] == "active", 60, f"{unit} is back", pause=1
            )
    wait_for(lambda: lab.http("GET", "/readyz", token=None).status == 200, 60, "the service is ready")
    answer = lab.http("POST", "/v1/documents", {"content": uuid.uuid4().hex, "content_type": "text/plain"})
    assert answer.status == 202
    settle(lab, [answer.body["id"]], wait_for)


@pytest.fixture
def release_that_cannot_be_imported(tmp_path: Path) -> Path:
    """Build, with the real builder and key, a release whose app fails at import."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("app", "bin", "plugins", ".keys", "pyproject.toml"):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    (copy / ".cache").symlink_to(PROJECT / ".cache")
    package = copy / "app" / "src" / "atlas" / "api" / "__init__.py"
    first = "from __future__ import annotations\n"
    raising = f"{first}raise RuntimeError('this release cannot be imported')\n"
    package.write_text(package.read_text().replace(first, raising, 1))
    built = subprocess.run(
        [str(PROJECT / ".venv" / "bin" / "python"), "bin/build-release"], cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr + built.stdout
    return next((copy / "dist").glob("*.tar.gz"))


def test_a_release_that_cannot_be_imported_is_refused(lab: Lab, release_that_cannot_be_imported: Path) -> None:
    before = {host: deployment(lab, host) for host in lab.group("app")}
    with posts(lab, every=0.1) as outcomes:
        run = lab.playbook("deploy", "-e", f"release={release_that_cannot_be_imported}")
    assert run.returncode != 0
    output = run.stdout + run.stderr
    assert "ends again and again" in output, output[-4000:]
    assert "RuntimeError: this release cannot be imported" in output, "the log shown is not that of the failed start"
    assert {host: deployment(lab, host) for host in lab.group("app")} == before
    failed = [outcome for outcome in outcomes if outcome[1] != 202]
    assert len(outcomes) >= 50
    assert failed == [], f"{len(failed)} of {len(outcomes)} requests failed"


def test_a_rolling_deploy_loses_no_request(lab: Lab, wait_for: Callable[..., Any]) -> None:
    before = {host: deployment(lab, host) for host in lab.group("app")}
    with posts(lab, every=0.05) as outcomes:
        run = lab.playbook("deploy", "-e", "deploy_force=true")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    after = {host: deployment(lab, host) for host in lab.group("app")}
    assert all(after[host] > before[host] for host in after)
    failed = [outcome for outcome in outcomes if outcome[1] != 202]
    assert failed == [], f"{len(failed)} of {len(outcomes)} requests failed"
    assert len(outcomes) >= 100
    settle(lab, [outcome[2] for outcome in outcomes], wait_for)
