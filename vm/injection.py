"""A userfaultfd that belongs to a running, unmodified QEMU, made from outside it (x86-64 Linux).

userfaultfd(2) governs the memory of the process that calls it, so one system call is injected into QEMU's main
thread with ptrace, and the supervisor then takes a copy of the descriptor with pidfd_getfd(2). QEMU keeps its own:
tracking survives the supervisor, and the next one finds the descriptor again in /proc/PID/fd.

The ptrace part runs in a helper process of its own (`python -m vm.injection PID`), single-threaded, since ptrace
binds tracer and tracee by thread, and since a child watcher in the supervisor's process would reap QEMU's ptrace
stops and report it dead. The helper blocks all signals while QEMU is stopped by it and has no step that can wait
for ever with QEMU changed, so that only SIGKILL in the some 100 us of an injection could leave QEMU damaged.

What the helper relies on:
- it injects only when the main thread was stopped inside a system call. There the instruction before rip is
  `syscall`, no restartable sequence (rseq(2)) can be running, and the kernel restarts the interrupted call from the
  restored registers;
- all signals but SIGTRAP are blocked in that thread meanwhile, so that none is lost and no handler runs on changed
  registers; they stay pending with what they carry, and are delivered once the old mask is back.

Source: ptrace(2), userfaultfd(2), pidfd_getfd(2); <asm/ptrace.h> for the registers. Functions keep no state and may be
called from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from base.errors import VirtualMachineError

_SYS_CLOSE, _SYS_IOCTL, _SYS_USERFAULTFD = 3, 16, 323  # x86-64
_SYS_PIDFD_GETFD = 438  # everywhere
_USERFAULTFD_IOC_NEW = 0xAA00
_USER_MODE_ONLY = 1

_PTRACE_GETREGS, _PTRACE_SETREGS, _PTRACE_CONT, _PTRACE_SINGLESTEP, _PTRACE_DETACH = 12, 13, 7, 9, 17
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_GETSIGMASK, _PTRACE_SETSIGMASK = 0x4206, 0x4207, 0x420A, 0x420B
_PTRACE_EVENT_STOP = 128
_WALL = 0x40000000  # wait also for a thread that is not our child
_CODE_SEGMENT_64 = 0x33
_ALL_BUT_SIGTRAP = ~(1 << (signal.SIGTRAP - 1)) & (1 << 64) - 1

_ATTEMPTS = 400
_PATIENCE_S = 5.0
"""How long to go on trying to find the main thread inside a system call; an attempt in seven does not under load."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long] * 4
_libc.syscall.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    """struct user_regs_struct of <asm/ptrace.h>."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


class _NotInSystemCallError(Exception):
    """The main thread was stopped while it ran code of its own: try again."""


# The supervisor's side


def inject(pid: int) -> int:
    """Make a userfaultfd inside QEMU; gives the descriptor's number there.

    Raises VirtualMachineError when it cannot be had, with what the operating system said; QEMU goes on as before.
    """
    if platform.machine() != "x86_64":
        raise VirtualMachineError(
            f"QEMU (pid {pid}): a userfaultfd can be injected on x86-64 only, this is {platform.machine()}"
        )
    return int(_helped("make a userfaultfd in it", str(pid)))


def close(pid: int, remote: int) -> None:
    """Close a descriptor of QEMU's that was made by `inject`. Raises VirtualMachineError; QEMU goes on as before."""
    _helped("close its userfaultfd", str(pid), str(remote))


