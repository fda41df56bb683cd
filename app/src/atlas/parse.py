"""The helper of `extract`, a process of its own: imports the parsers once, and forks a child for each page or feed.

Nothing else of Atlas is imported here, so that the helper stays small and holds no secret. It is started with sys.path,
the descriptor of the control socket, the seconds and the bytes of memory for one page.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

import feedparser
from trafilatura import bare_extraction, html2txt

ENTRY_LIMIT = 500


def serve() -> None:
    """Fork a child for each conversation that arrives on the control socket, until that closes."""
    control = socket.socket(fileno=int(sys.argv[2]))
    timeout, memory = float(sys.argv[3]), int(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parse(b"<html><body><p>Loads what the parser loads late.</p></body></html>", None, None)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            control.close()
            _serve_one(socket.socket(fileno=descriptors[0]), timeout, memory)
        os.close(descriptors[0])


def _serve_one(conversation: socket.socket, timeout: float, memory: int) -> None:
    # The kernel ends the child, whatever the parser is doing: by SIGALRM, or by refusing memory.
    signal.setitimer(signal.ITIMER_REAL, timeout)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    status = 1
    try:
        with conversation.makefile("rb") as stream:
            conversation.sendall(b"\n")
            header = json.loads(stream.readline(1 << 16))
            body = stream.read()
        try:
            read = {"page": parse, "feed": parse_feed}[header["kind"]]
            answer = read(body, header["charset"], header["url"])
        except (ValueError, LookupError, RecursionError) as error:
            answer = {"error": f"the page cannot be parsed: {type(error).__name__}"}
        conversation.sendall(json.dumps(answer).encode())
        status = 0
    finally:
        os._exit(status)


def parse(body: bytes, charset: str | None, url: str | None) -> dict[str, Any]:
    # Without a charset the parser guesses.
    page = body.decode(charset, "replace") if charset else body
    found = bare_extraction(page, url=url, with_metadata=True, date_extraction_params={"extensive_search": False})
    fields = found.as_dict() if found is not None and not isinstance(found, dict) else {}
    text = fields.get("text") or html2txt(page)
    if not text or not text.strip():
        return {"error": "the page has no text"}
    meta = {key: fields[key] for key in ("author", "date", "language", "sitename", "description") if fields.get(key)}
    return {"text": text, "title": fields.get("title") or None, "meta": meta}


def parse_feed(body: bytes, charset: str | None, url: str | None) -> dict[str, Any]:
    # What the server calls the content is often wrong, and says nothing that the content does not say itself.
    headers = {"content-type": "application/xml" + (f"; charset={charset}" if charset else "")}
    if url:
        headers["content-location"] = url
    found = feedparser.parse(io.BytesIO(body), response_headers=headers, sanitize_html=False)
    if not found.version:
        return {"error": "the content is no RSS or Atom feed"}
    return {"title": found.feed.get("title") or None, "entries": [_entry(each) for each in found.entries[:ENTRY_LIMIT]]}


def _entry(found: Any) -> dict[str, Any]:
    link, title = found.get("link") or None, found.get("title") or None
    contents = [content.get("value", "") for content in found.get("content", [])]
    markup = max([*contents, found.get("summary", "")], key=len)
    text = html2txt(f"<html><body>{markup}</body></html>").strip() if markup else ""
    key = hashlib.sha256(repr((found.get("id"), link, None if link else (title, text))).encode()).hexdigest()[:16]
    return {"key": key, "url": link, "title": title, "text": text}
