"""The chunk index in memory, for a process that asks for few ids at a time and often, as long as it is not large.

Each look-up in the stored runs costs some 50 us for each of them, however few ids it is for; here it is some 8 us in
all. What it says is a hint and no proof: ids are told apart by their first eight bytes, and MACs are not checked, so
whoever reads a chunk compares its whole id. What was stored or moved since is not known. Belongs to one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from store.index import runs
from store.index.lookup import IndexReader
from store.index.runs import LOCATION, Locations, Prefixes

if TYPE_CHECKING:
    import lmdb

ENTRIES_MAX = 1 << 21
"""8 GiB of pages, each once: 40 MiB here."""


class HeldIndex:
    """Where chunks are, in memory."""

    def __init__(self, prefix: Prefixes, words: NDArray[np.uint32]) -> None:
        """In any order, at least one: `prefix` and `words` as of store.index.runs.prefixes and location_words."""
        order = np.argsort(prefix, kind="stable")  # of few sorted stretches: numpy merges them
        self._prefix, self._words = prefix.take(order), words.take(order, axis=0)

    @classmethod
    def of(cls, index: IndexReader, txn: lmdb.Transaction) -> HeldIndex | None:
        """All that an index has now; None if it is too large, or empty. Raises IndexLostError, lmdb.Error."""
        with index.naming():
            found = index.runs(txn)
            if not 0 < sum(each.entries for each in found) <= ENTRIES_MAX:
                return None
            columns = [index.hints(txn, each, at) for each in found for at in range(len(each.fences))]
            prefix = np.concatenate([each for each, _ in columns])
            words = np.concatenate([runs.location_words(each) for _, each in columns])
            dead = index.dead(txn)
        if len(dead):
            alive = ~runs.among(words[:, 0], dead)
            prefix, words = prefix[alive], words[alive]
        return cls(prefix, words) if len(prefix) else None

    def locate(self, ids: NDArray[np.uint8]) -> Locations:
        """Locations LOCATION (n,) of ids uint8 (n, 32), pack 0 where none is known."""
        wanted = runs.prefixes(ids)
        order = np.argsort(wanted)  # one search begins where the last one has ended then: six times as fast
        wanted = wanted.take(order)
        at = self._prefix.searchsorted(wanted)
        words = self._words.take(at, axis=0, mode="clip")
        words[self._prefix.take(at, mode="clip") != wanted] = 0
        back = np.empty(len(order), np.intp)
        back[order] = np.arange(len(order))
        return words.take(back, axis=0).view(LOCATION).reshape(-1)
