"""The region table of one VM: which devices can hold persistent memory, and which ranges of them are tagged.

`Regions` is the table at one moment, an immutable value with pure operations: take it once where several answers
must agree (what a capture keeps and the tags it records). `RegionTable` owns the present one and its file; every
change is in the file, by atomic replacement, before the call returns, and not in memory if the file could not be
written. The file lies in the tmpfs of the memory that it describes and shares its fate.

Invariants: every tag is page aligned, not empty, inside the data area of one device, and disjoint from all other
tags; at most TAGS_MAX of them. Tags are held relative to their device, since QEMU may place devices elsewhere at
the next launch; guest-physical addresses are computed.

What is kept of a device is never less than its tags: all of it where a file system may live (fsdax, raw), the
tags and the info block otherwise (devdax).

Thread-safe: one lock around every change; reading `RegionTable.regions` needs none. One process at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from base.disk import Disk, replace_file
from base.errors import ConflictError, FormatVersionError, IntegrityError, NotFoundError, StorageError, UsageError
from base.extents import Extents, normalise, subtract
from base.units import PAGE
from vm.protocol import (
    NAME_CHARACTERS_MAX,
    TAGS_MAX,
    Kind,
    Mode,
    RegionEntry,
    RequestRefusedError,
    name_problem,
    printable,
)

FORMAT = 1
INFO_BLOCK = 2 << 20
"""Bytes at the start of a devdax or fsdax namespace that describe it; the guest's data starts after them."""
HOST = "host"
"""Owner of a tag that was made on the host."""


class TagRefusedError(RequestRefusedError):
    """A mark or unmark is not carried out; `kind` is the protocol's. Always one of the two below."""


class TagInvalidError(TagRefusedError, UsageError):
    """The range or name is wrong by itself: bounds, alignment, malformed, limit."""


class TagConflictError(TagRefusedError, ConflictError):
    """The range contradicts a tag that is there: overlap; or there are too many: limit."""


class Device(msgspec.Struct, frozen=True):
    """One NVDIMM: `size` bytes at guest-physical `address`, backed from offset 0 of one file."""

    name: str
    address: int
    size: int
    mode: Mode = "devdax"

    @property
    def data_start(self) -> int:
        """Offset of the first byte that can be tagged."""
        return 0 if self.mode == "raw" else min(INFO_BLOCK, self.size)


class Tag(msgspec.Struct, frozen=True):
    """A persistent range: `size` bytes at `offset` of a device (and of its backing file).

    `created` and `modified` are seconds since the epoch, `modified` of the content as far as captures have seen
    it; `generation` is the latest in which bytes of it had changed.
    """

    device: str
    offset: int
    size: int
    name: str | None = None
    owner: str = HOST
    permissions: str = "rw"
    created: float = 0.0
    modified: float = 0.0
    generation: int | None = None

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.size


