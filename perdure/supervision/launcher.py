"""How a VM comes to run: memory prepared and verified, QEMU started paused, everything attached, then the first
instruction; or an earlier supervisor's QEMU taken over.

New memory is made beside that of a QEMU that may still run, so that a rollback that cannot be restored changes
nothing. A region table in a memory folder says that its content was complete when a guest began to use it: only
then is memory that a dead QEMU left worth capturing. What a launch that fails has made is taken back.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from base.disk import Disk, replace_file
from base.errors import ConflictError, NotFoundError, PerdureError, StorageError, VirtualMachineError
from base.progress import Progress
from base.units import format_size
from capture.choice import probe_facts
from capture.generation import Captured, capture
from capture.journal import Journal
from capture.sources import CapturedRegion
from capture.trackers import ScanTracker
from capture.tracking import start_tracking
from perdure.disks.images import Disks
from perdure.disks.state import TOKEN, disks_of
from perdure.supervision import heads, lazily, resuming
from perdure.supervision.machine import Machine
from perdure.supervision.measurements import compare, measure
from restore.claims import FACTS
from restore.eager import Restored, read_devices, require_same_regions, restore_regions
from restore.lazy import LazyRestore, Standby
from restore.lazy_fill import fill
from restore.scrub import verify_scrubbed
from store.records import Generation
from store.repository import Repository
from vm import accelerator, disks, firmware, hold, migration
from vm import qemu as processes
from vm.addresses import AddressMap
from vm.command_line import Platform, command_line, devices_of
from vm.config import RAM, Description
from vm.folder import RuntimeFolder
from vm.identity import Identity
from vm.memory import BackingFile, Memory
from vm.monitor import Monitor
from vm.networks import with_new_addresses
from vm.qemu import Qemu
from vm.regions import Device, RegionTable

T = TypeVar("T")
"""Result of blocking work."""

_MEMORY_FOLDERS = ("memory", "memory-2")
_TABLE = "regions.json"
_PARENT = "parent"
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """Memory for a launch, and the QEMU for it. `parent` is the generation that it holds, None if it is empty;
    `devices` the state from which the guest goes on, None if it boots."""

    memory: Memory
    platform: Platform
    accelerator_reason: str
    parent: Generation | None
    restored: Restored | None
    warnings: tuple[str, ...]
    devices: bytes | None = None
    lazy: LazyRestore | None = None

    @property
    def summary(self) -> str:
        """What was restored, in words."""
        done = self.restored
        if done is None:
            return "persistent memory is empty"
        how = "restored" if self.devices is None else "resumed"
        if self.lazy is not None:
            return f"{done.generation.name} {how}, its memory comes as it is touched, and in the background"
        return (
            f"{done.generation.name} {how}, {format_size(done.written_bytes)} in {done.restore_seconds:.2f} s, "
            f"{format_size(done.verified_bytes)} verified in {done.verify_seconds:.2f} s"
        )

    def discard(self) -> None:
        """Give the memory back."""
        if self.lazy is not None:
            self.lazy.abandon()
        self.memory.release()


class Launcher:
    """Starts one VM. `state` is its durable folder on this host. `clone`: a copy of another VM's generation, with
    addresses and an identity of its own, whose disks are never the files that the description names."""

    def __init__(self, description: Description, folder: RuntimeFolder, state: Path, *, clone: bool = False) -> None:
        self._uuid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"perdure:{state}"))
        if clone:
            extra = with_new_addresses(description.extra, self._uuid)[0]
            description = msgspec.structs.replace(description, extra=tuple(extra))
        self.description, self.folder, self.clone = description, folder, clone
        self._state = state
        self._disk = Disk()
        self.standby: Standby | None = None
        """A page server for the next lazy restore; without one, that has to start it first."""
        self.measurements = measure(description)
        self.disks = Disks(description, folder, state, clone=clone)

    def close(self) -> None:
        """Let go of what was made ready and not used."""
        if self.standby is not None:
            self.standby.close()
            self.standby = None

    def find(self) -> Qemu | None:
        """The QEMU of an earlier supervisor, if it still runs."""
        return Qemu.find(self.folder)

    def salvage(self, repository: Repository, progress: Progress) -> Captured | None:
        """Blocking: capture what a dead QEMU left in memory, then give that back. Raises what capture raises."""
        done = None
        for name in _MEMORY_FOLDERS:
            folder = self.folder.path / name
            if not folder.exists():
                continue
            if (folder / _TABLE).exists():
                fill(repository, folder, [region.name for region in self.description.regions], progress)
                done = self._capture_left(repository, folder, progress)
            self._release(folder)
        return done

    def drop_left_memory(self) -> None:
        """Blocking: give back what a dead QEMU left, without a look at it."""
        for name in _MEMORY_FOLDERS:
            if (self.folder.path / name).exists():
                self._release(self.folder.path / name)

    def prepare(
        self,
        repository: Repository,
        generation: Generation | None,
        progress: Progress,
        replaces: Memory | None = None,
        *,
        boot: bool = False,
        lazy: bool = False,
    ) -> Prepared:
        """Blocking: new backing files with the content of a generation, verified; empty ones for None. The memory
        that they replace, if any, is released before they are launched.

        A full generation is resumed, unless it is to `boot`: then it gives its persistent memory only. QEMU is found
        first: without one, nothing has to be restored. `lazy`: of a full one the memory is not restored but served when
        it is touched. Raises ConflictError, IntegrityError, StorageError,
        VirtualMachineError: nothing is left then.
        """
        resumed = generation if generation is not None and generation.full and not boot else None
        self.folder.create()
        platform, reason, problems = self.fitting(generation, boot=boot)
        memory = Memory.prepare(
            self.description.name,
            self._free_folder(),
            self.description.backing_sizes,
            replaces=replaces,
            beside=0 if generation is None else _memory_bytes(generation),
        )
        try:
            restored = devices = begun = None
            if generation is not None:
                paths = {name: file.path for name, file in memory.files.items() if name != RAM or resumed is not None}
                if lazy and resumed is not None:
                    restored, begun = self._begin_lazily(repository, resumed, memory, paths)
                else:
                    restored = restore_regions(repository, generation, paths, progress)
                if resumed is not None:
                    devices = read_devices(repository, resumed)
                elif generation.full:
                    heads.scrub_to_kept(memory, generation)
            warnings = (*memory.warnings, *problems)
            return Prepared(memory, platform, reason, generation, restored, warnings, devices, begun)
        except BaseException:
            if begun is not None:
                begun.abandon()
            with suppress(PerdureError):
                memory.release()
            raise

    def fitting(self, generation: Generation | None, *, boot: bool) -> tuple[Platform, str, tuple[str, ...]]:
        """Blocking: the platform on which a generation is resumed or booted, why it has its accelerator, and warnings.

        Changes nothing. Raises ConflictError for one that does not fit the VM as it is described, VirtualMachineError.
        """
        resumed = generation if generation is not None and generation.full and not boot else None
        if generation is not None and "tags" not in generation.metadata:
            raise ConflictError(
                f"{generation.name} was made by {generation.cause} and does not say what of it is to be kept: restore "
                f"another generation with --from, or start with --without-restore"
            )
        problems = compare(self.description, self.measurements, generation)
        platform, reason = self._platform()
        if resumed is not None:
            problems += resuming.version_warning(resumed, platform)
            platform = resuming.fitting(self.description, platform, resumed)
            if self.clone:
                platform = replace(platform, uuid=self._uuid)
            files = {name: BackingFile(name, self.folder.path, 0) for name in self.description.backing_sizes}
            argv = command_line(self.description, platform, self.folder, files)
            resuming.require_same_devices(resumed, devices_of(argv), copied=self.clone)
            resuming.require_same_disks(resumed, self.description)
        return platform, reason, problems

    def go_on_from(
        self,
        repository: Repository,
        prepared: Prepared,
        *,
        drop_disks: bool = False,
        mixed: heads.Mixed | None = None,
    ) -> Prepared:
        """Blocking: where an older generation was prepared, or only a part of one, add one to history that equals it
        and follows it, so that the latest is always what the VM goes on from, also after a power loss.

        The disks are made with it, where a generation is resumed that has some, and served. `drop_disks`: images that
        were disks until now are removed when the guest goes on. `mixed`: what it goes on from is of several
        generations. Raises StorageError, WorkerError, VirtualMachineError.
        """
        if mixed is None:
            prepared = self._head(repository, prepared, drop_disks)
        elif mixed.names:
            with self.disks.going_back(repository, mixed.back, drop=drop_disks, names=mixed.names) as token:
                prepared = replace(prepared, parent=heads.of_several(repository, mixed, {TOKEN: token}))
        else:
            prepared = replace(prepared, parent=heads.of_several(repository, mixed))
        self.disks.serve(repository)
        return prepared

    def _head(self, repository: Repository, prepared: Prepared, drop_disks: bool) -> Prepared:
        name = self.description.name
        latest = repository.latest(name)
        if prepared.parent is None:
            return prepared
        foreign = prepared.parent.vm != name
        with_disks = prepared.devices is not None and disks_of(prepared.parent)
        if with_disks and not self.disks.pristine(prepared.parent):
            with self.disks.going_back(repository, prepared.parent, drop=drop_disks) as token:
                return replace(prepared, parent=heads.again(repository, name, prepared.parent, {TOKEN: token}))
        older = latest is None or latest.id != prepared.parent.id
        if prepared.parent.full and prepared.devices is None:
            cause = "clone" if foreign else "rollback" if older else "boot"
            return replace(prepared, parent=heads.kept_of(repository, name, prepared.parent, cause))
        return replace(prepared, parent=heads.again(repository, name, prepared.parent)) if older else prepared

    async def launch(self, prepared: Prepared, elsewhere: Elsewhere) -> Machine:
        """Start QEMU with prepared memory, attach everything, run the hook, let the guest begin, or go on.

        What is written into memory while the state of the devices is loaded, as a new generation id, counts as
        changed: trackers are armed before. Raises VirtualMachineError and others; the memory is given back then and no
        QEMU is left.
        """
        try:
            argv = command_line(
                self.disks.description,
                prepared.platform,
                self.folder,
                prepared.memory.files,
                incoming=prepared.devices is not None,
                fillings=self.disks.fillings(),
            )
            facts = _Facts(prepared.platform, prepared.memory.folder.name, prepared.accelerator_reason)
            qemu = await elsewhere(lambda: Qemu.launch(self.folder, argv, self._disk, _encode(facts)))
        except BaseException:
            await elsewhere(prepared.discard)
            raise
        monitor: Monitor | None = None
        try:
            monitor = await Monitor.connect(qemu)
            tags = prepared.parent.metadata.get("tags", []) if prepared.parent is not None else []
            addresses = await monitor.address_map(int(self.description.memory))
            table = RegionTable.from_tags(
                prepared.memory.folder / _TABLE, self.description.name, self._devices(addresses), tags
            )
            if prepared.lazy is not None:
                await asyncio.to_thread(prepared.lazy.serve, qemu.record.identity)
            machine = await self._attach(qemu, monitor, addresses, table, prepared, elsewhere)
            if prepared.devices is None:
                await elsewhere(lambda: _verify_empty(prepared.memory, table))
            else:
                await migration.load(monitor, prepared.devices)
            await self.before_boot(machine)
            await elsewhere(self.disks.begun)
            await monitor.cont()
            with suppress(StorageError):  # the next launch tries again
                await elsewhere(self.disks.remove_left)
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
        if any((self.folder.path / name / FACTS).exists() for name in _MEMORY_FOLDERS):
            return False  # a lazy restore, which only begins with a launch; its QEMU may wait for a page, silently
        async with await Monitor.connect(qemu) as monitor:
            # Paused, and without an event that tells of it: its state was loaded, and it has not gone on.
            return await monitor.query_status() not in ("prelaunch", "inmigrate", "paused")

    def undo_launch(self, qemu: Qemu) -> None:
        """Blocking: end a QEMU whose guest has not run, and give back its memory, which is a generation's."""
        qemu.kill()
        qemu.close()
        self.drop_left_memory()

    async def adopt(self, qemu: Qemu, repository: Repository, elsewhere: Elsewhere) -> Machine:
        """Take over a QEMU that an earlier supervisor started. Raises VirtualMachineError; QEMU is left as it is."""
        facts = _decode(qemu)
        memory = Memory.existing(self.description.name, self.folder.path / facts.memory, self.description.backing_sizes)
        lazy = LazyRestore.find(repository, memory.folder, self.folder.path, self._working_sets)
        monitor: Monitor | None = None
        try:
            if lazy is not None:  # first: QEMU may wait for a page, and its monitor with it
                await lazily.take_over(lazy, qemu)
            monitor = await Monitor.connect(qemu)
            await migration.clean_up(monitor)
            await disks.release(monitor, self.folder)
            await elsewhere(lambda: self.disks.taken_over(repository))
            await hold.hold_on_reset(monitor)
            addresses = await monitor.address_map(int(self.description.memory))
            table = RegionTable.load(memory.folder / _TABLE, self.description.name, self._devices(addresses))
            for name in _MEMORY_FOLDERS:  # of a rollback that was cut short
                if name != facts.memory and (self.folder.path / name).exists():
                    self._release(self.folder.path / name)
            journal = self._journal(qemu.record.identity)
            bases = await elsewhere(lambda: self._bases(repository, journal))
            parent = await elsewhere(lambda: self._parent(repository))
            parent = max((*bases.values(), *([parent] if parent else ())), key=lambda each: each.number, default=None)
            found = Prepared(memory, facts.platform, facts.accelerator_reason, parent, None, memory.warnings, lazy=lazy)
            return await self._attach(qemu, monitor, addresses, table, found, elsewhere, journal, bases)
        except BaseException as error:
            if monitor is not None:
                await monitor.disconnect()
            lazily.explain(error, lazy)
            if lazy is not None:
                lazy.close()
            raise

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

    def note_parent(self, generation: Generation | None) -> None:
        """Remember over a restart of the supervisor which generation the memory descends from."""
        content = b"" if generation is None else generation.id.encode()
        replace_file(self._disk, self.folder.path / _PARENT, content)

    async def _attach(
        self,
        qemu: Qemu,
        monitor: Monitor,
        addresses: AddressMap,
        table: RegionTable,
        prepared: Prepared,
        elsewhere: Elsewhere,
        journal: Journal | None = None,
        bases: dict[str, Generation] | None = None,
    ) -> Machine:
        """Trackers and journal; the guest has not run yet if something was prepared for it. `bases`, where that is
        taken over: the generations since which the journal knows what changed, by region."""
        status = await monitor.query_status()
        launched = status in ("prelaunch", "inmigrate")
        journal = journal or self._journal(qemu.record.identity)
        listed = [
            each["type"]
            for path in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
            for each in await monitor.execute("qom-list", path=path)
        ]
        nodes = await monitor.execute("query-named-block-nodes", flat=True)
        networks = await monitor.human("info network")
        captured = disks.captured(self.description)
        followed = [name for name in prepared.memory.files if name != RAM or prepared.devices or name in (bases or {})]
        files = {name: prepared.memory.files[name].path for name in followed}
        restored = prepared.parent if launched else None
        if restored is not None:
            bases = dict.fromkeys(files, restored)
        tracking = await elsewhere(
            lambda: start_tracking(
                self.description.name,
                qemu.record.identity,
                files,
                probe_facts(qemu.pid, devices=listed, block_nodes=nodes, networks=networks),
                journal,
                wanted=self.description.policy.tracker,
                running=status == "running",
                known=bases,
                restored=None if restored is None else restored.id,
            )
        )
        self.note_parent(prepared.parent)
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
            full_problems=await migration.obstacles(monitor, [disks.node_of(name) for name in captured]),
            warnings=prepared.warnings,
            accelerator_reason=prepared.accelerator_reason,
            measurements=self.measurements,
            note_parent=self.note_parent,
            lazy=prepared.lazy,
        )

    @property
    def _working_sets(self) -> Path:
        return self._state / "working-sets"

    def _begin_lazily(
        self, repository: Repository, generation: Generation, memory: Memory, paths: dict[str, Path]
    ) -> tuple[Restored, LazyRestore]:
        """A page server gets ready while QEMU starts."""
        require_same_regions(generation, paths)
        files = {name: path for name, path in paths.items() if name in generation.regions}
        standby, self.standby = self.standby, None
        lazy = LazyRestore.begin(
            repository, generation, memory.folder, files, self.folder.path, self._working_sets, standby
        )
        return Restored(generation, 0, 0, 0.0, 0.0), lazy

    def _devices(self, addresses: AddressMap) -> list[Device]:
        """The NVDIMMs where QEMU has put them."""
        return [
            Device(region.name, addresses.address_of(region.name, 0), int(region.size), region.mode)
            for region in self.description.regions
        ]

    def _platform(self) -> tuple[Platform, str]:
        description = self.description
        binary = processes.find_binary(description.name, description.qemu)
        chosen = accelerator.choose(description, binary, self._state / "accelerator.json")
        firm = firmware.find(description.name, description.firmware)
        version = processes.version(description.name, binary)
        machine = processes.resolve_machine(description.name, binary, description.machine)
        platform = Platform(
            binary=binary,
            version=version,
            machine=machine,
            accelerator=chosen.kind,
            cpu=description.cpu or chosen.cpu,
            firmware=firm,
            variables=firmware.variables(description.name, firm, self._state, self._disk),
            uuid=self._uuid,
            generation_id=machine.startswith("pc-") and processes.has_device(description.name, binary, "vmgenid"),
        )
        return platform, chosen.reason

    def _capture_left(self, repository: Repository, folder: Path, progress: Progress) -> Captured:
        """What a dead QEMU left: nobody writes it any more, and what was dirty is not known."""
        memory = Memory.existing(self.description.name, folder, self.description.backing_sizes)
        table = RegionTable.load(folder / _TABLE, self.description.name)
        regions = [
            CapturedRegion(
                region.name,
                "pmem",
                memory.files[region.name].path,
                int(region.size),
                table.kept(region.name),
                ScanTracker(),
            )
            for region in self.description.regions
        ]
        journal = self._journal(Identity(0, 0, ""))
        return capture(
            repository,
            self.description.name,
            regions,
            journal,
            None,
            cause="crash",
            parent=self._parent(repository),
            metadata={"tags": table.to_tags(), "measurements": self.measurements},
            progress=progress,
        )

    def _journal(self, identity: Identity) -> Journal:
        return Journal(self.folder.path / "journal.json", identity, self._disk)

    def _bases(self, repository: Repository, journal: Journal) -> dict[str, Generation]:
        """By region, the generation since which the journal knows what changed, unless it was forgotten meanwhile."""
        found = {}
        for name in self.description.backing_sizes:
            noted = journal.baseline(name)
            if noted is not None:
                with suppress(NotFoundError):
                    found[name] = repository.resolve(noted)
        return found

    def _parent(self, repository: Repository) -> Generation | None:
        try:
            noted = (self.folder.path / _PARENT).read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError.from_os(error, str(self.folder.path / _PARENT), "read") from error
        if not noted:
            return None
        try:
            return repository.resolve(noted)
        except NotFoundError:  # forgotten meanwhile
            return None

    def _free_folder(self) -> Path:
        for name in _MEMORY_FOLDERS:
            if not Memory.exists(self.folder.path / name):
                return self.folder.path / name
        raise ConflictError(f"VM {self.description.name}: memory of earlier runs is in {self.folder.path}")

    def _release(self, folder: Path) -> None:
        Memory(self.description.name, folder, {}).release()


def _memory_bytes(generation: Generation) -> int:
    """Bytes of a generation that go into memory; disks do not."""
    return sum(region.kept_bytes for region in generation.regions.values() if region.kind != "disk")


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
