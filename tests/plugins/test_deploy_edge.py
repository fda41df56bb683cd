"""deploy_edge and deploy_watch against real HAProxy of both Debians, and what they do where there is none."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deploy_edge
import deploy_watch
import pytest
from ansible.module_utils import lease
from ansible.module_utils.atlas_host import Answer, Gate, Host, HostError
from ansible.module_utils.haproxy_runtime import Balancer, RuntimeFailure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.plugins import test_haproxy_runtime as real
from tests.plugins.test_haproxy_runtime import BLUE, Edge, until

pytestmark = pytest.mark.timeout(900)  # the first run makes the images

edge = real.edge
GREEN = ["be_green/app1", "be_green/app2"]
MIXED_NEW = ["be_mixed/app1-green", "be_mixed/app2-green"]
MIXED_OLD = ["be_mixed/app1-blue", "be_mixed/app2-blue"]
LIMITS = {"samples": 20, "error_percent": 1.0, "slow_percent": 10.0, "slow_ms": 100, "job_percent": 10.0}


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of the deploy d1, on a host of its own."""
    monkeypatch.setattr(lease, "DIRECTORY", tmp_path / "state")
    wish = {"state": "acquired", "deploy": "d1", "holder": "me", "process": "p", "reason": "", "seconds": 60}
    lease.apply(wish | {"replaces": ""}, lease.DIRECTORY, False)
    return lease.DIRECTORY


def order(edge: Edge, state: str, check: bool = False, **other: Any) -> dict[str, Any]:
    """Run the module deploy_edge as a deploy does."""
    params: dict[str, Any] = {
        "state": state, "deploy": "d1", "lease_seconds": 3600, "servers": [], "old_servers": [], "since": {},
        "missing": [], "done": [], "healthy_for": 0.0, "number": 5, "backend": None, "require_up": 2, "not_after": 0.0, "timeout": 10.0,
        "map_path": edge.map,
    } | other  # fmt: skip
    return deploy_edge.run(params, deploy_edge.Edge(params, edge.balancer, Host(state=lease.DIRECTORY), check))


def journal() -> list[dict[str, Any]]:
    return Host(state=lease.DIRECTORY).journal()


def start_green(edge: Edge) -> None:
    for host in real.ADDRESSES:
        edge.start(host, "green")


