"""How secrets are rotated: for each kind a small state machine, one step at a time. Pure: values and states come in and go out.

What was done is in the journals of the app hosts (event *rotation*); what is wanted next is in the vault file. A run that was
killed anywhere is continued by the next, because each step is decided from these two alone and can be repeated.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ansible.module_utils.vault_spec import random_fernet_key, random_token

KINDS = ("tokens", "fernet", "vault")
FERNET, ESCROW, TOKENS = "vault_atlas_fernet_keys", "vault_atlas_fernet_escrow", "vault_atlas_tokens"
EVENT = "rotation"
DONE = "finished"
DAY = 86400
Vault = dict[str, Any]
State = Mapping[str, Any]


class Step(NamedTuple):
    """One step: first *deploy* (what the vault says now), then *commands* in service, then *note* in the journals, then *vault*.

    *says*: for people. *ends*: whether the run has nothing more to do for this kind, be it over or waiting.
    """

    says: str
    deploy: bool = False
    commands: tuple[tuple[str, ...], ...] = ()
    note: Mapping[str, Any] = {}
    vault: Vault | None = None
    ends: bool = False


def fingerprint(key: str) -> str:
    """Return the name that the service gives a key (``atlas.crypto.Keyring.fingerprints``); it says nothing about it."""
    return hashlib.sha256(b"atlas-key:" + key.encode()).hexdigest()[:12]


def states(journals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return kind → last entry of its rotation on any host, with *generation* and *finished_at* (Unix time, None for never).

    The hosts are told at the same time; of one that missed an entry the others know more.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        entries = [
            (str(entry["at"]), host, entry)
            for host, journal in journals.items()
            for entry in journal
            if entry.get("event") == EVENT and entry.get("kind") == kind
        ]
        finished = {entry[0]: entry for entry in entries if entry[2].get("step") == DONE}
        last = max(entries, key=lambda each: (each[0], int(each[2].get("order", 0))), default=None)
        found[kind] = {
            **(dict(last[2]) if last else {}),
            "generation": max((int(entry[2].get("generation", 0)) for entry in finished.values()), default=0),
            "finished_at": max(map(unix, finished), default=None),
        }
    return found


def unix(moment: str) -> float:
    """Return a moment in RFC 3339 as Unix time."""
    return datetime.datetime.fromisoformat(moment).timestamp()


def under_way(state: State) -> bool:
    """Tell whether a rotation with the last entry *state* was begun and is not over."""
    return bool(state.get("step")) and state.get("step") != DONE


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
        first = vault | {FERNET: [key, *others]}
        return Step(
            "the new key is known everywhere: it becomes the first", True, (), {"step": "added", "new": new}, first
        )
    if others:
        commands = (("keys", "reencrypt", "--json"), ("keys", "retire-check", "--json"))
        retired = vault | {FERNET: [key], ESCROW: [*others, *(vault.get(ESCROW) or [])]}
        return Step(
            "what older keys encrypted is encrypted anew; they retire",
            True,
            commands,
            {"step": "reencrypted", "new": new},
            retired,
        )
    check = (("keys", "retire-check", "--json"),)
    return Step("the old keys are gone", True, check, {"step": DONE, "new": new}, ends=True)


# API tokens


def tokens(vault: Vault, state: State, now: float, overlap: float, revoke: bool) -> Step:
    """Return the next step of a rotation of all tokens: both are good for *overlap* seconds, then the old ones are not.

    With *revoke* the old ones are good no longer as soon as the new ones are in service.
    """
    entries: list[dict[str, Any]] = [dict(entry) for entry in vault[TOKENS]]
    overlapping = [entry["previous"]["expires_at"] for entry in entries if entry.get("previous")]
    step = state.get("step") if under_way(state) else None
    if overlapping and (revoke or max(overlapping) <= now * 1000):
        alone = [{key: value for key, value in entry.items() if key != "previous"} for entry in entries]
        expired = {"step": "expired"}
        return Step("the old tokens have expired: they are forgotten", note=expired, vault=vault | {TOKENS: alone})
    if overlapping:
        until = datetime.datetime.fromtimestamp(max(overlapping) / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return Step(
            f"old and new tokens are good until {until}; run it again then", True, (), {"step": "overlap"}, ends=True
        )
    made = [fingerprint(entry["token"]) for entry in entries]
    if step in ("overlap", "expired") or (step == "revoked" and state.get("new") == made):
        return Step("the old tokens are refused", True, (), {"step": DONE}, ends=True)
    until_ms = int((now + overlap) * 1000)
    renewed = []
    for entry in entries:
        previous = {} if revoke else {"previous": {"token": entry["token"], "expires_at": until_ms}}
        renewed.append(entry | {"token": random_token()} | previous)
    note: dict[str, Any] = {"step": "begun"}
    if revoke:
        note = {"step": "revoked", "new": [fingerprint(entry["token"]) for entry in renewed]}
    return Step("new tokens are made", note=note, vault=vault | {TOKENS: renewed})


MACHINES = {"fernet": fernet, "tokens": tokens}


# For people


def half_rotated(found: Mapping[str, State]) -> list[str]:
    """Return the rotations that are not over, in lines: *found* is the result of :func:`states`."""
    return [
        f"{kind:8} half rotated since {state['at']}: {state['step']}. It goes on with: playbooks/rotate_secrets.yml -e rotate={kind}"
        for kind, state in found.items()
        if under_way(state)
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
        """Bring the release in service into service with what the vault says, unless it is; other deployments are revoked."""

    def run(self, commands: Sequence[Sequence[str]]) -> None:
        """Run commands of the service in the deployment in service."""

    def note(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Append an entry to every journal."""


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


def rotate(kind: str, secrets: Secrets, hosts: Hosts, now: float, overlap: float, revoke: bool) -> Iterator[str]:
    """Rotate *kind*, and yield what is done, step by step. *now*: Unix time; *overlap*: seconds for which old tokens stay good."""
    if kind == "vault":
        hosts.note(kind, {"step": "begun"})
        yield secrets.rekey()
        hosts.note(kind, {"step": DONE, "generation": int(hosts.state(kind).get("generation", 0)) + 1})
        return
    for _ in range(MOST_STEPS):
        step = MACHINES[kind](secrets.read(), hosts.state(kind), now, overlap, revoke)
        if step.deploy:
            hosts.deploy()
        if step.commands:
            hosts.run(step.commands)
        if step.note:
            more = {"generation": int(hosts.state(kind).get("generation", 0)) + 1} if step.note["step"] == DONE else {}
            hosts.note(kind, {**step.note, **more})
        if step.vault is not None:
            secrets.write(step.vault)
        yield step.says
        if step.ends:
            return
    raise RotationError(f"{kind}: this does not come to an end; see the journal: playbooks/status.yml")
