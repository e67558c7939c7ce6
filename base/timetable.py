"""When something is to be done again and again: every so often, or at times of day in a time zone. Pure.

`Interval` counts seconds since 1970 in UTC, from a phase: neither a restart nor a clock that changes to or from
daylight saving moves its points. `WallTime` is a time of day on some days of the week, by the rules of a time zone:

- a time that a day has twice, since the clock goes back, counts once, the first time;
- a time that a day does not have, since the clock goes on, counts at the instant at which the clock goes on.

All instants that are given and returned are aware datetimes; those that are returned are in UTC.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from zoneinfo import ZoneInfo

INTERVAL_SECONDS_MIN = 1
INTERVAL_SECONDS_MAX = 366 * 24 * 3600

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SPAN = re.compile(r"(\d{1,9})(min|[smhd])")
_SPAN_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_WALL = re.compile(r"(?:([A-Za-z.,]+)\s+)?(\d{1,2}):(\d{2})(?::(\d{2}))?")


@dataclass(frozen=True, slots=True)
class Interval:
    """Every `seconds`, at `phase` seconds (0 <= phase < seconds) after multiples of them."""

    seconds: int
    phase: int = 0

    def after(self, instant: datetime) -> datetime:
        """The first point after an instant."""
        since = (instant - _EPOCH) / timedelta(seconds=1)
        return _EPOCH + timedelta(
            seconds=(math.floor((since - self.phase) / self.seconds) + 1) * self.seconds + self.phase
        )


@dataclass(frozen=True, slots=True)
class WallTime:
    """At a time of day on `days` (0 is Monday) in `zone`."""

    at: time
    days: frozenset[int]
    zone: tzinfo

    def after(self, instant: datetime) -> datetime:
        """The first point after an instant."""
        today = instant.astimezone(self.zone).date()
        for ahead in range(
            -1, 9
        ):  # yesterday's, where its time comes after midnight; a week, and a day that is left out
            day = today + timedelta(days=ahead)
            if day.weekday() in self.days:
                found = _instant(day, self.at, self.zone)
                if found > instant:
                    return found
        raise AssertionError("a week has all days")


def parse_interval(text: str) -> int:
    """Seconds from `15m`, `1h30m`, `2d`. Raises ValueError."""
    compact = "".join(text.split())
    parts = _SPAN.findall(compact)
    if not parts or "".join(count + unit for count, unit in parts) != compact:
        raise ValueError(f"{text!r} is no span of time: write it as in 15m, 1h30m or 2d")
    seconds = sum(int(count) * _SPAN_SECONDS[unit] for count, unit in parts)
    if not INTERVAL_SECONDS_MIN <= seconds <= INTERVAL_SECONDS_MAX:
        raise ValueError(f"{text!r} is not between a second and a year")
    return seconds


def parse_wall_time(text: str) -> tuple[time, frozenset[int]]:
    """Time of day and days of the week from `02:00`, `Mon..Fri 12:30` or `Sat,Sun 04:00:30`. Raises ValueError."""
    match = _WALL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time of day: write it as in 02:00, Mon..Fri 12:30 or Sat,Sun 04:00")
    try:
        at = time(int(match[2]), int(match[3]), int(match[4] or 0))
    except ValueError as error:
        raise ValueError(f"{text!r} is no time of day: {error}") from error
    return at, _days(match[1], text)


def parse_zone(name: str) -> tzinfo:
    """A time zone by its IANA name, as Europe/Berlin. Raises ValueError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # unknown, malformed, a folder of zones
        raise ValueError(f"{name!r} is no time zone of this host: write it as in Europe/Berlin, or UTC") from error


def local_zone() -> tzinfo:
    """The host's time zone: $TZ if it names one, else /etc/localtime, else UTC."""
    try:
        name = os.environ.get("TZ", "").lstrip(":")
        if name:
            return ZoneInfo(name)
        with open("/etc/localtime", "rb") as file:
            return ZoneInfo.from_file(file, key="local")
    except (KeyError, ValueError, OSError):
        return UTC


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        ends = [_day(each, whole) for each in ((first, last) if dots else (first,))]
        found |= {(ends[0] + step) % 7 for step in range((ends[-1] - ends[0]) % 7 + 1)}
    return frozenset(found)


def _day(text: str, whole: str) -> int:
    word = text[:3].capitalize()
    if len(text) < 3 or word not in _DAYS:
        raise ValueError(f"{whole!r}: {text!r} is no day of the week: write {', '.join(_DAYS)}")
    return _DAYS.index(word)


def _instant(day: date, at: time, zone: tzinfo) -> datetime:
    """When a clock in the zone first shows that time on that day, or goes on over it."""
    wall = datetime.combine(day, at)
    early, late = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (1, 0))
    if late.astimezone(zone).replace(tzinfo=None) == wall:
        return late
    # In a gap, fold 1 counts with the offset from after the change, which gives an instant before it, fold 0 the other
    # way round. Source: PEP 495.
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + timedelta(seconds=(late - early) // timedelta(seconds=2))
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late
