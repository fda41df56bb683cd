"""Sends the scheduled requests over raw connections and records one outcome for each. Nothing here ever sends twice.

HTTP/1.1 by hand, because HTTP clients hide what is measured here: they retry, pool and count as they see fit. A connection
that is kept is used again only while the server has not closed it; what is lost in between is lost, and counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.load.schedule import FRESH, KEPT, SLOW_ANSWER, SLOW_BODY, Request, Schedule

IDLE_SECONDS = 4.0
"""A kept connection that was idle for longer is closed by us: the edge does it after 10 s, at the worst of all moments."""
SLOW_PIECES = 8
RECEIVE_BYTES = 4096
"""What the socket of a slow reader may hold, so that it is the service that has to wait."""
BIG_DOCUMENT_BYTES = 900_000
PREPARE_SECONDS = 60.0


class Outcome(NamedTuple):
    """What became of one request. Times are Unix times; *status* 0 means no answer, and *error* says why."""

    number: int
    kind: str
    edge: int
    due: float
    began: float
    ended: float
    status: int
    error: str
    identifier: str
    release: str
    slot: str
    reused: bool

    @property
    def latency(self) -> float:
        """Seconds from the moment at which it should have begun."""
        return self.ended - self.due

    @property
    def wrote(self) -> bool:
        """Whether it was a POST."""
        return self.kind != SLOW_ANSWER

    @property
    def good(self) -> bool:
        """Whether it did what it should. Documents are unique: a 200 for one of them means that it was applied before."""
        return self.status == (202 if self.wrote else 200) and not self.error


class Edge(NamedTuple):
    """Where requests go: an address, and TLS if *tls* is given. *name* is what the certificate and the host header say."""

    address: str
    port: int
    name: str
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str, ca: str | None = None) -> Edge:
        """Return the edge at *url*, whose certificate is checked with the authorities in the file *ca*."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        tls = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.netloc, tls)


class Answer(NamedTuple):
    """An HTTP answer: lower-case header names; *closes* if the server ends the connection."""

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool


class ProtocolError(Exception):
    """The server sent something that is not HTTP."""


@dataclass
class Connection:
    """One TCP or TLS connection to an edge."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0

    def usable(self) -> bool:
        """Whether the server still holds it open and it was not idle for too long."""
        return not (
            self.reader.at_eof() or self.writer.is_closing() or time.monotonic() - self.idle_since > IDLE_SECONDS
        )

    def close(self) -> None:
        """End it without waiting."""
        self.writer.close()


async def connect(edge: Edge, slow: bool = False) -> Connection:
    """Open a connection; a *slow* one holds little of what it has not read."""
    family = socket.AF_INET6 if ":" in edge.address else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if slow:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        await asyncio.get_running_loop().sock_connect(raw, (edge.address, edge.port))
        name = urlsplit(f"//{edge.name}").hostname if edge.tls else None
        limit = RECEIVE_BYTES if slow else 2**16
        reader, writer = await asyncio.open_connection(sock=raw, ssl=edge.tls, server_hostname=name, limit=limit)
    except BaseException:
        raw.close()
        raise
    return Connection(reader, writer)


async def read_answer(reader: asyncio.StreamReader, pause: Callable[[int], float] = lambda _: 0.0) -> Answer:
    """Read one answer; *pause* gives the seconds to wait after each piece of so many bytes.

    Raises ProtocolError, or asyncio.IncompleteReadError when the server ends the connection too early.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = head[0].split(" ", 2)
    if len(fields) < 2 or not fields[0].startswith("HTTP/1.") or not fields[1].isdigit():
        raise ProtocolError(f"not HTTP: {head[0][:60]!r}")
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    closes = headers.get("connection", "").lower() == "close"
    body = bytearray()
    if "content-length" in headers:
        expected = int(headers["content-length"])
        while len(body) < expected:
            piece = await reader.read(min(expected - len(body), 65536))
            if not piece:
                raise asyncio.IncompleteReadError(bytes(body), expected)
            body += piece
            if wait := pause(len(piece)):
                await asyncio.sleep(wait)
    elif closes and "transfer-encoding" not in headers:
        body += await reader.read(-1)
    else:
        raise ProtocolError("an answer without a length")
    return Answer(int(fields[1]), headers, bytes(body), closes)


