"""haproxy_runtime against real HAProxy of both Debians, with the role's own configuration, on loopback."""

from __future__ import annotations

import datetime
import html
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ansible.module_utils import lab_tls
from ansible.module_utils.atlas_host import Host
from ansible.module_utils.haproxy_runtime import (
    Balancer,
    CertificateFailure,
    RuntimeFailure,
    RuntimeSocket,
    Server,
    entries,
    exchange_certificate,
    inspect_certificate,
    is_already,
    parse_old_workers,
    parse_servers,
    presented,
    with_entry,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from haproxy_maintenance import apply as maintain
from haproxy_maintenance import wanted

from tests.templates.checks import CODENAMES, Container
from tests.templates.render import PROJECT, render

pytestmark = pytest.mark.timeout(900)  # the first run makes the images

ADDRESSES = {"app1": "127.0.0.1", "app2": "127.0.0.2"}
BLUE = ["be_blue/app1", "be_blue/app2"]


class Service(ThreadingHTTPServer):
    """One slot on one host: /readyz says whether it is ready, /slow answers when it is released."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, slot: str, port: int) -> None:
        self.slot, self.ready, self.release, self.arrived = slot, True, threading.Event(), threading.Event()
        self.asked = 0
        super().__init__((ADDRESSES[host], port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def kill(self) -> None:
        """Stop listening, as a service that died."""
        self.release.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers for a Service."""

    def do_GET(self) -> None:
        """Answer health checks and requests."""
        service = self.server
        assert isinstance(service, Service)
        service.asked += self.path == "/"
        if self.path == "/slow":
            service.arrived.set()
            service.release.wait(30)
        self.send_response(503 if self.path == "/readyz" and not service.ready else 200)
        self.send_header("X-Slot", service.slot)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@dataclass
class Edge:
    """A running HAProxy and the services behind it."""

    container: Container
    directory: Path
    port: int
    slots: dict[str, int]
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def balancer(self) -> Balancer:
        sockets = (str(self.directory / "admin.sock"), str(self.directory / "master.sock"))
        return Balancer(*sockets, kept_out=str(self.directory / "kept-out.state"))

    @property
    def map(self) -> str:
        return str(self.directory / "slot.map")

    def start(self, host: str, slot: str) -> Service:
        """Start the service of a slot."""
        self.services[f"be_{slot}/{host}"] = service = Service(host, slot, self.slots[slot])
        return service

    def get(self, path: str = "/", seconds: float = 10) -> tuple[int, str | None]:
        """Status and slot of one request through the balancer, over a fresh connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.getheader("X-Slot")
        finally:
            connection.close()

    def reload(self) -> None:
        """Reload as the unit does."""
        done = self.container.shell(f"python3 {self.directory}/reload.py 1")
        assert done.returncode == 0, done.stderr

    def restart(self) -> None:
        """Lose the process, and start as the unit does."""
        self.container.__exit__()
        self.container.__enter__()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition; a failing question counts as no."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (RuntimeFailure, OSError, IndexError):
            pass
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, on any address."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("0.0.0.0", 0))  # noqa: S104 - only to find a port that is free everywhere
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


@pytest.fixture(params=CODENAMES)
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """HAProxy with both services of blue up and green stopped."""
    with running(request.param, Path(tmp_path_factory.mktemp("haproxy"))) as edge:
        yield edge


@pytest.fixture(params=CODENAMES)
def encrypted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The same with HTTPS on its port; the authority and the first certificate are in tls/."""
    directory = Path(tmp_path_factory.mktemp("haproxy"))
    lab_tls.ensure(directory / "tls", "check", "127.0.0.0/8", {"edge": "127.0.0.1"})
    with running(request.param, directory, haproxy_tls=True) as edge:
        yield edge


@contextmanager
def running(codename: str, directory: Path, haproxy_tls: bool = False) -> Iterator[Edge]:
    """HAProxy with the role's configuration in *directory*, and the services of blue."""
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o777 if parent == directory else 0o755)
    port, plain, stats, blue, green = free_ports(5)
    slots = {"blue": blue, "green": green}
    variables: dict[str, object] = {
        "haproxy_tls": haproxy_tls,
        "haproxy_tls_port": port,
        "haproxy_servers": [{"name": name, "address": address} for name, address in ADDRESSES.items()],
        "haproxy_slot_ports": slots,
        "haproxy_bind_port": plain if haproxy_tls else port,
        "haproxy_stats_port": stats,
    }

    def place(template: str, name: str) -> None:
        text = render("haproxy", template, codename, **variables)
        for folder in ("/run/haproxy", "/etc/haproxy/errors", "/etc/haproxy"):
            text = text.replace(f"{folder}/", f"{directory}/")
        (directory / name).write_text(text)

    place("haproxy.cfg.j2", "haproxy.cfg")
    place("503.http.j2", "atlas-503.http")
    place("maintenance.html.j2", "maintenance.html")
    (directory / "maintenance.map").touch()
    place("reload.py.j2", "reload.py")
    place("haproxy.service.conf.j2", "haproxy.service.conf")
    (directory / "slot.map").write_text("active be_blue\n")
    (directory / "kept-out.state").write_text("1\n")
    (before,) = re.findall(r"^ExecStartPre=(.*)$", (directory / "haproxy.service.conf").read_text(), re.MULTILINE)
    start = f"{before} && exec haproxy -W -f {directory}/haproxy.cfg -S {directory}/master.sock"
    command = ("sh", "-c", start)
    with Container(codename, "--network=host", "--volume", f"{directory}:{directory}", command=command) as container:
        edge = Edge(container, directory, port, slots)
        try:
            for host in ADDRESSES:
                edge.start(host, "blue")
            until(lambda: all(edge.balancer.servers(BLUE)[name].up for name in BLUE))
            until(lambda: edge.balancer.servers()["be_green/app1"].status == "DOWN")
            yield edge
        finally:
            for service in edge.services.values():
                service.kill()


