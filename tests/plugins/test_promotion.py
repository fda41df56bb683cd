"""Each gate stops a promotion that should not pass, an override lets it pass and is kept, and what is written is one file."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import promotion
import pytest
import yaml
from ansible.module_utils import promotion_plan, release, release_pin, settings_check, survey
from ansible.module_utils.lab_inventory import encrypt_vault
from ansible.module_utils.vault_spec import generate, random_password, secret_strings

from tests.plugins import releases
from tests.plugins.test_deploy_plan import app, edge

PROJECT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
HOUR = 3600
ID = "1.0-abc"
LIMITS = {"from": "staging", "soak_hours": 24, "error_percent": 0.1, "requests": 100, "restarts": 0}
FOUND = {"error": "", "signer": "SHA256:" + "k" * 43, "schema": {"revisions": ["0001", "0002"]}, "components": {}}


def finished(hours_ago: float, name: str = ID, **other: Any) -> dict[str, Any]:
    at = datetime.datetime.fromtimestamp(NOW - hours_ago * HOUR, datetime.UTC).isoformat()
    entry = {"at": at, "event": "finished", "outcome": "ok", "deployment": 4, "slot": "blue", "release": name}
    return entry | other


def host(**other: Any) -> dict[str, Any]:
    content = {"release": ID, "version": "1.0", "digest": "d" * 64}
    fact = app(number=4, same=True, ready={"status": 200, "release": ID}, deployments={"4": content}, clock=NOW)
    fact |= {"requests": {"total": 500, "failed": 0}, "journal": [finished(48)], "troubles": troubles()}
    return fact | other


def troubles(*restarts: float, known: float | None = 1000, complaints: Sequence[float] = ()) -> dict[str, Any]:
    """What a host's journal of systemd knows of atlas-core and atlas-monitoring in blue; all in hours ago."""

    def at(name: str, moments: Sequence[float]) -> list[list[Any]]:
        return [[f"atlas-{name}@blue.service", NOW - hours * HOUR] for hours in moments]

    since = None if known is None else NOW - known * HOUR
    told = {"since": since, "restarts": at("core", restarts), "complaints": at("monitoring", complaints)}
    return told | ({} if since is not None else {"error": "it is truncated"})


def source(**facts: Any) -> dict[str, Any]:
    """Return a survey of a staging that may be promoted."""
    known = {"app1": host(), "app2": host(), "edge1": edge("be_blue")} | facts
    return {"environment": "staging", "hosts": ["app1", "app2"], "edges": ["edge1"], "facts": known}


def target(**other: Any) -> dict[str, Any]:
    """Return a survey of a production that may get it."""
    survey_ = {"environment": "production", "hosts": [], "edges": [], "facts": {}, "freeze_windows": [], "pin": {}}
    return survey_ | {"limits": LIMITS, "schema": {"applied": {"0001": "expand"}}, **other}


def against(
    one: dict[str, Any] | None = None, other: dict[str, Any] | None = None, settings: tuple[str, ...] = (), **found: Any
) -> list[tuple[str, str]]:
    one = one or source()
    wanted = {**promotion_plan.source_release(one), **FOUND, **found}
    return promotion_plan.findings(one, other or target(), wanted, settings, NOW)


def test_what_is_well_passes_every_gate() -> None:
    assert against() == []
    assert against(other=target(schema={})) == []  # nothing was deployed there yet


STOPPED: dict[str, tuple[Callable[[], list[tuple[str, str]]], str]] = {
    "digest": (
        lambda: against(source(app2=host(digest="e" * 64, journal=[finished(48)]))),
        "app2 serves 1.0-abc, the others",
    ),
    "signature": (lambda: against(error="it is not signed"), "it is not signed"),
    "soak": (lambda: against(source(app2=host(journal=[finished(1.5)]))), "for 1.5 h, 24 h are required"),
    "health": (lambda: against(source(app2=host(troubles=troubles(2)))), "app2: atlas-core restarted by itself once"),
    "errors": (lambda: against(source(app2=host(requests={"total": 500, "failed": 2}))), "2 of its 1000 requests"),
    "schema": (
        lambda: against(other=target(schema={"applied": {"0001": "expand", "0003": "contract"}})),
        "the contract revision 0003",
    ),
    "settings": (lambda: against(settings=("main.yml:3: new_key: is missing (app1)",)), "new_key"),
    "freeze": (
        lambda: against(
            other=target(freeze_windows=[{"reason": "year end", "from": "2027-01-01", "to": "2027-02-01", "time_zone": "UTC"}])
        ),
        "year end",
    ),
}  # fmt: skip


