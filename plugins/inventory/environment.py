"""Inventory plugin: opens the vault of the environment whose inventory is read, and no other.

Owns the check that the password fits and that the vault file and its plain mirrors agree. It adds no host.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import ansible.module_utils
import yaml
from ansible import constants as C  # type: ignore[attr-defined]  # noqa: N812 - as Ansible's own plugins do
from ansible import context  # type: ignore[attr-defined]
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.template import trust_as_template
from ansible.utils.display import Display

# The setting module_utils reaches modules alone; a plugin on the controller adds the directory itself.
_UTILITIES = str(Path(__file__).resolve().parents[1] / "module_utils")
if _UTILITIES not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILITIES)

from ansible.module_utils.vault_spec import SECRETS, mirror_errors, password_weakness, value_errors  # noqa: E402

DOCUMENTATION = """
name: environment
short_description: Opens the vault of an environment
description:
  - Asks C(bin/vault-client) for the password of one vault id, checks it against C(group_vars/all/vault.yml) beside the
    source, checks the secrets and their mirrors, and hands the password to the run.
  - Where the environment has no vault file yet, playbooks end with how to make one, and what only looks goes on.
options:
  plugin:
    description: Name of this plugin.
    required: true
    choices: [environment]
  vault_id:
    description: The vault id of the environment's vault file.
    required: true
    type: str
"""

READ_OTHERS = {"promote.yml": "-e from=staging -e to=production", "config_diff.yml": "-e a=staging -e b=production"}
"""Playbooks that read inventories in processes of their own, and how they are told which."""
CLIENT = Path(__file__).resolve().parents[2] / "bin" / "vault-client"


class InventoryModule(BaseInventoryPlugin):  # type: ignore[misc]
    """Parses `environment.yml`."""

    NAME = "environment"

    def verify_file(self, path: str) -> bool:
        """Whether this source is ours: a file called environment.yml. Every source is asked about, whatever it is."""
        _refuse_inventory()
        return Path(path).name == "environment.yml" and bool(super().verify_file(path))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Open the vault of the environment at `path`."""
        super().parse(inventory, loader, path, cache)
        if _others_read():
            # Neither hosts nor variables: group_vars would come to localhost too, and with them a vault file that nobody opened.
            loader.find_vars_files = lambda *_, **__: []
            return
        self._read_config_data(path)
        vault_id = self.get_option("vault_id")
        directory = Path(path).parent
        vault_file = directory / "group_vars" / "all" / "vault.yml"
        if not vault_file.is_file():
            hint = f"{directory.name} has no vault file: make vault ENV={directory.name}"
            if _runs_tasks():
                # Before the first host is touched: a role that needs no secret would go ahead, and the next one stop.
                _fail(f"{hint}. Nothing was done.")
            for spec in SECRETS:
                inventory.set_variable("all", spec.name, trust_as_template(f"{{{{ undef(hint='{hint}') }}}}"))
            return
        secret = self._secret(vault_id, vault_file)
        # In place: the run's vault context shares this list.
        loader._vault.secrets.append((vault_id, secret))

    def _secret(self, vault_id: str, vault_file: Path) -> VaultSecret:
        answer = _ask(vault_id)
        if answer.returncode != 0:
            _fail(answer.stderr.strip() or f"{CLIENT} failed for the vault id {vault_id}")
        password = answer.stdout.strip()
        weakness = password_weakness(password)
        if weakness:
            _fail(
                f"The password of the vault id {vault_id}, from {_source(vault_id)}, {weakness}. Make a new vault: see docs, or "
                "bin/vault-client --help"
            )
        secret = VaultSecret(password.encode())
        text = vault_file.read_bytes()
        if not text.startswith(b"$ANSIBLE_VAULT;"):
            _fail(
                f"{vault_file} is not encrypted. Do: ansible-vault encrypt --encrypt-vault-id {vault_id} "
                f"--vault-id {vault_id}@bin/vault-client {vault_file}"
            )
        label = text.split(b"\n", 1)[0].decode().split(";")[3:]
        if label != [vault_id]:
            _fail(
                f"{vault_file} carries the vault id {(label or ['none'])[0]}, but environment.yml says {vault_id}. "
                f"Encrypt it again with --encrypt-vault-id {vault_id}, or correct environment.yml"
            )
        plain = _opened(text, vault_id, secret)
        if plain is None and (following := _ask(vault_id, "--next")).returncode == 0:
            secret = VaultSecret(following.stdout.strip().encode())
            plain = _opened(text, vault_id, secret)
            Display().warning(
                f"A change of the vault password of {vault_id} did not end: playbooks/rotate_secrets.yml -e rotate=vault"
            )
        if plain is None:
            _fail(
                f"The password of the vault id {vault_id} does not open {vault_file}. It comes from {_source(vault_id)}. Correct it "
                "there, or take it away there: then the next source is asked (bin/vault-client --help)"
            )
        vault = yaml.safe_load(plain)
        if not isinstance(vault, Mapping):
            _fail(
                f"{vault_file} holds no variables. Do: ansible-vault edit --vault-id {vault_id}@bin/vault-client {vault_file}"
            )
        errors = value_errors(vault) + mirror_errors(vault, _plain_files(vault_file.parents[1]))
        if errors:
            mend = f"ansible-vault edit --vault-id {vault_id}@bin/vault-client {vault_file}"
            record = vault_file.parents[3] / "lab.json"
            if record.is_file():
                lab = json.loads(record.read_text())
                mend = f"make up ENV={lab['environment']} LAB={lab['name']}"
            _fail(f"{vault_file} and its mirrors do not fit: {'; '.join(errors)}. Do: {mend}")
        return secret


