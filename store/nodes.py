"""Page-map nodes in the store: found through the index, written raw into packs of their own.

`StoredNodes` reads nodes of committed generations. `NodeWriter` also holds those of the generation being made, so
that a page map can be changed window by window before anything is published. Each belongs to one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import IntegrityError
from store import format as layout
from store.index.chunks import LOCATION, Index
from store.index.held import HeldIndex
from store.packs import FrameReader, PackWriter, SealingKeys, WrittenPack, delete_packs
from store.pagemap import FANOUT
from store.storage import Storage

if TYPE_CHECKING:
    import lmdb

    from store.index.environment import Environment

NODE_BYTES = FANOUT * layout.ID_BYTES
_NODES_PER_FRAME = 64
_UNCHECKED = 1024
"""New nodes that are looked up in the index at once: each look-up costs some 10 us for each part of the index."""
_KEPT = 8192
"""Nodes (8 MiB) that a writer keeps: what is read to compare with is read again to be changed."""

LOOKS = 16
"""Times that what was not found is looked up again; each time, others have moved it meanwhile."""


class Reliance(Protocol):
    """Which packs deduplication may rely on; `store.repository.Repository`."""

    def avoided(self, txn: lmdb.Transaction) -> NDArray[np.uint32]:
        """Numbers of packs in which it must find nothing."""

    def note_missing(self, numbers: set[int]) -> bool:
        """Whether some of these packs are gone; they are avoided from now on."""

    def refresh(self) -> None:
        """Learn what others have done to the repository."""


class StoredNodes:
    """Nodes of committed generations."""

    def __init__(self, environment: Environment, index: Index, frames: FrameReader, packs: Reliance) -> None:
        self._environment, self._index, self._frames, self._packs = environment, index, frames, packs
        self._there: set[int] = set()

    def fetch(self, level: int, ids: NDArray[np.uint8], locations: NDArray[np.void] | None = None) -> NDArray[np.uint8]:
        """Nodes (n, 32, 32) of the given ids (n, 32), at `locations` (n,) where these are known. Raises IntegrityError
        for one that is not there."""
        locations = self.locate(ids) if locations is None else locations
        for _ in range(LOOKS):
            try:
                missing = np.flatnonzero(locations["pack"] == 0)
                if len(missing):
                    chunk = bytes(ids[missing[0]]).hex()
                    raise IntegrityError("page map", f"a node of level {level} is in no pack", chunk=chunk)
                return self.read(ids, locations)
            except IntegrityError as error:
                failure = error
                again = self.located_anew(ids, locations)
                if again is None:
                    raise
                locations = again
        raise failure

    def located_anew(self, ids: NDArray[np.uint8], before: NDArray[np.void]) -> NDArray[np.void] | None:
        """Locations (n,) after others' records were replayed, or in other packs; None if there are none but `before`.

        For whoever misses a pack, which prune may have moved, or finds one damaged.
        """
        self._packs.refresh()
        with self._environment.read() as txn:
            locations = self._index.lookup(txn, ids)
            if not np.array_equal(locations, before):
                return locations
            others = self._index.lookup(txn, ids, distinct(before["pack"]).astype(np.uint32))
        found = others["pack"] != 0
        return np.where(found, others, locations) if found.any() else None

    def locate(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """Locations (n,) of ids, pack 0 where there is none."""
        with self._environment.read() as txn:
            return self._index.lookup(txn, ids)

    def held(self) -> HeldIndex | None:
        """What the index says now, in memory; None where it is too large for that, or empty."""
        with self._environment.read() as txn:
            return HeldIndex.of(self._index, txn)

    def locate_to_keep(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """Locations (n,) of what is in use: the reusable ones where there are such, else any."""
        with self._environment.read() as txn:
            locations = self._index.lookup(txn, ids, self._packs.avoided(txn))
            rest = np.flatnonzero(locations["pack"] == 0)
            if len(rest):
                locations[rest] = self._index.lookup(txn, ids[rest])
        return locations

    def reusable(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """The same, only where a new generation may rely on it: in packs that are there. A commit looks once more."""
        while True:
            with self._environment.read() as txn:
                locations = self._index.lookup(txn, ids, self._packs.avoided(txn))
            hits = set(distinct(locations["pack"]).tolist()) - self._there - {0}
            if not self._packs.note_missing(hits):
                self._there |= hits
                return locations

    def read(self, ids: NDArray[np.uint8], locations: NDArray[np.void]) -> NDArray[np.uint8]:
        """Nodes at known places, each frame opened once."""
        nodes = np.empty((len(ids), NODE_BYTES), np.uint8)
        for pack, frame, members in by_frame(locations):
            found, chunks = self._frames.frame(pack, frame)
            slots = locations["slot"][members]
            if int(slots.max()) >= len(found) or not bool((found[slots] == ids[members]).all()):
                raise self._frames.misplaced(pack, frame, bytes(ids[members[0]]))
            if chunks.shape[1] != NODE_BYTES:
                raise IntegrityError(
                    "page map", f"a node has {chunks.shape[1]} bytes", chunk=bytes(ids[members[0]]).hex()
                )
            nodes[members] = chunks[slots]
        return nodes.reshape(-1, FANOUT, layout.ID_BYTES)


class NodeWriter:
    """Source and sink of nodes for a generation being made."""

    def __init__(self, storage: Storage, keys: SealingKeys, stored: StoredNodes, pack_bytes: int) -> None:
        self._storage, self._keys, self._stored, self._pack_bytes = storage, keys, stored, pack_bytes
        self._open: list[PackWriter] = []
        self._done: list[WrittenPack] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._unchecked: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, bytes] = {}
        self._kept: dict[bytes, bytes] = {}
        self.hit_packs: set[int] = set()

    def fetch(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Nodes of this generation or of committed ones."""
        names = _names(ids)
        found = [self._known(name) for name in names]
        nodes = np.empty((len(ids), NODE_BYTES), np.uint8)
        elsewhere = [at for at, node in enumerate(found) if node is None]
        if elsewhere:
            nodes[elsewhere] = self._stored.fetch(level, ids[elsewhere]).reshape(-1, NODE_BYTES)
            if len(self._kept) + len(elsewhere) > _KEPT:
                self._kept.clear()
            for at in elsewhere[:_KEPT]:
                self._kept[names[at]] = nodes[at].tobytes()
        here = [at for at, node in enumerate(found) if node is not None]
        if here:
            nodes[here] = np.frombuffer(b"".join(filter(None, found)), np.uint8).reshape(-1, NODE_BYTES)
        return nodes.reshape(-1, FANOUT, layout.ID_BYTES)

    def put(self, level: int, ids: NDArray[np.uint8], nodes: NDArray[np.uint8]) -> None:  # noqa: ARG002  # protocol
        """Take new nodes; those that the store holds already are not written again."""
        content = nodes.tobytes()
        for at, name in enumerate(_names(ids)):
            if name not in self._places and name not in self._waiting:
                self._unchecked[name] = content[at * NODE_BYTES : (at + 1) * NODE_BYTES]
        if len(self._unchecked) >= _UNCHECKED:
            self._check()

    def _known(self, name: bytes) -> bytes | None:
        """A node that this writer can give without asking the index."""
        node = self._kept.get(name) or self._unchecked.get(name) or self._waiting.get(name)
        place = None if node else self._places.get(name)
        return self._open[place[0]].frame(place[1])[1][place[2]].tobytes() if place else node

    def _check(self) -> None:
        """Sort the unchecked out: what the store holds is relied upon, what it does not is written."""
        fresh, self._unchecked = self._unchecked, {}
        if not fresh:
            return
        locations = self._stored.reusable(np.frombuffer(b"".join(fresh), np.uint8).reshape(-1, layout.ID_BYTES))
        self.hit_packs.update(distinct(locations["pack"]).tolist())
        self.hit_packs.discard(0)
        for (name, node), pack in zip(fresh.items(), locations["pack"].tolist(), strict=True):
            if not pack:
                self._waiting[name] = node
                if len(self._waiting) == _NODES_PER_FRAME:
                    self._emit()

    def finish(self) -> list[WrittenPack]:
        """Publish the packs of nodes."""
        self._check()
        self._emit()
        while self._open:
            self._done.append(self._open.pop(0).close())
        done, self._done = self._done, []
        return done

    def abandon(self) -> None:
        """Drop everything, packs that are published and that `finish` has not given away included."""
        for pack in self._open:
            pack.abandon()
        done, self._open, self._done = self._done, [], []
        delete_packs(self._storage, done)

    def _emit(self) -> None:
        if not self._waiting:
            return
        if not self._open or self._open[-1].size >= self._pack_bytes:
            self._open.append(PackWriter(self._storage, self._keys, layout.PACK_NODES))
        pack = self._open[-1]
        number = pack.add(layout.CODEC_RAW, NODE_BYTES, b"".join(self._waiting), b"".join(self._waiting.values()))
        for slot, name in enumerate(self._waiting):
            self._places[name] = (len(self._open) - 1, number, slot)
        self._waiting = {}


def _names(ids: NDArray[np.uint8]) -> list[bytes]:
    """Ids (n, 32) as keys of a dictionary."""
    data = ids.tobytes()
    return [data[at : at + layout.ID_BYTES] for at in range(0, len(data), layout.ID_BYTES)]


def by_frame(locations: NDArray[np.void]) -> list[tuple[int, int, NDArray[np.intp]]]:
    """Group locations (dtype LOCATION) by frame, in order of pack and frame: [(pack, frame, member indices)]."""
    assert locations.dtype == LOCATION
    if not len(locations):
        return []
    key = (locations["pack"].astype(np.uint64) << np.uint64(32)) | locations["frame"]
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    parts = np.split(order, starts[1:])
    return [
        (int(ordered[start]) >> 32, int(ordered[start]) & 0xFFFFFFFF, members)
        for start, members in zip(starts.tolist(), parts, strict=True)
    ]
