"""Packs: written once by one writer, read by frame.

`PackWriter` seals frames into a pending object and publishes it complete, after reading back and opening every
frame that it sealed. `FrameReader` fetches frames of published packs, opens and decompresses them, and proves
that a chunk is the one wanted by comparing ids under the seal. A writer belongs to one thread; a reader may be
shared between threads.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from base.errors import IntegrityError, StorageError
from store import format as layout
from store.index.runs import LOCATION
from store.keyring.keys import Sealer
from store.keyring.layout import SEAL_OVERHEAD
from store.storage import WRITTEN_WRONG, PendingObject, Storage

_WRITE_BUFFER = 1 << 20
_GAP = 64 << 10
"""Frames that nobody asked for are read with their neighbours, if they are no longer than that."""

OpenedFrame = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""A frame's ids (c, 32) and chunks (c, chunk size), both uint8 and read-only."""


class SealingKeys(Protocol):
    """What packs need of the keys; `store.keyring.keys.Keys` and what a worker has both fit."""

    @property
    def current_epoch(self) -> int:
        """Epoch under which new packs are sealed."""

    def sealer(self, kind: int, object_id: bytes, epoch: int, salt: bytes) -> Sealer:
        """The sealer of one pack."""


@dataclass(frozen=True, slots=True)
class WrittenPack:
    """A pack that was published: `size` in bytes, and how many `chunks` it has. Which these are its footer says: who
    writes much would otherwise hold 32 bytes for each."""

    header: layout.PackHeader
    size: int
    chunks: int

    @property
    def name(self) -> str:
        """Its storage name."""
        return layout.pack_name(self.header.pack_id)


@dataclass(frozen=True, slots=True)
class PackInfo:
    """A published pack as a reader of its footer knows it. `size` in bytes; `end`: where the last frame ends, if that
    does not follow from the size since the pack is damaged."""

    header: layout.PackHeader
    footer: layout.PackFooter
    size: int
    end: int | None = None

    @property
    def name(self) -> str:
        """Its storage name."""
        return layout.pack_name(self.header.pack_id)

    def locations(self, number: int) -> NDArray[np.void]:
        """Where its chunks are, LOCATION (c,), in the order of the footer, if this host numbers it so."""
        counts = self.footer.counts.astype(np.int64)
        locations = np.zeros(len(self.footer.ids), LOCATION)
        locations["pack"] = number
        locations["frame"] = np.repeat(np.arange(len(counts)), counts)
        locations["slot"] = np.arange(len(locations)) - np.repeat(np.cumsum(counts) - counts, counts)
        return locations

    @property
    def edges(self) -> NDArray[np.uint32]:
        """Where frames begin, and the last one ends: uint32 (frames + 1,)."""
        return np.append(self.footer.offsets, np.uint32(self.frames_end))

    @property
    def frames_end(self) -> int:
        """Where the last frame ends, and the footer begins."""
        if self.end is not None:
            return self.end
        footer = layout.FOOTER_HEADER.size + 6 * len(self.footer.offsets) + layout.ID_BYTES * len(self.footer.ids)
        return self.size - layout.PACK_TRAILER.size - footer - SEAL_OVERHEAD


def delete_packs(storage: Storage, packs: Iterable[WrittenPack]) -> None:
    """Take away packs that are visible and that no record will name. Where that fails they are garbage, no more."""
    for pack in packs:
        with suppress(StorageError):
            storage.delete(pack.name)


