"""Write-back of a running VM: when its dirty pages are stored ahead, and what `perdure status` says of that.

A piece of work at a time, under the supervisor's lock and in the repository's thread: whatever is asked of the
supervisor waits for a tenth of a second at most, or for one where QEMU does not answer. All supervisors of a host share
one budget.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from base.errors import PerdureError
from capture.making import Making
from capture.pace import Budget
from capture.pause import expected_ms
from capture.writeback import WriteBack
from perdure.supervision import following
from perdure.supervision.budget import HostBudget

if TYPE_CHECKING:
    from perdure.supervision.supervisor import Supervisor

_BUSY_SECONDS = 0.5
"""Between looks whether write-back may go on."""
_LOOK_SECONDS = 2.0
"""Between looks whether memory is still to be followed in the same way."""
_ANSWER_SECONDS = 1.0
"""For QEMU to answer that, since others wait for the lock; if it does not, nothing is stored ahead for now."""
_PATIENCE_SECONDS = 0.3
"""For counting what is dirty; while a capture is made, what was counted last is told."""


class Draining:
    """Of one supervisor's VM."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        description = supervisor.local.description
        policy = description.policy
        share = policy.background_cpu_percent / 100
        self._writeback = WriteBack(
            supervisor.repository, supervisor.vm, Budget(int(policy.background_bandwidth), share)
        )
        self._turns = HostBudget(supervisor.local.folder.path.parent / ".background", share)
        self._look_at = 0.0
        self.wanted = policy.write_back == "on" or (policy.write_back == "auto" and bool(description.schedules))
        """Whether dirty pages are stored ahead, by the policy."""

    async def step(self) -> float:
        """Do a piece of work, if it is time for one; seconds to wait before the next. Raises PerdureError."""
        supervisor = self._supervisor
        if supervisor.operation.locked() or not supervisor.undisturbed:
            return _BUSY_SECONDS
        async with supervisor.operation:
            machine, full = supervisor.machine, self._next_is_full
            if machine.lazy is not None:  # what is not there yet looks like zeros
                return _BUSY_SECONDS
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + _LOOK_SECONDS
                await following.renew(supervisor, machine, _ANSWER_SECONDS)
            if (wait := self._turns.begin()) > 0:
                return wait
            began = time.process_time()
            try:
                return await supervisor.in_store(lambda: self._writeback.step(machine.plan(full=full), machine.journal))
            finally:
                self._turns.end(time.process_time() - began)

    def take(self) -> Making | None:
        """What was stored ahead: the capture's from now on."""
        return self._writeback.take()

    async def drop(self) -> None:
        """Give up what was stored ahead."""
        await self._supervisor.in_store(self._writeback.drop)

    def close(self) -> None:
        """Let go of the turns."""
        self._turns.close()

    async def document(self) -> dict[str, Any]:
        """Bytes, bytes a second and milliseconds. `state` is on, off, or why nothing can be stored ahead."""
        supervisor = self._supervisor
        machine, full = supervisor.machine, self._next_is_full

        def count() -> None:
            with suppress(PerdureError):  # QEMU may have ended
                self._writeback.observe(machine.plan(full=full))

        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(supervisor.in_store(count))), _PATIENCE_SECONDS)
        standing = self._writeback.standing
        expected = expected_ms(machine.pauses, standing.dirty_bytes, standing.dirty_rate, full=full)
        return {
            "state": (standing.reason or "on") if self.wanted else "off",
            "dirty_bytes": standing.dirty_bytes,
            "stored_ahead_bytes": standing.stored_bytes,
            "dirty_rate": round(standing.dirty_rate),
            "drain_rate": round(standing.drain_rate),
            "expected_pause_ms": round(expected, 1),
        }

    @property
    def _next_is_full(self) -> bool:
        """Whether the next capture is a full one: by schedule, or else as the last one was."""
        following, latest = self._supervisor.timetable.next, self._supervisor.machine.parent
        return following[1].full if following is not None else latest is not None and latest.full
