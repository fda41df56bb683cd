"""How secrets are rotated: for each kind a small state machine, one step at a time. Pure: values and states come in and go out.

What was done is in the journals of the app hosts (event *rotation*); what is wanted next is in the vault file. A run that was
killed anywhere is continued by the next, because each step is decided from these two alone and can be repeated.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ansible.module_utils.ssh_key import KeyFile
from ansible.module_utils.vault_spec import (
    BACKUP_LOGINS,
    DATABASE_LOGINS,
    numbered,
    random_fernet_key,
    random_password,
    random_token,
)

KINDS = ("tokens", "database", "backup", "fernet", "ssh", "vault", "tls")
"""In the order in which all are rotated: the one that may have to wait for a certificate from elsewhere keeps no other waiting."""
RUN = "all"
"""What the begin of a rotation of all kinds is noted as."""
FERNET, ESCROW, TOKENS = "vault_atlas_fernet_keys", "vault_atlas_fernet_escrow", "vault_atlas_tokens"
CERTIFICATE = "vault_haproxy_tls_pem"
EVENT = "rotation"
DEPLOYED = "finished"
"""The entry of a deployment that is in service (``atlas_slot``)."""
DONE = "finished"
DAY = 86400
Vault = dict[str, Any]
State = Mapping[str, Any]


class Step(NamedTuple):
    """One step, in this order: *before*, *deploy* (what the vault says now), *after*, *commands* in service, *note*, *vault*.

    *says*: for people. *before* and *after*: what else is brought to what the vault says, see :class:`Hosts`. *ends*: whether the
    run has nothing more to do for this kind, be it over or waiting.
    """

    says: str
    before: tuple[str, ...] = ()
    deploy: bool = False
    after: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    note: Mapping[str, Any] = {}
    vault: Vault | None = None
    ends: bool = False


def fingerprint(key: str) -> str:
    """Return the name that the service gives a key (``atlas.crypto.Keyring.fingerprints``); it says nothing about it."""
    return hashlib.sha256(b"atlas-key:" + key.encode()).hexdigest()[:12]


def states(journals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return kind, or RUN → last entry of it on any host, with *generation* and *finished_at* (Unix time, None for never).

    The hosts are told at the same time; of one that missed an entry the others know more. Which entry came last is told by
    its *order*, which only grows, and not by clocks: those of hosts differ, and are set back.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in (*KINDS, RUN):
        entries = [
            (str(entry["at"]), host, entry)
            for host, journal in journals.items()
            for entry in journal
            if entry.get("event") == EVENT and entry.get("kind") == kind
        ]
        finished = {entry[0]: entry for entry in entries if entry[2].get("step") == DONE}
        last = max(entries, key=lambda each: (int(each[2].get("order", 0)), each[0]), default=None)
        found[kind] = {
            **(dict(last[2]) if last else {}),
            "generation": max((int(entry[2].get("generation", 0)) for entry in finished.values()), default=0),
            "finished_at": max(map(unix, finished), default=None),
        }
    return found


def unix(moment: str) -> float:
    """Return a moment in RFC 3339 as Unix time."""
    return datetime.datetime.fromisoformat(moment).timestamp()


def newest(journals: Mapping[str, Sequence[Mapping[str, Any]]]) -> Mapping[str, Any]:
    """Return the entry that a rotation of any kind has made last, {} where there is none."""
    entries = [entry for journal in journals.values() for entry in journal if entry.get("event") == EVENT]
    return max(entries, key=lambda entry: int(entry.get("order", 0)), default={})


def under_way(state: State) -> bool:
    """Tell whether a rotation with the last entry *state* was begun and is not over."""
    return bool(state.get("step")) and state.get("step") != DONE


def missing_key(journals: Mapping[str, Sequence[Mapping[str, Any]]], known: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the entry by which a key came into service last, if that key is not in *known*: fingerprints of keyring and escrow."""
    entries = [
        entry
        for journal in journals.values()
        for entry in journal
        if entry.get("event") == EVENT and entry.get("kind") == "fernet" and entry.get("step") != "begun"
    ]
    last = max(entries, key=lambda entry: int(entry.get("order", 0)), default=None)
    return None if last is None or last.get("new") in known else last


