"""The load generator: one process that keeps many requests in flight over raw sockets, and little else.

Closed loop: each connection asks again as soon as it has its answer; that finds the capacity. Open loop: requests begin
on a schedule, whatever became of those before, and latency counts from the moment that the schedule named.

Run as a program it reads a `Plan` as JSON on stdin and writes an `Outcome`. It says how much of a processor it used,
so that one can see that it was not the bottleneck.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

LIMIT_SECONDS = 60.0  # for the answers that are still to come at the end
WORDS = "the archive keeps what readers bring and a queue hands every page to workers that fetch parse and store it"


@dataclass(frozen=True)
class Plan:
    """What to send. `rate` in requests/s makes it an open loop; `first` numbers the first document."""

    port: int
    connections: int
    seconds: float
    kind: str = "document"
    first: int = 0
    rate: float | None = None
    token: str = ""
    path: str = "/v1/documents"
    limit: int = 10**9  # requests at most
    queries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it. Latencies in milliseconds; `cpu` is the generator's share of one processor."""

    requests: int
    statuses: dict[str, int]
    seconds: float
    rate: float
    p50: float
    p95: float
    p99: float
    cpu: float
    numbers: int

    def expect(self, status: int) -> None:
        """AssertionError unless every answer had this status."""
        if set(self.statuses) != {str(status)}:
            raise AssertionError(f"answers were {self.statuses}, not all {status}")


def run(plan: Plan) -> Outcome:
    """Carry out the plan in a process of its own."""
    command = [sys.executable, "-m", "bench.load"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    patience = plan.seconds + 2 * LIMIT_SECONDS
    done = subprocess.run(
        command, input=json.dumps(asdict(plan)), env=environment, capture_output=True, text=True, timeout=patience
    )
    if done.returncode:
        raise AssertionError(f"the load generator failed: {done.stderr}")
    return Outcome(**json.loads(done.stdout))


def document(number: int | str) -> str:
    """A document of a kilobyte that no other number gives."""
    return json.dumps({"content": f"Document {number}. " + (WORDS + ". ") * 9, "content_type": "text/plain"})


def requests(plan: Plan) -> tuple[Callable[[int], bytes], int]:
    """Makes the request with a number, and how many numbers each request uses up."""
    host = f"Host: 127.0.0.1:{plan.port}\r\nAuthorization: Bearer {plan.token}\r\n"
    if plan.kind == "get":
        targets = [f"GET {query} HTTP/1.1\r\n{host}\r\n".encode() for query in plan.queries]
        return lambda number: targets[number % len(targets)], 1
    lines = 1000 if plan.kind == "batch" else 1
    kind = "application/x-ndjson" if plan.kind == "batch" else "application/json"
    body = "\n".join([document("%012d")] * lines).encode()
    length = len(body % tuple(range(lines)))
    head = f"POST {plan.path} HTTP/1.1\r\n{host}Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()
    whole = head.replace(b"%", b"%%") + body
    return lambda number: whole % tuple(range(number, number + lines)), lines


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self._got = b""
        self._missing = -1

    def ask(self, request: bytes, began: float) -> None:
        self.began = began
        self._got, self._missing = b"", -1
        self.socket.sendall(request)

    def read(self) -> str | None:
        """Take what has come: the status once the answer is complete."""
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError("the server closed a connection")
        if self._missing < 0:
            self._got += chunk
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self._got[:end].lower()
            mark = head.find(b"content-length:")
            if mark < 0:
                raise ConnectionError("an answer without Content-Length")
            length = int(head[mark + 15 :].split(b"\r\n", 1)[0])
            self._missing = length - (len(self._got) - end - 4)
        else:
            self._missing -= len(chunk)
        return None if self._missing > 0 else self._got[9:12].decode()


def drive(plan: Plan) -> Outcome:
    make, step = requests(plan)
    connections: dict[int, Connection] = {}
    poll = select.epoll()
    # The one that was used last comes first. A connection is opened when none is idle: one that is silent from the
    # start would keep a thread of the server waiting.
    idle: deque[Connection] = deque()
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    sent = in_window = 0
    used = time.process_time()
    began = time.perf_counter()
    until = began + plan.seconds
    deadline = until + LIMIT_SECONDS
    while True:
        now = time.perf_counter()
        due = float("inf")
        while (idle or len(connections) < plan.connections) and sent < plan.limit:
            due = now if plan.rate is None else began + sent / plan.rate
            if due > now or due >= until:
                break
            if idle:
                connection = idle.pop()
            else:
                connection = Connection(plan.port)
                connections[connection.socket.fileno()] = connection
                poll.register(connection.socket, select.EPOLLIN)
            connection.ask(make(plan.first + sent * step), due)
            sent += 1
        if now >= until or sent >= plan.limit:
            if len(idle) == len(connections) and (plan.rate is None or due >= until or sent >= plan.limit):
                break
            if now >= deadline:
                raise TimeoutError(f"{len(connections) - len(idle)} requests were not answered")
        # epoll counts in milliseconds, select in microseconds.
        wait = max(0.0, due - now) if now < due < until else 1.0
        select.select([poll.fileno()], [], [], wait)
        for number, _ in poll.poll(0):
            connection = connections[number]
            status = connection.read()
            if status is not None:
                ended = time.perf_counter()
                latencies.append(ended - connection.began)
                statuses[status] += 1
                in_window += ended <= until
                idle.append(connection)
    used = time.process_time() - used
    elapsed = time.perf_counter() - began
    for connection in connections.values():
        connection.socket.close()
    latencies.sort()
    # A plan that ends by its limit is measured to the last answer.
    seconds = elapsed if sent >= plan.limit else plan.seconds
    rate = (len(latencies) if sent >= plan.limit else in_window) / seconds
    p50, p95, p99 = (1000 * quantile(latencies, share) for share in (0.5, 0.95, 0.99))
    return Outcome(len(latencies), dict(statuses), seconds, rate, p50, p95, p99, used / elapsed, sent * step)


def quantile(ordered: list[float], share: float) -> float:
    """The value that this share of the ordered values does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump(asdict(drive(Plan(**given | {"queries": tuple(given["queries"])}))), sys.stdout)
