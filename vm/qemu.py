"""The QEMU process of one VM: found, started, recognised again, watched, ended.

QEMU outlives its supervisor: it is started in a session of its own, with no inherited descriptors, so that neither
Ctrl-C nor SIGKILL of the supervisor reaches it. A record in the runtime folder, durable before the launch is
reported as done, says which process it is; a pid is never believed without its start time and boot. If the
supervisor died before the record was written, the process still has our monitor socket among its arguments.

One process at a time owns a VM (the supervisor's lock); a `Qemu` is not shared between threads.

Source: pidfd_open(2), unix(7), qemu(1).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

import msgspec

from base import extents
from base.disk import Disk, replace_file
from base.errors import ConflictError, StorageError, VirtualMachineError
from vm.folder import RuntimeFolder
from vm.identity import Identity, ended

_NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
_GO_ON = b'{"execute":"cont"}\n'
_LAST_LINES = 3
_ASK_SECONDS = 20
_LOOK_SECONDS = 0.001


class Record(msgspec.Struct, frozen=True):
    """What the runtime folder says of the process."""

    pid: int
    start_ticks: int
    boot: str
    argv: tuple[str, ...]
    facts: dict[str, str] = {}  # what the supervisor wants to find again, as the words of a Platform

    @property
    def identity(self) -> Identity:
        """The process, apart from all others."""
        return Identity(self.pid, self.start_ticks, self.boot)


class Qemu:
    """A QEMU process that we started or found; made by `launch` or `find`."""

    def __init__(
        self, folder: RuntimeFolder, record: Record, pidfd: int, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.folder = folder
        self.record = record
        self._pidfd, self._child = pidfd, child
        self._journal = _open_journal(folder)

    @classmethod
    def launch(
        cls,
        folder: RuntimeFolder,
        argv: list[str],
        disk: Disk,
        facts: dict[str, str] | None = None,
        after: int | None = None,
    ) -> Qemu:
        """Start it, paused. That it works is known when the monitor answers. `after`: a process that is ending, and has
        let go of all that the two would share.

        Raises ConflictError if the VM runs already, VirtualMachineError if QEMU cannot be started, StorageError.
        """
        running = cls.find(folder)
        if running is not None and running.pid == after:
            running.close()
        elif running is not None:
            with running:
                raise ConflictError(f"VM {folder.vm} runs already, in process {running.pid}")
        _make_journal(folder)
        child = _start(folder, argv)
        pidfd = os.pidfd_open(child.pid)
        try:
            identity = Identity.of(child.pid)
            record = Record(identity.pid, identity.start_ticks, identity.boot, tuple(argv), facts or {})
            replace_file(disk, folder.process, msgspec.json.encode(record))
            return cls(folder, record, pidfd, child)
        except BaseException:
            child.kill()
            child.wait()
            os.close(pidfd)
            raise

    @classmethod
    def find(cls, folder: RuntimeFolder) -> Qemu | None:
        """The process of an earlier launch, if it is still there."""
        record = _read_record(folder) or _unrecorded(folder)
        if record is None:
            return None
        pidfd = record.identity.open()
        return None if pidfd is None else cls(folder, record, pidfd)

    @property
    def vm(self) -> str:
        """Name of the VM."""
        return self.folder.vm

    @property
    def pid(self) -> int:
        """Of the process; it may have ended."""
        return self.record.pid

    @property
    def pidfd(self) -> int:
        """Readable when the process has ended; owned by this object."""
        return self._pidfd

    def alive(self) -> bool:
        """Whether it has not ended."""
        return not ended(self._pidfd, 0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end, and reap it if it is our child; False if it still runs."""
        if not ended(self._pidfd, timeout_s):
            return False
        if self._child is not None:
            self._child.wait()
        return True

    def let_go(self, timeout_s: float) -> bool:
        """Wait for a QEMU that ends to have closed every socket, or to have ended; False if it has not. Only then do
        the paths of its sockets belong to whoever comes next: QEMU closes its sessions first, and then removes, by
        name, what it listened on. What it leaves to its end, as what VNC listens on, is open until the last of its
        threads has ended, and the process shows nothing of that.

        Source: QEMU, io/channel-socket.c (qio_channel_socket_finalize), proc_pid_fd(5).
        """
        deadline = time.monotonic() + timeout_s
        while self._has_sockets():
            if time.monotonic() > deadline:
                return False
            if ended(self._pidfd, _LOOK_SECONDS):
                break
        return True

    def _has_sockets(self) -> bool:
        try:
            threads = [f"/proc/{self.pid}/task/{each}/fd" for each in os.listdir(f"/proc/{self.pid}/task")]
            opened = [f"{folder}/{each}" for folder in threads for each in _listed(folder)]
        except PermissionError:  # not ours to look at: then its end is waited for
            return not ended(self._pidfd, 0)
        except OSError:  # it has ended
            return False
        for each in opened:
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(each).startswith("socket:"):
                    return True
        return False

    def kill(self, timeout_s: float = 30) -> None:
        """SIGKILL, and wait. Raises VirtualMachineError if the kernel cannot end it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not self.wait(timeout_s):
            raise VirtualMachineError(f"VM {self.vm}: QEMU (process {self.pid}) does not end after SIGKILL")

    def end(self) -> str:
        """In words, how it ended, with its own last lines; for the message of an error."""
        self.wait(0)
        status = self._child.returncode if self._child is not None else None
        how = "ended"
        if status is not None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = self.last_lines()
        return f"QEMU {how}: {said}" if said else f"QEMU {how}, and its log {self.folder.log} is empty"

    def last_lines(self) -> str:
        """What QEMU printed last, joined into one line, without its own name in front."""
        try:
            with self.folder.log.open("rb") as log:
                log.seek(max(log.seek(0, os.SEEK_END) - 4096, 0))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        name = re.escape(Path(self.record.argv[0]).name) if self.record.argv else "qemu"
        lines = [re.sub(rf"^\S*{name}: ", "", line.strip()) for line in text.splitlines() if line.strip()]
        return "; ".join(lines[-_LAST_LINES:])

    def events(self) -> bytes:
        """The event journal; empty if there is none."""
        try:
            return self.folder.journal_output.read_bytes()
        except OSError:
            return b""

    def let_go_on(self) -> None:
        """Have a paused guest go on by way of the journal's monitor, where there is no session with the other one; what
        QEMU says to it is not waited for. A guest that is held stays so: QEMU refuses."""
        with contextlib.suppress(OSError):  # there is none, or it is full
            os.write(self._journal, _GO_ON)

    def close(self) -> None:
        """Let go of the process without ending it."""
        for descriptor in (self._pidfd, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = self._journal = -1
        if self._child is not None and self._child.returncode is None:
            self._child.returncode = 0  # or its destructor complains of a child that is meant to run on
        self._child = None

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listed(folder: str) -> list[str]:
    """Names in a folder of a thread; none if the thread has ended. Raises PermissionError."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


