"""Locks between processes: a flock on a file, which dies with its holder; the file says who holds it, for what, since
when. The file is never removed.

A lock is taken anew each time, on a descriptor of its own, so threads of one process exclude each other too. Whoever
waits polls: what is protected takes milliseconds, and a wait must end in time (`wait_s`).
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from base.errors import LockedError, StorageError

_POLL_FIRST_S, _POLL_LONGEST_S = 0.0005, 0.05


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lock's file while it is held. `since` is RFC 3339 in UTC."""

    purpose: str
    pid: int
    host: str
    since: str


@contextmanager
def held(path: Path, purpose: str, wait_s: float) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing, for as long as the block runs.

    Waits for at most `wait_s` seconds. Raises LockedError, which names the holder; StorageError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "open the lock") from error
    try:
        _take(descriptor, path, purpose, wait_s)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
    finally:
        os.close(descriptor)


def holder(path: Path) -> Holder | None:
    """Who holds the lock of a file now; None if nobody does, or has not said so yet."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)
    return None


def _take(descriptor: int, path: Path, purpose: str, wait_s: float) -> None:
    deadline, pause = time.monotonic() + wait_s, _POLL_FIRST_S
    while not _taken(descriptor):
        if time.monotonic() >= deadline:
            raise _locked(path, purpose, _read(descriptor))
        time.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, deadline - time.monotonic())))
        pause = min(pause * 2, _POLL_LONGEST_S)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = Holder(purpose=purpose, pid=os.getpid(), host=socket.gethostname(), since=now)
    with suppress(OSError):  # a full disk: the lock is what counts
        os.pwrite(descriptor, msgspec.json.encode(facts), 0)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Holder)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


def _locked(path: Path, wanted: str, facts: Holder | None) -> LockedError:
    if facts is None:
        return LockedError(f"{wanted}: another process holds {path}; wait for longer with --lock-wait SECONDS")
    who = f"process {facts.pid} on {facts.host}, {facts.purpose} since {facts.since}"
    return LockedError(
        f"{wanted}: {path} is held by {who}; wait for longer with --lock-wait SECONDS",
        pid=facts.pid,
        host=facts.host,
        purpose=facts.purpose,
        since=facts.since,
    )