def _helped(what: str, pid: str, *more: str) -> str:
    """What the helper prints."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-P", "-m", "vm.injection", pid, *more]
    helper = subprocess.run(  # no timeout: it ends by itself, and must not be killed while QEMU's registers are changed
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, start_new_session=True
    )
    if helper.returncode != 0:
        said = (helper.stderr.strip().splitlines() or [f"helper ended with status {helper.returncode}"])[-1]
        raise VirtualMachineError(f"QEMU (pid {pid}): cannot {what}: {said}")
    return helper.stdout


def inject_here(pid: int) -> int:
    """The same without a helper: for a process that has one thread and is not QEMU's parent. The descriptor is one that
    is told of every fault, also of those that the kernel takes on QEMU's behalf.

    Raises VirtualMachineError.
    """
    try:
        with _signals_blocked():
            return _new_userfaultfd(pid, all_faults=True)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise VirtualMachineError(f"QEMU (pid {pid}): cannot make a userfaultfd in it: {why}") from error


def duplicate(pid: int, remote: int) -> int:
    """A copy of a process's open descriptor, close-on-exec. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        local = _libc.syscall(_SYS_PIDFD_GETFD, process, remote, 0)
    finally:
        os.close(process)
    if local == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(local)


def open_files(pid: int) -> dict[int, str]:
    """What the open descriptors of a process are, by number, as /proc/PID/fd shows them. Raises OSError."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def held_descriptors(pid: int, target: str) -> list[int]:
    """Numbers of the open descriptors of a process that are `target`, ascending. Raises OSError."""
    return sorted(number for number, what in open_files(pid).items() if what == target)


# The helper's side


def _ptrace(request: int, pid: int, data: int = 0, address: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _Stopped:
    """A main thread that was seized and stopped inside a system call; a context manager that lets it go on."""

    def __init__(self, pid: int, deadline: float) -> None:
        self.pid, self.deadline = pid, deadline

    def __enter__(self) -> _Stopped:
        _ptrace(_PTRACE_SEIZE, self.pid)
        try:
            self._interrupt()
            self.saved = self.registers()
            self._require_system_call()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()

    def _detach(self) -> None:
        with contextlib.suppress(OSError):  # it died, or never stopped: then the end of this process lets it go
            _ptrace(_PTRACE_DETACH, self.pid)

    def registers(self) -> _Registers:
        found = _Registers()
        _ptrace(_PTRACE_GETREGS, self.pid, ctypes.addressof(found))
        return found

    def system_call(self, number: int, *arguments: int) -> int:
        """Run one system call; gives its result, negative for an error number."""
        mask = ctypes.c_uint64()
        _ptrace(_PTRACE_GETSIGMASK, self.pid, ctypes.addressof(mask), ctypes.sizeof(mask))
        try:
            self._set_mask(_ALL_BUT_SIGTRAP)
            changed = _Registers.from_buffer_copy(self.saved)
            changed.rip -= 2
            changed.rax = number
            changed.orig_rax = 2**64 - 1  # not in a system call: the kernel has nothing to restart
            for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
                setattr(changed, name, value)
            _ptrace(_PTRACE_SETREGS, self.pid, ctypes.addressof(changed))
            self._step(changed.rip)
            return ctypes.c_longlong(self.registers().rax).value
        finally:
            with contextlib.suppress(ProcessLookupError):  # it died: that is the first error, if there is none yet
                _ptrace(_PTRACE_SETREGS, self.pid, ctypes.addressof(self.saved))
                self._set_mask(mask.value)

    def _interrupt(self) -> None:
        _ptrace(_PTRACE_INTERRUPT, self.pid)
        while (status := self._wait(self.deadline)) is not None:
            if status >> 16 == _PTRACE_EVENT_STOP:  # ours, or a group-stop: both are places to inject from
                return
            _ptrace(_PTRACE_INTERRUPT, self.pid)  # a signal came first: QEMU gets it, and any stop had used up ours
            _ptrace(_PTRACE_CONT, self.pid, os.WSTOPSIG(status))
        raise TimeoutError("its main thread does not react: it is blocked in the kernel")

    def _require_system_call(self) -> None:
        if self.saved.cs != _CODE_SEGMENT_64:
            raise RuntimeError("it is not a 64-bit program")
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            before = os.pread(memory.fileno(), 2, self.saved.rip - 2)
        if before != b"\x0f\x05" or ctypes.c_longlong(self.saved.orig_rax).value < 0:
            raise _NotInSystemCallError

    def _step(self, start: int) -> None:
        """Execute the one instruction at `start`, and wait until the trap after it has been reported.

        The trap must be consumed here: left pending, it would kill QEMU. Only SIGSTOP can come in between, and a
        freezer can keep the thread from running; then the instruction is given up at the deadline, unexecuted.
        """
        deadline: float | None = self.deadline + _PATIENCE_S
        _ptrace(_PTRACE_SINGLESTEP, self.pid)
        while True:
            status = self._wait(deadline)
            if status is None:
                deadline = None  # from here on a stop must come, and decides
                _ptrace(_PTRACE_INTERRUPT, self.pid)
                continue
            executed = self.registers().rip != start
            stopped_by_us = status >> 16 == _PTRACE_EVENT_STOP
            if executed and not stopped_by_us and os.WSTOPSIG(status) == signal.SIGTRAP:
                return
            if stopped_by_us and not executed and deadline is None:
                raise TimeoutError("its main thread is frozen")
            number = os.WSTOPSIG(status)
            passed_on = 0 if stopped_by_us or number == signal.SIGTRAP else number
            if deadline is None:
                _ptrace(_PTRACE_INTERRUPT, self.pid)  # any stop uses up the one before
            _ptrace(_PTRACE_SINGLESTEP, self.pid, passed_on)

    def _set_mask(self, mask: int) -> None:
        value = ctypes.c_uint64(mask)
        _ptrace(_PTRACE_SETSIGMASK, self.pid, ctypes.addressof(value), ctypes.sizeof(value))

    def _wait(self, deadline: float | None) -> int | None:
        """The next stop's status, or None at the deadline. SIGCHLD is blocked, so that none can be missed."""
        while True:
            found, status = os.waitpid(self.pid, _WALL | os.WNOHANG)
            if found:
                if not os.WIFSTOPPED(status):
                    raise ProcessLookupError(errno.ESRCH, "it ended meanwhile")
                return status
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            signal.sigtimedwait({signal.SIGCHLD}, left)