def find_binary(vm: str, name: str) -> Path:
    """The program, by path or by name. Raises VirtualMachineError."""
    found = shutil.which(name)
    if found is None:
        raise VirtualMachineError(
            f"VM {vm}: there is no program {name}: install QEMU (package qemu-system-x86), or set qemu in the file"
        )
    return Path(found).resolve()


def version(vm: str, binary: Path) -> str:
    """As in `QEMU emulator version 7.2.22 (Debian ...)`. Raises VirtualMachineError."""
    first = _ask(vm, binary, "-version").partition("\n")[0]
    return first.removeprefix("QEMU emulator version ").strip()


def resolve_machine(vm: str, binary: Path, name: str) -> str:
    """The versioned machine type that an alias stands for now. Raises VirtualMachineError."""
    return machine_of(_ask(vm, binary, "-machine", "help"), name) or _no_machine(vm, binary, name)


def has_device(vm: str, binary: Path, driver: str) -> bool:
    """Whether this QEMU knows a device; one that cannot even say that will say at its start what is wrong."""
    try:
        return f"{driver} options" in _ask(vm, binary, "-device", f"{driver},help")
    except VirtualMachineError:
        return False


def machine_of(listing: str, name: str) -> str | None:
    """From the text of `-machine help`; None if the machine is not in it."""
    for line in listing.splitlines()[1:]:
        kind, _, words = line.partition(" ")
        alias = re.search(r"\(alias of ([^)\s]+)\)", words)
        if kind == name:
            return alias[1] if alias else kind
    return None


