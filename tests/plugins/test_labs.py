"""Labs without a machine: names, addresses, images' sources, and the derived inventory, which may lead nowhere else."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import lab_tls
from ansible.module_utils.lab_images import KEYRING, debian_sources, recipe
from ansible.module_utils.lab_inventory import derive
from ansible.module_utils.labs import (
    Lab,
    LabError,
    Podman,
    Record,
    allow_inotify,
    assign_addresses,
    check_name,
    environment_hosts,
    free_subnet,
    runtime_name,
)

PROJECT = Path(__file__).resolve().parents[2]
SUBNET = ipaddress.IPv4Network("10.91.7.0/24")


@pytest.mark.parametrize("name", ["", "Up", "a b", "-a", "a-", "../x", "x" * 40])
def test_a_name_that_cannot_be_a_lab_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="no name for a lab"):
        check_name(name)


def test_a_name_meets_the_same_subnet_again_and_avoids_what_is_taken() -> None:
    first = free_subnet("staging", [])
    assert free_subnet("staging", []) == first
    second = free_subnet("staging", [first])
    assert not second.overlaps(first)
    wide = ipaddress.IPv4Network("10.91.0.0/17")
    assert not free_subnet("staging", [first, wide]).overlaps(wide)
    with pytest.raises(LabError, match="Every subnet"):
        free_subnet("staging", [ipaddress.IPv4Network("10.0.0.0/8")])


def test_a_host_keeps_its_address_when_others_come_and_go() -> None:
    before = assign_addresses(SUBNET, ["a", "b", "c"])
    after = assign_addresses(SUBNET, ["new", "c", "a"], before)
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    assert len(set(after.values())) == 3
    assert all(ipaddress.ip_address(address) in SUBNET for address in after.values())


def test_the_runtime_fits_the_machine() -> None:
    def both(tool: str) -> bool:
        return tool in ("crun", "runc")

    assert runtime_name(True, both) == "runc"
    assert runtime_name(False, both) == "crun"
    assert runtime_name(True, lambda tool: tool == "crun") is None


def test_a_low_limit_of_inotify_instances_is_raised_or_named(tmp_path: Path) -> None:
    setting = tmp_path / "limit"
    setting.write_text("128\n")
    assert allow_inotify(Podman(prefix=[]), setting)
    assert setting.read_text() == "1024"
    assert allow_inotify(Podman(prefix=[]), setting) == []
    setting.write_text("128\n")
    with pytest.raises(LabError, match="sysctl -w fs.inotify.max_user_instances=1024"):
        allow_inotify(Podman(prefix=["false"]), setting)


def environment(tmp_path: Path, text: str) -> Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/hosts.yml").write_text(text)
    return tmp_path / "shop"


def test_hosts_are_found_in_nested_groups_with_their_release(tmp_path: Path) -> None:
    inventory = environment(
        tmp_path,
        "all: {hosts: {a: {debian_release: trixie}}, children: {app: {hosts: {a: {}, b: {}}, children: {x: {hosts: {c: }}}}}}",
    )
    assert environment_hosts(inventory) == {"a": "trixie", "b": "bookworm", "c": "bookworm"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("all: {hosts: {a: {debian_release: bullseye}}}", "supported: bookworm, trixie"),
        ("all: {hosts: {'app[1:3]': {}}}", "cannot be a lab host"),
        ("all: {hosts: {origin: {}}}", "not 'origin'"),
        ("all: {hosts: {}}", "names no host"),
        ("all: [", "not valid YAML"),
    ],
)
def test_a_wrong_hosts_file_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(LabError, match=re.escape(says)):
        environment_hosts(environment(tmp_path, text))


def test_an_unknown_environment_lists_the_known_ones(tmp_path: Path) -> None:
    environment(tmp_path, "all: {hosts: {a: {}}}")
    with pytest.raises(LabError, match="Environments: shop"):
        environment_hosts(tmp_path / "nope")


def test_sources_are_the_machines_mirrors_for_either_release() -> None:
    targets = [
        "http://mirror.test/debian/|bookworm|main|Debian|Packages",
        "http://mirror.test/debian/|bookworm|contrib|Debian|Packages",
        "http://mirror.test/debian/|bookworm|main|Debian|Translations",
        "http://mirror.test/security/|bookworm-security|main|Debian|Packages",
        "https://shop.test/apt/|bookworm|main|Shop|Packages",
        "file:/srv/debian/|bookworm-updates|main|Debian|Packages",
    ]
    assert debian_sources(targets, "bookworm", "trixie") == [
        f"deb [signed-by={KEYRING}] http://mirror.test/debian/ trixie main",
        f"deb [signed-by={KEYRING}] http://mirror.test/security/ trixie-security main",
    ]
    assert debian_sources(["https://shop.test/apt/|nodistro|main|Shop|Packages"], "bookworm", "bookworm") == []


def test_an_image_is_made_again_when_its_recipe_changes() -> None:
    assert recipe("bookworm", ["a"]) == recipe("bookworm", ["a"])
    assert len({recipe("bookworm", ["a"]), recipe("trixie", ["a"]), recipe("bookworm", ["b"])}) == 3


# --- a lab of production --------------------------------------------------------------------------------------------

ADDRESS = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
DUMP = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.copy:
        content: "{{ dict(names | zip(query('ansible.builtin.vars', *names))) | to_json }}"
        dest: "{{ dump }}/{{ inventory_hostname }}.json"
        mode: "0600"
      delegate_to: localhost
      become: false
      vars:
        names: "{{ hostvars[inventory_hostname].keys() | list }}"
        ansible_connection: local
        ansible_python_interpreter: "{{ ansible_playbook_python }}"
"""


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    tool = str(Path(sys.executable).with_name(command[0]))
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("ATLAS_", "ANSIBLE_"))}
    settings |= {"HOME": str(checkout / "home"), "ANSIBLE_CONFIG": str(checkout / "ansible.cfg")}
    return subprocess.run([tool, *command[1:]], cwd=checkout, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project whose production has a vault that nobody can open, and traps on its way to the hosts."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("plugins", "inventories"):
        shutil.copytree(PROJECT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "bin").mkdir()
    shutil.copy(PROJECT / "bin/vault-client", root / "bin")
    shutil.copy(PROJECT / "ansible.cfg", root)
    production = root / "inventories/production"
    (root / "unknown").write_text("9f-Nobody-knows-this-password-7Qw3\n")
    command = ["encrypt", "--vault-id", f"production@{root / 'unknown'}", "--output"]
    for name in ("vault.yml", "more.yml"):
        (root / "plain.yml").write_text("vault_atlas_database_password: the-real-one\n")
        result = run(
            root, "ansible-vault", *command, str(production / "group_vars/all" / name), str(root / "plain.yml")
        )
        assert result.returncode == 0, result.stderr
    (root / "unknown").unlink()
    traps = production / "host_vars/app1"
    traps.mkdir(parents=True)
    (traps / "zz.yml").write_text('ansible_host: 203.0.113.99\nansible_ssh_common_args: "-J 203.0.113.98"\n')
    (production / "host_vars/db1.yml").write_text('ansible_ssh_extra_args: "-J 203.0.113.97"\nansible_port: 2222\n')
    return root


@pytest.fixture(scope="module")
def production(checkout: Path) -> Path:
    """The derived inventory of a lab of that production."""
    lab = Lab(checkout, "rehearsal")
    source = checkout / "inventories/production"
    releases = environment_hosts(source)
    derive(
        lab, Record("rehearsal", "production", str(SUBNET), releases, assign_addresses(SUBNET, list(releases))), source
    )
    return lab.directory / "inventory"


def resolved(checkout: Path, inventory: Path, directory: Path) -> dict[str, str]:
    """All variables of every host after templating, as JSON text."""
    directory.mkdir()
    (checkout / "dump.yml").write_text(DUMP)
    result = run(checkout, "ansible-playbook", "-i", str(inventory), "dump.yml", "-e", f"dump={directory}")
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.stem: path.read_text() for path in directory.iterdir()}


