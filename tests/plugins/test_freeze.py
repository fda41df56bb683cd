"""Freeze windows at injected moments: spans, weeks, time zones and clock changes, and what is wrong with a window."""

from __future__ import annotations

import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from ansible.module_utils import freeze

BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"
WEEKEND = {"reason": "weekend", "weekly": "fri 16:00 - mon 06:00", "time_zone": BERLIN}


def at(text: str, zone: str = BERLIN) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def frozen(window: dict[str, Any], moment: float) -> bool:
    return freeze.findings([window], "", moment) != []


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-27 15:59:59", False),  # a Friday
        ("2026-11-27 16:00", True),
        ("2026-11-28 12:00", True),
        ("2026-11-30 05:59:59", True),
        ("2026-11-30 06:00", False),
        ("2026-12-02 12:00", False),
    ],
)
def test_a_weekly_window_holds_its_begin_and_not_its_end(moment: str, expected: bool) -> None:
    assert frozen(WEEKEND, at(moment)) is expected


@pytest.mark.parametrize(
    ("weekly", "inside", "outside"),
    [
        ("mon 09:00 - mon 10:00", "2026-11-30 09:30", "2026-11-30 10:30"),
        ("mon 10:00 - mon 09:00", "2026-11-30 10:30", "2026-11-30 09:30"),  # all but an hour
        ("sun 23:00 - mon 01:00", "2026-11-30 00:30", "2026-11-30 01:00"),
        ("Fri 9:00-Fri 17:30", "2026-11-27 17:29", "2026-11-27 17:30"),
    ],
)
def test_a_week_has_no_end(weekly: str, inside: str, outside: str) -> None:
    window = {**WEEKEND, "weekly": weekly}
    assert frozen(window, at(inside)) and not frozen(window, at(outside))


def test_each_window_has_its_own_clock() -> None:
    moment = at("2026-11-27 16:30")
    assert frozen(WEEKEND, moment)
    assert not frozen({**WEEKEND, "time_zone": NEW_YORK}, moment)
    assert frozen({**WEEKEND, "time_zone": NEW_YORK}, at("2026-11-27 16:30", NEW_YORK))


@pytest.mark.parametrize(
    ("now", "hours"),
    [("2026-03-28 06:00", 47), ("2026-10-24 06:00", 49), ("2026-11-28 06:00", 48)],  # clocks change on the Sunday
)
def test_a_clock_change_inside_moves_the_end(now: str, hours: int) -> None:
    end = freeze.read(WEEKEND).end(datetime.datetime.fromtimestamp(at(now), datetime.UTC))
    assert end is not None and (end.hour, end.minute, end.weekday()) == (6, 0, 0)
    assert end.timestamp() - at(now) == hours * 3600


def test_a_span_is_as_its_clock_says_also_where_yaml_reads_a_time() -> None:
    text = "{reason: year end, from: 2026-12-18 16:00, to: 2027-01-04 06:00:00, time_zone: Europe/Berlin}"
    window = yaml.safe_load(text)
    assert isinstance(window["to"], datetime.datetime)
    for moment, expected in (
        ("2026-12-18 15:59", False),
        ("2026-12-18 16:00", True),
        ("2027-01-04 05:59", True),
        ("2027-01-04 06:00", False),
    ):
        assert frozen(window, at(moment)) is expected
    day = {"reason": "a day", "from": "2026-12-24", "to": "2026-12-25", "time_zone": BERLIN}
    assert frozen(day, at("2026-12-24 00:00")) and not frozen(day, at("2026-12-25 00:00"))


def test_a_finding_names_window_end_and_the_way_round() -> None:
    (found,) = freeze.findings([WEEKEND], "", at("2026-11-28 05:30"))
    assert "frozen until Mon 2026-11-30 06:00 CET (2 d 0 h left): weekend" in found
    assert "every week fri 16:00 - mon 06:00 Europe/Berlin" in found
    assert "-e deploy_freeze_override=" in found
    assert "(0 h 30 min left)" in freeze.findings([WEEKEND], "", at("2026-11-30 05:30"))[0]


def test_all_windows_in_force_are_named_and_a_reason_overrides_them() -> None:
    year = {"reason": "year end", "from": "2026-11-01", "to": "2027-01-04", "time_zone": "UTC"}
    moment = at("2026-11-28 12:00")
    assert len(freeze.findings([WEEKEND, year], "", moment)) == 2
    assert freeze.findings([WEEKEND, year], "the site is down", moment) == []
    assert len(freeze.findings([WEEKEND, year], "  ", moment)) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weekly": "friday 16:00 - mon 06:00"}, "written like"),
        ({"weekly": "fri 24:00 - mon 06:00"}, "written like"),
        ({"weekly": "fri 16:00 - fri 16:00"}, "ends where it begins"),
        ({"time_zone": "Berlin"}, "unknown time_zone 'Berlin'"),
        ({"time_zone": "../../etc/passwd"}, "unknown time_zone"),
        ({"time_zone": ""}, "lacks time_zone"),
        ({"reason": None}, "lacks reason"),
        ({"from": "2026-12-18"}, "either weekly, or from and to"),
        ({"until": "x"}, "other keys"),
    ],
)
def test_a_wrong_window_stops_a_deploy_even_with_a_reason(change: dict[str, Any], says: str) -> None:
    (found,) = freeze.findings([WEEKEND | change], "a reason", at("2026-12-02 12:00"))
    assert "window 1" in found and says in found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"to": "2026-12-18 15:00"}, "before it begins"),
        ({"to": "soon"}, "no date and time in 'to'"),
        ({"from": "2026-12-18T16:00+01:00"}, "an offset of its own"),
    ],
)
def test_a_wrong_span_is_named(change: dict[str, Any], says: str) -> None:
    span = {"reason": "r", "from": "2026-12-18 16:00", "to": "2026-12-19 16:00", "time_zone": BERLIN} | change
    (found,) = freeze.findings([span], "", at("2026-12-02 12:00"))
    assert says in found


def test_what_is_no_window_is_named() -> None:
    assert "window 2" in freeze.findings([WEEKEND, "fri"], "x", at("2026-12-02 12:00"))[0]
