"""How a VM comes to run: memory was prepared, QEMU is started paused, everything attached, then the first instruction;
or an earlier supervisor's QEMU is taken over. What a launch that fails has made is taken back.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import msgspec

from base.errors import ConflictError, StorageError, VirtualMachineError
from capture.choice import Facts
from capture.journal import Journal
from capture.tracking import start_tracking
from perdure.supervision import heads, lazily, leaving, leftovers
from perdure.supervision.following import facts_of
from perdure.supervision.local import Local
from perdure.supervision.machine import Machine
from perdure.supervision.preparing import Prepared
from restore.claims import FACTS
from restore.lazy import LazyRestore
from restore.scrub import verify_scrubbed
from store.records import Generation
from store.repository import Repository
from vm import disks, hold, migration, plugged, readahead
from vm.addresses import AddressMap
from vm.command_line import Platform, command_line
from vm.config import RAM
from vm.memory import Memory
from vm.monitor import Monitor
from vm.qemu import Qemu
from vm.regions import RegionTable

T = TypeVar("T")
"""Result of blocking work."""

_HOOK_SECONDS = 600


class Elsewhere(Protocol):
    """Runs blocking work in the repository's thread."""

    def __call__(self, work: Callable[[], T]) -> Coroutine[Any, Any, T]:
        """Gives its result."""


class _Facts(msgspec.Struct, frozen=True):
    """What the process record keeps for a take-over."""

    platform: Platform
    memory: str
    accelerator_reason: str


