"""The judge of the proof of recovery finds each kind of loss."""

from __future__ import annotations

import io
import json
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from labtest import Lab

from tests.recovery.ledger import Acknowledged, Ledger, Stored, judge

SENT = {name: Acknowledged(float(at), f"text of {name}") for at, name in enumerate(("a", "b", "c"), 100)}
HELD = {name: Stored(True, 1, f"text  of {name}\n") for name in SENT}


def test_a_store_that_holds_all_is_good() -> None:
    found = judge(SENT, HELD)
    assert (found.kept, found.lost, found.changed, found.not_once, found.unanswered) == (3, [], [], [], 0)
    assert found.rpo(103) == 0


def test_each_kind_of_loss_is_found() -> None:
    held = {
        "a": Stored(True, 2, "text of a"),
        "c": Stored(True, 1, "text of b"),
        "d": Stored(False, 0, None),
    }
    found = judge(SENT, held)
    assert found.lost == [101.0] and found.rpo(103) == 2
    assert found.changed == ["c"]
    assert found.not_once == ["a", "d"] and found.unanswered == 1


def test_what_is_refused_is_sent_again_until_it_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue refuses single documents, the edge a whole batch; and an answer may not come."""
    answers: list[Any] = [503, [202, 429, 202], [200]]
    sent: list[int] = []

    def urlopen(request: urllib.request.Request, timeout: float, context: ssl.SSLContext | None) -> io.BytesIO:
        lines, answer = bytes(request.data or b"").splitlines(), answers.pop(0)  # type: ignore[arg-type]
        sent.append(len(lines))
        if isinstance(answer, int):
            raise urllib.error.HTTPError(request.full_url, answer, "busy", request.headers, None)  # type: ignore[arg-type]
        items = [{"id": f"{len(sent)}-{number}", "code": code} for number, code in enumerate(answer)]
        return io.BytesIO(json.dumps({"items": items, "refused": answer.count(429)}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    filled = Ledger(Lab("none", "http://edge", "token", {}, ""), "app1", None)
    monkeypatch.setattr(filled, "settle", lambda _: None)
    filled.fill(3)
    assert sent == [3, 3, 1] and len(filled.acknowledged) == 3
    assert len({one.text for one in filled.acknowledged.values()}) == 3
