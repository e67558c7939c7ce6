"""What a supervisor does beside a running VM without being asked: captures by schedule.

Tasks of the supervisor's event loop. What fails is said, and tried again when it is due again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from base.errors import PerdureError, one_line
from perdure.supervision.schedule import Due, Timetable

_LOOK_SECONDS = 15.0
"""Between two looks at the clock, at most: it may be set, and a host that slept has slept the loop's clock, too."""

Capture = Callable[[Due], Awaitable[object]]


async def keep_schedule(vm: str, timetable: Timetable, capture: Capture, say: Callable[[str], None]) -> None:
    """Make what is due, until cancelled or there is nothing that will ever be due."""
    while (following := timetable.next) is not None:
        wait = (following[0] - datetime.now(UTC)).total_seconds()
        await asyncio.sleep(min(max(wait, 0.0), _LOOK_SECONDS))
        due = timetable.due(datetime.now(UTC))
        if due is not None:
            try:
                await capture(due)
            except PerdureError as error:
                say(f"{vm} NOT CAPTURED on schedule: {one_line(error)}")


def schedule_document(timetable: Timetable) -> dict[str, Any] | None:
    """For `perdure status`: when the next capture is due (RFC 3339) and whether it is a full one."""
    following = timetable.next
    if following is None:
        return None
    at, due = following
    return {"at": at.isoformat(timespec="seconds"), "full": due.full, "tags": list(due.tags)}
