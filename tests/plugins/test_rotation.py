"""Rotations end, leave nothing under the old secret, lose nothing on the way, and go on wherever they were killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import secret_rotation
import yaml
from ansible.errors import AnsibleError
from ansible.module_utils import promotion_plan, release_pin, rotation, survey, vault_file
from ansible.module_utils.lab_inventory import encrypt_vault
from ansible.module_utils.labs import LabError
from ansible.module_utils.rotation import DONE, ESCROW, FERNET, TOKENS, fingerprint
from ansible.module_utils.ssh_key import KeyFailure, KeyFile
from ansible.module_utils.ssh_key import fingerprint as ssh_fingerprint
from ansible.module_utils.vault_file import VaultError, VaultFile
from ansible.module_utils.vault_spec import SERIAL, generate, numbered, random_fernet_key, random_password, value_errors
from ansible.parsing.vault import VaultLib, VaultSecret

PROJECT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
HOUR = 3600.0


def _filters() -> Any:
    """The filters of the file that a callback of the same name hides."""
    spec = spec_from_file_location("atlas_filters", PROJECT / "plugins/filter/atlas.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


token_credentials, key_fingerprint = _filters().token_credentials, _filters().key_fingerprint


class Killed(BaseException):
    """The run ends here."""


class World:
    """A fleet that serves: what is deployed, rows under keys, journals; each change can be the last before the run is killed.

    *deadline* counts down with every change; at 0 the run is killed, before the change or after it by turns.
    """

    def __init__(self) -> None:
        self.vault: dict[str, Any] = generate()
        self.deployed = json.loads(json.dumps(self.vault))
        self.rows = [fingerprint(self.vault[FERNET][0])] * 5
        self.journal: list[dict[str, Any]] = []
        # What else holds secrets: PostgreSQL (role → password), the backup host (what it logs in with), its repository.
        self.roles: dict[str, str] = {}
        self.backup = json.loads(json.dumps(self.vault))
        self.opens = {self.vault["vault_backup_repository_password"]}
        self.sessions: set[str] = set()
        self.cut: list[str] = []
        self.served = self.certificate = "certificate"
        self.file: Any = None
        self.made = ""
        self.lets_in: set[str] = set()
        self.set_roles()
        self.deadline = -1
        self.after = False
        self.changes = 0
        self.password = 0
        self.revoking = False
        self.now = NOW

    def change(self, effect: Callable[[], None]) -> None:
        self.changes += 1
        self.deadline -= 1
        if self.deadline == 0 and not self.after:
            raise Killed
        effect()
        self.check()
        if self.deadline == 0:
            raise Killed

    def check(self) -> None:
        """What must hold at every moment: everything that is in use is in the vault, and what is stored can be read."""
        assert value_errors(self.vault) == []
        assert rotation.older_vault({"app1": self.journal}, self.serial) is None, (
            "who rotates is told to get another vault"
        )
        kept = [*self.vault[FERNET], *self.vault.get(ESCROW, [])]
        assert set(self.deployed[FERNET]) <= set(kept)
        assert set(self.rows) <= {fingerprint(key) for key in self.deployed[FERNET]}
        if not self.revoking:
            for holder, kind in ((self.deployed, "database"), (self.backup, "backup")):
                name, password = logged_in(holder, kind)
                assert self.roles.get(name) == password, f"{kind}: who uses {name} is refused"
        assert self.backup["vault_backup_repository_password"] in self.opens
        assert set(self.rows) <= {fingerprint(key) for key in [*self.backup[FERNET], *self.backup.get(ESCROW, [])]}

    @property
    def serial(self) -> int:
        return int(self.vault.get(SERIAL, 0))

    def set_roles(self) -> None:
        """PostgreSQL as the inventory makes it of the vault."""
        self.roles = {}
        for kind, of in rotation.LOGINS.items():
            name, password = logged_in(self.vault, kind)
            self.roles[name] = password
            for other in (self.vault.get(of.next), self.vault.get(of.previous)):
                if other:
                    self.roles[other["name"]] = other["password"]

    # Secrets

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(self.vault))
        return found

    def write(self, values: dict[str, Any]) -> None:
        self.change(lambda: setattr(self, "vault", json.loads(json.dumps(values))))

    def rekey(self) -> str:
        def effect() -> None:
            self.password += 1
            self.vault = numbered(self.vault)

        self.change(effect)
        return "the vault password is another"

    # Hosts

    def state(self, kind: str) -> rotation.State:
        return rotation.states({"app1": self.journal})[kind]

    def deploy(self) -> None:
        def effect() -> None:
            # While a deploy goes on, both deployments write, each under its own first key, and both have to read it all.
            for keys in (self.deployed[FERNET], self.vault[FERNET]):
                self.rows.append(fingerprint(keys[0]))
            both = [{fingerprint(key) for key in side[FERNET]} for side in (self.deployed, self.vault)]
            assert set(self.rows) <= both[0] & both[1], "one of the two could not read a row"
            self.deployed = self.read()
            at = {"at": "2027-01-15T08:00:00Z", "outcome": "ok", "serial": self.serial}
            self.journal.append({"event": "finished", "deployment": len(self.journal), **at})

        self.change(effect)

    def do(
        self,
        kind: str,
        acts: Sequence[str],
        commands: Sequence[Sequence[str]] = (),
        entry: Mapping[str, Any] | None = None,
    ) -> Sequence[str]:
        cut: list[str] = []
        if "tls" in acts:
            assert entry and self.certificate not in entry["old"]
        for act in acts:
            self.change(lambda act=act: cut.extend(self.act(kind, act)))  # type: ignore[misc]
        if commands:
            self.change(lambda: self.run(commands))
        if entry:
            # The clock of journals has whole seconds.
            at = {"at": "2027-01-15T08:00:00Z", "order": len(self.journal), "serial": self.serial}
            self.change(lambda: self.journal.append({"event": "rotation", "kind": kind, **at, **entry}))
        return cut

    def act(self, kind: str, act: str) -> list[str]:
        if act == "database":
            self.set_roles()
        if act == "backup":
            self.backup = self.read()
            if following := self.vault.get("vault_backup_next"):
                self.opens.add(following["repository_password"])
            if previous := self.vault.get("vault_backup_previous"):
                self.opens.discard(previous["repository_password"])
        if act == "tls":
            self.served = self.certificate
        if act == "idle":
            of = rotation.LOGINS[kind]
            assert self.vault[of.previous]["name"] != logged_in(self.deployed if of.deploy else self.backup, kind)[0]
        if act == "cut":
            gone = sorted(name for name in self.sessions if name not in self.roles)
            self.sessions -= set(gone)
            return [f"cut off: {name}" for name in gone]
        return []

    def run(self, commands: Sequence[Sequence[str]]) -> None:
        first = fingerprint(self.deployed[FERNET][0])
        if ("keys", "reencrypt") in {tuple(words[:2]) for words in commands}:
            self.rows = [first for _ in self.rows]
        if any(row != first for row in self.rows):
            raise rotation.RotationError("retire-check: some are not under the newest key")

    issues = True

    def certificates(self) -> dict[str, dict[str, str | None]]:
        return {"edge1": {"served": self.served, "wanted": self.certificate}}

    def issue(self, retired: Sequence[str]) -> None:
        if self.certificate in retired:
            self.change(lambda: setattr(self, "certificate", f"certificate {self.changes}"))

    def key(self) -> Any:
        return self.file

    def let_in(self, key: KeyFile) -> None:
        coming = key.next if key.next.exists() else key.path
        self.change(lambda: self.lets_in.add(key.public(coming)))

    def shut_out(self, key: KeyFile, end: bool) -> Sequence[str]:
        assert key.public(key.path) in self.lets_in
        self.change(lambda: self.lets_in.discard(key.public(key.previous)))
        gone = sorted(self.sessions - self.lets_in) if end else []
        self.change(lambda: self.sessions.difference_update(gone))
        return [f"cut off: {each}" for each in gone]

    # As users see it

    def accepted(self) -> dict[str, int | None]:
        """Hash of each token that the service takes now → when it ends."""
        specs = json.loads(token_credentials(self.deployed[TOKENS]))
        ends = {spec["sha256"]: spec.get("expires_at") for spec in specs}
        return {sha: end for sha, end in ends.items() if end is None or end > self.now * 1000}


def logged_in(vault: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """Role and password with which who holds the secrets of *vault* logs in."""
    of = rotation.LOGINS[kind]
    return vault.get(of.fields["name"], of.logins[0]), vault[of.fields["password"]]


def run(world: World, kind: str, revoke: bool = False) -> list[str]:
    return list(rotation.rotate(kind, world, world, world.now, 24 * HOUR, revoke))


def rotated(world: World, kind: str, revoke: bool) -> None:
    """Run until nothing is left to do, as a person would: again after a kill, and once more when the overlap is over."""
    for _ in range(3):
        try:
            run(world, kind, revoke)
        except Killed:
            pass
        else:
            world.now += 25 * HOUR
        if world.state(kind).get("step") == DONE:
            return
    run(world, kind, revoke)


def length(kind: str, revoke: bool) -> int:
    world = World()
    rotated(world, kind, revoke)
    return world.changes


CASES = [
    (kind, revoke, point, after)
    for kind, revoke in (
        ("fernet", False),
        ("tokens", False),
        ("tokens", True),
        ("vault", False),
        ("database", False),
        ("database", True),
        ("backup", False),
        ("tls", False),
    )
    for point in range(1, length(kind, revoke) + 1)
    for after in (False, True)
]


def test_there_are_ten_points_and_more_to_be_killed_at() -> None:
    assert min(length(kind, False) for kind in ("fernet", "database", "backup")) >= 10 and len(CASES) >= 40


@pytest.mark.parametrize(("kind", "revoke", "point", "after"), CASES)
def test_a_rotation_that_was_killed_goes_on(kind: str, revoke: bool, point: int, after: bool) -> None:
    world = World()
    old = world.read()
    old_tokens = set(world.accepted())
    world.deadline, world.after = point, after
    rotated(world, kind, revoke)
    assert world.deadline <= 0, "it was never killed"
    assert not rotation.under_way(world.state(kind)) and world.state(kind)["generation"] == 1
    for name in (FERNET, TOKENS, *rotation.LOGINS["database"].fields.values()):
        assert world.deployed.get(name) == world.vault.get(name)
    assert world.backup == world.read(), "the backup host has other secrets, or another vault file in escrow"
    told = rotation.older_vault({"app1": world.journal}, max(0, world.serial - 1))
    assert (told is None) == (kind == "tls") and (told is None or f"{kind} (finished 2027-01-15T08:00:00Z by" in told)
    if kind == "fernet":
        (key,) = world.vault[FERNET]
        assert key not in old[FERNET] and set(world.rows) == {fingerprint(key)}
        assert set(old[FERNET]) <= set(world.vault[ESCROW])
    if kind in rotation.LOGINS:
        of = rotation.LOGINS[kind]
        name, password = logged_in(old, kind)
        assert name not in world.roles and password not in world.roles.values()
        assert logged_in(world.vault, kind)[0] == of.logins[1] and not {of.next, of.previous} & set(world.vault)
        assert world.opens == {world.vault["vault_backup_repository_password"]}
        assert (world.vault["vault_backup_repository_password"] in old.values()) == (kind == "database")
    assert (world.served == "certificate") == (kind != "tls") and world.served == world.certificate
    if kind == "tokens":
        assert not old_tokens & set(world.accepted()) and len(world.accepted()) == len(old_tokens)
        assert [set(entry) for entry in world.vault[TOKENS]] == [{"name", "token", "scopes", "limits"}]


PEM = "-----BEGIN CERTIFICATE-----\nx\n-----BEGIN RSA PRIVATE " + "KEY-----\nx\n"


def test_the_vault_from_before_a_certificate_was_put_into_it_is_told_from_the_one_after() -> None:
    world = World()
    world.vault["vault_haproxy_tls_pem"] = PEM
    world.deadline, world.after = 4, False
    with pytest.raises(Killed):
        run(world, "tls")
    run(world, "tls")
    told = rotation.older_vault({"app1": world.journal}, 0)
    assert told and "tls (finished" in told and world.backup == world.read()


def test_a_vault_file_from_before_a_rotation_is_told_what_was_rotated_when_and_by_whom() -> None:
    entry = {"event": "rotation", "step": DONE, "at": "2027-01-15T08:00:00Z"}
    journals: dict[str, list[dict[str, Any]]] = {
        "app1": [
            entry | {"kind": "ssh", "order": 1},  # from before there were serials
            entry | {"kind": "tokens", "order": 2, "serial": 2, "by": "kim@desk"},
            entry | {"kind": "database", "order": 4, "serial": 5, "by": "alex@desk", "step": "moved"},
            {"event": "finished", "at": "2027-01-15T09:00:00Z"},
        ],
        "app2": [entry | {"kind": "database", "order": 3, "serial": 4, "by": "alex@desk", "step": "added"}],
    }
    told = str(rotation.older_vault(journals, 1))
    assert "tokens (finished 2027-01-15T08:00:00Z by kim@desk), database (moved" in told and "ssh" not in told
    assert "git pull" in told and told.endswith("vault_serial: 5")
    assert "tokens" not in str(rotation.older_vault(journals, 2)) and rotation.older_vault(journals, 5) is None
    assert rotation.older_vault({"app1": journals["app1"][:1], "app2": []}, 0) is None


@pytest.mark.parametrize("kind", ["fernet", "tokens", "database"])
def test_what_a_rotation_deployed_is_kept_from_older_vault_files_also_if_it_was_killed_before_its_note(
    kind: str,
) -> None:
    world = World()
    deploy, deploys = world.deploy, 0

    def counted() -> None:
        nonlocal deploys
        deploys += 1
        deploy()
        if deploys == 1:
            raise Killed

    world.deploy = counted  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(world, kind)
    assert all(int(entry["serial"]) < world.serial for entry in world.journal if entry["event"] == "rotation")
    number = world.journal[-1]["deployment"]
    told = rotation.older_vault({"app1": world.journal}, world.serial - 1)
    assert (
        told
        and f"deployment {number} (2027-01-15T08:00:00Z)" in told
        and told.endswith(f"vault_serial: {world.serial}")
    )
    assert rotation.older_vault({"app1": rotation.noted(world.journal)}, world.serial - 1) == told
    run(world, kind)
    assert deploys > 1, "the one with the vault file goes on"


def test_a_deployment_that_did_not_come_into_service_notes_nothing() -> None:
    deploy = {"at": "2027-01-15T08:00:00Z", "deployment": 7, "serial": 9}
    journal: list[dict[str, Any]] = [
        {"event": "staged", **deploy},
        {"event": "finished", "outcome": "failed", **deploy},
        {"event": "undone", **deploy},
        {"event": "finished", "outcome": "ok", **deploy, "serial": 3},
        {"event": "finished", "at": "2027-01-15T09:00:00Z", "deployment": 6},  # from before there were serials
    ]
    assert rotation.noted(journal) == [journal[3]]
    assert rotation.older_vault({"app1": journal}, 3) is None and rotation.older_vault({"app1": journal}, 2)


def test_old_and_new_tokens_are_good_together_and_then_the_old_ones_are_not() -> None:
    world = World()
    (old,) = world.accepted()
    said = run(world, "tokens")
    assert "are good until 2027-01-16" in said[-1] and "run it again" in said[-1]
    assert old in world.accepted() and len(world.accepted()) == 2
    assert rotation.half_rotated(rotation.states({"app1": world.journal}))[0].startswith("tokens   half rotated")
    before = world.read()
    run(world, "tokens")  # nothing more to do yet
    assert world.read() == before
    world.now += 25 * HOUR
    assert old not in world.accepted() and len(world.accepted()) == 1
    run(world, "tokens")
    assert rotation.half_rotated(rotation.states({"app1": world.journal})) == []


def test_old_tokens_are_good_for_their_time_once_there_are_new_ones_to_ask_for() -> None:
    world = World()
    (old,) = world.accepted()
    world.deadline, world.after = 2, True  # the vault has new tokens, and nothing is deployed
    with pytest.raises(Killed):
        run(world, "tokens")
    assert len(world.accepted()) == 1
    world.now += 40 * HOUR
    run(world, "tokens")
    assert world.accepted()[old] == (world.now + 24 * HOUR) * 1000 and len(world.accepted()) == 2
    before = world.read()
    run(world, "tokens")
    assert world.read() == before, "the end is put off for ever"


def test_revoked_at_once_also_in_the_middle_of_an_overlap() -> None:
    world = World()
    (old,) = world.accepted()
    run(world, "tokens")
    handed_out = set(world.accepted())
    run(world, "tokens", revoke=True)
    assert old in handed_out and not handed_out & set(world.accepted()) and len(world.accepted()) == 1
    assert world.state("tokens")["step"] == DONE


@pytest.mark.parametrize("kind", ["fernet", "database", "backup", "tls", "ssh", "vault"])
def test_after_a_leak_what_a_rotation_before_it_has_made_is_replaced_too(tmp_path: Path, kind: str) -> None:
    """What was coming is in the vault file, and may have leaked with the rest. A run that was killed is not begun anew."""

    def coming(world: World) -> set[str]:
        secrets = {world.certificate, str(world.password)} | {each.read_text() for each in tmp_path.glob("key*")}
        return secrets | {text for text in json.dumps([world.vault, world.deployed]).split('"') if len(text) > 40}

    def in_use(world: World) -> set[str]:
        found = {"fernet": set(world.deployed[FERNET]), "tls": {world.served}, "vault": {str(world.password)}}
        logins = {
            each: {logged_in(world.deployed if each == "database" else world.backup, each)[1]}
            for each in rotation.LOGINS
        }
        return {**found, **logins, "ssh": {(tmp_path / "key").read_text()}}[kind]

    seen = 0
    for point in range(1, 20):
        world = World()
        world.file = KeyFile(tmp_path / "key")
        for old in tmp_path.glob("key*"):
            old.unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
        world.lets_in = {world.file.public(world.file.path)}
        world.deadline, world.after = point, True
        with contextlib.suppress(Killed):
            run(world, kind)
        if not rotation.under_way(world.state(kind)):
            continue
        seen += 1
        leaked = coming(world)
        world.deadline, world.revoking = 1_000, True
        run(world, kind, revoke=True)
        assert not leaked & in_use(world), f"{kind}, killed at {point}: what leaked is in use"
        assert world.state(kind)["generation"] == 2 and world.state(kind)["step"] == DONE
    assert seen


def test_a_keyring_is_not_retired_while_something_needs_it() -> None:
    world = World()
    stuck = World.run

    def refuse(self: World, commands: Sequence[Sequence[str]]) -> None:
        raise rotation.RotationError("one row is unreadable")

    World.run = refuse  # type: ignore[method-assign]
    try:
        with pytest.raises(rotation.RotationError):
            run(world, "fernet")
    finally:
        World.run = stuck  # type: ignore[method-assign]
    assert len(world.deployed[FERNET]) == 2
    run(world, "fernet")
    assert len(world.deployed[FERNET]) == 1


def test_keys_that_were_there_before_retire_too() -> None:
    world = World()
    world.vault[FERNET].append(random_fernet_key())
    world.deployed = world.read()
    run(world, "fernet")
    assert len(world.vault[FERNET]) == 1 and len(world.vault[ESCROW]) == 2


def test_a_key_that_was_copied_back_from_the_escrow_retires_again() -> None:
    """As docs/how-to/secrets.md says for a backup from before a rotation."""
    world = World()
    run(world, "fernet")
    world.vault[FERNET] += world.vault[ESCROW]
    world.deployed = world.read()
    run(world, "fernet")
    assert len(world.vault[FERNET]) == 1 and len(world.vault[ESCROW]) == 2


@pytest.mark.parametrize("kind", list(rotation.LOGINS))
def test_two_logins_take_turns(kind: str) -> None:
    world = World()
    names = []
    for _ in range(3):
        run(world, kind)
        names.append(logged_in(world.vault, kind)[0])
    first, second = rotation.LOGINS[kind].logins
    assert names == [second, first, second] and world.state(kind)["generation"] == 3


def test_who_is_still_logged_in_is_cut_off_and_named_when_that_was_asked_for() -> None:
    world = World()
    world.sessions = {"atlas_a"}
    said = run(world, "database", revoke=True)
    assert "cut off: atlas_a" in said and world.sessions == set()


def rotate_all(world: World, kinds: Sequence[str], revoke: bool = False) -> list[str]:
    """Rotate all *kinds*, as the module does; return those that it left as they were finished already."""
    done = rotation.begin_all(kinds, world, world.now, revoke)
    for kind in kinds:
        if kind not in done:
            run(world, kind, revoke)
    return list(done)


@pytest.mark.parametrize("revoke", [False, True])
def test_a_rotation_of_all_kinds_that_is_killed_rotates_each_of_them_once(revoke: bool) -> None:
    kinds, points = ["tokens", "database", "backup", "fernet", "vault"], 0
    for point in range(1, 200):
        world = World()
        world.deadline, world.after, world.revoking = point, bool(point % 2), revoke
        try:
            rotate_all(world, kinds, revoke)
        except Killed:
            world.deadline = -1
            rotate_all(world, kinds, revoke)
        else:
            break
        points += 1
        generations = {kind: world.state(kind)["generation"] for kind in kinds}
        assert generations == {kind: int(revoke or kind != "tokens") for kind in kinds}, f"killed at {point}"
        assert world.state("tokens")["step"] == (DONE if revoke else "overlap")
        unfinished = [line.split()[0] for line in rotation.half_rotated(rotation.states({"app1": world.journal}))]
        assert unfinished == ([] if revoke else ["tokens"])
        assert rotate_all(world, kinds, True) == [], "the run has ended: the next is a new one"
    assert points > 20


def test_a_run_of_all_kinds_that_did_not_end_is_gone_on_with_for_a_day_and_not_after_a_leak() -> None:
    def world(revoke: bool) -> World:
        made = World()
        rotation.begin_all(["database", "fernet"], made, made.now, revoke)
        made.revoking = True
        run(made, "database", revoke)
        return made

    assert rotate_all(world(False), ["database", "fernet"]) == ["database"]
    assert rotate_all(world(True), ["database", "fernet"]) == ["database"]
    assert rotate_all(world(True), ["database", "fernet"], revoke=True) == ["database"]
    assert rotate_all(world(False), ["database", "fernet"], revoke=True) == []
    mixed = world(True)
    run(mixed, "database")
    assert rotate_all(mixed, ["database", "fernet"], revoke=True) == [], "its last rotation has cut nobody off"
    later = world(False)
    later.now += 25 * HOUR
    assert rotate_all(later, ["database", "fernet"]) == []
    by_itself = world(True)
    run(by_itself, "fernet", revoke=True)
    assert rotate_all(by_itself, ["database", "fernet"], revoke=True) == [], "what it lacked was rotated by itself"


@pytest.mark.parametrize("killed_at", [None, 3, 4, 5])
def test_after_a_leak_sessions_that_began_with_the_old_key_end(tmp_path: Path, killed_at: int | None) -> None:
    """Also those with the key from before a rotation that was under way, which is not the key that this one replaces."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    world = World()
    world.file = KeyFile(tmp_path / "key")
    old = world.file.public(world.file.path)
    world.lets_in, world.sessions = {old, "somebody else's"}, {old, "somebody else's"}
    if killed_at:
        world.deadline, world.after = killed_at, True
        with pytest.raises(Killed):
            run(world, "ssh")
        assert old in world.sessions, "without a leak nobody is cut off"
        world.deadline = -1
    assert f"cut off: {old}" in run(world, "ssh", revoke=True)
    assert world.sessions == {"somebody else's"}