def outside(text: str) -> set[str]:
    """Addresses in a text that are neither in the lab nor on loopback."""
    addresses = {ipaddress.ip_address(found) for found in ADDRESS.findall(text)}
    return {str(address) for address in addresses if address not in SUBNET and not address.is_loopback and int(address)}


def test_a_lab_of_production_reaches_no_real_address(checkout: Path, production: Path, tmp_path: Path) -> None:
    hosts = resolved(checkout, production, tmp_path / "dump")
    assert sorted(hosts) == sorted(environment_hosts(checkout / "inventories/production"))
    for host, text in hosts.items():
        assert outside(text) == set(), host
        variables: dict[str, Any] = json.loads(text)
        assert ipaddress.ip_address(variables["ansible_host"]) in SUBNET
        assert variables["ansible_port"] == 22
        assert variables["lab"] is True
        assert variables["release_pin_required"] is False


def test_the_search_for_real_addresses_can_find_one(checkout: Path) -> None:
    for name in ("vault.yml", "more.yml"):
        assert (checkout / "inventories/production/group_vars/all" / name).exists()
    assert outside((checkout / "inventories/production/hosts.yml").read_text())
    assert outside((checkout / "inventories/production/host_vars/app1/zz.yml").read_text())


def test_a_lab_raised_before_a_secret_came_into_use_says_what_to_do_and_gets_it(
    checkout: Path, production: Path
) -> None:
    vault = production / "group_vars/all/vault.yml"
    kept, command = vault.read_bytes(), f"lab-rehearsal@{production.parent / 'vault-password'}"
    plain = run(checkout, "ansible-vault", "view", "--vault-id", command, str(vault)).stdout
    old = checkout / "old.yml"
    old.write_text("\n".join(line for line in plain.splitlines() if not line.startswith("vault_backup_")))
    encrypt = ("ansible-vault", "encrypt", "--vault-id", command, "--encrypt-vault-id", "lab-rehearsal", "--output")
    assert run(checkout, *encrypt, str(vault), str(old)).returncode == 0
    (production.parent / "lab.json").write_text('{"name": "rehearsal", "environment": "production"}')
    try:
        refused = run(checkout, "ansible-inventory", "-i", str(production), "--list")
        assert refused.returncode != 0
        assert "vault_backup_repository_password is missing" in refused.stderr
        assert "make up ENV=production LAB=rehearsal" in refused.stderr
        lab, source = Lab(checkout, "rehearsal"), checkout / "inventories/production"
        releases = environment_hosts(source)
        record = Record("rehearsal", "production", str(SUBNET), releases, assign_addresses(SUBNET, list(releases)))
        assert "vault_backup_repository_password generated" in derive(lab, record, source)
        completed = yaml.safe_load(run(checkout, "ansible-vault", "view", "--vault-id", command, str(vault)).stdout)
        assert {**completed, **yaml.safe_load(old.read_text())} == completed
        assert len(completed["vault_backup_repository_password"]) == 43
    finally:
        vault.write_bytes(kept)
        (production.parent / "lab.json").unlink()


