"""Where the bytes of a region are while QEMU runs: in a file that it maps shared, or in its own memory only.

A `FileContent` is read like any file. A `ProcessContent` is read out of QEMU's process; which of its pages are there is
asked of its page tables. Offsets are those of the region. Open files, so one thread at a time.

Source: proc_pid_mem(5), proc_pid_pagemap(5); Linux, include/linux/swap.h for the types of swap entries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from base import extents as ranges
from base.errors import StorageError, VirtualMachineError
from base.extents import EMPTY, Extents
from base.units import PAGE
from vm.mappings import Mapping, shared_mappings

_PRESENT, _SWAPPED = np.uint64(1 << 63), np.uint64(1 << 62)
_TYPE, _MARKER = np.uint64(31), np.uint64(31)
"""Type of a swap entry; the last one is no page, but remembers that a page which is not there is protected. Who may not
see types (that takes CAP_SYS_ADMIN) reads such pages, and finds zeros."""
_ENTRIES = 1 << 20
"""Pages whose entries are read at once: 8 MiB."""


@dataclass(frozen=True, slots=True)
class ProcessRange:
    """`size` bytes at `start` of the memory of QEMU's process."""

    pid: int
    start: int
    size: int

    def __str__(self) -> str:
        return f"memory of process {self.pid}"


Place = Path | ProcessRange
"""Of a region's bytes: a backing file, or a part of QEMU's process."""


class Content(Protocol):
    """A region's bytes, open."""

    @property
    def descriptor(self) -> int | None:
        """A file that has them at the region's offsets, None if there is none."""

    def mappings(self, pid: int) -> list[Mapping]:
        """Where QEMU has them. Raises OSError."""

    def resident(self, end: int, start: int = 0) -> Extents:
        """What of [start, end) may be other than zero. Raises StorageError, VirtualMachineError."""

    def read_into(self, view: memoryview, at: int) -> None:
        """Fill `view` from offset `at` on. Raises StorageError, VirtualMachineError."""

    def close(self) -> None:
        """Let go of it."""


def open_content(place: Place) -> Content:
    """Raises StorageError, VirtualMachineError."""
    return FileContent(place) if isinstance(place, Path) else ProcessContent(place)


class FileContent:
    """In a backing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "open") from error

    def mappings(self, pid: int) -> list[Mapping]:
        """See Content, for this and the others."""
        return shared_mappings(pid, self.descriptor)

    def resident(self, end: int, start: int = 0) -> Extents:
        try:
            return ranges.resident(self.descriptor, end, start)
        except OSError as error:
            raise StorageError.from_os(error, str(self._path), "look for holes") from error

    def read_into(self, view: memoryview, at: int) -> None:
        try:
            while view and (got := os.preadv(self.descriptor, [view], at)):
                view, at = view[got:], at + got
        except OSError as error:
            raise StorageError.from_os(error, str(self._path), "read") from error
        view[:] = bytes(len(view))  # beyond the end

    def close(self) -> None:
        os.close(self.descriptor)


class ProcessContent:
    """In the memory of QEMU's process."""

    descriptor = None

    def __init__(self, place: ProcessRange) -> None:
        self._place = place
        self._memory = self._tables = -1
        try:
            self._memory = os.open(f"/proc/{place.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            self._tables = os.open(f"/proc/{place.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise VirtualMachineError(
                f"QEMU (process {place.pid}): its memory cannot be read: {error.strerror}"
            ) from error

    def mappings(self, pid: int) -> list[Mapping]:
        place = self._place
        return [Mapping(place.start, place.start + place.size, 0)] if pid == place.pid else []

    def resident(self, end: int, start: int = 0) -> Extents:
        found = [EMPTY]
        step = _ENTRIES * PAGE
        for at in range(start // PAGE * PAGE, end, step):
            pages = -(-(min(at + step, end) - at) // PAGE)
            try:
                raw = os.pread(self._tables, pages * 8, (self._place.start + at) // PAGE * 8)
            except OSError as error:
                pid = self._place.pid
                raise VirtualMachineError(f"QEMU (process {pid}): cannot look for holes: {error.strerror}") from error
            entries = np.frombuffer(raw, np.uint64)
            swapped = ((entries & _SWAPPED) != 0) & ((entries & _TYPE) != _MARKER)
            there = np.flatnonzero(((entries & _PRESENT) != 0) | swapped).astype(np.uint64)
            found.append(ranges.from_numbers(there + np.uint64(at // PAGE), PAGE))
        return ranges.intersect(ranges.union(*found), ranges.normalise([(start, end)]))

    def read_into(self, view: memoryview, at: int) -> None:
        pid = self._place.pid
        try:
            while view:
                got = os.preadv(self._memory, [view], self._place.start + at)
                if not got:
                    raise VirtualMachineError(f"QEMU (process {pid}) has ended")
                view, at = view[got:], at + got
        except OSError as error:
            raise VirtualMachineError(f"QEMU (process {pid}): its memory cannot be read: {error.strerror}") from error

    def close(self) -> None:
        for each in (self._memory, self._tables):
            if each >= 0:
                os.close(each)
