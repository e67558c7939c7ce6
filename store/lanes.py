"""Lanes carry batches to chunkers: in this process for small work, in worker processes for large.

Every lane has the same two steps a batch: `submit` (copy, zero test, hash) gives ids later, `keep` says which
chunks to pack. `drive` keeps all lanes busy and asks a judge about each batch of ids; the judge runs in the
caller's process, which alone holds the index. Belongs to one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from base.allocation import keep_freed_memory
from base.errors import PerdureError, WorkerError
from base.extents import Extents
from base.workers import WorkerPool, receive_descriptor
from store.chunker import Chunker, ChunkKeys, PackingSettings
from store.keys import DataKeys
from store.packs import PackInfo, delete_packs
from store.storage import Storage

_DEPTH = 3
"""Batches under way in one worker: one being hashed, one waiting for the judge, one on its way."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some chunks of one file: chunk-aligned `extents` (bytes) and the numbers (n,) of their chunks."""

    extents: Extents
    numbers: NDArray[np.uint64]


Judge = Callable[[Batch, NDArray[np.uint8]], NDArray[np.bool_]]
"""Given a batch and its ids (n, 32), says which of its chunks are to be packed."""


class Lanes(Protocol):
    """Where the work of one generation is done."""

    def drive(self, descriptor: int, chunk_size: int, batches: Iterator[Batch], judge: Judge) -> None:
        """Read every batch from the file, ask the judge, pack. Raises StorageError, WorkerError."""

    def finish(self) -> list[PackInfo]:
        """Publish all packs."""

    def abandon(self) -> None:
        """Drop what is not published."""


class LocalLane:
    """One chunker in this process: no start-up cost, for small work."""

    def __init__(self, storage: Storage, keys: ChunkKeys, settings: PackingSettings) -> None:
        self._chunker = Chunker(storage, keys, settings)

    def drive(self, descriptor: int, chunk_size: int, batches: Iterator[Batch], judge: Judge) -> None:
        for token, batch in enumerate(batches):
            ids = self._chunker.read(token, descriptor, batch.extents, chunk_size)
            self._chunker.keep(token, judge(batch, ids))

    def finish(self) -> list[PackInfo]:
        return self._chunker.finish()

    def abandon(self) -> None:
        self._chunker.abandon()


class WorkerLanes:
    """One chunker in each process of a pool made with `serve_chunker`."""

    def __init__(self, pool: WorkerPool, storage: Storage, keys: bytes, settings: PackingSettings) -> None:
        self._pool, self._storage = pool, storage
        self._finished: list[PackInfo] = []
        pool.ready()
        for worker in range(len(pool)):
            pool.send(worker, ("begin", storage, keys, settings))

    def drive(self, descriptor: int, chunk_size: int, batches: Iterator[Batch], judge: Judge) -> None:
        try:
            for worker in range(len(self._pool)):
                self._pool.send(worker, ("open", chunk_size))
                self._pool.send_descriptor(worker, descriptor)
            self._pump(batches, judge)
            for worker in range(len(self._pool)):
                self._pool.send(worker, ("close",))  # it may be the only copy of memory that somebody waits to be freed
        except KeyboardInterrupt:  # perhaps in the middle of a message: no worker can be spoken to any more
            self._pool.kill()
            raise

    def _pump(self, batches: Iterator[Batch], judge: Judge) -> None:
        under_way: dict[int, Batch] = {}
        token = 0
        load = [0] * len(self._pool)
        more = True
        while more or under_way:
            while more and min(load) < _DEPTH:
                batch = next(batches, None)
                if batch is None:
                    more = False
                    break
                worker = load.index(min(load))
                self._pool.send(worker, ("read", token, batch.extents))
                under_way[token] = batch
                load[worker] += 1
                token += 1
            if not under_way:
                break
            for worker, (answered, ids) in self._pool.receive():
                wanted = judge(under_way.pop(answered), ids)
                self._pool.send(worker, ("keep", answered, wanted))
                load[worker] -= 1

    def finish(self) -> list[PackInfo]:
        for worker in range(len(self._pool)):
            self._pool.send(worker, ("finish",))
        for worker in range(len(self._pool)):
            self._finished += self._pool.receive_from(worker)
        done, self._finished = self._finished, []
        return done

    def abandon(self) -> None:
        for worker in range(len(self._pool)):
            with suppress(WorkerError):  # a dead worker has nothing left to drop
                self._pool.send(worker, ("abandon",))
                self._drain(worker)
        done, self._finished = self._finished, []
        delete_packs(self._storage, done)

    def _drain(self, worker: int) -> None:
        """Pass over answers and errors that nobody waits for any more; packs that it has finished are to be dropped."""
        while True:
            try:
                answer = self._pool.receive_from(worker)
                if answer == "abandoned":
                    return
                if isinstance(answer, list):
                    self._finished += answer
            except WorkerError:
                raise
            except PerdureError:
                continue


class _ChunkerService:
    """State of a worker process: the chunker of one generation, and one open file."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._chunker: Chunker | None = None
        self._descriptor = -1
        self._chunk_size = 0

    def handle(self, what: str, arguments: tuple[Any, ...]) -> None:
        if what == "begin":
            storage, material, settings = arguments
            self._chunker = Chunker(storage, DataKeys.from_worker_material(material), settings, background=True)
        elif what == "open":
            self._chunk_size = arguments[0]
            self._descriptor = receive_descriptor(self._pipe)
        elif what == "close":
            self.close()
        elif what == "abandon":
            self.drop()
            self._pipe.send("abandoned")
        elif self._chunker is not None:
            if what == "read":
                token, extents = arguments
                ids = self._chunker.read(token, self._descriptor, extents, self._chunk_size)
                self._pipe.send((token, ids))
            elif what == "keep":
                self._chunker.keep(*arguments)
            elif what == "finish":
                self._pipe.send(self._chunker.finish())

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def drop(self) -> None:
        """After an error the generation is lost; what still comes for it is passed over."""
        self.close()
        if self._chunker is not None:
            self._chunker.abandon()
            self._chunker = None


def serve_chunker(pipe: Connection) -> None:
    """The loop of a worker process; an error is answered, and the worker is ready for the next generation."""
    keep_freed_memory()
    service = _ChunkerService(pipe)
    while True:
        what, *arguments = pipe.recv()
        try:
            service.handle(what, tuple(arguments))
        except PerdureError as error:
            service.drop()
            pipe.send(error)
