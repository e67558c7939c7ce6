"""One userfaultfd of a running QEMU: its handshake, and the ranges of QEMU's memory that it governs.

All structures and numbers of the userfaultfd interface that we use are here.
Source: userfaultfd(2), ioctl_userfaultfd(2), <linux/userfaultfd.h>.

    UFFDIO_API           struct uffdio_api           u64 api=0xAA, features, ioctls       24 bytes
    UFFDIO_REGISTER      struct uffdio_register      u64 start, length, mode, ioctls      32 bytes
    UFFDIO_UNREGISTER    struct uffdio_range         u64 start, length                    16 bytes
    UFFDIO_WAKE          struct uffdio_range         u64 start, length                    16 bytes
    UFFDIO_COPY          struct uffdio_copy          u64 to, from, length, mode, s64 copied    40 bytes
    UFFDIO_WRITEPROTECT  struct uffdio_writeprotect  u64 start, length, mode              24 bytes
    read(2)              struct uffd_msg             u8 event, ...; u64 flags, address    32 bytes

Invariants: one descriptor does for all of a QEMU, and its handshake is made once in its life, with all features that
tracking and lazy restore need: a second handshake is EINVAL. What an earlier supervisor asked for is read from
fdinfo. QEMU holds a copy of the descriptor, so that closing ours ends nothing.

Thread-safe as the kernel is: one system call a method, no state but the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from types import TracebackType

from base.errors import VirtualMachineError
from base.units import PAGE
from vm import injection

WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC, MISSING_SHMEM = 1 << 12, 1 << 13, 1 << 15, 1 << 5
FEATURES = WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM | MISSING_SHMEM

_MODE_MISSING, _MODE_WP = 1, 2
_WRITEPROTECT_MODE_WP = 1
_COPY_MODE_WP = 2
_EVENT_PAGEFAULT = 0x12
_MESSAGE, _MESSAGES = struct.Struct("<B7x2Q8x"), 64
_COPY = struct.Struct("4Qq")
_API = 0xAA
_INITIALISED = 1 << 31  # the kernel's own mark among the features that fdinfo shows: the handshake is done
_LINK = "anon_inode:[userfaultfd]"


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _API << 8 | number


_READ, _READ_WRITE = 2, 3
_UFFDIO_API = _ioc(_READ_WRITE, 0x3F, 24)
_UFFDIO_REGISTER = _ioc(_READ_WRITE, 0x00, 32)
_UFFDIO_UNREGISTER = _ioc(_READ, 0x01, 16)
_UFFDIO_WAKE = _ioc(_READ, 0x02, 16)
_UFFDIO_COPY = _ioc(_READ_WRITE, 0x03, 40)
_UFFDIO_WRITEPROTECT = _ioc(_READ_WRITE, 0x06, 24)


class Userfaultfd:
    """Our copy of the userfaultfd of the QEMU process `pid`; a context manager that closes it."""

    def __init__(self, pid: int, descriptor: int) -> None:
        """Takes over `descriptor`, whose handshake has been made."""
        self.pid, self.descriptor = pid, descriptor
        self._argument = bytearray(_COPY.size)

    @classmethod
    def of(cls, pid: int, make: Callable[[int], int] = injection.inject) -> Userfaultfd:
        """The one that QEMU has from an earlier supervisor, or else a new one, which `make` makes in it.

        Raises VirtualMachineError if neither can be had: the message says why, and QEMU goes on as before.
        """
        try:
            for remote in injection.held_descriptors(pid, _LINK):
                # An uninitialised one, or one with other features, is QEMU's own (background snapshot, postcopy).
                if _asked_features(pid, remote) & (FEATURES | _INITIALISED) == FEATURES | _INITIALISED:
                    return cls(pid, injection.duplicate(pid, remote))
            descriptor = injection.duplicate(pid, make(pid))
        except OSError as error:
            raise VirtualMachineError(f"QEMU (pid {pid}): cannot take its userfaultfd: {error.strerror}") from error
        try:
            _handshake(pid, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(pid, descriptor)

    def register(self, start: int, size: int, *, missing: bool = False) -> None:
        """Govern writes (and with `missing` also first touches) to [start, start + size) of QEMU's addresses.

        Registering again is no error and changes nothing. Raises VirtualMachineError.
        """
        mode = _MODE_WP | (_MODE_MISSING if missing else 0)
        self._ioctl("UFFDIO_REGISTER", _UFFDIO_REGISTER, struct.pack("4Q", start, size, mode, 0))

    def unregister(self, start: int, size: int) -> None:
        """Govern the range no longer; its write protection is gone with that. Raises VirtualMachineError."""
        self._ioctl("UFFDIO_UNREGISTER", _UFFDIO_UNREGISTER, struct.pack("2Q", start, size))

    def write_protect(self, start: int, size: int) -> None:
        """Mark every page of a registered range as not written, untouched ones too. Raises VirtualMachineError.

        Takes 2 MiB of page tables per GiB that had none.
        """
        self._ioctl("UFFDIO_WRITEPROTECT", _UFFDIO_WRITEPROTECT, struct.pack("3Q", start, size, _WRITEPROTECT_MODE_WP))

    def faults(self) -> list[int]:
        """Addresses of pages at whose first touch a thread of QEMU, or the kernel for it, waits; at most some dozens.

        Each is told once in the descriptor's life, to whoever reads it. Raises VirtualMachineError.
        """
        try:
            messages = os.read(self.descriptor, _MESSAGE.size * _MESSAGES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise VirtualMachineError(f"QEMU (pid {self.pid}): reading its userfaultfd: {error.strerror}") from error
        return [address & -PAGE for event, _, address in _MESSAGE.iter_unpack(messages) if event == _EVENT_PAGEFAULT]

    def place(self, start: int, source: int, size: int) -> int:
        """Put `size` bytes at our address `source` into missing pages from QEMU's address `start` on, write-protected,
        so that they do not count as written, and wake who waits for them; gives the bytes that were put, up to the
        first page that was there already.

        Raises ProcessLookupError if QEMU has ended, other OSErrors as the kernel gives them.
        """
        done, argument = 0, self._argument
        while done < size:
            _COPY.pack_into(argument, 0, start + done, source + done, size - done, _COPY_MODE_WP, 0)
            try:
                fcntl.ioctl(self.descriptor, _UFFDIO_COPY, argument)
                return size
            except FileExistsError:
                return done
            except BlockingIOError:  # a part of it, or QEMU's memory map is being changed
                done += max(0, _COPY.unpack(argument)[4])
        return done

    def wake(self, start: int, size: int) -> None:
        """Let whoever waits for pages of a range touch them again. Raises VirtualMachineError."""
        self._ioctl("UFFDIO_WAKE", _UFFDIO_WAKE, struct.pack("2Q", start, size))

    def end(self) -> None:
        """Close QEMU's own, too: nothing of it is governed any more. Raises VirtualMachineError."""
        try:
            remotes = injection.held_descriptors(self.pid, _LINK)
            ours = [each for each in remotes if _asked_features(self.pid, each) & FEATURES == FEATURES]
        except OSError as error:
            raise VirtualMachineError(
                f"QEMU (pid {self.pid}): cannot look at its descriptors: {error.strerror}"
            ) from error
        for remote in ours:
            injection.close(self.pid, remote)

    def close(self) -> None:
        """Close our copy; QEMU's stays, with all that is registered."""
        os.close(self.descriptor)

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ioctl(self, name: str, request: int, argument: bytes) -> None:
        try:
            fcntl.ioctl(self.descriptor, request, bytearray(argument))
        except OSError as error:
            start, size = struct.unpack_from("2Q", argument)
            place = f"{start:#x}-{start + size:#x}"
            raise VirtualMachineError(f"QEMU (pid {self.pid}): {name} of {place}: {error.strerror}") from error


