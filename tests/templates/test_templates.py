"""Every template of every role is rendered without a host and judged by the program that will read it, on each Debian."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import atlas_host
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.templates.checks import CODENAMES, Container
from tests.templates.render import PROJECT, render

pytestmark = pytest.mark.timeout(900)  # the first run makes the images

SERVERS = [{"name": "app1", "address": "192.0.2.31"}, {"name": "app2", "address": "192.0.2.32"}]
OPENINGS = [
    {"name": "http", "ports": [80], "sources": ["any"]},
    {"name": "api", "ports": [8101, 8102], "sources": ["192.0.2.21", "2001:db8::21"]},
    {"name": "nobody", "ports": [9999], "sources": []},
]
UNITS = ("atlas-api", "atlas-core", "atlas-services", "atlas-monitoring")
PROGRAM = "mkdir -p /opt/atlas/slots/blue/release/bin && cp /bin/true /opt/atlas/slots/blue/release/bin/atlas"


@dataclass(frozen=True)
class Case:
    """Where a template goes, what judges it there, what is handed in, and an edit that its judge must refuse."""

    path: str
    judge: str
    variables: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    breaks: tuple[str, str] | None = None


def unit(name: str) -> Case:
    judge = (
        f"{PROGRAM} && systemd-analyze verify --man=no {name}@blue.service"
        f" && cp /etc/systemd/system/{name}@.service /tmp/{name}@blue.service"
        f" && systemd-analyze security --no-pager --offline=true --threshold=15 /tmp/{name}@blue.service"
    )
    addresses = {"atlas_api_sources": ["192.0.2.21"], "atlas_database_addresses": ["192.0.2.40"]}
    return Case(f"/etc/systemd/system/{name}@.service", judge, addresses, breaks=("\nCapabilityBoundingSet=", "\n#"))


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIH3s2kb3yLBsRNR1VKyOjpYXbBbSsDjLsY7sRSDnHbZr"
BACKUP = {
    "backup_host_addresses": ["192.0.2.50"],
    "backup_sources": {"app1": "192.0.2.31"},
    "backup_targets": {"db1": "192.0.2.40"},
    "hostvars": {name: {"ansible_facts": {"ssh_host_key_ed25519_public": KEY.split()[1]}} for name in ("app1", "db1")},
}


def backup_unit(name: str) -> Case:
    """A unit of the role backup: read by systemd without a word, and its exposure is at most 1.5."""
    programs = "mkdir -p /usr/local/lib/atlas && cp /bin/true /usr/local/lib/atlas/atlas-backup && cp -n /bin/true /usr/bin/barman;"
    instance = name.replace("@.", "@daily.")
    judge = (
        f'{programs} out=$(systemd-analyze verify --man=no {instance} 2>&1); echo "$out"; test -z "$out"'
        f" && cp /etc/systemd/system/{name} /tmp/{instance}"
        f" && systemd-analyze security --no-pager --offline=true --threshold=15 /tmp/{instance}"
    )
    return Case(f"/etc/systemd/system/{name}", judge, BACKUP, breaks=("\nCapabilityBoundingSet=", "\n#"))


CASES = {
    "base/journald.conf.j2": Case(
        "/etc/systemd/journald.conf.d/50-atlas.conf",
        # journald has no checker; its own readers of a span of time and of a section have.
        "file=/etc/systemd/journald.conf.d/50-atlas.conf; grep -x '\\[Journal\\]' $file && grep -xE 'SystemMaxUse=[0-9]+[KMG]' $file"
        ' && systemd-analyze timespan "$(sed -n s/^MaxRetentionSec=//p $file)"',
        breaks=("MaxRetentionSec=30day", "MaxRetentionSec=soon"),
    ),
    "base/apt-upgrades.conf.j2": Case(
        "/etc/apt/apt.conf.d/60atlas-upgrades", "apt-config dump >/dev/null", breaks=("};", "")
    ),
    "base/sysctl.conf.j2": Case(
        "/etc/sysctl.d/60-atlas.conf",
        "/usr/lib/systemd/systemd-sysctl /etc/sysctl.d/60-atlas.conf 2>&1 | grep . && exit 1 || true",
        breaks=("net.core.somaxconn = 4096", "net.core.somaxcon = 4096"),
    ),
    "base/sshd.conf.j2": Case(
        "/etc/ssh/sshd_config.d/10-atlas.conf",
        "sshd -t && test \"$(sshd -T | grep -cE '^(passwordauthentication|permitrootlogin) no$')\" = 2",
        breaks=("PermitRootLogin no", "PermitRootLogin yes"),
    ),
    "base/nftables.conf.j2": Case(
        "/etc/nftables.conf",
        "nft -c -f /etc/nftables.conf",
        {"base_firewall_openings": OPENINGS, "base_ssh_sources": ["192.0.2.1", "2001:db8::/32"]},
        breaks=("policy drop", "policy refuse"),
    ),
    "haproxy/503.http.j2": Case("/etc/haproxy/errors/atlas-503.http", "true"),
    # What fills it in is judged with the configuration that names it.
    "haproxy/maintenance.html.j2": Case("/etc/haproxy/errors/maintenance.html", "true"),
    "haproxy/haproxy.cfg.j2": Case(
        "/etc/haproxy/haproxy.cfg",
        "mkdir -p /run/haproxy /etc/haproxy/tls && echo 1 > /run/haproxy/server-state && echo active be_blue > /etc/haproxy/slot.map"
        " && touch /etc/haproxy/maintenance.map"
        " && cd /etc/haproxy/tls && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=edge"
        " -keyout key -out crt 2>/dev/null && cat crt key > edge.pem"
        " && haproxy -c -f /etc/haproxy/haproxy.cfg 2>&1 | tee /tmp/out"
        " && ! grep -E 'WARNING|ALERT' /tmp/out",
        {"haproxy_servers": SERVERS, "haproxy_tls": True, "haproxy_hsts_seconds": 31536000},
        needs=("haproxy/503.http.j2", "haproxy/maintenance.html.j2"),
        breaks=("option redispatch 1", "option redispach 1"),
    ),
    "haproxy/haproxy.service.conf.j2": Case(
        "/etc/systemd/system/haproxy.service.d/50-atlas.conf",
        'out=$(systemd-analyze verify --man=no haproxy.service 2>&1); echo "$out"; test -z "$out"',
        needs=("haproxy/reload.py.j2",),
        breaks=("[Service]", "[Servise]"),
    ),
    "haproxy/reload.py.j2": Case(
        "/usr/local/sbin/haproxy-reload",
        "python3 -m py_compile /usr/local/sbin/haproxy-reload",
        breaks=("def main()", "def main("),
    ),
    "postgresql/createcluster.conf.j2": Case(
        "/etc/postgresql-common/createcluster.d/atlas.conf",
        "pg_createcluster $(ls /usr/lib/postgresql) check && pg_controldata=$(ls /usr/lib/postgresql/*/bin/pg_controldata)"
        " && $pg_controldata /var/lib/postgresql/*/check | grep 'checksum version: *1'; status=$?;"
        " pg_dropcluster $(ls /usr/lib/postgresql) check; exit $status",
        breaks=("--data-checksums", ""),
    ),
    "postgresql/atlas.conf.j2": Case(
        "/etc/postgresql/check.conf",
        "$(ls /usr/lib/postgresql/*/bin/postgres) -C max_connections -c config_file=/etc/postgresql/check.conf"
        " -c data_directory=/tmp -c hba_file=/dev/null -c ident_file=/dev/null",
        breaks=("max_connections", "max_connection"),
    ),
    "postgresql/pg_hba.conf.j2": Case(
        "/etc/postgresql/check_hba.conf",
        "true",
        {
            "postgresql_client_addresses": ["192.0.2.31"],
            "postgresql_login_roles": [{"name": "atlas_a"}, {"name": "atlas_b"}],
        },
    ),
    "postgresql/postgresql.service.conf.j2": Case(
        "/etc/systemd/system/postgresql@.service.d/50-atlas.conf",
        "systemd-analyze verify --man=no postgresql@1-main.service 2>&1 | grep 50-atlas && exit 1 || true",
        breaks=("Restart=on-failure", "Restart=sometimes"),
    ),
    "backup/atlas-backup@.service.j2": backup_unit("atlas-backup@.service"),
    "backup/atlas-backup-log.service.j2": backup_unit("atlas-backup-log.service"),
    "backup/atlas-backup-command.conf.j2": Case(
        "/etc/systemd/system/atlas-backup-command-.service.d/hardening.conf",
        "cp /etc/systemd/system/atlas-backup-command-.service.d/hardening.conf /tmp/atlas-backup-command.service"
        " && echo ExecStart=/bin/true >> /tmp/atlas-backup-command.service"
        " && systemd-analyze security --no-pager --offline=true --threshold=15 /tmp/atlas-backup-command.service",
        BACKUP,
        breaks=("\nCapabilityBoundingSet=", "\n#"),
    ),
    "backup/atlas-backup.timer.j2": Case(
        "/etc/systemd/system/atlas-backup-daily.timer",
        'out=$(systemd-analyze verify --man=no atlas-backup-daily.timer 2>&1); echo "$out"; test -z "$out"',
        {"job": "daily", "__backup_timers": {"daily": {"at": "*-*-* 02:00:00"}}},
        needs=("backup/atlas-backup@.service.j2",),
        breaks=("02:00:00", "26:00:00"),
    ),
    "backup/atlas-backup.sh.j2": Case(
        "/usr/local/sbin/atlas-backup", "sh -n /usr/local/sbin/atlas-backup", breaks=("fi", "if")
    ),
    "backup/authorized_keys.j2": Case(
        "/root/authorized_keys",
        "test $(ssh-keygen -lf /root/authorized_keys | wc -l) = 1",
        {**BACKUP, "__backup_key": f"{KEY} atlas-backup@backup1"},
        breaks=("restrict,", "restrict, "),
    ),
    "backup/known_hosts.j2": Case(
        "/root/known_hosts",
        "ssh-keygen -F 192.0.2.31 -f /root/known_hosts && ssh-keygen -F 192.0.2.40 -f /root/known_hosts",
        BACKUP,
        breaks=("192.0.2.31", "192.0.2.32"),
    ),
    "backup/sudoers.j2": Case(
        "/root/sudoers", "chmod 0440 /root/sudoers && visudo -cf /root/sudoers", breaks=("NOPASSWD:", "NOPASSWORD:")
    ),
    "backup/createcluster.conf.j2": Case(
        "/etc/postgresql-common/createcluster.d/backup.conf",
        "grep -x 'create_main_cluster = false' /etc/postgresql-common/createcluster.d/backup.conf",
        breaks=("false", "true"),
    ),
    "backup/barman.conf.j2": Case(
        "/etc/atlas-barman.conf",
        'python3 -c \'import configparser as c; r = c.ConfigParser(interpolation=None); r.read("/etc/atlas-barman.conf");'
        ' assert r.sections() == ["barman", "atlas"] and r["atlas"]["slot_name"]\'',
        {**BACKUP, "backup_database_address": "192.0.2.40"},
        breaks=("[atlas]", "[altas]"),
    ),
    "origin/nginx.conf.j2": Case("/etc/nginx/nginx.conf", "nginx -t -q", breaks=("deny all;", "deny all")),
    **{f"atlas/{name}@.service.j2": unit(name) for name in UNITS},
    "atlas/atlas@.target.j2": Case(
        "/etc/systemd/system/atlas@.target",
        f'{PROGRAM} && out=$(systemd-analyze verify --man=no atlas@blue.target 2>&1); echo "$out"; test -z "$out"',
        needs=tuple(f"atlas/{name}@.service.j2" for name in UNITS),
        breaks=("[Unit]", "[Unti]"),
    ),
    "atlas/atlas-command.conf.j2": Case(
        "/etc/systemd/system/atlas-command-.service.d/50-atlas.conf",
        "cp /etc/systemd/system/atlas-command-.service.d/50-atlas.conf /tmp/atlas-command.service"
        " && echo ExecStart=/bin/true >> /tmp/atlas-command.service"
        " && systemd-analyze security --no-pager --offline=true --threshold=15 /tmp/atlas-command.service",
        {"atlas_database_addresses": ["192.0.2.40"]},
        breaks=("\nCapabilityBoundingSet=", "\n#"),
    ),
    "atlas/atlas.sh.j2": Case("/usr/local/bin/atlas", "sh -n /usr/local/bin/atlas", breaks=("fi", "if")),
}
# Parts that other templates include.
PARTS = {"atlas/hardening.j2", "atlas/service.j2", "backup/hardening.j2"}


@pytest.fixture(scope="module", params=CODENAMES)
def host(request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container of each Debian release with its own network, as privileged as a lab host."""
    with Container(request.param, "--privileged", "--network=none") as container:
        yield container


