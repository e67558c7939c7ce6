"""Memory of this process for what is held for a moment: what there is no room for is said with what it was for."""

from __future__ import annotations

import mmap
import os

from base.errors import StorageError
from base.units import format_size


def file(what: str, size: int = 0) -> int:
    """A memory file without a name, all zeros, which the caller closes. Raises StorageError."""
    try:
        descriptor = os.memfd_create(f"perdure {what}", os.MFD_CLOEXEC)
    except OSError as error:
        raise _refused(error, what) from error
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        raise _refused(error, what) from error
    return descriptor


def mapped(what: str, descriptor: int, size: int) -> mmap.mmap:
    """All of a memory file. Raises StorageError."""
    try:
        return mmap.mmap(descriptor, size)
    except OSError as error:
        raise _refused(error, what) from error


def memory(what: str, size: int) -> mmap.mmap:
    """Anonymous, and there at once: a first touch costs more than a copy. Raises StorageError."""
    try:
        return mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    except OSError as error:
        raise _refused(error, f"{what}, {format_size(size)}") from error


def _refused(error: OSError, what: str) -> StorageError:
    return StorageError.from_os(error, f"memory for {what}", "have it")
