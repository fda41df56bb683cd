"""Turns a page or a feed into text, in a child process that a hostile page may break.

One helper process imports the parser; for each page it forks a child with limits of its own on time and memory, so that
no page meets what another left behind. The helper starts with the first page and is sent away when it has been idle.
Only JSON comes back from a child.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atlas.documents import Extracted

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain", "text/markdown", "text/x-markdown")
FEED_TYPES = ("application/rss+xml", "application/atom+xml", "application/rdf+xml", "application/xml", "text/xml")
_ANSWER_LIMIT = 64 * 1024 * 1024
_BOOT = "import json,sys;sys.path[:]=json.loads(sys.argv[1]);from atlas.parse import serve;serve()"
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s{0,9}=\s{0,9}["']?([a-z0-9_:.-]{1,40})""", re.IGNORECASE)
# Codecs that decode in linear time and stand for text; punycode, for one, does not.
_CHARSETS = re.compile(r"(utf-(8|16|32)|iso8859|iso2022|cp|koi8|kz1048|gb|big5|euc|shift|mac|tis|hz|johab|ptcp)[\w-]*")
# The names mean the larger set that browsers take them for (WHATWG Encoding, 4.2).
_WIDER = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}


class ExtractError(Exception):
    """No text could be had. `error_class` is the queue's."""

    def __init__(self, error_class: str, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


@dataclass(frozen=True)
class Entry:
    """One entry of a feed. `key` tells it from the others; `text` is what the feed itself says."""

    key: str
    url: str | None
    title: str | None
    text: str


@dataclass(frozen=True)
class Feed:
    """A feed as it was read, its entries in their order."""

    title: str | None
    entries: Sequence[Entry]


class Extractor:
    """Extracts text from pages, for many threads. `timeout` (seconds) and `memory` (bytes) bound one page."""

    def __init__(self, timeout: float, memory: int) -> None:
        self._timeout = timeout
        self._memory = memory
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._used_at = time.monotonic()
        self._is_closed = False

    def extract(
        self, body: bytes, content_type: str | None, charset: str | None = None, url: str | None = None
    ) -> Extracted:
        """The text of a page, with its title. Raises ExtractError."""
        kind = content_type or ("text/html" if b"<" in body[:1024] else "text/plain")
        if kind in TEXT_TYPES:
            return _plain(body, kind, charset)
        if kind in FEED_TYPES:
            feed = self.feed(body, charset, url)
            parts = ["\n".join(filter(None, (entry.title, entry.url, entry.text))) for entry in feed.entries]
            if not any(parts):
                raise ExtractError("parse_error", "the feed has no entries with text")
            return Extracted("\n\n".join(filter(None, parts)), feed.title, kind, {"entries": len(feed.entries)})
        if kind not in HTML_TYPES:
            raise ExtractError("unsupported", f"content type {kind[:80]!r} is not supported")
        answer = self._ask("page", charset_of(body, charset, is_html=True), url, body)
        return Extracted(str(answer["text"]), answer["title"], kind, answer["meta"])

    def feed(self, body: bytes, charset: str | None = None, url: str | None = None) -> Feed:
        """The RSS or Atom feed in `body`, whatever type it was declared to be. Raises ExtractError."""
        answer = self._ask("feed", charset, url, body)
        return Feed(answer["title"], [Entry(**entry) for entry in answer["entries"]])

    def _ask(self, kind: str, charset: str | None, url: str | None, body: bytes) -> dict[str, Any]:
        request = json.dumps({"kind": kind, "charset": charset, "url": url}).encode() + b"\n" + body
        for _ in range(2):
            started = time.monotonic()
            answer = self._converse(request)
            if answer:
                break
        else:
            # No child ever saw the page: the helper was lost, which is not the page's fault.
            raise ExtractError("internal", "the extractor was lost")
        try:
            found = dict(json.loads(answer))
        except ValueError:
            if time.monotonic() - started >= self._timeout:
                raise ExtractError("timeout", f"extraction took more than {self._timeout:g} s") from None
            raise ExtractError("parse_error", "the page broke its extractor, or used up its memory") from None
        if "error" in found:
            raise ExtractError("parse_error", str(found["error"]))
        return found

    def _converse(self, request: bytes) -> bytes:
        """All that a child says: a newline as it begins, and its answer; nothing if there never was a child."""
        answer = bytearray()
        with self._child() as conversation, contextlib.suppress(OSError):
            # The child ends itself when its time is up; the margin is for a machine that is busy.
            conversation.settimeout(self._timeout + 10)
            conversation.sendall(request)
            conversation.shutdown(socket.SHUT_WR)
            while (chunk := conversation.recv(1 << 18)) and len(answer) < _ANSWER_LIMIT:
                answer += chunk
        return bytes(answer)

    def _child(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            self._used_at = time.monotonic()
            for _ in range(0 if self._is_closed else 2):
                try:
                    socket.send_fds(self._open(), [b"1"], [theirs.fileno()])
                    return ours
                except OSError:
                    self._dismiss()
        ours.close()
        raise ExtractError("internal", "the extractor cannot be started")

    def _open(self) -> socket.socket:
        if self._control is None or self._helper is None or self._helper.poll() is not None:
            self._dismiss()
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            path = json.dumps([os.path.abspath(entry) for entry in sys.path if entry])
            limits = [str(theirs.fileno()), str(self._timeout), str(self._memory)]
            with theirs:
                self._helper = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-IB", "-c", _BOOT, path, *limits],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={"LC_ALL": "C.UTF-8"},
                )
        return self._control

    def _dismiss(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._helper is not None:
            try:
                self._helper.wait(2)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                self._helper.wait()
        self._control = self._helper = None

    def rest(self, idle_seconds: float) -> None:
        """Send the helper away if it had nothing to do for that long."""
        with self._lock:
            if self._helper is not None and time.monotonic() - self._used_at > idle_seconds:
                self._dismiss()

    def close(self) -> None:
        """End the helper for good."""
        with self._lock:
            self._is_closed = True
            self._dismiss()


def _plain(body: bytes, kind: str, declared: str | None) -> Extracted:
    text = body.decode(charset_of(body, declared) or "latin-1", "replace")
    if "\0" in text[:4096]:
        raise ExtractError("unsupported", "the content is binary")
    heading = re.search(r"^#\s+(.{1,300})", text, re.MULTILINE) if "markdown" in kind else None
    return Extracted(text, heading.group(1).strip() if heading else None, kind)


def charset_of(body: bytes, declared: str | None, is_html: bool = False) -> str | None:
    """The codec that reads these bytes: that of a byte order mark, the declared one, that of <meta>, UTF-8, or None.

    A codec that fits throughout goes before one that leaves out a thousandth, and that before none.
    """
    marked = [codec for mark, codec in _BOMS if body.startswith(mark)]
    meta = _META_CHARSET.search(body, 0, 4096) if is_html else None
    # A page whose <meta> could be read in ASCII is not in UTF-16, whatever it says.
    named = [declared or "", "" if meta is None else re.sub("(?i)^utf-?(16|32).*", "utf-8", meta[1].decode()), "utf-8"]
    if not is_html and not declared:
        named.append("cp1252")
    candidates = marked or [codec for name in named for codec in _codecs(name)]
    for tolerance in (0, 0.001):
        for codec in candidates:
            text = body.decode(codec, "replace")
            if text.count("\ufffd") <= len(text) * tolerance:
                return codec
    return None


def _codecs(name: str) -> list[str]:
    with contextlib.suppress(LookupError, ValueError):
        found = codecs.lookup(name).name
        return [codec for codec in (_WIDER.get(found, found), found) if _CHARSETS.fullmatch(codec)]
    return []