def test_there_is_a_test_for_each_gate() -> None:
    assert STOPPED.keys() == promotion_plan.GATES.keys()


@pytest.mark.parametrize("gate", STOPPED)
def test_a_gate_stops_what_should_not_pass_and_is_overridden_by_its_name_alone(gate: str) -> None:
    stop, says = STOPPED[gate]
    found = stop()
    assert {name for name, _ in found} == {gate} and says in found[0][1]
    assert promotion_plan.decide(found, [], [], "")["stops"][0].startswith(f"{gate}: ")
    others = [name for name in promotion_plan.GATES if name != gate]
    assert promotion_plan.decide(found, [], others, "in a hurry")["stops"] != []
    assert promotion_plan.decide(found, [], [gate], "the site is down") == {
        "stops": [],
        "overridden": {gate: "the site is down"},
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"app2": {"unreachable": True, "msg": "gone"}}, "app2 does not answer"),
        ({"app2": host(ready={"status": 503, "release": ID})}, "app2 is not ready"),
        ({"app2": host(stale_units=["atlas-api@blue.service"])}, "units changed"),
        ({"app2": host(as_inventory=False)}, "differ from the inventory"),
        ({"edge1": edge("be_blue", maintenance="The database moves")}, "in maintenance"),
        ({"edge1": edge("be_blue", owed={"app2": {"deployment": 5}})}, "app2 is owed deployment 5"),
        ({"app1": host(troubles=troubles(30, 2))}, "app1: atlas-core restarted by itself 2 times since 2027-01-13"),
        ({"app2": host(troubles=troubles(known=20))}, "app2: systemd's journal reaches back to 2027-01-14 12:00:00 UTC only"),
        ({"app2": host(troubles=troubles(known=None))}, "app2: systemd's journal cannot be read, so how"),
        ({"app1": host(troubles=troubles(complaints=[20, 30, 40]))}, "app1: in 3 of its 2880 minutes in service a probe"),
    ],
)  # fmt: skip
def test_health_means_every_host_and_the_whole_time_in_service(change: dict[str, Any], says: str) -> None:
    assert any(gate == "health" and says in text for gate, text in against(source(**change)))


def test_what_was_not_its_doing_or_is_allowed_is_not_held_against_a_release() -> None:
    """A restart before it came, in the other slot or while another was tried in its place; a minute of 2880 without the store."""
    other: dict[str, Any] = {"deployment": 5, "slot": "blue", "seconds": 60.0}
    tried = [
        finished(48),
        finished(20, event="started", outcome="failed", **other),
        finished(19.9, event="undone", back_to=4, **other),
    ]
    well = troubles(50, 20.01, complaints=[60, 10])
    well["restarts"].append(["atlas-core@green.service", NOW - HOUR])
    assert against(source(app1=host(journal=tried, troubles=well))) == []
    assert against(source(app1=host(troubles=well))) != [], "nothing else was tried"
    allowed = target(limits=LIMITS | {"restarts": 1})
    assert against(source(app1=host(troubles=troubles(2))), allowed) == []


