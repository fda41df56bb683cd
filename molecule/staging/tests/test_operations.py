"""Operations on a fleet that serves: reloads, a new certificate, HAProxy's upgrade, patches with a boot. Each under load."""

from __future__ import annotations

import json
import ssl
import sys
import time

from labtest import PROJECT, Lab, deployment
from patchtest import OFFER, OFFER_HAPROXY, PUBLISH, WITHDRAW, booted, on

sys.path.insert(0, str(PROJECT))

from tests.load.traffic import Traffic  # noqa: E402
from tests.load.verdict import Verdict  # noqa: E402


def load(lab: Lab, rate: float) -> Traffic:
    return Traffic(lab.folder / "access.json", rate)


def lossless(verdict: Verdict, least: int) -> None:
    print(verdict)
    assert verdict.good, str(verdict)
    assert verdict.figures["sent"] >= least, "too few requests to say anything"


def exchange_certificates(lab: Lab) -> set[str]:
    """Issue new certificates and put them into the running edges; returns those that are presented."""
    for edge in lab.group("edge"):
        (lab.folder / "tls" / f"{edge}.pem").unlink()
    shape = ("-e", f"lab_name={lab.name}", "-e", "lab_environment=staging")
    raised = lab.run("ansible-playbook", "-i", "localhost,", "playbooks/lab.yml", *shape, timeout=300)
    assert raised.returncode == 0, raised.stdout[-2000:]
    call = json.dumps({"path": "/etc/haproxy/tls/edge.pem", "pem": "{{ haproxy_tls_pem }}"})
    done = lab.run("ansible", "-i", str(lab.inventory), "edge", "-m", "haproxy_certificate", "-a", call, timeout=120)
    assert done.returncode == 0 and "loaded: true" in done.stdout, done.stdout
    assert "PRIVATE" not in done.stdout + done.stderr
    return {presented(lab, edge) for edge in lab.group("edge")}


def presented(lab: Lab, edge: str) -> str:
    """The certificate of *edge*, which has to be of the lab's authority."""
    return ssl.get_server_certificate((lab.hosts[edge], 443), ca_certs=lab.ca, timeout=10)


def test_reloads_and_a_new_certificate_lose_no_request(lab: Lab) -> None:
    before = {presented(lab, edge) for edge in lab.group("edge")}
    with load(lab, 20) as traffic:
        for _ in range(4):
            for edge in lab.group("edge"):
                on(lab, edge, "systemctl reload haproxy")
            time.sleep(1)
        assert not before & exchange_certificates(lab)
        time.sleep(2)
    lossless(traffic.judge(), 200)


def test_a_plain_restart_loses_some(lab: Lab) -> None:
    """The control: what the test above and the next one call lossless can be seen to lose."""
    with load(lab, 40) as traffic:
        for _ in range(3):
            for edge in lab.group("edge"):
                on(lab, edge, "systemctl reset-failed haproxy; systemctl restart haproxy")
            time.sleep(2)
    assert not traffic.judge().good


def test_an_app_host_retires_and_joins_again_without_losing_a_request(lab: Lab) -> None:
    staying, leaving = lab.group("app")
    number = deployment(lab, leaving)
    with load(lab, 15) as traffic:
        run = lab.playbook("retire", "-e", f"host={leaving}")
        assert run.returncode == 0, run.stdout[-4000:]
        assert f"Take {leaving} out of hosts.yml" in run.stdout
        left = on(
            lab,
            leaving,
            "systemctl list-units --plain --no-legend 'atlas-*' 'atlas@*'; ls /etc/systemd/system/multi-user.target.wants",
        )
        again = lab.playbook("retire", "-e", f"host={leaving}")
        last = lab.playbook("retire", "-e", f"host={staying}")
        join = lab.playbook("deploy", timeout=300)
        time.sleep(2)
    assert "atlas-api@" not in left and "atlas@" not in left
    assert again.returncode == 0 and all(
        "changed=0" in line for line in again.stdout.splitlines() if "changed=" in line
    )
    assert last.returncode != 0 and "have to be left (retire_keep_up)" in last.stdout
    assert join.returncode == 0, join.stdout[-4000:]
    assert deployment(lab, leaving) == deployment(lab, staying) == number, "it joins with what the others have"
    lossless(traffic.judge(), 300)


def test_hosts_are_patched_and_boot_one_by_one_without_losing_a_request(lab: Lab) -> None:
    first, second = lab.group("app")
    (edge,) = lab.group("edge")
    hosts = {first: OFFER.format(boot=""), second: OFFER.format(boot="yes"), edge: OFFER_HAPROXY}
    for host, offer in hosts.items():
        on(lab, host, offer + PUBLISH)
    before = {host: booted(lab, host) for host in hosts}
    main = on(lab, edge, "systemctl show --property MainPID --value haproxy")
    try:
        with load(lab, 15) as traffic:
            run = lab.playbook("patch", timeout=500)
            time.sleep(2)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        again = lab.playbook("patch", timeout=300)
    finally:
        for host in hosts:
            lab.ssh(host, WITHDRAW)
    lossless(traffic.judge(), 300)
    for host in (first, second):
        assert on(lab, host, "dpkg-query -W -f '${Version}' atlas-check") == "2", host
    assert booted(lab, second) != before[second], "it was to boot"
    assert booted(lab, first) == before[first], "nobody asked it to boot"
    assert on(lab, edge, "dpkg-query -W -f '${Version}' haproxy").endswith("+check1")
    assert on(lab, edge, "systemctl show --property MainPID --value haproxy") == main, "it restarted"
    assert "(deleted)" not in on(lab, edge, f"readlink /proc/{main}/exe")
    assert again.returncode == 0 and "Nothing to patch: no host was touched." in again.stdout
    recap = [line for line in again.stdout.splitlines() if "changed=" in line]
    assert all("changed=0" in line for line in recap), recap
