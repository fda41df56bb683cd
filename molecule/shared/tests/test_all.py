"""Every host: base system, firewall, sshd, journal, upgrades, and no secret in clear."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time

import pytest
from labtest import PROJECT, Lab

sys.path.insert(0, str(PROJECT))

from tests.leaks import finder


def test_no_secret_is_in_clear_on_any_host(lab: Lab) -> None:
    secrets = finder.secrets_of(lab.folder)
    assert len(secrets) >= 5, "the vault must hold the keyring, passwords and a token"
    for host in lab.hosts:
        assert finder.on_host(lab.folder, host, secrets) == [], f"{host}: secrets in clear"


def test_the_search_for_secrets_finds_one(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    value = lab.token
    planted = "/var/tmp/atlas-planted"
    encoded = base64.b64encode(f"x={value}\n".encode()).decode()
    try:
        lab.ssh(host, f"base64 -d <<< {encoded} > {planted}")
        assert planted in finder.on_host(lab.folder, host, [value])
    finally:
        lab.ssh(host, f"rm -f {planted}")


def failed_units(lab: Lab, host: str) -> list[str]:
    """Return the units of *host* that have failed. Loading kernel modules is the machine's business, not a container's."""
    listed = lab.ssh(host, "systemctl list-units --failed --plain --no-legend | awk '{print $1}'").stdout.split()
    return [unit for unit in listed if unit != "systemd-modules-load.service"]


def test_no_unit_has_failed(lab: Lab) -> None:
    for host in lab.hosts:
        # A timer's first job may come before what it looks at is there; its next one has to do better.
        deadline = time.monotonic() + 120
        while (failed := failed_units(lab, host)) and time.monotonic() < deadline:
            time.sleep(1)
        assert failed == [], lab.ssh(host, f"journalctl -q -n 30 -u {' -u '.join(failed)}").stdout


def test_sshd_takes_keys_only_and_no_root(lab: Lab) -> None:
    for host in lab.hosts:
        effective = dict(line.split(" ", 1) for line in lab.ssh(host, "sshd -T").stdout.splitlines() if " " in line)
        assert effective["passwordauthentication"] == "no", host
        assert effective["kbdinteractiveauthentication"] == "no", host
        assert effective["permitrootlogin"] in ("no", "prohibit-password", "without-password"), host
        assert effective["x11forwarding"] == "no", host


def test_security_upgrades_leave_haproxy_and_postgresql_alone(lab: Lab) -> None:
    for host in lab.hosts:
        dump = lab.ssh(host, "apt-config dump").stdout
        assert 'APT::Periodic::Unattended-Upgrade "1"' in dump, host
        excluded = [line for line in dump.splitlines() if line.startswith("Unattended-Upgrade::Package-Blacklist::")]
        assert any("haproxy" in line for line in excluded), host
        assert any("postgresql" in line for line in excluded), host


def test_live_firewall_is_exactly_the_expected_one(lab: Lab) -> None:
    for host in lab.hosts:
        compare = lab.ssh(host, LIVE_RULESET_IS_EXPECTED)
        assert compare.returncode == 0, f"{host}:\n{compare.stdout}{compare.stderr}"


# The expected ruleset is loaded in a network namespace of its own, so that both are printed by the same nft.
LIVE_RULESET_IS_EXPECTED = """
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nft list ruleset > "$work/live"
unshare --net bash -c 'nft -f /etc/nftables.conf && nft list ruleset' > "$work/expected"
grep -q 'policy drop' "$work/expected"
diff "$work/expected" "$work/live"
"""


def test_a_rule_added_by_hand_is_noticed(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    try:
        lab.ssh(host, "nft add table inet planted")
        assert lab.ssh(host, LIVE_RULESET_IS_EXPECTED).returncode != 0
    finally:
        lab.ssh(host, "nft delete table inet planted")
    assert lab.ssh(host, LIVE_RULESET_IS_EXPECTED).returncode == 0


PORTS = [22, 80, 443, 5432, 8101, 8102, 8111, 8112, 8404, 8405, 9100]
PROBE = """#python
import json, socket
from concurrent.futures import ThreadPoolExecutor

def answers(target):
    try:
        socket.create_connection(target, timeout=2).close()
        return True
    except OSError:
        return False

targets = {targets}
with ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps([target for target, open in zip(targets, pool.map(answers, targets)) if open]))
"""


def allowed(lab: Lab, source: str, target: str) -> set[int]:
    """Return the ports of *target* that *source* (a host, or "controller") may open a connection to."""
    ports: set[int] = set()
    if source == "controller":
        ports.add(22)
    if target in lab.group("edge"):
        ports |= {80, 443} if lab.ca else {80}
    if target in lab.group("app") and source in lab.group("edge"):
        ports.add(8101)
    if target in lab.group("database") and source in lab.group("app"):
        ports.add(5432)
    if source in lab.group("backup"):
        # It fetches copies from the app hosts, and the log of the database, and delivers restores to both.
        ports |= {22} if target in lab.group("app") else set()
        ports |= {22, 5432} if target in lab.group("database") else set()
    return ports


def test_hosts_answer_only_whom_they_should(lab: Lab) -> None:
    """Every host tries eleven ports of every other one, and so does the controller. Idle slots listen on nothing."""
    for source in ["controller", *lab.hosts]:
        others = {name: address for name, address in lab.hosts.items() if name != source}
        script = PROBE.format(targets=[[address, port] for address in others.values() for port in PORTS])
        if source == "controller":
            probe = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=True)
        else:
            probe = lab.ssh(source, script)
        found = json.loads(probe.stdout) if others else []
        for target, address in others.items():
            # Blue or green, whichever is in service.
            ports = {8101 if port == 8102 else port for host, port in found if host == address}
            assert ports == allowed(lab, source, target), f"{source} -> {target}"


@pytest.mark.parametrize("playbook", ["site", "deploy"])
def test_check_mode_on_a_converged_host_reports_no_change(lab: Lab, playbook: str) -> None:
    run = lab.playbook(playbook, "--check", "--diff")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    recap = [line for line in run.stdout.splitlines() if "changed=" in line]
    assert recap
    assert all("changed=0" in line for line in recap), "\n".join(recap)