class Client:
    """Sends requests to *edges* as *run*, a name that titles its documents and numbers its request ids."""

    def __init__(
        self, edges: Sequence[Edge], token: str, run: str, timeout: float = 30.0, slow_seconds: float = 2.0
    ) -> None:
        self.edges, self.token, self.run = list(edges), token, run
        self.timeout, self.slow_seconds = timeout, slow_seconds
        self.idle: list[list[Connection]] = [[] for _ in self.edges]
        self.big = ""

    # One request

    def _content(self, request: Request) -> bytes:
        filler = "slow body " * 800 if request.kind == SLOW_BODY else ""
        document = {
            "content": f"{self.run} {request.number} {filler}", "content_type": "text/plain", "title": self.run,
        }  # fmt: skip
        return json.dumps(document).encode()

    def _head(self, request: Request, method: str, path: str, length: int) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1", f"Host: {self.edges[request.edge].name}",
            f"Authorization: Bearer {self.token}", f"X-Request-Id: {self.run}-{request.number}",
        ]  # fmt: skip
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        if request.kind != KEPT:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _take(self, request: Request) -> Connection | None:
        """Return a kept connection that can be used, the last used first."""
        idle = self.idle[request.edge]
        while request.kind == KEPT and idle:
            connection = idle.pop()
            if connection.usable():
                return connection
            connection.close()
        return None

    async def send(self, request: Request, due: float) -> Outcome:
        """Send *request*, due at the Unix time *due*, and return its outcome, whatever happens."""
        began, reused, status, error = time.time(), False, 0, ""
        headers: dict[str, str] = {}
        identifier = ""
        connection = None
        keep = False
        try:
            async with asyncio.timeout(self.timeout):
                connection = self._take(request)
                reused = connection is not None
                if connection is None:
                    connection = await connect(self.edges[request.edge], slow=request.kind == SLOW_ANSWER)
                answer = await self._exchange(request, connection)
                status, headers = answer.status, answer.headers
                keep = request.kind == KEPT and not answer.closes
                identifier, error = self._understand(request, answer)
        except TimeoutError:
            error = f"timeout after {self.timeout:g} s"
        except ConnectionRefusedError:
            error = "refused"
        except (ConnectionResetError, BrokenPipeError):
            error = "reset"
        except asyncio.IncompleteReadError as early:
            error = f"closed after {len(early.partial)} bytes of the answer"
        except (ssl.SSLError, OSError, ProtocolError, ValueError, asyncio.LimitOverrunError) as other:
            error = f"{type(other).__name__}: {other}"
        if connection is not None:
            if keep and not error:
                connection.idle_since = time.monotonic()
                self.idle[request.edge].append(connection)
            else:
                connection.close()
        return Outcome(
            request.number, request.kind, request.edge, due, began, time.time(), status, error, identifier,
            headers.get("x-atlas-release", ""), headers.get("x-atlas-slot", ""), reused,
        )  # fmt: skip

    async def _exchange(self, request: Request, connection: Connection) -> Answer:
        reader, writer = connection.reader, connection.writer
        if request.kind == SLOW_ANSWER:
            writer.write(self._head(request, "GET", f"/v1/documents/{self.big}", 0))
            per_byte = self.slow_seconds / BIG_DOCUMENT_BYTES
            return await read_answer(reader, lambda size: size * per_byte)
        body = self._content(request)
        head = self._head(request, "POST", "/v1/documents", len(body))
        if request.kind != SLOW_BODY:
            writer.write(head + body)
        else:
            size = -(-len(body) // SLOW_PIECES)
            writer.write(head)
            for start in range(0, len(body), size):
                await asyncio.sleep(self.slow_seconds / SLOW_PIECES)
                writer.write(body[start : start + size])
                await writer.drain()
        return await read_answer(reader)

    def _understand(self, request: Request, answer: Answer) -> tuple[str, str]:
        """Return (document's id, what is wrong with the body) of *answer*."""
        if answer.status not in (200, 202):
            return "", ""
        identifier = str(json.loads(answer.body).get("id", ""))
        if not identifier:
            return "", "the answer names no document"
        if request.kind == SLOW_ANSWER and (identifier != self.big or len(answer.body) < BIG_DOCUMENT_BYTES):
            return identifier, "the answer is not the document that was asked for"
        return identifier, ""

    # All of them

    async def prepare(self) -> None:
        """Take in the big document that slow readers ask for. Raises RuntimeError when that does not work."""
        content = (f"{self.run} big " * BIG_DOCUMENT_BYTES)[:BIG_DOCUMENT_BYTES]
        document = {"content": content, "content_type": "text/plain", "title": f"{self.run} (big)"}
        answer = await self.ask("POST", "/v1/documents", json.dumps(document).encode())
        if answer.status != 202:
            raise RuntimeError(f"the service took no document before the load: {answer.status} {answer.body[:200]!r}")
        self.big = json.loads(answer.body)["id"]
        if set(await self.applied([self.big], PREPARE_SECONDS)) != {self.big}:
            raise RuntimeError(f"the service did not process a document within {PREPARE_SECONDS:g} s")

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Send one request that is not part of the load, to the first edge. Raises OSError."""
        request = Request(-1, 0.0, FRESH, 0)
        async with asyncio.timeout(self.timeout):
            connection = await connect(self.edges[0])
            try:
                connection.writer.write(self._head(request, method, path, len(body)) + body)
                return await read_answer(connection.reader)
            finally:
                connection.close()

    async def applied(self, identifiers: Sequence[str], seconds: float, at_once: int = 8) -> dict[str, int]:
        """Return document → how often its job was finished, of those that are processed within *seconds*."""
        deadline = time.monotonic() + seconds
        found: dict[str, int] = {}
        todo = list(reversed(identifiers))

        async def worker() -> None:
            while todo and time.monotonic() < deadline:
                identifier = todo.pop()
                try:
                    answer = await self.ask("GET", f"/v1/documents/{identifier}")
                    document = json.loads(answer.body) if answer.status == 200 else {}
                except (OSError, EOFError, ProtocolError):
                    document = {}
                if document.get("status") in ("processed", "dead"):
                    found[identifier] = int(document["applied"])
                else:
                    todo.insert(0, identifier)
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(worker() for _ in range(at_once)))
        return found

    async def run_schedule(
        self, schedule: Schedule, seconds: float | None, record: Callable[[Outcome], None], stop: asyncio.Event
    ) -> int:
        """Send what *schedule* says for *seconds*, or until *stop*; return how many requests were planned until then."""
        loop = asyncio.get_running_loop()
        start, start_unix = loop.time(), time.time()
        tasks: set[asyncio.Task[None]] = set()
        number = 0

        async def one(request: Request) -> None:
            record(await self.send(request, start_unix + request.due))

        while True:
            if stop.is_set() and seconds is None:
                seconds = loop.time() - start
            if seconds is not None and number >= schedule.count(seconds):
                break
            request = schedule.request(number)
            wait = start + request.due - loop.time()
            if wait > 0 and not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), wait)
                if stop.is_set():
                    continue
            task = loop.create_task(one(request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        while tasks:
            await asyncio.wait(tasks)
        for connection in (item for idle in self.idle for item in idle):
            connection.close()
        return number
