"""The supervisor of a VM that somebody else launched, and will end: captures by command, schedule and reboot, and
nothing that would need to end or launch its QEMU.

When it ends, QEMU is as it was, but for what follows the guest's writes, which costs nothing and lets the next one go
on from the last generation; `detach` takes that away, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from base.errors import ConflictError, PerdureError, VirtualMachineError, one_line
from base.progress import Progress
from capture.generation import Captured, capture
from capture.trackers import ScanTracker
from perdure import documents
from perdure.supervision import leaving
from perdure.supervision.attaching import Attacher, Wanted
from perdure.supervision.borrowed import BorrowedMachine
from perdure.supervision.execution import settle_bitmaps
from perdure.supervision.guard import Guard
from perdure.supervision.machine import Machine
from perdure.supervision.preparing import Preparation
from perdure.supervision.rollback import Rollback, RolledBack
from perdure.supervision.supervisor import Begin, Ended, Supervisor
from store.repository import Repository
from vm.content import Place
from vm.hold import Cause, Hold

_END_SECONDS = 10
"""For a QEMU that may be about to end."""


class AttachedSupervisor(Supervisor):
    """One VM, from when it is attached to when it is left, or ends."""

    def __init__(
        self,
        preparation: Preparation,
        repository: Repository,
        say: Callable[[str], None],
        progress: Progress,
        wanted: Wanted,
    ) -> None:
        super().__init__(preparation, repository, say, progress)
        self.attacher = Attacher(self.local, wanted)
        self.left = f"runs on without Perdure: perdure attach --qmp {wanted.socket} goes on with it"
        self._guard: Guard | None = None

    async def stop(self, *, keep: bool) -> Ended:
        """Refused."""
        del keep
        self._refuse("stopped", f"stop it where it was launched, or leave it with perdure detach {self.vm}")

    async def roll_back(
        self, wanted: Rollback, progress: Progress, told: Callable[[str], None] | None = None
    ) -> RolledBack:
        """Refused."""
        del progress, told
        self._refuse("rolled back", f"end it, then perdure run VM.toml --from {wanted.point}")

    async def preview(self, wanted: Rollback) -> dict[str, Any]:
        """Refused."""
        self._refuse("rolled back", f"end it, then perdure run VM.toml --from {wanted.point}")

    async def reboot(self) -> Captured | None:
        """As with any VM, where reboots are held."""
        machine = self.machine
        if isinstance(machine, BorrowedMachine) and not machine.attachment.holds:
            self._refuse("rebooted", "its reboots are not held: reboot it where it was launched")
        return await super().reboot()

    async def detach(self) -> Ended:
        """Leave the VM, with nothing of ours in its QEMU. Raises PerdureError."""
        async with self.operation:
            machine = self.machine
            await self.draining.drop()
            assert isinstance(machine, BorrowedMachine)
            await machine.let_go()
            ended = Ended("detached", detached=True, forgotten=True)
            self._end(ended)
            return ended

    async def _start(self, begin: Begin, boot: bool | None, *, lazy: bool | None) -> None:
        del boot, lazy
        await self.in_store(lambda: begin(True, self._unless_leaving))
        machine = await self.attacher.attach(self.repository, self.in_store)
        self._guard = Guard(self.local.folder)
        await self.follow(machine)
        platform = machine.platform
        how = f"attached (pid {machine.pid}, QEMU {platform.version}, {platform.accelerator})"
        self.introduce(machine, machine.warnings, how)
        await settle_bitmaps(machine)
        waiting = await machine.pending_hold()
        if waiting is not None:
            await self._held(machine, waiting)
        else:
            leaving.note_going_on(self.local.folder)

    async def _held(self, machine: Machine, found: Hold) -> None:
        """A reboot as with any VM; after anything else QEMU does what it would have done without us."""
        if found.cause is Cause.REBOOT:
            await super()._held(machine, found)
            return
        self.state = "held"
        poweroff = found.cause is Cause.POWEROFF
        number = None
        if self.policy.capture_on_shutdown if poweroff else self.policy.capture_on_panic:
            done = await self.capturing.tried(machine, "shutdown" if poweroff else "panic")
            number = None if done is None else done.generation.number
        self._end(Ended("the guest shut down" if poweroff else "the guest panicked", generation=number))

    async def _died(self, machine: Machine) -> None:
        """What QEMU leaves of its memory is captured, if it leaves something: a backing file that still has a name."""
        async with self.operation:
            self._machine = None
            await self.draining.drop()
            self.say(f"{self.vm}: QEMU (process {machine.pid}) ended")
            await self._end_filling()
            done = None
            try:
                done = await self.in_store(lambda: self._salvage(machine))
            except PerdureError as error:
                self.say(f"{self.vm} NOT CAPTURED at its end: {one_line(error)}")
            await machine.disconnect()
            if done is not None:
                self.say(documents.made_text(done.generation, done.seconds)[0] + " (crash)")
            self._end(Ended("QEMU ended", generation=done.generation.number if done else None, forgotten=True))

    def _salvage(self, machine: Machine) -> Captured | None:
        """Blocking."""
        table = machine.table.regions
        regions = [replace(each, tracker=ScanTracker(), base=None) for each in machine.captured_regions(table)]
        if not regions or not all(_outlives(each.place) for each in regions):
            return None
        return capture(
            self.repository,
            self.vm,
            regions,
            machine.journal,
            None,
            cause="crash",
            parent=machine.parent,
            metadata=machine.metadata(table),
            progress=self.progress,
        )

    async def _let_go(self) -> None:
        machine = self._machine
        await super()._let_go()
        if self._guard is not None:
            guard, self._guard = self._guard, None
            well = not isinstance(machine, BorrowedMachine) or machine.put_back
            if not await self.in_store(lambda: guard.dismiss(well=well)) and machine is not None:
                self.say(
                    f"{self.vm}: QEMU (process {machine.pid}) does not answer: when it does, a process that stays for "
                    "that leaves it as it was found"
                )

    async def reconnect(self, machine: Machine, error: VirtualMachineError) -> None:
        """Its QEMU is left as it was found: who else might have it now is not known."""
        if await self.in_store(lambda: machine.qemu.wait(_END_SECONDS)):
            return
        raise VirtualMachineError(f"{one_line(error)}; {self.vm} {self.left}") if machine.monitor.lost else error

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise ConflictError(f"VM {self.vm} was not launched by Perdure, and is not {what} by it: {instead}")


def _outlives(place: Place) -> bool:
    """Whether memory is there when QEMU is not: in a file that still has a name."""
    return isinstance(place, Path) and not place.is_relative_to("/proc") and place.exists()
