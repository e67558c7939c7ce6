"""Where the chunks of a region are, for whoever looks them up in the order of the region, many or few at a time.

An index that is not large is held in memory: there 32768 ids take 2 ms, and one takes 8 us instead of 200. In a large
one a search costs something for each of its parts, so few ids are looked up there. What was stored one after the other
lies so in the packs, as the pages of a region mostly do, and the footer of a pack has its ids in that order: the others
are searched for around the few.

Both are hints and no proof: ids are told apart by their first eight bytes, and compared whole where a frame is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import IntegrityError, StorageError
from base.extents import normalise
from store.index.held import HeldIndex
from store.index.runs import LOCATION, location_words, prefixes
from store.nodes import StoredNodes
from store.packs import FrameReader

_FEW = 64
"""For no more ids than that, footers are not worth the reading."""
_REACH = 128
"""One of so many ids is looked up, and so many that stand before and behind it are compared with the others."""
_KEPT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Order:
    """What a footer tells, in the order of the pack: `prefix` uint64 (c,), `words` LOCATION as numbers (c, 3), and
    `firsts` (frames,), where each frame begins."""

    prefix: NDArray[np.uint64]
    words: NDArray[np.uint32]
    firsts: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return self.prefix.nbytes + self.words.nbytes + self.firsts.nbytes


class Locator:
    """Looks up ids of one repository; keeps what 32 MiB hold of the footers that it read. Belongs to one thread."""

    def __init__(self, stored: StoredNodes, frames: FrameReader) -> None:
        self._stored, self._frames = stored, frames
        self._held: HeldIndex | None = None
        self._orders: OrderedDict[int, _Order | None] = OrderedDict()
        self._kept_bytes = 0

    def hold(self) -> None:
        """Have the index in memory from now on, if it is not too large. Raises StorageError, IndexLostError."""
        self._held = self._stored.held()

    def locate(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """Locations LOCATION (n,) of ids uint8 (n, 32), pack 0 where there is none. Raises StorageError,
        IntegrityError."""
        if self._held is not None:
            found = self._held.locate(ids)
        elif len(ids) > _FEW:
            found = self._near(ids)
        else:
            return self._stored.locate(ids)
        missing = np.flatnonzero(found["pack"] == 0)
        if len(missing):
            found[missing] = self._stored.locate(ids[missing])
        return found

    def _near(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """Those of the ids that stand in the packs near some of them, which are looked up."""
        some = np.arange(0, len(ids), _REACH)
        places = self._stored.locate(ids[some])
        parts = [part for pack in distinct(places["pack"]).tolist() for part in self._around(pack, places)]
        if parts:
            found = HeldIndex(*(np.concatenate(columns) for columns in zip(*parts, strict=True))).locate(ids)
        else:
            found = np.zeros(len(ids), LOCATION)
        found[some] = places
        return found

    def _around(self, pack: int, places: NDArray[np.void]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint32]]]:
        """Prefixes and locations of what a pack has around those of the places that are in it."""
        order = self._order(pack) if pack else None
        if order is not None:
            mine = places[(places["pack"] == pack) & (places["frame"] < len(order.firsts))]
            at = order.firsts[mine["frame"]] + mine["slot"]
            ends = np.stack([np.maximum(at - _REACH, 0), np.minimum(at + _REACH, len(order.prefix))], axis=1)
            for start, end in normalise(ends).tolist():
                yield order.prefix[start:end], order.words[start:end]

    def _order(self, pack: int) -> _Order | None:
        """Of a pack; None where that cannot be read, which whoever reads its frames will be told."""
        if pack in self._orders:
            self._orders.move_to_end(pack)
            return self._orders[pack]
        try:
            info = self._frames.footer(pack)
        except (IntegrityError, StorageError):
            order = None
        else:
            counts = info.footer.counts.astype(np.int64)
            order = _Order(prefixes(info.footer.ids), location_words(info.locations(pack)), np.cumsum(counts) - counts)
            self._kept_bytes += order.nbytes
        self._orders[pack] = order
        while self._kept_bytes > _KEPT_BYTES and len(self._orders) > 1:
            _, old = self._orders.popitem(last=False)
            self._kept_bytes -= 0 if old is None else old.nbytes
        return order
