"""Copying chunks that are in use out of doomed packs into new ones, in a given order.

Chunks are taken out of authenticated frames, in which they must stand under the ids that the pack's footer has, and are
compressed and sealed anew; nodes stay raw. What cannot be read spoils its pack, which then must stay: nothing else. One
window of content is in memory at a time, and a frame is opened once for each window that wants something of it.
`Repacking` belongs to one thread, and uses others for opening and compressing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError, PerdureError
from base.progress import Progress
from base.workers import usable_cores
from store import format as layout
from store.chunker import PackingSettings
from store.nodes import by_frame
from store.packs import Compressor, FrameReader, PackWriter, SealingKeys, WrittenPack
from store.records import UncertainCommitError
from store.storage import Storage

WINDOW_BYTES = 32 << 20
_NODES_PER_FRAME = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """Chunks to copy, in the order that they are to have.

    `ids` uint8 (n, 32); `locations` LOCATION (n,); `sizes` int64 (n,): bytes of each, as far as they are known before.
    """

    ids: NDArray[np.uint8]
    locations: NDArray[np.void]
    sizes: NDArray[np.int64]


@dataclass(slots=True)
class Repacking:
    """New packs in the making. Nothing of them counts before a record names them."""

    storage: Storage
    keys: SealingKeys
    frames: FrameReader
    settings: PackingSettings
    spoiled: dict[int, IntegrityError] = field(default_factory=dict)
    """Packs of which something could not be read, by number, with the reason."""
    copied_bytes: int = 0
    _writers: dict[int, _Writer] = field(default_factory=dict)

    def copy(self, kind: int, wanted: Wanted, progress: Progress, total: int) -> None:
        """Copy chunks of one kind of pack. Raises StorageError."""
        with ThreadPoolExecutor(usable_cores()) as threads:
            for start, end in _windows(wanted.sizes):
                for ids, chunks in self._read(wanted, slice(start, end), threads):
                    self.add(kind, ids, chunks, threads)
                    self.copied_bytes += chunks.nbytes
                progress("rewriting packs", min(self.copied_bytes, total), total)

    def add(self, kind: int, ids: NDArray[np.uint8], chunks: NDArray[np.uint8], threads: ThreadPoolExecutor) -> None:
        """Take chunks (n, size), which are what their ids (n, 32) say. Raises StorageError."""
        writer = self._writers.get(kind)
        if writer is None:
            writer = self._writers[kind] = _Writer(self.storage, self.keys, kind, self.settings)
        writer.add(ids, chunks, threads)

    def finish(self) -> list[WrittenPack]:
        """Publish all packs. Raises StorageError, IntegrityError."""
        return [pack for writer in self._writers.values() for pack in writer.finish()]

    @contextmanager
    def committed(self) -> Iterator[None]:
        """For the appending of the record that names the packs: they are dropped only if it is certain that there is
        none. Whatever else ends it leaves packs that prune removes if no record names them."""
        try:
            yield
        except UncertainCommitError:
            raise
        except PerdureError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Drop everything, packs that were published included; never raises."""
        for writer in self._writers.values():
            with suppress(PerdureError):
                writer.abandon()
            for pack in writer.done:
                with suppress(PerdureError):
                    self.storage.delete(pack.name)

    def _read(
        self, wanted: Wanted, window: slice, threads: ThreadPoolExecutor
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """(ids (m, 32), chunks (m, size)) of a window in its order, for each size of chunks that there is."""
        ids, locations = wanted.ids[window], wanted.locations[window]
        by_size: dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]] = {}
        making = threading.Lock()

        def place(job: tuple[int, int, NDArray[np.intp]]) -> None:
            pack, frame, at = job
            try:
                chunks = self.frames.chunks(pack, frame, locations["slot"][at], ids[at])
            except IntegrityError as error:
                self.spoiled.setdefault(pack, error)
                return
            with making:
                size = chunks.shape[1]
                if size not in by_size:  # for all of the window: what is not written to takes no memory
                    by_size[size] = np.empty((len(ids), size), np.uint8), np.zeros(len(ids), np.bool_)
                content, there = by_size[size]
            content[at], there[at] = chunks, True

        for _ in threads.map(place, by_frame(locations)):
            pass
        for content, there in by_size.values():
            yield (ids, content) if there.all() else (ids[there], content[there])


class _Writer:
    """Packs of one kind: frames are filled across windows."""

    def __init__(self, storage: Storage, keys: SealingKeys, kind: int, settings: PackingSettings) -> None:
        self._storage, self._keys, self._kind, self._settings = storage, keys, kind, settings
        self._compress = Compressor(settings.level)
        self._pack: PackWriter | None = None
        self._carry: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
        self.done: list[WrittenPack] = []

    def add(self, ids: NDArray[np.uint8], chunks: NDArray[np.uint8], threads: ThreadPoolExecutor) -> None:
        size, per_frame = chunks.shape[1], self._per_frame(chunks.shape[1])
        if size in self._carry:
            before = self._carry.pop(size)
            room = per_frame - len(before[0])
            self._add([(np.concatenate([before[0], ids[:room]]), np.concatenate([before[1], chunks[:room]]))], threads)
            ids, chunks = ids[room:], chunks[room:]
        self._add(
            [(ids[at : at + per_frame], chunks[at : at + per_frame]) for at in range(0, len(ids), per_frame)], threads
        )

    def _add(self, frames: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], threads: ThreadPoolExecutor) -> None:
        """Write frames, but for a last one that is not full, which is kept until more comes."""
        if frames and len(frames[-1][0]) < self._per_frame(frames[-1][1].shape[1]):
            ids, chunks = frames.pop()
            self._carry[chunks.shape[1]] = ids.copy(), chunks.copy()
        packed = threads.map(self._packed, [chunks for _, chunks in frames])
        for (ids, chunks), (codec, payload) in zip(frames, packed, strict=True):
            self._emit(codec, chunks.shape[1], ids, payload)

    def finish(self) -> list[WrittenPack]:
        for size, (ids, chunks) in self._carry.items():
            codec, payload = self._packed(chunks)
            self._emit(codec, size, ids, payload)
        self._carry = {}
        self._close()
        return self.done

    def abandon(self) -> None:
        self._carry = {}
        if self._pack is not None:
            pack, self._pack = self._pack, None
            pack.abandon()

    def _per_frame(self, size: int) -> int:
        if self._kind == layout.PACK_NODES:
            return _NODES_PER_FRAME
        return max(1, self._settings.frame_bytes // size)

    def _packed(self, chunks: NDArray[np.uint8]) -> tuple[int, bytes | memoryview]:
        data = chunks.reshape(-1).data
        if self._kind == layout.PACK_NODES:
            return layout.CODEC_RAW, data
        return self._compress(data)

    def _emit(self, codec: int, size: int, ids: NDArray[np.uint8], payload: bytes | memoryview) -> None:
        if self._pack is None:
            self._pack = PackWriter(self._storage, self._keys, self._kind)
        self._pack.add(codec, size, ids.tobytes(), payload)
        if self._pack.size >= self._settings.pack_bytes:
            self._close()

    def _close(self) -> None:
        if self._pack is not None:
            pack, self._pack = self._pack, None
            self.done.append(pack.close())


def _windows(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut chunks of these sizes into windows."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        reach = (int(ends[start - 1]) if start else 0) + WINDOW_BYTES
        end = max(start + 1, int(np.searchsorted(ends, reach, side="right")))
        yield start, end
        start = end
