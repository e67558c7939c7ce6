"""The storage seam: named immutable objects, put-if-absent, get, get-range, list, delete.

Owns where objects lie and how they become durable. `LocalStorage` keeps them in a folder on a local disk:

    config  keys/  keyring/  packs/  records/  leases/

An object that is visible under its name is complete, durable once `settle` or `put` has returned, and is never
written again. Object storage can stand behind the same protocol later: nothing here appends to, renames or
locks an object. Safe to share between threads; may be inherited over fork (descriptors are opened anew).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from base.disk import Disk
from base.errors import IntegrityError, PerdureError, StorageError

_TEMPORARY = ".writing-"
_OPEN_FILES = 64
WRITTEN_WRONG = "what is in the file is not what was written: nothing was published; faulty memory or disk"
WHOLE_BYTES_MAX = 512 << 20
"""More than the largest record: somebody who can write the folder must not choose how much memory reading takes."""
_HASTEN_BYTES = 1 << 20
"""Writes from this size on are sent on their way to the disk at once: the fsync at the end then waits for little."""


class ObjectMissingError(IntegrityError):
    """An object that must exist does not."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "is missing from the repository")


class PendingObject(Protocol):
    """An object being written by one writer; nobody sees it before `publish`."""

    @property
    def size(self) -> int:
        """Bytes written so far."""

    def write(self, buffers: list[bytes]) -> None:
        """Append. Raises StorageError; the object is then good only for `abandon`."""

    def read_back(self, offset: int, length: int) -> bytes:
        """What was written."""

    def publish(self) -> None:
        """Make it visible; durable after `Storage.settle`."""

    def abandon(self) -> None:
        """Drop it; does nothing after `publish`."""


