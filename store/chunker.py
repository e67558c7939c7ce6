"""What a capture worker does to pages: copy once, find zeros, hash, and later pack those the parent wants.

The capture-once rule: a guest or another process may write to a page at any time, so every batch is copied out
of its file into a private buffer exactly once, and zero test, hash, comparison and compression see only that
copy. One `Chunker` belongs to one thread of one process (a worker, or the parent for small work); it never opens the
index. What else may run at the same time: in a worker (`background`) a second thread, which reads back and publishes
what is full while the next pack is being filled; elsewhere threads that compress, one for each processor, while the
next batches are read and hashed. Frames go into packs in the order in which they came.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from base.errors import PerdureError, StorageError
from base.extents import Extents
from base.workers import usable_cores
from store import format as layout
from store.packs import Compressor, PackWriter, SealingKeys, WrittenPack
from store.storage import Storage

_Chunks = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Ids (n, 32) and chunks (n, chunk size)."""
_WORTH_THREADS = 4
"""Frames from which on compressing them in threads is faster."""
_AHEAD = 32
"""Frames that may wait to be compressed, or for those before them: 4 MiB."""


class ChunkKeys(SealingKeys, Protocol):
    """Keys of a worker: sealing, and the keys of chunk ids."""

    def id_key(self, domain: str, level: int = 0) -> bytes:
        """Key of BLAKE3 for ids of one domain and level."""


@dataclass(frozen=True, slots=True)
class PackingSettings:
    """How chunks become packs. `frame_bytes` of content a frame, `pack_bytes` at which a pack is closed."""

    level: int = -1
    frame_bytes: int = 128 << 10
    pack_bytes: int = 64 << 20


