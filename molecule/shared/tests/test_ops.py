"""The operations checks on a healthy fleet: they need nobody, keep a report, change nothing, and show no secret."""

from __future__ import annotations

import json

import pytest
from labtest import Lab, slot_in_service


@pytest.mark.parametrize("check", ["daily", "weekly", "monthly"])
def test_a_healthy_fleet_needs_nobody(lab: Lab, check: str) -> None:
    if not lab.group("database"):
        pytest.skip("tried with PostgreSQL and a backup host of its own alone")
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
