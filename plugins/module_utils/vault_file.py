"""One vault file: opened, changed atomically with a backup, and given another password.

The plain text is only in memory and in pipes. Owns the backups below ``.cache/vault`` and the two files of a password.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.atlas_host import write_atomically
from ansible.module_utils.lab_inventory import ansible_vault
from ansible.module_utils.labs import LabError
from ansible.module_utils.release import keep
from ansible.module_utils.vault_spec import numbered, password_weakness, random_password, value_errors

KEPT = 20
NEXT = ".next"
"""Ending of the file with a password that a change of it has made and not yet put in place."""


class VaultError(Exception):
    """A vault file that cannot be opened or changed; the message says what to do."""


class VaultFile:
    """The vault file of *inventory*, opened by the client script of *project*."""

    def __init__(self, inventory: Path, project: Path) -> None:
        self.path = inventory / "group_vars" / "all" / "vault.yml"
        self.client = project / "bin" / "vault-client"
        self.vault_id = str(yaml.safe_load((inventory / "environment.yml").read_text(encoding="utf-8"))["vault_id"])
        self.backups = project / ".cache" / "vault" / self.vault_id
        self.backups.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self, password: Path | None = None) -> dict[str, Any]:
        """Return the secrets, opened with the client, or with the *password* in a file. Raises VaultError."""
        try:
            plain = ansible_vault("view", "--vault-id", f"{self.vault_id}@{password or self.client}", str(self.path))
        except LabError as error:
            raise VaultError(f"{self.path} cannot be opened: {error}") from None
        found = yaml.safe_load(plain)
        if not isinstance(found, dict):
            raise VaultError(f"{self.path} holds no variables.")
        return found

    def write(self, values: Mapping[str, Any], password: Path | None = None) -> None:
        """Replace the secrets by *values*, whole or not at all; what was there is kept as a backup. Raises VaultError."""
        wrong = value_errors(values)
        if wrong:
            raise VaultError(f"{self.path} was left as it is: {'; '.join(wrong)}")
        self.back_up()
        draft = self.path.with_name(f".vault.{os.getpid()}")
        arguments = ["--vault-id", f"{self.vault_id}@{password or self.client}", "--encrypt-vault-id", self.vault_id]
        try:
            ansible_vault(
                "encrypt", *arguments, "--output", str(draft), "-", plain=yaml.safe_dump(dict(values), sort_keys=False)
            )
            shown = ansible_vault("view", "--vault-id", f"{self.vault_id}@{password or self.client}", str(draft))
            if yaml.safe_load(shown) != values:
                raise VaultError(f"{self.path} was left as it is: what was encrypted does not read as it should")
            mode = self.path.stat().st_mode & 0o777
            keep(draft, self.path)
            self.path.chmod(mode)
        except LabError as error:
            raise VaultError(f"{self.path} was left as it is: {error}") from None
        finally:
            draft.unlink(missing_ok=True)

    def back_up(self) -> Path:
        """Copy the file as it is, encrypted, to the backups, and drop the oldest of those."""
        copy = self.backups / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{time.monotonic_ns()}.yml"
        keep(self.path, copy)
        copy.chmod(0o600)
        for old in sorted(self.backups.glob("*.yml"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()
        return copy

    def password_file(self) -> Path:
        """Return the file that the client takes the password from; VaultError where it takes it from elsewhere."""
        done = subprocess.run(
            [str(self.client), "--vault-id", self.vault_id, "--source"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise VaultError(done.stderr.strip())
        source = done.stdout.splitlines()[-1]
        if not source.startswith("/"):
            raise VaultError(
                f"The password of the vault id {self.vault_id} comes from {source}, where this cannot put another. Change it by "
                f"hand: ansible-vault rekey --vault-id {self.vault_id}@bin/vault-client --new-vault-id {self.vault_id}@prompt {self.path}"
            )
        return Path(source)

    def rekey(self) -> str:
        """Give the file another password, and the password's file with it; return what was done.

        The new password is on disk before the vault needs it, and the old one until the vault does not: killed anywhere, the
        vault opens with one of the two, and the next call ends what this one began.
        """
        file = self.password_file()
        following = file.with_name(file.name + NEXT)
        if following.is_file() and self._opens(following):
            os.replace(following, file)
            return "a change of the vault password that did not end is ended"
        values = self.read(file)
        write_atomically(following, random_password() + "\n", 0o600)
        weakness = password_weakness(following.read_text(encoding="utf-8").strip())
        if weakness:
            raise VaultError(f"The new password {weakness}")
        self.write(numbered(values), following)
        os.replace(following, file)
        return "the vault password is another"

    def _opens(self, password: Path) -> bool:
        try:
            self.read(password)
        except VaultError:
            return False
        return True