def _system_call(pid: int, number: int, *arguments: int) -> int:
    """Run one system call in QEMU, trying again while its main thread is found outside one."""
    deadline = time.monotonic() + _PATIENCE_S
    for attempt in range(_ATTEMPTS):
        try:
            with _Stopped(pid, deadline) as thread:
                return thread.system_call(number, *arguments)
        except _NotInSystemCallError:
            if time.monotonic() > deadline:
                break
            time.sleep(min(0.0002 * (attempt + 1), 0.02))  # let it get to its next system call
    raise TimeoutError(f"its main thread was in no system call at any of {attempt + 1} looks")


def _new_userfaultfd(pid: int, *, all_faults: bool = False) -> int:
    """The number of a new userfaultfd in QEMU, by the first way that its privileges allow.

    userfaultfd(2) for all faults needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1. Without either, an inherited
    /dev/userfaultfd does the same. The last way is told of no fault that the kernel takes on QEMU's behalf, which
    matters for serving missing pages, not for asynchronous write protection: no such fault is reported to anybody.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    result = _system_call(pid, _SYS_USERFAULTFD, flags)
    if result == -errno.EPERM:
        for device in held_descriptors(pid, "/dev/userfaultfd"):
            result = _system_call(pid, _SYS_IOCTL, device, _USERFAULTFD_IOC_NEW, flags)
    if result == -errno.EPERM and not all_faults:
        result = _system_call(pid, _SYS_USERFAULTFD, flags | _USER_MODE_ONLY)
    if result < 0:
        raise OSError(-result, f"userfaultfd: {os.strerror(-result)}")
    return result


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would not tell of QEMU's stops
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(arguments: list[str]) -> int:
    """The helper: prints the number of the new descriptor in the process it is given, or closes the one that is named;
    or prints one line of what is wrong."""
    pid = int(arguments[0])
    try:
        with _signals_blocked():
            print(_system_call(pid, _SYS_CLOSE, int(arguments[1])) if arguments[1:] else _new_userfaultfd(pid))
    except PermissionError as error:
        print(f"{error.strerror}: root or CAP_SYS_PTRACE is needed", file=sys.stderr)
        return 1
    except (OSError, RuntimeError) as error:
        print(error.strerror if isinstance(error, OSError) and error.strerror else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
