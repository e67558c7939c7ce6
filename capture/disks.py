"""The disks of a generation: what of each is read, from the instant that QEMU keeps of it, and why.

Where it is followed what the guest writes (by QEMU's dirty bitmaps), only that is read, and the page map goes on from
that of the generation since which it is followed. Everything else is read in full and compared: a disk that no
generation has yet, one whose bitmap is missing or not to be trusted, one whose base has lost something.

A bitmap does not tell everything. What a disk has grown by is read, since a device that grows need not be zero there.
A disk that was made smaller and larger again has lost both content and the bits that would say so: the last chunk that
should be as it was is read as well, and where it is not, all of the disk is. (What was cut off and not written since is
zero now. If that begins above the last such chunk, there was nothing in it; if not, the chunk itself is zero.)

Plain calls of the thread that captures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

from base import extents as ranges
from base import private
from base.extents import Extents
from base.progress import Progress
from store.records import Generation
from store.writer import GenerationWriter, RegionDraft
from vm.config import DISK_PREFIX

DISK_CHUNK = 64 << 10
"""Unit of deduplication of disks, in bytes."""
_WINDOW = 64 << 20
"""Bytes of a disk that are read at a time: bounds memory."""
_METADATA = "disks"
"""Where a generation's metadata says how its disks were captured."""

Method = Literal["bitmap", "rescan"]


@dataclass(frozen=True, slots=True)
class CapturedDisk:
    """What is known of a disk before it is captured. `base`: the newest generation that has it, if there is one.

    `problem`: why it is not known what was written since then; None: it is. `token` names what is followed from this
    instant on, and so says, once it stands in a generation's metadata, which one that belongs to.
    """

    name: str
    base: Generation | None
    problem: str | None
    token: str

    @property
    def region(self) -> str:
        """Its name in a generation."""
        return f"{DISK_PREFIX}{self.name}"


class FrozenDisk(Protocol):
    """A disk as it was at the instant; a context manager. `size` is in bytes."""

    name: str
    size: int

    def data(self, start: int, end: int) -> Extents:
        """What of [start, end) may be other than zero."""

    def written(self, start: int, end: int) -> Extents:
        """What of [start, end) was written since the base; asked only where that is followed."""

    def read_into(self, descriptor: int, extents: Extents) -> None:
        """Copy ranges into a file, to the same offsets."""

    def __enter__(self) -> FrozenDisk: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Disks(Protocol):
    """The disks of one capture, and the steps to the instant that is kept of them."""

    @property
    def captured(self) -> Sequence[CapturedDisk]:
        """Which they are."""

    def prepare(self) -> None:
        """What can be done before the guest is stopped."""

    def freeze(self) -> None:
        """Keep this instant of all of them; the guest is stopped, and its device state saved."""

    def frozen(self) -> Iterator[FrozenDisk]:
        """The disks as they were, in the order of `captured`."""

    def release(self) -> None:
        """Undo `prepare` and `freeze`; whatever happened."""


@dataclass(frozen=True, slots=True)
class DiskRead:
    """How a disk was captured. `reason` is half a sentence for the user; `read_bytes` were read of `size`."""

    method: Method
    reason: str
    read_bytes: int
    size: int


def store_disks(
    writer: GenerationWriter, disks: Disks, bases: dict[str, Generation], progress: Progress
) -> dict[str, DiskRead]:
    """Put what the disks held at the instant into the generation; what was done, by name.

    `bases`: generations that the writer begins from, by region. Raises what readers and the writer raise.
    """
    done = {}
    for captured, disk in zip(disks.captured, disks.frozen(), strict=True):
        with disk:
            done[captured.name] = _store(writer, captured, disk, bases.get(captured.region), progress)
    return done


def recorded(disks: Sequence[CapturedDisk], done: dict[str, DiskRead]) -> dict[str, Any]:
    """For the metadata of a generation: how each disk was captured, and the token of what is followed since."""
    return {
        _METADATA: {
            disk.name: {
                "bitmap": disk.token,
                "method": done[disk.name].method,
                "reason": done[disk.name].reason,
                "read_bytes": done[disk.name].read_bytes,
            }
            for disk in disks
        }
    }


