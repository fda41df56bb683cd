"""A worker against servers, pages and names that mean harm: nothing hangs, nothing leaks, none is lost."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import wait_for
from running import children, origin, send
from test_fetch import resolve_to

from atlas.core import Failure, Processor
from atlas.documents import Extracted, Work
from atlas.extract import ExtractError
from atlas.queue import Job, Result
from atlas.sensitive import Sensitive
from atlas.settings import Settings

Handler = BaseHTTPRequestHandler
WORDS = "The lighthouse keeper wrote down the weather. "
PAGE = f"<html><head><title>Log</title></head><body><article><p>{WORDS * 5}</p></article></body></html>".encode()
FETCH_SECONDS, EXTRACT_SECONDS = 3.0, 8.0


def packed(data: Iterator[bytes], wbits: int) -> bytes:
    packer = zlib.compressobj(9, wbits=wbits)
    return b"".join(packer.compress(piece) for piece in data) + packer.flush()


def zeros(megabytes: int) -> Iterator[bytes]:
    return (bytes(1 << 20) for _ in range(megabytes))


def sends(body: bytes, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: send(handler, body, **headers)


def writes(head: bytes, piece: bytes = b"", pause: float = 0, tail: bytes = b"") -> Callable[[Handler], None]:
    """Writes `head`, and then `piece` for as long as somebody listens, or once `tail`."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(head)
        while piece:
            handler.wfile.write(piece)
            time.sleep(pause)
        handler.wfile.write(tail)

    return answer


def redirects(location: str) -> Callable[[Handler], None]:
    return lambda handler: send(handler, b"", 302, Location=location)


