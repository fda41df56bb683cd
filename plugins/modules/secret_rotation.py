#!/usr/bin/python
"""Module secret_rotation: rotates secrets of one environment, step by step, each deploy in a process of its own."""

from __future__ import annotations

DOCUMENTATION = r"""
module: secret_rotation
short_description: Rotate the secrets of an environment
description:
  - Changes the vault file, deploys the release that is in service with it, runs what the rotation needs on the hosts, and notes
    each step in their journals. A run that was killed anywhere is continued by the next.
options:
  inventory:
    description: Directory of the environment's inventory.
    type: path
    required: true
  project:
    description: Directory of this project.
    type: path
    required: true
  kinds:
    description: What to rotate, or V(all). Empty only shows ages.
    type: list
    elements: str
    default: []
  overlap_hours:
    description: For how long the old tokens stay good beside the new ones.
    type: float
    default: 24.0
  revoke:
    description: Whether the old tokens are refused as soon as the new ones are in service.
    type: bool
    default: false
  freeze_override:
    description: Why the deploys of this rotation cannot wait for the end of a freeze window.
    type: str
    default: ""
author: Atlas
attributes:
  check_mode:
    support: full
    details: Only shows ages.
"""

EXAMPLES = r"""
- name: Rotate the keyring
  secret_rotation:
    inventory: inventories/staging
    project: "{{ playbook_dir | dirname }}"
    kinds: [fernet]
"""

