"""One QEMU process under supervision: monitor, memory, region table, trackers, journal, guest channel.

Made by the launcher. Coroutines belong to the supervisor's loop; what blocks is sent to the repository's thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from base import extents as ranges
from base import priority
from base.errors import ConflictError, PerdureError, StorageError, VirtualMachineError
from base.units import PAGE, format_size
from capture.generation import Captured
from capture.journal import Journal
from capture.pause import PauseModel
from capture.sources import CapturedRegion, content_of
from capture.tracking import Tracking
from capture.writeback import Plan
from perdure.supervision.resuming import recorded
from restore.lazy import LazyRestore
from restore.scrub import scrub
from store.records import Generation
from store.repository import Repository
from vm import disks, hold, migration, plugged
from vm.addresses import AddressMap
from vm.channel import GuestChannel, GuestHandler
from vm.command_line import Platform, devices_of
from vm.config import DISK_PREFIX, RAM, Description
from vm.content import Place
from vm.memory import Memory
from vm.monitor import Events, Monitor
from vm.networks import changed
from vm.protocol import Committed
from vm.qemu import Qemu, journal_end, trim_journal, trim_log
from vm.recorded import encode
from vm.regions import Regions, RegionTable

_QUIT_SECONDS = 10
_ASIDE_SECONDS = 1
"""For a QEMU whose successor begins, to end in time that nobody wants: 0.1 s of a processor for each GiB."""
_CONSOLE_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class Machine:
    """A VM that runs, or is held.

    `described`: as its user did, not with the files that its disks are now; `parent`: the generation that its memory
    descends from; `bases`: by region, the one that its tracker is relative to; `restored`: number of the one that this
    process was launched with, and `resumed` whether it goes on from that one's instant; `full_problems`: why there can
    be no full generation."""

    description: Description
    described: Description
    platform: Platform
    qemu: Qemu
    monitor: Monitor
    memory: Memory
    table: RegionTable
    addresses: AddressMap
    holds: Events
    journal: Journal
    tracking: Tracking
    parent: Generation | None
    bases: dict[str, Generation]
    restored: int | None
    resumed: bool
    full_problems: tuple[str, ...]
    warnings: tuple[str, ...]
    accelerator_reason: str
    measurements: dict[str, str]
    channel: GuestChannel | None = None
    note_parent: Callable[[Generation | None], None] = lambda _: None
    disk_bases: dict[str, Generation] = field(default_factory=dict)
    """By disk, the newest generation that has it."""
    pauses: PauseModel = field(default_factory=PauseModel)
    lazy: LazyRestore | None = None
    """While not all of its memory is there yet."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _aside: bool = False

    @property
    def pid(self) -> int:
        """Of QEMU."""
        return self.qemu.pid

    def open_channel(self, handler: GuestHandler, say: Callable[[str], None]) -> None:
        """Serve the guest from now on."""
        self.channel = GuestChannel(self.description.name, self.qemu.folder.agent, handler, say)
        if self.restored is not None:
            then = self.parent.metadata.get("devices", ()) if self.parent is not None and self.resumed else ()
            addresses = changed(then, devices_of(self.qemu.record.argv))
            self.channel.resumed(self.restored, renew=self.resumed, addresses=addresses)
        made = self.parent.metadata.get("checkpoint") if self.parent is not None else None
        if self.parent is not None and made is not None:  # whose reply an earlier supervisor may not have sent
            self.channel.remember(made["request"], Committed(self.parent.number, self.parent.id))
        self._tasks.append(asyncio.create_task(self.channel.run()))

    @property
    def waits_for_memory(self) -> bool:
        """Whether QEMU may be silent, for memory that cannot be read just now."""
        return self.lazy is not None and self.lazy.waiting

    async def stop(self) -> None:
        """Pause the guest."""
        await self.monitor.stop()

    async def cont(self) -> None:
        """Let it go on."""
        await self.monitor.cont()

    async def go_on(self) -> None:
        """Let a guest go on that was stopped for a capture, unless it had just stopped itself: then it is held."""
        try:
            await self.monitor.cont()
        except VirtualMachineError:
            if not await self.held():
                raise

    def go_on_without_session(self) -> None:
        """Let a guest go on that stands still because of us, where the session in which it was stopped is lost."""
        if self.monitor.stopped:
            self.qemu.let_go_on()

    async def next_hold(self) -> hold.Hold | None:
        """Wait until the guest stops itself; None when QEMU has ended. Raises VirtualMachineError if it hangs."""
        try:
            while True:
                found = hold.classify(await self.holds.next())
                # What was acted on while it was waiting here (at a take-over) is not there any more.
                if found.cause is not hold.Cause.TERMINATION and await self.held():
                    return found
        except VirtualMachineError:
            if await asyncio.to_thread(self.qemu.wait, 0 if self.monitor.lost else _QUIT_SECONDS):
                return None
            raise

    async def held(self) -> bool:
        """Whether the guest has stopped itself, or was held for a reset, and waits."""
        return await self.monitor.query_status() in hold.HELD_STATES

    async def hold_for_reset(self) -> None:
        """Hold the guest for a reboot: a supervisor that ends now is followed by one that goes on with it."""
        await hold.hold_for_reset(self.monitor)

    async def pending_hold(self) -> hold.Hold | None:
        """The hold that began while nobody supervised."""
        return hold.pending(await self.monitor.query_status(), self.qemu.events())

    async def go_on_if_paused(self) -> bool:
        """Let a guest go on that was stopped for something that its supervisor did not live to finish."""
        await migration.clean_up(self.monitor)
        if await self.monitor.query_status() not in ("paused", "postmigrate", "finish-migrate"):
            return False
        await self.monitor.cont()
        return True

    async def go_on_after_hold(self) -> None:
        """Reset, and let the guest boot."""
        if self.channel is not None:
            self.channel.reset()
        dealt_with = journal_end(self.qemu.folder)
        await hold.resume_after_hold(self.monitor)
        with suppress(StorageError):  # a guest that runs is worth more than short logs
            trim_log(self.qemu.folder.console, _CONSOLE_BYTES_MAX)
            trim_journal(self.qemu.folder, dealt_with)

    def scrub(self) -> int:
        """Blocking: make zero, and verify, everything that a reboot does not keep; bytes that held something.

        The holes that this makes are not seen by trackers: a region whose base has something of what is scrubbed, which
        a full one has, and any from before a range was untagged, has no baseline any more.
        """
        regions = self.table.regions
        unseen = [name for name in self.tracking.trackers if name == RAM or self._base_has_scrubbable(name, regions)]
        if unseen:
            self.journal.begin_collect(unseen)
        for name in unseen:
            self.tracking.trackers[name].forget()
        total = 0
        for name, file in self.memory.files.items():
            what = ranges.normalise([(0, file.size)]) if name == RAM else regions.scrubbable(name)
            descriptor = file.open()
            try:
                total += scrub(descriptor, str(file.path), what)
            finally:
                os.close(descriptor)
        return total

    def scrubbed_text(self, scrubbed: int) -> str:
        """What was done to memory that is not kept, by the bytes that `scrub` gave."""
        return f"{format_size(scrubbed)} scrubbed, verified"

    def _base_has_scrubbable(self, name: str, regions: Regions) -> bool:
        base = self.bases.get(name)
        return base is not None and len(ranges.intersect(content_of(base, name), regions.scrubbable(name))) > 0

    def places(self) -> dict[str, tuple[Place, int]]:
        """Where the bytes of main memory and each region are, and how many."""
        return {name: (file.path, file.size) for name, file in self.memory.files.items()}

    def captured_regions(self, regions: Regions, *, full: bool = False, memory: bool = False) -> list[CapturedRegion]:
        """The regions as they are to be captured with that table. Raises StorageError, VirtualMachineError.

        `memory`: main memory is among them, also where they are not for a full generation. Its tracker is made for the
        first one: VMs that have none pay nothing for it.
        """
        found = []
        for name, (place, size) in self.places().items():
            if name == RAM and not (full or memory):
                continue
            kept = ranges.normalise([(0, size)]) if name == RAM else regions.kept(name)
            tracker = self.tracking.follow(name, place)
            kind = "ram" if name == RAM else "pmem"
            found.append(CapturedRegion(name, kind, place, size, kept, tracker, self.bases.get(name)))
        return found

    def find_disk_bases(self, repository: Repository) -> None:
        """Blocking: which generations the disks' bitmaps can be relative to."""
        regions = {f"{DISK_PREFIX}{name}": name for name in self.disks}
        if regions:
            found = repository.newest_with(self.description.name, list(regions))
            self.disk_bases = {regions[region]: generation for region, generation in found.items()}

    def plan(self, *, full: bool) -> Plan:
        """What the next capture will be, for write-back: full only if there is a full generation to go on from.

        Raises StorageError, VirtualMachineError.
        """
        full = full and RAM in self.bases
        bases = {name: base for name, base in self.bases.items() if full or name != RAM}
        for name in disks.captured(self.description, full=full):
            if name in self.disk_bases:  # the capture's writer has them, too
                bases[f"{DISK_PREFIX}{name}"] = self.disk_bases[name]
        return Plan(self.captured_regions(self.table.regions, full=full), self.parent, bases, full)

    async def require_full(self) -> None:
        """Raises ConflictError if there can be no full generation of this VM now."""
        obstacles = await migration.obstacles(self.monitor, [self.monitor.names.node(name) for name in self.disks])
        self.full_problems = (*obstacles, *await plugged.changes(self.monitor, self.qemu.record.argv))
        if self.full_problems:
            raise ConflictError(
                f"VM {self.description.name} cannot be captured in full: {'; '.join(self.full_problems)}"
            )

    def metadata(self, regions: Regions, *, full: bool = False) -> dict[str, Any]:
        """What a generation records of the VM: the tags are those of the table by which it was captured."""
        return {
            "tags": regions.to_tags(),
            "machine": recorded(self.description, self.platform),
            "measurements": self.measurements,
            "tracker": self.tracking.choice.kind,
            **(self._of_full() if full else {}),
        }

    def _of_full(self) -> dict[str, Any]:
        """What only full generations record: `addresses` are [region, guest-physical address, size, offset]."""
        spans = [[each.region, each.address, each.size, each.offset] for each in self.addresses.spans]
        devices = devices_of(self.qemu.record.argv)
        return {"devices": devices, "addresses": spans, "description": encode(self.described)}

    def committed(self, done: Captured) -> None:
        """A generation was made of this VM: it is what the next one follows.

        Raises StorageError if that could not be written down: true all the same.
        """
        self.parent = done.generation
        for name in done.generation.regions:
            if name in self.tracking.trackers:
                self.bases[name] = done.generation
        self.disk_bases |= dict.fromkeys(done.disks, done.generation)
        self.note_parent(done.generation)
        self.table.changed(done.changed, done.generation.number)

    def status(self) -> dict[str, Any]:
        """Facts for `perdure status`; asks QEMU nothing."""
        choice = self.tracking.choice
        regions = self.table.regions
        return {
            "pid": self.pid,
            "generation": None if self.parent is None else self.parent.name,
            "restored": self.restored,
            "accelerator": f"{self.platform.accelerator} ({self.accelerator_reason})",
            "tracker": f"{choice.kind} ({choice.reason})",
            "full": "possible" if not self.full_problems else f"not possible: {'; '.join(self.full_problems)}",
            "warnings": list(self.warnings),
            "lazy": None if self.lazy is None else self.lazy.status(),
            "regions": {
                device.name: {
                    "address": device.address,
                    "size": device.size,
                    "mode": device.mode,
                    "kept_bytes": ranges.total(regions.kept(device.name)),
                    "tags": sum(tag.device == device.name for tag in regions.tags),
                    "tracker": self.tracking.trackers[device.name].kind,
                    "reason": choice.reason,
                }
                for device in regions.devices
            },
            "console": str(self.qemu.folder.console),
            "pages": {name: size // PAGE for name, (_, size) in self.places().items()},
        }

    async def device_state(self) -> int:
        """The stopped guest's, in a memory file without a name that the caller closes; `migration.prepare` was called.

        Raises VirtualMachineError: the guest can go on.
        """
        if await self.held():
            raise VirtualMachineError(f"VM {self.description.name}: the guest has stopped itself: try again")
        state = await migration.save(self.monitor)
        try:
            changes = await plugged.changes(self.monitor, self.qemu.record.argv)  # since `require_full`
            if changes:
                raise VirtualMachineError(
                    f"VM {self.description.name} cannot be captured in full: {'; '.join(changes)}"
                )
        except BaseException:
            os.close(state)
            raise
        return state

    @property
    def disks(self) -> list[str]:
        """Names of the disks that full generations have."""
        return disks.captured(self.description)

    async def end(self, *, aside: bool = False) -> None:
        """Have QEMU end; when this returns it has let go of sockets, disks and networks, and takes down its memory,
        `aside` at first: in processor time that nobody wants. Its files have no names any more: what they hold is given
        back as QEMU's last act, in its own time."""
        await self._stop_tasks()
        self.memory.set_spare()  # before QEMU hears of it: a crash from now on is none of the VM
        if self.waits_for_memory:
            with suppress(PerdureError):  # `ended` tries again
                await asyncio.to_thread(self.qemu.kill)
        with suppress(PerdureError, TimeoutError):
            await self.monitor.execute("quit", timeout_s=_QUIT_SECONDS)
            await asyncio.wait_for(self.monitor.wait_lost(), _QUIT_SECONDS)
        if not await asyncio.to_thread(self.qemu.let_go, _QUIT_SECONDS):
            with suppress(PerdureError):  # as above
                await asyncio.to_thread(self.qemu.kill)
        self._aside = aside
        if aside:
            priority.give_way(self.pid)
        with suppress(StorageError):  # `ended` tries again
            await asyncio.to_thread(self.memory.release)
        self.holds.__exit__(None, None, None)
        await self.monitor.disconnect()
        self.tracking.close()

    async def ended(self) -> None:
        """After `end`: wait until the process is gone, and its memory given back. Raises StorageError."""
        if self._aside and not await asyncio.to_thread(self.qemu.wait, _ASIDE_SECONDS):
            priority.take_turns(self.pid)
        if not await asyncio.to_thread(self.qemu.wait, _QUIT_SECONDS):
            await asyncio.to_thread(self.qemu.kill)
        self.qemu.close()
        lazy, self.lazy = self.lazy, None
        if lazy is not None:
            lazy.abandon()
        await asyncio.to_thread(self.memory.release)

    async def disconnect(self) -> None:
        """Leave QEMU as it is, for the next supervisor; a guest that stands still because of us goes on, also where the
        session that it was stopped in is lost."""
        await self._stop_tasks()
        if self.monitor.lost:
            self.go_on_without_session()
        await self.monitor.disconnect()
        self.tracking.close()
        lazy, self.lazy = self.lazy, None
        if lazy is not None:
            lazy.close()
        self.qemu.close()

    def last_words(self) -> str:
        """How QEMU ended, by its own log."""
        return self.qemu.end()

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
