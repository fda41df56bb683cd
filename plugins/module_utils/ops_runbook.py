"""What a finding of an operations check is: its kind, the command that shows why, the one that mends, and its runbook page.

Pure. Every kind has the page docs/runbooks/KIND.md, and so has whatever ``atlas doctor`` and /health find (a test says so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """The two commands; ``INV`` and ``HOST`` are filled in, ``SUBJECT`` is what the finding is about."""

    look: str
    mend: str


@dataclass(frozen=True)
class Finding:
    """Something that needs a person: on which *host*, *what*, how to *look* at it, what will *mend* it, and the *page*."""

    kind: str
    host: str
    what: str
    look: str
    mend: str
    page: str

    def as_dict(self) -> dict[str, str]:
        """Return it for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it for people."""
        return [f"{self.host}: {self.what}", f"  look  {self.look}", f"  mend  {self.mend}", f"  page  {self.page}"]


PLAYBOOK = "ansible-playbook -i INV playbooks/"
STATUS = f"{PLAYBOOK}status.yml"


def on_host(command: str) -> str:
    """Return the command that runs *command* on the finding's host."""
    quoted = command.replace("'", "'\\''")
    return f"ansible -i INV HOST -m shell -a '{quoted}'"


KINDS: dict[str, Kind] = {
    # Hosts and services
    "host-unreachable": Kind("ansible -i INV HOST -m ping", "start the host or mend its network, then run the check again"),
    "service-down": Kind(on_host("systemctl list-units \"atlas-*\"; atlas doctor"), f"{PLAYBOOK}deploy.yml -e deploy_force=true"),
    "deployment-drift": Kind(STATUS, f"{PLAYBOOK}deploy.yml"),
    "edge-drift": Kind(STATUS, f"{PLAYBOOK}site.yml"),
    "database-down": Kind(on_host("pg_lsclusters; journalctl -u \"postgresql@*\" -n 50"), on_host("systemctl restart postgresql")),
    "unit-failed": Kind(on_host("systemctl status --no-pager SUBJECT"), on_host("systemctl restart SUBJECT")),
    "new-errors": Kind(on_host("journalctl --no-pager -n 50 SUBJECT"), "mend the cause; it is known from now on"),
    "settings-refused": Kind(on_host("atlas doctor"), f"correct group_vars, then {PLAYBOOK}deploy.yml"),
    "credentials-unreadable": Kind(on_host("atlas doctor"), f"{PLAYBOOK}deploy.yml -e deploy_force=true"),
    "clock-wrong": Kind(on_host("timedatectl status"), on_host("systemctl restart systemd-timesyncd")),
    "schema-unfit": Kind(on_host("atlas db status"), on_host("atlas db migrate")),
    "sqlite-vulnerable": Kind(on_host("atlas doctor"), f"{PLAYBOOK}deploy.yml"),
    "wal-large": Kind(on_host("fuser -v /var/lib/atlas/atlas.db-wal"), "end the reader that the command above names"),
    "audit-keeper": Kind(on_host("atlas doctor"), f"{PLAYBOOK}site.yml"),
    "port-taken": Kind(on_host("ss -ltnp"), "stop the program that took the port"),
    "nobody-admitted": Kind(on_host("atlas admission list"), f"{PLAYBOOK}deploy.yml -e deploy_force=true"),
    "no-leader": Kind(on_host("systemctl status --no-pager \"atlas-services@*\""), on_host("systemctl restart \"atlas-services@*\"")),
    "queue-stalled": Kind(on_host("systemctl status --no-pager \"atlas-core@*\"; atlas doctor"), on_host("systemctl restart \"atlas-core@*\"")),
    "dead-letters": Kind(on_host("atlas doctor"), "requeue or discard them: docs/queue.md"),
    "breakers-open": Kind(on_host("atlas doctor"), "nothing: a breaker closes by itself when the remote host answers"),
    "keys-old": Kind(on_host("atlas keys status"), on_host("atlas keys reencrypt")),
    "token-expires": Kind(on_host("atlas tokens list"), f"{PLAYBOOK}rotate_secrets.yml -e rotate=tokens"),
    "store-held-up": Kind(on_host("atlas doctor"), "end what the message names"),
    "probe-failed": Kind(on_host("journalctl --no-pager -u \"atlas-monitoring@*\" -n 20; atlas doctor"), on_host("systemctl restart \"atlas-core@*\"")),
    # Backups
    "backup-failed": Kind(STATUS, f"{PLAYBOOK}backup.yml"),
    "backup-log": Kind(on_host("systemctl status --no-pager atlas-backup-log"), f"{PLAYBOOK}site.yml"),
    "backup-damaged": Kind(on_host("atlas-backup check"), f"{PLAYBOOK}backup.yml"),
    "drill-failed": Kind(STATUS, f"{PLAYBOOK}restore_drill.yml"),
    # What comes with time
    "certificate-ends": Kind(STATUS, f"put a new certificate in place (docs/how-to/tls.md), then {PLAYBOOK}site.yml"),
    "secrets-old": Kind(STATUS, f"{PLAYBOOK}rotate_secrets.yml -e rotate=SUBJECT"),
    "rotation-unfinished": Kind(STATUS, f"{PLAYBOOK}rotate_secrets.yml -e rotate=SUBJECT"),
    "disk-full": Kind(on_host("df -h SUBJECT; du -xh --max-depth=2 SUBJECT | sort -h | tail -n 20"), "make room, or give it more"),
    "capacity-short": Kind(on_host("df -h SUBJECT; free -m"), "give it more before then (docs/how-to/scale.md)"),
    # Performance and upgrades
    "slower": Kind(STATUS, "find out what changed; if it is meant to be so: -e ops_baseline=true"),
    "errors-more": Kind(on_host("journalctl --no-pager -u haproxy -n 100"), f"{PLAYBOOK}rollback.yml, if it came with a deploy"),
    "updates-pending": Kind(f"{PLAYBOOK}patch.yml --check", f"{PLAYBOOK}patch.yml"),
    "updates-unknown": Kind(on_host("apt-get update"), "mend the host's way to its archive, then run the check again"),
    "boot-pending": Kind(f"{PLAYBOOK}patch.yml --check", f"{PLAYBOOK}patch.yml"),
    # What should not be there
    "account-unexpected": Kind(on_host("getent passwd SUBJECT; id SUBJECT; last SUBJECT"), on_host("usermod --lock --expiredate 1 SUBJECT")),
    "port-unexpected": Kind(on_host("ss -lntup"), "stop the program, or name the port in ops_ports_expected"),
    "firewall-differs": Kind(on_host("nft list ruleset"), f"{PLAYBOOK}site.yml"),
    "unit-exposed": Kind(on_host("systemd-analyze security --no-pager SUBJECT"), f"{PLAYBOOK}site.yml"),
    "permissions-open": Kind(on_host("ls -ld SUBJECT"), on_host("chmod o-rwx SUBJECT")),
    "setuid-new": Kind(on_host("ls -l SUBJECT; dpkg -S SUBJECT"), on_host("chmod u-s,g-s SUBJECT")),
    # The quarterly exercise
    "recovery-failed": Kind("tail -n 50 SUBJECT", f"what the step says; then {PLAYBOOK}ops_quarterly.yml"),
    "recovery-slow": Kind("the times above", "give hosts and mirrors more, or allow more: ops_recovery_minutes"),
}  # fmt: skip