RETURN = r"""
lines:
  description: What was done, and how old the secrets are, for people.
  type: list
  returned: success
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils import lab_tls, promotion_plan, release, release_pin, rotation, survey
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.controller import controller
from ansible.module_utils.labs import write_file
from ansible.module_utils.ssh_key import KeyFailure, KeyFile
from ansible.module_utils.vault_file import VaultError, VaultFile

ARCHIVES = Path("dist/pinned")
SECONDS = 90_000
"""For one playbook: more than rotate_hosts.yml gives a command of the service, which may have much to encrypt anew."""


class Fleet(rotation.Hosts):
    """The hosts of one environment, by playbooks that run in processes of their own; methods without a word do what Hosts says.

    *how*: further arguments of these playbooks. *override*: why a freeze window does not stop the deploys, "" where it does.
    """

    def __init__(
        self, inventory: Path, project: Path, secrets: VaultFile, how: Sequence[str], override: str = ""
    ) -> None:
        self.inventory, self.project, self.secrets, self.how, self.override = inventory, project, secrets, how, override
        self.found = self.look()
        journals = self.journals()
        self.states = rotation.states(journals)
        self.order = int(rotation.newest(journals).get("order", 0))
        serial = max((int(each.get("deploy_vault_serial", 0)) for each in self.found["variables"].values()), default=0)
        self.older_vault = rotation.older_vault(journals, serial)
        moments = [str(journal[0]["at"]) for journal in journals.values() if journal]
        self.first = min(map(rotation.unix, moments), default=None)
        of_real_hosts = project / ".cache" / "rotation" / f"{self.found['environment']}.log"
        self.log = inventory.parent / "rotation.log" if self.is_lab else of_real_hosts

        groups, variables = self.found["groups"], self.found["variables"]
        tls = any(variables[edge].get("haproxy_tls") for edge in groups.get("edge", []))
        self.inapplicable = rotation.inapplicable(groups, tls)
        self.key_files = {str(each.get("ansible_ssh_private_key_file") or "") for each in variables.values()}

    def look(self) -> dict[str, Any]:
        """Return the survey of the environment as it is now."""
        archives = self.project / ARCHIVES
        return survey.take(self.inventory, self.project, archives=archives, also="ansible_ssh_private_key_file")

    def journals(self) -> dict[str, list[dict[str, Any]]]:
        """Return app host → its journal, as it was looked at last."""
        return {host: self.found["facts"].get(host, {}).get("journal", []) for host in self.found["hosts"]}

    def state(self, kind: str) -> rotation.State:
        return self.states[kind]

    def deploy(self) -> None:
        """Deploy the release in service with what the vault says now; its predecessor, with old credentials, is not kept warm."""
        # A rotation takes long: what somebody else has deployed since it began is not taken back.
        self.found = self.look()
        last = rotation.newest(self.journals())
        if int(last.get("order", 0)) > self.order:
            raise rotation.RotationError(
                f"{last.get('by', 'somebody')} rotates {last['kind']} at the same time, with another vault file ({last['step']}, {last['at']}). "
                "Let one of you end it first; whoever goes on needs the vault file of the other: git pull"
            )
        serving = promotion_plan.source_release(self.found)
        if not serving["id"]:
            raise rotation.RotationError("Nothing is in service, so nothing uses the secrets: deploy first.")
        try:
            archive = release_pin.find(self.project / "dist", serving)
        except (release_pin.PinError, release.ReleaseError) as error:
            raise rotation.RotationError(str(error)) from None
        # It serves already: also where the inventory pins its successor, it may be deployed with other secrets.
        variables = {"release": str(archive), "deploy_warm_seconds": 0, "release_pin_required": False}
        self.play("deploy.yml", variables | ({"deploy_freeze_override": self.override} if self.override else {}))

    def do(
        self,
        kind: str,
        acts: Sequence[str],
        commands: Sequence[Sequence[str]] = (),
        entry: Mapping[str, Any] | None = None,
    ) -> list[str]:
        order = max(time.time_ns(), self.order + 1)
        whole = {"kind": kind, "order": order, "by": controller()["holder"], **entry} if entry else {}
        of = rotation.LOGINS.get(kind)
        previous = self.secrets.read().get(of.previous) if of and "idle" in acts else None
        with tempfile.TemporaryDirectory(prefix="atlas-rotation-") as folder:
            answer = Path(folder) / "cut.json"
            variables = {
                "rotate_acts": list(acts),
                "rotate_commands": [list(words) for words in commands],
                "rotate_entry": whole,
                "rotate_old": list(whole.get("old", [])),
                "rotate_login": previous["name"] if previous else "",
                "rotate_answer": str(answer),
            }
            self.play("rotate_hosts.yml", variables)
            cut = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else []
        if entry:
            self.order, now = order, time.time()
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
            self.states[kind] = {**self.states[kind], **whole, "at": at}
            if entry["step"] == rotation.DONE:
                self.states[kind] |= {"finished_at": now}
        return [
            f"cut off: {each['sessions']} sessions of {each['role']} from {each['address']} ({each['program']})"
            for each in cut
        ]

    @property
    def is_lab(self) -> bool:
        """Whether this is a lab, whose files are this project's to change."""
        return self.inventory.parent.parent.name == ".lab" and (self.inventory.parent / "lab.json").is_file()

    def certificates(self) -> dict[str, dict[str, str | None]]:
        with tempfile.TemporaryDirectory(prefix="atlas-rotation-") as folder:
            answer = Path(folder) / "certificates.json"
            self.play("rotate_certificates.yml", {"rotate_answer": str(answer)})
            found: dict[str, dict[str, str | None]] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    @property
    def issues(self) -> bool:
        return self.is_lab

    def issue(self, retired: Sequence[str]) -> None:
        lab_tls.reissue(self.inventory.parent / "tls", retired)

    def key(self) -> KeyFile:
        (name, *others) = self.key_files
        path = Path(name).expanduser()
        if others or not name or not path.is_file():
            raise rotation.RotationError(
                "Which key is to be replaced is not clear: ansible_ssh_private_key_file has to name one file for all hosts, in group_vars/all "
                f"(now: {', '.join(sorted(self.key_files)) or 'none'}). A key in an agent or with a passphrase is replaced by hand: "
                "docs/how-to/secrets.md"
            )
        return KeyFile(path)

    def let_in(self, key: KeyFile) -> None:
        made_with = key.path.with_name(f"{key.path.name}.made.pub")
        if self.is_lab and not made_with.exists():
            # By the key that a lab's hosts were made with it is told that they are still the wanted ones.
            write_file(made_with, key.path.with_name(f"{key.path.name}.pub").read_text(encoding="utf-8"))
        coming = key.next if key.next.exists() else key.path
        self.play("rotate_keys.yml", {"rotate_let_in": key.public(coming), "rotate_key": str(coming)})

    def shut_out(self, key: KeyFile, end: bool) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="atlas-rotation-") as folder:
            answer = Path(folder) / "ended.json"
            variables = {
                "rotate_shut_out": key.public(key.previous),
                "rotate_key": str(key.previous),
                "rotate_end": end,
                "rotate_answer": str(answer),
            }
            self.play("rotate_keys.yml", variables)
            ended = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
        return [
            f"cut off: an SSH session of {each['user']} on {host}, from {each['address'] or 'an address that is not known'}, "
            f"since {each['since']} ({each['key'] or 'with which key is not known'})"
            for host, sessions in ended.items()
            for each in sessions
        ]

    def play(self, playbook: str, variables: Mapping[str, Any]) -> None:
        """Run *playbook*; what it prints is appended to the log."""
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.inventory)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        try:
            done = subprocess.run(
                [*command, *self.how, f"playbooks/{playbook}", "-e", json.dumps(variables)],
                cwd=self.project,
                env=environment | {"ANSIBLE_CONFIG": str(self.project / "ansible.cfg")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise rotation.RotationError(f"playbooks/{playbook} did not end within {SECONDS // 3600} h.") from None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{playbook}, exit status {done.returncode}\n{done.stdout}\n")
        if done.returncode:
            told = "\n".join(done.stdout.strip().splitlines()[-30:])
            raise rotation.RotationError(f"playbooks/{playbook} failed (all of it is in {self.log}):\n{told}")


def left_out(kinds: Sequence[str], is_all: bool, fleet: Fleet, secrets: VaultFile) -> dict[str, str]:
    """Return kind → why it is not rotated here. Raises VaultError for the vault password if it was asked for by name."""
    reasons = dict(fleet.inapplicable)
    if is_all and fleet.key_files == {""}:
        reasons["ssh"] = "the inventory names no ansible_ssh_private_key_file. By hand: docs/how-to/secrets.md"
    if "vault" in kinds:
        try:
            secrets.password_file()
        except VaultError as error:
            if not is_all:
                raise
            reasons["vault"] = str(error)
    return reasons


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "inventory": {"type": "path", "required": True},
            "project": {"type": "path", "required": True},
            "kinds": {"type": "list", "elements": "str", "default": []},
            "overlap_hours": {"type": "float", "default": 24.0},
            "revoke": {"type": "bool", "default": False},
            "freeze_override": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    is_all = params["kinds"] == ["all"]
    kinds = list(rotation.KINDS) if is_all else params["kinds"]
    unknown = [kind for kind in kinds if kind not in rotation.KINDS]
    if unknown:
        known = ", ".join(rotation.KINDS)
        module.fail_json(
            msg=f"Nothing was changed: {', '.join(unknown)} cannot be rotated by this. It can: {known}, all."
        )
    lines: list[str] = []
    inventory, project = Path(params["inventory"]).resolve(), Path(params["project"]).resolve()
    if not (inventory / "environment.yml").is_file():
        module.fail_json(
            msg=f"Nothing was changed: {inventory} is no environment's inventory. Name its directory: -i inventories/ENVIRONMENT"
        )
    try:
        secrets = VaultFile(inventory, project)
        with (secrets.backups / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            how = [
                *(["-" + "v" * module._verbosity] if module._verbosity else []),
                *(["--diff"] if module._diff else []),
            ]
            fleet = Fleet(inventory, project, secrets, how, params["freeze_override"])
            if kinds and fleet.older_vault:
                raise rotation.RotationError(fleet.older_vault)
            reasons = left_out(kinds, is_all, fleet, secrets)
            lines += [f"{kind:8} is not rotated here: {reasons[kind]}" for kind in kinds if kind in reasons]
            wanted = [] if module.check_mode else [kind for kind in kinds if kind not in reasons]
            done = rotation.begin_all(wanted, fleet, time.time(), params["revoke"]) if is_all and wanted else {}
            lines += [
                f"{kind:8} was finished at {at}, by the run of all that goes on here. To replace it once more: -e rotate={kind}"
                for kind, at in done.items()
            ]
            for kind in [kind for kind in wanted if kind not in done]:
                for line in rotation.rotate(
                    kind, secrets, fleet, time.time(), params["overlap_hours"] * 3600, params["revoke"]
                ):
                    lines.append(f"{kind:8} {line}")
                    if kind == "tokens":
                        tell_lab(inventory, secrets)
    except BlockingIOError:
        module.fail_json(msg="Another rotation of this environment is running on this machine.")
    except (survey.SurveyError, rotation.RotationError, VaultError, KeyFailure, OSError) as error:
        so_far = "\n".join(lines) or "nothing"
        module.fail_json(
            msg=f"{error}\nDone so far: {so_far}\nMend the cause, then run the same again: it goes on from there."
        )
    policy = next(iter(fleet.found["variables"].values())).get("rotation_days") or {}
    lines += rotation.half_rotated(fleet.states)
    lines += rotation.age_lines(rotation.ages(fleet.states, policy, fleet.first, time.time()))
    module.exit_json(changed=bool(kinds) and not module.check_mode, lines=lines)


def tell_lab(inventory: Path, secrets: VaultFile) -> None:
    """Bring access.json of a lab, which people and tests take the token from, to what the vault says."""
    access = inventory.parent / "access.json"
    if access.is_file() and inventory.parent.parent.name == ".lab":
        content = json.loads(access.read_text(encoding="utf-8"))
        content["token"] = secrets.read()[rotation.TOKENS][0]["token"]
        write_file(access, json.dumps(content, indent=2) + "\n", 0o600)


if __name__ == "__main__":
    main()
