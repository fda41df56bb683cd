"""The judge of the proof of recovery finds each kind of loss."""

from __future__ import annotations

from tests.recovery.ledger import Acknowledged, Stored, judge

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
