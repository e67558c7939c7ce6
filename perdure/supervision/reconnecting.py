"""A session with QEMU's monitor that is lost while QEMU lives on: another one is made in its place, and what the guest
did meanwhile, or we had begun, is seen to, as at a take-over.

What waited for an answer when it was lost has failed by itself; what did not need QEMU just then goes on. Holds are not
missed: QEMU's state and the event journal tell of those that began in between. A guest that we had stopped goes on; one
that somebody else has stopped stays so.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING

from base.errors import VirtualMachineError, one_line
from perdure.supervision.execution import settle_bitmaps
from perdure.supervision.machine import Machine
from vm import disks, hold, migration

if TYPE_CHECKING:
    from perdure.supervision.supervisor import Supervisor

_QUIET_SECONDS = 2.0
"""A QEMU that ends closes its monitor first; until then nothing is said."""
_APART_SECONDS = 1.0
"""At least, between two sessions: what ends each of them at once must not keep us busy. Also between attempts."""
_ATTEMPT_SECONDS = 0.5


class Reconnecting:
    """Of one supervisor, in its loop."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._made_at = float("-inf")

    async def after(self, machine: Machine, error: VirtualMachineError) -> None:
        """Have a session again after one has ended with `error`, however long that takes, and see to what may have been
        left half done; or return when QEMU has ended. Raises that error if the session has not ended, and
        VirtualMachineError if there is one again in which QEMU does not answer."""
        supervisor = self._supervisor
        while supervisor.is_of(machine):
            if not machine.monitor.lost:
                raise error
            if not await self._connected(machine):
                return
            supervisor.say(f"{supervisor.vm}: the connection to QEMU's monitor was lost, and was made again")
            try:
                async with supervisor.operation:
                    if supervisor.is_of(machine):
                        await self._see_to(machine)
                return
            except VirtualMachineError as again:  # it may have been lost once more
                error = again

    async def _connected(self, machine: Machine) -> bool:
        """False: QEMU has ended."""
        supervisor, clock, timeout_s = self._supervisor, asyncio.get_running_loop().time, _QUIET_SECONDS
        await asyncio.sleep(self._made_at + _APART_SECONDS - clock())
        while True:
            try:
                await machine.monitor.connect_again(timeout_s)
                self._made_at = clock()
                return True
            except VirtualMachineError as error:
                if not machine.qemu.alive():
                    return False
                if not supervisor.operation.locked():  # or a capture would be torn that is in its pause
                    machine.go_on_without_session()
                if timeout_s == _QUIET_SECONDS:
                    supervisor.say(f"{one_line(error)}; the connection was lost, and is tried until there is one again")
            timeout_s = _ATTEMPT_SECONDS
            await asyncio.sleep(_APART_SECONDS)

    async def _see_to(self, machine: Machine) -> None:
        supervisor, filling, monitor = self._supervisor, self._supervisor.filling, machine.monitor
        machine.holds.clear()  # what they told shows in QEMU's state
        await hold.hold_on_reset(monitor)
        waiting = await machine.pending_hold()
        if waiting is None:  # first of all, since it may stand still for us
            if monitor.stopped and await machine.go_on_if_paused():
                supervisor.say(f"{supervisor.vm} was paused, and goes on")
            supervisor.state = "running"  # also where a reboot was carried out, and its last answer was lost
        await migration.clean_up(monitor)
        if machine.disks:
            async with filling.paused() if filling is not None else nullcontext():
                await disks.release(monitor, machine.qemu.folder)
                await settle_bitmaps(machine)
        if waiting is not None:
            await supervisor.go_on_from_hold(machine, waiting)