def test_a_certificate_is_the_users_to_replace_where_no_authority_is_at_hand() -> None:
    world = World()
    world.issues = False
    with pytest.raises(
        rotation.RotationError, match="edge1: the certificate in the inventory is the one .*docs/how-to/tls.md"
    ):
        run(world, "tls")
    assert world.journal == []
    world.certificate = "the user's"
    run(world, "tls")
    assert world.served == "the user's" and world.state("tls")["step"] == DONE


class Steps(KeyFile):
    """A key file whose every change counts as one of the world."""

    world: World

    def make(self) -> str:
        made = super().make
        self.world.change(lambda: setattr(self.world, "made", made()))
        return str(self.world.made)

    def put_in_place(self) -> None:
        self.world.change(super().put_in_place)

    def forget(self) -> None:
        self.world.change(super().forget)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", range(1, 10))
def test_a_key_that_is_replaced_never_shuts_its_owner_out(tmp_path: Path, point: int, after: bool) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "us", "-f", str(tmp_path / "key")], check=True)
    world = World()
    world.file = Steps(tmp_path / "key")
    world.file.world = world
    old = world.file.public(world.file.path)
    world.lets_in = {old, "somebody else's"}
    world.deadline, world.after = point, after
    try:
        run(world, "ssh")
    except Killed:
        assert world.file.public(world.file.path) in world.lets_in, "locked out"
        assert world.file.path.stat().st_mode & 0o777 == 0o600
        run(world, "ssh")
    new = world.file.public(world.file.path)
    assert new != old and world.lets_in == {new, "somebody else's"} and new.endswith(" us")
    assert world.state("ssh")["new"] == ssh_fingerprint(new) and world.state("ssh")["step"] == DONE
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "key")], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split()[1] == new.split()[1], "the two halves are of two keys"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of the files that were brought to the disk."""
    found: set[int] = set()
    fsync = os.fsync

    def sync(handle: int) -> None:
        found.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    return found


def test_a_new_key_is_on_the_disk_before_a_host_hears_of_it(tmp_path: Path, synced: set[int]) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    key = KeyFile(tmp_path / "key")
    key.make()
    assert {key.next.stat().st_ino, tmp_path.stat().st_ino} <= synced


def test_a_key_with_a_passphrase_is_left_alone(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "passphrase", "-f", str(tmp_path / "key")], check=True)
    with pytest.raises(KeyFailure, match="passphrase"):
        KeyFile(tmp_path / "key").make()
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub"}


def test_what_an_environment_has_no_use_for_is_not_rotated() -> None:
    assert set(rotation.inapplicable({"app": ["one"], "database": [], "backup": []}, False)) == {
        "database",
        "backup",
        "tls",
    }
    assert rotation.inapplicable({"database": ["db1"], "backup": ["backup1"]}, True) == {}


def test_inventories_name_a_key_as_journals_do() -> None:
    key = random_fernet_key()
    assert key_fingerprint(key) == fingerprint(key)


def test_a_clock_that_is_set_back_hides_no_step() -> None:
    entry = {"event": "rotation", "kind": "fernet", "generation": 1}
    ahead = [
        {**entry, "step": DONE, "at": "2028-01-01T00:00:00Z", "order": 5},
        {**entry, "step": "begun", "new": "x", "at": "2027-01-10T00:00:00Z", "order": 6},
    ]
    assert rotation.states({"app1": ahead, "app2": ahead[:1]})["fernet"]["step"] == "begun"


def test_ages_are_judged_by_the_policy() -> None:
    journal: list[dict[str, Any]] = [
        {"event": "rotation", "kind": "tokens", "step": DONE, "generation": 3, "at": "2026-12-01T00:00:00Z"},
        {"event": "rotation", "kind": "fernet", "step": "begun", "new": "x", "at": "2027-01-10T00:00:00Z"},
    ]
    found = rotation.states({"app1": journal, "app2": []})
    rows = rotation.ages(found, {"tokens": 30, "fernet": 365, "vault": 10}, NOW - 100 * 86400, NOW)
    assert [(row["kind"], row["generation"], row["days"], row["overdue"]) for row in rows] == [
        ("tokens", 3, 45, True),
        ("fernet", 0, 100, False),
        ("vault", 0, 100, True),
    ]
    assert "OVERDUE" in rotation.age_lines(rows)[0] and "OVERDUE" not in rotation.age_lines(rows)[1]
    assert rotation.ages({}, {"vault": 1}, None, NOW)[0]["overdue"] is False
    assert len(rotation.half_rotated(found)) == 1


# --- the fleet ---------------------------------------------------------------------------------------------------------


def test_a_release_that_was_deployed_during_a_rotation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = {"id": "ours"}

    def look(*_: Any, **__: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {"environment": "shop", "groups": {}, "hosts": [], "variables": {}}
        return {**facts, "serving": dict(serving)}

    deployed: list[str] = []
    monkeypatch.setattr(survey, "take", look)
    monkeypatch.setattr(promotion_plan, "source_release", lambda found: found["serving"])
    monkeypatch.setattr(release_pin, "find", lambda _, found: found["id"])
    monkeypatch.setattr(secret_rotation.Fleet, "play", lambda *given: deployed.append(given[2]["release"]))
    secrets: Any = None
    fleet = secret_rotation.Fleet(tmp_path / "inventory", tmp_path, secrets, [])
    fleet.deploy()
    serving["id"] = "theirs"
    fleet.deploy()
    assert deployed == ["ours", "theirs"]


def test_two_who_rotate_at_the_same_time_do_not_undo_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a checkout of their own: what one deploys would bring back what the other has replaced."""
    journal: list[dict[str, Any]] = []
    deploys: list[str] = []

    def look(*_: Any, **__: Any) -> dict[str, Any]:
        facts = {"app1": {"journal": list(journal)}}
        return {"environment": "shop", "groups": {}, "hosts": ["app1"], "variables": {"app1": {}}, "facts": facts}

    def play(_: Any, playbook: str, variables: Mapping[str, Any]) -> None:
        if playbook == "rotate_hosts.yml":
            journal.append({"event": "rotation", "at": "2027-01-15T08:00:00Z", **variables["rotate_entry"]})
        else:
            deploys.append(playbook)

    monkeypatch.setattr(survey, "take", look)
    monkeypatch.setattr(promotion_plan, "source_release", lambda _: {"id": "ours"})
    monkeypatch.setattr(release_pin, "find", lambda *_: "ours.tar.gz")
    monkeypatch.setattr(secret_rotation.Fleet, "play", play)
    secrets: Any = None
    mine, theirs = (secret_rotation.Fleet(tmp_path / "inventory", tmp_path, secrets, []) for _ in range(2))
    mine.do("tokens", (), entry={"step": "begun"})
    mine.deploy()
    mine.do("tokens", (), entry={"step": DONE})
    with pytest.raises(rotation.RotationError, match="rotates tokens at the same time, with another vault file"):
        theirs.deploy()
    mine.deploy()
    again = secret_rotation.Fleet(tmp_path / "inventory", tmp_path, secrets, [])
    again.deploy()
    assert len(deploys) == 3 and [entry["order"] for entry in journal] == sorted({entry["order"] for entry in journal})


