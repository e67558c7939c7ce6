"""A VM's memory on the host: one sparse backing file for each region, in a tmpfs of our own.

The tmpfs is mounted on a private folder (0700) with huge=never, since one write to a huge page makes 512 pages
dirty, and noswap where the kernel has it, since guest memory must not reach a disk. Who may not mount needs the
folder to be on a tmpfs already. Files are private (0600), have their exact size from the start and hold no page.

Memory is spare while what it holds is nothing to be saved if QEMU is dead: until its guest begins, and from when its
QEMU is ended on purpose. A file beside the backing files says so; where it is missing, memory is worth saving.

Invariants: memory that is there is never overwritten (`prepare` refuses, `existing` takes over); a `prepare` that
fails leaves nothing; what is released is spare from the first step on. One process at a time.

Source: mount(2), tmpfs(5), proc_pid_mountinfo(5), proc_swaps(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base.errors import ConflictError, NotFoundError, StorageError, VirtualMachineError
from base.units import PAGE, format_size

_SUFFIX = ".memory"
_SPARE = "spare"
_MARGIN = 16 << 20  # for the region table beside the backing files, and for the pages that tmpfs keeps for itself
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_DETACH = 2
_OPTIONS = ("huge=never,noswap", "huge=never", "noswap", "")  # noswap is of Linux 6.4; huge= needs THP in the kernel

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class BackingFile:
    """A region's bytes: offset in the file is offset in the region."""

    region: str
    path: Path
    size: int

    def open(self) -> int:
        """A descriptor for reading and writing, the caller's to close. Raises StorageError."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError.from_os(error, str(self.path), "open") from error


@dataclass(frozen=True, slots=True)
class Memory:
    """The backing files of one VM, by region name, and what the user should know about where they are."""

    vm: str
    folder: Path
    files: Mapping[str, BackingFile]
    warnings: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls, vm: str, folder: Path, sizes: Mapping[str, int], *, replaces: Memory | None = None, beside: int = 0
    ) -> Memory:
        """Make the files of a VM that is to be launched, spare until it is; `sizes` are bytes by region name.

        Where it replaces other memory, which is given back before a guest runs in this one, no more than `beside`
        bytes are written until then. Raises ConflictError if there is memory of an earlier launch,
        VirtualMachineError if it does not fit into what the host has free, StorageError if the host refuses.
        """
        if cls.exists(folder):
            raise ConflictError(f"VM {vm}: the memory of an earlier run is still in {folder}")
        size = (
            sum(sizes.values()) + sum(sizes.values()) // PAGE + _MARGIN
        )  # a byte a page: the claims of a lazy restore
        needed = size if replaces is None else max(size - replaces.resident_bytes(), beside + _MARGIN)
        _check_available(vm, needed)
        made = not folder.exists()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise StorageError.from_os(error, str(folder), "make the folder") from error
        memory = cls(vm, folder, _files(folder, sizes))
        memory._remove(folder_too=False)  # a launch that was cut short may have left its mount, or a region table
        try:
            _mount(folder, size)
            mount = _Mount.of(folder)
            if mount.kind != "tmpfs":
                raise StorageError(
                    str(folder),
                    f"memory of VM {vm} must be in tmpfs and not on {mount.kind}: "
                    "run as root, or set PERDURE_STATE_DIR to a folder under /dev/shm",
                )
            _check_room(vm, folder, needed)
            for file in memory.files.values():
                _create(file)
            memory.set_spare()
        except BaseException:
            with contextlib.suppress(StorageError):  # the first error says what is wrong
                memory._remove(folder_too=made)
            raise
        return cls(vm, folder, memory.files, tuple(_swap_warnings(vm, mount)))

    @classmethod
    def existing(cls, vm: str, folder: Path, sizes: Mapping[str, int]) -> Memory:
        """The files of a VM that was launched before. Raises NotFoundError, and ConflictError if sizes differ."""
        files = _files(folder, sizes)
        for file in files.values():
            try:
                found = file.path.stat().st_size
            except FileNotFoundError:
                raise NotFoundError(f"VM {vm} has no memory for region {file.region} in {folder}") from None
            except OSError as error:
                raise StorageError.from_os(error, str(file.path), "look at it") from error
            if found != file.size:
                raise ConflictError(
                    f"VM {vm}: region {file.region} has {format_size(found)} of memory from its launch, and is now "
                    f"described with {format_size(file.size)}: stop the VM, or describe it as it was"
                )
        return cls(vm, folder, files, tuple(_swap_warnings(vm, _Mount.of(folder))))

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether memory of an earlier launch is there."""
        return any(folder.glob(f"*{_SUFFIX}"))

    @staticmethod
    def is_spare(folder: Path) -> bool:
        """Whether what was found there is nothing to be saved."""
        return (folder / _SPARE).exists()

    def set_spare(self) -> None:
        """Nobody is to go on with what it holds. Where that cannot be noted it is saved in vain."""
        with contextlib.suppress(OSError):
            (self.folder / _SPARE).touch(0o600)

    def set_used(self) -> None:
        """A guest is about to use it. Raises StorageError."""
        try:
            (self.folder / _SPARE).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(self.folder / _SPARE), "remove") from error

    def resident_bytes(self) -> int:
        """What the files take of the host's memory. Raises StorageError."""
        try:
            return sum(file.path.stat().st_blocks * 512 for file in self.files.values())
        except OSError as error:
            raise StorageError.from_os(error, str(self.folder), f"look at the memory of VM {self.vm}") from error

    def release(self) -> None:
        """Give all of it back, content included; for a VM whose QEMU has ended, or is ending: then the names at once,
        and the content with the process that has it. May be done again. Raises StorageError."""
        self.set_spare()
        self._remove(folder_too=True)

    def _remove(self, *, folder_too: bool) -> None:
        try:
            if _is_mounted(self.folder):
                _unmount(self.folder)
            elif self.folder.exists():
                for entry in sorted(self.folder.iterdir(), key=lambda each: each.name == _SPARE):
                    entry.unlink()
            if folder_too:
                self.folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError.from_os(error, str(self.folder), f"release the memory of VM {self.vm}") from error


