"""What a capture, which runs in the repository's thread, has done by the supervisor's loop: the guest stopped and
continued, its devices saved, its disks kept at that instant.

`Execution` and `DiskInstant` are capture.pause's and capture.disks' protocols on a `Machine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from base.errors import ConflictError, VirtualMachineError
from base.extents import Extents
from capture.disks import CapturedDisk, token_of
from perdure.supervision import following
from perdure.supervision.machine import Machine
from perdure.supervision.quiescing import Instant
from store.records import Generation
from vm import bitmaps, disks, migration
from vm.bitmaps import Followed
from vm.nbd import Export
from vm.regions import Regions

T = TypeVar("T")
"""Result of a coroutine."""


class Execution:
    """Stops and continues the guest.

    `leave_stopped`: what is captured is all that will have been; the supervisor continues it if that comes to nothing.
    `quiesced`: the guest's file systems are frozen for the instant.
    """

    def __init__(
        self,
        machine: Machine,
        loop: asyncio.AbstractEventLoop,
        *,
        leave_stopped: bool = False,
        quiesced: Instant | None = None,
    ) -> None:
        self._machine, self._loop, self._leave_stopped = machine, loop, leave_stopped
        self._quiesced = quiesced
        self._left_stopped = False
        self._table: Regions | None = None

    def runs(self) -> bool:
        """See capture.pause.Execution, for this and the others."""
        return _wait(self._loop, self._machine.monitor.query_status()) == "running"

    def settle(self) -> None:
        self._require_followed()
        if self._quiesced is not None:
            if self._left_stopped:
                self._go_on_once_more()
            _wait(self._loop, self._quiesced.begin())
        disks.sync(self._machine.description)

    def unsettle(self) -> None:
        if self._quiesced is not None:
            self._loop.call_soon_threadsafe(self._quiesced.end)

    def prepare(self) -> None:
        _wait(self._loop, migration.prepare(self._machine.monitor))

    def stop(self) -> None:
        if self._left_stopped:
            self._go_on_once_more()
        _wait(self._loop, self._machine.stop())
        if self._quiesced is not None:
            self._quiesced.reached()

    def _require_followed(self) -> None:
        """What was stored while the guest ran is right only if it could be followed as it was until here."""
        changed = following.go_by(self._machine, _wait(self._loop, following.look(self._machine)))
        if changed is not None:
            name = self._machine.description.name
            raise ConflictError(f"VM {name}: given up, nothing was captured: {changed}; the next capture is complete")

    def _go_on_once_more(self) -> None:
        """After a round before this one: in one stop, QEMU saves its devices only once."""
        _wait(self._loop, self._machine.go_on())
        self._left_stopped = False

    def device_state(self) -> int:
        return _wait(self._loop, self._machine.device_state())

    def kept_now(self) -> Mapping[str, Extents]:
        self._table = table = self._machine.table.regions
        return {device.name: table.kept(device.name) for device in table.devices}

    def cont(self) -> None:
        self._left_stopped = self._leave_stopped
        if not self._leave_stopped:
            _wait(self._loop, self._machine.go_on())
        self.unsettle()

    @property
    def facts(self) -> Mapping[str, Any]:
        tags = {} if self._table is None else {"tags": self._table.to_tags()}
        return tags if self._quiesced is None else {**tags, **self._quiesced.facts}

    def take_back(self) -> None:
        with suppress(VirtualMachineError):  # a next supervisor will; what was captured is good
            _wait(self._loop, migration.take_back(self._machine.monitor))


class DiskInstant:
    """Some disks of a VM at the instant of one capture; made by `plan`."""

    def __init__(self, machine: Machine, loop: asyncio.AbstractEventLoop, captured: Sequence[CapturedDisk]) -> None:
        self._machine, self._loop = machine, loop
        self.captured = captured
        self._names = [disk.name for disk in captured]

    @classmethod
    async def plan(cls, machine: Machine, *, full: bool) -> DiskInstant | None:
        """What is known before a capture of the disks that a generation has; None if it has none.

        Raises VirtualMachineError.
        """
        names = disks.captured(machine.description, full=full)
        if not names:
            return None
        followed = await bitmaps.look(machine.monitor, names)
        captured = []
        for name in names:
            if name not in followed:
                raise VirtualMachineError(f"VM {machine.description.name}: QEMU does not have disk {name} any more")
            base = machine.disk_bases.get(name)
            problem = problem_of(name, base, followed[name])
            captured.append(CapturedDisk(name, base, problem, followed[name].new_token()))
        return cls(machine, asyncio.get_running_loop(), captured)

    def prepare(self) -> None:
        """See capture.disks.Disks, for this and the others."""
        machine = self._machine
        self._wait(disks.prepare(machine.monitor, machine.qemu.folder, self._names))
        self._wait(bitmaps.prepare(machine.monitor, self._tokens))
        disks.sync(machine.description)

    def freeze(self) -> None:
        monitor = self._machine.monitor
        self._wait(bitmaps.begin(monitor, {disk.name: (self._token(disk), disk.token) for disk in self.captured}))
        self._wait(disks.freeze(monitor, self._machine.qemu.folder, self._names))

    def frozen(self) -> Iterator[Export]:
        machine, folder = self._machine, self._machine.qemu.folder
        with_bitmaps = {disk.name: bitmaps.FROZEN for disk in self.captured if self._token(disk) is not None}
        self._wait(disks.export(machine.monitor, folder, self._names, with_bitmaps))
        for number, name in enumerate(self._names):
            copies = disks.copies(folder, number)
            yield Export(machine.description.name, folder.disks, name, with_bitmaps.get(name), copies)

    def release(self) -> None:
        with suppress(VirtualMachineError):  # a next capture, or supervisor, will
            self._wait(disks.release(self._machine.monitor, self._machine.qemu.folder))

    @property
    def _tokens(self) -> Mapping[str, str | None]:
        return {disk.name: token_of(disk.base, disk.name) for disk in self.captured}

    def _token(self, disk: CapturedDisk) -> str | None:
        """Of the bitmap that is read; None where there is none."""
        return token_of(disk.base, disk.name) if disk.problem is None else None

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return _wait(self._loop, work)


def problem_of(name: str, base: Generation | None, followed: Followed) -> str | None:
    """Why it is not known what was written on a disk since the newest generation that has it; None if it is."""
    return "no generation has it yet" if base is None else followed.problem(token_of(base, name), base.name)


async def settle_bitmaps(machine: Machine) -> None:
    """Leave of the disks' bitmaps what the newest generations say: after a capture, whether it came to something or
    not, and for what an earlier supervisor left. Raises nothing: what is left hinders no later capture."""
    with suppress(VirtualMachineError):
        tokens = {name: token_of(machine.disk_bases.get(name), name) for name in machine.disks}
        await bitmaps.settle(machine.monitor, tokens)


def _wait(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()