def test_which_kinds_a_run_of_all_has_finished_is_read_from_the_journals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal: list[dict[str, Any]] = []

    def look(*_: Any, **__: Any) -> dict[str, Any]:
        facts = {"app1": {"journal": list(journal)}}
        return {"environment": "shop", "groups": {}, "hosts": ["app1"], "variables": {"app1": {}}, "facts": facts}

    def play(_: Any, playbook: str, variables: Mapping[str, Any]) -> None:
        journal.append({"event": "rotation", "at": "2027-01-15T08:00:00Z", **variables["rotate_entry"]})

    def fleet() -> secret_rotation.Fleet:
        secrets: Any = None
        return secret_rotation.Fleet(tmp_path / "inventory", tmp_path, secrets, [])

    monkeypatch.setattr(survey, "take", look)
    monkeypatch.setattr(secret_rotation.Fleet, "play", play)
    first = fleet()
    assert rotation.begin_all(["fernet", "tls"], first, NOW, revoke=True) == {}
    first.do("fernet", (), entry={"step": DONE, "revoke": True})
    assert rotation.begin_all(["fernet", "tls"], fleet(), NOW, revoke=True) == {"fernet": "2027-01-15T08:00:00Z"}
    assert [entry["kind"] for entry in journal] == ["all", "fernet"], "the run that goes on is not begun again"


