"""Opening a repository for a command: find it, unlock it, and have worker processes ready before LMDB is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import TypeVar

from base.allocation import keep_freed_memory
from base.disk import Disk
from base.errors import RepositoryMissingError, StorageError, UsageError, WrongPassphraseError
from base.progress import Progress, silent
from base.workers import WorkerPool, usable_cores
from perdure import places, unlocking
from perdure.credentials import credential, stands_somewhere
from store.creation import read_mark
from store.index.environment import LOCK_WAIT_S
from store.keyring.files import read_key_files
from store.keyring.keys import Keys
from store.keyring.slots import Credential, unlock
from store.repository import Repository
from store.upkeep import reserve
from store.workers import serve

T = TypeVar("T")


def repository_path(given: str | None) -> Path:
    """From -r or PERDURE_REPOSITORY. Raises RepositoryMissingError."""
    path = given or os.environ.get("PERDURE_REPOSITORY")
    if not path:
        raise RepositoryMissingError("no repository was named: use -r PATH or set PERDURE_REPOSITORY")
    return Path(path).absolute()


def lock_wait_s(default: float = LOCK_WAIT_S) -> float:
    """Seconds from --lock-wait or PERDURE_LOCK_WAIT. Raises UsageError."""
    given = os.environ.get("PERDURE_LOCK_WAIT")
    if not given:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"--lock-wait (or PERDURE_LOCK_WAIT) is a number of seconds, and {given!r} is none")
    return seconds


@contextmanager
def opened(
    path: Path,
    *,
    workers: bool = False,
    progress: Progress = silent,
    given: Credential | None = None,
    keys: Keys | None = None,
    state: Path | None = None,
) -> Iterator[Repository]:
    """The repository, unlocked. `workers` makes a pool first: processes are forked before LMDB is opened.

    `given`: what opens it, if that was asked for already; `keys`: if it was opened already. `state`: a folder for its
    index, if not the usual one.
    """
    early = unlocking.begun(path) if given is None and keys is None else None
    read_mark(path)
    wait_s = lock_wait_s()
    keep_freed_memory()
    pool = WorkerPool(usable_cores(), serve) if workers else None
    try:
        again: Callable[[], Keys] | None = None
        if keys is None:
            asked = given or (early.given if early else credential())
            keys = early.keys() if early else unlock(read_key_files(path), asked)
            again = partial(_unlock_again, path, asked)
        with Repository(
            path,
            keys,
            state or places.repository_state(keys.repository_id),
            pool=pool,
            progress=progress,
            unlock=again,
            lock_wait_s=wait_s,
        ) as repository:
            yield repository
    finally:
        if pool is not None:
            pool.close()


def with_room(repository: Path, action: Callable[[], T]) -> T:
    """Do what gives room back; where the disk is too full for it, give up the emergency file and do it once more."""
    try:
        return action()
    except StorageError as error:
        if error.errno != ENOSPC or not reserve.give_up(repository, Disk()):
            raise
    return action()


def _unlock_again(path: Path, given: Credential) -> Keys:
    """Keys that somebody changed while a command runs (`perdure run` runs for months).

    If what it was started with was changed too, a file or command may have what opens them now; nobody is asked.
    """
    files = read_key_files(path)
    try:
        return unlock(files, given)
    except WrongPassphraseError:
        if not stands_somewhere():
            raise
        return unlock(files, credential())