def trim_log(path: Path, bytes_max: int) -> None:
    """Cut a log that QEMU appends to down to its last half, when it is longer than `bytes_max`.

    A guest can write to its console without end. What is appended meanwhile may get lost. Raises StorageError.
    """
    try:
        with path.open("r+b") as log:
            size = log.seek(0, os.SEEK_END)
            if size <= bytes_max:
                return
            log.seek(size - bytes_max // 2)
            rest = log.read(bytes_max // 2)
            log.truncate(0)
        with path.open("ab") as log:
            log.write(rest)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError.from_os(error, str(path), "shorten") from error


def journal_end(folder: RuntimeFolder) -> int:
    """Length of the event journal, in bytes: what comes later is behind that. 0 if there is none."""
    try:
        return folder.journal_output.stat().st_size
    except OSError:
        return 0


def trim_journal(folder: RuntimeFolder, end: int) -> None:
    """Forget the events before an offset, which have been dealt with; they read as zeros. Raises StorageError.

    What QEMU appends meanwhile stays: the next supervisor may be the one to act on it.
    """
    try:
        with folder.journal_output.open("r+b") as journal:
            extents.punch(journal.fileno(), extents.normalise([(0, end)]))
    except OSError as error:
        raise StorageError.from_os(error, str(folder.journal_output), "shorten") from error


def _start(folder: RuntimeFolder, argv: list[str]) -> subprocess.Popen[bytes]:
    try:
        log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(folder.log), "make") from error
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",  # a folder that was the user's must not stay busy for as long as the VM runs
            start_new_session=True,
            close_fds=True,
            umask=0o077,  # sockets, journal and console are the user's alone
        )
    except OSError as error:
        raise VirtualMachineError(f"VM {folder.vm}: cannot start {argv[0]}: {error.strerror or error}") from error
    finally:
        os.close(log)


def _make_journal(folder: RuntimeFolder) -> None:
    try:
        for path in (folder.journal_input, folder.journal_output, folder.process):
            path.unlink(missing_ok=True)
        os.mkfifo(folder.journal_input, 0o600)
        folder.journal_output.touch(0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(folder.journal_input), "make the event journal") from error


def _open_journal(folder: RuntimeFolder) -> int:
    """Start the journal's monitor, which is silent until it is spoken to; to one that runs this is nothing new.

    The descriptor has to stay open until QEMU has opened the FIFO, or what was written is gone; -1 if it is missing.
    """
    try:
        descriptor = os.open(folder.journal_input, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    with contextlib.suppress(BlockingIOError):  # full: QEMU does not read it, and has the first one in any case
        os.write(descriptor, _NEGOTIATE)
    return descriptor


def _read_record(folder: RuntimeFolder) -> Record | None:
    try:
        return msgspec.json.decode(folder.process.read_bytes(), type=Record)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


def _unrecorded(folder: RuntimeFolder) -> Record | None:
    """A QEMU of ours that there is no record of: it may be too young to listen on its socket. Source: proc(5)."""
    monitor = f"path={str(folder.monitor).replace(',', ',,')},".encode()  # as QEMU's options have it
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if monitor in (entry / "cmdline").read_bytes() and entry.stat().st_uid == os.geteuid():
                identity = Identity.of(int(entry.name))
                return Record(identity.pid, identity.start_ticks, identity.boot, ())
        except OSError:
            continue
    return None


def _ask(vm: str, binary: Path, *arguments: str) -> str:
    """What QEMU prints of itself; asked once for each file that the program has been (30 ms each time)."""
    try:
        facts = binary.stat()
        asked: tuple[str | int, ...] = (
            str(binary),
            facts.st_dev,
            facts.st_ino,
            facts.st_size,
            facts.st_mtime_ns,
            *arguments,
        )
    except OSError:  # which starting it will tell
        return _asked_anew(vm, binary, *arguments)
    if asked not in _answers:
        _answers[asked] = _asked_anew(vm, binary, *arguments)
    return _answers[asked]


_answers: dict[tuple[str | int, ...], str] = {}


def _asked_anew(vm: str, binary: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            [str(binary), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VirtualMachineError(f"VM {vm}: {binary} {' '.join(arguments)} failed: {error}") from error
    if answer.returncode:
        lines = " ".join(answer.stderr.split())
        raise VirtualMachineError(f"VM {vm}: {binary} {' '.join(arguments)} failed: {lines or answer.returncode}")
    return answer.stdout


def _no_machine(vm: str, binary: Path, name: str) -> str:
    raise VirtualMachineError(
        f"VM {vm}: {binary} has no machine type {name} (`{binary.name} -machine help` lists them)"
    )
