"""What must survive on a staging fleet: killed workers and reboots."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from labtest import SERVICES, Lab, properties, slot_in_service, sql


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


def test_a_host_that_is_kept_out_stays_out_when_haproxy_starts_again(lab: Lab, wait_for: Callable[..., Any]) -> None:
    """It passes every health check, and may lack what is in service."""
    edge, host = lab.group("edge")[0], lab.group("app")[0]
    server = f"be_{slot_in_service(lab, host)}/{host}"

    def order(state: str) -> str:
        done = lab.run(
            "ansible", "-i", str(lab.inventory), edge, "-m", "haproxy_runtime", "-a", f"state={state} servers={server}"
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "MAINT" in order("maint")
    try:
        restarted = lab.ssh(edge, "systemctl reset-failed haproxy; systemctl restart haproxy")
        assert restarted.returncode == 0, restarted.stderr
        wait_for(lambda: lab.http("GET", "/readyz", token=None).status == 200, 60, "the other host serves")
        assert "CHANGED" not in order("maint"), "it was in again"
    finally:
        assert "CHANGED" in order("ready")