class Launcher:
    """Starts one VM."""

    def __init__(self, local: Local, say: Callable[[str], None], leaving: Callable[[], bool]) -> None:
        """`leaving`: whether what waits without end is to be given up."""
        self.local, self.description, self.folder, self.disks = local, local.description, local.folder, local.disks
        self._say, self._leaving = say, leaving
        self.lazy: LazyRestore | None = None
        """Of a launch or take-over that is under way."""

    def find(self) -> Qemu | None:
        """The QEMU of an earlier supervisor, if it still runs. Raises ConflictError if it was not launched by one."""
        qemu = Qemu.find(self.folder)
        if qemu is not None and leaving.FACT in qemu.record.facts:
            with qemu:
                raise ConflictError(
                    f"VM {self.local.name} runs (process {qemu.pid}), launched by somebody else: use perdure attach"
                )
        return qemu

    async def launch(self, prepared: Prepared, elsewhere: Elsewhere, *, after: int | None = None) -> Machine:
        """Start QEMU with prepared memory, attach everything, run the hook, let the guest begin, or go on. `after`: the
        process of a QEMU in whose place it comes, and which is ending.

        What is written into memory while the state of the devices is loaded, as a new generation id, counts as
        changed: trackers are armed before. Raises VirtualMachineError and others; the memory is given back then and no
        QEMU is left.
        """
        try:
            await elsewhere(self.disks.promote)
            argv = command_line(
                self.disks.description,
                prepared.platform,
                self.folder,
                prepared.memory.files,
                incoming=prepared.devices is not None,
                fillings=self.disks.fillings(),
            )
            noted = _encode(_Facts(prepared.platform, prepared.memory.folder.name, prepared.accelerator_reason))
            qemu = await elsewhere(lambda: Qemu.launch(self.folder, argv, self.local.disk, noted, after))
        except BaseException:
            await elsewhere(prepared.discard)
            raise
        monitor: Monitor | None = None
        try:
            monitor = await Monitor.connect(qemu, excused=self._excused)
            tags = prepared.parent.metadata.get("tags", []) if prepared.parent is not None else []
            addresses = await monitor.address_map(int(self.description.memory))
            table = RegionTable.from_tags(
                self.local.table(prepared.memory.folder), self.description.name, self.local.devices(addresses), tags
            )
            facts = await facts_of(qemu, monitor)
            if prepared.lazy is not None:
                await lazily.serve(prepared.lazy, qemu, facts)
            async with self._waiting(prepared.lazy, qemu):
                machine = await self._attach(qemu, monitor, addresses, table, prepared, facts, elsewhere)
                if prepared.devices is None:
                    await elsewhere(lambda: _verify_empty(prepared.memory, table))
                else:
                    await migration.load(monitor, prepared.devices)
                await self.before_boot(machine)
                await elsewhere(self.disks.begun)
                prepared.memory.set_used()
                await monitor.cont()
            with suppress(StorageError):  # the next launch tries again
                await elsewhere(self.disks.remove_left)
            await elsewhere(lambda: readahead.note(qemu.pid, prepared.platform.binary, self.local.qemu_loaded))
            return machine
        except BaseException as error:
            if monitor is not None:
                await monitor.disconnect()
            qemu.kill()
            qemu.close()
            try:
                lazily.explain(error, prepared.lazy)
            finally:
                await elsewhere(prepared.discard)
            raise

    async def began(self, qemu: Qemu) -> bool:
        """Whether the guest of a QEMU that was found has run. Raises VirtualMachineError."""
        if hold.began(qemu.events()):
            return True
        if any((folder / FACTS).exists() for folder in self.local.memory_folders()):
            return False  # a lazy restore, which only begins with a launch; its QEMU may wait for a page, silently
        async with await Monitor.connect(qemu) as monitor:
            # Paused, and without an event that tells of it: its state was loaded, and it has not gone on.
            return await monitor.query_status() not in ("prelaunch", "inmigrate", "paused")

    def undo_launch(self, qemu: Qemu) -> None:
        """Blocking: end a QEMU whose guest has not run, and give back its memory, which is a generation's."""
        qemu.kill()
        qemu.close()
        leftovers.drop(self.local)

    async def adopt(self, qemu: Qemu, repository: Repository, elsewhere: Elsewhere) -> Machine:
        """Take over a QEMU that an earlier supervisor started. Raises VirtualMachineError; QEMU is left as it is."""
        facts = _decode(qemu)
        memory = self.local.existing_memory(self.folder.path / facts.memory)
        lazy = LazyRestore.find(
            repository, memory.folder, self.folder.path, self.local.working_sets, self.local.nursery
        )
        monitor: Monitor | None = None
        try:
            if lazy is not None:  # first: QEMU may wait for a page, and its monitor with it
                await lazily.take_over(lazy, qemu)
            async with self._waiting(lazy, qemu):
                monitor = await Monitor.connect(qemu, excused=self._excused)
                await migration.clean_up(monitor)
                await disks.release(monitor, self.folder)
                await hold.hold_on_reset(monitor)
                addresses = await monitor.address_map(int(self.description.memory))
                memory.set_used()  # its end may have been about to be asked for, and was not
                table = RegionTable.load(
                    self.local.table(memory.folder), self.description.name, self.local.devices(addresses)
                )
                for folder in self.local.memory_folders():  # of a rollback that was cut short
                    if folder != memory.folder:
                        self.local.release_memory(folder)
                journal = self.local.journal(qemu.record.identity)
                bases = await elsewhere(lambda: self.local.bases(repository, journal))
                parent = await elsewhere(lambda: self.local.parent(repository))
                parent = max(
                    (*bases.values(), *([parent] if parent else ())), key=lambda each: each.number, default=None
                )
                if parent is not None:  # else what is known here does not tell a head that was cut short
                    since = parent
                    await elsewhere(lambda: heads.take_back(repository, self.local.name, since, self._say))
                await elsewhere(lambda: self.disks.taken_over(repository))
                found = Prepared(
                    memory, facts.platform, facts.accelerator_reason, parent, None, memory.warnings, lazy=lazy
                )
                seen = await facts_of(qemu, monitor)
                return await self._attach(qemu, monitor, addresses, table, found, seen, elsewhere, journal, bases)
        except BaseException as error:
            if monitor is not None:
                await monitor.disconnect()
            lazily.explain(error, lazy)
            if lazy is not None:
                lazy.close()
            raise

    @asynccontextmanager
    async def _waiting(self, lazy: LazyRestore | None, qemu: Qemu) -> AsyncIterator[None]:
        """Any step inside may wait for memory, and as long as it does no time limit counts."""
        self.lazy = lazy
        try:
            async with lazily.beside(lazy, qemu, self._say, self._leaving):
                yield
        finally:
            self.lazy = None

    def _excused(self) -> bool:
        return self.lazy is not None and self.lazy.waiting and not self._leaving()

    async def before_boot(self, machine: Machine) -> None:
        """Run the user's hook: memory is in place, the guest's first instruction is not yet run."""
        command = self.description.hooks.before_boot
        if not command:
            return
        environment = {
            **os.environ,
            "PERDURE_VM": self.description.name,
            "PERDURE_QEMU_PID": str(machine.pid),
            "PERDURE_MEMORY": str(machine.memory.folder),
            "PERDURE_RUNTIME": str(self.folder.path),
        }
        try:
            done = await asyncio.to_thread(
                subprocess.run, command, env=environment, stdin=subprocess.DEVNULL, timeout=_HOOK_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VirtualMachineError(f"VM {self.description.name}: hook before_boot {command[0]}: {error}") from error
        if done.returncode:
            raise VirtualMachineError(
                f"VM {self.description.name}: hook before_boot {command[0]} failed with {done.returncode}"
            )

    async def _attach(
        self,
        qemu: Qemu,
        monitor: Monitor,
        addresses: AddressMap,
        table: RegionTable,
        prepared: Prepared,
        facts: Facts,
        elsewhere: Elsewhere,
        journal: Journal | None = None,
        bases: dict[str, Generation] | None = None,
    ) -> Machine:
        """Trackers and journal; the guest has not run yet if something was prepared for it. `bases`, where that is
        taken over: the generations since which the journal knows what changed, by region."""
        status = await monitor.query_status()
        launched = status in ("prelaunch", "inmigrate")
        journal = journal or self.local.journal(qemu.record.identity)
        captured = disks.captured(self.description)
        followed = [name for name in prepared.memory.files if name != RAM or prepared.devices or name in (bases or {})]
        files = {name: prepared.memory.files[name].path for name in followed}
        restored = prepared.parent if launched else None
        if restored is not None:
            bases = dict.fromkeys(files, restored)
        starting = elsewhere(
            lambda: start_tracking(
                self.description.name,
                qemu.record.identity,
                files,
                facts,
                journal,
                wanted=self.description.policy.tracker,
                running=status == "running",
                known=bases,
                restored=None if restored is None else restored.id,
            )
        )
        tracking, obstacles, changes = await asyncio.gather(
            starting,
            migration.obstacles(monitor, [monitor.names.node(name) for name in captured]),
            plugged.changes(monitor, qemu.record.argv),
        )
        self.local.note_parent(prepared.parent)
        return Machine(
            description=self.disks.description,
            described=self.description,
            platform=prepared.platform,
            qemu=qemu,
            monitor=monitor,
            memory=prepared.memory,
            table=table,
            addresses=addresses,
            holds=monitor.events(*hold.HOLD_EVENTS).__enter__(),
            journal=journal,
            tracking=tracking,
            parent=prepared.parent,
            bases=bases or {},
            restored=prepared.restored.generation.number if prepared.restored else None,
            resumed=prepared.devices is not None,
            full_problems=(*obstacles, *changes),
            warnings=prepared.warnings,
            accelerator_reason=prepared.accelerator_reason,
            measurements=self.local.measurements,
            note_parent=self.local.note_parent,
            lazy=prepared.lazy,
        )


def _verify_empty(memory: Memory, table: RegionTable) -> None:
    """Nothing is in new memory but what is kept."""
    for name, file in memory.files.items():
        if name == RAM:
            continue
        descriptor = file.open()
        try:
            verify_scrubbed(descriptor, str(file.path), table.scrubbable(name))
        finally:
            os.close(descriptor)


def _encode(facts: _Facts) -> dict[str, str]:
    return {"launch": msgspec.json.encode(facts, enc_hook=str).decode()}


def _decode(qemu: Qemu) -> _Facts:
    def path(kind: type, value: Any) -> Any:
        return kind(value)

    try:
        return msgspec.json.decode(qemu.record.facts["launch"], type=_Facts, dec_hook=path)
    except (KeyError, ValueError, RecursionError) as error:
        raise VirtualMachineError(
            f"VM {qemu.vm} runs (process {qemu.pid}), but its record is missing or of another version: "
            f"end that process before starting the VM again"
        ) from error
