"""Page maps: Merkle radix trees of fan-out 32 from chunk number to chunk id.

A node of level L (from 1) is 32 ids: child `i` of the node that stands at `p` stands at `32 * p + i`, one level lower;
those of level 1 are chunks, and the place of a chunk is its number. A subtree without any non-zero chunk has the zero
id, at every level, and no node. A root's height is the least whose 32**height chunks include the last non-zero one; at
height 0 its id is that of chunk 0 itself. So equal content has equal roots, whatever its history and its length are.

Owns no storage: nodes come from a NodeSource and go to a NodeSink, which are often one object, since what was put may
be asked for later in the same operation's successor. Work and memory follow what is touched, never the region: nodes
are worked on in batches of at most 1024 (1 MiB) at every level. Pure functions on the caller's arrays, which they do
not keep; safe between threads as far as source and sink are.

Chunk numbers are uint64 for callers and below 2**60.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from base.arrays import distinct
from base.extents import Extents, from_numbers, normalise

FANOUT = 32
ID_BYTES = 32
NODE_BYTES = FANOUT * ID_BYTES
ZERO_ID = bytes(ID_BYTES)
MAX_CHUNKS = 1 << 60

_BITS = 5
_ID = np.dtype("V32")
_ZERO = np.zeros((), _ID)
_BATCH = 1024
"""Nodes in memory at once, per level. Twice as many are no faster."""
_LOOKUPS = 8192
"""Numbers looked up at once: at worst as many nodes, 8 MiB."""
_LAST_WINDOW = 1 << 15
"""Chunks among which the last one is looked for at a time."""

Ids = NDArray[np.uint8]
Numbers = NDArray[np.uint64]
Nodes = NDArray[np.uint8]
NodeKeys = Callable[[int], bytes]
"""The BLAKE3 key of node ids of a level."""
Fresh = Callable[[Ids], NDArray[np.bool_]]
"""Which of these ids (n, 32) are wanted: bool (n,). Node ids bind their level, so ids alone are enough."""


class NodeSource(Protocol):
    """Where nodes are read."""

    def fetch(self, level: int, ids: Ids) -> Nodes:
        """Nodes (n, 32, 32) of ids (n, 32): none of them zero, perhaps some equal. Raises IntegrityError."""


class NodeSink(Protocol):
    """Where new nodes go. Children come before their parents; equal nodes may come again."""

    def put(self, level: int, ids: Ids, nodes: Nodes) -> None:
        """Take nodes (n, 32, 32) and their ids (n, 32). The arrays are not changed afterwards."""


@dataclass(frozen=True, slots=True)
class Root:
    """What names a page map. `length` in bytes; the last chunk is padded with zeros."""

    length: int
    chunk_size: int
    height: int
    id: bytes

    @property
    def chunks(self) -> int:
        """Chunks that the length needs."""
        return -(-self.length // self.chunk_size)


def update(
    root: Root, length: int, numbers: Numbers, ids: Ids, source: NodeSource, sink: NodeSink, keys: NodeKeys
) -> Root:
    """Set the length and the chunks `numbers` (n,), ascending and unique, to `ids` (n, 32); the zero id clears.

    What lies behind a shorter length is cleared; the tail of a chunk that the new end cuts is the caller's to make
    zero. Raises ValueError for a number that is not below the length, IntegrityError.
    """
    bare = Root(length, root.chunk_size, root.height, root.id)
    if bare.chunks > MAX_CHUNKS:
        raise ValueError(f"a region of {length} bytes in chunks of {root.chunk_size} has too many chunks")
    signed = numbers.astype(np.int64)
    if len(signed) and not (
        int(signed[0]) >= 0 and int(signed[-1]) < bare.chunks and bool((np.diff(signed) > 0).all())
    ):
        raise ValueError(f"chunk numbers must ascend and lie below {bare.chunks}")
    cut = normalise([(bare.chunks, _span(root.height))])
    return _edited(bare, cut, signed, ids, source, sink, keys)


def clear(root: Root, extents: Extents, source: NodeSource, sink: NodeSink, keys: NodeKeys) -> Root:
    """Clear ranges of chunk numbers (m, 2), [start, end), in any order; their width costs nothing.

    Raises IntegrityError.
    """
    none = np.empty(0, np.int64), np.empty((0, ID_BYTES), np.uint8)
    return _edited(root, normalise(extents), *none, source, sink, keys)


def lookup(root: Root, source: NodeSource, numbers: Numbers) -> Ids:
    """Chunk ids (n, 32) at ascending numbers (n,), zero where there is nothing. Raises IntegrityError."""
    found = np.zeros((len(numbers), ID_BYTES), np.uint8)
    for start in range(0, len(numbers), _LOOKUPS):
        part = numbers[start : start + _LOOKUPS].astype(np.int64)
        leaves = distinct(part >> _BITS)
        nodes = leaf_nodes(root, source, leaves)
        found[start : start + len(part)] = nodes[np.searchsorted(leaves, part >> _BITS), part & (FANOUT - 1)]
    return found


def leaf_nodes(root: Root, source: NodeSource, wanted: NDArray[np.int64]) -> Nodes:
    """The lowest nodes, each with the ids of FANOUT chunks that follow each other, by their numbers (n,), ascending and
    each once: uint8 (n, FANOUT, 32), zeros for what is zero or beyond the end. Raises IntegrityError."""
    found = np.zeros((len(wanted), FANOUT, ID_BYTES), np.uint8)
    numbers = wanted[wanted < -(-_span(root.height) // FANOUT)]
    if root.id == ZERO_ID or not len(numbers):
        return found
    places, ids = _top(root)
    for level in range(root.height, 1, -1):
        content = _fetched(source, level, ids)
        below = distinct(numbers >> (_BITS * (level - 2)))
        ids = content[np.searchsorted(places, below >> _BITS), below & (FANOUT - 1)]
        places = below
    if root.height:
        found[: len(numbers)] = _fetched(source, 1, ids)
    else:
        found[0, 0] = ids[0]
    return found


def leaves(root: Root, source: NodeSource, start: int, stop: int) -> Iterator[tuple[Numbers, Ids]]:
    """Non-zero chunks in [start, stop), ascending: (numbers (n,), ids (n, 32)) with n at most 32768.

    Raises IntegrityError.
    """
    stop = min(stop, _span(root.height))
    if root.id != ZERO_ID and start < stop:
        for places, ids in _leaves(root.height, *_top(root), source, start, stop):
            yield places.astype(np.uint64), ids


def last(root: Root, source: NodeSource, outside: Extents) -> int | None:
    """Number of the last non-zero chunk that is in none of the ranges of chunk numbers (m, 2); None if there is none.

    Raises IntegrityError.
    """
    stop = min(root.chunks, _span(root.height))
    while stop > 0:
        start = (stop - 1) // _LAST_WINDOW * _LAST_WINDOW
        for numbers, _ in reversed(list(leaves(root, source, start, stop))):
            at = np.searchsorted(outside[:, 0], numbers, side="right") - 1
            ends = outside[:, 1] if len(outside) else np.zeros(1, np.int64)
            free = numbers[(at < 0) | (numbers >= ends[np.maximum(at, 0)].astype(np.uint64))]
            if len(free):
                return int(free[-1])
        stop = start
    return None


def diff(a: Root, b: Root, source_a: NodeSource, source_b: NodeSource) -> Iterator[Extents]:
    """Ranges of chunk numbers (m, 2) that differ, ascending; a range may touch the first one of the next batch.

    Descends only where ids differ, and where one side is zero only to what the other has. Raises IntegrityError,
    ValueError for roots of different chunk sizes.
    """
    if a.chunk_size != b.chunk_size:
        raise ValueError(f"page maps with chunks of {a.chunk_size} and {b.chunk_size} bytes cannot be compared")
    if a.height > b.height:
        yield from diff(b, a, source_b, source_a)
        return
    zero = np.zeros((FANOUT - 1, ID_BYTES), np.uint8)
    later: list[tuple[int, Ids]] = []  # b's subtrees to the right of all that a has, innermost last
    place, other = _top(b)
    for level in range(b.height, a.height, -1):
        node = _fetched(source_b, level, other)[0]
        other = node[:1]
        later.append((level - 1, node[1:]))
    yield from _diff(a.height, place, _top(a)[1], other, source_a, source_b)
    for level, right in reversed(later):
        yield from _diff(level, np.arange(1, FANOUT), zero, right, source_a, source_b)


def nodes(root: Root, source: NodeSource, fresh: Fresh | None = None, lowest: int = 1) -> Iterator[tuple[int, Ids]]:
    """Ids of all nodes down to level `lowest`, parents first: (level, ids (n, 32)) with n at most 1024.

    `lowest` 0 gives chunk ids as well, 1 spares reading the nodes of level 1. `fresh` is asked once about each id and
    keeps what it has seen out, with all that is below; without it, equal subtrees come as often as they occur.

    Raises IntegrityError.
    """
    if root.id != ZERO_ID and root.height >= lowest:
        yield from _nodes(root.height, _top(root)[1], source, fresh, lowest)


def node_ids(key: bytes, content: Nodes) -> Ids:
    """Ids (n, 32) of nodes (n, 32, 32) of the level that `key` belongs to: the only loop over nodes, 1.7 us each."""
    flat = np.ascontiguousarray(content).reshape(-1).data
    digests = [blake3(flat[at : at + NODE_BYTES], key=key).digest() for at in range(0, len(flat), NODE_BYTES)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ID_BYTES)


class _Edit:
    """One change of a page map: ranges that are cleared, then chunks that are set."""

    def __init__(
        self, cut: Extents, numbers: NDArray[np.int64], ids: Ids, source: NodeSource, sink: NodeSink, keys: NodeKeys
    ) -> None:
        self._starts, self._ends = np.ascontiguousarray(cut[:, 0]), np.ascontiguousarray(cut[:, 1])
        self._numbers, self._ids = numbers, ids
        self._source, self._sink, self._keys = source, sink, keys

    def minimal(self, level: int, height: int, old: Ids) -> tuple[int, Ids]:
        """(height, id (1, 32)) after the change of what stands at place 0 of `level` and now is (height, old).

        The nodes over which the height may rise or fall: one is made only once something to the right of its child 0
        is known to be there, so that no node is put that the new tree does not have.
        """
        if level == 0:
            return 0, self._changed_chunk(old)
        grows = height < level
        if grows:
            node, first = np.zeros((1, FANOUT, ID_BYTES), np.uint8), (height, old)
        else:
            node = _fetched(self._source, level, old)
            first = level - 1, node[0, :1].copy()
        self._change_children(level, np.zeros(1, np.int64), node, right_only=True)
        if not node[0, 1:].any():
            return self.minimal(level - 1, *first)
        if grows:
            node[0, :1] = self._lifted(level - 1, *self.minimal(level - 1, *first))
        else:
            self._change_children(level, np.zeros(1, np.int64), node, left_only=True)
        return level, self._stored(level, node, old if not grows else np.zeros_like(old))

    def _changed_chunk(self, old: Ids) -> Ids:
        if len(self._numbers) and self._numbers[0] == 0:
            return self._ids[:1]
        return np.zeros_like(old) if len(self._starts) and self._starts[0] <= 0 else old

    def _lifted(self, level: int, height: int, top: Ids) -> Ids:
        """The id at `level` of a tree of less height: nodes with nothing but child 0."""
        for above in range(height + 1, level + 1):
            node = np.zeros((1, FANOUT, ID_BYTES), np.uint8)
            node[0, 0] = top[0]
            top = self._stored(above, node, np.zeros_like(top))
        return top

    def _subtrees(self, level: int, places: NDArray[np.int64], old: Ids) -> Ids:
        """New ids of the nodes `old` of a level, each of which the change touches. At most a batch of them."""
        content = _fetched(self._source, level, old)
        self._change_children(level, places, content)
        return self._stored(level, content, old)

    def _change_children(
        self,
        level: int,
        places: NDArray[np.int64],
        content: Nodes,
        *,
        right_only: bool = False,
        left_only: bool = False,
    ) -> None:
        """Put new child ids into nodes. For the leftmost node: without, or of, child 0 alone."""
        span = _span(level - 1)
        children = (places[:, None] << _BITS) + np.arange(FANOUT)
        whole, touched = self._cleared(children * span, span)
        low, high = int(places[0]) * span * FANOUT, (int(places[-1]) + 1) * span * FANOUT
        low, high = (low + span if right_only else low), (low + span if left_only else high)
        if right_only or left_only:
            mask = np.arange(FANOUT) > 0 if right_only else np.arange(FANOUT) == 0
            whole &= mask
            touched &= mask
        content[whole] = 0
        first, last = np.searchsorted(self._numbers, (low, high)).tolist()
        part = self._numbers[first:last]
        if level == 1:
            content[np.searchsorted(places, part >> _BITS), part & (FANOUT - 1)] = self._ids[first:last]
            return
        touched &= _live(content)
        touched[np.searchsorted(places, part >> (_BITS * level)), (part >> (_BITS * (level - 1))) & (FANOUT - 1)] = True
        below, before = children[touched], content[touched]
        for at in range(0, len(below), _BATCH):
            before[at : at + _BATCH] = self._subtrees(level - 1, below[at : at + _BATCH], before[at : at + _BATCH])
        content[touched] = before

    def _cleared(self, low: NDArray[np.int64], span: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of the ranges [low, low + span): which are cleared whole, which in part."""
        if not len(self._starts):
            return np.zeros(low.shape, np.bool_), np.zeros(low.shape, np.bool_)
        at = np.searchsorted(self._ends, low, side="right")  # the first cut that ends behind `low`
        exists = at < len(self._ends)
        at = np.minimum(at, len(self._ends) - 1)
        overlaps = exists & (self._starts[at] < low + span)
        whole = overlaps & (self._starts[at] <= low) & (self._ends[at] >= low + span)
        return whole, overlaps & ~whole

    def _stored(self, level: int, content: Nodes, old: Ids) -> Ids:
        """Ids of nodes; those that are neither zero nor what they were go to the sink."""
        ids = np.zeros((len(content), ID_BYTES), np.uint8)
        live = _live(content).any(axis=1)
        ids[live] = node_ids(self._keys(level), content[live])
        new = live & (_opaque(ids) != _opaque(old))
        if new.any():
            self._sink.put(level, ids[new], content[new])
        return ids