def waiting_faults(pid: int) -> int:
    """How many first touches of a QEMU process wait for their answer just now; 0 if nothing is known of it."""
    try:
        remotes = injection.held_descriptors(pid, _LINK)
        return sum(int(_fact(pid, each, "total", "0")) for each in remotes)
    except OSError:
        return 0


def _asked_features(pid: int, descriptor: int) -> int:
    """The features of a userfaultfd's handshake, with _INITIALISED; 0 if there was none."""
    return int(_fact(pid, descriptor, "API", "0:0:0").split(":")[1], 16)


def _fact(pid: int, descriptor: int, name: str, missing: str) -> str:
    """Of a userfaultfd.

    Source: fdinfo of the kernel's fs/userfaultfd.c: `pending:<tab>number` of faults that nobody has read, `total:` of
    those that wait, and `API:<tab>version:features:ioctls`, hexadecimal.
    """
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/fdinfo/{descriptor}") as lines:
        for line in lines:
            if line.startswith(f"{name}:"):
                return line.split()[1]
    return missing


def _handshake(pid: int, descriptor: int) -> None:
    argument = bytearray(struct.pack("3Q", _API, FEATURES, 0))
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, argument)
        has = struct.unpack("3Q", argument)[1]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise VirtualMachineError(f"QEMU (pid {pid}): UFFDIO_API: {error.strerror}") from error
        has = 0
    if has & FEATURES != FEATURES:
        raise VirtualMachineError(
            f"QEMU (pid {pid}): this kernel's userfaultfd has no asynchronous write protection of shared memory "
            f"(Linux 6.7 has it): use the scan tracker"
        )
