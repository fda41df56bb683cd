"""Fetches pages as a careful stranger on the network would.

Names are resolved here, each address is judged, and the connection goes to the judged address itself, so that a second
DNS answer cannot lead inside (rebinding); Host and SNI keep the name. Every redirect passes the same gate. Size (as
sent, and after decompression), total time and the number of redirects are bounded. What lets us in at a source is shown
to no other host.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpcore
import httpx

from atlas.urls import HOST_LIMIT

_ACCEPT = "text/html, application/xhtml+xml, application/atom+xml, application/rss+xml, text/*;q=0.9, */*;q=0.1"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_STATUS_CLASSES = {404: "not_found", 410: "not_found", 408: "timeout", 429: "rate_limited"}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class FetchError(Exception):
    """The page could not be had. `error_class` is the queue's; `retry_after` is in seconds, if the server named it."""

    def __init__(self, error_class: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.retry_after = retry_after


@dataclass(frozen=True)
class Page:
    """What came back. `charset` is the one the server declared; `url` the address after redirects.

    `is_unchanged` says that there is no body, because the caller knows this version already.
    """

    url: str
    content_type: str
    charset: str | None
    body: bytes
    etag: str | None = None
    last_modified: str | None = None
    is_unchanged: bool = False


class Fetcher:
    """Fetches with the limits given: seconds in all, bytes, networks allowed beside public ones, redirects."""

    def __init__(
        self, user_agent: str, timeout: float, limit: int, allow: Sequence[Network] = (), redirects: int = 5
    ) -> None:
        self._headers = {"User-Agent": user_agent, "Accept": _ACCEPT, "Accept-Encoding": "gzip, deflate"}
        self._timeout = timeout
        self._limit = limit
        self._allow = tuple(allow)
        self._redirects = redirects

    def fetch(
        self,
        url: str,
        private: Mapping[str, str] | None = None,
        etag: str | None = None,
        last_modified: str | None = None,
        asked: list[str] | None = None,
    ) -> Page:
        """The page at `url`. Raises FetchError. To `asked` is added each host that is asked, as host[:port].

        `private` are request headers that no other host may see, also not after a redirect. `etag` and `last_modified`
        are those of the version that the caller knows.
        """
        known = {"If-None-Match": etag, "If-Modified-Since": last_modified}
        # Some servers give an ETag that no header may bring back.
        headers = {name: value for name, value in known.items() if value is not None and value.isascii()}
        deadline = time.monotonic() + self._timeout
        transport = _Transport(_Gate(self._allow, deadline))
        try:
            with httpx.Client(
                transport=transport, headers=self._headers, trust_env=False, timeout=self._timeout
            ) as client:
                return self._follow(client, url, headers, private or {}, deadline, [] if asked is None else asked)
        except (httpx.TimeoutException, httpcore.TimeoutException) as error:
            raise FetchError("timeout", f"no complete answer within {self._timeout:g} s") from error
        except (httpx.HTTPError, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise FetchError("network", f"{type(error).__name__}: {error}"[:300]) from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise FetchError("unsupported", f"not a usable URL: {error}") from error

    def _follow(
        self,
        client: httpx.Client,
        url: str,
        headers: dict[str, str],
        private: Mapping[str, str],
        deadline: float,
        asked: list[str],
    ) -> Page:
        source = httpx.URL(url)
        for _ in range(self._redirects + 1):
            target = httpx.URL(url)
            if target.scheme not in ("http", "https") or not target.host:
                raise FetchError("unsupported", f"{target.scheme or 'no'}: only http and https are fetched")
            if len(target.raw_host) > HOST_LIMIT:
                raise FetchError("unsupported", f"a host has at most {HOST_LIMIT} characters")
            # A page must not make us send credentials, neither ours nor its own.
            target = target.copy_with(username=None, password=None)
            own = private if _is_same_place(source, target) else {}
            asked.append(target.netloc.decode("ascii"))
            with client.stream("GET", target, headers={**headers, **own}) as response:
                if response.has_redirect_location:
                    url = str(response.url.join(response.headers["location"]))
                    continue
                is_unchanged = response.status_code == 304 and bool(headers)
                if not is_unchanged:
                    _check_status(response)
                coding = response.headers.get("content-encoding", "").strip().lower()
                pieces = () if is_unchanged else _decoded(coding, self._bounded(response.iter_raw(), deadline))
                return Page(
                    str(response.url),
                    response.headers.get("content-type", "").partition(";")[0].strip().lower(),
                    response.charset_encoding,
                    b"".join(self._bounded(pieces, deadline)),
                    response.headers.get("etag"),
                    response.headers.get("last-modified"),
                    is_unchanged,
                )
        raise FetchError("client_error", f"more than {self._redirects} redirects")

    def _bounded(self, pieces: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > self._limit:
                raise FetchError("too_large", f"the page is larger than {self._limit} bytes")
            if time.monotonic() > deadline:
                raise FetchError("timeout", f"no complete answer within {self._timeout:g} s")
            yield piece


def _is_same_place(source: httpx.URL, target: httpx.URL) -> bool:
    """Whether `target` may see what was given for `source`: the same origin, or the same host now over TLS."""
    here, there = ((url.scheme, url.host, url.port) for url in (source, target))
    return here == there or (here, there) == (("http", source.host, None), ("https", source.host, None))


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if 200 <= status < 300:
        return
    error_class = _STATUS_CLASSES.get(status, "server_error" if status >= 500 else "client_error")
    wait = _retry_after(response.headers.get("retry-after")) if status in (429, 503) else None
    raise FetchError(error_class, f"the server answered {status}", wait)


def _retry_after(value: str | None) -> float | None:
    """Retry-After (RFC 9110, 10.2.3): seconds, or a date."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _decoded(coding: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The body, decompressed in small steps, so that a bomb is stopped while it is still small."""
    if coding in ("", "identity"):
        yield from chunks
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("unsupported", f"content-encoding {coding[:40]!r} was not asked for")
    decoder = None
    try:
        for chunk in filter(None, chunks):
            if decoder is None:
                # gzip or zlib by its header; some servers send "deflate" without one.
                is_bare = coding == "deflate" and chunk[0] & 15 != 8
                decoder = zlib.decompressobj(wbits=-15 if is_bare else 47)
            while chunk and not decoder.eof:
                yield decoder.decompress(chunk, 1 << 18)
                chunk = decoder.unconsumed_tail
        if decoder is not None:
            yield decoder.flush()
    except zlib.error as error:
        raise FetchError("parse_error", f"the {coding} stream is broken: {error}") from error
    if decoder is not None and not decoder.eof:
        raise FetchError("network", f"the {coding} stream ended early")


def permitted(address: str, allow: Iterable[Network] = ()) -> bool:
    """Whether an address is public, also the one inside a mapped, 6to4, Teredo or NAT64 address, or is in `allow`."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in allow):
        return True
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped:
            return permitted(str(ip.ipv4_mapped), allow)
    if any(found is not None and not permitted(str(found)) for found in inner):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Gate(httpcore.NetworkBackend):
    """Resolves, judges and connects in one step, and bounds every read and write by one deadline."""

    def __init__(self, allow: Sequence[Network], deadline: float) -> None:
        self._allow = allow
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError("dns", f"{host} cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        usable = [address for address in addresses if permitted(address, self._allow)]
        if not usable:
            raise FetchError("refused", f"{host} leads to a private address; see fetch_allow_networks")
        for position, address in enumerate(usable, start=1):
            try:
                stream = self._backend.connect_tcp(address, port, _left(self._deadline), local_address, socket_options)
                return _Bounded(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if position == len(usable):
                    raise
        raise AssertionError("unreachable")


class _Bounded(httpcore.NetworkStream):
    """A stream on which no single wait outlives the deadline, however slowly bytes drip."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time for this page is used up")
    return left


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _Transport(httpx.BaseTransport):
    """httpx over a connection pool that passes our gate."""

    def __init__(self, gate: _Gate) -> None:
        self._pool = httpcore.ConnectionPool(ssl_context=_tls(), network_backend=gate)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        response = self._pool.handle_request(
            httpcore.Request(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=b"",
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response.stream), extensions=response.extensions
        )

    def close(self) -> None:
        self._pool.close()


@cache
def _tls() -> ssl.SSLContext:
    """TLS as this host trusts it."""
    return ssl.create_default_context()
