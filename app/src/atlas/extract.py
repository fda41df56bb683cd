"""Turns a page into text, in a child process that a hostile page may break.

One helper process imports the parser; for each page it forks a child with limits of its own on time and memory, so that
no page meets what another left behind. The helper starts with the first page and is sent away when it has been idle.
Only JSON comes back from a child.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from atlas.documents import Extracted

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain", "text/markdown", "text/x-markdown")
_ANSWER_LIMIT = 64 * 1024 * 1024
_BOOT = "import json,sys;sys.path[:]=json.loads(sys.argv[1]);from atlas.parse import serve;serve()"


class ExtractError(Exception):
    """No text could be had. `error_class` is the queue's."""

    def __init__(self, error_class: str, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


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
        if kind not in HTML_TYPES:
            raise ExtractError("unsupported", f"content type {kind[:80]!r} is not supported")
        answer = self._ask(json.dumps({"charset": charset, "url": url}).encode() + b"\n" + body)
        if "error" in answer:
            raise ExtractError("parse_error", str(answer["error"]))
        return Extracted(str(answer["text"]), answer["title"], kind, answer["meta"])

    def _ask(self, request: bytes) -> dict[str, Any]:
        for _ in range(2):
            started = time.monotonic()
            answer = self._converse(request)
            if answer:
                break
        else:
            # No child ever saw the page: the helper was lost, which is not the page's fault.
            raise ExtractError("internal", "the extractor was lost")
        try:
            return dict(json.loads(answer))
        except ValueError:
            if time.monotonic() - started >= self._timeout:
                raise ExtractError("timeout", f"extraction took more than {self._timeout:g} s") from None
            raise ExtractError("parse_error", "the page broke its extractor, or used up its memory") from None

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


def _plain(body: bytes, kind: str, charset: str | None) -> Extracted:
    if b"\0" in body[:4096] and not (charset or "").lower().startswith("utf-16"):
        raise ExtractError("unsupported", "the content is binary")
    text = _decoded(body, charset)
    heading = re.search(r"^#\s+(.{1,300})", text, re.MULTILINE) if "markdown" in kind else None
    return Extracted(text, heading.group(1).strip() if heading else None, kind)


def _decoded(body: bytes, charset: str | None) -> str:
    for candidate in (charset, "utf-8-sig", "cp1252"):
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            if candidate:
                return body.decode(candidate)
    return body.decode("latin-1")
