"""The LMDB environment that holds a repository's index on this host: opening, transactions, errors.

It is a private folder (0700) on a local file system:

    index.lmdb, index.lmdb-lock   LMDB's own
    lock                          flock, shared, of every process that has it open; holds the marker of
                                  store.index.examination
    gate                          lock (base.locks) of whoever opens, closes or discards
    writing                       lock of whoever has the write transaction, so that others know, and can wait in time
    <role>.role                   flock of whoever does a job that one process at a time does

Invariants:
- One open per process and folder; a second is refused. Never used across fork: pid is checked.
- The index is a cache that can be rebuilt, so it need not be durable, but it must never claim more than the
  repository has, and must be consistent. A commit's packs and record are durable before LMDB commits, so losing
  LMDB's last transactions only makes the index claim less, and replay brings it up to date. Of LMDB's modes
  metasync=False is the fastest that keeps this: pages are synced before the meta page that refers to them is
  written, and that is synced with the next commit; a crash loses the last transaction, no more (a 2 MiB
  transaction took 1.2 ms, with full sync 5.9 ms, without any 0.4 ms). Without any sync, the meta page could reach
  the disk before what it refers to, and stale pages pass every structural check. What metasync=False does not give
  is order against the repository: before something that the index once claimed is removed from the repository
  (prune unlinks packs), call `flush`.
- A damaged index is found before it is mapped where that is possible (store.index.examination), and thrown away.

May be shared between threads; a transaction belongs to the thread that began it. LMDB allows one writer among all
processes: keep write transactions short. Who reads never waits for who writes, also at opening (store.index.handles).
But a read transaction keeps every page alive that is newer than it is: do not hold one while waiting for anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from base import locks
from base.disk import Disk
from base.errors import ConflictError, IntegrityError, LockedError, StorageError
from store.index import examination
from store.index.handles import LOCK_FILE_BYTES, MAP_SIZE, Handles

if TYPE_CHECKING:
    Transaction = lmdb.Transaction[memoryview]

LOCK_WAIT_S = 600.0
"""How long to wait for others, where nothing else was asked for: longer than anything that is done under a lock."""

_NO_SPACE_BYTES = 1 << 20

_NETWORK = re.compile(
    r"9p|acfs|afs|beegfs|ceph|cifs|coda|davfs|fuse(\..*)?|gfs2?|glusterfs|gpfs|lustre|ncpfs|nfs4?|ocfs2|orangefs"
    r"|prl_fs|pvfs2|smb2|smb3|smbfs|vboxsf|virtiofs|vmhgfs"
)
"""File systems whose files others than this kernel may change, or whose locks and maps need not agree. Plain
`fuse` and `fuse.*` are among them, since nobody knows what is behind; `fuseblk` is a local disk."""

_open: dict[Path, Environment] = {}
_opening = threading.Lock()


class IndexLostError(IntegrityError):
    """The index of this host is damaged or gone: open it again and fill it by replay. Nothing else is lost."""


class Environment:
    """An open LMDB environment with its named databases; a context manager.

    `directory` is made if it is missing. `databases` are opened or made. `mac_key` (32 bytes) lets a child check the
    index after an unclean shutdown. `wait_s`: how long to wait while another process opens, examines or writes it.
    LMDB does its own writing: of `disk` only `step` is called, before a commit and before a sync.

    Raises IndexLostError when what was there cannot be trusted: it has been thrown away, and opening again makes
    an empty one. Raises ConflictError (open in this process already), LockedError, StorageError.
    """

    def __init__(
        self,
        directory: Path,
        databases: Sequence[str],
        *,
        mac_key: bytes,
        wait_s: float = LOCK_WAIT_S,
        disk: Disk | None = None,
    ) -> None:
        _prepare(directory)
        self._disk = disk or Disk()
        self.directory = directory.resolve()
        self.path = self.directory / "index.lmdb"
        self._pid = os.getpid()
        self._lock = -1
        self.wait_s = wait_s
        before = _open.get(self.directory)
        if before is not None and before._pid != self._pid:
            raise ConflictError(f"{self.path}: open in the process that this one was forked from")
        with _opening:
            if self.directory in _open:
                raise ConflictError(f"{self.path}: open in this process already")
            _open[self.directory] = self
        try:
            with self._gate("opening the index", wait_s):
                self._enter(databases, mac_key)
        except BaseException:
            self._leave()
            raise

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def database(self, name: str) -> lmdb._Database:
        """Handle of one of the databases named at opening."""
        return self._handles.database(name)

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A snapshot. Values are memoryviews of the map: copy what is to live longer than the transaction.

        Never waits. Raises IndexLostError, StorageError; LMDB's errors inside the block become one of these.
        """
        self._check_process()
        with self._translating(), self._handles.read() as txn:
            self.require_current()
            yield txn

    @contextmanager
    def write(self, purpose: str = "changing the index", wait_s: float | None = None) -> Iterator[Transaction]:
        """The one write transaction; waits for others to end theirs. Commits unless the block raises.

        What it changes stays in memory until then. Values got from it are valid until the next change. `purpose` is
        what others are told who wait; `wait_s` None: as long as was said at opening. No thread asks for it inside a
        `read`. Raises LockedError, IndexLostError, StorageError (the disk is full, for one): then nothing has changed.
        """
        self._check_process()
        with (
            locks.held(self.directory / "writing", purpose, self.wait_s if wait_s is None else wait_s),
            self._translating(),
            self._handles.write() as txn,
        ):
            self.require_current()
            yield txn
            self._disk.step("lmdb commit", str(self.path))

    def require_current(self) -> None:
        """Raises IndexLostError if another process has thrown this index away. Called by any thread."""
        if not self._is_current():
            raise IndexLostError(
                str(self.path),
                "another process has found the index damaged and thrown it away: start this one again "
                "(perdure run and perdure attach take a running VM over)",
            )

    def flush(self) -> None:
        """Make all that is committed durable; needed before removing from the repository what the index claimed."""
        self._check_process()
        self._disk.step("lmdb sync", str(self.path))
        if not self._handles.writable:
            with self.write("making the index durable"):
                pass
        with self._translating():
            self._handles.sync()

    @contextmanager
    def role(self, name: str) -> Iterator[bool]:
        """Whether this process has a job to itself for as long as the block runs. Never waits."""
        self._check_process()
        with _descriptor(self.directory / f"{name}.role") as descriptor:
            yield _try_lock(descriptor, fcntl.LOCK_EX)

    def discard(self) -> None:
        """Throw the index away, because it is damaged, and close it. Call outside transactions.

        Other processes that have it open find out at their next transaction (IndexLostError); a commit that one of
        them has under way is not lost, since its record is in the repository.
        """
        self._check_process()
        with self._gate("throwing away a damaged index", LOCK_WAIT_S):
            if self._is_current():
                # It may be too damaged for a transaction.
                with suppress(lmdb.Error), self._handles.write():
                    _remove(self.path)
                _remove(self.path)
            self._handles.close()
        self._leave()

    def close(self) -> None:
        """Close it; the last process to do so marks it as left in order. Never raises; safe to call twice."""
        if self._lock < 0 or self._pid != os.getpid():
            return
        self._handles.close()
        # Where it fails, the index stays marked as open, and the next to open it takes a closer look.
        with suppress(StorageError, LockedError, OSError), self._gate("closing the index", 10.0):
            if self._is_current() and _try_lock(self._lock, fcntl.LOCK_EX):
                examination.write_marker(self._lock, "closed", self.path)
        self._leave()

    def _enter(self, databases: Sequence[str], mac_key: bytes) -> None:
        """Inside the gate: examine what is there if nobody else has it open, then open it."""
        lock_path = self.directory / "lock"
        try:
            self._lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            alone = _try_lock(self._lock, fcntl.LOCK_EX)
            if not self.path.exists() or self.path.stat().st_size == 0:
                _remove(self.path)  # LMDB's lock file must not outlive the data it was about
            elif alone:
                problem = examination.distrust(self.path, examination.read_marker(self._lock), mac_key)
                if problem is not None:
                    raise IndexLostError(str(self.path), f"the index of this host is lost: {problem}")
            _allocate_lock_file(self.path)
            self._handles = self._open_handles(databases)
            try:
                facts = self.path.stat()
                self._identity = facts.st_dev, facts.st_ino
                if alone:
                    with suppress(OSError):  # a full disk: the old marker does not fit the file for long
                        examination.write_marker(self._lock, "open", self.path)
                fcntl.flock(self._lock, fcntl.LOCK_SH)  # exclusive only inside the gate, so this never waits
            except BaseException:
                self._handles.close()
                raise
        except OSError as error:
            raise StorageError.from_os(error, error.filename or str(self.path), "open") from error
        except lmdb.Error as error:
            translated = self._translated(error)
            if isinstance(translated, IndexLostError):
                _remove(self.path)
            raise translated from error
        except IndexLostError:
            _remove(self.path)
            raise

    def _open_handles(self, databases: Sequence[str]) -> Handles:
        """For writing, unless another process writes just now: then for reading, which waits for nobody."""
        try:
            with locks.held(self.directory / "writing", "opening the index", 0):
                return Handles(self.path, databases, writable=True)
        except LockedError:
            return Handles(self.path, databases, writable=False)

    def _gate(self, purpose: str, wait_s: float) -> AbstractContextManager[None]:
        """Alone among those who open, close and discard. Raises LockedError."""
        return locks.held(self.directory / "gate", purpose, wait_s)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ConflictError(f"{self.path}: opened by process {self._pid}, not to be used after a fork")
        if self._lock < 0:
            raise ConflictError(f"{self.path}: is closed")

    def _is_current(self) -> bool:
        try:
            facts = os.stat(self.path)
        except OSError:
            return False
        return (facts.st_dev, facts.st_ino) == self._identity

    def _leave(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        with _opening:
            _open.pop(self.directory, None)

    def _translated(self, error: lmdb.Error) -> StorageError | IndexLostError:
        """Our error for one of LMDB's."""
        path, code = str(self.path), getattr(error, "code", 0)
        if isinstance(error, lmdb.MapFullError):
            return StorageError(path, f"the index has reached its limit of {MAP_SIZE >> 40} TiB", errno=errno.ENOSPC)
        if isinstance(
            error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError)
        ):
            return IndexLostError(path, f"the index of this host is damaged: {error}")
        if isinstance(error, lmdb.DiskError) or code == errno.ENOSPC or (code == errno.EIO and self._is_full()):
            return StorageError(path, "the disk is full", errno=errno.ENOSPC)
        return StorageError(path, f"LMDB: {error}", errno=max(code, 0))

    def _is_full(self) -> bool:
        """LMDB reports a write that a full disk cut short as EIO."""
        try:
            facts = os.statvfs(self.directory)
        except OSError:
            return False
        return facts.f_bavail * facts.f_frsize < _NO_SPACE_BYTES