@contextmanager
def traffic(edge: Edge) -> Iterator[list[tuple[int, str | None]]]:
    """Requests one after the other meanwhile; collects status and slot of each."""
    answers: list[tuple[int, str | None]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(edge.get())
            time.sleep(0.002)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def test_a_deploy_is_prepared_and_switched_and_recorded(edge: Edge) -> None:
    with pytest.raises(RuntimeFailure, match="no passed health check"):
        order(edge, "prepared", servers=GREEN, timeout=0.5)
    start_green(edge)
    edge.balancer.maint(["be_blue/app2"])
    result = order(edge, "prepared", servers=GREEN, old_servers=BLUE, missing=["app9"])
    assert result["old"]["requests"] == 0
    assert order(edge, "switched", backend="be_green")["milliseconds"] < 100
    assert edge.get() == (200, "green")
    assert not order(edge, "switched", backend="be_green")["changed"]
    events = [(entry["event"], entry["outcome"], entry["phase"]) for entry in journal()]
    assert events[0] == ("prepared", "failed", "switch") and events[2] == ("switched", "ok", "switch")


def test_hosts_that_take_no_part_are_kept_out_of_every_backend(edge: Edge) -> None:
    start_green(edge)
    order(edge, "prepared", servers=["be_green/app1"], missing=["app2"])
    servers = edge.balancer.servers()
    assert {servers[name].status for name in ("be_blue/app2", "be_green/app2", "be_mixed/app2-green")} == {"MAINT"}
    assert servers["be_blue/app1"].up and servers["be_green/app1"].up
    assert order(edge, "settled", missing=["app2"])["changed"]
    owed = json.loads((lease.DIRECTORY / "owed.json").read_text())
    assert owed["app2"]["deployment"] == 5
    assert not order(edge, "settled", missing=["app2"])["changed"]
    order(edge, "settled", done=["app2"])
    assert json.loads((lease.DIRECTORY / "owed.json").read_text()) == {}


def test_a_host_may_be_named_like_a_slot() -> None:
    known = deploy_edge.Edge({}, Balancer("none"), Host(), True)
    names = ("be_blue/web-blue", "be_green/web-blue", "be_mixed/web-blue-blue", "be_mixed/web-blue-green")
    assert {known._host(name) for name in names} == {"web-blue"}


def test_a_host_that_was_healthy_for_a_while_is_back_without_another_wait(edge: Edge) -> None:
    order(edge, "drained", servers=BLUE[:1])
    assert edge.balancer.servers()[BLUE[0]].status == "DRAIN"
    edge.services[BLUE[0]].kill()
    until(lambda: edge.balancer.servers()[BLUE[0]].check != "L7OK")
    with pytest.raises(RuntimeFailure, match="no passed health check"):
        order(edge, "ready", servers=BLUE[:1], healthy_for=3.0, timeout=0.5)
    edge.start("app1", "blue")
    until(lambda: edge.balancer.servers()[BLUE[0]].check == "L7OK")
    began = time.monotonic()
    order(edge, "ready", servers=BLUE[:1], healthy_for=3.0)
    assert time.monotonic() - began < 0.5 and edge.balancer.servers()[BLUE[0]].up
    order(edge, "drained", servers=BLUE[:1])
    began = time.monotonic()
    order(edge, "ready", servers=BLUE[:1])
    assert time.monotonic() - began > 1.4, "without that it waits for a check made from now on"


def test_an_order_that_comes_late_is_not_obeyed(edge: Edge) -> None:
    start_green(edge)
    order(edge, "prepared", servers=GREEN)
    with pytest.raises(RuntimeFailure, match="too late"):
        order(edge, "switched", backend="be_green", not_after=time.time() - 1)
    assert edge.get() == (200, "blue") and Path(edge.map).read_text() == "active be_blue\n"


def test_traffic_goes_back_to_servers_that_were_drained_for_good_already(edge: Edge) -> None:
    """A deploy that keeps no warm slot was killed after the last requests of the old one, before that was stopped."""
    start_green(edge)
    order(edge, "prepared", servers=GREEN)
    order(edge, "switched", backend="be_green")
    order(edge, "drained", servers=BLUE)
    with pytest.raises(RuntimeFailure, match="be_blue needs 1 server"):
        order(edge, "switched", backend="be_blue", require_up=1)
    edge.services[BLUE[1]].kill()
    with traffic(edge) as answers:
        order(edge, "switched", backend="be_blue", servers=BLUE, require_up=1, timeout=3.0)
        until(lambda: answers[-1:] == [(200, "blue")])
    assert {status for status, _ in answers} == {200}
    assert edge.balancer.servers()[BLUE[0]].up and not edge.balancer.servers()[BLUE[1]].up


def test_without_the_lock_nothing_is_done(edge: Edge) -> None:
    with pytest.raises(lease.LeaseError):
        order(edge, "drained", deploy="d2", servers=BLUE[:1])
    assert edge.balancer.servers()[BLUE[0]].up


def test_a_check_changes_nothing(edge: Edge) -> None:
    start_green(edge)
    before = edge.balancer.servers()
    for state in ("prepared", "drained", "switched"):
        order(edge, state, check=True, servers=BLUE, missing=["app2"], backend="be_green")
    until(lambda: edge.balancer.servers().keys() == before.keys())
    assert edge.get() == (200, "blue") and edge.balancer.servers()[BLUE[1]].up and journal() == []


# Watching


class Failing(real.Handler):
    """Well as far as health checks see it, and bad at every fourth request."""

    count = 0

    def do_GET(self) -> None:
        """Fail some."""
        type(self).count += self.path != "/readyz"
        if self.path == "/readyz" or self.count % 4:
            super().do_GET()
            return
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()


def watching(edge: Edge, **other: Any) -> dict[str, Any]:
    """Watch as a deploy does, on an edge alone."""
    params: dict[str, Any] = {
        "seconds": 2.0, "servers": MIXED_NEW, "old_servers": MIXED_OLD, "old": {}, "since": {}, "weight": 25,
        "back_to": "be_blue", "drain_on_failure": False, "limits": LIMITS, "map_path": edge.map,
    } | other  # fmt: skip
    result = deploy_watch.watch(params, None, deploy_watch.Edge(params, edge.balancer))
    return dict(result["edge"])


def test_the_canary_gets_its_share_in_memory_alone(edge: Edge) -> None:
    start_green(edge)
    order(edge, "prepared", servers=[*GREEN, *MIXED_NEW, *MIXED_OLD])
    with traffic(edge) as answers:
        seen = watching(edge)
        total = seen["new"]["requests"] + seen["old"]["requests"]
    assert not seen["withdrawn"] and total > 100
    for side in ("new", "old"):
        times = seen[side]["histogram"]
        assert times["+Inf"] == pytest.approx(seen[side]["requests"], abs=3) and times["2500"] > 0.9 * times["+Inf"]
    assert 0.2 < seen["new"]["requests"] / total < 0.3
    assert {status for status, _ in answers} == {200}
    assert edge.balancer.map_value(edge.map, "active") == "be_mixed"
    assert Path(edge.map).read_text() == "active be_blue\n", "what restarts HAProxy ends the trial"
    again = watching(edge, since=seen["since"], seconds=0.0)
    assert again["new"]["requests"] >= seen["new"]["requests"], "the next look goes on counting"


class Slow(real.Handler):
    """Answers everything right, and late."""

    def do_GET(self) -> None:
        """Take 0.3 s."""
        time.sleep(0.0 if self.path == "/readyz" else 0.3)
        super().do_GET()


def test_a_slow_release_is_told_by_haproxys_own_clock(edge: Edge) -> None:
    start_green(edge)
    for name in GREEN:
        edge.services[name].RequestHandlerClass = Slow
    order(edge, "prepared", servers=[*GREEN, *MIXED_NEW, *MIXED_OLD])
    with traffic(edge):
        seen = watching(edge, seconds=30.0)
    assert seen["withdrawn"] and seen["new"]["errors"] == 0
    assert seen["new"]["histogram"]["250"] == 0 < seen["new"]["histogram"]["500"]
    assert edge.get() == (200, "blue")


@pytest.mark.parametrize("trial", ["a share", "all of it", "one host"])
def test_an_edge_takes_traffic_back_at_once_from_a_release_that_fails(edge: Edge, trial: str) -> None:
    start_green(edge)
    for name in GREEN:
        edge.services[name].RequestHandlerClass = Failing
    order(edge, "prepared", servers=[*GREEN, *MIXED_NEW, *MIXED_OLD])
    if trial == "a share":
        arguments: dict[str, Any] = {}
    else:
        order(edge, "switched", backend="be_green")
        old = {"requests": 1000, "errors": 0, "histogram": {}}
        arguments = {"servers": GREEN, "old_servers": [], "old": old, "weight": 0}
        if trial == "one host":
            edge.services[GREEN[1]].RequestHandlerClass = real.Handler
            arguments |= {"servers": GREEN[:1], "old_servers": GREEN[1:], "back_to": "", "drain_on_failure": True}
    began = time.monotonic()
    with traffic(edge) as answers:
        seen = watching(edge, seconds=30.0, **arguments)
        assert time.monotonic() - began < 10, "a clear case does not take the whole time"
        time.sleep(0.3)
        answers.clear()
        until(lambda: len(answers) > 20)
        assert seen["withdrawn"] and seen["new"]["errors"] >= 2
        assert {status for status, _ in answers} == {200}
    if trial != "one host":
        assert {slot for _, slot in answers} == {"blue"}


# An app host


class Silent(Host):
    """A host whose services do as told."""

    restarted = False

    def look_after(self, *_: Any) -> None:
        """Fail once told so."""
        if self.restarted:
            raise HostError("atlas-core@green.service restarted after it had been healthy.", ["killed"])

    def show(self, names: Any) -> dict[str, dict[str, str]]:
        """Say that all is well."""
        return {name: {"ActiveState": "active", "MainPID": "7"} for name in names}


def test_an_app_host_tells_how_jobs_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = 'atlas_queue_deployment_events{deployment="5",event="finished"} 3'
    monkeypatch.setattr(deploy_watch, "get", lambda *_: Answer(200, {}, {}, metrics))
    monkeypatch.setattr(Gate, "fault", lambda *_: None)
    params = {"slot": "green", "number": 5, "release": "r", "host": "app1", "seconds": 0.0}
    app = deploy_watch.App(params, Silent(tmp_path, tmp_path))
    assert deploy_watch.watch(params, app, None)["jobs"] == {"5": [0.0, 3.0]}


def test_a_service_that_restarts_ends_the_watch_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_watch, "get", lambda *_: Answer(0, {}, {}))
    params = {"slot": "green", "number": 5, "release": "r", "host": "app1", "seconds": 30.0}
    host = Silent(tmp_path, tmp_path)
    app = deploy_watch.App(params, host)
    host.restarted = True
    with pytest.raises(HostError, match="atlas-core@green.service restarted") as error:
        deploy_watch.watch(params, app, None)
    assert error.value.log == ["killed"]


@pytest.mark.parametrize("looks", [2, 1000])
def test_only_a_fault_that_stays_ends_the_watch(looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = iter([("atlas-core@green.service", "/health shows no live heartbeat")] * looks)
    monkeypatch.setattr(deploy_watch, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(deploy_watch, "get", lambda *_: Answer(200, {}, {}))
    monkeypatch.setattr(Gate, "fault", lambda *_: next(late, None))
    monkeypatch.setattr(Silent, "log", lambda *_: ["said last"])
    params = {"slot": "green", "number": 5, "release": "r", "host": "app1", "seconds": 0.0}
    app = deploy_watch.App(params, Silent(tmp_path, tmp_path))
    if looks == 2:
        assert deploy_watch.watch(params, app, None)["jobs"] == {}
    else:
        with pytest.raises(HostError, match="no live heartbeat") as error:
            deploy_watch.watch(params, app, None)
        assert error.value.log == ["said last"]
