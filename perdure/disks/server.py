"""The process that shows disks of generations to QEMU while their images are filled: one for each rollback.

It is started by a supervisor and outlives it, as QEMU does: a guest may need it for any read. Killed, it costs the
guest a wait until the next one is started; it has no state but its socket. It is handed what it needs to read the
repository through a pipe: keys stand in no file and in no argument. It ends by itself when nobody has been connected
for a while.

`start` and `find` are the supervisor's side; run as a program, this is the server: one thread for each connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event, Lock, Thread

import msgspec

from base.disk import Disk, replace_file
from base.errors import PerdureError, StorageError, WorkerError, one_line
from restore.disk_source import Access, GenerationDisk
from restore.nbd_server import serve
from store.index.environment import Environment
from store.keyring.keys import Keys
from store.repository import Repository
from store.storage import LocalStorage
from vm.identity import Identity, ended

_START_SECONDS = 60
_IDLE_SECONDS = 600
_ROOT = Path(__file__).resolve().parents[2]


class Export(msgspec.Struct, frozen=True):
    """What a name in an export stands for: a region of the generation with this record."""

    sequence: int
    region: str


class _Orders(msgspec.Struct, frozen=True):
    """What a server is told through its standard input."""

    vm: str
    repository: str
    state: str
    keys: bytes
    socket: str
    exports: dict[str, Export]


class _Record(msgspec.Struct, frozen=True):
    """Beside the socket: which process serves it, why readers are held, by disk, and the number of the keyring that it
    was given."""

    pid: int
    start_ticks: int
    boot: str
    held: dict[str, str] = {}
    keyring: int = 0


class DiskServer:
    """A server that runs, ours or one that was found."""

    def __init__(self, path: Path, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.path, self._pidfd, self._child = path, pidfd, child

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not ended(self._pidfd, 0)

    def held(self) -> dict[str, str]:
        """Why readers are held just now, by disk: what could not be read of the repository."""
        record = _read(self.path)
        return {} if record is None else record.held

    @property
    def keyring(self) -> int:
        """Number of the keyring that it was given: what is sealed with later keys it cannot read."""
        record = _read(self.path)
        return 0 if record is None else record.keyring

    def end(self) -> None:
        """End it, and let go of it; what is connected to it waits for another."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        if not ended(self._pidfd, 5):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            ended(self._pidfd, 5)
        self.close()
        for path in (self.path, _record(self.path)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it without ending it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None:
            if self._child.poll() is None:
                self._child.returncode = 0  # or its destructor complains of a child that is meant to run on
            self._child = None


def find(path: Path) -> DiskServer | None:
    """The server of a socket that an earlier supervisor has started, if it runs."""
    record = _read(path)
    if record is None:
        return None
    pidfd = Identity(record.pid, record.start_ticks, record.boot).open()
    return None if pidfd is None else DiskServer(path, pidfd, None)


def start(vm: str, repository: Repository, path: Path, exports: dict[str, Export]) -> DiskServer:
    """Blocking: a server on the socket `path`, which answers when this returns.

    Raises WorkerError with what it said, if it did not come up.
    """
    orders = _Orders(
        vm=vm,
        repository=str(repository.path),
        state=str(repository.environment.directory.parent),
        keys=repository.keys.handover(),
        socket=str(path),
        exports=exports,
    )
    log = path.with_suffix(".log")
    try:
        child = _spawn(path, log)
    except OSError as error:
        raise WorkerError(f"VM {vm}: the server of its disks did not start: {error}") from error
    pidfd = os.pidfd_open(child.pid)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(msgspec.json.encode(orders))
    server = DiskServer(path, pidfd, child)
    if not _answers(server):
        child.kill()
        child.wait()
        server.end()
        said = " ".join(log.read_text(errors="replace").split()[-60:]) or "it said nothing"
        raise WorkerError(f"VM {vm}: the server of its disks did not start: {said}")
    return server


def _spawn(path: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as output:
        return subprocess.Popen(
            [sys.executable, "-m", "perdure.disks.server", str(path)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment,
            start_new_session=True,
        )


def _answers(server: DiskServer) -> bool:
    """Wait until it listens, or has ended."""
    for _ in range(_START_SECONDS * 100):
        if _read(server.path) is not None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
                probe.connect(str(server.path))
                return True
        if ended(server._pidfd, 0.01):
            return False
    return False


class _Server:
    """The server's own process."""

    def __init__(self, orders: _Orders, disk: Disk) -> None:
        self._orders, self._disk = orders, disk
        self._path = Path(orders.socket)
        self._leaving = Event()
        self._held: dict[str, str] = {}
        self._keyring = 0
        self._connections = 0
        self._lock = Lock()

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._leaving.set())
        orders = self._orders
        path = Path(orders.repository)
        storage = LocalStorage(path)
        keys = Keys.from_handover(orders.keys, lambda name: storage.get(name))
        storage.close()
        self._keyring = keys.header.number
        with Repository(path, keys, Path(orders.state)) as repository, contextlib.ExitStack() as stack:
            access = Access(repository)
            disks = {}
            for name, each in orders.exports.items():
                generation = repository.generation_at(each.sequence)
                disks[name] = GenerationDisk(access, generation, each.region)
                stack.callback(disks[name].close)
            with _listening(self._path) as listener:
                self._note()
                try:
                    self._accept(listener, disks, repository.environment)
                finally:
                    self._leaving.set()

    def _accept(self, listener: socket.socket, disks: dict[str, GenerationDisk], index: Environment) -> None:
        """Raises IndexLostError if the index was made anew: only another server can go on."""
        idle = 0.0
        while not self._leaving.is_set() and idle < _IDLE_SECONDS:
            index.require_current()
            ready, _, _ = select.select([listener], [], [], 1.0)
            idle = 0.0 if self._connections else idle + 1.0
            if ready:
                connection, _ = listener.accept()
                with self._lock:
                    self._connections += 1
                Thread(target=self._serve, args=(connection, disks), daemon=True).start()

    def _serve(self, connection: socket.socket, disks: dict[str, GenerationDisk]) -> None:
        try:
            serve(connection, disks, self._note_held, self._leaving.wait)
        finally:
            with self._lock:
                self._connections -= 1

    def _note_held(self, name: str, error: PerdureError | None) -> None:
        with self._lock:
            if error is None:
                self._held.pop(name, None)
            elif self._held.get(name) == one_line(error):
                return
            else:
                self._held[name] = one_line(error)
                print(f"{self._orders.vm}: disk {name}: {one_line(error)}", flush=True)
            self._note()

    def _note(self) -> None:
        identity = Identity.of(os.getpid())
        record = _Record(identity.pid, identity.start_ticks, identity.boot, dict(self._held), self._keyring)
        with contextlib.suppress(StorageError):
            replace_file(self._disk, _record(self._path), msgspec.json.encode(record), lasting=False)


def _listening(path: Path) -> socket.socket:
    """A socket that is there under its name only when it listens."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(_record(path).read_bytes(), type=_Record)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


def main() -> int:
    """The server, told through standard input what to do."""
    os.umask(0o077)
    orders = msgspec.json.decode(sys.stdin.buffer.read(), type=_Orders)
    try:
        _Server(orders, Disk()).run()
    except PerdureError as error:
        print(one_line(error), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
