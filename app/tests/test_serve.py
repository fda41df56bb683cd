"""The API under a real gunicorn: ready, drained, watched; and the other services as processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import wait_for
from running import TOKEN, Deployment, children, free_port, proportional_memory

DOCUMENT = {"content": "Hello from a test.", "content_type": "text/plain"}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("deployment"))
    deployment.prepare()
    yield deployment
    deployment.close()


def stop(process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0
    return time.monotonic() - began


def test_ready_is_said_once_a_worker_answers_and_stopping_at_the_end(deployment: Deployment) -> None:
    process, ear, port = deployment.start_ready("api")
    answer = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
    assert answer.status_code == 200 and answer.json()["checks"]["schema"] == "ok"
    assert answer.headers["X-Atlas-Release"] == "0.1.0-0123456789ab" and answer.headers["X-Atlas-Slot"] == "blue"
    stop(process)
    assert ear.count("STOPPING=1") == 1
    heard = [line for _, line in ear.heard]
    assert heard[heard.index("READY=1") + 1] == "STATUS=serving", "gunicorn said READY by itself, and too early"


def test_a_request_in_flight_is_answered_after_sigterm(deployment: Deployment) -> None:
    process, _, port = deployment.start_ready("api")
    body = json.dumps(DOCUMENT | {"title": "in flight"}).encode()
    head = (
        f"POST /v1/documents HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=120) as slow:
        slow.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert slow.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        slow.sendall(body[:10])
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not _listens(port), 10, "the port is closed")
        assert process.poll() is None
        slow.sendall(body[10:])
        answer = b""
        while chunk := slow.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 202"), answer
    assert process.wait(100) == 0
    shown = json.loads(answer.partition(b"\r\n\r\n")[2])
    _, _, port = deployment.start_ready("api")
    with deployment.client(port) as client:
        assert client.get(f"/v1/documents/{shown['id']}").json()["title"] == "in flight"


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_who_leaves_is_not_ready_and_answers_everybody(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(deployment.environment, "RUNTIME_DIRECTORY", str(tmp_path))
    process, _, port = deployment.start_ready("api")
    with deployment.client(port) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, 20, "it is ready")
        (tmp_path / "leaving").touch()
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["checks"]["draining"]) == (503, "this process is stopping")
        assert client.post("/v1/documents", json={"content": "late", "content_type": "text/plain"}).status_code == 202
        (tmp_path / "leaving").unlink()
        assert client.get("/readyz").status_code == 200
    stop(process)


def test_nobody_waits_for_a_client_that_does_not_hang_up(deployment: Deployment) -> None:
    process, _, port = deployment.start_ready("api")
    with deployment.client(port) as client, contextlib.ExitStack() as stack:
        client.get("/healthz")
        took = []
        for _ in range(3):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            answer = b""
            while chunk := idle.recv(65536):
                answer += chunk
            assert b"200 OK" in answer
            began = time.monotonic()
            assert client.get("/healthz").status_code == 200
            took.append(time.monotonic() - began)
        assert min(took) < 0.5
        wait_for(lambda: _is_reset(idle), 10, "the connection is closed for good")
    stop(process)


def _is_reset(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
    except OSError:
        return True
    return False


def test_the_watchdog_is_fed_only_while_the_worker_answers(deployment: Deployment) -> None:
    process, ear, _ = deployment.start_ready("api", watchdog_seconds=3)
    wait_for(lambda: ear.count("WATCHDOG=1") >= 3, 15, "the watchdog is fed")
    worker = children(process.pid)[0]
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: ear.is_silent("WATCHDOG=1", 5), 20, "a service that does not answer lets the watchdog starve")
    since = time.monotonic()
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: ear.count("WATCHDOG=1", since) > 0, 20, "the watchdog is fed again")


def test_a_hung_worker_is_replaced(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _, port = deployment.start_ready("api")
    worker = children(process.pid)[0]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: worker not in children(process.pid) and children(process.pid), 10, "a new worker")
    wait_for(lambda: _is_alive(port), 20, "the new worker answers")


def _is_alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_release_that_cannot_be_imported_never_becomes_ready(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "flask.py").write_text("raise ImportError('broken')\n")
    healthy = deployment.environment
    deployment.environment = healthy | {"PYTHONPATH": f"{tmp_path}:{healthy['PYTHONPATH']}"}
    try:
        process, ear = deployment.start("api", free_port())
        assert process.wait(120) != 0
    finally:
        deployment.environment = healthy
    assert ear.count("READY=1") == 0


def test_a_taken_port_is_one_clear_line(deployment: Deployment) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = deployment.command("serve", "api", ATLAS_PORT=str(port))
        watched = deployment.command("serve", "monitoring", ATLAS_PORT=str(port))
    assert done.returncode == watched.returncode == 2
    for line in (done.stderr, watched.stderr):
        assert f"port {port} on 127.0.0.1 cannot be taken: Address already in use" in line and line.count("\n") == 1


def test_without_a_schema_the_api_is_alive_but_not_ready(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        _, _, port = deployment.start_ready("api")
        with deployment.client(port) as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 503
            refused = client.post("/v1/documents", json=DOCUMENT)
            assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
            deployment.prepare()
            wait_for(lambda: client.get("/readyz").status_code == 200, 15, "ready by itself")
    finally:
        deployment.close()


def test_several_workers_on_postgresql_count_together(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("cluster")
    cluster.execute("CREATE DATABASE served TEMPLATE template_atlas OWNER atlas")
    url = cluster.url("served", "atlas_a")
    deployment = Deployment(tmp_path, database_url=url, database_role="atlas", api_workers=2)
    try:
        deployment.prepare()
        process, _, port = deployment.start_ready("api")
        workers = children(process.pid)
        assert len(workers) == 2
        for _ in range(40):  # each on a connection of its own, so that both workers answer some
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        counted = 'atlas_http_requests_total{endpoint="health.health",method="GET",status="200"} 40.0'
        assert counted in metrics
        os.kill(workers[0], signal.SIGSTOP)
        ear = deployment.ears[-1]
        time.sleep(11)  # the stuck worker shows by its own beat, though the other one answers
        since = time.monotonic()
        time.sleep(4)
        assert ear.count("WATCHDOG=1", since) == 0
        os.kill(workers[0], signal.SIGCONT)
        wait_for(lambda: ear.count("WATCHDOG=1", since) > 0, 20, "the watchdog is fed again")
        stop(process)
    finally:
        deployment.close()
        cluster.execute("DROP DATABASE served WITH (FORCE)")


def test_the_services_wait_for_the_database_and_then_do_their_work(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    ports = {service: free_port() for service in ("core", "services", "monitoring")}
    try:
        started = {service: deployment.start(service, port, watchdog_seconds=3) for service, port in ports.items()}
        time.sleep(2)
        for service, (process, ear) in started.items():
            assert process.poll() is None and ear.count("READY=1") == 0, deployment.log(service, ports[service])
        deployment.prepare()
        for service, (_, ear) in started.items():
            wait_for(
                lambda ear=ear: ear.count("READY=1"), 20, f"{service} ready: {deployment.log(service, ports[service])}"
            )
        metrics_url = f"http://127.0.0.1:{ports['monitoring']}/metrics"

        def metrics() -> str:
            return httpx.get(metrics_url, trust_env=False).text

        wait_for(lambda: "atlas_probe_success 1.0" in metrics(), 30, "the probe comes through")
        wait_for(lambda: 'atlas_leader{owner="test1/blue/services/' in metrics(), 20, "there is a leader")
        for line in ("atlas_sqlite_vulnerable 0.0", "atlas_database_up 1.0", "atlas_deployments_admitted 1.0"):
            assert line in metrics()
        # The probe is told at once, the rest by the last sample, which may be from before a service was there.
        for service in ports:
            beat = f'atlas_service_heartbeat_age_seconds{{host="test1",service="{service}",slot="blue"}}'
            wait_for(lambda beat=beat: beat in metrics(), 15, f"{service} is in a sample")
        for service, (process, ear) in started.items():
            wait_for(lambda ear=ear: ear.count("WATCHDOG=1") >= 2, 15, f"{service} feeds the watchdog")
            assert stop(process) < 60
        last = json.loads(deployment.log("core", ports["core"]).splitlines()[-1])
        assert (last["event"], last["service"], last["host"], last["slot"]) == ("stopped", "core", "test1", "blue")
        assert last["time"].endswith("Z") and last["level"] == "info"
    finally:
        deployment.close()


def test_four_idle_services_stay_within_their_memory(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        deployment.prepare()
        pids = [deployment.start_ready(service)[0].pid for service in ("api", "core", "services", "monitoring")]
        wait_for(lambda: children(pids[1]), 20, "the probe has started the extractor's helper")
        wait_for(lambda: "job finished" in _logs(deployment), 20, "the probe has come through")
        family = pids + [child for pid in pids for child in children(pid)]
        assert len(family) == 6, "the API's worker and the extractor's helper are counted"
        used = {pid: proportional_memory(pid) for pid in family}
        print(used)
        assert sum(used.values()) < 350 * 1024, used
    finally:
        deployment.close()


def _logs(deployment: Deployment) -> str:
    return "".join(path.read_text() for path in deployment.directory.glob("core-*.log"))
