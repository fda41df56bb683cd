"""/healthz (the process), /readyz (should it get traffic) and /health (the detail)."""

from __future__ import annotations

from typing import Any, Literal

from flask import Blueprint, Response, jsonify
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import SQLAlchemyError

from atlas import admission, backups, breakers, feeds, presence
from atlas.api.openapi import describe
from atlas.api.state import State, state
from atlas.db import rfc3339
from atlas.keys import progress
from atlas.runtime import one_line

blueprint = Blueprint("health", __name__)


class AliveOut(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class ReadyOut(BaseModel):
    """Whether this process should get traffic. A check holds "ok" or what is wrong."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ready", "not ready"]
    checks: dict[str, str]


class HealthOut(BaseModel):
    """The whole state of this slot as the API sees it."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "degraded"]
    release: str
    deployment: int
    slot: str
    host: str
    environment: str
    checks: dict[str, str]
    queue: dict[str, Any] | None
    breakers: dict[str, int] | None
    feeds: dict[str, int] | None
    workers: list[dict[str, Any]]
    admitted: list[int]


@blueprint.get("/healthz")
@describe({200: AliveOut})
def healthz() -> Response:
    """Say that the process answers."""
    return jsonify(status="alive")


@blueprint.get("/readyz")
@describe({200: ReadyOut, 503: ReadyOut})
def readyz() -> tuple[Response, int]:
    """Say whether this process should get traffic."""
    shared = state()
    results = checks(shared)
    is_ready = all(result == "ok" for result in results.values())
    answer = {"status": "ready" if is_ready else "not ready", "checks": results} | _engine(shared)
    return jsonify(answer), 200 if is_ready else 503


@blueprint.get("/health")
@describe({200: HealthOut})
def health() -> Response:
    """Show the whole state of this slot as the API sees it."""
    return jsonify(detail(state()))


def checks(shared: State) -> dict[str, str]:
    """Each check with "ok" or what is wrong. Without readable credentials the application would not have started."""
    results = {"database": "ok", "schema": "ok", "credentials": "ok", "draining": "ok"} | shared.pulse.problems()
    if shared.draining():
        results["draining"] = "this process is stopping"
    return results


def _engine(shared: State) -> dict[str, str | None]:
    return {f"{shared.database.dialect}_version": shared.pulse.engine}


def detail(shared: State) -> dict[str, Any]:
    """The whole state of this slot as the API sees it; holds no secret."""
    results = checks(shared)
    found: dict[str, Any] = {
        "status": "ok" if all(result == "ok" for result in results.values()) else "degraded",
        "release": shared.identity.release,
        "deployment": shared.identity.deployment,
        "slot": shared.identity.slot,
        "host": shared.identity.host,
        "environment": shared.settings.environment,
        "checks": results,
        "database": {"dialect": shared.database.dialect, "version": shared.pulse.engine},
        "keyring": {"keys": len(shared.keyring.fingerprints), "fingerprints": shared.keyring.fingerprints},
        "backup": backups.look(shared.settings.backup_status_path),
        "queue": None,
        "breakers": None,
        "feeds": None,
        "workers": [],
        "admitted": [],
    }
    # A backup that fails is for people to mend; it is no reason to send traffic elsewhere, hence not in /readyz.
    if found["backup"] and found["backup"]["problems"]:
        found["status"] = "degraded"
        results["backup"] = "; ".join(found["backup"]["problems"])
    if results["database"] != "ok":
        return found
    try:
        stats = shared.counted.get()
        found["queue"] = {
            **{name: stats.total(name) for name in ("ready", "running", "dead")},
            "limit": shared.settings.queue_limit,
            "oldest_ready_seconds": stats.oldest_ready_seconds,
        }
        with shared.database.read() as connection:
            found["keyring"] |= progress(connection, shared.keyring).as_dict()
            # How many; their names are for those who may read.
            found["breakers"] = breakers.states(shared.database, connection)
            found["feeds"] = feeds.tally(connection, shared.database.now(connection))
        found["workers"] = [_worker(service) for service in presence.roster(shared.database)]
        found["admitted"] = [entry.id for entry in admission.admissions(shared.database) if entry.admitted]
    except (SQLAlchemyError, OSError) as error:
        found["status"] = "degraded"
        found["checks"]["database"] = f"does not answer: {one_line(error)}"
    return found


def _worker(service: presence.Presence) -> dict[str, Any]:
    times = {"started_at": rfc3339(service.started_at), "seen_at": rfc3339(service.seen_at)}
    return service.as_dict() | times | {"age_seconds": round(service.age_seconds, 3)}