def test_a_pin_or_a_freeze_for_the_next_release_keeps_no_leaked_secret_in_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in service is deployed again, also where the inventory pins its successor already."""
    found = {"environment": "shop", "groups": {}, "hosts": [], "variables": {"app1": {}}}
    given: list[Mapping[str, Any]] = []
    monkeypatch.setattr(survey, "take", lambda *_, **__: found)
    monkeypatch.setattr(promotion_plan, "source_release", lambda _: {"id": "ours"})
    monkeypatch.setattr(release_pin, "find", lambda *_: "ours.tar.gz")
    monkeypatch.setattr(secret_rotation.Fleet, "play", lambda *all: given.append(all[2]))
    secrets: Any = None
    for override in ("", "a token has leaked"):
        secret_rotation.Fleet(tmp_path / "inventory", tmp_path, secrets, [], override).deploy()
    assert all(each["release"] == "ours.tar.gz" and each["release_pin_required"] is False for each in given)
    assert [each.get("deploy_freeze_override") for each in given] == [None, "a token has leaked"]


def played(tmp_path: Path, *extra: str) -> tuple[int, str]:
    """Exit status and words of rotate_secrets.yml for an inventory that is a file with one host."""
    (tmp_path / "hosts.yml").write_text("app: {hosts: {one: {ansible_connection: local, atlas_environment: shop}}}\n")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(tmp_path / "hosts.yml")]
    command += ["playbooks/rotate_secrets.yml", "-e", "confirm=shop"]
    done = subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_an_inventory_that_is_no_environments_is_refused_in_words(tmp_path: Path) -> None:
    status, said = played(tmp_path)
    assert status != 0 and "is no environment's inventory" in said and "Traceback" not in said


@pytest.mark.parametrize("revoke", ["true", ""])
def test_who_asks_to_revoke_in_other_words_gets_no_overlap_instead(tmp_path: Path, revoke: str) -> None:
    """A wrong word would have rotated with an overlap, in which what has leaked stays good."""
    status, said = played(tmp_path, "-e", f"revoke={revoke}")
    assert status != 0 and "Nothing was changed" in said and "-e revoke=now" in said
    assert "PLAY [Rotate]" not in said


def test_a_playbook_that_hangs_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SECONDS", 0.01)
    with pytest.raises(survey.SurveyError, match="shop was not read within 0.01 s"):
        survey.take(tmp_path / "shop", tmp_path)
    monkeypatch.setattr(secret_rotation, "SECONDS", 0.01)
    fleet = object.__new__(secret_rotation.Fleet)
    fleet.inventory, fleet.project, fleet.how = tmp_path / "shop", tmp_path, []
    with pytest.raises(rotation.RotationError, match="rotate_hosts.yml did not end"):
        fleet.play("rotate_hosts.yml", {})


# --- the vault file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the client with an empty home, and an inventory with a vault file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [key for key in os.environ if key.startswith("ATLAS_VAULT")]:
        monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    shutil.copy(PROJECT / "bin/vault-client", tmp_path / "bin")
    inventory = tmp_path / "inventories/shop"
    inventory.mkdir(parents=True)
    (inventory / "environment.yml").write_text("plugin: environment\nvault_id: shop\n")
    password(tmp_path).parent.mkdir(parents=True)
    password(tmp_path).write_text(random_password() + "\n")
    password(tmp_path).chmod(0o600)
    encrypt_vault(inventory / "group_vars/all/vault.yml", "shop", password(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same encryption without a process for each: what a test does many times."""

    def vault(action: str, *arguments: str, plain: str | None = None) -> str:
        source = arguments[arguments.index("--vault-id") + 1]
        name, path = source.split("@", 1)
        if path.endswith("vault-client"):
            secret = subprocess.run(
                [path, "--vault-id", name], capture_output=True, text=True, check=True
            ).stdout.strip()
        else:
            secret = Path(path).read_text().strip()
        library = VaultLib([(name, VaultSecret(secret.encode()))])
        if action == "encrypt":
            target = Path(arguments[arguments.index("--output") + 1])
            target.write_bytes(library.encrypt((plain or "").encode(), vault_id=name, secret=library.secrets[0][1]))
            return ""
        try:
            return str(library.decrypt(Path(arguments[-1]).read_bytes()).decode())
        except AnsibleError as error:
            raise LabError(str(error)) from None

    monkeypatch.setattr(vault_file, "ansible_vault", vault)