@dataclass(frozen=True, slots=True)
class _Mount:
    """What a folder is on."""

    kind: str
    options: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> _Mount:
        device = folder.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            front, _, back = line.partition(" - ")
            if front.split()[2] == wanted:
                kind, _, options = back.split(maxsplit=2)
                return cls(kind, frozenset(options.split(",")))
        return cls("an unknown file system", frozenset())


def unencrypted_swaps(swaps: str, block: Path) -> list[str]:
    """Names of the swap areas in a /proc/swaps that put pages on a disk as they are.

    `block` is /sys/dev/block: an area is sealed if it, or all that it lies on, is a dm-crypt device; zram stays in
    memory.
    """
    found = []
    for line in swaps.splitlines()[1:]:
        name = line.split()[0].replace("\\040", " ")
        try:
            entry = os.stat(name)
        except OSError:
            found.append(name)  # nothing is known of it: better one warning too many
            continue
        device = entry.st_rdev if line.split()[1] == "partition" else entry.st_dev
        if not _sealed(block / f"{os.major(device)}:{os.minor(device)}"):
            found.append(name)
    return found


def _sealed(device: Path) -> bool:
    if device.resolve().name.startswith("zram"):
        return True
    with contextlib.suppress(OSError):
        if (device / "dm" / "uuid").read_text().startswith("CRYPT-"):
            return True
    below = list((device / "slaves").glob("*"))
    return bool(below) and all(_sealed(each) for each in below)


def _swap_warnings(vm: str, mount: _Mount) -> list[str]:
    if "noswap" in mount.options:
        return []
    open_areas = unencrypted_swaps(Path("/proc/swaps").read_text(), Path("/sys/dev/block"))
    return [
        f"VM {vm}: its memory can be written to the swap area {name}, which is not encrypted, and this kernel or "
        "user cannot exclude it (noswap, Linux 6.4): encrypt the area or turn it off"
        for name in open_areas
    ]


def _files(folder: Path, sizes: Mapping[str, int]) -> dict[str, BackingFile]:
    return {name: BackingFile(name, folder / f"{name}{_SUFFIX}", size) for name, size in sizes.items()}


def _create(file: BackingFile) -> None:
    try:
        descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, file.size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError.from_os(error, str(file.path), "make") from error


def _check_available(vm: str, needed: int) -> None:
    """A tmpfs that runs full, or a host without memory, kills QEMU with SIGBUS: it is refused before that."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(match[1]) << 10 if match else 0
    if needed > available:
        raise VirtualMachineError(
            f"VM {vm} needs {format_size(needed)} of memory, and {format_size(available)} are available: "
            "end something else, or give it less"
        )


def _check_room(vm: str, folder: Path, needed: int) -> None:
    facts = os.statvfs(folder)
    room = facts.f_bavail * facts.f_frsize
    if needed - _MARGIN > room:
        raise VirtualMachineError(
            f"VM {vm} needs {format_size(needed - _MARGIN)} of memory, and there is room for {format_size(room)} in "
            f"the tmpfs at {folder}"
        )


def _is_mounted(folder: Path) -> bool:
    return folder.exists() and os.path.ismount(folder)


def _mount(folder: Path, size: int) -> None:
    """Mount a tmpfs if we may; if not, the caller looks at what is there. Raises StorageError."""
    code = 0
    for options in _OPTIONS:
        data = f"mode=0700,uid={os.geteuid()},gid={os.getegid()},size={-(-size // PAGE) * PAGE}"
        data += f",{options}" if options else ""
        if not _libc.mount(b"perdure", os.fsencode(folder), b"tmpfs", _NOSUID_NODEV_NOEXEC, data.encode()):
            return
        code = ctypes.get_errno()
        if code == errno.EPERM:
            return
        if code != errno.EINVAL:  # EINVAL: this kernel does not know one of the options
            break
    raise StorageError(str(folder), f"cannot mount a tmpfs: {os.strerror(code)}", errno=code)


def _unmount(folder: Path) -> None:
    """Detaches where a process is still in it: the memory is given back when that one ends."""
    for flags in (0, _DETACH):
        if not _libc.umount2(os.fsencode(folder), flags):
            return
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(folder))