class Storage(Protocol):
    """Named immutable objects. Names are `folder/name` or `name`."""

    def put(self, name: str, data: bytes) -> bool:
        """Durably store a small object, read back first; False if the name is taken. Raises IntegrityError."""

    def create(self, name: str) -> PendingObject:
        """Begin a large object."""

    def put_back(self, name: str, pieces: Iterable[bytes]) -> None:
        """Durably make an object that was lost or damaged again what it was, and nothing else: the one way in which
        a name gets other content."""

    def settle(self, folder: str) -> None:
        """Make the names published in a folder durable."""

    def get(self, name: str) -> bytes:
        """All of an object, of WHOLE_BYTES_MAX at most. Raises ObjectMissingError, IntegrityError, StorageError."""

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of an object; fewer at its end. Raises ObjectMissingError, StorageError."""

    def expect(self, name: str, offset: int, length: int) -> None:
        """These bytes are going to be read, in pieces: what can be done ahead may be. Raises nothing."""

    def size(self, name: str) -> int:
        """Length in bytes. Raises ObjectMissingError."""

    def exists(self, name: str) -> bool:
        """Whether the name is taken."""

    def list(self, folder: str) -> Iterator[str]:
        """Names in a folder, in any order."""

    def delete(self, name: str) -> None:
        """Remove; no error if it is gone."""

    def close(self) -> None:
        """Let go of what is kept open; what is read later is opened anew."""


class LocalStorage:
    """Objects as files below `root`."""

    FOLDERS = ("keys", "keyring", "packs", "records", "leases")

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __getstate__(self) -> tuple[Path, Disk]:
        return self.root, self.disk

    def __setstate__(self, state: tuple[Path, Disk]) -> None:
        LocalStorage.__init__(self, *state)

    def make_folders(self) -> None:
        """The empty folders of a new repository."""
        for folder in self.FOLDERS:
            self.disk.mkdir(self.root / folder)
        self.disk.fsync_directory(self.root)

    def put(self, name: str, data: bytes) -> bool:
        with _Pending(self, name) as pending:
            pending.write([data])
            if pending.read_back(0, len(data) + 1) != data:  # a record that is damaged would end the history for ever
                raise IntegrityError(name, WRITTEN_WRONG)
            done = pending.link()
        if done:
            self.disk.fsync_directory((self.root / name).parent)
        return done

    def create(self, name: str) -> PendingObject:
        return _Pending(self, name)

    def put_back(self, name: str, pieces: Iterable[bytes]) -> None:
        with _Pending(self, name) as pending:
            for piece in pieces:
                at = pending.size
                pending.write([piece])
                if pending.read_back(at, len(piece)) != piece:
                    raise IntegrityError(name, WRITTEN_WRONG)
            pending.replace()
        with self._lock:
            descriptor = self._files.pop(name, -1)
            if descriptor >= 0:
                os.close(descriptor)
        self.disk.fsync_directory((self.root / name).parent)

    def settle(self, folder: str) -> None:
        self.disk.fsync_directory(self.root / folder)

    def get(self, name: str) -> bytes:
        def whole(descriptor: int) -> bytes:
            size = os.fstat(descriptor).st_size
            if size > WHOLE_BYTES_MAX:
                raise IntegrityError(name, f"has {size} bytes: more than anything that is read as a whole")
            return _pread(descriptor, 0, size)

        return self._reading(name, whole)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        return self._reading(name, lambda descriptor: _pread(descriptor, offset, length))

    def expect(self, name: str, offset: int, length: int) -> None:
        with suppress(PerdureError):
            self._reading(name, lambda descriptor: _will_need(descriptor, offset, length))

    def size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            raise ObjectMissingError(name) from None
        except OSError as error:
            raise StorageError.from_os(error, str(self.root / name), "read") from error

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def list(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        yield f"{folder}/{entry.name}"
        except OSError as error:
            raise StorageError.from_os(error, str(self.root / folder), "list") from error

    def delete(self, name: str) -> None:
        with self._lock:
            descriptor = self._files.pop(name, -1) if self._pid == os.getpid() else -1
        if descriptor >= 0:
            os.close(descriptor)
        self.disk.unlink(self.root / name)

    def remove_leftovers(self, folder: str) -> int:
        """Remove temporary files whose writer has died (its flock is gone); gives how many."""
        count = 0
        for path in (self.root / folder).glob(f"{_TEMPORARY}*"):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.disk.unlink(path)
                    count += 1
                finally:
                    os.close(descriptor)
        return count

    def close_deleted(self) -> None:
        """Close cached descriptors of objects that somebody has deleted: as long as one is open, it takes space."""
        with self._lock:
            if self._pid == os.getpid():
                for name, descriptor in list(self._files.items()):
                    if not os.fstat(descriptor).st_nlink:
                        os.close(self._files.pop(name))

    def close(self) -> None:
        """Close cached descriptors; what is read later is opened anew."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _reading(self, name: str, read: _Read) -> bytes:
        """Run `read` on a duplicate of a cached descriptor, so that eviction by another thread cannot close it."""
        with self._lock:
            if self._pid != os.getpid():  # inherited over fork: descriptors are shared with the parent, drop ours
                self._files, self._pid = OrderedDict(), os.getpid()
            descriptor = self._files.pop(name, -1)
            if descriptor < 0:
                descriptor = self._open(name)
            self._files[name] = descriptor
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            own = os.dup(descriptor)
        try:
            return read(own)
        except OSError as error:
            raise StorageError.from_os(error, str(self.root / name), "read") from error
        finally:
            os.close(own)

    def _open(self, name: str) -> int:
        try:
            descriptor = open_file(self.root / name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise ObjectMissingError(name) from None
            raise StorageError.from_os(error, str(self.root / name), "open") from error
        if descriptor < 0:
            raise IntegrityError(name, "is no file")
        return descriptor


def _will_need(descriptor: int, offset: int, length: int) -> bytes:
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    return b""


def open_file(path: Path) -> int:
    """Open a plain file for reading, -1 for anything else: opening a FIFO would wait for ever. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return -1


class _Read(Protocol):
    def __call__(self, descriptor: int, /) -> bytes: ...


class _Pending:
    """A temporary file, locked while its writer lives, linked to its final name when it is complete."""

    def __init__(self, storage: LocalStorage, name: str) -> None:
        self._disk = storage.disk
        self._final = storage.root / name
        while True:
            self._path = self._final.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
            self._descriptor = self._disk.create(self._path)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(
                self._descriptor
            )  # between the two, `remove_leftovers` of another process took it for a dead one's
        self._open = True
        self.size = 0

    def __enter__(self) -> _Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def write(self, buffers: list[bytes]) -> None:
        count = self._disk.write(self._descriptor, buffers, self._path)
        if count >= _HASTEN_BYTES:
            self._disk.hasten(self._descriptor, self.size, count)
        self.size += count

    def read_back(self, offset: int, length: int) -> bytes:
        return _pread(self._descriptor, offset, length)

    def publish(self) -> None:
        own = os.fstat(self._descriptor).st_ino
        try:
            done = self.link()
        except BaseException:
            with suppress(OSError):  # it may have happened although the answer was an error
                if self._final.lstat().st_ino == own:
                    self._final.unlink()
            raise
        if not done:
            raise StorageError(str(self._final), "exists already", errno=errno.EEXIST)

    def link(self) -> bool:
        self._disk.fsync(self._descriptor, self._path)
        done = self._disk.link(self._path, self._final)
        self.abandon()
        return done

    def replace(self) -> None:
        self._disk.fsync(self._descriptor, self._path)
        self._disk.rename(self._path, self._final)
        self._open = False
        os.close(self._descriptor)

    def abandon(self) -> None:
        if self._open:
            self._open = False
            os.close(self._descriptor)
            self._disk.unlink(self._path)


def _pread(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]  # a short read: at the end of the file, or interrupted
    got = len(data)
    while got < length and data:
        data = os.pread(descriptor, length - got, offset + got)
        parts.append(data)
        got += len(data)
    return b"".join(parts)