def text_of(name: str, codename: str) -> str:
    role, template = name.split("/")
    return render(role, template, codename, **CASES[name].variables)


def judge(host: Container, name: str, edit: Callable[[str], str] = lambda text: text) -> tuple[int, str]:
    case = CASES[name]
    for other in case.needs:
        host.write({CASES[other].path: text_of(other, host.codename)})
    host.write({case.path: edit(text_of(name, host.codename))})
    done = host.shell(case.judge)
    return done.returncode, done.stdout + done.stderr


def test_every_template_is_tested() -> None:
    found = {f"{path.parts[-3]}/{path.name}" for path in PROJECT.glob("roles/*/templates/*.j2")}
    assert found - PARTS == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_is_accepted(host: Container, name: str) -> None:
    code, output = judge(host, name)
    assert code == 0, output


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.breaks])
def test_judge_refuses_a_broken_one(host: Container, name: str) -> None:
    old, new = CASES[name].breaks or ("", "")

    def edit(text: str) -> str:
        assert old in text, f"the edit that should break {name} finds nothing to edit"
        return text.replace(old, new)

    try:
        assert judge(host, name, edit)[0] != 0
    finally:
        host.write({CASES[name].path: text_of(name, host.codename)})


def test_upgrades_are_security_only_and_leave_the_services_alone(host: Container) -> None:
    judge(host, "base/apt-upgrades.conf.j2")
    dump = host.shell("apt-config dump").stdout
    origins = [line for line in dump.splitlines() if line.startswith("Unattended-Upgrade::Origins-Pattern::")]
    assert len(origins) == 1 and "-security" in origins[0]
    for prefix in ("haproxy", "postgresql"):
        assert f'Unattended-Upgrade::Package-Blacklist:: "^{prefix}";' in dump
    assert 'APT::Periodic::Unattended-Upgrade "1";' in dump


