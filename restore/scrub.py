"""Scrubbing: what is not kept becomes holes, which read as zeros, and that is verified.

Works on backing files in tmpfs, where punching a hole frees the page: a later look finds no page, so that the
check costs what is left in the file and not its length. Pure system calls; safe anywhere while the VM is held.
"""

from __future__ import annotations

import ctypes
import os

from base import extents as ranges
from base.errors import IntegrityError, StorageError
from base.extents import Extents

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, fallocate(2)


def scrub(descriptor: int, path: str, scrubbable: Extents) -> int:
    """Punch out everything in `scrubbable` (bytes, page-aligned); gives the bytes that held something.

    Raises StorageError. Source: fallocate(2).
    """
    size = os.fstat(descriptor).st_size
    present = ranges.intersect(ranges.resident(descriptor, size), scrubbable)
    for start, end in present.tolist():
        if _libc.fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, start, end - start):
            code = ctypes.get_errno()
            raise StorageError(path, f"cannot scrub: {os.strerror(code)}", errno=code)
    verify_scrubbed(descriptor, path, scrubbable)
    return ranges.total(present)


def verify_scrubbed(descriptor: int, path: str, scrubbable: Extents) -> None:
    """Raises IntegrityError if there is still a page anywhere in `scrubbable`."""
    left = ranges.intersect(ranges.resident(descriptor, os.fstat(descriptor).st_size), scrubbable)
    if len(left):
        raise IntegrityError(
            path, f"{ranges.total(left)} bytes that must be scrubbed are still there", offset=int(left[0, 0])
        )
