"""A disk that refuses, at any step of any operation, and a process that goes on: the error is named, nothing half-made
is visible, and the same operation, done again, is done.

Three ways to refuse: before anything happens; in the middle of a write, by a limit of the kernel's (RLIMIT_FSIZE), so
that write(2) itself comes back short; and after it has happened, when only the answer is lost, as on a network.
"""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest
from operations import NEW, OPERATIONS, OTHER, Run, prepared
from store_fixtures import PASSPHRASE
from test_crash_states import history, listed, newest, opened, whole

from base.disk import Disk
from base.errors import ConflictError, NotFoundError, StorageError, WrongPassphraseError
from store import format as layout
from store.keyring.files import read_key_files
from store.keyring.keychain import left_over
from store.keyring.slots import unlock
from store.records import GenerationBody, SwapBody, decode_record
from store.repository import Repository
from store.upkeep.check import check_repository


class Refusing(Disk):
    """Refuses its step number `at`: "before" or "after" it is done, or "short", within it."""

    def __init__(self, at: int = 0, how: str = "before") -> None:
        self.at, self.how, self.count, self.refused = at, how, 0, ""

    def step(self, operation: str, path: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.refused = operation
            if self.how == "before" or operation.startswith("lmdb"):
                self._refuse(path)

    def _refuse(self, path: str) -> None:
        code = errno.EIO if "sync" in self.refused else errno.ENOSPC
        raise StorageError(path, f"cannot {self.refused}: {os.strerror(code)}", errno=code)

    def _after(self, path: Path) -> None:
        if self.refused and self.count == self.at and self.how == "after":
            self.at = 0
            self._refuse(str(path))

    def create(self, path: Path, mode: int = 0o600) -> int:
        descriptor = super().create(path, mode)
        try:
            self._after(path)
        except StorageError:
            os.close(descriptor)
            path.unlink()
            raise
        return descriptor

    def write(self, descriptor: int, buffers: list[bytes], path: Path) -> int:
        if self.count + 1 == self.at and self.how == "short":
            size = os.fstat(descriptor).st_size + sum(map(len, buffers)) // 2
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                return super().write(descriptor, buffers, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        count = super().write(descriptor, buffers, path)
        self._after(path)
        return count

    def fsync(self, descriptor: int, path: Path) -> None:
        super().fsync(descriptor, path)
        self._after(path)

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        self._after(path)

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        super().mkdir(path, mode)
        self._after(path)

    def link(self, source: Path, target: Path) -> bool:
        done = super().link(source, target)
        self._after(target)
        return done

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._after(target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._after(path)


def steps(name: str) -> list[str]:
    """The operations of an undisturbed run."""

    class Listing(Disk):
        def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # as Disk has it
            seen.append(operation)

    seen: list[str] = []
    with prepared() as where:
        OPERATIONS[name](Run(where, Listing()))
    return seen


def cases(name: str) -> list[tuple[int, str]]:
    found = steps(name)
    return [
        (at, how)
        for how in ("before", "short", "after")
        for at, operation in enumerate(found, 1)
        if how == "before" or (operation == "write" if how == "short" else not operation.startswith("lmdb"))
    ]


def half_made(where, keys, refused: str, said: str) -> list[str]:
    """What should not be there: temporary files, packs that no record names, key slots that no keyring names."""
    found = [each.name for each in where.path.rglob(".*") if each.parent.name != "leases"]
    named, previous = set(), layout.ZERO_ID
    for sequence in range(1, int(newest(where, "records")) + 1):
        record = decode_record(keys, (where.path / layout.record_name(sequence)).read_bytes(), sequence, previous)
        previous = record.id
        if isinstance(record.body, GenerationBody):
            named |= set(record.body.packs)
        elif isinstance(record.body, SwapBody):  # what it removed may be there until the next prune
            named |= set(record.body.added)
    found += [each.name for each in (where.path / "packs").iterdir() if each.name not in named and each.name[0] != "."]
    if "keys were changed" not in said:  # else a removed slot may be left: the next change takes it away
        found += left_over(read_key_files(where.path))
    return [] if refused == "unlink" else found


def valid(where) -> bytes:
    files = read_key_files(where.path)
    for credential in (PASSPHRASE, NEW, OTHER):
        with suppress(WrongPassphraseError):
            unlock(files, credential)
            return credential
    raise AssertionError("nobody can open it")


@pytest.mark.parametrize("name", [each for each in OPERATIONS if each != "init"])
def test_refused_at_every_step(name):
    for at, how in cases(name):
        with prepared() as where:
            disk = Refusing(at, how)
            run = Run(where, disk)
            try:
                OPERATIONS[name](run)
                said = ""
            except StorageError as error:
                said = str(error)
                assert len(said.splitlines()) == 1
                assert str(where.root) in said or "/" in said, "it names what it is about"
            assert disk.refused
            keys = opened(where)
            assert not half_made(where, keys, disk.refused, said), (at, how, disk.refused, said)
            records = sorted(each.name for each in (where.path / "records").iterdir() if each.name.isdigit())
            expected = history(where, keys, records)
            with Repository(where.path, keys, where.state) as repository:
                assert listed(repository) == expected
            run.credential = valid(where)
            disk.at = 0
            with suppress(ConflictError, NotFoundError):
                OPERATIONS[name](run)
            with Repository(where.path, opened(where), where.root / "elsewhere") as repository:
                whole(repository)
                assert check_repository(repository).findings == []


@pytest.mark.parametrize("there", [False, True], ids=["new", "in an empty folder"])
def test_a_repository_that_could_not_be_made_leaves_nothing(there):
    """Neither half of one, nor a folder in which no other can be made."""
    for at, how in cases("init"):
        with prepared() as where:
            path = where.root / "deeper" / "repository"
            if there:
                path.mkdir(parents=True)
            disk = Refusing(at, how)
            try:
                OPERATIONS["init"](Run(where, disk))
            except StorageError as error:
                assert len(str(error).splitlines()) == 1
                assert path.exists() == there or disk.refused == "mkdir"
                assert not there or not list(path.iterdir()), (at, how, disk.refused)
                disk.at = 0
                OPERATIONS["init"](Run(where, disk))
            with Repository(path, unlock(read_key_files(path), PASSPHRASE), where.root / "fresh") as repository:
                assert repository.vms() == []