class PackWriter:
    """One pack in the making."""

    def __init__(self, storage: Storage, keys: SealingKeys, kind: int) -> None:
        self.header = layout.PackHeader(kind, keys.current_epoch, secrets.token_bytes(16), secrets.token_bytes(32))
        self.name = layout.pack_name(self.header.pack_id)
        self._sealer = keys.sealer(kind, self.header.pack_id, self.header.epoch, self.header.salt)
        self._object: PendingObject = storage.create(self.name)
        self._buffer: list[bytes] = [layout.encode_pack_header(self.header)]
        self._buffered = layout.PACK_HEADER.size
        self.size = self._buffered
        self._offsets: list[int] = []
        self._counts: list[int] = []
        self._ids: list[bytes] = []

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return len(self._offsets)

    def add(self, codec: int, chunk_size: int, ids: bytes, payload: bytes | memoryview) -> int:
        """Seal one frame; gives its number. `ids` are the chunk ids one after the other."""
        number = len(self._offsets)
        sealed = self._sealer.seal(number, layout.encode_frame(codec, chunk_size, ids, payload))
        self._offsets.append(self.size)
        self._counts.append(len(ids) // layout.ID_BYTES)
        self._ids.append(ids)
        self._append(layout.FRAME_LENGTH.pack(len(sealed)), sealed)
        return number

    def close(self) -> WrittenPack:
        """Write the footer, read everything back, publish. The caller settles the folder. Raises StorageError,
        IntegrityError (what is on the disk is not what was sealed: nothing is published)."""
        try:
            ids = np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, layout.ID_BYTES)
            offsets, counts = np.array(self._offsets, np.uint32), np.array(self._counts, np.uint16)
            footer = layout.PackFooter(offsets, counts, ids)
            sealed = self._sealer.seal(layout.FOOTER_NUMBER, layout.encode_footer(footer))
            end = self.size
            self._append(sealed, layout.encode_pack_trailer(len(sealed), len(self._offsets)))
            self._flush()
            self._read_back(end, len(sealed))
            self._object.publish()
        except BaseException:
            self.abandon()
            raise
        return WrittenPack(self.header, self.size, len(ids))

    def abandon(self) -> None:
        """Drop what was written."""
        self._object.abandon()

    def frame(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A frame of this unpublished pack again: (ids (c, 32), chunks (c, chunk size))."""
        self._flush()
        length = layout.FRAME_LENGTH.unpack(self._object.read_back(self._offsets[number], 4))[0]
        sealed = self._object.read_back(self._offsets[number] + 4, length)
        return open_frame(self._sealer, number, sealed, self.name, self._offsets[number])

    def _append(self, *parts: bytes) -> None:
        self._buffer.extend(parts)
        count = sum(map(len, parts))
        self._buffered += count
        self.size += count
        if self._buffered >= _WRITE_BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            self._object.write(self._buffer)
            self._buffer, self._buffered = [], 0

    def _read_back(self, end: int, footer_bytes: int) -> None:
        """Open every frame from the file. Its plaintext was compared with its content when it was compressed."""
        number, at = 0, layout.PACK_HEADER.size
        while at < end:
            stop = int(np.searchsorted(self._offsets, at + _WRITE_BUFFER)) if at + _WRITE_BUFFER < end else self.frames
            stop = max(stop, number + 1)
            upto = self._offsets[stop] if stop < self.frames else end
            piece = memoryview(self._object.read_back(at, upto - at))
            for each in range(number, stop):
                begin = self._offsets[each] - at
                length = layout.FRAME_LENGTH.unpack_from(piece, begin)[0]
                self._sealer.open(each, piece[begin + 4 : begin + 4 + length])
            number, at = stop, upto
        self._sealer.open(layout.FOOTER_NUMBER, self._object.read_back(end, footer_bytes))
        trailer = layout.encode_pack_trailer(footer_bytes, self.frames)
        for at, clear in ((0, layout.encode_pack_header(self.header)), (self.size - len(trailer), trailer)):
            if self._object.read_back(at, len(clear)) != clear:
                raise IntegrityError(self.name, WRITTEN_WRONG, offset=at)


class Compressor:
    """zstd at one level, raw where that does not help. May be shared between threads: each has its own of zstd's."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._of_thread = threading.local()

    def __call__(self, data: memoryview) -> tuple[int, bytes | memoryview]:
        """(codec, payload). What was compressed is decompressed again and compared before it is trusted."""
        packed = self._compressor().compress(data)
        if len(packed) > len(data) * 15 // 16:
            return layout.CODEC_RAW, data
        if not _equal(_decompressor().decompress(packed, max_output_size=len(data)), data):
            raise IntegrityError(
                "zstd", "what was compressed does not decompress to itself: faulty memory or processor"
            )
        return layout.CODEC_ZSTD, packed

    def _compressor(self) -> zstandard.ZstdCompressor:
        try:
            found: zstandard.ZstdCompressor = self._of_thread.compressor
        except AttributeError:
            found = self._of_thread.compressor = zstandard.ZstdCompressor(level=self._level)
        return found


def _equal(a: bytes, b: memoryview) -> bool:
    """Whether two buffers hold the same bytes; as words, since a memoryview compares twenty times slower."""
    if len(a) != len(b):
        return False
    kind = np.uint64 if len(a) % 8 == 0 else np.uint8
    return not np.not_equal(np.frombuffer(a, kind), np.frombuffer(b, kind)).any()


def open_frame(
    sealer: Sealer, number: int, sealed: bytes | memoryview, name: str, offset: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Open and decompress: (ids (c, 32), chunks (c, chunk size)), both uint8 and read-only."""
    try:
        plain = sealer.open(number, sealed)
    except IntegrityError as error:
        raise IntegrityError(
            name, f"frame {number} does not authenticate: damaged or exchanged", offset=offset
        ) from error
    frame = layout.decode_frame(plain, name, offset)
    size = len(frame.ids) * frame.chunk_size
    payload: bytes | memoryview = frame.payload
    if frame.codec == layout.CODEC_ZSTD:
        try:
            if zstandard.frame_content_size(frame.payload) not in (-1, size):  # else it is what gets allocated
                raise zstandard.ZstdError("it says that it has another length")
            payload = _decompressor().decompress(frame.payload, max_output_size=size)
        except zstandard.ZstdError as error:
            raise IntegrityError(name, f"frame {number} does not decompress: {error}", offset=offset) from error
    if len(payload) != size:
        raise IntegrityError(name, f"frame {number} holds {len(payload)} bytes instead of {size}", offset=offset)
    return frame.ids, np.frombuffer(payload, np.uint8).reshape(len(frame.ids), frame.chunk_size)


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: making one takes as long as decompressing 30 KiB."""
    try:
        return _of_thread.decompressor
    except AttributeError:
        _of_thread.decompressor = zstandard.ZstdDecompressor()
        return _of_thread.decompressor


class _OfThread(threading.local):
    decompressor: zstandard.ZstdDecompressor


_of_thread = _OfThread()


def read_pack(storage: Storage, keys: SealingKeys, pack_id: bytes) -> PackInfo:
    """Header and footer of a published pack. Raises IntegrityError, ObjectMissingError."""
    name = layout.pack_name(pack_id)
    size = storage.size(name)
    header = layout.decode_pack_header(storage.get_range(name, 0, layout.PACK_HEADER.size), name)
    if header.pack_id != pack_id:
        raise IntegrityError(name, "is another pack under this name", offset=16)
    trailer = storage.get_range(name, max(0, size - layout.PACK_TRAILER.size), layout.PACK_TRAILER.size)
    offset, length = layout.decode_pack_trailer(trailer, size, name)
    sealer = keys.sealer(header.kind, pack_id, header.epoch, header.salt)
    try:
        plain = sealer.open(layout.FOOTER_NUMBER, storage.get_range(name, offset, length))
    except IntegrityError as error:
        raise IntegrityError(name, "its footer does not authenticate", offset=offset) from error
    footer = layout.decode_footer(plain, name)
    if layout.PACK_TRAILER.unpack(trailer)[1] != len(footer.offsets) or int(footer.offsets.max(initial=0)) >= offset:
        raise IntegrityError(name, "its trailer and its footer contradict each other", offset=offset)
    return PackInfo(header, footer, size)


@dataclass(frozen=True, slots=True)
class PackEntry:
    """What is needed to read a pack's frames, from the local index.

    `offsets` uint32 (frames + 1,): the last is the footer's; `counts` uint16 (frames,): chunks in each;
    `size` in bytes.
    """

    header: layout.PackHeader
    offsets: NDArray[np.uint32]
    counts: NDArray[np.uint16]
    size: int


class PackTable(Protocol):
    """Finds packs by the numbers that the index uses."""

    def pack(self, number: int) -> PackEntry:
        """Raises ObjectMissingError for a number that is not known (any more)."""


class FrameReader:
    """Frames of published packs, with a cache bounded in bytes."""

    def __init__(self, storage: Storage, keys: SealingKeys, packs: PackTable, cache_bytes: int = 32 << 20) -> None:
        self._storage, self._keys, self._packs = storage, keys, packs
        self._sealers: dict[int, Sealer] = {}
        self._cache: OrderedDict[tuple[int, int], tuple[NDArray[np.uint8], NDArray[np.uint8]]] = OrderedDict()
        self._cached = 0
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    def renew(self, keys: SealingKeys) -> None:
        """Go on with keys that also open packs of newer epochs."""
        self._keys = keys

    def frame(self, pack: int, number: int, *, cache: bool = True) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(ids (c, 32), chunks (c, chunk size)). Raises IntegrityError naming the pack and offset."""
        key = (pack, number)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        found = self._fetch(pack, number)
        if cache:
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = found
                    self._cached += found[0].nbytes + found[1].nbytes
                while self._cached > self._cache_bytes and len(self._cache) > 1:
                    _, old = self._cache.popitem(last=False)
                    self._cached -= old[0].nbytes + old[1].nbytes
        return found

    def chunks(self, pack: int, number: int, slots: NDArray[np.uint16], wanted: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The chunks in `slots` of a frame, proven to be those `wanted` (n, 32): uint8 (n, chunk size)."""
        return self.proven(pack, number, self.frame(pack, number, cache=False), slots, wanted)

    def expect(self, pack: int, first: int = 0, last: int | None = None) -> None:
        """Frames [first, last) of this pack, or all that follow, are going to be read. Raises IntegrityError for a pack
        that is not known."""
        entry = self._packs.pack(pack)
        begin, end = (int(entry.offsets[min(each, len(entry.offsets) - 1)]) for each in (first, last or 1 << 32))
        if end > begin:
            self._storage.expect(layout.pack_name(entry.header.pack_id), begin, end - begin)

    def footer(self, pack: int) -> PackInfo:
        """What this pack holds, from its footer. Raises IntegrityError, also for a pack that is not known, and
        StorageError."""
        return read_pack(self._storage, self._keys, self._packs.pack(pack).header.pack_id)

    def several(self, pack: int, numbers: list[int]) -> Iterator[OpenedFrame | IntegrityError]:
        """Frames of one pack, ascending, or why each cannot be had; neighbours are read from the disk in one piece.

        Nothing is kept in the cache. Raises IntegrityError for a pack that is not known.
        """
        entry = self._packs.pack(pack)
        for first, last in _neighbours(entry.offsets, numbers):
            begin = int(entry.offsets[numbers[first]]) if numbers[first] < len(entry.offsets) else 0
            try:
                end = int(entry.offsets[numbers[last] + 1])
                data = memoryview(self._storage.get_range(layout.pack_name(entry.header.pack_id), begin, end - begin))
            except (IntegrityError, IndexError):
                data = memoryview(b"")
            for number in numbers[first : last + 1]:
                try:
                    yield self._fetch(pack, number, data, begin) if data else self._fetch(pack, number)
                except IntegrityError as error:
                    yield error

    def proven(
        self, pack: int, number: int, frame: OpenedFrame, slots: NDArray[np.uint16], wanted: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """The chunks in `slots` of an opened frame, if the ids there are those `wanted`. Raises IntegrityError."""
        ids, chunks = frame
        if len(slots) and int(slots.max()) < len(ids):
            first, last = int(slots[0]), int(slots[-1]) + 1
            if last - first == len(slots) and bool((np.diff(slots) == 1).all()):  # neighbours: nothing is copied
                ids, chunks = ids[first:last], chunks[first:last]
            else:
                ids, chunks = ids[slots], chunks[slots]
            if ids.tobytes() == wanted.tobytes():
                return chunks
        raise self.misplaced(pack, number, bytes(wanted[0]))

    def misplaced(self, pack: int, number: int, wanted: bytes) -> IntegrityError:
        """The error for a frame that holds other chunks than the index says."""
        entry = self._packs.pack(pack)
        name = layout.pack_name(entry.header.pack_id)
        return IntegrityError(
            name,
            f"frame {number} does not hold the chunk wanted",
            offset=int(entry.offsets[number]),
            chunk=wanted.hex(),
        )

    def _fetch(self, pack: int, number: int, piece: memoryview | None = None, begin: int = 0) -> OpenedFrame:
        """Open a frame; `piece` is what stands in the pack from `begin` on, if it was read already."""
        entry = self._packs.pack(pack)
        header = entry.header
        name = layout.pack_name(header.pack_id)
        if not 0 <= number < len(entry.offsets) - 1:
            raise IntegrityError(name, f"has no frame {number}")
        offset, end = int(entry.offsets[number]), int(entry.offsets[number + 1])
        data = (
            memoryview(self._storage.get_range(name, offset, end - offset))
            if piece is None
            else piece[offset - begin : end - begin]
        )
        sealer = self._sealers.get(pack)
        if sealer is None:
            sealer = self._keys.sealer(header.kind, header.pack_id, header.epoch, header.salt)
            self._sealers[pack] = sealer
        return open_frame(sealer, number, data[4:], name, offset)


def _neighbours(offsets: NDArray[np.uint32], numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Positions (first, last) in `numbers`, ascending, of frames that are worth reading together."""
    at = offsets[np.minimum(numbers, len(offsets) - 1)].astype(np.int64)
    after = offsets[np.minimum(np.array(numbers) + 1, len(offsets) - 1)].astype(np.int64)
    cuts = np.flatnonzero(at[1:] - after[:-1] > _GAP) + 1
    yield from zip([0, *cuts.tolist()], [*(cuts - 1).tolist(), len(numbers) - 1], strict=True)