class Regions(msgspec.Struct, frozen=True):
    """A VM's devices and tags at one moment; tags sorted by device and offset. Operations give a new value."""

    vm: str
    devices: tuple[Device, ...]
    tags: tuple[Tag, ...] = ()

    @classmethod
    def of(cls, vm: str, devices: Sequence[Device], tags: Sequence[Tag] = ()) -> Regions:
        """A table that holds the invariants, tags in any order. Raises ConflictError if these do not fit together."""
        ordered = tuple(sorted(tags, key=lambda tag: (tag.device, tag.offset)))
        regions = cls(vm, tuple(sorted(devices, key=lambda device: device.address)), ordered)
        problem = next(regions._problems(), None)
        if problem is not None:
            raise ConflictError(f"VM {vm}: {problem}")
        return regions

    def device(self, name: str) -> Device:
        """The device of that name. Raises NotFoundError."""
        for device in self.devices:
            if device.name == name:
                return device
        raise NotFoundError(f"VM {self.vm} has no region {name}")

    def mark(self, address: int, size: int, name: str | None, owner: str, now: float) -> Regions:
        """With [address, address + size) tagged. The same range under the same name again only renews its owner.

        Raises TagRefusedError.
        """
        device, offset = self._locate(address, size)
        problem = name_problem(name)
        if problem is not None:
            raise TagInvalidError(problem[0], f"VM {self.vm}: {problem[1]}")
        new = Tag(device.name, offset, size, name, printable(owner, NAME_CHARACTERS_MAX), created=now, modified=now)
        for old in self._touching(device, offset, size):
            if (old.offset, old.size, old.name) != (offset, size, name):
                raise TagConflictError(
                    "overlap", f"VM {self.vm}: {_span(address, size)} overlaps the tag {self._describe(old)}"
                )
            renewed = msgspec.structs.replace(old, owner=new.owner)
            return self._with([renewed if tag is old else tag for tag in self.tags])
        return self._with([*self.tags, new])

    def unmark(self, address: int, size: int) -> Regions:
        """With nothing of [address, address + size) tagged: a tag that reaches beyond is trimmed, or split.

        Raises TagRefusedError.
        """
        device, offset = self._locate(address, size)
        left: list[Tag] = []
        for tag in self.tags:
            if tag.device != device.name or tag.end <= offset or tag.offset >= offset + size:
                left.append(tag)
                continue
            for start, end in ((tag.offset, offset), (offset + size, tag.end)):
                if start < end:
                    left.append(msgspec.structs.replace(tag, offset=start, size=end - start))
        return self._with(left)

    def changed(self, device: str, dirty: Extents, generation: int, now: float) -> Regions:
        """With the tags that `dirty` (offsets into the device) touches modified in `generation`."""
        mine = [tag for tag in self.tags if tag.device == device]
        if not mine or not len(dirty):
            return self
        starts = np.array([tag.offset for tag in mine], np.int64)
        ends = np.array([tag.end for tag in mine], np.int64)
        first = np.searchsorted(dirty[:, 1], starts, "right")  # the first dirty range that ends behind the start
        touched = np.append(dirty[:, 0], np.iinfo(np.int64).max)[first] < ends
        renewed = {
            tag.offset: msgspec.structs.replace(tag, modified=now, generation=generation)
            for tag, hit in zip(mine, touched.tolist(), strict=True)
            if hit
        }
        return self._with([renewed.get(tag.offset, tag) if tag.device == device else tag for tag in self.tags])

    def entries(self) -> list[RegionEntry]:
        """Devices and tags with their guest-physical addresses, by address, a device before its tags."""
        listed: list[RegionEntry] = []
        for device in self.devices:
            listed.append(RegionEntry(device.address, device.size, "reserved", None, None, device.name, device.mode))
            for tag in (each for each in self.tags if each.device == device.name):
                where = device.address + tag.offset
                entry = RegionEntry(where, tag.size, "persistent", tag.name, tag.owner, device.name, device.mode)
                listed.append(
                    msgspec.structs.replace(
                        entry,
                        permissions=tag.permissions,
                        created=tag.created,
                        modified=tag.modified,
                        generation=tag.generation,
                    )
                )
        return listed

    def kept(self, device: str) -> Extents:
        """What of a device's backing file survives a reboot, as file offsets. Raises NotFoundError."""
        found = self.device(device)
        if found.mode != "devdax":
            return normalise([(0, found.size)])
        tagged = [(tag.offset, tag.end) for tag in self.tags if tag.device == device]
        return normalise([(0, found.data_start), *tagged])

    def scrubbable(self, device: str) -> Extents:
        """The rest of the backing file: what a reboot scrubs. Raises NotFoundError."""
        return subtract(normalise([(0, self.device(device).size)]), self.kept(device))

    def to_tags(self) -> list[dict[str, Any]]:
        """The tags for a generation's metadata: plain values, no guest-physical addresses."""
        plain: list[dict[str, Any]] = msgspec.to_builtins(self.tags, builtin_types=())
        return list(plain)

    def _locate(self, address: int, size: int) -> tuple[Device, int]:
        """The device that holds a range in its data area, and the range's offset there."""
        if not 0 <= address < 1 << 64 or not 0 < size < 1 << 64:
            raise self._refused("bounds", "a range has a 64-bit address and a size above 0")
        if address % PAGE or size % PAGE:
            raise self._refused("alignment", f"{_span(address, size)} is not aligned to pages of {PAGE} bytes")
        for device in self.devices:
            if device.address + device.data_start <= address and address + size <= device.address + device.size:
                return device, address - device.address
        for device in self.devices:
            if device.address <= address < device.address + device.size:
                area = _span(device.address + device.data_start, device.size - device.data_start)
                raise self._refused("bounds", f"{_span(address, size)} is not inside {area}, the data of {device.name}")
        raise self._refused("bounds", f"{_span(address, size)} is in no persistent memory device")

    def _touching(self, device: Device, offset: int, size: int) -> Iterator[Tag]:
        for tag in self.tags:
            if tag.device == device.name and tag.offset < offset + size and offset < tag.end:
                yield tag

    def _with(self, tags: list[Tag]) -> Regions:
        if len(tags) > TAGS_MAX:
            raise TagConflictError("limit", f"VM {self.vm}: no more than {TAGS_MAX} tags: unmark some first")
        tags.sort(key=lambda tag: (tag.device, tag.offset))
        return Regions(self.vm, self.devices, tuple(tags))

    def _problems(self) -> Iterator[str]:
        """What contradicts the invariants, in sentences."""
        for device in self.devices:
            if device.address % PAGE or device.size % PAGE or device.address < 0 or device.size <= 0:
                yield f"region {device.name} is not aligned to pages"
        for low, high in zip(self.devices, self.devices[1:], strict=False):
            if low.address + low.size > high.address:
                yield f"regions {low.name} and {high.name} overlap in guest-physical memory"
        known = {device.name: device for device in self.devices}
        if len(known) != len(self.devices):
            yield "two regions have the same name"
        if len(self.tags) > TAGS_MAX:
            yield f"{len(self.tags)} tags are more than {TAGS_MAX}"
        for tag in self.tags:
            home = known.get(tag.device)
            if home is None:
                yield f"there is a tag on region {tag.device}, which it does not have"
            elif tag.offset % PAGE or tag.size % PAGE or tag.size <= 0:
                yield f"the tag at offset {tag.offset:#x} of region {tag.device} is not aligned to pages"
            elif tag.offset < home.data_start or tag.end > home.size:
                yield f"the tag at offset {tag.offset:#x} of region {tag.device} is not inside its data"
        for tag, after in zip(self.tags, self.tags[1:], strict=False):
            if tag.device == after.device and tag.end > after.offset:
                yield f"two tags overlap at offset {after.offset:#x} of region {tag.device}"

    def _describe(self, tag: Tag) -> str:
        span = _span(self.device(tag.device).address + tag.offset, tag.size)
        return span if tag.name is None else f"{tag.name!r} at {span}"

    def _refused(self, kind: Kind, problem: str) -> TagInvalidError:
        return TagInvalidError(kind, f"VM {self.vm}: {problem}")


