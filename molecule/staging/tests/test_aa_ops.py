"""The operations checks: on a healthy fleet they need nobody, change nothing and show no secret; what is put wrong they find.

They come first here: later tests hurt the fleet in ways that the checks rightly report.
"""

from __future__ import annotations

import json
import string
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from labtest import PROJECT, Lab, slot_in_service

WORD = uuid.uuid4().hex.translate(str.maketrans(string.digits, "ghijklmnop"))
"""In an error that no earlier run on this lab had."""
HURT = {
    "daily": f"""
systemd-run --quiet --unit=planted-failure /bin/false || true
logger --id=$$ -p daemon.err -t planted "{WORD} 4711 of 198.51.100.7 broke, token=hush-hush-hush"
""",
    "weekly": "touch /run/reboot-required",
    "monthly": """
useradd --groups sudo planted
systemd-run --quiet --unit=planted-listener python3 -m http.server --directory /var/empty 4444 || true
cp /etc/ssh/ssh_host_ed25519_key /etc/ssh/ssh_host_planted_key; chmod 644 /etc/ssh/ssh_host_planted_key
cp /bin/true /usr/local/bin/planted; chmod 4755 /usr/local/bin/planted
nft add rule inet filter input tcp dport 4444 accept
""",
}
MEND = """
systemctl stop planted-listener; systemctl reset-failed planted-failure planted-listener
userdel planted; rm -f /etc/ssh/ssh_host_planted_key /usr/local/bin/planted /run/reboot-required
nft -f /etc/nftables.conf
"""


@pytest.fixture(scope="module", autouse=True)
def reported(lab: Lab, wait_for: Callable[..., Any]) -> None:
    """Wait for the first report of a new backup host: until then the checks rightly say that there is none."""
    wait_for(lambda: "increment" in lab.http("GET", "/health").body["backup"]["jobs"], 180, "backups have reported")


@contextmanager
def hurt(lab: Lab, host: str, check: str) -> Iterator[None]:
    """Put wrong on *host* what *check* has to find."""
    try:
        done = lab.ssh(host, f"mkdir -p /var/empty; {HURT[check]}")
        assert done.returncode == 0, done.stderr
        yield
    finally:
        lab.ssh(host, MEND)


def findings(lab: Lab, check: str, host: str, *given: str) -> tuple[dict[str, str], str]:
    """Run *check*, which has to fail; return kind → what was found on *host*, and the output."""
    run = lab.playbook(f"ops_{check}", *given)
    assert run.returncode == 2, run.stdout[-6000:]
    report = json.loads(max((lab.folder / "ops").glob(f"{check}-*.json")).read_text())
    found = {each["kind"]: each for each in report["findings"] if each["host"] == host}
    for kind, each in found.items():
        assert (PROJECT / each["page"]).is_file(), kind
        assert each["look"] in run.stdout and each["mend"] in run.stdout and each["page"] in run.stdout, kind
    return {kind: each["what"] for kind, each in found.items()}, run.stdout


@pytest.mark.parametrize("check", ["daily", "weekly", "monthly"])
def test_a_healthy_fleet_needs_nobody(lab: Lab, check: str) -> None:
    # In check mode the report is kept all the same: it is all that a check ever changes.
    run = lab.playbook(f"ops_{check}", *(["--check"] if check == "monthly" else []))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "Nothing needs a person." in run.stdout
    recap = [line for line in run.stdout.splitlines() if "changed=" in line]
    assert recap and all("changed=0" in line and "unreachable=0" in line for line in recap), recap
    newest = max((lab.folder / "ops").glob(f"{check}-*.json"))
    text = newest.read_text()
    report = json.loads(text)
    assert report["hosts"] == sorted(lab.hosts) and report["findings"] == []
    assert lab.token not in text
    if check == "monthly":
        for host in lab.group("app"):
            assert f"atlas-api@{slot_in_service(lab, host)}.service" in report["keeps"]["exposure"][host]


def test_daily_finds_a_failed_unit_a_new_error_and_a_full_disk(lab: Lab) -> None:
    (host,) = lab.group("backup")
    with hurt(lab, host, "daily"):
        found, said = findings(lab, "daily", host, "-e", "ops_disk_percent=1")
        assert found["unit-failed"].startswith("planted-failure.service has failed")
        assert found["disk-full"].endswith("1 are allowed")
        assert f"{WORD} N of ADDRESS broke, token *" in said and "hush" not in said


def test_weekly_finds_a_boot_that_waits(lab: Lab) -> None:
    (host,) = lab.group("backup")
    with hurt(lab, host, "weekly"):
        found, _ = findings(lab, "weekly", host)
        assert found["boot-pending"] == "has to boot: asked for by a package"


def test_monthly_finds_what_should_not_be_there(lab: Lab) -> None:
    (host,) = lab.group("backup")
    with hurt(lab, host, "monthly"):
        found, _ = findings(lab, "monthly", host)
    assert "planted" in found["account-unexpected"]
    assert "python3 listens on tcp/4444" in found["port-unexpected"]
    assert "/etc/ssh/ssh_host_planted_key (0644, root)" in found["permissions-open"]
    assert "lets in 4444" in found["firewall-differs"]
    assert "/usr/local/bin/planted" in found["setuid-new"]