def password(checkout: Path) -> Path:
    return checkout / "home/.config/atlas/vault/shop"


def opened(checkout: Path) -> VaultFile:
    return VaultFile(checkout / "inventories/shop", checkout)


def test_what_is_written_is_read_again_and_the_one_before_is_kept(checkout: Path) -> None:
    vault = opened(checkout)
    before = vault.read()
    after = before | {FERNET: [random_fernet_key()]}
    vault.write(after)
    assert opened(checkout).read() == after
    (backup,) = vault.backups.glob("*.yml")
    assert backup.stat().st_mode & 0o777 == 0o600 and backup.read_bytes().startswith(b"$ANSIBLE_VAULT;1.2;AES256;shop")
    backup.replace(vault.path)
    assert opened(checkout).read() == before


def test_a_vault_with_fewer_secrets_is_not_written(checkout: Path) -> None:
    vault = opened(checkout)
    before, held = vault.path.read_bytes(), vault.read()
    del held[TOKENS]
    with pytest.raises(VaultError, match="vault_atlas_tokens is missing"):
        vault.write(held)
    assert vault.path.read_bytes() == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("point", ["written", "vault", "replaced", "no kill"])
def test_a_password_that_is_changed_opens_the_vault_wherever_the_run_is_killed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Killed after the new password is on disk, after the vault needs it, and when it was to be put in place."""
    before, old = opened(checkout).read(), password(checkout).read_text()

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if point == "written":
            patch.setattr(VaultFile, "write", kill)
        if point == "vault":
            patch.setattr(vault_file, "keep", kill)
        if point == "replaced":
            patch.setattr(os, "replace", kill)
        try:
            opened(checkout).rekey()
        except Killed:
            assert point != "no kill"
    ways = [password(checkout), password(checkout).with_name("shop.next")]
    assert any(way.is_file() and opened(checkout)._opens(way) for way in ways)
    if point != "no kill":
        opened(checkout).rekey()
    assert password(checkout).read_text() != old and opened(checkout).read() == before | {SERIAL: 1}
    assert not password(checkout).with_name("shop.next").exists()
    (checkout / "old").write_text(old)
    (checkout / "old").chmod(0o600)
    with pytest.raises(VaultError, match="cannot be opened"):
        opened(checkout).read(checkout / "old")


@pytest.mark.usefixtures("quick")
def test_a_new_password_is_on_the_disk_before_the_vault_needs_it(
    checkout: Path, synced: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VaultFile.write

    def checked(self: VaultFile, values: Mapping[str, Any], password: Path | None = None) -> None:
        assert password and {password.stat().st_ino, password.parent.stat().st_ino} <= synced
        write(self, values, password)

    monkeypatch.setattr(VaultFile, "write", checked)
    assert opened(checkout).rekey() == "the vault password is another"


def test_a_password_from_elsewhere_is_not_changed_here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_VAULT_PASSWORD_SHOP", password(checkout).read_text().strip())
    with pytest.raises(VaultError, match="the variable ATLAS_VAULT_PASSWORD_SHOP.*ansible-vault rekey"):
        opened(checkout).rekey()


def test_a_password_from_elsewhere_is_told_before_anything_is_begun(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was noted as begun first, and stayed half rotated for ever; of all kinds it made the last one fail."""
    monkeypatch.setenv("ATLAS_VAULT_PASSWORD_SHOP", password(checkout).read_text().strip())
    fleet = object.__new__(secret_rotation.Fleet)
    fleet.inapplicable, fleet.key_files = {}, {"key"}
    with pytest.raises(VaultError, match="the variable ATLAS_VAULT_PASSWORD_SHOP"):
        secret_rotation.left_out(["vault"], False, fleet, opened(checkout))
    told = secret_rotation.left_out(list(rotation.KINDS), True, fleet, opened(checkout))
    assert list(told) == ["vault"] and "ansible-vault rekey" in told["vault"]
    assert secret_rotation.left_out(["tokens"], False, fleet, opened(checkout)) == {}
    monkeypatch.delenv("ATLAS_VAULT_PASSWORD_SHOP")
    assert secret_rotation.left_out(["vault"], False, fleet, opened(checkout)) == {}