class _File(msgspec.Struct):
    """The table as it is stored."""

    format: int
    regions: Regions


class _FileFormat(msgspec.Struct):
    """What of it is looked at first."""

    format: int


class RegionTable:
    """The region table of a VM whose memory exists, durable in one file. Made by `create`, `from_tags` or `load`."""

    def __init__(self, file: Path, regions: Regions, disk: Disk, clock: Callable[[], float]) -> None:
        self.file = file
        self._regions = regions
        self._disk, self._clock = disk, clock
        self._lock = threading.Lock()
        self._stored: bytes | None = None  # what the file holds; None: not known, so write it

    @classmethod
    def create(
        cls,
        file: Path,
        vm: str,
        devices: Sequence[Device],
        tags: Sequence[Tag] = (),
        *,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> RegionTable:
        """Start a table, replacing the file. Raises ConflictError if tags and devices do not fit, StorageError."""
        table = cls(file, Regions.of(vm, devices, tags), disk or Disk(), clock)
        table._settle(table._regions)
        return table

    @classmethod
    def from_tags(
        cls,
        file: Path,
        vm: str,
        devices: Sequence[Device],
        tags: Sequence[dict[str, Any]],
        *,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> RegionTable:
        """Start a table with the tags of a generation, as `Regions.to_tags` gave them.

        Raises IntegrityError if they are not tags, ConflictError if they do not fit the devices.
        """
        try:
            restored = msgspec.convert(tags, tuple[Tag, ...])
        except msgspec.ValidationError as error:
            raise IntegrityError(f"tags of a generation of VM {vm}", str(error)) from error
        return cls.create(file, vm, devices, restored, disk=disk, clock=clock)

    @classmethod
    def load(
        cls,
        file: Path,
        vm: str,
        devices: Sequence[Device] | None = None,
        *,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> RegionTable:
        """Take over the table of memory that is there already, with the devices where they are now (None: as stored).

        A missing file is an error and not an empty table: what is not tagged is scrubbed at the next reboot.
        Raises NotFoundError, StorageError, FormatVersionError, IntegrityError; ConflictError if the file is of
        another VM, or has tags that do not fit the devices.
        """
        stored = _read(file, vm)
        if stored.vm != vm:
            raise ConflictError(f"{file}: this is the region table of VM {stored.vm}, not of {vm}")
        regions = Regions.of(vm, stored.devices if devices is None else devices, stored.tags)
        seam = disk or Disk()
        for left in file.parent.glob(f".{file.name}.*.tmp"):  # of a supervisor that was killed while it stored
            seam.unlink(left)
        table = cls(file, regions, seam, clock)
        if regions != stored:
            table._settle(regions)
        return table

    @property
    def regions(self) -> Regions:
        """The table at this moment; it does not change."""
        return self._regions

    def mark(self, address: int, size: int, name: str | None = None, owner: str = HOST) -> None:
        """Tag [address, address + size) of guest-physical memory; durable on return.

        Idempotent. Raises TagRefusedError, StorageError.
        """
        with self._lock:
            self._settle(self._regions.mark(address, size, name, owner, self._clock()))

    def unmark(self, address: int, size: int) -> None:
        """Remove tags from [address, address + size), splitting what reaches beyond; durable on return.

        Idempotent. Raises TagRefusedError, StorageError.
        """
        with self._lock:
            self._settle(self._regions.unmark(address, size))

    def query(self) -> list[RegionEntry]:
        """Devices and tags, by guest-physical address."""
        return self._regions.entries()

    def scrubbable(self, device: str) -> Extents:
        """`Regions.scrubbable` of this moment."""
        return self._regions.scrubbable(device)

    def changed(self, dirty: dict[str, Extents], generation: int) -> None:
        """Note what a generation found changed, by device; durable on return. Raises StorageError."""
        with self._lock:
            regions, now = self._regions, self._clock()
            for device, extents in dirty.items():
                regions = regions.changed(device, extents, generation, now)
            self._settle(regions)

    def _settle(self, regions: Regions) -> None:
        """Make `regions` the present table: on the disk, then in memory."""
        content = msgspec.json.encode(_File(FORMAT, regions))
        if content != self._stored:
            self._stored = None  # if storing fails half-way the file may be either: the next call writes it again
            replace_file(self._disk, self.file, content)
            self._stored = content
        self._regions = regions


def _read(file: Path, vm: str) -> Regions:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{file}: the region table of VM {vm} is missing") from error
    except OSError as error:
        raise StorageError.from_os(error, str(file), "read") from error
    try:
        version = msgspec.json.decode(content, type=_FileFormat).format
        if version > FORMAT:
            raise FormatVersionError(str(file), version, FORMAT)
        return msgspec.json.decode(content, type=_File).regions
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise IntegrityError(str(file), f"not a region table: {error}") from error


def _span(address: int, size: int) -> str:
    return f"{address:#x}-{address + size:#x}"
