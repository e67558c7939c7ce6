"""Scrubbing: what is not kept becomes holes, which read as zeros, and that is verified.

Works on backing files in tmpfs, where punching a hole frees the page: a later look finds no page, so that the
check costs what is left in the file and not its length. Pure system calls; safe anywhere while the VM is held.
"""

from __future__ import annotations

import os

from base import extents as ranges
from base.errors import IntegrityError, StorageError
from base.extents import Extents


def scrub(descriptor: int, path: str, scrubbable: Extents) -> int:
    """Punch out everything in `scrubbable` (bytes, page-aligned); gives the bytes that held something.

    Raises StorageError.
    """
    size = os.fstat(descriptor).st_size
    present = ranges.intersect(ranges.resident(descriptor, size), scrubbable)
    try:
        ranges.punch(descriptor, present)
    except OSError as error:
        raise StorageError.from_os(error, path, "scrub") from error
    verify_scrubbed(descriptor, path, scrubbable)
    return ranges.total(present)


def verify_scrubbed(descriptor: int, path: str, scrubbable: Extents) -> None:
    """Raises IntegrityError if there is still a page anywhere in `scrubbable`."""
    left = ranges.intersect(ranges.resident(descriptor, os.fstat(descriptor).st_size), scrubbable)
    if len(left):
        raise IntegrityError(
            path, f"{ranges.total(left)} bytes that must be scrubbed are still there", offset=int(left[0, 0])
        )