def resets(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
LAUGHS = b"<!DOCTYPE x [<!ENTITY a0 'lol'>" + b"".join(
    f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>".encode() for n in range(1, 10)
)
RSS = b"<rss version='2.0'><channel><title>%s</title><item><title>%s</title><link>/one</link></item></channel></rss>"
GERMAN = f"<html><body><article><p>{'Grüße aus Köln, süß und schön. ' * 20}</p></article></body></html>"
NAMED = GERMAN.replace("<body>", "<head><meta charset='{}'></head><body>")

# What each answer must come to: an error class of the queue, or a text that is found.
SERVERS: dict[str, tuple[Callable[[Handler], None], str]] = {
    "gzip bomb": (sends(packed(zeros(300), 31), Content_Encoding="gzip"), "too_large"),
    "deflate bomb": (sends(packed(zeros(300), 15), Content_Encoding="deflate"), "too_large"),
    "bare deflate bomb": (sends(packed(zeros(300), -15), Content_Encoding="deflate"), "too_large"),
    "nested codings": (sends(gzip.compress(gzip.compress(PAGE)), Content_Encoding="gzip, gzip"), "unsupported"),
    "bomb inside": (sends(gzip.compress(packed(zeros(400), 31)), Content_Encoding="gzip"), "parse_error"),
    "gzip cut short": (sends(gzip.compress(PAGE)[:-20], Content_Encoding="gzip"), "network"),
    "gzip, then for ever": (
        writes(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(PAGE), b"x" * 65536),
        "too_large",
    ),
    "brotli unasked": (sends(b"?", Content_Encoding="br"), "unsupported"),
    "endless body": (writes(OK + b"\r\n", b"<p>" * 10_000), "too_large"),
    "endless chunks": (
        writes(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n"),
        "too_large",
    ),
    "endless header": (writes(OK + b"X-A: ", b"x" * 10_000), "network"),
    "endless headers": (writes(OK, b"X-A: x\r\n" * 1000), "network"),
    "endless continue": (writes(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0.01), "timeout"),
    "drip of a body": (writes(OK + b"\r\n", b"x", 0.05), "timeout"),
    "drip of chunks": (writes(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05), "timeout"),
    "drip of headers": (writes(OK, b"x", 0.05), "timeout"),
    "silence": (lambda _: time.sleep(FETCH_SECONDS * 2), "timeout"),
    "nothing": (writes(b""), "network"),
    "reset in the middle": (resets, "network"),
    "too short for its length": (writes(OK + b"Content-Length: 9999\r\n\r\n<p>"), "network"),
    "two lengths": (writes(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"), "network"),
    "no HTTP": (writes(b"SSH-2.0-OpenSSH_9.2\r\n"), "network"),
    "a NUL in a header": (writes(OK + b"X-A: a\0b\r\nContent-Length: 3\r\n\r\nabc"), "network"),
    "a wait for ever": (lambda handler: send(handler, b"", 503, Retry_After="\xb2"), "server_error"),
    "redirect loop": (redirects("/redirect loop"), "client_error"),
    "longer and longer": (lambda handler: send(handler, b"", 302, Location=handler.path + "x" * 500), "client_error"),
    "redirect to a file": (redirects("file:///etc/passwd"), "unsupported"),
    "redirect to nowhere": (redirects("http://"), "unsupported|client_error"),
    "redirect to a bad name": (redirects("http://" + "a" * 300 + ".test/"), "unsupported|dns"),
    "redirect to a long name": (redirects(f"http://{'a.' * 150}test/"), "unsupported"),
    "redirect to a bad port": (redirects("http://a.test:99999/"), "unsupported|dns"),
    "redirect inside": (redirects("http://169.254.169.254/latest/meta-data"), "refused"),
    "redirect to a mapped address": (redirects("http://[::ffff:10.0.0.1]/"), "refused"),
    "redirect to a number": (redirects("http://0x0a000001/"), "refused|dns"),
    "no type": (lambda handler: send(handler, PAGE, Content_Type=""), "lighthouse"),
    "a type without sense": (sends(PAGE, Content_Type="text/html; charset=" + "x" * 5000), "lighthouse"),
    "image": (sends(b"\x89PNG", Content_Type="image/png"), "unsupported"),
    "declared UTF-8, is Latin-1": (sends(GERMAN.encode("latin-1"), Content_Type="text/html; charset=utf-8"), "Grüße"),
    "declared ASCII, is UTF-8": (sends(GERMAN.encode(), Content_Type="text/html; charset=us-ascii"), "Gr"),
    "mark against header": (
        sends(b"\xef\xbb\xbf" + GERMAN.encode(), Content_Type="text/html; charset=latin-1"),
        "Grüße",
    ),
    "mark of UTF-16": (sends(GERMAN.encode("utf-16")), "Grüße"),
    "charset in meta": (sends(NAMED.format("koi8-r").replace("Grüße", "Привет").encode("koi8-r", "replace")), "Привет"),
    "lie in meta": (sends(NAMED.format("utf-16").encode()), "Grüße"),
    "unknown charset": (sends(GERMAN.encode(), Content_Type="text/html; charset=klingon"), "Grüße"),
    "a codec that is slow": (
        sends(b"a" * 90_000 + b"-" + b"b" * 9_000, Content_Type="text/plain; charset=punycode"),
        "aaa",
    ),
    "a codec that is none": (sends(PAGE, Content_Type="text/plain; charset=undefined"), "lighthouse"),
    "a codec that unpacks": (sends(zlib.compress(bytes(1000)), Content_Type="text/plain; charset=zlib"), "unsupported"),
    "UTF-7": (sends(b"+ADw-script+AD4-" * 100, Content_Type="text/plain; charset=utf-7"), "+ADw-"),
    "nested tags": (sends(b"<div>" * 19_000 + b"text"), "parse_error|timeout|text"),
    "nested tables": (sends(b"<table><tr><td>" * 6_000 + b"text"), "parse_error|timeout|text"),
    "unclosed tags": (sends(b"<a href='" * 10_000), "parse_error|timeout|href"),
    "many attributes": (
        sends(b"<p " + b"".join(b"a%d=1 " % n for n in range(10_000)) + b">words</p>"),
        "words|parse_error|timeout",
    ),
    "comments": (sends(b"<!--" * 20_000 + PAGE), "parse_error|lighthouse|timeout"),
    "entities in HTML": (sends(LAUGHS + b"]><html><body><p>&a9; words</p></body></html>"), "parse_error|words|timeout"),
    "XHTML that is broken": (
        sends(b"<?xml version='1.0' encoding='utf-99'?><html>\xff\xfe<p>words</p>"),
        "words|parse_error",
    ),
    "NULs": (sends(b"\0" * 50_000), "parse_error"),
    "XML that is no feed": (sends(b"<?xml version='1.0'?><svg/>", Content_Type="application/xml"), "parse_error"),
    "feed": (sends(RSS % (b"Log", b"Storm"), Content_Type="application/rss+xml"), "Storm"),
    "feed cut short": (sends((RSS % (b"Log", b"Storm"))[:-40], Content_Type="application/rss+xml"), "Storm"),
    "feed of laughs": (
        sends(LAUGHS + b"]>" + RSS % (b"&a9;", b"Storm"), Content_Type="application/rss+xml"),
        "parse_error|Storm",
    ),
    "feed with a file in it": (
        sends(
            b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>" + RSS % (b"a", b"b &e; Storm"),
            Content_Type="text/xml",
        ),
        "Storm",
    ),
    "feed that is nested": (
        sends(b"<rss version='2.0'><channel>" + b"<item>" * 15_000, Content_Type="application/rss+xml"),
        "parse_error|timeout",
    ),
}


@pytest.fixture(scope="module")
def processor() -> Iterator[Processor]:
    settings = Settings(
        environment="development",
        database_url="sqlite:////nowhere/atlas.db",
        fetch_allow_networks=["127.0.0.1/32"],
        fetch_timeout_seconds=FETCH_SECONDS,
        fetch_limit_bytes=2_000_000,
        extract_timeout_seconds=EXTRACT_SECONDS,
        extract_memory_bytes=150_000_000,
    )
    processor = Processor(settings)
    yield processor
    processor.extractor.close()


def outcome(processor: Processor, url: str, sensitive: dict[str, Any] | None = None) -> tuple[str, float]:
    """The error class or the text, and how long it took."""
    job = Job(1, 1, "document", "d", None, 1, 0, 1, None, 0, 0, 0)
    began = time.monotonic()
    ended = processor.process(job, Work("d", url, None, None, sensitive or {}))
    seconds = time.monotonic() - began
    if isinstance(ended, Failure):
        return ended.error_class, seconds
    assert isinstance(ended, Result) and isinstance(ended.value, Extracted)
    return ended.value.text, seconds


def test_each_hostile_answer_comes_to_an_end_that_is_known(processor: Processor) -> None:
    def answer(handler: Handler) -> None:
        SERVERS[unquote(handler.path[1:]).rstrip("x")][0](handler)

    with origin(answer) as url:
        outcome(processor, f"{url}/feed")
        helper = processor.extractor._helper
        assert helper is not None
        before = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{helper.pid}/fd"))
        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(SERVERS, pool.map(lambda name: outcome(processor, f"{url}/{name}"), SERVERS), strict=True))
        # The server's own ends close as its handlers notice.
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before[0], 10, "our descriptors are closed")
        assert processor.extractor._helper is helper, "the helper outlived them all"
        wait_for(lambda: not children(helper.pid), 5, "no child is left")
        assert len(os.listdir(f"/proc/{helper.pid}/fd")) == before[1]
    for name, (text, seconds) in found.items():
        expected = SERVERS[name][1].split("|")
        assert any(text == wanted or (len(text) > 12 and wanted in text) for wanted in expected), (name, text[:200])
        assert "root:" not in text, name
        assert seconds < FETCH_SECONDS + EXTRACT_SECONDS + 60, (name, seconds)


def test_hostile_pages_in_a_row_leave_the_worker_as_it_was(processor: Processor) -> None:
    bodies = [zlib.compress(bytes(1 << 20)), b"<div>" * 300_000, b"<" * 100_000, LAUGHS + b"]><p>&a9;</p>"] * 8
    extractor = processor.extractor

    def resident() -> int:
        assert extractor._helper is not None
        return int(Path(f"/proc/{extractor._helper.pid}/statm").read_text().split()[1]) * 4096

    def hurt(body: bytes) -> None:
        with contextlib.suppress(ExtractError):
            extractor.extract(body, "text/html")

    hurt(PAGE)
    helper, before = extractor._helper, resident()
    assert helper is not None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hurt, bodies))
    assert extractor._helper is helper and resident() < before + 5_000_000
    wait_for(lambda: not children(helper.pid), 5, "no child is left")
    assert "lighthouse" in extractor.extract(PAGE, "text/html").text


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([["127.0.0.1"], ["10.0.0.1"]], "refused"),
        ([["127.0.0.1"], ["127.0.0.2"]], "refused"),
        ([["10.0.0.1", "::1", "fe80::1%lo", "0.0.0.0", "64:ff9b::7f00:1"]], "refused"),
        ([[]], "refused"),
        ([["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "169.254.169.254"]], "lighthouse"),
    ],
)
def test_answers_of_dns_that_change(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, answers: list[list[str]], expected: str
) -> None:
    def answer(handler: Handler) -> None:
        is_first = handler.path == "/"
        send(handler, b"" if is_first else PAGE, 302 if is_first else 200, Location="/next", Connection="close")

    resolve_to(monkeypatch, answers)
    with origin(answer) as url:
        text, _ = outcome(processor, url.replace("127.0.0.1", "example.test") + "/")
    assert text == expected or expected in text


def test_what_lets_us_in_goes_to_its_source_alone(processor: Processor) -> None:
    seen: dict[str, list[tuple[str, Any]]] = {"source": [], "other": []}
    names = ("Authorization", "Cookie", "X-Key")

    def note(handler: Handler, server: str) -> None:
        seen[server].append((handler.path, [handler.headers[name] for name in names]))

    def elsewhere(handler: Handler) -> None:
        note(handler, "other")
        send(handler, b"", 302, Location=f"{source}/back")

    def answer(handler: Handler) -> None:
        note(handler, "source")
        if handler.path == "/back":
            send(handler, PAGE)
        else:
            send(handler, b"", 302, Location={"/": "/inside", "/inside": f"{other}/"}[handler.path])

    sensitive = {"headers": {"X-Key": "k"}, "cookies": {"a": "1", "b": "2"}, "username": "me", "password": "pw"}
    with origin(answer) as source, origin(elsewhere) as other:
        text, _ = outcome(processor, f"{source}/", Sensitive.model_validate(sensitive).given())
    given = ["Basic bWU6cHc=", "a=1; b=2", "k"]
    assert "lighthouse" in text
    assert seen["source"] == [("/", given), ("/inside", given), ("/back", given)]
    assert seen["other"] == [("/", [None, None, None])]


def test_a_header_that_could_split_a_request_is_not_sent(processor: Processor) -> None:
    asked = []
    with origin(lambda handler: asked.append(handler.path)) as url:
        for value in ("a\r\nX-Injected: b", "a\nb", "a\0b", "ä\u2028"):
            assert outcome(processor, url, {"headers": {"X-Key": value}})[0] in ("network", "unsupported")
    assert asked == []