DOCTOR = {
    "settings": "settings-refused", "credentials": "credentials-unreadable", "disk": "disk-full", "backup": "backup-failed",
    "database": "database-down", "clock": "clock-wrong", "schema": "schema-unfit", "sqlite": "sqlite-vulnerable",
    "wal": "wal-large", "audit": "audit-keeper", "services": "service-down", "ports": "port-taken",
    "admission": "nobody-admitted", "leader": "no-leader", "queue": "queue-stalled", "dead-letters": "dead-letters",
    "keys": "keys-old", "breakers": "breakers-open", "tokens": "token-expires", "store": "store-held-up",
}  # fmt: skip
"""Check of ``atlas doctor`` → kind."""

HEALTH = {
    "database": "database-down", "schema": "schema-unfit", "credentials": "credentials-unreadable",
    "draining": "service-down", "backup": "backup-failed",
}  # fmt: skip
"""Check of /health and /readyz → kind."""

BACKUP_JOBS = {
    "backup": "backup-failed",
    "increment": "backup-failed",
    "check": "backup-damaged",
    "drill": "drill-failed",
}
"""Job in the backup host's report → kind."""


def finding(kind: str, host: str, what: str, inventory: str, subject: str = "", mend: str = "") -> Finding:
    """Return the finding of *kind* about *subject*; *mend* replaces what its kind says, where somebody knows better."""
    values: Mapping[str, str] = {"INV": inventory, "HOST": host, "SUBJECT": subject}

    def filled(text: str) -> str:
        for word, value in values.items():
            text = text.replace(word, value)
        return text

    about = KINDS[kind]
    return Finding(kind, host, what, filled(about.look), filled(mend or about.mend), f"docs/runbooks/{kind}.md")


def told(findings: list[dict[str, Any]]) -> str:
    """Return findings for people, numbered."""
    lines = []
    for number, each in enumerate(findings, 1):
        first, *others = Finding(**each).lines()
        lines += [f"{number}. {first}", *(f"   {line}" for line in others)]
    return "\n".join(lines)
