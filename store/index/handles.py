"""LMDB's environment and its named databases in this process, in one of two modes.

py-lmdb keeps handles of named databases only where a write transaction opened them, or where the whole environment is
open for reading only. So that nobody who reads waits for somebody who writes, it is opened for reading only while
another process writes, and opened again for writing when this process first does. The caller holds the lock that
all writers of the index share (store.index.environment) when it asks for writing.

May be shared between threads; a transaction belongs to the thread that began it, and no thread asks for writing
inside one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

if TYPE_CHECKING:
    Transaction = lmdb.Transaction[memoryview]

MAP_SIZE = 1 << 40
"""Bytes of address space, and the most that the index can grow to. Sparse: costs nothing until used."""

MAX_DATABASES = 32
_MAX_READERS = 1022
LOCK_FILE_BYTES = 64 << 10
"""What LMDB makes of that: 64 bytes for each reader, and two cache lines."""


class Handles:
    """An open environment; `close` it. Raises lmdb.Error."""

    def __init__(self, path: Path, names: Sequence[str], *, writable: bool) -> None:
        self._path, self._names = path, tuple(names)
        self._changed = threading.Condition()
        self._reading, self._switching = 0, False
        self._here = threading.local()
        self._open(writable=writable)

    def database(self, name: str) -> lmdb._Database:
        """Handle of a named database, for one use: it changes with the mode."""
        return self._databases[name]

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A snapshot."""
        nested = getattr(self._here, "reading", 0)
        with self._changed:
            while self._switching and not nested:
                self._changed.wait()
            transaction = self._lmdb.begin(buffers=True)
            self._reading += 1
        self._here.reading = nested + 1
        try:
            with transaction as txn:
                yield txn
        finally:
            self._here.reading -= 1
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """The one write transaction among all processes."""
        if not self.writable:
            self._make_writable()
        with self._lmdb.begin(write=True, buffers=True) as txn:
            yield txn

    def sync(self) -> None:
        """Make all that is committed durable; only where it is writable already."""
        self._lmdb.sync(True)

    def close(self) -> None:
        """Close it; safe to call twice."""
        self._lmdb.close()

    def _make_writable(self) -> None:
        """Once nobody reads; who begins to read meanwhile waits for the opening of a file."""
        assert not getattr(self._here, "reading", 0), "a thread that reads cannot wait for the end of reading"
        with self._changed:
            self._switching = True
            try:
                while self._reading:
                    self._changed.wait()
                if not self.writable:
                    self._lmdb.close()
                    self._open(writable=True)
            finally:
                self._switching = False
                self._changed.notify_all()

    def _open(self, *, writable: bool) -> None:
        # meminit stays on: without it, whatever was in this process's memory would get into the file.
        self._lmdb = lmdb.open(
            str(self._path),
            subdir=False,
            map_size=MAP_SIZE,
            metasync=False,
            readonly=not writable,
            mode=0o600,
            max_dbs=MAX_DATABASES,
            max_readers=_MAX_READERS,
            max_spare_txns=1,
            lib_version=0,
        )
        try:
            if writable:
                with self._lmdb.begin(write=True) as txn:
                    self._databases = {each: self._lmdb.open_db(each.encode(), txn=txn) for each in self._names}
            else:
                self._databases = {each: self._lmdb.open_db(each.encode(), create=False) for each in self._names}
            self._lmdb.reader_check()
        except BaseException:
            self._lmdb.close()
            raise
        self.writable = writable
