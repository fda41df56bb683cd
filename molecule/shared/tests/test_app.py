"""App hosts: the four services of the slot in service, how they are confined, and what lies on the disk."""

from __future__ import annotations

import json
import re

from labtest import SERVICES, Lab, properties, slot_in_service

MEMORY_BUDGET_MIB = 350


def test_the_four_services_run_as_atlas(lab: Lab) -> None:
    for host in lab.group("app"):
        slot = slot_in_service(lab, host)
        for service in SERVICES:
            unit = properties(lab, host, f"atlas-{service}@{slot}.service")
            assert unit["ActiveState"] == "active", f"{host} {service}"
            assert unit["NRestarts"] == "0", f"{host} {service} has restarted"
            assert unit["Type"] == "notify"
            assert int(unit["WatchdogUSec"].removesuffix("s") if unit["WatchdogUSec"].endswith("s") else 1) > 0
            owner = lab.ssh(host, f"ps -o user= -p {unit['MainPID']}").stdout.strip()
            assert owner == "atlas", f"{host} {service} runs as {owner}"


def test_the_idle_slot_is_silent(lab: Lab) -> None:
    for host in lab.group("app"):
        idle = {"blue": "green", "green": "blue"}[slot_in_service(lab, host)]
        for service in SERVICES:
            assert properties(lab, host, f"atlas-{service}@{idle}.service")["ActiveState"] in ("inactive", "failed")


def test_every_unit_is_confined(lab: Lab) -> None:
    for host in lab.group("app"):
        slot = slot_in_service(lab, host)
        for service in SERVICES:
            report = lab.ssh(host, f"systemd-analyze security --no-pager atlas-{service}@{slot}.service").stdout
            match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
            assert match, report[-500:]
            assert float(match[1]) <= 1.5, f"{host} {service}: {match[1]}"


def test_state_and_credentials_are_closed_to_others(lab: Lab) -> None:
    for host in lab.group("app"):
        slot = slot_in_service(lab, host)
        mode = lab.ssh(host, "stat -c '%a %U' /var/lib/atlas").stdout.split()
        assert mode == ["700", "atlas"], host
        listing = lab.ssh(host, f"stat -Lc '%a %U %n' /opt/atlas/slots/{slot}/credentials/*").stdout.splitlines()
        assert len(listing) >= 2, host
        for line in listing:
            assert re.match(r"[46]00 root ", line), f"{host}: {line}"
        # The deployment's own files are for reading only.
        denied = lab.ssh(host, f"runuser -u atlas -- touch /opt/atlas/slots/{slot}/x")
        assert denied.returncode != 0, host


def test_credentials_open_for_their_own_name_only(lab: Lab) -> None:
    host = lab.group("app")[0]
    path = f"/opt/atlas/slots/{slot_in_service(lab, host)}/credentials/fernet_keys"
    assert lab.ssh(host, f"systemd-creds decrypt --name=atlas_fernet_keys {path} - >/dev/null").returncode == 0
    assert lab.ssh(host, f"systemd-creds decrypt --name=atlas_tokens {path} - >/dev/null").returncode != 0


def test_the_release_on_the_host_is_the_signed_one(lab: Lab) -> None:
    digests = set()
    for host in lab.group("app"):
        slot = slot_in_service(lab, host)
        deployment = json.loads(lab.ssh(host, f"cat /opt/atlas/slots/{slot}/deployment.json").stdout)
        archive = f"/opt/atlas/archives/{deployment['release']}.tar.gz"
        actual = lab.ssh(host, f"sha256sum {archive}").stdout.split()[0]
        assert actual == deployment["digest"], host
        digests.add(actual)
    assert len(digests) == 1, "all app hosts must run the same bytes"


def test_idle_memory_of_the_four_services_is_within_budget(lab: Lab) -> None:
    for host in lab.group("app"):
        script = """
        for process in /proc/[0-9]*; do
          grep -Eqs 'atlas-[a-z]+@' $process/cgroup && awk '/^Pss:/ {print $2}' $process/smaps_rollup
        done | awk '{sum += $1} END {print int(sum / 1024)}'
        """
        total = int(lab.ssh(host, script).stdout.strip())
        assert 0 < total <= MEMORY_BUDGET_MIB, f"{host}: {total} MiB"


def test_the_host_command_speaks_to_the_slot_in_service(lab: Lab) -> None:
    host = lab.group("app")[0]
    answer = lab.ssh(host, "atlas db status --json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["compatible"] is True
