"""Extraction of real and of hostile pages, in the real helper process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_for
from running import SOURCE, children

from atlas.extract import ExtractError, Extractor

PARAGRAPH = "The lighthouse keeper wrote down the weather every evening, and never missed a day. "
HEAD = "<html lang=en><head><title>A log</title></head>"
PAGE = f"{HEAD}<body><nav>Menu</nav><article><p>{PARAGRAPH * 5}</p></article></body></html>"


@pytest.fixture(scope="module")
def extractor() -> Iterator[Extractor]:
    extractor = Extractor(timeout=60, memory=256 * 1024 * 1024)
    yield extractor
    extractor.close()


def failure(extractor: Extractor, body: bytes, content_type: str = "text/html") -> ExtractError:
    with pytest.raises(ExtractError) as caught:
        extractor.extract(body, content_type)
    return caught.value


def test_html_becomes_its_main_text_and_title(extractor: Extractor) -> None:
    found = extractor.extract(PAGE.encode(), "text/html", "utf-8", "http://example.test/log")
    assert found.title == "A log" and "lighthouse keeper" in found.text
    assert "Menu" not in found.text and "<p>" not in found.text


def test_a_page_too_short_for_an_article_keeps_its_text(extractor: Extractor) -> None:
    assert "tiny" in extractor.extract(b"<html><body><p>tiny</p></body></html>", "text/html").text


@pytest.mark.parametrize("charset", ["utf-8", "latin-1", None, "no-such-charset"])
def test_charsets(extractor: Extractor, charset: str | None) -> None:
    body = f"<html><body><article><p>{'Grüße aus Köln. ' * 20}</p></article></body></html>"
    encoded = body.encode("latin-1" if charset == "latin-1" else "utf-8")
    assert "Grüße aus Köln" in extractor.extract(encoded, "text/html", charset).text


def test_plain_text_and_markdown_stay_as_they_are(extractor: Extractor) -> None:
    assert extractor.extract("naïve".encode("cp1252"), "text/plain").text == "naïve"
    found = extractor.extract(b"# Title\n\n*text*", "text/markdown", "utf-8")
    assert (found.title, found.text) == ("Title", "# Title\n\n*text*")


def test_what_is_not_text_is_unsupported(extractor: Extractor) -> None:
    assert failure(extractor, b"%PDF", "application/pdf").error_class == "unsupported"
    assert failure(extractor, b"a\0b", "text/plain").error_class == "unsupported"


def test_a_page_without_text_is_a_parse_error(extractor: Extractor) -> None:
    assert failure(extractor, b"<html><body></body></html>").error_class == "parse_error"


def test_a_hostile_page_costs_itself_and_nothing_else(extractor: Extractor) -> None:
    nested = b"<div>" * 200_000 + b"text"
    broken = b"<?xml version='1.0' encoding='utf-99'?><html>\xff\xfe<body>" + b"<!DOCTYPE a [<!ENTITY b 'c'>]>" * 100
    for body in (nested, broken, b"<" * 100_000, b"\x00\xff" * 1000):
        try:
            extractor.extract(body, "text/html")
        except ExtractError as error:
            assert error.error_class in ("parse_error", "timeout")
    assert "lighthouse" in extractor.extract(PAGE.encode(), "text/html").text


def test_time_is_limited_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limited(monkeypatch, "while True: pass", timeout=0.5).error_class == "timeout"


def test_memory_is_limited_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    error = limited(monkeypatch, "x = bytearray(400_000_000); __import__('time').sleep(30)", timeout=10)
    assert error.error_class == "parse_error" and "memory" in str(error)


def limited(monkeypatch: pytest.MonkeyPatch, hostile: str, timeout: float) -> ExtractError:
    """What becomes of a page on which the parser does this."""
    boot = (
        f"from atlas import parse\ndef page(body, charset, url):\n    if body != b'<hostile>': return\n    {hostile}\n"
    )
    boot = "import json,sys;sys.path[:]=json.loads(sys.argv[1])\n" + boot + "parse.parse = page\nparse.serve()"
    monkeypatch.setattr("atlas.extract._BOOT", boot)
    extractor = Extractor(timeout, memory=100_000_000)
    try:
        began = time.monotonic()
        error = failure(extractor, b"<hostile>")
        assert time.monotonic() - began < timeout + 60
        return error
    finally:
        extractor.close()


def test_a_killed_helper_is_replaced(extractor: Extractor) -> None:
    extractor.extract(PAGE.encode(), "text/html")
    helper = extractor._helper
    assert helper is not None
    os.kill(helper.pid, signal.SIGKILL)
    assert "lighthouse" in extractor.extract(PAGE.encode(), "text/html").text
    assert extractor._helper is not None and extractor._helper.pid != helper.pid


def test_many_threads_share_one_helper_that_leaves_no_process_behind(extractor: Extractor) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: extractor.extract(f"{PAGE}{number}".encode(), "text/html"), range(40)))
    assert all("lighthouse" in page.text for page in found)
    assert extractor._helper is not None
    helper = extractor._helper.pid
    wait_for(lambda: not children(helper), 5, "the children are gone")


def test_an_idle_helper_is_sent_away_and_returns(extractor: Extractor) -> None:
    extractor.extract(PAGE.encode(), "text/html")
    extractor.rest(3600)
    assert extractor._helper is not None
    pid = extractor._helper.pid
    extractor.rest(-1)
    assert extractor._helper is None and not Path(f"/proc/{pid}").exists()
    assert "lighthouse" in extractor.extract(PAGE.encode(), "text/html").text


def test_the_helper_holds_nothing_of_the_service() -> None:
    code = (
        "import sys, atlas.parse; print(*[name for name in sys.modules if name.startswith('atlas') or 'sql' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)}, check=True
    )
    assert sorted(done.stdout.split()) == ["atlas", "atlas.parse"]