def slow_request(edge: Edge) -> tuple[threading.Thread, list[int]]:
    """A request in flight at blue on app1 (app2 is out), and where its status will be."""
    edge.balancer.maint(["be_blue/app2"])
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(edge.get("/slow", 30)[0]), daemon=True)
    thread.start()
    assert edge.services["be_blue/app1"].arrived.wait(10)
    return thread, statuses


def test_drained_waits_for_requests_in_flight(edge: Edge) -> None:
    thread, statuses = slow_request(edge)
    threading.Timer(0.5, edge.services["be_blue/app1"].release.set).start()
    begin = time.monotonic()
    after = edge.balancer.drained(["be_blue/app1"], 10)
    assert time.monotonic() - begin >= 0.4
    thread.join(10)
    assert statuses == [200]
    assert after["be_blue/app1"].status == "MAINT" and after["be_blue/app1"].sessions == 0
    assert edge.get()[0] == 503  # nothing is left, and the balancer says so
    assert is_already("drained", edge.balancer.servers(["be_blue/app1"]))


def test_drained_names_who_outlives_the_deadline(edge: Edge) -> None:
    thread, statuses = slow_request(edge)
    begin = time.monotonic()
    with pytest.raises(RuntimeFailure, match=r"not drained within 0.5 s: be_blue/app1 is DRAIN \(L7OK, 1 in flight\)"):
        edge.balancer.drained(["be_blue/app1", "be_blue/app2"], 0.5)
    assert time.monotonic() - begin < 3
    assert edge.balancer.servers()["be_blue/app1"].status == "DRAIN"
    edge.services["be_blue/app1"].release.set()
    thread.join(10)
    assert statuses == [200]


def test_drained_asks_the_process_from_before_a_reload(edge: Edge) -> None:
    thread, statuses = slow_request(edge)
    edge.reload()
    assert edge.balancer.servers()["be_blue/app1"].sessions == 0, "the new process knows nothing of that request"
    with pytest.raises(RuntimeFailure, match="be_blue/app1 has 1 in flight in a process from before a reload"):
        edge.balancer.drained(["be_blue/app1"], 0.5)
    edge.services["be_blue/app1"].release.set()
    edge.balancer.drained(["be_blue/app1"], 10)
    thread.join(10)
    assert statuses == [200]


