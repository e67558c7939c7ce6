"""Placing chunks in a file by worker processes: each opens whole frames and writes what is wanted of them.

The caller's process, which alone has the index, says for each frame which chunks are wanted under which ids and where
they go; a worker proves each chunk by its id before it writes it, as `store.reader` does. Threads gain little here:
two of one process wait for each other in the interpreter and at the file. Belongs to one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError, PerdureError, StorageError, WorkerError
from base.workers import WorkerPool, receive_descriptor
from store.keyring.keys import DataKeys
from store.packs import FrameReader, PackEntry
from store.storage import Storage

_DEPTH = 4
"""Jobs under way in one worker."""


@dataclass(frozen=True, slots=True)
class Target:
    """A file: chunks go to their number times the chunk size, `at` that offset; the last is cut at `length` bytes.

    `path` is for messages.
    """

    descriptor: int
    path: str
    length: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """What is wanted of some frames of one pack, which the index has under `pack`: of each of `frames` the next
    `counts` of what follows: `slots` uint16 (n,), `ids` uint8 (n, 32), `numbers` of chunks, uint64 (n,)."""

    pack: int
    entry: PackEntry
    frames: list[int]
    counts: list[int]
    slots: NDArray[np.uint16]
    ids: NDArray[np.uint8]
    numbers: NDArray[np.uint64]

    def parts(self) -> Iterator[slice]:
        """Where each frame's chunks stand."""
        begin = 0
        for count in self.counts:
            yield slice(begin, begin + count)
            begin += count


Outcome = list[IntegrityError | None]
"""For each frame of a job why it cannot be had, or None: what was wanted of it is in the file."""


def write_chunks(target: Target, numbers: NDArray[np.uint64], chunks: NDArray[np.uint8]) -> None:
    """Write chunks (n, size) to their places, neighbours in one call. Raises StorageError."""
    size = chunks.shape[1]
    places = numbers.astype(np.int64)
    breaks = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
    flat = np.ascontiguousarray(chunks).reshape(-1).data
    try:
        for start, end in zip([0, *breaks], [*breaks, len(places)], strict=True):
            offset = int(places[start]) * size
            data = flat[start * size : start * size + min((end - start) * size, target.length - offset)]
            while data:
                count = os.pwrite(target.descriptor, data, target.at + offset)
                data, offset = data[count:], offset + count
    except OSError as error:
        raise StorageError.from_os(error, target.path, "write") from error


class PlacingLanes:
    """The processes of a pool made with `store.workers.serve`, for one file. A context manager."""

    def __init__(self, pool: WorkerPool, storage: Storage, keys: DataKeys, target: Target) -> None:
        self._pool = pool
        self._keys = keys
        self._load = [0] * len(pool)
        pool.ready()
        material = keys.worker_material(keys.epochs)
        for worker in range(len(pool)):
            pool.send(worker, ("placing", "begin", storage, material, target))
            pool.send_descriptor(worker, target.descriptor)

    def renew(self, keys: DataKeys) -> None:
        """Do what comes with these keys: somebody may have changed them meanwhile. Raises WorkerError."""
        if keys is not self._keys:
            self._keys = keys
            material = keys.worker_material(keys.epochs)
            for worker in range(len(self._pool)):
                self._pool.send(worker, ("placing", "keys", material))

    def __enter__(self) -> PlacingLanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises WorkerError if a worker died."""
        if kind is not None and not issubclass(kind, PerdureError):
            self._pool.kill()  # perhaps in the middle of a message: no worker can be spoken to any more
            return
        for worker in range(len(self._pool)):
            try:
                self._pool.send(worker, ("placing", "end"))
                self._drain(worker)
            except WorkerError:
                if kind is None:
                    raise

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Do all jobs; gives (position, outcome) of each as it is done. Raises StorageError, WorkerError."""
        waiting = iter(range(len(jobs)))
        left = len(jobs)
        while left:
            while min(self._load) < _DEPTH and (position := next(waiting, None)) is not None:
                worker = self._load.index(min(self._load))
                self._pool.send(worker, ("placing", "job", position, jobs[position]))
                self._load[worker] += 1
            for worker, (position, outcome) in self._pool.receive():
                self._load[worker] -= 1
                left -= 1
                yield position, outcome

    def _drain(self, worker: int) -> None:
        """Pass over answers that nobody waits for any more."""
        while True:
            try:
                if self._pool.receive_from(worker) == "ended":
                    return
            except WorkerError:
                raise
            except PerdureError:
                continue


class Placer:
    """State of a worker process: one file that is being filled."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._entries: dict[int, PackEntry] = {}
        self._storage: Storage | None = None
        self._reader: FrameReader | None = None
        self._target = Target(-1, "", 0)

    def handle(self, what: str, *arguments: Any) -> None:
        """One message of `PlacingLanes`."""
        if what == "begin":
            self._storage, material, target = arguments
            self._target = Target(receive_descriptor(self._pipe), target.path, target.length, target.at)
            self._reader = FrameReader(self._storage, DataKeys.from_worker_material(material), self)
        elif what == "keys" and self._reader is not None:
            self._reader.renew(DataKeys.from_worker_material(*arguments))
        elif what == "end":
            self.drop()
            self._pipe.send("ended")
        elif what == "job" and self._reader is not None:
            position, job = arguments
            self._entries[job.pack] = job.entry
            self._pipe.send((position, self._place(self._reader, job)))

    def pack(self, number: int) -> PackEntry:
        """The table of packs of this worker's reader: those of its jobs."""
        return self._entries[number]

    def drop(self) -> None:
        """After an error the file is of no use; what still comes for it is passed over."""
        if self._target.descriptor >= 0:
            os.close(self._target.descriptor)
        if self._storage is not None:
            self._storage.close()
        self._target, self._storage, self._reader = Target(-1, "", 0), None, None
        self._entries.clear()

    def _place(self, reader: FrameReader, job: Job) -> Outcome:
        outcome: Outcome = []
        for number, part, found in zip(job.frames, job.parts(), reader.several(job.pack, job.frames), strict=True):
            try:
                if isinstance(found, IntegrityError):
                    raise found
                chunks = reader.proven(job.pack, number, found, job.slots[part], job.ids[part])
            except IntegrityError as error:
                outcome.append(error)
            else:
                write_chunks(self._target, job.numbers[part], chunks)
                outcome.append(None)
        return outcome
