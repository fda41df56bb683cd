"""One release, built once, goes from development to staging to production, in three small labs. Takes a few minutes.

    .venv/bin/pytest -x tests/promotion

The labs come from a copy of `inventories/` in which each environment is one host. Part of `make test-full`.
Each gate by itself: tests/plugins/test_promotion.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import release
from labtest import PROJECT, Lab, poll, properties, slot_in_service
from prooftest import QUICK, Step, play, release_id

from tests.faults import bad_releases

INVENTORIES = PROJECT / ".cache/chain/inventories"
ENVIRONMENTS = ("development", "staging", "production")
HOST = "host1"
"""Carries everything of its environment."""
PIN = "group_vars/all/release.yml"
pytestmark = pytest.mark.timeout(3600)
Labs = dict[str, Lab]


@pytest.fixture(scope="module")
def labs() -> Iterator[Labs]:
    """Three provisioned labs, of which two want a pin, as the real environments do; they go, whatever happens."""
    shutil.rmtree(INVENTORIES.parent, ignore_errors=True)
    shutil.copytree(PROJECT / "inventories", INVENTORIES, symlinks=True)
    hosts: dict[str, Any] = {"hosts": {HOST: {"debian_release": "bookworm"}}}
    members: dict[str, dict[str, Any]] = {"edge": {HOST: {}}, "app": {HOST: {}}, "backup": {HOST: {}}, "database": {}}
    hosts["children"] = {group: {"hosts": of} for group, of in members.items()}
    found: Labs = {}
    try:
        for environment in ENVIRONMENTS:
            name = f"test-chain-{environment}"
            (INVENTORIES / environment / "hosts.yml").write_text(yaml.safe_dump({"all": hosts}))
            given = {"lab_environment": environment, "lab_name": name, "lab_inventories": str(INVENTORIES)}
            command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "playbooks/lab.yml"]
            subprocess.run([*command, "-e", json.dumps(given)], cwd=PROJECT, check=True)
            found[environment] = lab = Lab.open(name)
            # After the lab's own file, which asks for no pin. On one host with SQLite, all environments deploy in one way.
            here = {**QUICK, "deploy_strategy": "blue_green", "release_pin_required": environment != "development"}
            (lab.inventory / "host_vars" / HOST / "zzz-chain.yml").write_text(yaml.safe_dump(here))
        with ThreadPoolExecutor() as pool:
            for step in pool.map(lambda lab: play(lab, "site"), found.values()):
                step.succeeded()
        yield found
    finally:
        for environment in ENVIRONMENTS:
            subprocess.run(
                ["make", "down", f"LAB=test-chain-{environment}"], cwd=PROJECT, check=True, capture_output=True
            )


@pytest.fixture(scope="module")
def archive(labs: Labs) -> Path:
    """The release of these sources, built once, and in service in development."""
    subprocess.run(["bin/build-release"], cwd=PROJECT, check=True, capture_output=True)
    built = max((PROJECT / "dist").glob("atlas-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    play(labs["development"], "deploy", "-e", f"release={built}").succeeded()
    return built


def promote(labs: Labs, source: str, target: str, *arguments: str) -> Step:
    """Promote from one lab to another; no inventory is given, because both are read in processes of their own."""
    places = ("-e", f"from={labs[source].inventory}", "-e", f"to={labs[target].inventory}")
    began = time.time()
    run = labs[target].run("ansible-playbook", "playbooks/promote.yml", *places, *arguments, timeout=900)
    return Step(f"promote {source} {target}", began, time.time(), run)


def use(lab: Lab, requests: int) -> None:
    """Send *requests* to the service, each of which has to be answered."""
    assert {lab.http("GET", "/v1/documents").status for _ in range(requests)} == {200}


def pin(lab: Lab) -> dict[str, Any]:
    """Return the pin of *lab*; {} for none."""
    file = lab.inventory / PIN
    return dict(yaml.safe_load(file.read_text())["release_pin"]) if file.exists() else {}


def in_service(lab: Lab) -> set[tuple[str, str]]:
    """Return the releases that app hosts of *lab* have in service: the ID, and the digest of the archive that they keep."""
    found = set()
    for host in lab.group("app"):
        content = json.loads(lab.ssh(host, f"cat /opt/atlas/slots/{slot_in_service(lab, host)}/deployment.json").stdout)
        kept = lab.ssh(host, f"sha256sum /opt/atlas/archives/{content['release']}.tar.gz").stdout
        found.add((str(content["release"]), kept.split()[0]))
    return found


def test_no_environment_is_skipped(labs: Labs, archive: Path) -> None:
    use(labs["development"], 1)
    everything = ("-e", "override=soak,errors,health,schema,settings", "-e", "reason='in a hurry'")
    promote(labs, "development", "production", *everything).refused("from staging alone")
    assert pin(labs["production"]) == {}


def test_development_gives_its_release_to_staging_which_takes_no_other(labs: Labs, archive: Path) -> None:
    staging = labs["staging"]
    play(staging, "deploy", "-e", f"release={archive}").refused("The inventory pins no release")
    promote(labs, "development", "staging", "-e", "deploy=true").succeeded()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert in_service(staging) == {(release_id(archive), digest)} and pin(staging)["digest"] == digest
    play(staging, "deploy", "-e", f"release={bad_releases.build('good')}").refused(release_id(archive))
    assert in_service(staging) == {(release_id(archive), digest)}


def test_staging_gives_the_same_bytes_to_production_when_the_gates_let_it(labs: Labs, archive: Path) -> None:
    staging, production = labs["staging"], labs["production"]
    use(staging, 1)
    promote(labs, "staging", "production", "-e", "deploy=true").refused("soak: ", "24 h are required", "errors: ")
    assert pin(production) == {}
    use(staging, 120)
    reason = "the login is broken"
    said = promote(
        labs, "staging", "production", "-e", "override=soak", "-e", f"reason='{reason}'", "-e", "deploy=true"
    ).succeeded()
    assert "overridden    soak" in said.output
    wanted = {(release_id(archive), hashlib.sha256(archive.read_bytes()).hexdigest())}
    for environment, lab in labs.items():
        assert in_service(lab) == wanted, environment
        assert lab.http("GET", "/v1/documents").headers["x-atlas-release"] == release_id(archive), environment
    promoted = pin(production)["promoted"]
    assert promoted["from"] == "staging" and promoted["overridden"] == {"soak": reason}
    journal = production.ssh(production.group("app")[0], "cat /var/lib/atlas-deploy/journal.jsonl").stdout
    assert reason in journal


def test_neither_a_freeze_nor_a_foreign_key_lets_it_pass(labs: Labs, archive: Path, tmp_path: Path) -> None:
    """Both read from where they are: the target's inventory, and the bytes that serve in the source."""
    production = labs["production"]
    before = pin(production)
    frozen = {"reason": "year end", "from": "2020-01-01", "to": "2099-01-01", "time_zone": "UTC"}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    foreign = f"{release.PRINCIPAL} {(tmp_path / 'key.pub').read_text()}"
    file = production.inventory / "host_vars" / HOST / "zzzz-gates.yml"
    file.write_text(yaml.safe_dump({"deploy_freeze_windows": [frozen], "deploy_allowed_signers": foreign}))
    words = ("-e", "override=soak,freeze,signature", "-e", "reason='in a hurry'")
    try:
        promote(labs, "staging", "production").refused(
            "soak: ", "freeze: ", "year end", "signature: ", "deploy_allowed_signers does not allow"
        )
        promote(labs, "staging", "production", *words).refused("No override pins a release without a good signature")
    finally:
        file.unlink()
    assert pin(production) == before


