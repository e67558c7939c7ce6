"""When a VM's schedules want a capture. Pure: whoever holds a `Timetable` asks it, and says what time it is.

A point that is passed over (the host slept, a capture took longer) is made up for once, not once for each. Points that
are due together are one capture. Where the clock is set back, points that lie ahead again count again, but for those of
the last hour, which were dealt with; where it is set on, what was passed over is made up for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vm.policy import Schedule

_DEALT_WITH = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Due:
    """One capture that is to be made."""

    full: bool
    tags: tuple[str, ...]


class Timetable:
    """The schedules of one VM, from an instant on. Belongs to one thread."""

    def __init__(self, vm: str, schedules: Sequence[Schedule], now: datetime) -> None:
        self._entries = [_Entry(schedule, vm, now) for schedule in schedules]

    @property
    def next(self) -> tuple[datetime, Due] | None:
        """When the next capture is due, as things are now, and what it will be; None without schedules."""
        if not self._entries:
            return None
        at = min(entry.at for entry in self._entries)
        return at, _together([entry for entry in self._entries if entry.at == at])

    def due(self, now: datetime) -> Due | None:
        """What is to be captured now, if anything; from then on it counts as done."""
        found = [entry for entry in self._entries if entry.pass_by(now)]
        return _together(found) if found else None


class _Entry:
    """One schedule, and its next point."""

    def __init__(self, schedule: Schedule, vm: str, now: datetime) -> None:
        self.schedule = schedule
        self._points = schedule.points(vm)
        self._done = datetime.min.replace(tzinfo=UTC)
        self.at = self._after(now)

    def pass_by(self, now: datetime) -> bool:
        """Whether the point has come; then the next one is the next."""
        if now >= self.at:
            self._done = now
            self.at = self._after(now)
            return True
        floor = self._done if self._done - now < _DEALT_WITH else now
        self.at = min(self.at, self._after(max(now, floor)))
        return False

    def _after(self, instant: datetime) -> datetime:
        return min(point.after(instant) for point in self._points)


def _together(entries: Sequence[_Entry]) -> Due:
    schedules = [entry.schedule for entry in entries]
    tags = dict.fromkeys(tag for schedule in schedules for tag in schedule.tags)
    return Due(any(schedule.full for schedule in schedules), tuple(tags))
