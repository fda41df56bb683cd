"""Database hosts: checksums, who may connect, and what the service's role may do."""

from __future__ import annotations

from labtest import Lab, sql


def test_data_checksums_are_on(lab: Lab) -> None:
    for host in lab.group("database"):
        assert sql(lab, host, "SHOW data_checksums") == "on"


def test_passwords_are_scram_and_the_owner_cannot_log_in(lab: Lab) -> None:
    for host in lab.group("database"):
        assert sql(lab, host, "SHOW password_encryption") == "scram-sha-256"
        assert sql(lab, host, "SELECT rolcanlogin, rolsuper FROM pg_roles WHERE rolname = 'atlas'") == "f|f"
        assert sql(lab, host, "SELECT rolcanlogin, rolsuper FROM pg_roles WHERE rolname = 'atlas_a'") == "t|f"
        stored = sql(lab, host, "SELECT left(rolpassword, 13) FROM pg_authid WHERE rolname = 'atlas_a'")
        assert stored == "SCRAM-SHA-256"


def test_only_app_hosts_and_the_backup_host_are_let_in(lab: Lab) -> None:
    for host in lab.group("database"):
        rules = sql(
            lab, host, "SELECT address || ' ' || auth_method FROM pg_hba_file_rules WHERE type LIKE 'host%' ORDER BY 1"
        ).splitlines()
        addresses = {rule.split()[0].split("/")[0] for rule in rules}
        assert addresses - {"127.0.0.1", "::1"} == {lab.hosts[name] for name in lab.group("app") + lab.group("backup")}
        backup = sql(
            lab,
            host,
            "SELECT DISTINCT array_to_string(database, ',') FROM pg_hba_file_rules WHERE user_name = '{atlas_backup}'",
        )
        assert backup == "postgres,replication", "backups need no table of the service"
        assert {rule.split()[1] for rule in rules} == {"scram-sha-256"}


def test_a_forgotten_transaction_is_ended(lab: Lab) -> None:
    for host in lab.group("database"):
        assert sql(lab, host, "SHOW idle_in_transaction_session_timeout") not in ("0", "")


def test_there_is_room_for_both_slots_of_every_host(lab: Lab) -> None:
    """In the middle of a switch all of them run; and a host's share is what the service says that it opens at most."""
    for host in lab.group("database"):
        room = int(sql(lab, host, "SHOW max_connections")) - int(sql(lab, host, "SHOW superuser_reserved_connections"))
        hosts = lab.group("app")
        used = sql(
            lab, host, "SELECT client_addr, count(*) FROM pg_stat_activity WHERE application_name = 'atlas' GROUP BY 1"
        )
        most = max(int(line.split("|")[1]) for line in used.splitlines())
        assert most < room / len(hosts), f"a host holds {most} of {room} connections, and there are {len(hosts)} hosts"


def test_a_database_that_was_started_often_is_not_refused(lab: Lab) -> None:
    """A restore starts it again and again; with a limit, systemd refuses the start after the fifth in ten seconds."""
    for host in lab.group("database"):
        units = "systemctl list-units --plain --no-legend --type=service 'postgresql@*' | cut -d' ' -f1"
        shown = lab.ssh(host, f"systemctl show --value --property StartLimitIntervalUSec $({units})").stdout.split()
        assert shown and set(shown) == {"0"}, shown