def test_nobody_is_drained_where_too_few_others_serve(edge: Edge) -> None:
    call = {"state": "drained", "servers": ["be_blue/app1"], "keep_up": 1, "timeout": 5}
    edge.balancer.maint(["be_blue/app2"])
    assert "1 other server(s) of be_blue have to be UP meanwhile, but be_blue/app2 is MAINT" in str(
        ansible(edge, call)["msg"]
    )
    assert edge.balancer.servers()["be_blue/app1"].up
    edge.balancer.ready(["be_blue/app2"], 10)
    assert ansible(edge, call)["changed"] is True
    assert ansible(edge, call)["changed"] is False, "one that is out already needs nobody"
    assert edge.get() == (200, "blue")


def test_a_reload_keeps_drains(edge: Edge) -> None:
    edge.balancer.warm(["be_blue/app1"], 10)
    edge.reload()
    assert edge.balancer.servers()["be_blue/app1"].status == "DRAIN"


def test_who_is_out_stays_out_when_haproxy_starts_again(edge: Edge) -> None:
    """It lacks what is in service, and may well pass every health check."""
    edge.start("app1", "green")
    edge.start("app2", "green")
    edge.balancer.ready(["be_green/app1", "be_green/app2"], 10)
    for state, status in (("drain", "DRAIN"), ("maint", "MAINT")):
        edge.balancer.set_state(["be_blue/app1", "be_mixed/app2-blue", "be_green/app1"], state)
        edge.restart()
        until(lambda: edge.balancer.servers()["be_blue/app2"].up)
        servers = edge.balancer.servers()
        assert servers["be_blue/app1"].status == status
        assert {edge.get() for _ in range(6)} == {(200, "blue")} and not edge.services["be_blue/app1"].asked
        out = {name for name, server in servers.items() if server.status == status}
        assert out == {"be_blue/app1"}, "traffic may have to fall back to the other slot"
    edge.balancer.ready(["be_blue/app1", "be_green/app1"], 10)
    edge.balancer.maint(["be_green/app2"])
    edge.balancer.switch(edge.map, "active", "be_green", 1)
    edge.restart()
    until(lambda: edge.balancer.servers()["be_blue/app1"].up)
    assert edge.balancer.servers()["be_green/app2"].status == "MAINT", "it is in service now"


def test_traffic_falls_back_to_a_slot_that_was_out_when_haproxy_starts_again(edge: Edge) -> None:
    """A host that renews its services by way of the idle slot boots before that is finished: the old slot starts."""
    edge.start("app1", "green")
    edge.balancer.ready(["be_green/app1"], 10)
    edge.balancer.switch(edge.map, "active", "be_green", 1)
    edge.balancer.drained(BLUE, 10)
    edge.services["be_green/app1"].kill()
    edge.restart()
    until(lambda: edge.get() == (200, "blue"))


def test_haproxy_starts_whatever_it_should_keep_out(edge: Edge) -> None:
    """A server that has left its configuration, an edge that no order was given to, what a crash left."""
    edge.balancer.maint(["be_blue/app1"])
    kept = edge.directory / "kept-out.state"
    for text in (kept.read_text().replace("app1", "app9"), "", "rubbish", None):
        kept.unlink() if text is None else kept.write_text(text)
        edge.restart()
        until(lambda: all(server.up for server in edge.balancer.servers(BLUE).values()))
    edge.balancer.maint(["be_blue/app1"])
    assert not kept.exists(), "where site.yml has not been run since, orders are given as they were"


def test_an_order_that_the_next_start_would_forget_fails(edge: Edge) -> None:
    (edge.directory / "slot.map").unlink()
    with pytest.raises(RuntimeFailure, match=r"would forget it when it starts: .*kept-out.state: No such file"):
        edge.balancer.set_state(["be_blue/app1"], "drain")


def test_no_order_given_during_a_reload_is_forgotten(edge: Edge) -> None:
    edge.start("app1", "green")
    edge.balancer.ready(["be_green/app1"], 10)
    for number in range(16):
        state, status, backend = [("drain", "DRAIN", "be_green"), ("ready", "UP", "be_blue")][number % 2]
        reload = threading.Thread(target=edge.reload)
        reload.start()
        # Before it, in the middle of it, after it: whatever has been read back has to last.
        time.sleep(0.05 * number)
        edge.balancer.set_state(["be_blue/app1"], state)
        edge.balancer.switch(edge.map, "active", backend, 1)
        reload.join()
        assert edge.balancer.servers()["be_blue/app1"].status == status, number
        assert edge.balancer.map_value(edge.map, "active") == backend, number


