"""The derived inventory of a lab: the environment's hosts and variables by link, secrets and addresses of its own.

Owns `.lab/NAME/inventory`. The link stops at every vault file: no real secret is opened, not even read. What sets the
address, the key and every external endpoint is the last file of each host, which outranks all else in an inventory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils import lab_tls
from ansible.module_utils.labs import ORIGIN, Lab, LabError, Record, edges, write_file
from ansible.module_utils.vault_spec import generate, random_password

LAST = "zz-lab.yml"


def is_vault_file(path: Path) -> bool:
    """Whether a file is a vault file: by its name (then it is not even opened) or by its first bytes."""
    if path.name.split(".", 1)[0].lower().startswith("vault"):
        return True
    with path.open("rb") as stream:
        return stream.read(14) == b"$ANSIBLE_VAULT"


def variable_files(directory: Path) -> dict[str, list[Path]]:
    """Name of group or host -> its files, for NAME.yml as well as NAME/*.yml; vault files left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*")) if directory.is_dir() else []:
        if path.is_file() and path.suffix in (".yml", ".yaml", ".json", "") and not is_vault_file(path):
            first = path.relative_to(directory).parts[0]
            name = first if (directory / first).is_dir() else Path(first).stem
            found.setdefault(name, []).append(path)
    return found


def host_variables(lab: Lab, record: Record, host: str, tls: Collection[str]) -> dict[str, Any]:
    """What a lab host has of its own; all that could lead outside the lab is set here. *tls*: edges with HTTPS."""
    gateway = record.gateway
    origin = record.origin_address
    return {
        "ansible_connection": "ssh",
        "ansible_host": record.addresses[host],
        "ansible_port": 22,
        "ansible_user": "deploy",
        "ansible_ssh_private_key_file": str(lab.directory / "ssh_key"),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={lab.directory / 'known_hosts'} -o IdentitiesOnly=yes",
        # A jump host of the real environment would lead out of the lab.
        "ansible_ssh_extra_args": "",
        "ansible_ssh_host": record.addresses[host],
        "debian_release": record.releases[host],
        "lab": True,
        "lab_name": lab.name,
        "lab_origin": {"name": ORIGIN, "address": origin},
        "release_pin_required": False,
        "base_ssh_port": 22,
        "base_ssh_sources": [gateway],
        "atlas_fetch_allow_networks": [f"{origin}/32"],
        # Never the environment's own certificate: its key is no lab's business.
        "haproxy_tls_pem": _lookup(lab.directory / "tls" / f"{host}.pem") if host in tls else "",
    }


def _lookup(path: Path) -> str:
    return f"{{{{ lookup('ansible.builtin.file', '{path}') }}}}"


def serves_tls(source: Path) -> bool:
    """Whether the environment's edges serve HTTPS: `haproxy_tls` in its group_vars, where a literal must stand."""
    found = False
    for name in ("all", "edge"):
        for path in variable_files(source / "group_vars").get(name, []):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and "haproxy_tls" in values:
                found = values["haproxy_tls"] is True
    return found


def derive(lab: Lab, record: Record, source: Path) -> list[str]:
    """Bring `.lab/NAME/inventory` to what `source` and the record say; returns what was changed."""
    target = lab.directory / "inventory"
    files: dict[Path, str] = {}
    links: dict[Path, Path] = {target / "hosts.yml": source / "hosts.yml"}
    for kind in ("group_vars", "host_vars"):
        for name, paths in variable_files(source / kind).items():
            for path in paths:
                # Whatever a host's file is called, ours comes after it.
                place = target / kind / name / (path.name if kind == "group_vars" else f"00-{path.name}")
                if place in links:
                    raise LabError(f"{path} and {links[place]} would be the same file in a lab: rename one of them")
                links[place] = path
    files[target / "environment.yml"] = _yaml({"plugin": "environment", "vault_id": f"lab-{lab.name}"})
    tls = edges(source) if serves_tls(source) else []
    for host in record.addresses:
        files[target / "host_vars" / host / LAST] = _yaml(host_variables(lab, record, host, tls))
    vault = target / "group_vars" / "all" / "vault.yml"

    changes = []
    for path in sorted(target.rglob("*")) if target.exists() else []:
        if (path.is_symlink() or path.is_file()) and path not in files and path not in links and path != vault:
            path.unlink()
            changes.append(f"{path.relative_to(target)} removed")
    for path, real in links.items():
        wanted = os.path.relpath(real, path.parent)
        if not path.is_symlink() or os.readlink(path) != wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(wanted)
            changes.append(f"{path.relative_to(target)} linked")
    for path, content in files.items():
        if write_file(path, content):
            changes.append(f"{path.relative_to(target)} written")
    changes += _secrets(lab, vault)
    if tls:
        served = {edge: record.addresses[edge] for edge in tls}
        changes += lab_tls.ensure(lab.directory / "tls", lab.name, record.subnet, served)
    changes += _access(lab, record, source, vault)
    return changes


def _secrets(lab: Lab, vault: Path) -> list[str]:
    password = lab.directory / "vault-password"
    if password.is_file() and vault.is_file():
        return _complete(lab, vault, password)
    write_file(password, random_password() + "\n", 0o600)
    encrypt_vault(vault, f"lab-{lab.name}", password)
    return ["secrets generated"]


def _complete(lab: Lab, vault: Path, password: Path) -> list[str]:
    """Give a lab that was raised before a secret came into use that secret; the others stay."""
    known = yaml.safe_load(ansible_vault("view", "--vault-id", f"lab-{lab.name}@{password}", str(vault)))
    missing = {name: value for name, value in generate().items() if name not in known}
    if missing:
        encrypt_vault(vault, f"lab-{lab.name}", password, known | missing)
    return [f"{name} generated" for name in missing]


def _access(lab: Lab, record: Record, source: Path, vault: Path) -> list[str]:
    """Keep access.json: what a person or a test needs to use the lab. The token is read again when the vault changed."""
    path = lab.directory / "access.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    if "token" in known and path.stat().st_mtime_ns > vault.stat().st_mtime_ns:
        token = known["token"]
    else:
        client = lab.directory / "vault-password"
        plain = ansible_vault("view", "--vault-id", f"lab-{lab.name}@{client}", str(vault))
        token = yaml.safe_load(plain)["vault_atlas_tokens"][0]["token"]
    tls = serves_tls(source)
    content = {
        "url": f"{'https' if tls else 'http'}://{record.addresses[edges(source)[0]]}",
        "token": token,
        "ca": str(lab.directory / "tls" / "ca.pem") if tls else None,
        "hosts": record.addresses,
        "ssh_key": str(lab.directory / "ssh_key"),
    }
    return ["access.json written"] if write_file(path, json.dumps(content, indent=2) + "\n", 0o600) else []


def encrypt_vault(vault: Path, vault_id: str, client: Path, secrets: Mapping[str, Any] | None = None) -> None:
    """Write `secrets`, or new ones, to `vault`, encrypted; the plain text exists only in memory and in a pipe."""
    vault.parent.mkdir(parents=True, exist_ok=True)
    draft = vault.with_name(f".vault.{os.getpid()}")
    arguments = ["--vault-id", f"{vault_id}@{client}", "--encrypt-vault-id", vault_id, "--output", str(draft), "-"]
    try:
        ansible_vault("encrypt", *arguments, plain=yaml.safe_dump(dict(secrets or generate()), sort_keys=False))
        draft.chmod(0o600)
        draft.replace(vault)
    finally:
        draft.unlink(missing_ok=True)


def ansible_vault(action: str, *arguments: str, plain: str | None = None) -> str:
    """Output of one ansible-vault command, of the same virtual environment as this Python."""
    command = str(Path(sys.executable).with_name("ansible-vault"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_VAULT")}
    result = subprocess.run(  # noqa: S603
        [command, action, *arguments], input=plain, capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode != 0:
        raise LabError(f"ansible-vault {action} failed: {result.stderr.strip()[-400:]}")
    return result.stdout


def _yaml(content: dict[str, Any]) -> str:
    return "# Written by the lab; changed at the next run.\n" + yaml.safe_dump(content, sort_keys=True, width=200)
