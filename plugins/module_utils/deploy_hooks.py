"""Hooks of a deploy: what is told or asked before and after its phases. Pure: variables come in, hooks and findings go out.

Phases are those that change something; preflight changes nothing and has none. ``failed`` is the event of a deploy that was not
brought into service, after everything was undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("lock", "stage", "migrate", "switch", "verify", "finish")
FAILED = "failed"
EVENTS = (*(f"{side}_{phase}" for phase in PHASES for side in ("before", "after")), FAILED)
TOO_LATE = ("after_finish", FAILED)
"""Events after which there is nothing left to stop: their hooks are told of, whatever they answer."""
KEYS = {"name", "events", "command", "url", "headers", "seconds", "optional"}
Hook = Mapping[str, Any]


def findings(hooks: Any) -> list[str]:
    """Return what is wrong with the variable ``deploy_hooks``, one sentence each."""
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        return ["deploy_hooks must be a list of hooks (docs/how-to/hooks.md)."]
    found = [f"deploy_hooks, entry {index}: {wrong}." for index, hook in enumerate(hooks, 1) for wrong in _wrong(hook)]
    names = [str(hook["name"]) for hook in hooks if isinstance(hook, Mapping) and hook.get("name")]
    twice = sorted({name for name in names if names.count(name) > 1})
    return found + [f"deploy_hooks has two hooks named {name!r}." for name in twice]


def _wrong(hook: Any) -> list[str]:
    if not isinstance(hook, Mapping):
        return ["is no mapping with name, events, and command or url"]
    found = []
    unknown = sorted(set(map(str, hook)) - KEYS)
    if unknown:
        # Without quotes, YAML reads the key `on` as true.
        found.append(f"has the unknown key {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}")
    if not hook.get("name"):
        found.append("lacks a name")
    events = hook.get("events")
    if not isinstance(events, list) or not events:
        found.append("lacks events, a list")
    else:
        strange = [str(event) for event in events if event not in EVENTS]
        if strange:
            found.append(f"names the unknown event {', '.join(strange)}; known are {', '.join(EVENTS)}")
    if bool(hook.get("command")) == bool(hook.get("url")):
        found.append("needs either command or url")
    command = hook.get("command")
    if command and not (isinstance(command, list) and all(isinstance(part, str) for part in command)):
        found.append("has a command that is not a list of strings: the program and its arguments")
    if hook.get("url") and not str(hook["url"]).startswith(("https://", "http://")):
        found.append("has a url that is neither https:// nor http://")
    if hook.get("headers") and not (hook.get("url") and isinstance(hook["headers"], Mapping)):
        found.append("has headers, which are a mapping and belong to a url")
    seconds = hook.get("seconds", 30)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        found.append("has seconds that are not a number above 0")
    if not isinstance(hook.get("optional", False), bool):
        found.append("has optional that is neither true nor false")
    return found


def due(hooks: Sequence[Hook], events: Sequence[str]) -> list[dict[str, Any]]:
    """Return the hooks that *events* call, in the order of events and then of the list, each with the ``event`` it is for."""
    return [{**hook, "event": event} for event in events for hook in hooks if event in hook["events"]]


def phase(event: str) -> str:
    """Return the phase in which a deploy failed that a hook of *event* stopped.

    Before *finish* everything can still be undone, so that is a failure to verify.
    """
    named = event.partition("_")[2]
    return "verify" if named == "finish" else named


def told(plan: Mapping[str, Any], failures: Sequence[Mapping[str, Any]], environment: str) -> dict[str, Any]:
    """Return what a hook is told beside its event: which deploy of what, on which hosts, and what failed so far."""
    release = plan.get("release") or {}
    return {
        "environment": environment,
        "deploy": plan["deploy"],
        "holder": plan["holder"],
        "mode": plan["mode"],
        "strategy": "rolling" if plan["rolling"] else "blue_green",
        "release": release.get("id"),
        "version": release.get("version"),
        "digest": release.get("digest"),
        "deployment": plan["number"],
        "replaces": plan["old_number"],
        "slot": plan["slot"],
        "hosts": plan["hosts"],
        "edges": plan["edges"],
        "left_out": [*plan["missing"], *plan["missing_edges"]],
        "failures": [{key: failure.get(key) for key in ("host", "phase", "message")} for failure in failures],
    }