def file_system(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds `path`, empty if unknown. `mounts` is the text of a mountinfo file.

    Source: proc_pid_mountinfo(5). The last of several mounts on one point is the one that is seen.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return ""
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def is_network(kind: str) -> bool:
    """Whether a file system of this type is no place for LMDB."""
    return _NETWORK.fullmatch(kind) is not None


def _prepare(directory: Path) -> None:
    """Make the folder if it is missing; refuse it where LMDB would not be safe or not be private."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = file_system(directory.resolve())
        if is_network(kind):
            raise StorageError(
                str(directory), f"is on {kind}: the index needs a local file system, set another state folder"
            )
        facts = directory.stat()
        if facts.st_uid != os.geteuid():
            raise StorageError(
                str(directory), f"belongs to user {facts.st_uid}, not to user {os.geteuid()} who runs this"
            )
        if stat.S_IMODE(facts.st_mode) & 0o077:
            directory.chmod(0o700)
    except OSError as error:
        raise StorageError.from_os(error, str(directory), "make the folder of the index") from error


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "open") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _allocate_lock_file(path: Path) -> None:
    """LMDB maps the file of its lock: on a full disk, its first look at a page without a place there is SIGBUS."""
    descriptor = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, LOCK_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(str(path), "the disk is full", errno=errno.ENOSPC) from error
        raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Data first: a lock file without data is removed by whoever opens next, the other way round could be used."""
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}-lock").unlink(missing_ok=True)