def noted(journal: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what a host's *journal* holds of rotations: their entries, and of those of deploys the one with the newest vault file."""
    deploys = [entry for entry in journal if entry.get("event") == DEPLOYED and entry.get("outcome", "ok") == "ok"]
    newest = max(deploys, key=lambda entry: int(entry.get("serial", 0)), default=None)
    return [entry for entry in journal if entry.get("event") == EVENT or entry is newest]


def older_vault(journals: Mapping[str, Sequence[Mapping[str, Any]]], serial: int) -> str | None:
    """Return what to tell whoever has a vault file with *serial*, if a later one was used on the hosts; else None.

    A rotation notes the serial that it found at each step, and writes the next one after it; a deploy notes the one that it was
    made with when it is in service, for the rotation may be killed before its own note. So what is noted is never ahead of the vault
    file of who rotates. Entries from before there were serials have none.
    """
    entries = [
        entry for journal in journals.values() for entry in noted(journal) if int(entry.get("serial", 0)) > serial
    ]
    if not entries:
        return None
    rotations = sorted((entry for entry in entries if entry["event"] == EVENT), key=lambda entry: int(entry["order"]))
    later = {str(entry["kind"]): entry for entry in rotations}
    steps = [f"{kind} ({of['step']} {of['at']} by {of.get('by', 'somebody')})" for kind, of in later.items()]
    deploys = {entry["deployment"]: entry for entry in entries if entry["event"] == DEPLOYED}
    steps += [f"deployment {number} ({of['at']})" for number, of in sorted(deploys.items())]
    newest = max(int(entry["serial"]) for entry in entries)
    return (
        f"The vault file here is older (vault_serial {serial}) than what rotations brought into service since ({newest}): "
        f"{', '.join(steps)}. Get the newest one: git pull, or from who rotated, who has to commit it. Only if that one is lost, and "
        f"this one is to replace what is in service: ansible-vault edit it and set vault_serial: {newest}"
    )


# The Fernet keyring


def fernet(vault: Vault, state: State, now: float, overlap: float, revoke: bool) -> Step:
    """Return the next step of a rotation of the keyring: add the key last, then first, encrypt anew, retire the others."""
    keys: list[str] = list(vault[FERNET])
    new = str(state.get("new", "")) if under_way(state) else ""
    names = [fingerprint(key) for key in keys]
    if new not in names:
        key = random_fernet_key()
        begun = {"step": "begun", "new": fingerprint(key)}
        return Step(
            "a new key is added, which every process can read with", note=begun, vault=vault | {FERNET: [*keys, key]}
        )
    key = keys[names.index(new)]
    others = [each for each in keys if each != key]
    if others and keys[0] != key:
        return Step(
            "the new key is known everywhere: it becomes the first",
            before=("backup",),
            deploy=True,
            note={"step": "added", "new": new},
            vault=vault | {FERNET: [key, *others]},
        )
    if others:
        # One that was copied back for a backup from before its rotation is there already.
        retired = list(dict.fromkeys([*others, *(vault.get(ESCROW) or [])]))
        return Step(
            "what older keys encrypted is encrypted anew; they retire",
            before=("backup",),
            deploy=True,
            commands=(("keys", "reencrypt", "--json"), ("keys", "retire-check", "--json")),
            note={"step": "reencrypted", "new": new},
            vault=vault | {FERNET: [key], ESCROW: retired},
        )
    return Step(
        "the old keys are gone",
        before=("backup",),
        deploy=True,
        commands=(("keys", "retire-check", "--json"),),
        note={"step": DONE, "new": new},
        ends=True,
    )


# API tokens


def tokens(vault: Vault, state: State, now: float, overlap: float, revoke: bool) -> Step:
    """Return the next step of a rotation of all tokens: both are good for *overlap* seconds, then the old ones are not.

    With *revoke* the old ones are good no longer as soon as the new ones are in service.
    """
    entries: list[dict[str, Any]] = [dict(entry) for entry in vault[TOKENS]]
    overlapping = [entry["previous"]["expires_at"] for entry in entries if entry.get("previous")]
    step = state.get("step") if under_way(state) else None
    until_ms = int((now + overlap) * 1000)
    if overlapping and step == "begun" and not revoke and max(overlapping) < until_ms:
        # A run that was killed before it deployed them: nobody could ask for a new token yet, so the old ones get their time.
        longer = [
            entry | {"previous": entry["previous"] | {"expires_at": until_ms}} if entry.get("previous") else entry
            for entry in entries
        ]
        return Step("the old tokens are good for longer", note={"step": "begun"}, vault=vault | {TOKENS: longer})
    if overlapping and (revoke or max(overlapping) <= now * 1000):
        alone = [{key: value for key, value in entry.items() if key != "previous"} for entry in entries]
        expired = {"step": "expired"}
        return Step("the old tokens have expired: they are forgotten", note=expired, vault=vault | {TOKENS: alone})
    names = ", ".join(str(entry["name"]) for entry in entries)
    if overlapping:
        until = datetime.datetime.fromtimestamp(max(overlapping) / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return Step(
            f"old and new tokens are good until {until}; run it again then",
            before=("backup",),
            deploy=True,
            note={"step": "overlap"},
            ends=True,
        )
    made = [fingerprint(entry["token"]) for entry in entries]
    if step in ("overlap", "expired") or (step == "revoked" and state.get("new") == made):
        cut = (
            f": cut off is who uses that of {names}, or a session of the status page that began with it"
            if revoke
            else ""
        )
        return Step(f"the old tokens are refused{cut}", before=("backup",), deploy=True, note={"step": DONE}, ends=True)
    renewed = []
    for entry in entries:
        previous = {} if revoke else {"previous": {"token": entry["token"], "expires_at": until_ms}}
        renewed.append(entry | {"token": random_token()} | previous)
    note: dict[str, Any] = {"step": "begun"}
    if revoke:
        note = {"step": "revoked", "new": [fingerprint(entry["token"]) for entry in renewed]}
    return Step("new tokens are made", note=note, vault=vault | {TOKENS: renewed})


# Logins that take turns: the service's at its database, and the backup host's, with the password of the repository


class Login(NamedTuple):
    """One kind of login. *fields*: what changes at a rotation → its name in the vault. *logins*: the roles that take turns.

    *next* and *previous*: names in the vault of what is good beside the login in use. *prepare*: makes the next one good.
    *move*: brings its users to it; *deploy* where they are the service.
    """

    fields: Mapping[str, str]
    logins: tuple[str, ...]
    next: str
    previous: str
    prepare: tuple[str, ...]
    move: tuple[str, ...] = ()
    deploy: bool = False


LOGINS = {
    "database": Login(
        {"name": "vault_atlas_database_login", "password": "vault_atlas_database_password"},  # pragma: allowlist secret
        DATABASE_LOGINS,
        "vault_atlas_database_next",
        "vault_atlas_database_previous",
        ("database", "backup"),
        deploy=True,
    ),
    "backup": Login(
        {
            "name": "vault_backup_login",
            "password": "vault_backup_database_password",  # pragma: allowlist secret
            "repository_password": "vault_backup_repository_password",  # pragma: allowlist secret
        },
        BACKUP_LOGINS,
        "vault_backup_next",
        "vault_backup_previous",
        ("database", "backup"),
        move=("backup",),
    ),
}


def login(kind: str, vault: Vault, state: State, now: float, overlap: float, revoke: bool) -> Step:
    """Return the next step of a rotation of *kind*, a login: both are good until nobody uses the old one, then that one is not.

    With *revoke* nobody is waited for: whoever still uses the old one is cut off.
    """
    of = LOGINS[kind]
    present = {field: vault.get(name, of.logins[0]) for field, name in of.fields.items()}
    rest = {name: value for name, value in vault.items() if name not in (of.next, of.previous)}
    if vault.get(of.previous):
        old = vault[of.previous]["name"]
        return Step(
            f"{present['name']} is in use everywhere"
            + ("" if revoke else f", and nobody is logged in as {old} any more"),
            deploy=of.deploy,
            after=(*of.move, *(() if revoke else ("idle",))),
            note={"step": "moved", "new": fingerprint(present["password"])},
            vault=rest,
        )
    if following := vault.get(of.next):
        made = {of.fields[field]: value for field, value in following.items()}
        return Step(
            f"{following['name']} can log in",
            after=of.prepare,
            note={"step": "added", "new": fingerprint(following["password"])},
            vault=rest | made | {of.previous: present},
        )
    if state.get("step") == "moved" and state.get("new") == fingerprint(present["password"]):
        return Step(
            "the old password is refused",
            after=(*of.prepare, "cut"),
            note={"step": DONE, "new": fingerprint(present["password"])},
            ends=True,
        )
    other = next(name for name in of.logins if name != present["name"])
    coming = {field: random_password() for field in of.fields} | {"name": other}
    return Step(
        f"a new password is made, for {other}",
        note={"step": "begun", "new": fingerprint(coming["password"])},
        vault=rest | {of.next: coming},
    )


MACHINES: Mapping[str, Callable[[Vault, State, float, float, bool], Step]] = {
    "fernet": fernet,
    "tokens": tokens,
    "database": functools.partial(login, "database"),
    "backup": functools.partial(login, "backup"),
}


def inapplicable(groups: Mapping[str, Sequence[str]], tls: bool) -> dict[str, str]:
    """Return kind → why it is not rotated in an environment with these *groups* (name → hosts); *tls*: edges serve HTTPS."""
    found = {}
    if not groups.get("database"):
        found["database"] = "the store is SQLite, which has no passwords"
    if not groups.get("backup"):
        found["backup"] = "no host makes backups"
    if not tls:
        found["tls"] = "the edges serve no HTTPS (haproxy_tls)"
    return found


# For people


def half_rotated(found: Mapping[str, State]) -> list[str]:
    """Return the rotations that are not over, in lines: *found* is the result of :func:`states`."""
    return [
        f"{kind:8} half rotated since {state['at']}: {state['step']}. It goes on with: playbooks/rotate_secrets.yml -e rotate={kind}"
        for kind, state in found.items()
        if kind != RUN and under_way(state)
    ]


def ages(
    found: Mapping[str, State], policy: Mapping[str, float], first: float | None, now: float
) -> list[dict[str, Any]]:
    """Return kind, generation, days, allowed and overdue of each kind in *policy* (kind → days).

    What was never rotated is as old as the oldest entry of any journal, *first* (Unix time), or of unknown age.
    """
    rows = []
    for kind, allowed in policy.items():
        state = found.get(kind, {})
        since = state.get("finished_at") or first
        days = None if since is None else int((now - since) // DAY)
        overdue = days is not None and days > float(allowed)
        rows.append(
            {
                "kind": kind,
                "generation": state.get("generation", 0),
                "days": days,
                "allowed": allowed,
                "overdue": overdue,
            }
        )
    return rows


def age_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the result of :func:`ages` for people."""
    return [
        f"{row['kind']:8} {'age unknown' if row['days'] is None else str(row['days']) + ' days old'}, rotated {row['generation']} times; "
        f"{'OVERDUE: ' if row['overdue'] else ''}{row['allowed']} days are allowed"
        for row in rows
    ]


# A run


class Hosts(Protocol):
    """What a run asks of the fleet; raises RotationError where it cannot have it."""

    def state(self, kind: str) -> State:
        """Return the last entry of the rotation of *kind* in the journals."""

    def deploy(self) -> None:
        """Bring the release in service into service with what the vault says, unless it is."""

    def do(
        self,
        kind: str,
        acts: Sequence[str],
        commands: Sequence[Sequence[str]] = (),
        entry: Mapping[str, Any] | None = None,
    ) -> Sequence[str]:
        """Do *acts*, then run *commands* of the service, then append *entry* to every journal; return what was cut off.

        *revoke*: other deployments than the one in service get current credentials if they ever come back. *database*: its roles
        have the passwords of the vault, or none. *backup*: the backup host has its credentials, and the vault file in escrow.
        *tls*: the edges serve the certificates of the inventory, and none of those in *old* of *entry*. *idle*: nobody is logged
        in as the previous login of *kind* any more. *cut*: the sessions of who may not log in are ended.
        """
        ...

    def certificates(self) -> Mapping[str, Mapping[str, str | None]]:
        """Return edge → *served* and *wanted*: fingerprints of the certificate it serves and of the one in the inventory."""

    @property
    def issues(self) -> bool:
        """Whether :meth:`issue` makes certificates; elsewhere that is up to the user."""

    def issue(self, retired: Sequence[str]) -> None:
        """Have others issued than the certificates *retired*."""

    def key(self) -> KeyFile:
        """Return the key with which Ansible connects."""

    def let_in(self, key: KeyFile) -> None:
        """Let the coming *key* in on every host, and reach each with it."""

    def shut_out(self, key: KeyFile, end: bool) -> Sequence[str]:
        """Shut the one before *key* out on every host, and see that each refuses it; return what was cut off.

        With *end* that is every session that began with a key which is not let in any more, or nobody knows with which.
        """
        ...


class Secrets(Protocol):
    """The vault file."""

    def read(self) -> Vault:
        """Return all secrets."""

    def write(self, values: Vault) -> None:
        """Replace them, whole or not at all."""

    def rekey(self) -> str:
        """Give the file another password."""


class RotationError(Exception):
    """A rotation that stopped; what it did so far stays, and the next run goes on."""


MOST_STEPS = 8


def ssh(hosts: Hosts, revoke: bool, mark: Mapping[str, Any]) -> Iterator[str]:
    """Replace the key with which Ansible connects: the new one is let in and tried everywhere before the old one is shut out.

    With *revoke* whoever is logged in with the old one is cut off.
    """
    key = hosts.key()
    if not under_way(hosts.state("ssh")):
        key.forget()
    new = key.make()
    if not under_way(hosts.state("ssh")):
        hosts.do("ssh", (), entry={"step": "begun", "new": new, **mark})
    hosts.let_in(key)
    key.put_in_place()
    yield "the new key is let in, and every host was reached with it"
    yield from hosts.shut_out(key, revoke)
    generation = int(hosts.state("ssh").get("generation", 0)) + 1
    hosts.do("ssh", ("backup",), entry={"step": DONE, "new": new, "generation": generation, **mark})
    key.forget()
    yield "the old key is refused everywhere"


def tls(secrets: Secrets, hosts: Hosts, mark: Mapping[str, Any]) -> Iterator[str]:
    """Replace the certificates of the edges: in a lab by new ones of its authority, elsewhere by what the user put in place."""
    state, found = hosts.state("tls"), hosts.certificates()
    going_on = under_way(state)
    old = list(state["old"]) if going_on else sorted({str(each["served"]) for each in found.values() if each["served"]})
    late = sorted(edge for edge, each in found.items() if each["wanted"] in old)
    if late and not hosts.issues:
        raise RotationError(
            f"{', '.join(late)}: the certificate in the inventory is the one that is to be replaced. Put the new one in its place "
            "(vault_haproxy_tls_pem, or the file that haproxy_tls_pem names: docs/how-to/tls.md), then run this again."
        )
    if not going_on:
        hosts.do("tls", (), entry={"step": "begun", "old": old, **mark})
    if late:
        hosts.issue(old)
    if (vault := secrets.read()).get(CERTIFICATE):
        secrets.write(numbered(vault))  # what was put into it by hand is to be told from the vault before
    generation = int(hosts.state("tls").get("generation", 0)) + 1
    hosts.do("tls", ("tls", "backup"), entry={"step": DONE, "old": old, "generation": generation, **mark})
    yield f"{len(found)} edges serve another certificate, and none of the old ones"


def begin_all(kinds: Sequence[str], hosts: Hosts, now: float, revoke: bool) -> dict[str, str]:
    """Note that all *kinds* are rotated; or where a run of all did not end, return the kinds that are finished since (→ when).

    It is gone on with for a day: a later one is meant as a new one. With *revoke* only if it revoked too, and only what did: what
    was made without may have leaked since. It has ended when each of its kinds is finished or overlaps, be it by another run.
    """
    run = hosts.state(RUN)
    kinds_then = list(run.get("kinds", []))
    since = {
        kind: state for kind in kinds_then if int((state := hosts.state(kind)).get("order", 0)) > int(run["order"])
    }
    finished = {
        kind: str(state["at"])
        for kind, state in since.items()
        if state["step"] == DONE and (state.get("revoke") or not revoke)
    }
    ended = {*finished, *(kind for kind, state in since.items() if state["step"] == "overlap")}
    if set(kinds_then) - ended and now - unix(run["at"]) < DAY and (run.get("revoke") or not revoke):
        return finished
    hosts.do(RUN, (), entry={"step": "begun", "kinds": list(kinds), **({"revoke": True} if revoke else {})})
    return {}


def rotate(kind: str, secrets: Secrets, hosts: Hosts, now: float, overlap: float, revoke: bool) -> Iterator[str]:
    """Rotate *kind*, and yield what is done, step by step. *now*: Unix time; *overlap*: seconds for which old tokens stay good.

    With *revoke* a rotation that was begun without it is ended, and what it has made is replaced in turn: it may have leaked as well.
    """
    state = hosts.state(kind)
    earlier = revoke and under_way(state) and not state.get("revoke") and (kind != "tls" or hosts.issues)
    if earlier:
        yield from _rotate(kind, secrets, hosts, now, overlap, revoke, {})
    yield from _rotate(kind, secrets, hosts, now, overlap, revoke, {"revoke": True} if revoke else {})


def _rotate(
    kind: str, secrets: Secrets, hosts: Hosts, now: float, overlap: float, revoke: bool, mark: Mapping[str, Any]
) -> Iterator[str]:
    """Do one rotation, or end one; *mark*: what its entries have besides."""
    if kind == "vault":
        hosts.do(kind, (), entry={"step": "begun", **mark})
        yield secrets.rekey()
        generation = int(hosts.state(kind).get("generation", 0)) + 1
        hosts.do(kind, ("backup",), entry={"step": DONE, "generation": generation, **mark})
        return
    if kind in ("tls", "ssh"):
        yield from tls(secrets, hosts, mark) if kind == "tls" else ssh(hosts, revoke, mark)
        return
    for _ in range(MOST_STEPS):
        step = MACHINES[kind](secrets.read(), hosts.state(kind), now, overlap, revoke)
        acts = [*step.before, *step.after]
        if step.deploy:
            if step.before:
                hosts.do(kind, step.before)
            hosts.deploy()
            acts = ["revoke", *step.after]
        finished = step.note["step"] == DONE
        generation = int(hosts.state(kind).get("generation", 0)) + 1
        entry = {**step.note, **mark, **({"generation": generation} if finished else {})}
        cut = hosts.do(kind, acts, step.commands, entry)
        if step.vault is not None:
            secrets.write(numbered(step.vault))
        yield step.says
        yield from cut
        if step.ends:
            return
    raise RotationError(f"{kind}: this does not come to an end; see the journal: playbooks/status.yml")