def test_a_lab_of_production_opens_no_real_vault(checkout: Path, production: Path) -> None:
    real = {
        path.resolve()
        for path in (checkout / "inventories/production").rglob("*.yml")
        if b"$ANSIBLE_VAULT" in path.read_bytes()
    }
    assert len(real) == 2
    assert not real & {path.resolve() for path in production.rglob("*")}
    listing = run(checkout, "ansible-inventory", "-i", str(production), "--list")
    assert listing.returncode == 0, listing.stderr
    assert "the-real-one" not in listing.stdout
    password = json.loads(listing.stdout)["_meta"]["hostvars"]["db1"]["vault_atlas_database_password"]
    assert len(password) == 43

    # The control: one linked vault file, and the lab does not load.
    link = production / "group_vars/all/more.yml"
    link.symlink_to(checkout / "inventories/production/group_vars/all/more.yml")
    try:
        assert run(checkout, "ansible-inventory", "-i", str(production), "--list").returncode != 0
    finally:
        link.unlink()


def test_nothing_is_written_under_inventories_and_a_second_run_changes_nothing(
    checkout: Path, production: Path
) -> None:
    source = checkout / "inventories/production"
    lab = Lab(checkout, "rehearsal")
    releases = environment_hosts(source)
    record = Record("rehearsal", "production", str(SUBNET), releases, assign_addresses(SUBNET, list(releases)))
    before = {path: path.lstat().st_mtime_ns for path in source.rglob("*")}
    assert derive(lab, record, source) == []
    assert {path: path.lstat().st_mtime_ns for path in source.rglob("*")} == before


