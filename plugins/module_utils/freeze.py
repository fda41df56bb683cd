"""Freeze windows: when nothing is deployed. Pure: windows and the moment come in, findings go out.

A window is either one span (``from``, ``to``: local date and time) or comes back every week (``weekly``:
``fri 16:00 - mon 06:00``), always in a named time zone, whose clock changes count: a window ends when the clocks there
say so. Each has a reason.
"""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WEEK = 7 * 24 * 60
_WEEKLY = re.compile(r"([a-z]{3}) (\d\d?):(\d\d) *- *([a-z]{3}) (\d\d?):(\d\d)")
_KEYS = {"reason", "time_zone", "from", "to", "weekly"}


class WindowError(Exception):
    """What is wrong with a window, in words for the user."""


@dataclass(frozen=True)
class Window:
    """A window that was read. *span*: the two local moments; *minutes*: begin and end in the week, Monday 00:00 is 0."""

    reason: str
    text: str
    zone: zoneinfo.ZoneInfo
    span: tuple[datetime.datetime, datetime.datetime] | None = None
    minutes: tuple[int, int] = (0, 0)

    def end(self, moment: datetime.datetime) -> datetime.datetime | None:
        """Return when the window ends that holds *moment*; None if it does not. Its end is no longer part of it."""
        if self.span:
            return self.span[1] if self.span[0] <= moment < self.span[1] else None
        local = moment.astimezone(self.zone)
        begin, end = self.minutes
        minute = local.weekday() * 1440 + local.hour * 60 + local.minute
        if (minute - begin) % WEEK >= (end - begin) % WEEK:
            return None
        day = local.date() + datetime.timedelta(days=(end // 1440 - local.weekday()) % 7)
        found = datetime.datetime.combine(day, datetime.time(end % 1440 // 60, end % 60), self.zone)
        return found if found > moment else found + datetime.timedelta(days=7)


def read(window: Any) -> Window:
    """Return the window that the mapping *window* describes; raise WindowError with what is wrong with it."""
    if not isinstance(window, Mapping) or not set(window) <= _KEYS:
        raise WindowError(f"has other keys than {', '.join(sorted(_KEYS))}")
    missing = [key for key in ("reason", "time_zone") if not window.get(key)]
    if missing:
        raise WindowError(f"lacks {' and '.join(missing)}")
    if ("weekly" in window) == ("from" in window or "to" in window):
        raise WindowError("needs either weekly, or from and to")
    try:
        zone = zoneinfo.ZoneInfo(str(window["time_zone"]))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise WindowError(
            f"has the unknown time_zone {window['time_zone']!r}; for instance Europe/Berlin or UTC"
        ) from None
    reason = str(window["reason"])
    if "weekly" in window:
        begin, end = _weekly(str(window["weekly"]))
        return Window(reason, f"every week {window['weekly']} {zone.key}", zone, minutes=(begin, end))
    first, last = _moment(window, "from", zone), _moment(window, "to", zone)
    if last <= first:
        raise WindowError(f"ends ({window['to']}) before it begins ({window['from']})")
    return Window(reason, f"{first:%Y-%m-%d %H:%M} - {last:%Y-%m-%d %H:%M} {zone.key}", zone, span=(first, last))


def _moment(window: Mapping[str, Any], key: str, zone: zoneinfo.ZoneInfo) -> datetime.datetime:
    value = window.get(key)
    try:
        # YAML makes some of these texts a date or a time by itself.
        found = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise WindowError(f"has no date and time in {key!r}, like '2026-12-18 16:00', but {value!r}") from None
    if found.tzinfo:
        raise WindowError(f"has an offset of its own in {key!r}: {value}. Its time_zone says what the clock means")
    return found.replace(tzinfo=zone)


def _weekly(text: str) -> tuple[int, int]:
    found = _WEEKLY.fullmatch(text.strip().lower())
    minutes = []
    for day, hour, minute in (found.group(1, 2, 3), found.group(4, 5, 6)) if found else ():
        if day in DAYS and int(hour) < 24 and int(minute) < 60:
            minutes.append(DAYS.index(day) * 1440 + int(hour) * 60 + int(minute))
    if len(minutes) != 2:
        raise WindowError(f"has weekly {text!r}; it is written like 'fri 16:00 - mon 06:00'")
    if minutes[0] == minutes[1]:
        raise WindowError(f"has weekly {text!r}, which ends where it begins")
    return minutes[0], minutes[1]


def findings(windows: Sequence[Any], override: str, moment: float) -> list[str]:
    """Return what keeps a deploy from beginning at the Unix time *moment*: windows in force, and windows that are wrong.

    With a reason in *override* those in force keep nobody; wrong ones still do, because nobody knows what they meant.
    """
    remedy = " Wait, or say why it cannot: -e deploy_freeze_override='REASON'. A rollback is never frozen."
    now = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    wrong, known = _readable(windows)
    told = [] if override.strip() else [_told(window, now) for window in known]
    return wrong + [text + remedy for text in told if text]


def in_force(windows: Sequence[Any], moment: float) -> list[str]:
    """Return the windows in force at the Unix time *moment*, and those that are wrong, in words."""
    wrong, known = _readable(windows)
    told = [_told(window, datetime.datetime.fromtimestamp(moment, datetime.UTC)) for window in known]
    return wrong + [text for text in told if text]


def _readable(windows: Sequence[Any]) -> tuple[list[str], list[Window]]:
    wrong, known = [], []
    for number, window in enumerate(windows, 1):
        try:
            known.append(read(window))
        except WindowError as error:
            wrong.append(f"deploy_freeze_windows: window {number} {error}.")
    return wrong, known


def _told(window: Window, now: datetime.datetime) -> str:
    end = window.end(now)
    if not end:
        return ""
    return (
        f"Deploys are frozen until {end:%a %Y-%m-%d %H:%M %Z} ({_left(end - now)} left): {window.reason} "
        f"({window.text}; deploy_freeze_windows)."
    )


def _left(span: datetime.timedelta) -> str:
    minutes = int(span.total_seconds() // 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min"