class Chunker:
    """Reads batches and packs what of them is new."""

    def __init__(
        self, storage: Storage, keys: ChunkKeys, settings: PackingSettings, *, background: bool = False
    ) -> None:
        self._storage, self._keys, self._settings = storage, keys, settings
        self._id_key = keys.id_key("chunk")
        self._compress = Compressor(settings.level)
        self._batches: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
        self._pack: PackWriter | None = None
        self._carry: _Chunks | None = None
        self._publisher = ThreadPoolExecutor(1) if background else None
        self._threads = ThreadPoolExecutor(usable_cores()) if not background and usable_cores() > 1 else None
        self._waiting: deque[Callable[[], None]] = deque()
        self._closing: list[Future[WrittenPack]] = []
        self._free: list[NDArray[np.uint8]] = []

    def read(self, token: int, descriptor: int, extents: Extents, chunk_size: int) -> NDArray[np.uint8]:
        """Copy a batch and give the ids of its chunks, uint8 (n, 32), zero ids for zero chunks.

        `extents` are chunk-aligned; bytes past the end of the file are zero. The copy stays here under `token`
        until `keep`. Raises StorageError.
        """
        size = int((extents[:, 1] - extents[:, 0]).sum())
        buffer = self._buffer(size)
        read_extents(descriptor, extents, buffer)
        chunks = buffer.reshape(-1, chunk_size)
        ids = chunk_ids(chunks, self._id_key)
        self._batches[token] = (ids, chunks)
        return ids

    def keep(self, token: int, wanted: NDArray[np.bool_]) -> None:
        """Pack the chunks of a batch that `wanted` (n,) marks, and forget the batch. Raises StorageError."""
        ids, chunks = self._batches.pop(token)
        rows = np.flatnonzero(wanted)
        if len(rows):
            self._add(ids, chunks, rows)
        buffer = chunks.reshape(-1)
        if self._waiting:  # frames may still lie in it
            self._waiting.append(partial(self._free.append, buffer))
        else:
            self._free.append(buffer)

    def finish(self) -> list[WrittenPack]:
        """Publish what is open; gives all packs published. Raises StorageError, IntegrityError."""
        if self._carry is not None:
            self._emit(self._carry)
            self._carry = None
        self._settle(0)
        self._close_pack()
        done = [each.result() for each in self._closing]
        self._closing = []
        self._stop()
        return done

    def abandon(self) -> None:
        """Drop everything, published packs too."""
        self._batches.clear()
        self._waiting.clear()
        self._carry = None
        if self._pack is not None:
            self._pack.abandon()
            self._pack = None
        closing, self._closing = self._closing, []
        for each in closing:
            with suppress(PerdureError):
                self._storage.delete(each.result().name)
        self._stop()

    def _stop(self) -> None:
        for threads in (self._publisher, self._threads):
            if threads is not None:
                threads.shutdown(cancel_futures=True)
        self._publisher = self._threads = None

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        for at, each in enumerate(self._free):
            if len(each) == size:
                return self._free.pop(at)
        del self._free[4:]
        return np.empty(size, np.uint8)

    def _add(self, ids: NDArray[np.uint8], chunks: NDArray[np.uint8], rows: NDArray[np.intp]) -> None:
        """Pack the chunks at `rows`, ascending; what does not fill a frame is carried over to the next batch."""
        if self._carry is not None and self._carry[1].shape[1] != chunks.shape[1]:
            self._emit(self._carry)
            self._carry = None
        per_frame = max(1, self._settings.frame_bytes // chunks.shape[1])
        start = 0
        if self._carry is not None:
            start = min(per_frame - len(self._carry[0]), len(rows))
            more = rows[:start]
            self._carry = np.concatenate([self._carry[0], ids[more]]), np.concatenate([self._carry[1], chunks[more]])
            if len(self._carry[0]) == per_frame:
                self._emit(self._carry)
                self._carry = None
        frames: list[_Chunks] = []
        for at in range(start, len(rows), per_frame):
            chosen = rows[at : at + per_frame]
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            if last - first == len(chosen):  # neighbours: nothing is copied
                frames.append((ids[first:last], chunks[first:last]))
            else:
                frames.append((ids[chosen], chunks[chosen]))
        if frames and len(frames[-1][0]) < per_frame:
            rest = frames.pop()
            self._carry = rest[0].copy(), rest[1].copy()  # the batch's buffer is used again
        self._emit(*frames)

    def _emit(self, *frames: _Chunks) -> None:
        """Compress and pack frames, at once or behind those that wait."""
        if self._threads is None or (not self._waiting and len(frames) < _WORTH_THREADS):
            for ids, chunks in frames:
                self._put(ids, chunks.shape[1], *self._compress(chunks.reshape(-1).data))
            return
        for ids, chunks in frames:
            compressed = self._threads.submit(self._compress, chunks.reshape(-1).data)
            self._waiting.append(partial(self._put_compressed, ids, chunks.shape[1], compressed))
        self._settle(_AHEAD)

    def _settle(self, left: int) -> None:
        """Take what waits, in order, until at most so many do."""
        while len(self._waiting) > left:
            self._waiting.popleft()()

    def _put_compressed(
        self, ids: NDArray[np.uint8], chunk_size: int, compressed: Future[tuple[int, bytes | memoryview]]
    ) -> None:
        self._put(ids, chunk_size, *compressed.result())

    def _put(self, ids: NDArray[np.uint8], chunk_size: int, codec: int, payload: bytes | memoryview) -> None:
        if self._pack is None:
            self._pack = PackWriter(self._storage, self._keys, layout.PACK_DATA)
        self._pack.add(codec, chunk_size, ids.tobytes(), payload)
        if self._pack.size >= self._settings.pack_bytes:
            self._close_pack()

    def _close_pack(self) -> None:
        """Publish the pack that is open. An error that its thread met is raised by the next call, or by `finish`."""
        if self._pack is None:
            return
        pack, self._pack = self._pack, None
        for each in self._closing:
            if each.done():
                each.result()
        if self._publisher is not None:
            self._closing.append(self._publisher.submit(pack.close))
        else:
            done: Future[WrittenPack] = Future()
            done.set_result(pack.close())
            self._closing.append(done)


def chunk_ids(chunks: NDArray[np.uint8], key: bytes) -> NDArray[np.uint8]:
    """Ids of chunks (n, size) as uint8 (n, 32); the id of an all-zero chunk is zero.

    Source: BLAKE3 keyed mode, chunk by chunk: the one loop that Python cannot batch. One hasher serves for all: 1.4 us
    for 4 KiB, where a new one for each took 1.8 us.
    """
    count = len(chunks)
    ids = np.zeros((count, layout.ID_BYTES), np.uint8)
    words = chunks.view(np.uint64) if chunks.shape[1] % 8 == 0 else chunks
    live = np.flatnonzero(np.bitwise_or.reduce(words, axis=1))  # 2.3 times as fast as any()
    if len(live):
        hasher = blake3(key=key)
        update, digest, reset = hasher.update, hasher.digest, hasher.reset
        digests = []
        for each in chunks if len(live) == count else map(chunks.__getitem__, live.tolist()):
            update(each)
            digests.append(digest())
            reset()
        ids[live] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, layout.ID_BYTES)
    return ids


def read_extents(descriptor: int, extents: Extents, buffer: NDArray[np.uint8]) -> None:
    """Read the extents one after the other into `buffer`; what lies past the end of the file reads as zeros."""
    at = 0
    view = buffer.data
    for start, end in extents.tolist():
        want = end - start
        try:
            got = os.preadv(descriptor, [view[at : at + want]], start)
            while 0 < got < want and (more := os.preadv(descriptor, [view[at + got : at + want]], start + got)):
                got += more
        except OSError as error:
            raise StorageError.from_os(error, f"file of descriptor {descriptor}", "read") from error
        if got < want:
            buffer[at + got : at + want] = 0
        at += want
