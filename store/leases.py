"""Leases: who uses a view of the repository, so that nothing it has seen is taken away.

A lease is a file in the repository's `leases` folder with the sequence that its holder has seen; the holder
keeps an exclusive flock on it, which the kernel drops when the holder dies. A lease whose lock can be taken is
dead and is removed by whoever finds it. Order is the repository's sequence, never a clock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from base.errors import StorageError


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lease file: who holds it, for what, since when, and the last sequence it had seen."""

    sequence: int
    purpose: str
    pid: int
    host: str
    since: str


@dataclass(slots=True)
class Lease:
    """A lease held by this process; a context manager."""

    path: Path
    facts: LeaseFacts
    _descriptor: int

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give it back."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def take(folder: Path, sequence: int, purpose: str) -> Lease | None:
    """Take a lease; None in a repository that cannot be written, where nothing can be taken away either.

    Raises StorageError. The file appears under its name already locked, so that no sweep mistakes it for dead.
    """
    facts = LeaseFacts(
        sequence=sequence,
        purpose=purpose,
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    name = secrets.token_hex(8)
    temporary, final = folder / f".{name}", folder / name
    descriptor = -1
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, msgspec.json.encode(facts))
        temporary.rename(final)
    except OSError as error:
        if descriptor >= 0:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise StorageError.from_os(error, str(final), "take a lease") from error
    return Lease(final, facts, descriptor)


def held(folder: Path) -> list[LeaseFacts]:
    """Leases that are alive; dead ones are removed on the way."""
    alive = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue  # being made
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alive.append(msgspec.json.decode(os.pread(descriptor, 4096, 0), type=LeaseFacts))
                continue
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return alive
