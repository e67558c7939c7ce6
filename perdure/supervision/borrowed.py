"""A machine in a QEMU that somebody else launched: it is stopped only if it runs, and left as it was found.

As perdure.supervision.machine; what a VM that is not ours cannot have is not here, but refused by the supervisor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from base.errors import ConflictError, PerdureError, VirtualMachineError
from base.units import format_size
from perdure.supervision import leaving
from perdure.supervision.leaving import Attachment
from perdure.supervision.machine import Machine
from vm import bitmaps, hold
from vm.channel import GuestHandler
from vm.content import Place, ProcessRange

_QUIT_SECONDS = 10


class BorrowedMachine(Machine):
    """`private`: by name, what of its memory is QEMU's alone; `problems` are why there can be no full generation,
    whatever QEMU says; `put_back` is whether it was left as it was found."""

    __slots__ = ("_runs", "attachment", "private", "problems", "put_back")

    def __init__(
        self, machine: Machine, attachment: Attachment, private: Mapping[str, ProcessRange], problems: tuple[str, ...]
    ) -> None:
        for each in fields(Machine):
            setattr(self, each.name, getattr(machine, each.name))
        self.attachment, self.private, self.problems = attachment, private, problems
        self.full_problems = (*problems, *self.full_problems)
        self.put_back = False
        self._runs = True

    def places(self) -> dict[str, tuple[Place, int]]:
        """Of what can be captured."""
        mine: dict[str, tuple[Place, int]] = {name: (each, each.size) for name, each in self.private.items()}
        return {**Machine.places(self), **mine}

    def open_channel(self, handler: GuestHandler, say: Callable[[str], None]) -> None:
        """If there is one."""
        if self.attachment.agent is not None:
            Machine.open_channel(self, handler, say)

    async def stop(self) -> None:
        """Pause the guest, if it runs: what somebody else has stopped stays so."""
        self._runs = False  # as far as is known, should there be no answer
        self._runs = await self.monitor.query_status() == "running"
        if self._runs:
            leaving.note_stopped(self.qemu.folder, leaving.CAPTURE)
            await self.monitor.stop()

    async def cont(self) -> None:
        """Let it go on, if it ran."""
        if self._runs:
            await self.monitor.cont()
            leaving.note_going_on(self.qemu.folder)

    async def go_on(self) -> None:
        """The same, unless it had just stopped itself: then it is held."""
        if self._runs:
            await Machine.go_on(self)
            leaving.note_going_on(self.qemu.folder)

    async def next_hold(self) -> hold.Hold | None:
        """Where reboots are not held, only QEMU's end is waited for."""
        if self.attachment.holds:
            found = await Machine.next_hold(self)
            if found is not None:
                leaving.note_stopped(self.qemu.folder, found.cause.value)
            return found
        try:
            while True:
                await self.holds.next()
                if self.channel is not None:
                    self.channel.reset()
        except VirtualMachineError:
            if await asyncio.to_thread(self.qemu.wait, _QUIT_SECONDS):
                return None
            raise

    async def held(self) -> bool:
        """A guest whose reboots are not ours to hold is never held for us."""
        return self.attachment.holds and await Machine.held(self)

    async def pending_hold(self) -> hold.Hold | None:
        """By what was noted; a guest that stopped itself after that, and before anybody noted it, has rebooted."""
        status = await self.monitor.query_status()
        if not self.attachment.holds or status not in hold.HELD_STATES:
            return None
        why = leaving.stopped_for(self.qemu.folder)
        if status == "guest-panicked":
            why = hold.Cause.PANIC.value
        causes = {each.value: each for each in hold.Cause}
        return hold.Hold(causes.get(why or "", hold.Cause.REBOOT), "unknown")

    async def go_on_after_hold(self) -> None:
        """Reset, and let the guest boot."""
        await Machine.go_on_after_hold(self)
        leaving.note_going_on(self.qemu.folder)

    def scrub(self) -> int:
        """Only if that was asked for: memory that is not ours is not made zero."""
        return Machine.scrub(self) if self.attachment.scrubs else 0

    def scrubbed_text(self, scrubbed: int) -> str:
        """What was done to memory that is not kept."""
        return f"{format_size(scrubbed)} scrubbed, verified" if self.attachment.scrubs else "nothing scrubbed"

    async def require_full(self) -> None:
        """As with a machine of ours; and a guest that is paused could not be left so."""
        await Machine.require_full(self)
        self.full_problems = (*self.problems, *self.full_problems)
        if self.problems:
            raise ConflictError(f"VM {self.description.name} cannot be captured in full: {'; '.join(self.problems)}")
        status = await self.monitor.query_status()
        if status != "running":
            raise ConflictError(
                f"VM {self.description.name} cannot be captured in full while it is stopped ({status}): let it go on"
            )

    def status(self) -> dict[str, Any]:
        """Facts for `perdure status`."""
        attachment = self.attachment
        document = Machine.status(self)
        document["console"] = None
        document["attached"] = {
            "socket": attachment.socket,
            "agent": attachment.agent,
            "reboots": attachment.reboots,
            "scrubs": attachment.scrubs,
            "memory": {name: "private" if name in self.private else "shared" for name in self.places()},
        }
        return document

    async def let_go(self) -> None:
        """Take away what follows the VM, too: the next one who attaches begins anew. Raises PerdureError."""
        await bitmaps.settle(self.monitor, dict.fromkeys(self.disks))

        def untrack() -> None:
            for tracker in self.tracking.trackers.values():
                tracker.detach()
            if self.tracking.descriptor is not None:
                self.tracking.descriptor.end()

        await asyncio.to_thread(untrack)

    async def disconnect(self) -> None:
        """Leave QEMU as it was found."""
        try:
            await leaving.put_back(self.monitor, self.qemu.folder, self.attachment)
            self.put_back = True
        except (PerdureError, OSError):  # it has ended, or its guard tries again
            self.put_back = not self.qemu.alive()
        await Machine.disconnect(self)
