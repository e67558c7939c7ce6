"""A lock on a job that one process at a time does to a repository: pruning, repairing, sealing anew.

It is a flock on a file in the repository, which dies with its holder; the file says who holds it and since when, and is
never removed. Captures, readers and everything else that only adds never take it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from base.errors import LockedError, StorageError

_POLL_SECONDS = 0.05


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lock's file."""

    purpose: str
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"{self.purpose} by process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def exclusive(path: Path, purpose: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock for as long as the block runs; waits for at most `wait_s`. Raises LockedError, StorageError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "open the lock") from error
    try:
        deadline = time.monotonic() + wait_s
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                raise LockedError(f"the repository is locked for {_holder(descriptor)} ({path})")
            time.sleep(_POLL_SECONDS)
        holder = Holder(
            purpose=purpose,
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with suppress(OSError):  # the lock is what counts, and pruning must be possible on a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, msgspec.json.encode(holder), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    try:
        return str(msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Holder))
    except (OSError, msgspec.DecodeError):
        return "somebody who has not said what for"