def test_a_restart_counts_for_ever_also_of_an_earlier_deployment_in_another_slot_and_before_its_deploy_was_over() -> (
    None
):
    """The counter of a unit is gone then."""
    journal = [
        finished(48, slot="green", event="started", deployment=3, seconds=600),
        finished(47, slot="green", deployment=3),
        finished(30, event="started", outcome="ok", seconds=60),
        finished(29),
        finished(28, event="started", outcome="ok", seconds=60),  # again in its place, and it was finished already
    ]
    for moment, slot, counts in (
        (48.1, "green", True), (40, "green", True), (20, "green", False), (29.5, "blue", True), (2, "blue", True),
    ):  # fmt: skip
        facts = host(
            journal=journal, troubles=troubles() | {"restarts": [[f"atlas-api@{slot}.service", NOW - moment * HOUR]]}
        )
        assert bool(against(source(app1=facts))) == counts, (moment, slot)
    facts = host(
        journal=[*journal, finished(27, "2.0-def", deployment=5), finished(26, deployment=6)], troubles=troubles(40)
    )
    assert against(source(app1=facts)) == [], "it begins anew after another"


def test_a_journal_that_covers_the_soak_but_not_all_of_the_service_is_noted() -> None:
    one = source(app1=host(troubles=troubles(known=30)))
    assert against(one) == []
    (note,) = promotion_plan.notes(one, promotion_plan.source_release(one))
    assert "of app1 is known since 2027-01-14 02:00:00 UTC" in note
    assert promotion_plan.notes(source(), promotion_plan.source_release(source())) == []


def test_the_soak_of_a_release_outlasts_its_deployments_and_begins_anew_with_another() -> None:
    def since(*journal: dict[str, Any]) -> float:
        return float(
            promotion_plan.source_release(source(app1=host(journal=list(journal)), app2=host(journal=list(journal))))[
                "since"
            ]
        )

    again = finished(40), {"at": "x", "event": "staged", "release": "2.0"}, finished(2)
    assert since(*again) == NOW - 40 * HOUR
    assert since(finished(40), finished(30, "2.0-def"), finished(2)) == NOW - 2 * HOUR
    assert since(finished(40), finished(2, "2.0-def", outcome="failed")) == NOW - 40 * HOUR
    unknown = source(app1=host(journal=[]))
    assert promotion_plan.source_release(unknown)["since"] is None
    assert [gate for gate, _ in against(unknown)] == ["soak"]


def test_a_host_that_does_not_answer_may_serve_something_else() -> None:
    found = against(source(app2={"unreachable": True, "msg": "gone"}))
    assert ("digest", "app2 does not answer: what it serves is not known.") in found


def test_few_requests_tell_nothing() -> None:
    few = {"total": 10, "failed": 0}
    (found,) = against(source(app1=host(requests=few), app2=host(requests=few)))
    assert found[0] == "errors" and "20 requests, 100 are required" in found[1]


def test_what_earlier_deployments_of_the_release_answered_counts_too() -> None:
    """A deploy of new settings, or a rotation, starts other services; what failed before it stays failed."""
    few = {"total": 10, "failed": 0}

    def found(*served: tuple[float, dict[str, Any]]) -> list[str]:
        journal = [finished(hours, served=each) for hours, each in served]
        hosts = {name: host(requests=few, journal=[finished(48), *journal]) for name in ("app1", "app2")}
        return [text for gate, text in against(source(**hosts)) if gate == "errors"]

    assert found((30, {"release": ID, "total": 500, "failed": 0})) == []
    assert "4 of its 1020 requests" in found((30, {"release": ID, "total": 500, "failed": 2}))[0]
    assert "20 requests, 100 are required" in found((30, {"release": "2.0-def", "total": 500, "failed": 2}))[0]
    assert "20 requests, 100 are required" in found((30, {}))[0]


@pytest.mark.parametrize(
    ("applied", "stops"),
    [
        ({"0001": "expand", "0002": "expand", "0003": "expand"}, False),  # an older release lives with it
        ({"0001": "expand", "8001": "expand"}, True),  # the histories have parted
    ],
)
def test_migrations_have_to_fit_the_targets_database(applied: dict[str, str], stops: bool) -> None:
    assert [gate for gate, _ in against(other=target(schema={"applied": applied}))] == ["schema"] * stops


def test_a_database_that_cannot_be_asked_stops_it() -> None:
    assert [gate for gate, _ in against(other=target(schema={"error": "no connection"}))] == ["schema"]


