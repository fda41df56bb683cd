"""What tests of whole services need: a deployment in a scratch directory, service processes, and systemd's ear."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.fernet import Fernet
from scratch import children, wait_for

TOKEN = "atl_" + "t" * 43
SOURCE = Path(__file__).parents[1] / "src"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Ear:
    """The service manager's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.heard: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._socket.recv(4096):
                self.heard += [(time.monotonic(), line) for line in message.decode().splitlines()]

    def is_silent(self, line: str, seconds: float) -> bool:
        """Whether this was not heard for so long."""
        return time.monotonic() - max((at for at, heard in list(self.heard) if heard == line), default=0.0) > seconds

    def count(self, line: str, since: float = 0.0) -> int:
        return sum(heard == line and at >= since for at, heard in list(self.heard))

    def close(self) -> None:
        self._socket.close()


class Deployment:
    """A deployment on SQLite, with its files, and the processes that were started of it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ears: list[Ear] = []
        values = {
            "environment": "development",
            "host": "test1",
            "database_url": f"sqlite:///{directory}/atlas.db",
            "fetch_allow_networks": ["127.0.0.0/8"],
            "retry_base_seconds": 0.1,
        }
        self.settings = values | settings
        (directory / "settings.yaml").write_text(yaml.safe_dump(self.settings))
        (directory / "deployment.json").write_text(json.dumps({"id": 7, "release": "0.1.0-0123456789ab"}))
        credentials = directory / "credentials"
        credentials.mkdir()
        (credentials / "atlas_fernet_keys").write_text(Fernet.generate_key().decode())
        spec = {"name": "test", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
        spec |= {"scopes": ["ingest", "read", "operate"], "limits": None}
        (credentials / "atlas_tokens").write_text(json.dumps([spec]))
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SOURCE),
            "ATLAS_SETTINGS": str(directory / "settings.yaml"),
            "ATLAS_DEPLOYMENT": str(directory / "deployment.json"),
            "ATLAS_CREDENTIALS_DIRECTORY": str(credentials),
        }

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "atlas", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def prepare(self) -> None:
        for arguments in (["db", "migrate"], ["tokens", "apply"], ["admission", "admit", "7"]):
            done = self.command(*arguments)
            assert done.returncode == 0, done.stderr

    def start(
        self, service: str, port: int, watchdog_seconds: float = 30, command: Sequence[str] = ()
    ) -> tuple[subprocess.Popen[bytes], Ear]:
        """Start a service, or what Python is to run in its stead; and the ear that hears what it tells systemd."""
        address = f"@atlas-test-{os.getpid()}-{time.monotonic_ns()}"
        ear = Ear(address)
        self.ears.append(ear)
        environment = self.environment | {
            "ATLAS_PORT": str(port),
            "NOTIFY_SOCKET": address,
            "WATCHDOG_USEC": str(int(watchdog_seconds * 1e6)),
        }
        with (self.directory / f"{service}-{port}.log").open("wb") as log:
            words = [sys.executable, *(command or ["-m", "atlas", "serve", service])]
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process, ear

    def start_ready(self, service: str, port: int = 0, **options: Any) -> tuple[subprocess.Popen[bytes], Ear, int]:
        port = port or free_port()
        process, ear = self.start(service, port, **options)
        wait_for(
            lambda: ear.count("READY=1") or process.poll() is not None,
            40,
            f"{service} ready: {self.log(service, port)}",
        )
        assert process.poll() is None, self.log(service, port)
        return process, ear, port

    def log(self, service: str, port: int) -> str:
        return (self.directory / f"{service}-{port}.log").read_text()

    def client(self, port: int) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL a service with all its processes."""
        if process.poll() is None:
            workers = children(process.pid)
            process.kill()
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        process.wait(60)

    def close(self) -> None:
        for process in self.processes:
            self.kill(process)
        for ear in self.ears:
            ear.close()


def proportional_memory(pid: int) -> int:
    """Kilobytes of a process, shared pages counted by their share; 0 if it has just ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def origin(answer: Answer) -> Iterator[str]:
    """A server on loopback whose every GET is answered by `answer`; its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """A complete answer; underscores in header names stand for dashes."""
    handler.send_response(status)
    for name, value in ({"Content_Type": "text/html", "Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
