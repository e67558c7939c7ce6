"""Memory for a launch: made beside that of a QEMU that may still run, filled with a generation, verified; and the head
of history that the VM goes on from. A rollback that cannot be restored changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from base.errors import ConflictError, PerdureError
from base.progress import Progress
from base.units import format_size
from perdure.disks.state import TOKEN, disks_of
from perdure.supervision import heads, lazily, resuming
from perdure.supervision.local import Local
from perdure.supervision.measurements import compare
from restore.eager import Restored, read_devices, require_same_regions, restore_regions
from restore.lazy import LazyRestore
from store.records import Generation
from store.repository import Repository
from vm import accelerator, firmware, readahead
from vm import qemu as processes
from vm.command_line import Platform, command_line, devices_of
from vm.config import RAM
from vm.memory import BackingFile, Memory

_INDEX_BYTES = 64 << 20
"""Of an index that is read ahead for a resume; of a larger one much is not wanted."""


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
    served: bool = False
    """Memory is to be served from `parent`, once history has it."""

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


class Preparation:
    """Prepares launches of one VM, one after the other."""

    def __init__(self, local: Local) -> None:
        self.local, self._description = local, local.description

    def prepare(
        self,
        repository: Repository,
        generation: Generation | None,
        progress: Progress,
        replaces: Memory | None = None,
        *,
        boot: bool = False,
        lazy: bool | None = False,
    ) -> Prepared:
        """Blocking: new backing files with the content of a generation, verified; empty ones for None. The memory
        that they replace, if any, is released before they are launched.

        A full generation is resumed, unless it is to `boot`: then it gives its persistent memory only. QEMU is found
        first: without one, nothing has to be restored. `lazy`: memory is not restored but served when it is touched;
        None: where that suits. Raises ConflictError, IntegrityError, StorageError, VirtualMachineError: nothing is left
        then.
        """
        resumed = generation if generation is not None and generation.full and not boot else None
        readahead.expect_noted(self.local.qemu_loaded)
        readahead.expect((self._description.kernel, self._description.initrd))
        self.local.folder.create()
        platform, reason, problems = self.fitting(generation, boot=boot)
        memory = Memory.prepare(
            self.local.name,
            self.local.free_memory_folder(),
            self._description.backing_sizes,
            replaces=replaces,
            beside=0 if generation is None else _memory_bytes(generation),
        )
        try:
            restored = devices = begun = None
            served = False
            if generation is not None:
                served, why = lazily.suits(self._description, generation, resumes=resumed is not None, wanted=lazy)
                problems = (*problems, *why)
                if not served:
                    _expect_index(repository)
                    paths = _restored_paths(memory, resumes=resumed is not None)
                    restored = restore_regions(repository, generation, paths, progress)
                elif resumed is not None or not generation.full:
                    restored, begun = self._begin_lazily(repository, generation, memory)
                if resumed is not None:
                    devices = read_devices(repository, resumed)
                elif generation.full and not served:
                    heads.scrub_to_kept(memory, generation)
            warnings = (*memory.warnings, *problems)
            return Prepared(memory, platform, reason, generation, restored, warnings, devices, begun, served)
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
        problems = compare(self._description, self.local.measurements, generation)
        platform, reason = self._platform()
        if resumed is not None:
            problems += resuming.version_warning(resumed, platform)
            platform = resuming.fitting(self._description, platform, resumed)
            if self.local.clone:
                platform = replace(platform, uuid=self.local.uuid)
            files = {name: BackingFile(name, self.local.folder.path, 0) for name in self._description.backing_sizes}
            argv = command_line(self._description, platform, self.local.folder, files)
            resuming.require_same_devices(resumed, devices_of(argv), copied=self.local.clone)
            resuming.require_same_disks(resumed, self._description)
        return platform, reason, problems

    def go_on_from(
        self,
        repository: Repository,
        prepared: Prepared,
        say: Callable[[str], None],
        *,
        drop_disks: bool = False,
        mixed: heads.Mixed | None = None,
    ) -> Prepared:
        """Blocking: where an older generation was prepared, or only a part of one, add one to history that equals it
        and follows it, so that the latest is always what the VM goes on from, also after a power loss.

        Images of disks are made before it, where a generation is resumed that has some, and served; they are pending
        until a QEMU is launched. `drop_disks`: images that were disks until now are removed when the guest goes on.
        `mixed`: what it goes on from is of several generations. Raises IntegrityError, StorageError, WorkerError,
        VirtualMachineError: the latest and the disks are what they were then, and what cannot be taken back is said.
        """
        name, disks = self.local.name, self.local.disks
        latest = repository.latest(name)
        try:
            token = self._disks_back(repository, prepared, mixed, drop_disks)
            disks.serve(repository)
            head = (
                self._head(repository, prepared, latest, token)
                if mixed is None
                else heads.of_several(repository, mixed, token)
            )
            prepared = replace(prepared, parent=head)
            if prepared.served and prepared.lazy is None and head is not None:
                restored, begun = self._begin_lazily(repository, head, prepared.memory)
                prepared = replace(prepared, restored=restored, lazy=begun)
            return prepared
        except BaseException:
            heads.take_back(repository, name, latest, say)
            with suppress(PerdureError):
                disks.drop_pending()
            raise

    def eagerly(self, repository: Repository, prepared: Prepared, progress: Progress) -> Prepared:
        """Blocking: the same again in place of one that could not be launched lazily: new memory, all of it restored.

        Raises what `prepare` raises.
        """
        assert prepared.parent is not None
        memory = Memory.prepare(self.local.name, self.local.free_memory_folder(), self._description.backing_sizes)
        try:
            paths = _restored_paths(memory, resumes=prepared.devices is not None)
            restored = restore_regions(repository, prepared.parent, paths, progress)
        except BaseException:
            with suppress(PerdureError):
                memory.release()
            raise
        return replace(prepared, memory=memory, restored=restored, lazy=None, served=False)

    def _disks_back(
        self, repository: Repository, prepared: Prepared, mixed: heads.Mixed | None, drop: bool
    ) -> dict[str, str]:
        """Images of disks that go back, and metadata of the head that they belong to."""
        disks = self.local.disks
        if mixed is not None:
            return {TOKEN: disks.go_back(repository, mixed.back, drop=drop, names=mixed.names)} if mixed.names else {}
        resumed = prepared.parent if prepared.devices is not None else None
        if resumed is None or not disks_of(resumed) or disks.pristine(resumed):
            return {}
        return {TOKEN: disks.go_back(repository, resumed, drop=drop)}

    def _head(
        self, repository: Repository, prepared: Prepared, latest: Generation | None, token: dict[str, str]
    ) -> Generation | None:
        name, generation = self.local.name, prepared.parent
        if generation is None:
            return None
        older = latest is None or latest.id != generation.id
        if generation.full and prepared.devices is None:
            cause = "clone" if generation.vm != name else "rollback" if older else "boot"
            return heads.kept_of(repository, name, generation, cause)
        return heads.again(repository, name, generation, token) if older or token else generation

    def _begin_lazily(
        self, repository: Repository, generation: Generation, memory: Memory
    ) -> tuple[Restored, LazyRestore]:
        """A page server gets ready while QEMU starts."""
        paths = _restored_paths(memory, resumes=RAM in generation.regions)
        require_same_regions(generation, paths)
        files = {name: path for name, path in paths.items() if name in generation.regions}
        local = self.local
        lazy = LazyRestore.begin(
            repository, generation, memory.folder, files, local.folder.path, local.working_sets, local.nursery
        )
        _expect_index(repository)  # not before: what QEMU starts with, and what was looked at here, is wanted sooner
        return Restored(generation, 0, 0, 0.0, 0.0), lazy

    def _platform(self) -> tuple[Platform, str]:
        description = self._description
        binary = processes.find_binary(description.name, description.qemu)
        chosen = accelerator.choose(description, binary, self.local.state / "accelerator.json")
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
            variables=firmware.variables(description.name, firm, self.local.state, self.local.disk),
            uuid=self.local.uuid,
            generation_id=machine.startswith("pc-") and processes.has_device(description.name, binary, "vmgenid"),
        )
        return platform, chosen.reason


def _expect_index(repository: Repository) -> None:
    """Each page that is restored is looked up there."""
    readahead.expect((repository.environment.path,), bytes_max=_INDEX_BYTES)


def _restored_paths(memory: Memory, *, resumes: bool) -> dict[str, Path]:
    """Backing files by region; main memory is empty where a VM boots."""
    return {name: file.path for name, file in memory.files.items() if name != RAM or resumes}


def _memory_bytes(generation: Generation) -> int:
    """Bytes of a generation that go into memory; disks do not."""
    return sum(region.kept_bytes for region in generation.regions.values() if region.kind != "disk")
