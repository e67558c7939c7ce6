"""Leases: who uses a view of the repository, so that nothing it has seen is taken away.

A lease is a file in the repository's `leases` folder; its holder keeps an exclusive flock on it, which the kernel
drops when the holder dies. A lease whose lock can be taken is dead and is removed by whoever finds it. It says up to
which sequence its holder had replayed the history before its first look-up, and which generations it stands on: these
are roots of liveness, also when they are forgotten meanwhile. Order is the repository's sequence, never a clock.

The order that makes it safe: take the lease, then replay, then look whether the generations are still there, then look
up the first chunk (`store.repository.Repository.lease`). Whoever prunes lists leases first and replays after that.
So a holder that he sees is waited for, or its roots are marked; one that he does not see has replayed all that had been
published by then, and stands on generations that prune knows, or on such as were made by others like it. A lease may
then advance to the sequence that was replayed. That appends a line, and the last whole line counts: a reader never sees
half of a change, and at worst believes the older, lower sequence.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from base.errors import StorageError
from store import needs

WRITER, READER = "writer", "reader"

_NAME = re.compile(r"[0-9a-f]{16}")
_LAST_BYTES = 1 << 16
"""What is read of a lease, from its end: many times the longest line."""
_YIELD_SECONDS = 15.0
"""For writers that give way when somebody waits for them: they look every few seconds."""
_POLL_SECONDS = 0.1


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lease: who holds it, for what, since when; the last record it had seen before its first look-up;
    the sequences of the generations that it stands on. Prune waits for writers, and for readers never."""

    sequence: int
    purpose: str
    pid: int
    host: str
    since: str
    role: str = WRITER
    generations: tuple[int, ...] = ()
    yields: bool = False
    """Its holder looks every few seconds whether somebody waits for it, and then gives it back."""


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that somebody holds. `name` is that of its file: no two are ever the same."""

    name: str
    facts: LeaseFacts


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

    def advance(self, sequence: int) -> None:
        """Say that all look-ups to come see record `sequence`, and that there have been none before it."""
        if sequence > self.facts.sequence:
            facts = msgspec.structs.replace(self.facts, sequence=sequence)
            with suppress(OSError):  # a full disk: then the older one counts, and prune waits for longer
                os.lseek(self._descriptor, 0, os.SEEK_END)
                os.write(self._descriptor, _line(facts))
                self.facts = facts

    def release(self) -> None:
        """Give it back."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def take(
    folder: Path,
    sequence: int,
    purpose: str,
    *,
    role: str = READER,
    generations: Iterable[int] = (),
    yields: bool = False,
) -> Lease | None:
    """Take a lease; None in a repository that cannot be written, where nothing can be taken away either.

    Raises StorageError. The file appears under its name already locked, so that no sweep mistakes it for dead.
    """
    facts = LeaseFacts(
        sequence=sequence,
        purpose=purpose,
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        role=role,
        generations=tuple(generations),
        yields=yields,
    )
    name = secrets.token_hex(8)
    temporary, final = folder / f".{name}", folder / name
    descriptor = -1
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, _line(facts))
        temporary.rename(final)
    except OSError as error:
        if descriptor >= 0:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise StorageError.from_os(error, str(final), "take a lease") from error
    return Lease(final, facts, descriptor)


def held(folder: Path) -> list[HeldLease]:
    """Leases that are alive; dead ones are removed on the way. Needs are among them, as of readers.

    Raises StorageError.
    """
    alive = [
        HeldLease(name, LeaseFacts(sequence=0, purpose=need.purpose, pid=0, host=need.host, since=need.since,
                                   role=READER, generations=need.generations))
        for name, need in needs.listed(folder)
    ]  # fmt: skip
    path = folder
    try:
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):  # else it is being made, or no lease
                facts = _held(path)
                if facts is not None:
                    alive.append(HeldLease(path.name, facts))
    except OSError as error:
        raise StorageError.from_os(error, str(path), "read the lease") from error
    return alive


def writers(folder: Path) -> list[HeldLease]:
    """Leases of those who make something. Raises StorageError."""
    return [each for each in held(folder) if each.facts.role != READER]


def wait_for_writers(folder: Path, sequence: int, wait_s: float) -> list[HeldLease]:
    """Until no writer is there that had not seen this record when it began; gives those that are there after `wait_s`
    seconds, or after some more if all of them give way. Raises StorageError."""
    began = time.monotonic()
    while True:
        older = [each for each in writers(folder) if each.facts.sequence < sequence]
        patience = max(wait_s, _YIELD_SECONDS) if all(each.facts.yields for each in older) else wait_s
        if not older or time.monotonic() - began >= patience:
            return older
        time.sleep(_POLL_SECONDS)


def _held(path: Path) -> LeaseFacts | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(descriptor)
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> LeaseFacts:
    """The last whole line; of a lease that cannot be read the worst is assumed."""
    data = os.pread(descriptor, _LAST_BYTES, max(0, os.fstat(descriptor).st_size - _LAST_BYTES))
    for line in reversed(data.split(b"\n")[:-1]):
        with suppress(ValueError, RecursionError):
            return msgspec.json.decode(line, type=LeaseFacts)
    return LeaseFacts(sequence=0, purpose="unreadable lease", pid=0, host="?", since="?")


def _line(facts: LeaseFacts) -> bytes:
    return msgspec.json.encode(facts) + b"\n"
