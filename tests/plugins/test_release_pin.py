"""Where the inventory pins a release, that one is deployed and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deploy
import pytest
import yaml
from ansible.module_utils import release, release_pin

from tests.plugins import releases


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """Two releases, of which 1.0.0 will be pinned and 1.1.0 is the newer one."""
    releases.make(tmp_path, "1.0.0")
    releases.make(tmp_path, "1.1.0")
    return tmp_path


def pin_of(dist: Path, **other: Any) -> dict[str, Any]:
    archive = dist / "atlas-1.0.0.tar.gz"
    signer = release.check_signature(archive, archive.with_name(archive.name + ".sig"), releases.signers(dist))
    return {"version": "1.0.0", "digest": release.file_digest(archive), "signer": signer} | other


def read(dist: Path, pin: dict[str, Any] | None, name: str = "") -> dict[str, Any]:
    return deploy.release_file(str(dist / name) if name else "", releases.signers(dist), str(dist), pin)


def test_the_pinned_release_is_found_though_a_newer_one_is_there(dist: Path) -> None:
    found = read(dist, pin_of(dist))
    assert (found["error"], found["version"]) == ("", "1.0.0")
    assert read(dist, None)["version"] == "1.1.0"


def test_another_release_is_refused_by_name(dist: Path) -> None:
    error = read(dist, pin_of(dist), "atlas-1.1.0.tar.gz")["error"]
    assert "1.1.0-" in error and release_pin.name(pin_of(dist)) in error and "release_pin_required" in error
    assert read(dist, None, "atlas-1.1.0.tar.gz")["error"] == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"digest": "0" * 64}, "1.0.0-000000000000 is not in"),
        ({"digest": "abc"}, "no usable digest"),
        ({"version": ""}, "no usable version"),
        ({"version": "1.0.1"}, "says that its version is 1.0.0"),
        ({"signer": "SHA256:" + "x" * 43}, "the inventory pins the signer SHA256:xxx"),
        ({"signer": "somebody", "digest": 7}, "no usable digest, signer"),
    ],
)
def test_a_pin_that_does_not_fit_stops_a_deploy(dist: Path, change: dict[str, Any], says: str) -> None:
    assert says in read(dist, pin_of(dist, **change))["error"]


def test_where_nothing_is_pinned_nothing_is_deployed(dist: Path) -> None:
    for name in ("", "atlas-1.0.0.tar.gz"):
        error = read(dist, {}, name)["error"]
        assert "pins no release" in error and "playbooks/promote.yml" in error


def test_a_pin_does_not_replace_the_signature(dist: Path) -> None:
    pin = pin_of(dist)
    (dist / "atlas-1.0.0.tar.gz.sig").unlink()
    assert "not signed" in read(dist, pin)["error"]


def test_what_is_written_is_read_again(dist: Path) -> None:
    pin = pin_of(dist, promoted={"from": "staging", "overridden": {"soak": "a fix: it's urgent"}})
    assert yaml.safe_load(release_pin.text(pin)) == {"release_pin": pin}
