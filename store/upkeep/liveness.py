"""Which stored chunks are in use: one bit for each chunk slot of the repository, whatever its size.

A slot is a place for one chunk in a frame of a pack, of data or of a page-map node. `Slots` numbers the slots of all
packs; `Marks` holds a bit for each, and marks what is below a root: every node and chunk at one place where it is, each
looked at once. Memory: 4 bytes a frame and a bit a slot (36 MiB for 100 million chunks in frames of 16), and a few
batches of ids for each level of a page map, never a set of ids. Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from store import format as layout
from store.pagemap import Root

if TYPE_CHECKING:
    from store.packs import PackEntry
    from store.records import Generation
    from store.repository import Repository

_LOOKED_UP = 1 << 18
"""Ids looked up at once: what makes a look-up cheap in a large index."""
_NODES = 1 << 13
"""Nodes read at once: their children are one look-up."""

Bits = NDArray[np.int64]
Found = Callable[[int, Bits], None]
"""Told about what is marked for the first time: level (0 for chunks) and slots, in the order of the walk."""


@dataclass(frozen=True, slots=True)
class Below:
    """A generation as far as marking goes: whose it is, and the roots of its regions."""

    vm: str
    roots: tuple[Root, ...]

    @classmethod
    def of(cls, generation: Generation) -> Below:
        """Of a generation, without all else that its record says."""
        return cls(generation.vm, tuple(region.root for region in generation.regions.values()))


class Slots:
    """Numbers for the chunk slots of all packs. A pack's begin at a multiple of 8; new packs come behind."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.packs = np.empty(0, np.uint32)
        """Pack numbers (n,), ascending."""
        self.sizes = np.empty(0, np.int64)
        """Slots of each pack (n,)."""
        self._bases = np.empty(0, np.int64)
        self._first_frames = np.empty(0, np.int64)
        self._starts = np.empty(0, np.uint32)
        self.total = 0
        self.extend()

    def extend(self) -> None:
        """Take in packs that came since. Raises IntegrityError, StorageError."""
        catalog = self._repository.catalog
        with self._repository.environment.read() as txn:
            last = int(self.packs[-1]) if len(self.packs) else 0
            new = [number for number in catalog.pack_numbers(txn) if number > last]
            if not new:
                return
            starts, bases, firsts, sizes = [self._starts], [], [], []
            frames = len(self._starts)
            for number in new:
                counts = catalog.entry(txn, number).counts.astype(np.int64)
                ends = np.cumsum(counts)
                size = int(ends[-1]) if len(ends) else 0
                starts.append((ends - counts).astype(np.uint32))
                bases.append(self.total)
                firsts.append(frames)
                sizes.append(size)
                frames += len(counts)
                self.total += -(-size // 8) * 8
        self._starts = np.concatenate(starts)
        self._bases = np.append(self._bases, np.array(bases, np.int64))
        self._first_frames = np.append(self._first_frames, np.array(firsts, np.int64))
        self.sizes = np.append(self.sizes, np.array(sizes, np.int64))
        self.packs = np.append(self.packs, np.array(new, np.uint32))

    def bits(self, locations: NDArray[np.void]) -> Bits:
        """Slots (n,) of locations (n,), none of them of pack 0; takes in packs that are new."""
        if not bool(np.isin(locations["pack"], self.packs).all()):
            self.extend()
        at = np.searchsorted(self.packs, locations["pack"])
        within = self._starts[self._first_frames[at] + locations["frame"]].astype(np.int64)
        return np.asarray(self._bases[at] + within + locations["slot"], np.int64)

    def pack_index(self, bits: Bits) -> NDArray[np.intp]:
        """For each slot the index in `packs` of its pack."""
        return np.searchsorted(self._bases, bits, side="right") - 1

    def within(self, bits: Bits, index: NDArray[np.intp]) -> Bits:
        """Which slot of its pack each is: 0 is the first of the first frame."""
        return bits - self._bases[index]

    def sizes_of(self, number: int) -> int:
        """Slots of a pack."""
        start, end = self.range(number)
        return end - start

    def range(self, number: int) -> tuple[int, int]:
        """First slot of a pack, and the one behind its last."""
        at = int(np.searchsorted(self.packs, number))
        return int(self._bases[at]), int(self._bases[at] + self.sizes[at])


class Marks:
    """A bit for each slot."""

    def __init__(self, repository: Repository, slots: Slots) -> None:
        self._repository, self._slots = repository, slots
        self._bits = np.zeros(slots.total // 8, np.uint8)
        self.lost = 0
        """Chunks and nodes that were wanted and are in no pack."""

    def of(self, number: int) -> NDArray[np.bool_]:
        """Which slots of a pack are marked, bool (slots,)."""
        start, end = self._slots.range(number)
        self._grow()
        packed = self._bits[start // 8 : -(-end // 8)]
        return np.unpackbits(packed, count=end - start, bitorder="little").astype(np.bool_)

    def mark(self, root: Root, found: Found | None = None) -> None:
        """Mark all that is below a root. Raises IntegrityError for a node that cannot be read, StorageError."""
        if root.id != layout.ZERO_ID:
            self._walk(root.height, np.frombuffer(root.id, np.uint8).reshape(1, -1), found)

    def _walk(self, level: int, ids: NDArray[np.uint8], found: Found | None) -> None:
        nodes = self._repository.nodes
        for at in range(0, len(ids), _LOOKED_UP):
            part = ids[at : at + _LOOKED_UP]
            locations = nodes.locate_to_keep(part)
            there = locations["pack"] != 0
            if not there.all():
                self.lost += int(np.count_nonzero(~there))
                part, locations = part[there], locations[there]
            bits = self._slots.bits(locations)
            fresh = self._set(bits)
            if found is not None and len(fresh):
                found(level, bits[fresh])
            for begin in range(0, len(fresh) if level else 0, _NODES):
                some = fresh[begin : begin + _NODES]
                children = nodes.read(part[some], locations[some]).reshape(-1, layout.ID_BYTES)
                self._walk(level - 1, children[children.any(axis=1)], found)

    def _set(self, bits: Bits) -> NDArray[np.intp]:
        """Set bits; gives the indices of those that were not set, each only at its first place, ascending."""
        self._grow()
        unique, first = np.unique(bits, return_index=True)
        byte, mask = unique >> 3, np.left_shift(1, unique & 7).astype(np.uint8)
        new = (self._bits[byte] & mask) == 0
        np.bitwise_or.at(self._bits, byte[new], mask[new])
        return np.sort(first[new])

    def _grow(self) -> None:
        more = self._slots.total // 8 - len(self._bits)
        if more > 0:
            self._bits = np.append(self._bits, np.zeros(more, np.uint8))


def use_of(entry: PackEntry, marked: NDArray[np.bool_]) -> tuple[int, int]:
    """(chunks, bytes) of a pack that are in use, given its marked slots: of a frame their part; 0 if there are none."""
    counts = entry.counts.astype(np.int64)
    sizes = np.diff(entry.offsets.astype(np.int64))
    if len(marked) and bool(marked.all()):
        return len(marked), entry.size
    live = in_frames(entry, marked)
    share = np.divide(live, counts, out=np.zeros(len(counts)), where=counts > 0)
    used = int((sizes * share).sum()) + layout.ID_BYTES * int(live.sum())
    return int(live.sum()), used


def in_frames(entry: PackEntry, marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many slots of each frame are marked, int64 (frames,)."""
    ends = np.cumsum(entry.counts.astype(np.int64))
    sums = np.append(0, np.cumsum(marked, dtype=np.int64))
    return np.asarray(sums[ends] - sums[ends - entry.counts], np.int64)
