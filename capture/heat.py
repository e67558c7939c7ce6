"""Which dirty pages of a region are written again and again: those are better left for last. Pure.

Each look says which pages were written since the one before. A page's heat is a byte whose highest bit says that the
last look found it, the next one the look before, and so on. What has not been found by eight looks is forgotten, so
memory (9 bytes a page) follows what the guest writes, not the region's size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from base import extents as ranges
from base.arrays import distinct
from base.extents import Extents
from base.units import PAGE

_NOW = 128


class Heat:
    """Of one region's pages, by looks. Belongs to one thread."""

    def __init__(self) -> None:
        self._pages: NDArray[np.uint64] = np.empty(0, np.uint64)  # ascending
        self._heat: NDArray[np.uint8] = np.empty(0, np.uint8)

    def look(self, fresh: Extents) -> None:
        """Note what was written since the last look: file offsets, whole pages."""
        new = ranges.numbers(fresh, PAGE)
        pages = distinct(np.concatenate([self._pages, new]))
        heat = np.zeros(len(pages), np.uint8)
        heat[np.searchsorted(pages, self._pages)] = self._heat >> 1
        heat[np.searchsorted(pages, new)] |= _NOW
        warm = heat > 0
        self._pages, self._heat = pages[warm], heat[warm]

    def coldest(self, pending: Extents, size: int) -> Extents:
        """Of the pending ranges, whole pages, at most `size` bytes: what has rested longest first, and nothing that the
        last look found written."""
        numbers = ranges.numbers(pending, PAGE)
        heat = np.zeros(len(numbers), np.uint8)
        if len(self._pages):
            at = np.minimum(np.searchsorted(self._pages, numbers), len(self._pages) - 1)
            known = self._pages[at] == numbers
            heat[known] = self._heat[at[known]]
        resting = np.flatnonzero(heat < _NOW)
        chosen = resting[np.argsort(heat[resting], kind="stable")[: max(0, size // PAGE)]]
        return ranges.from_numbers(np.sort(numbers[chosen]), PAGE)
