"""Which pages of a file a process has written, by PAGEMAP_SCAN (Linux 6.7 and newer).

    PAGEMAP_SCAN  struct pm_scan_arg  u64 size=96, flags, start, end, walk_end, vec, vec_len, max_pages,
                                      category_inverted, category_mask, category_anyof_mask, return_mask
                  struct page_region  u64 start, end, categories

Source: ioctl_pagemap_scan(2), Documentation/admin-guide/mm/pagemap.rst, <linux/fs.h>.

Reading and re-arming are one atomic step for each page in the kernel. Only exactly this combination of masks may be
used: category and return masks PAGE_IS_WRITTEN and nothing else. It takes a path of its own in the kernel, on which
a written page whose page table entry has been dropped since (swapped out, reclaimed) still counts as written; with
other masks, kernels before "fix PAGEMAP_SCAN written state for unpopulated ptes" (2026) report such a page as clean.

A `Pagemap` holds QEMU's address space open, not its pid: it can never read another process by mistake. It owns one
vector, so one thread at a time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from base.extents import EMPTY, Extents, normalise
from vm.mappings import Mapping

_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
_ARGUMENT = struct.Struct("12Q")
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_PAGE_IS_WRITTEN = 1 << 1
VECTOR = 1 << 16
"""Runs of pages that one ioctl can report (1.5 MiB, touched as far as needed); the scan resumes when it is full."""


class Pagemap:
    """The page tables of one process; a context manager that closes them."""

    def __init__(self, pid: int, vector: int = VECTOR) -> None:
        """Opens /proc/PID/pagemap. Raises OSError."""
        self._vector = np.empty((vector, 3), np.uint64)
        self._file = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def written(self, mappings: Iterable[Mapping], *, rearm: bool) -> Extents:
        """Byte ranges in the file that were written through the mappings since they were last armed.

        With `rearm` exactly the reported pages are armed again. Raises PermissionError (EPERM) where a mapping is
        not registered for asynchronous write protection, other OSErrors as the kernel gives them.
        """
        flags = _CHECK_WPASYNC | (_WP_MATCHING if rearm else 0)
        found = [each for mapping in mappings for each in self._scan(mapping, flags)]
        return normalise(np.concatenate(found)) if found else EMPTY.copy()

    def close(self) -> None:
        """Close the process's page tables."""
        os.close(self._file)

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scan(self, mapping: Mapping, flags: int) -> list[Extents]:
        found = []
        at = mapping.start
        while at < mapping.end:
            count, walked = _pagemap_scan(self._file, flags, at, mapping.end, self._vector)
            if count:
                rows = self._vector[:count, :2].astype(np.int64)
                rows += mapping.offset - mapping.start
                found.append(rows)
            if walked <= at:
                raise OSError(errno.EIO, f"PAGEMAP_SCAN made no progress at {at:#x}")
            at = walked
        return found


def has_pagemap_scan() -> bool:
    """Whether this kernel knows PAGEMAP_SCAN: tried on an empty range of our own."""
    page = ctypes.create_string_buffer(8192)
    start = (ctypes.addressof(page) + 4095) & ~4095
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            _pagemap_scan(pagemap.fileno(), 0, start, start + 4096, np.empty((1, 3), np.uint64))
    except OSError:  # ENOTTY before 6.7; whatever else it is, it cannot be used
        return False
    return True


def _pagemap_scan(file: int, flags: int, start: int, end: int, vector: NDArray[np.uint64]) -> tuple[int, int]:
    """One ioctl; gives how many rows of `vector` were filled, and the address up to which it looked."""
    argument = bytearray(
        _ARGUMENT.pack(
            _ARGUMENT.size, flags, start, end, 0,
            vector.ctypes.data, len(vector), 0,
            0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN,
        )
    )  # fmt: skip
    count = fcntl.ioctl(file, _PAGEMAP_SCAN, argument)
    return count, _ARGUMENT.unpack(argument)[4]
