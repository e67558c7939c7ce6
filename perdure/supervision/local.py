"""What a VM has on this host: its description, its runtime folder (tmpfs), its durable folder, its disks; and what its
supervisors tell each other there: the parent of its memory, the journal, the region table.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from base.disk import Disk, replace_file
from base.errors import ConflictError, NotFoundError, StorageError
from capture.journal import Journal
from perdure import places
from perdure.disks.images import Disks
from perdure.supervision.measurements import measure
from restore.nursery import Nursery
from store.records import Generation
from store.repository import Repository
from vm.addresses import AddressMap
from vm.config import Description
from vm.folder import RuntimeFolder
from vm.identity import Identity
from vm.memory import Memory
from vm.networks import with_new_addresses
from vm.regions import Device

_MEMORY_FOLDERS = ("memory", "memory-2")
_TABLE = "regions.json"
_PARENT = "parent"


class Local:
    """One VM on this host. `state` is its durable folder. `clone`: a copy of another VM's generation, with addresses
    and an identity of its own, whose disks are never the files that the description names."""

    def __init__(self, description: Description, folder: RuntimeFolder, state: Path, *, clone: bool = False) -> None:
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"perdure:{state}"))
        if clone:
            extra = with_new_addresses(description.extra, self.uuid)[0]
            description = msgspec.structs.replace(description, extra=tuple(extra))
        self.description, self.folder, self.state, self.clone = description, folder, state, clone
        self.disk = Disk()
        self.disks = Disks(description, folder, state, clone=clone)
        self.measurements = measure(description)
        self.nursery: Nursery | None = None
        """Makes page servers at once; without it, each takes as long as its imports."""

    @property
    def name(self) -> str:
        """Of the VM."""
        return self.description.name

    @property
    def qemu_loaded(self) -> Path:
        """What of its files the QEMU of this VM has loaded (vm.readahead)."""
        return self.state / "qemu.loaded"

    @property
    def working_sets(self) -> Path:
        """What earlier resumes touched, of its generations and of those that it is a copy of."""
        return places.working_sets()

    def memory_folders(self) -> Iterator[Path]:
        """Those that are there."""
        return (folder for name in _MEMORY_FOLDERS if (folder := self.folder.path / name).exists())

    def free_memory_folder(self) -> Path:
        """One for new memory, beside that of a QEMU that may run. Raises ConflictError."""
        for name in _MEMORY_FOLDERS:
            if not Memory.exists(self.folder.path / name):
                return self.folder.path / name
        raise ConflictError(f"VM {self.description.name}: memory of earlier runs is in {self.folder.path}")

    def existing_memory(self, folder: Path) -> Memory:
        """Memory that an earlier supervisor made. Raises VirtualMachineError, StorageError."""
        return Memory.existing(self.name, folder, self.description.backing_sizes)

    def release_memory(self, folder: Path) -> None:
        """Give it back, without a look at it."""
        Memory(self.name, folder, {}).release()

    def table(self, memory: Path) -> Path:
        """The region table of a memory folder: where there is one, that memory was whole, and QEMU has had it."""
        return memory / _TABLE

    def devices(self, addresses: AddressMap) -> list[Device]:
        """The NVDIMMs where QEMU has put them."""
        return [
            Device(region.name, addresses.address_of(region.name, 0), int(region.size), region.mode)
            for region in self.description.regions
        ]

    def note_parent(self, generation: Generation | None) -> None:
        """Remember over a restart of the supervisor which generation the memory descends from."""
        content = b"" if generation is None else generation.id.encode()
        replace_file(self.disk, self.folder.path / _PARENT, content)

    def journal(self, identity: Identity) -> Journal:
        """Of what a tracker has collected from a process."""
        return Journal(self.folder.path / "journal.json", identity, self.disk)

    def bases(self, repository: Repository, journal: Journal) -> dict[str, Generation]:
        """By region, the generation since which the journal knows what changed, unless it was forgotten meanwhile."""
        found = {}
        for name in self.description.backing_sizes:
            noted = journal.baseline(name)
            if noted is not None:
                with suppress(NotFoundError):
                    found[name] = repository.resolve(noted)
        return found

    def parent(self, repository: Repository) -> Generation | None:
        """The generation that the memory descends from, unless it was forgotten meanwhile. Raises StorageError."""
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
