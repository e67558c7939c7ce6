"""The emergency file: room that is set aside, so that pruning is possible when the disk is full.

Pruning takes a record or two and a small transaction of the index before it gives anything back. `perdure init` makes
the file, prune gives it up when it meets a full disk, and makes it again at its end.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from base.disk import Disk
from base.errors import StorageError

NAME = "reserve"
BYTES = 64 << 20


def make(repository: Path, disk: Disk) -> bool:
    """Set room aside if that is not so; False if there is none, and nothing is left behind then."""
    path = repository / NAME
    with suppress(OSError):
        if path.stat().st_size == BYTES:
            return True
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = disk.create(temporary)
        try:
            disk.allocate(descriptor, BYTES, temporary)
            disk.fsync(descriptor, temporary)
        finally:
            os.close(descriptor)
        disk.rename(temporary, path)
    except (OSError, StorageError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def give_up(repository: Path, disk: Disk) -> bool:
    """Give the room back to the file system; False if it was given up before. Raises StorageError."""
    path = repository / NAME
    if not path.exists():
        return False
    disk.unlink(path)
    return True
