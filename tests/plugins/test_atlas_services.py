"""Services that stop for a while and come back, without the slot in service being forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import atlas_services
import pytest
from ansible.module_utils.atlas_host import Done, Gate, Host, HostError, units

GATES: list[Gate] = []


class Systemd:
    """Keeps which units are active."""

    def __init__(self, boot: Path) -> None:
        self.boot = boot
        self.active = {*units("blue"), *units("green")}

    def __call__(self, argv: list[str], **_: Any) -> Done:
        verb, names = argv[1], {name for name in argv if name.endswith(".service")}
        if verb == "show":
            state = {name: "active" if name in self.active else "inactive" for name in names}
            return Done(
                0, "\n\n".join(f"Id={name}\nActiveState={value}\nNRestarts=0" for name, value in state.items()), ""
            )
        for target in {name for name in argv if name.endswith(".target") and verb == "disable"}:
            (self.boot / target).unlink()
        self.active = self.active - names if verb == "stop" else self.active | names
        return Done(0, "", "")


class Waiting(Host):
    """A host whose gate opens at once; remembers the gates."""

    def wait_healthy(self, gate: Gate, *_: Any, **__: Any) -> float:
        GATES.append(gate)
        return 0.0


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Deployment 7 in service in blue; green is still warm."""
    GATES.clear()
    for name in ("opt/deployments/7", "opt/slots", "state", "boot"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "opt/deployments/7/deployment.json").write_text(json.dumps({"release": "0.1.0-a"}))
    (tmp_path / "opt/slots/blue").symlink_to("../deployments/7")
    (tmp_path / "boot/atlas@blue.target").symlink_to("/etc/systemd/system/atlas@.target")
    return Waiting(tmp_path / "opt", tmp_path / "state", tmp_path / "boot", Systemd(tmp_path / "boot"))


def apply(host: Host, state: str, check: bool = False) -> bool:
    return bool(atlas_services.apply({"state": state, "host": "app1", "timeout": 1}, host, check)["changed"])


def test_both_slots_stop_and_the_one_in_service_comes_back(host: Host) -> None:
    assert apply(host, "stopped", check=True) and host.active("blue"), "check mode changed something"
    assert apply(host, "stopped")
    assert host.active("blue") == host.active("green") == [] and host.in_service() == "blue"
    assert not apply(host, "stopped")
    assert apply(host, "started", check=True) and not host.active("blue")
    assert apply(host, "started")
    assert len(host.active("blue")) == 4 and host.active("green") == []
    (gate,) = GATES
    assert (gate.slot, gate.deployment, gate.release, gate.host) == ("blue", 7, "0.1.0-a", "app1")


def test_services_that_boot_has_started_are_waited_for_too(host: Host) -> None:
    assert not apply(host, "started")
    assert len(GATES) == 1


def test_a_retired_host_stays_away_after_a_boot_too(host: Host) -> None:
    (host.state / "warm-green.json").write_text('{"until": 9999999999}')
    assert apply(host, "retired", check=True) and host.in_service() == "blue", "check mode changed something"
    assert apply(host, "retired")
    assert host.in_service() is None and host.active("blue") == host.active("green") == []
    assert host.warm_until("green") is None, "nobody has to stop it later"
    assert host.journal()[-1]["event"] == "retired" and host.slots()["blue"] == 7
    assert not apply(host, "retired")


def test_a_host_without_a_deployment_is_named(host: Host) -> None:
    (host.boot / "atlas@blue.target").unlink()
    with pytest.raises(HostError, match="No deployment is in service"):
        apply(host, "stopped")