def test_an_environment_without_a_release_has_none_to_give() -> None:
    (found,) = against(source(app1=app(slot=None), app2=app(slot=None)))
    assert "No release is in service in staging" in found[1]


def test_no_environment_is_skipped_and_nothing_overrides_that() -> None:
    everything = list(promotion_plan.GATES)
    refused = promotion_plan.refusals(source() | {"environment": "development"}, target(), everything, "because")
    assert "from staging alone" in refused[0]
    decided = promotion_plan.decide([("soak", "too short")], refused, everything, "because")
    assert decided["overridden"] == {} and len(decided["stops"]) == 2
    assert "sets no promotion_from" in promotion_plan.refusals(
        source(), target(limits=LIMITS | {"from": ""}), [], ""
    )[0]  # fmt: skip


def test_a_release_from_a_file_passes_the_gates_of_the_target_alone_and_to_a_lab_alone() -> None:
    found = {**FOUND, "id": ID, "since": None}
    frozen = [{"reason": "year end", "from": "2027-01-01", "to": "2027-02-01", "time_zone": "UTC"}]
    against_it = promotion_plan.findings(
        None, target(schema={"error": "gone"}, freeze_windows=frozen), found | {"error": "not signed"}, ["x"], NOW
    )
    gates = [gate for gate, _ in against_it]
    assert sorted([*gates, *promotion_plan.OF_SOURCE]) == sorted(promotion_plan.GATES)
    assert promotion_plan.refusals(None, target(lab=True), [], "") == []
    everything = list(promotion_plan.GATES)
    assert "no release from a file" in promotion_plan.refusals(None, target(lab=False), everything, "because")[0]


def test_an_override_needs_a_gate_and_a_reason() -> None:
    assert "no gate sok" in promotion_plan.refusals(source(), target(), ["sok"], "because")[0]
    assert "with a reason" in promotion_plan.refusals(source(), target(), ["soak"], "  ")[0]
    assert promotion_plan.refusals(source(), target(), ["soak"], "because") == []


def test_changes_name_schema_commits_and_dependencies() -> None:
    wanted = {"id": ID, "schema": FOUND["schema"], "components": {"flask": "3.1", "new": "1", "same": "1"}}
    before = {"id": "0.9-old", "manifest": {"version": "0.9"}, "components": {"flask": "3.0", "gone": "2", "same": "1"}}
    assert promotion_plan.changes(target(), wanted, before, ["abc Mend it"]) == [
        f"release       0.9-old -> {ID}",
        "commit        abc Mend it",
        "schema        new revisions: 0002",
        "dependency    flask 3.0 -> 3.1",
        "dependency    new 1 is new",
        "dependency    gone 2 is gone",
    ]