def test_promoted_again_nothing_changes(labs: Labs, archive: Path) -> None:
    said = promote(
        labs, "staging", "production", "-e", "override=soak", "-e", "reason='the login is broken'"
    ).succeeded()
    assert "pins it already" in said.output


def test_a_service_that_was_killed_during_the_soak_stops_a_promotion_although_all_is_well_again(labs: Labs) -> None:
    staging = labs["staging"]
    unit = f"atlas-services@{slot_in_service(staging, HOST)}.service"
    before = properties(staging, HOST, unit)["MainPID"]
    staging.ssh(HOST, f"systemctl kill --kill-whom=all --signal=KILL {unit}")

    def is_up() -> bool:
        now = properties(staging, HOST, unit)
        return now["ActiveState"] == "active" and now["MainPID"] not in ("0", before)

    poll(is_up, 60, "systemd starts it again")
    staging.ssh(HOST, f"systemctl reset-failed {unit}")
    assert properties(staging, HOST, unit)["NRestarts"] == "0", "the counter of the unit knows of nothing"
    words = ("-e", "reason='it was me'", "-e")
    promote(labs, "staging", "production", *words, "override=soak").refused(
        f"health: {HOST}: atlas-services restarted by itself once"
    )
    said = promote(labs, "staging", "production", *words, "override=soak,health").succeeded()
    assert "pins it already" in said.output