def _edited(
    root: Root,
    cut: Extents,
    numbers: NDArray[np.int64],
    ids: Ids,
    source: NodeSource,
    sink: NodeSink,
    keys: NodeKeys,
) -> Root:
    """Clear `cut`, then set `numbers`, in one pass."""
    live = np.flatnonzero(_live(ids))
    level = max(root.height, _height(int(numbers[live[-1]]) if len(live) else 0))
    edit = _Edit(cut, numbers, ids, source, sink, keys)  # numbers above the top are cleared, and zero already
    height, top = edit.minimal(level, root.height, _top(root)[1])
    if not top.any():
        height = 0
    return Root(root.length, root.chunk_size, height, top.tobytes())


def _height(number: int) -> int:
    """The least height whose tree has a chunk of this number."""
    return -(-number.bit_length() // _BITS)


def _span(level: int) -> int:
    """Chunks below a node of a level."""
    return 1 << (_BITS * level)


def _opaque(ids: Ids) -> NDArray[np.void]:
    """Ids (..., 32) as one item each: comparing those is 16 times as fast as any() over an axis of 32 bytes."""
    return np.ascontiguousarray(ids).view(_ID)[..., 0]


def _live(ids: Ids) -> NDArray[np.bool_]:
    """Which of ids (..., 32) are not zero."""
    live: NDArray[np.bool_] = _opaque(ids) != _ZERO
    return live


def _top(root: Root) -> tuple[NDArray[np.int64], Ids]:
    return np.zeros(1, np.int64), np.frombuffer(root.id, np.uint8).reshape(1, ID_BYTES)


def _fetched(source: NodeSource, level: int, ids: Ids) -> Nodes:
    """Nodes of ids, those of zero ids zero; the caller's to change."""
    live = _live(ids)
    content = np.zeros((len(ids), FANOUT, ID_BYTES), np.uint8)
    if live.any():
        content[live] = source.fetch(level, ids[live])
    return content


def _leaves(
    level: int, places: NDArray[np.int64], ids: Ids, source: NodeSource, start: int, stop: int
) -> Iterator[tuple[NDArray[np.int64], Ids]]:
    if level == 0:
        yield places, ids
        return
    span = _span(level - 1)
    for at in range(0, len(ids), _BATCH):
        content = _fetched(source, level, ids[at : at + _BATCH])
        children = (places[at : at + _BATCH, None] << _BITS) + np.arange(FANOUT)
        wanted = _live(content) & (children * span < stop) & ((children + 1) * span > start)
        if wanted.any():
            yield from _leaves(level - 1, children[wanted], content[wanted], source, start, stop)


def _diff(
    level: int, places: NDArray[np.int64], a: Ids, b: Ids, source_a: NodeSource, source_b: NodeSource
) -> Iterator[Extents]:
    differs = _opaque(a) != _opaque(b)
    places, a, b = places[differs], a[differs], b[differs]
    if level == 0:
        if len(places):
            yield from_numbers(places.astype(np.uint64), 1)
        return
    for at in range(0, len(places), _BATCH):
        children = (places[at : at + _BATCH, None] << _BITS) + np.arange(FANOUT)
        left = _fetched(source_a, level, a[at : at + _BATCH]).reshape(-1, ID_BYTES)
        right = _fetched(source_b, level, b[at : at + _BATCH]).reshape(-1, ID_BYTES)
        yield from _diff(level - 1, children.reshape(-1), left, right, source_a, source_b)


def _nodes(level: int, ids: Ids, source: NodeSource, fresh: Fresh | None, lowest: int) -> Iterator[tuple[int, Ids]]:
    for at in range(0, len(ids), _BATCH):
        part = ids[at : at + _BATCH]
        if fresh is not None:
            part = part[fresh(part)]
        if not len(part):
            continue
        yield level, part
        if level > lowest:
            below = _fetched(source, level, part).reshape(-1, ID_BYTES)
            yield from _nodes(level - 1, below[_live(below)], source, fresh, lowest)
