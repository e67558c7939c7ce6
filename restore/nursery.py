"""Page servers made at once: a small process that was forked early, and forks one whenever it is asked to.

A page server starts with most of a second of imports, and cannot be forked from a supervisor that has threads and an
open LMDB. So the supervisor forks a nursery before it has either; a server forked from that has everything loaded,
shares its memory, and is ready in some milliseconds, be it for the next rollback or in place of one that was killed.
Servers outlive the nursery; a `Standby` has a pidfd of its server. The nursery ends when its owner does. Where it is
gone, or has not answered once, servers are spawned. Several threads may ask.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from base.errors import VirtualMachineError
from restore import server
from vm.identity import ended

_SECONDS = 10.0
_WANTED, _MADE = b"w", b"m"


class Standby:
    """A page server that waits for a job; it ends with `close`, or when its owner does."""

    def __init__(self, pipe: Connection, pidfd: int) -> None:
        self.pipe, self.pidfd = pipe, pidfd

    def close(self) -> None:
        """One that was not given a job ends."""
        self.pipe.close()
        ended(self.pidfd, _SECONDS)
        with contextlib.suppress(OSError):  # the nursery's is reaped there
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        os.close(self.pidfd)


class Nursery:
    """The process that makes them, made by `fork`; a context manager."""

    def __init__(self, connection: socket.socket, pidfd: int) -> None:
        self._socket, self._pidfd = connection, pidfd
        self._asking = threading.Lock()
        connection.settimeout(_SECONDS)

    @classmethod
    def fork(cls) -> Nursery:
        """For a process that has one thread and no open LMDB."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            return cls(ours, os.pidfd_open(pid))
        status = 1
        try:
            ours.close()
            status = _tend(theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def bear(self) -> Standby | None:
        """A page server; None if the nursery is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            pidfd = self._ask(theirs)
        if pidfd is None:
            ours.close()
            return None
        return Standby(Connection(ours.detach()), pidfd)

    def _ask(self, theirs: socket.socket) -> int | None:
        """Pidfd of a server that was made for this connection. Answers do not say whose they are, so one asks at a
        time, and who has not answered in time is asked no more: the next one would get that answer."""
        with self._asking:
            if self._socket.fileno() < 0:
                return None
            try:
                socket.send_fds(self._socket, [_WANTED], [theirs.fileno()])
                said, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            except OSError:
                said, descriptors = b"", []
            if said == _MADE and descriptors:
                return descriptors[0]
            self._socket.close()
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # it may be stuck, and `close` waits for it
            return None

    def close(self) -> None:
        """It ends; its servers go on."""
        with self._asking:
            self._socket.close()
        with contextlib.suppress(OSError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spawned(folder: Path) -> Standby:
    """A page server from nothing. `folder`, the VM's, stands among its arguments. Raises VirtualMachineError."""
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-P", "-m", "restore.server", str(theirs.fileno()), str(folder)]
    try:
        with theirs:
            child = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": root},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
    except OSError as error:
        ours.close()
        raise VirtualMachineError(f"cannot start a page server: {error.strerror or error}") from error
    standby = Standby(Connection(ours.detach()), os.pidfd_open(child.pid))
    child.returncode = 0  # we wait for it by its pidfd, and it may outlive us
    return standby


def _tend(connection: socket.socket) -> int:
    """The nursery's life: fork a server for each connection that comes in, until the other end is closed."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    server.quiet()
    while True:
        said, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not said:
            return 0
        pid = os.fork()
        if not pid:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return server.main(Connection(descriptors[0]))
        pidfd = os.pidfd_open(pid)
        os.close(descriptors[0])
        with contextlib.suppress(OSError):  # the next read says that the other end is gone
            socket.send_fds(connection, [_MADE], [pidfd])
        os.close(pidfd)
