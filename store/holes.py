"""What is left of a region whose page map or chunks have holes: for whoever would rather have part of it than nothing.

Everything that is given out is as proven as ever; what is lost is told as ranges of bytes. A node that is lost takes
with it all that is below it, of which nobody knows any more whether there was anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from base import extents as ranges
from base.errors import IntegrityError
from base.extents import Extents
from store import format as layout
from store.nodes import StoredNodes, by_frame
from store.pagemap import FANOUT, Root

_BATCH = 1024


class Holes:
    """Collects what of one region is lost."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._rows: list[Extents] = []

    @property
    def extents(self) -> Extents:
        """Ranges of bytes, within the region's length."""
        return ranges.intersect(ranges.union(ranges.EMPTY, *self._rows), ranges.normalise([(0, self._root.length)]))

    def chunks(self, numbers: NDArray[np.uint64]) -> None:
        """These chunks are lost."""
        self._rows.append(ranges.from_numbers(np.sort(numbers), self._root.chunk_size))

    def span(self, first: int, last: int) -> None:
        """Chunks [first, last) are lost."""
        self._rows.append(ranges.normalise([(first * self._root.chunk_size, last * self._root.chunk_size)]))


def surviving(
    root: Root, nodes: StoredNodes, start: int, stop: int, holes: Holes
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Non-zero chunks in [start, stop) that the page map still names, ascending: (numbers (n,), ids (n, 32))."""
    stop = min(stop, FANOUT**root.height)
    if root.id != layout.ZERO_ID and start < stop:
        top = np.frombuffer(root.id, np.uint8).reshape(1, -1)
        yield from _below(root.height, np.zeros(1, np.int64), top, nodes, start, stop, holes)


def _below(
    level: int,
    places: NDArray[np.int64],
    ids: NDArray[np.uint8],
    nodes: StoredNodes,
    start: int,
    stop: int,
    holes: Holes,
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    if level == 0:
        yield places.astype(np.uint64), ids
        return
    span = FANOUT ** (level - 1)
    for at in range(0, len(ids), _BATCH):
        some = places[at : at + _BATCH]
        content, whole = _fetched(level, ids[at : at + _BATCH], nodes)
        for place in some[~whole].tolist():
            holes.span(max(start, place * FANOUT * span), min(stop, (place + 1) * FANOUT * span))
        children = some[:, None] * FANOUT + np.arange(FANOUT)
        wanted = content.any(axis=2) & (children * span < stop) & ((children + 1) * span > start)
        if wanted.any():
            yield from _below(level - 1, children[wanted], content[wanted], nodes, start, stop, holes)


def _fetched(level: int, ids: NDArray[np.uint8], nodes: StoredNodes) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Nodes (n, 32, 32), zero where they are lost, and which are whole."""
    whole = np.ones(len(ids), np.bool_)
    try:
        return nodes.fetch(level, ids), whole
    except IntegrityError:
        content = np.zeros((len(ids), FANOUT, layout.ID_BYTES), np.uint8)
        for _, _, members in by_frame(nodes.locate(ids)):
            try:
                content[members] = nodes.fetch(level, ids[members])
            except IntegrityError:
                whole[members] = False
        return content, whole