def test_what_leaves_the_environment_leaves_the_lab(checkout: Path, production: Path) -> None:
    extra = checkout / "inventories/production/group_vars/app/extra.yml"
    source = checkout / "inventories/production"
    lab = Lab(checkout, "rehearsal")
    releases = environment_hosts(source)
    record = Record("rehearsal", "production", str(SUBNET), releases, assign_addresses(SUBNET, list(releases)))
    extra.write_text("some_setting: 1\n")
    assert derive(lab, record, source) == ["group_vars/app/extra.yml linked"]
    extra.unlink()
    assert derive(lab, record, source) == ["group_vars/app/extra.yml removed"]


def test_secrets_of_a_lab_are_private(production: Path) -> None:
    directory = production.parent
    for name in ("vault-password", "access.json", "inventory/group_vars/all/vault.yml"):
        assert (directory / name).stat().st_mode & 0o077 == 0, name
    assert (
        (directory / "inventory/group_vars/all/vault.yml")
        .read_bytes()
        .startswith(b"$ANSIBLE_VAULT;1.2;AES256;lab-rehearsal\n")
    )
    access = json.loads((directory / "access.json").read_text())
    assert set(access) == {"url", "token", "ca", "hosts", "ssh_key"}


def test_a_lab_of_an_environment_with_https_has_its_own_authority(checkout: Path, production: Path) -> None:
    tls = production.parent / "tls"
    access = json.loads((production.parent / "access.json").read_text())
    assert access["url"].startswith("https://") and access["ca"] == str(tls / "ca.pem")
    assert {path.name: path.stat().st_mode & 0o077 for path in tls.iterdir() if path.name != "ca.pem"} == {
        "ca.key": 0,
        "edge1.pem": 0,
        "edge2.pem": 0,
    }
    last = yaml.safe_load((production / "host_vars/edge1/zz-lab.yml").read_text())["haproxy_tls_pem"]
    assert str(tls / "edge1.pem") in last
    assert yaml.safe_load((production / "host_vars/app1/zz-lab.yml").read_text())["haproxy_tls_pem"] == ""


def handshake(tls: Path, edge: str, name: str) -> str:
    """Outcome of a handshake in memory between a client that trusts tls/ca.pem and tls/EDGE.pem, asked for as *name*."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tls / f"{edge}.pem")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=tls / "ca.pem")
    client = context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(3):
            for side in (client, server):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return "trusted"


def test_the_authority_of_a_lab_vouches_for_its_own_addresses_alone(tmp_path: Path) -> None:
    assert len(lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.11"})) == 2
    assert lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.11"}) == []
    assert handshake(tmp_path, "a", "10.91.7.11") == "trusted"
    assert "IP address mismatch" in handshake(tmp_path, "a", "10.91.7.12")
    assert lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.12"}) == ["certificate for a issued"]
    # An address outside the lab's network: the authority signs, nobody believes it.
    lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"b": "192.0.2.1"})
    assert "permitted subtree violation" in handshake(tmp_path, "b", "192.0.2.1")
    assert len(lab_tls.ensure(tmp_path, "one", "10.91.8.0/24", {"a": "10.91.8.11"})) == 2


def test_a_certificate_is_renewed_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_tls, "EDGE_DAYS", lab_tls.RENEW_DAYS - 1)
    lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.11"})
    monkeypatch.undo()
    assert lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.11"}) == ["certificate for a issued"]
    assert lab_tls.ensure(tmp_path, "one", "10.91.7.0/24", {"a": "10.91.7.11"}) == []