@pytest.mark.parametrize("name", UNITS)
def test_no_service_starts_on_a_store_that_a_restore_has_not_accepted(host: Container, name: str) -> None:
    """The plugins that write the two files name them as the units do."""
    text = text_of(f"atlas/{name}@.service.j2", host.codename)
    conditions = " ".join(f"'{line}'" for line in text.splitlines() if line.startswith("Condition"))
    held, trial = map(str, (atlas_host.HELD, atlas_host.TRIAL))
    starts = {}
    for files in ("", held, f"{held} {trial}"):
        script = f"mkdir -p {Path(held).parent}; rm -f {held} {trial}; touch /tmp/x {files}; systemd-analyze condition {conditions}"
        starts[files] = host.shell(script).returncode == 0
    assert starts == {"": True, held: False, f"{held} {trial}": True}


def test_firewall_lets_in_what_is_handed_in(host: Container) -> None:
    judge(host, "base/nftables.conf.j2")
    try:
        listed = host.shell("nft -f /etc/nftables.conf && nft list chain inet filter input").stdout
    finally:
        host.shell("nft flush ruleset")
    rules = [line.strip() for line in listed.splitlines() if "dport" in line]
    assert rules == [
        'ip saddr 192.0.2.1 tcp dport 22 accept comment "ssh"',
        'ip6 saddr 2001:db8::/32 tcp dport 22 accept comment "ssh"',
        'tcp dport 80 accept comment "http"',
        'ip saddr 192.0.2.21 tcp dport { 8101, 8102 } accept comment "api"',
        'ip6 saddr 2001:db8::21 tcp dport { 8101, 8102 } accept comment "api"',
    ]
    assert "policy drop" in listed


