"""Bad input gets one clear message with cause and remedy, and changes nothing."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from labtest import PROJECT, Lab, deployment


def fleet(lab: Lab) -> dict[str, Any]:
    """Return what must not change: per app host the deployment in service, the unit's main process, the edge's map."""
    state: dict[str, Any] = {}
    for host in lab.group("app"):
        state[host] = (deployment(lab, host), lab.ssh(host, "pgrep -o -u atlas").stdout)
    for host in lab.group("edge"):
        state[host] = lab.ssh(host, "cat /etc/haproxy/slot.map").stdout
    return state


def refused(run: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Assert that *run* failed with a message that holds every text in *expected*, and no traceback."""
    output = run.stdout + run.stderr
    assert run.returncode != 0, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    for text in expected:
        assert text in output, f"{text!r} is missing in:\n{output[-3000:]}"


@pytest.fixture
def unchanged(lab: Lab) -> Any:
    """Fail the test if it changed anything in service."""
    before = fleet(lab)
    yield
    assert fleet(lab) == before
    assert lab.http("GET", "/readyz", token=None).status == 200


def with_password(lab: Lab, password: str | None) -> subprocess.CompletedProcess[str]:
    """Run status.yml with the lab's vault password replaced (None: removed)."""
    path = lab.folder / "vault-password"
    saved = path.read_text()
    try:
        if password is None:
            path.unlink()
        else:
            path.write_text(password)
        return lab.playbook("status")
    finally:
        path.write_text(saved)
        path.chmod(0o600)


def test_a_missing_vault_password(lab: Lab, unchanged: None) -> None:
    refused(with_password(lab, None), f"LAB={lab.name}", "vault-password")


def test_a_wrong_vault_password(lab: Lab, unchanged: None) -> None:
    refused(with_password(lab, secrets.token_urlsafe(32)), f"lab-{lab.name}", "does not open")


def test_an_unreachable_host(lab: Lab, wait_for: Callable[..., Any]) -> None:
    """Not with `unchanged`: waking up from the pause, systemd may restart services whose watchdog was missed."""
    host = lab.group("app")[1]
    before = {name: deployment(lab, name) for name in lab.group("app")}
    assert lab.operate("pause", lab.name, host).returncode == 0
    try:
        refused(lab.playbook("deploy", "-e", "deploy_force=true"), host, "unreachable")
    finally:
        lab.operate("unpause", lab.name, host)
    wait_for(lambda: lab.ssh(host, "pgrep -u atlas").returncode == 0, 30, f"{host} serves again")
    assert {name: deployment(lab, name) for name in lab.group("app")} == before


def test_a_full_disk(lab: Lab, unchanged: None) -> None:
    host = lab.group("app")[0]
    assert lab.operate("fill-disk", lab.name, host).returncode == 0
    try:
        refused(lab.playbook("deploy", "-e", "deploy_force=true"), host, "disk")
    finally:
        lab.operate("free-disk", lab.name, host)


def test_an_invalid_setting(lab: Lab, unchanged: None) -> None:
    bad = '{"atlas_settings_environment": {"queue_limit": "many", "no_such_setting": 1}}'
    refused(lab.playbook("deploy", "-e", bad), "queue_limit", "no_such_setting")


def test_an_unsigned_release(lab: Lab, unchanged: None, tmp_path: Path) -> None:
    release = next((PROJECT / "dist").glob("*.tar.gz"))
    copy = tmp_path / release.name
    copy.write_bytes(release.read_bytes())
    refused(lab.playbook("deploy", "-e", f"release={copy}"), "sign")


def test_an_altered_release(lab: Lab, unchanged: None, tmp_path: Path) -> None:
    release = next((PROJECT / "dist").glob("*.tar.gz"))
    copy = tmp_path / release.name
    data = bytearray(release.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    (tmp_path / f"{release.name}.sig").write_bytes(release.with_name(f"{release.name}.sig").read_bytes())
    refused(lab.playbook("deploy", "-e", f"release={copy}"), "signature")


def test_a_release_that_is_not_there(lab: Lab, unchanged: None) -> None:
    refused(lab.playbook("deploy", "-e", "release=dist/no-such.tar.gz"), "no-such.tar.gz", "make release")


def test_an_unknown_environment() -> None:
    run = subprocess.run(
        ["make", "up", "ENV=nowhere"], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120,
        env={key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "ANSIBLE"))},
    )  # fmt: skip
    refused(run, "nowhere", "development", "staging", "production")


def test_an_unsupported_debian(lab: Lab, unchanged: None) -> None:
    host = lab.group("backup")[0]
    saved = lab.ssh(host, "cat /etc/os-release").stdout
    try:
        lab.ssh(
            host,
            'cp -L /etc/os-release /root/os-release.saved; sed -i \'s/^VERSION_ID=.*/VERSION_ID="11"/; '
            "s/bookworm/bullseye/g' /usr/lib/os-release; echo 11.9 > /etc/debian_version",
        )
        refused(lab.playbook("site", "--limit", host), host, "11", "Debian 12")
    finally:
        lab.ssh(
            host,
            "cat /root/os-release.saved > /usr/lib/os-release; rm /root/os-release.saved; "
            "echo 12.12 > /etc/debian_version",
        )
    assert lab.ssh(host, "cat /etc/os-release").stdout == saved


def test_a_taken_port(lab: Lab, unchanged: None, wait_for: Callable[..., Any]) -> None:
    """Something else listens on the idle slot's port: a switch to it is refused before anything is touched."""
    host = lab.group("app")[0]
    lab.ssh(host, "systemd-run --unit=port-thief python3 -m http.server 8102")
    try:
        wait_for(lambda: "8102" in lab.ssh(host, "ss -ltnH").stdout, 10, "the port is taken")
        refused(lab.playbook("deploy", "-e", "deploy_force=true", "-e", "deploy_strategy=blue_green"), host, "8102")
    finally:
        lab.ssh(host, "systemctl stop port-thief")


def test_a_hook_that_says_no(lab: Lab, unchanged: None, tmp_path: Path) -> None:
    """It runs here, not on a host; the deploy ends before its phase, and who asked to hear of failures does."""
    told = tmp_path / "told"
    hooks = [
        {"name": "approval", "events": ["before_stage"], "command": ["sh", "-c", "echo nobody approved; exit 3"]},
        {"name": "note", "events": ["failed"], "command": ["sh", "-c", f"cat > {told}"]},
    ]
    run = lab.playbook("deploy", "-e", json.dumps({"deploy_hooks": hooks, "deploy_force": True}))
    refused(run, "hook approval (before_stage): it ended with 3", "nobody approved", "Nothing that serves was touched")
    heard = json.loads(told.read_text())
    assert (heard["event"], heard["environment"]) == ("failed", "staging")
    assert [failure["phase"] for failure in heard["failures"]] == ["stage"]
    assert "held by" not in lab.playbook("unlock").stdout
