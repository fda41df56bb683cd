"""The load generator against a server that misbehaves on demand, and the verdict on what it did."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.load.client import Client, Edge, Outcome
from tests.load.schedule import FRESH, KEPT, SLOW_ANSWER, SLOW_BODY, Schedule
from tests.load.traffic import PROJECT, Traffic
from tests.load.verdict import Span, judge, percentiles

RATE = 100.0
WELL = "well"


class Scripted:
    """An HTTP server that takes in documents and does with request *number* what *script* says: WELL, or another word."""

    def __init__(self, script: Callable[[int], str], tls: ssl.SSLContext | None = None) -> None:
        self.script, self.tls = script, tls
        self.documents: dict[str, dict[str, object]] = {}
        self.connections: Counter[int] = Counter()
        self.numbers: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._stopped = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            connection = self.tls.wrap_socket(raw, server_side=True) if self.tls else raw
            with connection, connection.makefile("rb") as stream:
                while self._one(connection, stream):
                    pass
        except OSError:
            raw.close()

    def _one(self, connection: socket.socket, stream: object) -> bool:
        assert hasattr(stream, "readline") and hasattr(stream, "read")
        first = stream.readline().decode()
        if not first:
            return False
        headers = {}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        number = int(headers["x-request-id"].rsplit("-", 1)[1] or -1) if "--" not in headers["x-request-id"] else -1
        self.connections[connection.fileno()] += 1
        deed = self.script(number) if number >= 0 else WELL
        if number >= 0:
            self.numbers.append(number)
        if deed == "drop":
            return False
        if deed == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if deed == "stall":
            time.sleep(0.8)
        if deed == "silence":
            time.sleep(5)
            return False
        status, answer = 202, self._document(first, body, deed)
        if first.startswith("GET"):
            status = 200
        status = int(deed) if deed.isdigit() else status
        content = json.dumps(answer).encode()
        sent = content[: len(content) // 2] if deed == "cut" else content
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            f"X-Atlas-Release: {'old' if deed == 'old' else 'new'}\r\nX-Atlas-Slot: blue\r\n\r\n"
        )
        connection.sendall(head.encode() + sent)
        return deed != "cut" and headers.get("connection") != "close"

    def _document(self, first: str, body: bytes, deed: str) -> dict[str, object]:
        if first.startswith("GET"):
            return self.documents[re.split(r"[/ ]", first)[4]]
        identifier = f"d{len(self.documents)}" if deed != "same" else "d1"
        applied = {"doubled": 2, "lost": 0}.get(deed, 1)
        self.documents.setdefault(
            identifier,
            {"id": identifier, "status": "processed", "applied": applied, "text": json.loads(body)["content"]},
        )
        return {"id": identifier}


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(script: Callable[[int], str] = lambda _: WELL, tls: ssl.SSLContext | None = None) -> Scripted:
        servers.append(Scripted(script, tls))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def once(number: int, deed: str) -> Callable[[int], str]:
    """Return a script that does *deed* to request *number* alone."""
    return lambda found: deed if found == number else WELL


def run(
    server: Scripted, seconds: float = 1.0, slow: bool = False, timeout: float = 3.0
) -> tuple[int, list[Outcome], Client]:
    outcomes: list[Outcome] = []
    client = Client([Edge.of(f"http://127.0.0.1:{server.port}")], "token", "run", timeout, slow_seconds=0.4)

    async def all_of_it() -> int:
        if slow:
            await client.prepare()
        return await client.run_schedule(Schedule(RATE, 1, slow), seconds, outcomes.append, asyncio.Event())

    return asyncio.run(all_of_it()), outcomes, client


# The schedule


def test_the_schedule_is_even_mixed_and_the_same_each_time() -> None:
    schedule = Schedule(50, edges=2)
    requests = [schedule.request(number) for number in range(schedule.count(60))]
    assert len(requests) == 3000
    assert [request.due for request in requests] == [number / 50 for number in range(3000)]
    kinds = Counter((request.kind, request.edge) for request in requests)
    for edge in (0, 1):
        assert 25 <= kinds[SLOW_BODY, edge] <= 35
        assert 12 <= kinds[SLOW_ANSWER, edge] <= 16
        assert kinds[FRESH, edge] > 600 and kinds[KEPT, edge] > 600


@pytest.mark.parametrize("rate", [10, 30])
@pytest.mark.parametrize("servers", [2, 3, 6])
def test_servers_that_take_turns_get_the_same_mix(rate: int, servers: int) -> None:
    schedule = Schedule(rate)
    kinds = Counter((schedule.request(number).kind, number % servers) for number in range(12000))
    for kind in (FRESH, KEPT, SLOW_BODY, SLOW_ANSWER):
        counts = [kinds[kind, server] for server in range(servers)]
        assert min(counts) > max(counts) / 2, (kind, counts)


def test_a_schedule_without_slow_requests_has_none() -> None:
    schedule = Schedule(7, slow=False)
    assert {schedule.request(number).kind for number in range(1000)} == {FRESH, KEPT}
    assert schedule.count(0.99 / 7) == 1 and schedule.count(0) == 0


# The client


def test_all_is_well_with_a_server_that_is(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    planned, outcomes, client = run(server, seconds=2, slow=True)
    documents = [outcome.identifier for outcome in outcomes if outcome.wrote]
    applied = asyncio.run(client.applied(documents, 10))
    verdict = judge(planned, outcomes, applied, len(documents), [Span(0, 2e9, release="new", slot="blue")])
    assert verdict.findings == []
    assert planned == 200
    assert set(verdict.figures["kinds"]) == {FRESH, KEPT, SLOW_BODY, SLOW_ANSWER}
    assert verdict.figures["bound"] == 3 / 200
    assert verdict.figures["connections_reused"] > 50
    assert verdict.figures["latency_slow"]["p50"] > 0.35
    assert sorted(server.numbers) == list(range(200)), "nothing is sent twice"


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("drop", "closed after 0 bytes"), ("reset", "reset"), ("cut", "closed after"), ("503", "503"), ("500", "500"),
        ("200", "1 × 200"), ("silence", "timeout after 2 s"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [40, 41])
def test_one_bad_answer_is_one_failure(scripted: Callable[..., Scripted], deed: str, said: str, number: int) -> None:
    """On a fresh connection (40) and on a kept one (41): never sent again, never overlooked."""
    server = scripted(once(number, deed))
    planned, outcomes, _ = run(server, seconds=0.6, timeout=2)
    verdict = judge(planned, outcomes)
    assert len(verdict.findings) == 1
    assert verdict.findings[0].startswith("1 requests failed") and said in verdict.findings[0]
    assert "bound" not in verdict.figures
    assert server.numbers.count(number) == 1


def test_nobody_listens(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    server.close()
    planned, outcomes, _ = run(server, seconds=0.2)
    assert planned == 20
    assert "20 × refused" in judge(planned, outcomes).findings[0]


def test_latency_counts_from_the_intended_start(scripted: Callable[..., Scripted]) -> None:
    """The schedule goes on while an answer is late, and the late one is seen in the figures."""
    server = scripted(once(30, "stall"))
    planned, outcomes, _ = run(server, seconds=1)
    assert planned == len(outcomes) == 100
    assert outcomes[0]._replace(due=1.0, began=1.5, ended=2.0).latency == 1.0
    late = judge(planned, outcomes).figures["latency"]
    assert late["max"] >= 0.8 and late["p90"] < 0.3


def test_tls_is_checked(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=edge", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / f"{name}.key",
             "-out", tmp_path / f"{name}.pem"],
            check=True, capture_output=True,
        )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "right.pem", tmp_path / "right.key")
    server = scripted(tls=context)
    for ca, failures in (("right", 0), ("wrong", 20)):
        outcomes: list[Outcome] = []
        edge = Edge.of(f"https://127.0.0.1:{server.port}", str(tmp_path / f"{ca}.pem"))
        client = Client([edge], "token", "run")
        asyncio.run(client.run_schedule(Schedule(RATE, 1, False), 0.2, outcomes.append, asyncio.Event()))
        assert [outcome.good for outcome in outcomes].count(False) == failures
        assert failures == 0 or "CERTIFICATE_VERIFY_FAILED" in outcomes[0].error


# The verdict


def outcome(number: int, began: float = 0.0, status: int = 202, release: str = "new", edge: int = 0) -> Outcome:
    return Outcome(number, FRESH, edge, began, began, began + 0.1, status, "", f"d{number}", release, "blue", False)


def test_what_was_applied_twice_or_never_is_found(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda number: {7: "doubled", 9: "lost"}.get(number, WELL))
    planned, outcomes, client = run(server, seconds=0.3)
    applied = asyncio.run(client.applied([item.identifier for item in outcomes], 10))
    findings = judge(planned, outcomes, applied).findings
    assert len(findings) == 1 and findings[0].startswith("2 documents were not applied exactly once")


def test_one_document_for_two_requests_is_found(scripted: Callable[..., Scripted]) -> None:
    server = scripted(once(20, "same"))
    planned, outcomes, _ = run(server, seconds=0.3)
    assert "acknowledged to more than one request: ['d1']" in judge(planned, outcomes).findings[0]


def test_documents_that_nobody_was_told_of_are_found() -> None:
    assert "the database holds 3" in judge(2, [outcome(0), outcome(1)], {"d0": 1, "d1": 1}, stored=3).findings[0]


def test_missing_doubled_and_unplanned_outcomes_are_found() -> None:
    assert "1 of 3 planned requests have no outcome" in judge(3, [outcome(0), outcome(2)]).findings[0]
    assert "more than one outcome" in judge(2, [outcome(0), outcome(1), outcome(1)]).findings[0]
    assert "without being planned" in judge(1, [outcome(0), outcome(1)]).findings[0]
    assert "nothing was sent" in judge(0, []).findings[0]


def test_the_old_release_after_the_switch_is_found() -> None:
    outcomes = [outcome(0, 1.0, release="old"), outcome(1, 2.0), outcome(2, 3.0, release="old"), outcome(3, 4.0)]
    spans = [Span(1.5, 10, release="new")]
    found = judge(4, outcomes, spans=spans).findings
    assert len(found) == 1 and "1 of 3 requests that began after 1.500" in found[0] and "by old" in found[0]
    assert judge(4, outcomes, spans=[Span(3.5, 10, release="new")]).good
    assert judge(4, outcomes, spans=[Span(1.5, 2.5, release="new")]).good
    assert judge(4, outcomes, spans=[Span(1.5, 3.9, release="new", edge=0)]).findings
    assert "nobody saw" in judge(4, outcomes, spans=[Span(1.5, 10, edge=1)]).findings[0]


def test_what_the_balancer_hid_is_found() -> None:
    counters = {"edge1": {"econ": 0, "wretr": 2, "eresp": 0}, "edge2": {"econ": 0}}
    assert judge(1, [outcome(0)], counters=counters).findings == [
        "edge1: the balancer's own counters moved: {'wretr': 2}"
    ]


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentiles([]) == {}
    assert percentiles([float(value) for value in range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}


# The process


def access(folder: Path, server: Scripted) -> Path:
    path = folder / "access.json"
    path.write_text(json.dumps({"url": f"http://127.0.0.1:{server.port}/", "token": "t", "ca": None}))
    return path


def test_a_load_runs_beside_a_test(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    with Traffic(access(tmp_path, scripted()), RATE) as traffic:
        time.sleep(1)
    assert traffic.planned == len(traffic.outcomes) >= 100
    assert traffic.judge().good
    assert len(traffic.documents) > 90


def test_a_load_that_cannot_begin_says_why(tmp_path: Path, scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    path = access(tmp_path, server)
    server.close()
    with pytest.raises(RuntimeError, match="ConnectionRefusedError"), Traffic(path, RATE):
        pass


@pytest.mark.parametrize(("deed", "status"), [(WELL, 0), ("reset", 1), ("doubled", 1)])
def test_the_command(scripted: Callable[..., Scripted], tmp_path: Path, deed: str, status: int) -> None:
    path = access(tmp_path, scripted(once(5, deed)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.load", "--access", path, "--rate", "50", "--seconds", "0.5", "--slow-seconds", "0", "--json"],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    said = json.loads(done.stdout)
    assert said["sent"] == said["planned"] == 25
    assert len(said["findings"]) == status