def token_of(generation: Generation | None, disk: str) -> str | None:
    """What a disk is followed by since this generation, which has it; None if by nothing."""
    if generation is None or f"{DISK_PREFIX}{disk}" not in generation.regions:
        return None
    noted = generation.metadata.get(_METADATA)
    found = noted.get(disk) if isinstance(noted, dict) else None
    token = found.get("bitmap") if isinstance(found, dict) else None
    return token if isinstance(token, str) and token else None


def reads_of(generation: Generation) -> dict[str, Any]:
    """How the disks of a generation were captured, by name, without what is of no use to people."""
    noted = generation.metadata.get(_METADATA)
    if not isinstance(noted, dict):
        return {}
    return {
        name: {key: value for key, value in each.items() if key != "bitmap"}
        for name, each in noted.items()
        if isinstance(each, dict)
    }


def _store(
    writer: GenerationWriter, captured: CapturedDisk, disk: FrozenDisk, base: Generation | None, progress: Progress
) -> DiskRead:
    draft = writer.region(captured.region, "disk", disk.size, chunk_size=DISK_CHUNK)
    everything = ranges.normalise([(0, disk.size)])
    problem = captured.problem or _unfit(draft, captured, base)
    if problem is None:
        assert base is not None
        changed = _changed(disk, base.regions[captured.region].root.length)
        if _is_as_it_was(writer, draft, disk, changed):
            return DiskRead(
                "bitmap", f"written since {base.name}", _replace(writer, draft, disk, changed, progress), disk.size
            )
        problem = f"it is not what its bitmap says it is since {base.name}: was it made smaller?"
    return DiskRead("rescan", problem, _replace(writer, draft, disk, everything, progress), disk.size)


def _unfit(draft: RegionDraft, captured: CapturedDisk, base: Generation | None) -> str | None:
    """Why the page map of the base cannot be gone on from; None if it can."""
    if base is None or captured.base is None or base.id != captured.base.id:
        return "the generation since which it was followed was forgotten"
    if draft.anew:
        return f"{base.name} has lost something"
    if base.regions[captured.region].root.chunk_size != DISK_CHUNK:
        return f"{base.name} has it in chunks of another size"
    return None


def _changed(disk: FrozenDisk, length: int) -> Extents:
    """What was written since the disk had `length` bytes, in whole chunks; where it has another size, also what it has
    grown by, or the chunk that its end cuts."""
    written = ranges.widen(disk.written(0, disk.size), DISK_CHUNK)
    end = disk.size if disk.size == length else min(disk.size, length) // DISK_CHUNK * DISK_CHUNK
    return ranges.intersect(
        ranges.union(written, ranges.normalise([(end, disk.size)])), ranges.normalise([(0, disk.size)])
    )


def _is_as_it_was(writer: GenerationWriter, draft: RegionDraft, disk: FrozenDisk, changed: Extents) -> bool:
    """Whether the last chunk that has something, and that was not written, has what it had."""
    last = writer.last_chunk(draft, ranges.widen(changed, DISK_CHUNK))
    if last is None:
        return True
    before = draft.root
    start = last * DISK_CHUNK
    _replace_window(writer, draft, disk, ranges.normalise([(start, min(start + DISK_CHUNK, disk.size))]))
    return draft.root == before


def _replace(
    writer: GenerationWriter, draft: RegionDraft, disk: FrozenDisk, extents: Extents, progress: Progress
) -> int:
    """Read ranges of a disk, window by window; gives how many bytes of them were no holes."""
    read = 0
    for start in range(0, disk.size, _WINDOW):
        end = min(start + _WINDOW, disk.size)
        part = ranges.intersect(extents, ranges.normalise([(start, end)]))
        if len(part):
            read += _replace_window(writer, draft, disk, part)
        progress(draft.name, end, disk.size)
    return read


def _replace_window(writer: GenerationWriter, draft: RegionDraft, disk: FrozenDisk, part: Extents) -> int:
    start, end = int(part[0, 0]), int(part[-1, 1])
    window = private.file(f"disk {disk.name}", end)
    with ExitStack() as stack:
        stack.callback(os.close, window)
        there = ranges.intersect(disk.data(start, end), part)
        disk.read_into(window, there)
        writer.replace(draft, window, part)
    return ranges.total(there)