def _ask(vault_id: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(CLIENT), "--vault-id", vault_id, *more], capture_output=True, text=True, check=False)  # noqa: S603


def _opened(text: bytes, vault_id: str, secret: VaultSecret) -> bytes | None:
    try:
        return bytes(VaultLib([(vault_id, secret)]).decrypt(text))
    except AnsibleError:
        return None


def _others_read() -> list[str]:
    """Return the playbooks of this run, if all of them read other inventories; the one in ansible.cfg is not wanted then."""
    playbooks = sorted(Path(name).name for name in context.CLIARGS.get("args") or ())
    return playbooks if set(playbooks) <= READ_OTHERS.keys() else []


def _source(vault_id: str) -> str:
    """Return where the password comes from, in words, and what was asked before that."""
    asked = _ask(vault_id, "--source").stdout.splitlines() or ["bin/vault-client"]
    source = f"the file {asked[-1]}" if asked[-1].startswith("/") else asked[-1]
    return source + (f" (tried before: {', '.join(asked[:-1])})" if asked[:-1] else "")


def _refuse_inventory() -> None:
    """End the run if it was given an inventory (-i) and its playbooks take none."""
    given = list(context.CLIARGS.get("inventory") or ())
    if given != list(C.DEFAULT_HOST_LIST) and _runs_tasks():
        for playbook in _others_read():
            _fail(
                f"{playbook} takes no inventory, but was given -i {' -i '.join(given)}. It reads two by itself, apart from each other, "
                f"because read together they merge. Nothing was done. Do: ansible-playbook playbooks/{playbook} {READ_OTHERS[playbook]}"
            )


def _runs_tasks() -> bool:
    """Whether this is a playbook that will do something; listings and syntax checks need no secret."""
    looks = ("syntax", "listhosts", "listtasks", "listtags")
    return Path(sys.argv[0]).name == "ansible-playbook" and not any(context.CLIARGS.get(name) for name in looks)


def _plain_files(group_vars: Path) -> dict[str, str]:
    files = (path for path in sorted(group_vars.rglob("*.yml")) if path.name != "vault.yml")
    return {str(path): path.read_text(encoding="utf-8") for path in files}


def _fail(message: str) -> NoReturn:
    # An exception would be wrapped into several messages, and the next plugin would try the file.
    Display().error(message, wrap_text=False)
    raise SystemExit(4)
