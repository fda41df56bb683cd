"""The fetcher against local servers that mean harm."""

from __future__ import annotations

import gzip
import socket
import time
import zlib
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from running import origin, send

from atlas.fetch import Fetcher, FetchError, permitted

LOOPBACK = [ip_network("127.0.0.0/8")]


def fetcher(timeout: float = 60, limit: int = 100_000, allow: Any = LOOPBACK) -> Fetcher:
    return Fetcher("Test/1", timeout, limit, allow)


def refused(url: str, fetch_with: Fetcher | None = None) -> FetchError:
    with pytest.raises(FetchError) as caught:
        (fetch_with or fetcher()).fetch(url)
    return caught.value


def test_a_page_comes_back_with_its_type_charset_and_final_address() -> None:
    seen: list[tuple[str, str]] = []

    def answer(handler: Any) -> None:
        seen.append((handler.headers["User-Agent"], handler.headers["Host"]))
        if handler.path == "/old":
            send(handler, b"", 302, Location="/new")
        else:
            send(handler, "Grüße".encode("latin-1"), Content_Type="text/plain; charset=latin-1")

    with origin(answer) as url:
        page = fetcher().fetch(f"{url}/old")
    assert (page.url, page.content_type, page.charset) == (f"{url}/new", "text/plain", "latin-1")
    assert page.body.decode("latin-1") == "Grüße"
    assert seen == [("Test/1", url.removeprefix("http://"))] * 2


@pytest.mark.parametrize(
    "address",
    [
        *[
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ],
        *["255.255.255.255", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "::", "ff02::1"],
        *["2002:0a00:0001::1", "64:ff9b::a00:1"],
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not permitted(address)


def test_public_and_allowed_addresses_are_permitted() -> None:
    assert permitted("93.184.216.34") and permitted("2606:2800:220:1::1") and permitted("::ffff:93.184.216.34")
    assert permitted("10.1.2.3", [ip_network("10.1.2.3/32")]) and not permitted("10.1.2.4", [ip_network("10.1.2.3/32")])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1"])
def test_no_connection_is_made_to_a_private_address(host: str) -> None:
    connected = []
    with origin(lambda handler: connected.append(handler.path)) as url:
        error = refused(url.replace("127.0.0.1", host), fetcher(allow=()))
    assert error.error_class in ("refused", "dns") and not connected


def test_a_redirect_to_a_private_address_is_refused() -> None:
    with origin(lambda handler: send(handler, b"", 302, Location="http://127.9.9.9:1/secret")) as url:
        error = refused(url, fetcher(allow=[ip_network("127.0.0.1/32")]))
    assert error.error_class == "refused"


def resolve_to(monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]) -> None:
    """Let example.test resolve to each of these lists of addresses in turn."""
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host != "example.test":
            return real(host, port, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_name_is_resolved_once_so_that_it_cannot_be_rebound(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    hosts = []

    def answer(handler: Any) -> None:
        hosts.append((handler.headers["Host"], handler.connection.getsockname()[0]))
        send(handler, b"hello")

    with origin(answer) as url:
        port = url.rpartition(":")[2]
        resolve_to(monkeypatch, answers)
        fetcher(allow=[ip_network("127.0.0.1/32")]).fetch(f"http://example.test:{port}/")
    assert hosts == [(f"example.test:{port}", "127.0.0.1")] and answers == [["127.0.0.2"]]


def test_private_addresses_among_public_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with origin(lambda handler: send(handler, b"hello")) as url:
        resolve_to(monkeypatch, [["127.0.0.2", "127.0.0.1"]])
        gate = fetcher(allow=[ip_network("127.0.0.1/32")])
        assert gate.fetch(url.replace("127.0.0.1", "example.test")).body == b"hello"


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://example.test/", "gopher://127.0.0.1/", "//", "http://"]
)
def test_other_schemes_are_unsupported_also_behind_a_redirect(target: str) -> None:
    assert refused(target).error_class == "unsupported"
    if ":" in target and target != "http://":
        with origin(lambda handler: send(handler, b"", 302, Location=target)) as url:
            assert refused(url).error_class == "unsupported"


def test_redirects_end() -> None:
    with origin(lambda handler: send(handler, b"", 302, Location=handler.path + "x")) as url:
        assert "redirects" in str(refused(f"{url}/"))


@pytest.mark.parametrize(
    ("status", "error_class"),
    [(404, "not_found"), (403, "client_error"), (429, "rate_limited"), (500, "server_error"), (503, "server_error")],
)
def test_answers_have_the_error_class_of_the_queue(status: int, error_class: str) -> None:
    with origin(lambda handler: send(handler, b"no", status, Retry_After="7")) as url:
        error = refused(url)
    assert error.error_class == error_class
    assert error.retry_after == (7 if status in (429, 503) else None)


def test_a_page_over_the_limit_is_refused_whatever_it_declares() -> None:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 10_000)

    with origin(answer) as url:
        assert refused(url).error_class == "too_large"


@pytest.mark.parametrize("coding", ["gzip", "x-gzip"])
def test_a_decompression_bomb_is_stopped_while_small(coding: str) -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    with origin(lambda handler: send(handler, bomb, Content_Encoding=coding)) as url:
        before = _peak_memory(reset=True)
        assert refused(url).error_class == "too_large"
    assert _peak_memory() - before < 20_000_000


def _peak_memory(reset: bool = False) -> int:
    """The most memory (bytes) that this process has had in use since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_compressed_pages_are_read_and_broken_or_unasked_codings_refused() -> None:
    body = gzip.compress(b"hello " * 1000)
    with origin(lambda handler: send(handler, body, Content_Encoding="gzip")) as url:
        assert fetcher().fetch(url).body == b"hello " * 1000
    with origin(lambda handler: send(handler, b"not gzip", Content_Encoding="gzip")) as url:
        assert refused(url).error_class == "parse_error"
    with origin(lambda handler: send(handler, b"?", Content_Encoding="gzip, gzip")) as url:
        assert refused(url).error_class == "unsupported"


@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_answer_that_drips_is_cut_off_at_the_deadline(where: str) -> None:
    def answer(handler: Any) -> None:
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        else:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    with origin(answer) as url:
        began = time.monotonic()
        error = refused(url, fetcher(timeout=0.6))
    assert error.error_class == "timeout" and time.monotonic() - began < 9, "it drips for ten"


def test_a_closed_port_is_a_network_error() -> None:
    assert refused("http://127.0.0.1:1/").error_class == "network"
