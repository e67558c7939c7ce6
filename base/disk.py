"""The disk seam: every operation that makes something durable goes through one `Disk`.

`Disk` is the real one. Tests pass a subclass whose `step` fails, or kills the process, at a chosen step;
`step` is called before each operation with its name and path. Not a cache, holds no state, safe to share
between threads and to inherit over fork.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path

from base.errors import StorageError

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """Durable file operations. Every method raises StorageError naming the file."""

    def step(self, operation: str, path: str) -> None:
        """Called before each operation; the seam for fault tests. The real disk does nothing here."""

    def create(self, path: Path, mode: int = 0o600) -> int:
        """Open a new file for writing; it must not exist. Gives the descriptor."""
        self.step("create", str(path))
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "create") from error

    def write(self, descriptor: int, buffers: list[bytes], path: Path) -> int:
        """Append all of `buffers`; gives the bytes written."""
        self.step("write", str(path))
        try:
            total = 0
            for at in range(0, len(buffers), 512):  # IOV_MAX is 1024
                total += _write_all(descriptor, buffers[at : at + 512])
            return total
        except OSError as error:
            raise StorageError.from_os(error, str(path), "write") from error

    def allocate(self, descriptor: int, size: int, path: Path) -> None:
        """Have the file system set aside `size` bytes for a file, which has that length then."""
        self.step("allocate", str(path))
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "allocate") from error

    def fsync(self, descriptor: int, path: Path) -> None:
        """Make a file's content durable."""
        self.step("fsync", str(path))
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "fsync") from error

    def hasten(self, descriptor: int, offset: int, length: int) -> None:
        """Have the kernel begin to write a range to the disk, without waiting: a hint that makes nothing durable.

        Source: sync_file_range(2). Does nothing where the C library has no such call.
        """
        if _sync_file_range is not None:
            _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)

    def fsync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        self.step("fsync directory", str(path))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "fsync") from error

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Make a folder; it must not exist."""
        self.step("mkdir", str(path))
        try:
            path.mkdir(mode)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "make the folder") from error

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name. False if the name is taken: link(2) never overwrites."""
        self.step("link", str(target))
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError.from_os(error, str(target), "link") from error
        return True

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source` in one step."""
        self.step("rename", str(target))
        try:
            source.rename(target)
        except OSError as error:
            raise StorageError.from_os(error, str(target), "rename") from error

    def unlink(self, path: Path) -> None:
        """Remove a name; it is no error if it is gone already."""
        self.step("unlink", str(path))
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "remove") from error


def replace_file(disk: Disk, path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Durably make `path` hold `content`, whatever it held: temporary file, fsync, rename, fsync the directory.

    Not `lasting`: without the last, so that after a power loss it may also hold what it held before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = disk.create(temporary)
    try:
        try:
            disk.write(descriptor, [content], temporary)
            if os.pread(descriptor, len(content) + 1, 0) != content:
                raise StorageError(str(path), "what is in the file is not what was written: faulty memory or disk")
            disk.fsync(descriptor, temporary)
        finally:
            os.close(descriptor)
        disk.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if lasting:
        disk.fsync_directory(path.parent)


def _write_all(descriptor: int, buffers: list[bytes]) -> int:
    views = [memoryview(each) for each in buffers]
    total = 0
    while views:
        count = os.writev(descriptor, views)
        total += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return total