def test_an_order_waits_for_a_reload_with_an_end(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ansible.module_utils.haproxy_runtime.LOCK_SECONDS", 0.3)
    with edge.balancer.runtime.steady(), pytest.raises(RuntimeFailure, match="a reload has held .*reload.lock for 0 s"):
        edge.balancer.set_state(["be_blue/app1"], "drain")
    assert edge.balancer.servers()["be_blue/app1"].up
    with pytest.raises(RuntimeFailure, match="does not exist, so HAProxy does not run"):
        Balancer("/nowhere/admin.sock").set_state(["be_blue/app1"], "drain")


def test_ready_does_not_believe_in_a_dead_server(edge: Edge) -> None:
    name = "be_blue/app1"
    edge.balancer.maint([name])
    edge.services[name].kill()
    edge.balancer.runtime.order(f"set server {name} state ready")
    assert edge.balancer.servers()[name].status.startswith("UP"), "the trap that the module exists for is gone"
    edge.balancer.maint([name])
    with pytest.raises(RuntimeFailure, match=r"no passed health check within 2.5 s: be_blue/app1 is .*L4CON"):
        edge.balancer.ready([name], 2.5)
    assert not edge.balancer.servers()[name].status.startswith("UP")
    assert {edge.get()[0] for _ in range(10)} == {200}


def test_warm_waits_for_a_check_made_now(edge: Edge) -> None:
    name = "be_blue/app1"
    edge.balancer.maint([name])
    edge.services[name].ready = False  # the last check before passed: what HAProxy shows first is stale
    with pytest.raises(RuntimeFailure, match="L7STS"):
        edge.balancer.warm([name], 2.5)
    edge.services[name].ready = True
    after = edge.balancer.warm([name], 10)
    assert after[name].status == "DRAIN" and after[name].checked


def test_many_servers_leave_and_join_at_once(edge: Edge) -> None:
    begin = time.monotonic()
    edge.balancer.drained(BLUE, 10)
    assert all(server.up for server in edge.balancer.ready(BLUE, 10).values())
    assert time.monotonic() - begin < 6
    assert is_already("ready", edge.balancer.servers(BLUE))
    assert edge.get() == (200, "blue")


def test_switched_changes_file_and_memory(edge: Edge) -> None:
    with pytest.raises(RuntimeFailure, match=r"be_green needs 1 server\(s\) UP before traffic goes there"):
        edge.balancer.switch(edge.map, "active", "be_green", 1)
    with pytest.raises(RuntimeFailure, match="no backend be_red"):
        edge.balancer.switch(edge.map, "active", "be_red", 1)
    assert Path(edge.map).read_text() == "active be_blue\n"
    edge.start("app1", "green")
    edge.balancer.ready(["be_green/app1"], 10)
    with pytest.raises(RuntimeFailure, match=r"needs 2 server\(s\) UP"):
        edge.balancer.switch(edge.map, "active", "be_green", 2)
    assert edge.get() == (200, "blue")
    edge.balancer.switch(edge.map, "active", "be_green", 1)
    assert Path(edge.map).read_text() == "active be_green\n"
    assert edge.balancer.map_value(edge.map, "active") == "be_green"
    assert {edge.get() for _ in range(10)} == {(200, "green")}
    edge.reload()
    assert {edge.get() for _ in range(10)} == {(200, "green")}


def test_an_old_map_falls_back_to_the_slot_that_lives(edge: Edge) -> None:
    edge.start("app2", "green")
    edge.balancer.ready(["be_green/app2"], 10)
    edge.balancer.maint(BLUE)
    assert {edge.get() for _ in range(5)} == {(200, "green")}


def test_a_refused_order_leaves_the_file_alone(edge: Edge, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.map"
    unknown.write_text("active be_green\n")
    with pytest.raises(RuntimeFailure):
        edge.balancer.switch(str(unknown), "active", "be_blue", 1)
    assert unknown.read_text() == "active be_green\n"


def connected(edge: Edge) -> ssl.SSLSocket:
    """A connection through the encrypted port, verified against the authority."""
    plain = socket.create_connection(("127.0.0.1", edge.port), timeout=5)
    context = ssl.create_default_context(cafile=edge.directory / "tls/ca.pem")
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def serial(connection: ssl.SSLSocket) -> str:
    certificate = connection.getpeercert()
    assert certificate
    return str(certificate["serialNumber"])


def issue(edge: Edge) -> str:
    """A new certificate of the same authority, for the same name."""
    directory = edge.directory / "tls"
    (directory / "new.pem").unlink(missing_ok=True)
    lab_tls.ensure(directory, "check", "127.0.0.0/8", {"new": "127.0.0.1"})
    return (directory / "new.pem").read_text()


def test_another_certificate_is_issued_for_a_retired_one_alone(tmp_path: Path) -> None:
    lab_tls.ensure(tmp_path, "check", "127.0.0.0/8", {"one": "127.0.0.1", "two": "127.0.0.2"})
    found = [inspect_certificate((tmp_path / f"{name}.pem").read_text()) for name in ("one", "two")]
    assert lab_tls.reissue(tmp_path, [found[0].fingerprint]) == ["one"]
    now = [inspect_certificate((tmp_path / f"{name}.pem").read_text()) for name in ("one", "two")]
    assert now[0].fingerprint != found[0].fingerprint and now[0].names == found[0].names and now[1] == found[1]
    assert lab_tls.ensure(tmp_path, "check", "127.0.0.0/8", {"one": "127.0.0.1", "two": "127.0.0.2"}) == []


def test_a_new_certificate_is_presented_without_a_reload(encrypted: Edge) -> None:
    path = str(encrypted.directory / "tls/edge.pem")
    worker = encrypted.balancer.runtime.ask("show info").split("Pid: ")[1].split()[0]
    with connected(encrypted) as fresh:
        before = serial(fresh)
    new = issue(encrypted)
    call = {"path": path, "pem": new, "socket": str(encrypted.directory / "admin.sock")}
    checked = ansible(encrypted, call, "--check", "--diff", module="haproxy_certificate")
    assert checked["changed"] is True
    with connected(encrypted) as fresh:
        assert serial(fresh) == before, "check mode changed something"
    outcome = ansible(encrypted, call, "--diff", module="haproxy_certificate")
    assert (outcome["changed"], outcome["loaded"]) == (True, True)
    key = new.split("PRIVATE KEY-----\n")[1].splitlines()[0]
    assert key not in json.dumps([checked, outcome])
    assert Path(path).read_text() == new
    assert Path(path).stat().st_mode & 0o777 == 0o600
    with connected(encrypted) as fresh:
        after = serial(fresh)
        assert after != before
    assert ansible(encrypted, call, module="haproxy_certificate")["changed"] is False
    assert encrypted.balancer.runtime.ask("show info").split("Pid: ")[1].split()[0] == worker
    encrypted.reload()
    with connected(encrypted) as fresh:
        assert serial(fresh) == after, "the file and the process agree"


def test_connections_outlive_the_certificate_that_they_began_with(encrypted: Edge) -> None:
    path, new = encrypted.directory / "tls/edge.pem", issue(encrypted)
    with connected(encrypted) as established:
        exchange_certificate(encrypted.balancer.runtime, path, new, inspect_certificate(new).sha1)
        with connected(encrypted) as fresh:
            assert serial(fresh) != serial(established)
        established.sendall(b"GET / HTTP/1.1\r\nHost: edge\r\n\r\n")
        assert b" 200 " in established.recv(15)


def test_a_certificate_that_cannot_be_used_changes_nothing(encrypted: Edge, tmp_path: Path) -> None:
    path = encrypted.directory / "tls/edge.pem"
    before, new = path.read_text(), issue(encrypted)
    certificate, key = new.split("-----BEGIN PRIVATE")
    others = "-----BEGIN PRIVATE" + issue(encrypted).split("-----BEGIN PRIVATE")[1]
    for pem, says in (
        (certificate, "no usable private key"),
        (others, "no certificate"),
        (certificate + others, "another certificate's"),
    ):
        call = {"path": str(path), "pem": pem, "socket": str(encrypted.directory / "admin.sock")}
        outcome = ansible(encrypted, call, module="haproxy_certificate")
        assert says in str(outcome["msg"])
    with pytest.raises(CertificateFailure, match="not now"):
        inspect_certificate(new, datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400))
    # HAProxy's own refusal: the file returns too.
    runtime = RuntimeSocket(str(encrypted.directory / "admin.sock"))
    with pytest.raises(RuntimeFailure, match="did not take the new certificate"):
        exchange_certificate(runtime, path, certificate + others, "0" * 40)
    assert path.read_text() == before
    assert presented(runtime, str(path)) == inspect_certificate(before).sha1
    # A transaction that was left open would refuse the next one.
    exchange_certificate(runtime, path, new, inspect_certificate(new).sha1)
    assert presented(runtime, str(path)) == inspect_certificate(new).sha1


def test_without_a_running_haproxy_the_file_is_written(tmp_path: Path) -> None:
    lab_tls.ensure(tmp_path, "check", "127.0.0.0/8", {"edge": "127.0.0.1"})
    pem = (tmp_path / "edge.pem").read_text()
    exchange_certificate(None, tmp_path / "new.pem", pem, "")
    assert (tmp_path / "new.pem").read_text() == pem
    assert (tmp_path / "new.pem").stat().st_mode & 0o777 == 0o600


def ask(edge: Edge, path: str, accept: str) -> tuple[int, str, str, str]:
    """Status, Retry-After, type and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", edge.port, timeout=5)
    connection.request("POST" if path == "/v1/documents" else "GET", path, headers={"Accept": accept})
    answer = connection.getresponse()
    kind = answer.getheader("Content-Type", "").split(";")[0]
    return answer.status, answer.getheader("Retry-After", ""), kind, answer.read().decode()


def test_in_maintenance_users_are_told_and_health_stays_visible(edge: Edge) -> None:
    reason = '<b>"Moving" & more</b> to 100% \\; ümlaut'
    on = {"state": "present", "reason": reason, "map_path": str(edge.directory / "maintenance.map")}
    on["socket"] = str(edge.directory / "admin.sock")
    off = {**on, "state": "absent"}
    assert ansible(edge, off, module="haproxy_maintenance")["changed"] is False
    assert ansible(edge, on, "--check", module="haproxy_maintenance")["changed"] is True
    assert edge.get() == (200, "blue"), "check mode changed something"
    edge.balancer.write_map(on["map_path"], wanted({"state": "present", "reason": reason}))
    for _ in range(2):
        status, after, kind, body = ask(edge, "/v1/documents", "*/*")
        assert (status, after, kind) == (503, "60", "application/problem+json")
        assert json.loads(body)["detail"] == reason
        status, after, kind, body = ask(edge, "/", "text/html,application/xhtml+xml")
        assert (status, after, kind) == (503, "60", "text/html")
        assert "<b>" not in body and html.unescape(body.split("<p>")[1].split("</p>")[0]) == reason
        assert {ask(edge, path, "*/*")[0] for path in ("/health", "/healthz", "/readyz", "/metrics")} == {200}
        edge.reload()
    edge.balancer.write_map(on["map_path"], {})
    assert edge.get() == (200, "blue")
    edge.reload()
    assert edge.get() == (200, "blue")


def test_maintenance_is_recorded_once(edge: Edge, tmp_path: Path) -> None:
    host = Host(state=tmp_path)
    params = {"map_path": str(edge.directory / "maintenance.map"), "socket": str(edge.directory / "admin.sock")}
    for state, changed in (("present", True), ("present", False), ("absent", True), ("absent", False)):
        outcome = maintain({**params, "state": state, "reason": "A  move"}, False, host)
        assert outcome["changed"] is changed
        assert edge.get()[0] == (503 if state == "present" else 200)
    assert [(entry["state"], entry["reason"]) for entry in host.journal()] == [("on", "A move"), ("off", "")]
    Path(params["map_path"]).write_text("reason left\n")
    assert maintain({**params, "state": "absent", "reason": ""}, False, host)["changed"] is True, (
        "file and memory differ"
    )
    with pytest.raises(RuntimeFailure, match="no map"):
        edge.balancer.map_entries(edge.map + "x")


def ansible(edge: Edge, arguments: Mapping[str, object], *options: str, module: str = "") -> dict[str, object]:
    """Outcome of the module haproxy_runtime, or *module*, run by Ansible."""
    sockets = {"socket": str(edge.directory / "admin.sock"), "master_socket": str(edge.directory / "master.sock")}
    call = json.dumps(arguments if module else {**sockets, "map_path": edge.map, **arguments})
    command = [str(Path(sys.executable).parent / "ansible"), "localhost", "-i", "localhost,", "-c", "local"]
    environment = os.environ | {
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.oneline",
    }
    environment |= {"ANSIBLE_INVENTORY_ENABLED": "host_list", "ANSIBLE_PYTHON_INTERPRETER": sys.executable}
    done = subprocess.run(
        [*command, *options, "-m", module or "haproxy_runtime", "-a", call],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "=> {" in done.stdout, done.stdout + done.stderr
    outcome: dict[str, object] = json.loads(done.stdout[done.stdout.index("=> {") + 3 :])
    return outcome


def test_module_reports_what_changed(edge: Edge) -> None:
    green = {"state": "switched", "map_value": "be_green"}
    maint = {"state": "maint", "servers": ["be_blue/app1"]}
    assert ansible(edge, maint, "--check")["changed"] is True
    assert edge.balancer.servers()["be_blue/app1"].up, "check mode changed something"
    changed = ansible(edge, maint)
    assert changed["changed"] is True
    assert changed["after"] == {"be_blue/app1": {"status": "MAINT", "check": "", "sessions": 0, "weight": 100}}
    assert ansible(edge, maint)["changed"] is False
    assert "be_green needs 1" in str(ansible(edge, green)["msg"])
    assert ansible(edge, {"state": "switched", "map_value": "be_blue"})["changed"] is False
    assert "no server be_blue/app9" in str(ansible(edge, {"state": "maint", "servers": ["be_blue/app9"]})["msg"])


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"none\.sock cannot be used.*systemctl status haproxy"):
        Balancer(str(tmp_path / "none.sock")).servers()


def test_a_socket_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    """A master that reloads takes nobody for a while; whoever knocks when its queue is full is told to try again."""
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as waiting:
        busy.bind(path)
        busy.listen(0)
        with pytest.raises(BlockingIOError):
            for _ in range(10):
                early = waiting.enter_context(socket.socket(socket.AF_UNIX))
                early.setblocking(False)
                early.connect(path)

        def serve() -> None:
            waiting.close()
            while not told.is_set():
                with busy.accept()[0] as connection:
                    if connection.recv(100):
                        connection.sendall(b"well")
                        told.set()

        told = threading.Event()
        later = threading.Timer(0.5, serve)
        later.start()
        try:
            assert RuntimeSocket(path).ask("show info") == "well"
        finally:
            later.join(10)


def test_a_silent_socket_does_not_hang(tmp_path: Path) -> None:
    path = str(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(RuntimeFailure, match="did not answer 'show stat'"):
            Balancer(path).runtime.ask("show stat", 0.2)
        assert time.monotonic() - begin < 2


def test_statistics_are_parsed() -> None:
    text = (
        "# pxname,svname,scur,status,weight,type,check_status\n"
        "be_blue,app1,3,UP 1/2,100,2,* L7OK\n"
        "be_blue,BACKEND,3,UP,100,1,\n"
    )
    assert parse_servers(text) == {"be_blue/app1": Server("be_blue/app1", "UP 1/2", "* L7OK", 3, 100)}
    assert not parse_servers(text)["be_blue/app1"].up


def test_old_workers_are_told_from_the_current_one() -> None:
    text = "#<PID> <type> <reloads>\n10 master 1\n# workers\n12 worker 0\n# old workers\n11 worker 1\n# programs\n"
    assert parse_old_workers(text) == [11]


def test_map_files_keep_what_is_not_theirs() -> None:
    text = "# who is in service\nother x\nactive be_blue\nactive be_green\n"
    assert entries(text)["active"] == "be_blue"
    assert with_entry(text, "active", "be_green") == "# who is in service\nother x\nactive be_green\n"
    assert with_entry("", "active", "be_green") == "active be_green\n"
