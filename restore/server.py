"""The page server as a process: waits for a job, opens the repository, is attached to a QEMU, serves.

It is a process of its own, in a session of its own, so that neither the end of the supervisor nor Ctrl-C ends it, and
so that it never waits for anything that waits for the guest: not for QMP, not for the supervisor. It is forked
from a nursery (restore.nursery), which makes it ready at once, or started by `python -m restore.server`, which takes as
long as its imports. Over a pipe it gets, in this order:

    (Job, keys)             it opens the repository, and plans what was touched first in earlier resumes
    (pid, start, boot)      it governs that QEMU's memory, answers ("serving", "") or ("failed", why), and serves

Until then it ends when the pipe does; from then on, when QEMU does, or when it is killed: any time will do. Keys come
through the pipe alone, without the signing key.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from base.allocation import keep_freed_memory
from base.disk import Disk
from base.errors import ConflictError, PerdureError, VirtualMachineError, one_line
from restore import claims as record
from restore.claims import Claims
from restore.pages import PageServer
from restore.working_set import WorkingSet
from store.keyring.keys import Keys
from store.repository import Repository
from store.storage import LocalStorage
from vm import injection
from vm.identity import Identity
from vm.userfaultfd import Userfaultfd

SERVING, FAILED = "serving", "failed"
LOG = "pages.log"
_LOCK_WAIT_S = 5.0


class Job(msgspec.Struct, frozen=True):
    """What to serve. Paths: the repository, this host's folder for it, the memory folder with its claim record, the
    file for what this process has to say, and the folder of working sets."""

    repository: str
    state: str
    memory: str
    log: str
    working_sets: str


def main(pipe: Connection) -> int:
    """One server's life; gives its exit status."""
    os.setsid() if os.getsid(0) != os.getpid() else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    keep_freed_memory()
    gc.freeze()  # what is loaded stays; looking through it takes 20 ms, in which somebody may wait
    try:
        job, keys = pipe.recv()
    except (EOFError, ConnectionError):
        return 0
    _say_into(Path(job.log))
    storage = LocalStorage(Path(job.repository))
    try:
        with _served(job, Keys.from_handover(keys, lambda name: storage.get(name))) as server:
            while not pipe.poll() and server.get_ready():
                pass
            return _attached(pipe, server)
    except PerdureError as error:
        print(one_line(error), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            pipe.send((FAILED, error))
        return 1


def _attached(pipe: Connection, server: PageServer) -> int:
    try:
        qemu = Identity(*pipe.recv())
    except (EOFError, ConnectionError):
        return 0
    process = qemu.open()
    if process is None:
        raise VirtualMachineError(f"QEMU (pid {qemu.pid}) has ended")
    with Userfaultfd.of(qemu.pid, injection.inject_here) as descriptor:
        server.attach(descriptor)
        with contextlib.suppress(OSError):  # who asked is gone: serving goes on
            pipe.send((SERVING, ""))
        server.serve(process)
    return 0


@contextlib.contextmanager
def _served(job: Job, keys: Keys) -> Iterator[PageServer]:
    """Everything open, in the order in which it has to be: the record's lock first, so that there is one server."""
    claims = Claims.find(Path(job.memory))
    if claims is None:
        raise ConflictError(f"{job.memory} has no record of a lazy restore")
    with claims:
        claims.lock()
        claims.set(record.SERVER, os.getpid())
        claims.set(record.KEYRING, keys.header.number)
        with Repository(Path(job.repository), keys, Path(job.state), disk=Disk(), lock_wait_s=_LOCK_WAIT_S) as opened:
            generation = claims.generation(opened)
            names = [name for name, _, _ in claims.facts.regions]
            working_set = WorkingSet.of(Path(job.working_sets), generation, names)
            with PageServer(opened, generation, claims, working_set) as server:
                try:
                    yield server
                except ConflictError as error:
                    claims.tell_problem(str(error))
                    claims.set(record.PHASE, record.BROKEN)
                    raise


def quiet() -> None:
    """Standard streams away from the supervisor's: they would keep its pipes open after its end."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)


def _say_into(log: Path) -> None:
    quiet()
    with contextlib.suppress(OSError):
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        os.dup2(written, 2)
        os.close(written)


def start(arguments: list[str]) -> int:
    """`python -m restore.server DESCRIPTOR FOLDER`: the second is for who looks at the list of processes."""
    return main(Connection(int(arguments[0])))


def material(keys: Keys) -> bytes:
    """What goes into the pipe beside a job."""
    return keys.handover()


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
