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
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from base.errors import PerdureError, WorkerError
from base.extents import Extents
from base.workers import WorkerPool, receive_descriptor
from store.chunker import Chunker, ChunkKeys, PackingSettings
from store.keyring.keys import DataKeys
from store.packs import WrittenPack, delete_packs
from store.storage import Storage

_DEPTH = 8
"""Batches under way in one worker, each of them 4 MiB in its memory."""
_TOGETHER = 4
"""Batches a worker that are judged together: look-ups in a large index cost a tenth in batches of 8192 ids."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some chunks of one file: chunk-aligned `extents` (bytes) and the numbers (n,) of their chunks."""

    extents: Extents
    numbers: NDArray[np.uint64]


Judge = Callable[[NDArray[np.uint64], NDArray[np.uint8]], NDArray[np.bool_]]
"""Given numbers (n,), ascending, and ids (n, 32) of chunks, says which of them are to be packed."""


class Lanes(Protocol):
    """Where the work of one generation is done."""

    batch_bytes: int
    """The most that a batch may have."""

    def drive(self, descriptor: int, chunk_size: int, batches: Iterator[Batch], judge: Judge) -> None:
        """Read every batch from the file, ask the judge, pack. Raises StorageError, WorkerError."""

    def finish(self) -> list[WrittenPack]:
        """Publish all packs."""

    def abandon(self) -> None:
        """Drop what is not published."""


def _judged(judge: Judge, group: list[Batch], ids: list[NDArray[np.uint8]]) -> list[NDArray[np.bool_]]:
    """The judge's word on several batches at once, in the order of their addresses."""
    wanted = judge(np.concatenate([each.numbers for each in group]), np.concatenate(ids))
    return np.split(wanted, np.cumsum([len(each.numbers) for each in group])[:-1])


class LocalLane:
    """One chunker in this process: no start-up cost, for small work. In small batches, whose memory serves again: to
    take new memory of the kernel costs more than to read into it."""

    batch_bytes = 1 << 20

    def __init__(self, storage: Storage, keys: ChunkKeys, settings: PackingSettings) -> None:
        self._chunker = Chunker(storage, keys, settings)

    def drive(self, descriptor: int, chunk_size: int, batches: Iterator[Batch], judge: Judge) -> None:
        count = 2  # small at first, so that compressing begins soon: the next ones are read meanwhile
        while group := list(islice(batches, count)):
            count = min(count * 2, _DEPTH)
            ids = [
                self._chunker.read(token, descriptor, batch.extents, chunk_size) for token, batch in enumerate(group)
            ]
            for token, wanted in enumerate(_judged(judge, group, ids)):
                self._chunker.keep(token, wanted)

    def finish(self) -> list[WrittenPack]:
        return self._chunker.finish()

    def abandon(self) -> None:
        self._chunker.abandon()


class WorkerLanes:
    """One chunker in each process of a pool made with `store.workers.serve`."""

    batch_bytes = 4 << 20

    def __init__(self, pool: WorkerPool, storage: Storage, keys: bytes, settings: PackingSettings) -> None:
        self._pool, self._storage = pool, storage
        self._finished: list[WrittenPack] = []
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
        batches_of: dict[int, Batch] = {}
        answers: list[tuple[int, int, NDArray[np.uint8]]] = []  # token, worker, ids: not judged yet
        load, silent = [0] * len(self._pool), [0] * len(self._pool)
        for token, batch in enumerate(batches):
            worker = load.index(min(load))
            self._pool.send(worker, ("read", token, batch.extents))
            batches_of[token] = batch
            load[worker] += 1
            silent[worker] += 1
            while min(load) == _DEPTH:
                self._collect(answers, silent)
                if len(answers) >= _TOGETHER * len(load) or min(silent) == 0:
                    self._judge(judge, batches_of, answers, load)
        while any(load):
            if any(silent):
                self._collect(answers, silent)
            if len(answers) >= _TOGETHER * len(load) or min(silent) == 0:
                self._judge(judge, batches_of, answers, load)

    def _collect(self, answers: list[tuple[int, int, NDArray[np.uint8]]], silent: list[int]) -> None:
        """Wait for the ids of some batches."""
        for worker, (token, ids) in self._pool.receive():
            answers.append((token, worker, ids))
            silent[worker] -= 1

    def _judge(
        self,
        judge: Judge,
        batches_of: dict[int, Batch],
        answers: list[tuple[int, int, NDArray[np.uint8]]],
        load: list[int],
    ) -> None:
        """Judge all answers together, and have what is wanted packed."""
        answers.sort(key=lambda answer: answer[0])
        group = [batches_of.pop(token) for token, _, _ in answers]
        verdicts = _judged(judge, group, [ids for _, _, ids in answers])
        for (token, worker, _), wanted in zip(answers, verdicts, strict=True):
            self._pool.send(worker, ("keep", token, wanted))
            load[worker] -= 1
        answers.clear()

    def finish(self) -> list[WrittenPack]:
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


class ChunkerService:
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