@pytest.mark.parametrize("codename", CODENAMES)
def test_only_the_clients_may_connect_to_postgresql(codename: str) -> None:
    lines = [line for line in text_of("postgresql/pg_hba.conf.j2", codename).splitlines() if not line.startswith("#")]
    # Two logins take turns: which of them may log in is the role's own attribute.
    logins = [f"host atlas {name} 192.0.2.31/32 scram-sha-256" for name in ("atlas_a", "atlas_b")]
    assert lines == ["local all postgres peer", *logins]


def test_503_is_a_problem_document() -> None:
    head, _, body = text_of("haproxy/503.http.j2", "bookworm").partition("\n\n")
    assert "Content-Type: application/problem+json" in head
    assert json.loads(body)["status"] == 503


@pytest.mark.parametrize(
    ("answers", "slot"),
    [
        ([{"slot": None}, {"failed": True, "msg": "gone"}, {"slot": "green"}], "green"),
        ([{"unreachable": True}, {"slot": None}], "blue"),  # nothing is deployed yet
        ([{"skipped": True}], "blue"),
    ],
)
def test_a_new_edge_takes_the_slot_that_the_app_hosts_name(answers: list[dict[str, Any]], slot: str) -> None:
    tasks = yaml.safe_load((PROJECT / "roles/haproxy/tasks/configure.yml").read_text())
    (files,) = [task["vars"]["__haproxy_files"] for task in tasks if "__haproxy_files" in task.get("vars", {})]
    (content,) = [one["content"] for one in files if one["path"] == "/etc/haproxy/slot.map"]
    variables = {"__haproxy_asked": {"results": answers}}
    assert (
        Templar(loader=DataLoader(), variables=variables).template(trust_as_template(content)) == f"active be_{slot}\n"
    )