# --- as a whole, in a copy of the inventories --------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the inventories, a signed release, and surveys that say that it serves in staging."""
    shutil.copytree(PROJECT / "inventories", tmp_path / "inventories", symlinks=True)
    (tmp_path / "dist").mkdir()
    archive = releases.make(tmp_path, "1.0")
    for name in (archive.name, f"{archive.name}.sig"):
        (tmp_path / name).rename(tmp_path / "dist" / name)
    digest = release.file_digest(tmp_path / "dist" / archive.name)
    name = release.release_id("1.0", digest)
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=48)
    fact = host(
        digest=digest,
        deployments={"4": {"release": name, "version": "1.0", "digest": digest}},
        ready={"status": 200, "release": name},
        journal=[finished(0, name, at=now.isoformat())],
        clock=datetime.datetime.now(datetime.UTC).timestamp(),
        troubles=troubles() | {"since": 0.0},
    )
    where = tmp_path / "inventories"
    staging = source(app1=fact, app2=fact) | {"inventory": str(where / "staging"), "signers": "", "limits": LIMITS}
    production = target(schema={}, inventory=str(where / "production"), signers=releases.signers(tmp_path))
    production |= {"hosts": ["app1"], "variables": {"app1": {"atlas_settings": {}}}, "manifest": {}, "components": {}}

    def read(names: list[str], _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        file = where / "production" / release_pin.PLACE
        pin = yaml.safe_load(file.read_text())["release_pin"] if file.is_file() else {}
        return staging, production | {"pin": pin}

    monkeypatch.setattr(promotion, "read", read)
    monkeypatch.setattr(settings_check, "launcher", lambda *_: tmp_path)
    monkeypatch.setattr(settings_check, "findings", lambda *_: [])
    return tmp_path


def promote(project: Path, check: bool = False, **other: Any) -> dict[str, Any]:
    params = {"source": "staging", "target": "production", "project": str(project), "override": [], "reason": ""}
    return promotion.promote(params | other, check)


def content(project: Path) -> dict[str, bytes]:
    return {str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*") if path.is_file()}


SPOILED: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    # What keeps the release from being promoted: a change of the surveys of staging and of production.
    "digest": lambda staging, _: staging["facts"].update(app2=staging["facts"]["app2"] | {"digest": "e" * 64}),
    "soak": lambda _, production: production.update(limits=LIMITS | {"soak_hours": 72}),
    "health": lambda staging, _: staging["facts"]["edge1"]["edge"].update(maintenance="The database moves"),
    "errors": lambda staging, _: staging["facts"]["app1"].update(requests={"total": 500, "failed": 2}),
    "schema": lambda _, production: production.update(schema={"applied": {"9001": "contract"}}),
    "settings": lambda _, production: production["variables"]["app1"]["atlas_settings"].update(unknown=1),
    "freeze": lambda _, production: production.update(
        freeze_windows=[{"reason": "year end", "from": "2020-01-01", "to": "2099-02-01", "time_zone": "UTC"}]
    ),
}


@pytest.mark.parametrize("gate", SPOILED)
def test_each_gate_stops_a_whole_promotion_unless_it_is_overridden_by_its_name_with_a_reason_that_the_pin_keeps(
    project: Path, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    """All but the signature, without which no override helps: test_no_override_pins_what_no_host_would_take."""
    assert {*SPOILED, "signature"} == promotion_plan.GATES.keys()
    staging, production = promotion.read([], project)
    SPOILED[gate](staging, production)

    def refuses(_: Any, settings: dict[str, dict[str, Any]], *__: Any) -> list[str]:
        return [f"main.yml:3: {name}: is unknown (app1)" for name in settings["app1"]]

    monkeypatch.setattr(settings_check, "findings", refuses)
    monkeypatch.setattr(promotion, "read", lambda *_: (staging, production))
    before = content(project)
    others = [name for name in promotion_plan.GATES if name != gate]
    for given in ({}, {"override": [gate]}, {"override": others, "reason": "in a hurry"}):
        with pytest.raises(promotion.Refused, match=rf"\d\. ({gate}: |A gate is overridden with a reason)"):
            promote(project, **given)
    assert content(project) == before
    assert promote(project, override=[gate], reason="in a hurry")["pin"]["promoted"]["overridden"] == {
        gate: "in a hurry"
    }


def test_a_release_that_cannot_be_asked_about_the_settings_is_not_taken_to_accept_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Path:
        raise settings_check.CheckError("it carries no code for Python 3.12")

    monkeypatch.setattr(settings_check, "launcher", fails)
    with pytest.raises(
        promotion.Refused, match="1. settings: The release cannot be asked on this machine: it carries no"
    ):
        promote(project)


def test_a_promotion_writes_one_file_that_a_deploy_accepts_and_a_second_run_nothing(project: Path) -> None:
    before = content(project)
    assert promote(project, check=True)["changed"] and content(project) == before
    assert promote(project)["changed"]
    after = content(project)
    place = "inventories/production/group_vars/all/release.yml"
    assert after.keys() - before.keys() == {place} and {key: after[key] for key in before} == before
    pin = yaml.safe_load(after[place])["release_pin"]
    release_pin.check(pin)
    assert pin["promoted"]["from"] == "staging" and pin["promoted"]["in_service_hours"] == 48.0
    archive = release_pin.find(project / "dist", pin)
    release_pin.check_release(pin, "1.0", release.file_digest(archive), pin["signer"])
    assert not promote(project)["changed"] and content(project) == after


def test_what_is_refused_is_told_at_once_and_changes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "dist/atlas-1.0.tar.gz.sig").unlink()
    staging, production = promotion.read([], project)
    staging["facts"]["app2"]["requests"] = {"total": 500, "failed": 400}
    monkeypatch.setattr(promotion, "read", lambda *_: (staging, production))
    before = content(project)
    with pytest.raises(promotion.Refused) as refused:
        promote(project, override=["health"], reason="x")
    assert all(f"{gate}: " in str(refused.value) for gate in ("signature", "errors"))
    assert content(project) == before


def test_the_pin_keeps_what_was_overridden_and_why(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_check, "findings", lambda *_: ["main.yml:3: new_key: is missing (app1)"])
    with pytest.raises(promotion.Refused, match="new_key"):
        promote(project)
    pin = promote(project, override=["settings"], reason="added by hand")["pin"]
    assert pin["promoted"]["overridden"] == {"settings": "added by hand"}


def test_no_override_pins_what_no_host_would_take(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "dist/atlas-1.0.tar.gz.sig").unlink()
    before = content(project)
    with pytest.raises(promotion.Refused, match="without a good signature"):
        promote(project, override=["signature"], reason="x")
    staging, production = promotion.read([], project)
    staging["facts"] = {name: app(slot=None) for name in ("app1", "app2")}
    monkeypatch.setattr(promotion, "read", lambda *_: (staging, production))
    with pytest.raises(promotion.Refused, match="No release is in service in staging"):
        promote(project, override=["digest"], reason="x")
    assert content(project) == before


def test_a_file_is_pinned_in_a_lab_and_nowhere_else(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For rehearsals: what is wrong with it or with the settings is told all the same."""
    production, archive = promotion.read([], project)[1], project / "dist/atlas-1.0.tar.gz"
    given: dict[str, Any] = {"source": "", "release": str(archive)}
    monkeypatch.setattr(promotion, "read", lambda *_: [production | {"lab": False}])
    before = content(project)
    with pytest.raises(promotion.Refused, match="production is no lab"):
        promote(project, **given)
    monkeypatch.setattr(promotion, "read", lambda *_: [production | {"lab": True}])
    monkeypatch.setattr(settings_check, "findings", lambda *_: ["main.yml:3: new_key: is missing (app1)"])
    with pytest.raises(promotion.Refused, match="1. settings: main.yml:3: new_key"):
        promote(project, **given)
    assert content(project) == before
    monkeypatch.setattr(settings_check, "findings", lambda *_: [])
    # A lab has the environment's own pin by link, which is not its to change.
    real, place = project / "real.yml", project / "inventories/production" / release_pin.PLACE
    real.write_text("release_pin: {}\n")
    place.symlink_to(real)
    assert promote(project, **given)["pin"]["digest"] == release.file_digest(archive)
    assert real.read_text() == "release_pin: {}\n" and not place.is_symlink()
    with pytest.raises(promotion.Refused, match="Nothing was changed. .*ansible.cfg"):
        promote(project, source="", release=str(PROJECT / "ansible.cfg"))


def test_an_archive_that_a_host_altered_is_thrown_away(project: Path) -> None:
    digest = release.file_digest(project / "dist/atlas-1.0.tar.gz")
    fetched = project / "dist/pinned" / f"{release.release_id('1.0', digest)}.tar.gz"
    fetched.parent.mkdir()
    fetched.write_bytes(b"something else")
    signature = fetched.with_name(f"{fetched.name}.sig")
    signature.write_text("signature")
    with pytest.raises(promotion.Refused, match="Do not trust that host"):
        promote(project)
    assert not fetched.exists() and not signature.exists(), "it would never be fetched again"


# --- surveys -----------------------------------------------------------------------------------------------------------


def test_secrets_are_masked_wherever_they_are_copied_to() -> None:
    token, short = "atl_" + "x" * 43, "operator"
    variables = {
        "a": f"prefix {token} suffix",
        "b": [{"name": short, "sha": hashlib.sha256(token.encode()).hexdigest()}],
        "atlas_credentials": {"x": "y"},
        "c": 5,
    }
    shown = json.dumps(survey.masked(variables, [[{"name": short, "token": token}]], "key"))
    assert token not in shown and variables["b"][0]["sha"] not in shown  # type: ignore[index]
    assert json.loads(shown)["b"][0]["name"] == short and json.loads(shown)["c"] == 5
    assert set(json.loads(shown)["atlas_credentials"]) == {"secret"}
    assert survey.masked(variables, [token], "other") != survey.masked(variables, [token], "key")


def test_a_private_key_is_masked_wherever_it_comes_from() -> None:
    """The certificate of the edges need not be in the vault (haproxy_tls_pem: docs/how-to/tls.md)."""
    one, other = (f"-----BEGIN {kind}PRIVATE KEY-----\n{'a' * 64}\n" for kind in ("", "EC "))
    first, second = (survey.masked({"haproxy_tls_pem": pem}, [], "key") for pem in (one, other))
    assert set(first["haproxy_tls_pem"]) == {"secret"} and first != second


def test_two_environments_are_compared_each_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PROJECT / "inventories", tmp_path / "inventories", symlinks=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [key for key in os.environ if key.startswith("ATLAS_VAULT")]:
        monkeypatch.delenv(name)
    for name in ("staging", "production"):
        password = tmp_path / "home/.config/atlas/vault" / name
        password.parent.mkdir(parents=True, exist_ok=True)
        password.write_text(random_password() + "\n")
        password.chmod(0o600)
        encrypt_vault(tmp_path / "inventories" / name / "group_vars/all/vault.yml", name, password)
    # The inventory of ansible.cfg (here: of the environment) has a vault as well, which this user cannot open, and need not.
    encrypt_vault(tmp_path / "inventories/development/group_vars/all/vault.yml", "development", password)
    monkeypatch.setenv("ANSIBLE_INVENTORY", str(tmp_path / "inventories/development"))
    # Only production has it: read together with staging it would be in both.
    with (tmp_path / "inventories/production/group_vars/app/main.yml").open("a") as file:
        file.write("  user_agent: of-production-alone\n")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/config_diff.yml", "-vvv"]
    for key, name in (("a", "staging"), ("b", "production")):
        command += ["-e", f"{key}={tmp_path / 'inventories' / name}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {tuple(line.split()[:3]) for line in done.stdout.splitlines()}
    assert ("atlas_settings.user_agent", "-", "of-production-alone") in rows
    assert ("deploy_strategy", "rolling", "blue_green") in rows and ("hosts", "2", "3") in rows
    assert ("atlas_database_password", "secret", "different") in rows
    for name in ("staging", "production"):
        vault = tmp_path / "inventories" / name / "group_vars/all/vault.yml"
        tool = [str(Path(sys.executable).with_name("ansible-vault")), "view", str(vault), "--vault-id"]
        password = tmp_path / "home/.config/atlas/vault" / name
        view = [*tool, f"{name}@{password}"]
        values = yaml.safe_load(subprocess.run(view, capture_output=True, text=True, check=True).stdout)
        assert values.keys() == generate().keys()
        secrets = secret_strings(values)
        assert len(secrets) >= 3
        for text in secrets:
            assert text not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "playbook", "command"),
    [
        ("inventories/production", "promote.yml", "-e from=staging -e to=production"),
        ("inventories/production/hosts.yml", "promote.yml", "-e from=staging -e to=production"),
        ("localhost,", "config_diff.yml", "-e a=staging -e b=production"),
    ],
)
def test_they_take_no_inventory_and_say_how_they_are_told_which(given: str, playbook: str, command: str) -> None:
    tool = str(Path(sys.executable).with_name("ansible-playbook"))
    words = [tool, "-i", given, f"playbooks/{playbook}"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 4 and said.count("ERROR") == 1, said
    assert f"{playbook} takes no inventory" in said and f"ansible-playbook playbooks/{playbook} {command}\n" in said, (
        said
    )
