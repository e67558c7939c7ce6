"""What can still be read of a pack that is damaged: every frame by itself, with or without header and footer.

A frame authenticates alone, and carries the ids of its chunks. So whatever opens is as good as it ever was, and
damage costs no more than the frames that it lies in. Header: its fields are known elsewhere (the name of the pack,
the keyring's epochs, this host's index) but for the salt, of which one flipped bit is found by trying. Places of
frames: the footer, else this host's index, else from frame to frame by their lengths. Pure reading; may be shared
between threads. Memory: one frame and the ids of the pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from base.errors import FormatVersionError, IntegrityError
from base.workers import usable_cores
from store import format as layout
from store.chunker import chunk_ids
from store.keyring.keys import DataKeys, Sealer
from store.keyring.layout import MAX_LEVEL, SEAL_OVERHEAD
from store.packs import PackEntry, PackInfo, open_frame, read_pack
from store.storage import ObjectMissingError, Storage

_SALT_AT = 32
_PROBED_FOOTER = 4 << 20
_BAD_IN_A_ROW = 1024
"""So many that do not open, though their lengths make sense, are somebody's invention: nobody is kept busy by them."""
_OFFSET_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a pack. `frame`: the one that is lost by it, None if it is about all of the pack."""

    frame: int | None
    offset: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Examined:
    """A pack as it was found. `info` lists only what can be read: frames that cannot have a count of 0; None if
    nothing can. `read_bytes`: content that was opened and hashed."""

    pack_id: bytes
    info: PackInfo | None
    problems: tuple[Problem, ...]
    read_bytes: int = 0
    missing: bool = False

    @property
    def lost_frames(self) -> frozenset[int]:
        """Frames that are known to be unreadable."""
        return frozenset(each.frame for each in self.problems if each.frame is not None)


def examine(
    storage: Storage,
    keys: DataKeys,
    pack_id: bytes,
    known: PackEntry | None = None,
    threads: ThreadPoolExecutor | None = None,
) -> Examined:
    """Look at a pack; with `threads` open and hash every frame. `known` is what this host's index says of it.

    Raises FormatVersionError (a newer Perdure wrote it), StorageError.
    """
    try:
        pack = read_pack(storage, keys, pack_id)
    except ObjectMissingError as error:
        return Examined(pack_id, None, (Problem(None, None, error.problem),), missing=True)
    except (IntegrityError, FormatVersionError) as error:
        return _Salvage(storage, keys, pack_id, known).run(error)
    if threads is None:
        return Examined(pack_id, pack, ())
    return _deep(storage, keys, pack, threads, range(len(pack.footer.counts)))


def whole_again(storage: Storage, keys: DataKeys, pack_id: bytes, frame: int | None) -> PackInfo:
    """A pack that was damaged, if it is whole now. `frame`: one that was lost, None if none was.

    Header and footer say nothing of frames: where there was a lost one all are opened, that one first, so that nothing
    else is read as long as it is lost. Raises IntegrityError (it is not whole), FormatVersionError, StorageError.
    """
    pack = read_pack(storage, keys, pack_id)
    if frame is not None:
        with ThreadPoolExecutor(usable_cores()) as threads:
            every = range(len(pack.footer.counts))
            for frames in (every[frame : frame + 1], every):
                for problem in _deep(storage, keys, pack, threads, frames).problems:
                    raise IntegrityError(pack.name, problem.text, offset=problem.offset)
    return pack


def chunks_are(keys: DataKeys, kind: int, ids: NDArray[np.uint8], chunks: NDArray[np.uint8]) -> bool:
    """Whether chunks (c, size) hash to ids (c, 32): of data, or of nodes of any level."""
    if kind == layout.PACK_DATA:
        return np.array_equal(chunk_ids(chunks, keys.id_key("chunk")), ids)
    left = np.arange(len(ids))  # a frame has nodes of few levels: most are done after the first
    for level in range(1, MAX_LEVEL + 1):
        good = (chunk_ids(chunks[left], keys.id_key("node", level)) == ids[left]).all(axis=1)
        left = left[~good]
        if not len(left):
            return True
    return False


def _deep(storage: Storage, keys: DataKeys, pack: PackInfo, threads: ThreadPoolExecutor, frames: range) -> Examined:
    """Frames of a pack whose footer is whole: opened, decompressed, hashed, compared with the footer."""
    sealer = keys.sealer(pack.header.kind, pack.header.pack_id, pack.header.epoch, pack.header.salt)
    edges = np.append(pack.footer.offsets, pack.frames_end).tolist()
    starts = np.cumsum(pack.footer.counts, dtype=np.int64) - pack.footer.counts

    def verify(number: int) -> int | Problem:
        offset = edges[number]
        expected = pack.footer.ids[starts[number] : starts[number] + int(pack.footer.counts[number])]
        try:
            data = storage.get_range(pack.name, offset, edges[number + 1] - offset)
            ids, chunks = open_frame(sealer, number, memoryview(data)[4:], pack.name, offset)
        except IntegrityError as error:
            return Problem(number, offset, error.problem)
        if not np.array_equal(ids, expected):
            return Problem(number, offset, f"frame {number} holds other chunks than its footer says")
        if not chunks_are(keys, pack.header.kind, ids, chunks):
            return Problem(number, offset, f"frame {number} holds a chunk that is not what its id says")
        if layout.FRAME_LENGTH.unpack_from(data)[0] != len(data) - 4:
            return Problem(None, offset, f"the length before frame {number} is damaged; what is in it is whole")
        return chunks.nbytes

    results = list(threads.map(verify, frames))
    problems = tuple(each for each in results if isinstance(each, Problem))
    if problems:
        pack = without(pack, {each.frame for each in problems if each.frame is not None})
    return Examined(pack.header.pack_id, pack, problems, sum(each for each in results if isinstance(each, int)))


def without(pack: PackInfo, frames: set[int]) -> PackInfo:
    """A pack without the chunks of these frames; the others keep their numbers."""
    lost = np.isin(np.arange(len(pack.footer.counts)), list(frames))
    keep = ~np.repeat(lost, pack.footer.counts)
    counts = np.where(lost, 0, pack.footer.counts).astype(np.uint16)
    footer = layout.PackFooter(pack.footer.offsets, counts, pack.footer.ids[keep])
    return replace(pack, footer=footer, end=pack.frames_end)


class _Salvage:
    """One pack whose header, footer or trailer is damaged."""

    def __init__(self, storage: Storage, keys: DataKeys, pack_id: bytes, known: PackEntry | None) -> None:
        self._storage, self._keys, self._pack_id, self._known = storage, keys, pack_id, known
        self._name = layout.pack_name(pack_id)
        self._size = storage.size(self._name)
        self._end: int | None = None

    def run(self, error: IntegrityError | FormatVersionError) -> Examined:
        first = Problem(None, getattr(error, "offset", None), str(getattr(error, "problem", error)))
        header, sealer, proven = self._header()
        if isinstance(error, FormatVersionError):
            if not proven:
                raise error
            first = Problem(None, 8, "damaged header")
        if header is None or sealer is None:
            return Examined(self._pack_id, None, (first,))
        problems = [first]
        offsets: list[int] = []
        counts: list[int] = []
        ids: list[NDArray[np.uint8]] = [np.empty((0, layout.ID_BYTES), np.uint8)]
        end = layout.PACK_HEADER.size
        for number, (offset, end) in enumerate(self._places(sealer)):
            offsets.append(offset)
            found = self._frame(sealer, header.kind, number, offset, end)
            if isinstance(found, Problem):
                problems.append(found)
                counts.append(0)
            else:
                counts.append(len(found))
                ids.append(found)
        if not any(counts):
            return Examined(self._pack_id, None, tuple(problems))
        footer = layout.PackFooter(np.array(offsets, np.uint32), np.array(counts, np.uint16), np.concatenate(ids))
        return Examined(self._pack_id, PackInfo(header, footer, self._size, end), tuple(problems))

    def _frame(self, sealer: Sealer, kind: int, number: int, offset: int, end: int) -> NDArray[np.uint8] | Problem:
        try:
            data = self._storage.get_range(self._name, offset, end - offset)
            ids, chunks = open_frame(sealer, number, memoryview(data)[4:], self._name, offset)
        except IntegrityError as error:
            return Problem(number, offset, error.problem)
        if not chunks_are(self._keys, kind, ids, chunks):
            return Problem(number, offset, f"frame {number} holds a chunk that is not what its id says")
        return ids

    def _header(self) -> tuple[layout.PackHeader | None, Sealer | None, bool]:
        """(header, sealer, whether something in the pack opens with it)."""
        raw = self._storage.get_range(self._name, 0, layout.PACK_HEADER.size)
        probes = list(self._probes())
        fallback: layout.PackHeader | None = None
        for header in self._candidates(raw):
            fallback = fallback or header
            sealer = self._sealer(header)
            if sealer is not None and any(_opens(sealer, number, data) for number, data in probes):
                return header, sealer, True
        return fallback, None if fallback is None else self._sealer(fallback), False

    def _candidates(self, raw: bytes) -> Iterator[layout.PackHeader]:
        try:
            header = layout.decode_pack_header(raw, self._name)
            if header.pack_id == self._pack_id:
                yield header
        except (IntegrityError, FormatVersionError):
            pass
        if self._known is not None:
            yield self._known.header
        if len(raw) < layout.PACK_HEADER.size:
            return
        salt = int.from_bytes(raw[_SALT_AT:], "little")
        for flip in (0, *(1 << bit for bit in range(8 * layout.ID_BYTES))):
            changed = (salt ^ flip).to_bytes(layout.ID_BYTES, "little")
            for epoch in reversed(self._keys.epochs):
                for kind in (layout.PACK_DATA, layout.PACK_NODES):
                    yield layout.PackHeader(kind, epoch, self._pack_id, changed)

    def _sealer(self, header: layout.PackHeader) -> Sealer | None:
        try:
            return self._keys.sealer(header.kind, self._pack_id, header.epoch, header.salt)
        except IntegrityError:  # an epoch that is not there
            return None

    def _probes(self) -> Iterator[tuple[int, bytes]]:
        """Parts of the pack that tell whether a key is right: a frame or two, and the footer."""
        if self._known is not None:
            places = list(zip(self._known.offsets[:-1].tolist(), self._known.offsets[1:].tolist(), strict=True))
        else:
            places = list(self._chain(2))
        for number, (offset, end) in enumerate(places[:2]):
            yield number, self._storage.get_range(self._name, offset + 4, end - offset - 4)
        footer = self._footer()
        if footer is not None and footer[1] <= _PROBED_FOOTER:
            yield layout.FOOTER_NUMBER, self._storage.get_range(self._name, *footer)

    def _footer(self) -> tuple[int, int] | None:
        """(offset, length) of the footer by the trailer."""
        trailer = self._storage.get_range(
            self._name, max(0, self._size - layout.PACK_TRAILER.size), layout.PACK_TRAILER.size
        )
        try:
            return layout.decode_pack_trailer(trailer, self._size, self._name)
        except IntegrityError:
            return None

    def _places(self, sealer: Sealer) -> list[tuple[int, int]]:
        """Where frames begin and end."""
        footer = self._footer()
        if footer is not None:
            try:
                plain = sealer.open(layout.FOOTER_NUMBER, self._storage.get_range(self._name, *footer))
                edges = [*layout.decode_footer(plain, self._name).offsets.tolist(), footer[0]]
                return list(itertools.pairwise(edges))
            except IntegrityError:
                pass
        if self._known is not None:
            edges = self._known.offsets.tolist()
            return list(itertools.pairwise(edges))
        places: list[tuple[int, int]] = []
        good = 0
        for offset, end in self._chain(None):
            places.append((offset, end))
            if _opens(sealer, len(places) - 1, self._storage.get_range(self._name, offset + 4, end - offset - 4)):
                good = len(places)
            elif len(places) - good == _BAD_IN_A_ROW:
                break
        return places[:good]  # what looks like a last frame and does not open is the footer, or part of it

    def _chain(self, most: int | None) -> Iterator[tuple[int, int]]:
        """From frame to frame by their lengths, as far as these make sense."""
        offset, count = layout.PACK_HEADER.size, 0
        while most is None or count < most:
            length = self._storage.get_range(self._name, offset, 4)
            if len(length) < 4:
                return
            end = offset + 4 + layout.FRAME_LENGTH.unpack(length)[0]
            if not SEAL_OVERHEAD < end - offset - 4 <= layout.MAX_FRAME + (1 << 22) or end > self._size:
                return
            if offset > _OFFSET_MAX:
                return
            yield offset, end
            offset, count = end, count + 1


def _opens(sealer: Sealer, number: int, data: bytes) -> bool:
    try:
        sealer.open(number, data)
    except IntegrityError:
        return False
    return True
