"""What a supervisor does beside a running VM without being asked: captures by schedule, write-back, keys.

Tasks of the supervisor's event loop. What fails is said, whatever it was, and tried again when it is due again: nobody
would notice that one of them had ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from base.errors import ConflictError, explained
from perdure.supervision.schedule import Due, Timetable

if TYPE_CHECKING:
    from perdure.supervision.supervisor import Supervisor

_LOOK_SECONDS = 15.0
"""Between two looks at the clock, at most: it may be set, and a host that slept has slept the loop's clock, too."""
_AGAIN_SECONDS = 30.0
"""After write-back, or taking new keys, has failed."""
_KEYS_SECONDS = 1.0
"""Between two looks for a newer keyring."""

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
            except Exception as error:
                say(f"{vm} NOT CAPTURED on schedule: {explained(error)}")


async def keep_drained(vm: str, step: Callable[[], Awaitable[float]], say: Callable[[str], None]) -> None:
    """Store dirty pages ahead, a step at a time, until cancelled; each says how long to wait before the next one."""
    said = ""
    while True:
        try:
            wait = await step()
            said = ""
        except Exception as error:
            if explained(error) != said:  # a full disk, say, is full the next time, too
                said = explained(error)
                say(f"{vm}: dirty pages are not stored ahead: {said}")
            wait = _AGAIN_SECONDS
        await asyncio.sleep(wait)


async def keep_keys(supervisor: Supervisor) -> None:
    """Take the newest keys while servers of memory or disks may need what others seal with them, until cancelled."""
    said = ""
    while True:
        await asyncio.sleep(_KEYS_SECONDS)
        if not _served(supervisor):
            continue
        try:
            await supervisor.in_store(supervisor.repository.renew_keys)
            said = ""
        except Exception as error:
            if explained(error) != said:
                said = explained(error)
                supervisor.say(f"{supervisor.vm}: what is sealed with new keys cannot be read for it: {said}")
            await asyncio.sleep(_AGAIN_SECONDS)  # a passphrase takes a third of a second to try


def _served(supervisor: Supervisor) -> bool:
    """Whether memory or disks come from the repository just now."""
    lazy, filling = supervisor.launcher.lazy, supervisor.filling
    with suppress(ConflictError):  # there is no VM just now
        lazy = lazy or supervisor.machine.lazy
    return lazy is not None or (filling is not None and filling.busy)


def schedule_document(timetable: Timetable) -> dict[str, Any] | None:
    """For `perdure status`: when the next capture is due (RFC 3339) and whether it is a full one."""
    following = timetable.next
    if following is None:
        return None
    at, due = following
    return {"at": at.isoformat(timespec="seconds"), "full": due.full, "tags": list(due.tags)}