def test_in_between_playbooks_go_on_and_say_what_to_do(checkout: Path) -> None:
    for name in ("plugins/inventory", "plugins/module_utils"):
        shutil.copytree(PROJECT / name, checkout / name)
    shutil.copy(PROJECT / "ansible.cfg", checkout)
    inventory = checkout / "inventories/shop"
    (inventory / "hosts.yml").write_text("all: {hosts: {one: {ansible_connection: local}}}\n")
    mirrors = {name.removeprefix("vault_"): f"{{{{ {name} }}}}" for name in generate()}
    (inventory / "group_vars/all/main.yml").write_text(yaml.safe_dump(mirrors))
    following = password(checkout).with_name("shop.next")
    following.write_text(random_password() + "\n")
    following.chmod(0o600)
    vault = opened(checkout)
    vault.write(vault.read(), following)
    ask = [
        str(Path(sys.executable).with_name("ansible")),
        "one",
        "-i",
        str(inventory),
        "-m",
        "debug",
        "-a",
        "msg=went-on",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    done = subprocess.run(
        ask, cwd=checkout, env=environment | {"ANSIBLE_CONFIG": str(checkout / "ansible.cfg")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "went-on" in done.stdout, done.stdout + done.stderr
    assert "rotate=vault" in " ".join((done.stdout + done.stderr).split())


def test_the_old_token_travels_with_its_end() -> None:
    entry = {"name": "operator", "token": "new", "scopes": ["read"], "previous": {"token": "old", "expires_at": 5}}
    new, old = json.loads(token_credentials([entry]))
    assert "expires_at" not in new and old["expires_at"] == 5 and new["sha256"] != old["sha256"]
    assert (old["name"], old["scopes"]) == ("operator", ["read"])
