"""Sorted columns of chunk locations: sort, merge, search. Pure functions on arrays, safe anywhere.

A run is a sorted list of (chunk id, location) pairs, held as columns: the first 8 bytes of each id as a number
(`prefix`, so that numpy compares whole machine words), the other 24 bytes (`rest`), the location. The order is
that of the full 32 bytes; entries of one id stand newest pack first. Ids are keyed BLAKE3, so equal prefixes of
different ids hardly ever happen, but nothing here is wrong or slow when they do.

How runs are cut into stored parts is said in store.index.parts, and what is stored where in store.index.chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct

ID_BYTES = 32

LOCATION = np.dtype([("pack", "<u4"), ("frame", "<u4"), ("slot", "<u2"), ("flags", "<u2")])
"""Where a chunk is: 12 bytes. Pack 0 is no pack: not found."""

FANIN = 4
"""So many runs of one size class are merged into one. More makes merging cheaper and look-ups dearer."""

_SMALLEST_CLASS = 1024
_FEW = 4
"""Up to so many entries with one prefix are looked at one after the other, more by binary search."""

Prefixes = NDArray[np.uint64]
Positions = NDArray[np.intp]
Locations = NDArray[np.void]
Packs = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Columns:
    """Entries in the order of a run. Arrays may be views of stored bytes: see who made them.

    `prefix` uint64 (n,); `rest` uint8 (n, 24), C-contiguous; `location` LOCATION (n,).
    """

    prefix: Prefixes
    rest: NDArray[np.uint8]
    location: Locations

    def __len__(self) -> int:
        return len(self.prefix)

    def cut(self, start: int, end: int) -> Columns:
        """The entries [start, end) as views."""
        return Columns(self.prefix[start:end], self.rest[start:end], self.location[start:end])

    def take(self, chosen: Positions | NDArray[np.bool_]) -> Columns:
        """A copy of the chosen entries, in the order given."""
        return Columns(self.prefix[chosen], self.rest[chosen], self.location[chosen])


EMPTY = Columns(np.empty(0, np.uint64), np.empty((0, 24), np.uint8), np.empty(0, LOCATION))


def split_ids(ids: NDArray[np.uint8]) -> tuple[Prefixes, NDArray[np.uint8]]:
    """Prefix and rest columns of ids, uint8 (n, 32) C-contiguous; both are copies."""
    assert ids.dtype == np.uint8 and ids.ndim == 2 and ids.shape[1] == ID_BYTES
    return prefixes(ids), ids[:, 8:].copy()


def prefixes(ids: NDArray[np.uint8]) -> Prefixes:
    """The first eight bytes of ids (n, 32), each as a number."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def join_ids(columns: Columns) -> NDArray[np.uint8]:
    """The ids of entries, uint8 (n, 32), a new array."""
    ids = np.empty((len(columns), ID_BYTES), np.uint8)
    ids[:, :8] = columns.prefix.astype(">u8").view(np.uint8).reshape(-1, 8)
    ids[:, 8:] = columns.rest
    return ids


def sort(ids: NDArray[np.uint8], locations: Locations) -> Columns:
    """Columns of new entries in run order; an entry given twice is kept once."""
    prefix, rest = split_ids(ids)
    columns = Columns(prefix, rest, locations)
    return _without_twins(columns.take(_order(columns, stretches=False)))


def join(pieces: Sequence[Columns]) -> Columns:
    """One after the other, copied."""
    if len(pieces) == 1:
        return pieces[0]
    return Columns(
        np.concatenate([each.prefix for each in pieces]),
        np.concatenate([each.rest for each in pieces]),
        np.concatenate([each.location for each in pieces]),
    )


def merge(sources: Sequence[Columns]) -> Columns:
    """All entries of several sorted sources in run order, in memory: for small runs."""
    together = join(sources)
    return _without_twins(together.take(_order(together)))


def merge_front(
    windows: Sequence[Columns], ends: Sequence[bool], dead: Packs, wanted: int
) -> tuple[Columns, list[int]]:
    """The next entries of a merge of which only the front is in memory.

    `windows` are the next entries of each input, and `ends` says which of them reach the end of their input.
    Gives at most `wanted` entries in run order without those in `dead` packs (ascending), and how many entries
    of each window are done with. Makes progress whenever a window holds anything.

    An entry may go out once nothing smaller can come: all that stands in the merged order up to the last entry
    of the first window, in that order, to run out without being the end of its input.
    """
    lengths = [len(each) for each in windows]
    together = join(windows)
    order = _order(together)
    source = np.repeat(np.arange(len(windows)), lengths)[order]
    safe = len(order)
    for number, (length, ended) in enumerate(zip(lengths, ends, strict=True)):
        if length and not ended:
            safe = min(safe, int(np.flatnonzero(source == number)[-1]) + 1)
    order = order[:safe]
    alive = ~among(together.location["pack"][order], dead)
    if int(np.count_nonzero(alive)) > wanted:
        order = order[: int(np.flatnonzero(alive)[wanted])]
        alive = alive[: len(order)]
    consumed = np.bincount(source[: len(order)], minlength=len(windows))
    return _without_twins(together.take(order[alive])), [int(each) for each in consumed]


def is_sorted(columns: Columns) -> bool:
    """Whether entries are in run order."""
    return bool((_order(columns) == np.arange(len(columns))).all())


def among(packs: Packs, wanted: Packs) -> NDArray[np.bool_]:
    """For each of `packs`, whether it is in `wanted`, which must be ascending."""
    if not len(wanted):
        return np.zeros(len(packs), np.bool_)
    at = np.minimum(np.searchsorted(wanted, packs), len(wanted) - 1)
    return np.asarray(wanted[at] == packs, np.bool_)


@dataclass(frozen=True, slots=True)
class Queries:
    """Ids to look for, sorted by prefix. `words` is each whole id as uint64 (n, 4), for equality only."""

    prefix: Prefixes
    words: NDArray[np.uint64]

    @classmethod
    def of(cls, ids: NDArray[np.uint8]) -> tuple[Queries, Positions]:
        """Queries for ids uint8 (n, 32), and for each query its row in `ids`."""
        assert ids.dtype == np.uint8 and ids.ndim == 2 and ids.shape[1] == ID_BYTES
        words = np.ascontiguousarray(ids).view(np.uint64)
        prefix = words[:, 0].copy() if sys.byteorder == "big" else words[:, 0].byteswap()
        order = np.argsort(prefix)
        return cls(prefix.take(order), words.take(order, axis=0)), order

    def __len__(self) -> int:
        return len(self.prefix)


def matches(
    prefix: Prefixes, rest: NDArray[np.uint8], queries: Queries, chosen: Positions, entry: Positions
) -> Iterator[tuple[Positions, Positions]]:
    """Pairs of query and entry whose whole ids are equal, in rounds that name each query at most once.

    `chosen` are queries whose prefix is in the column, and `entry` for each the first entry that has it.
    """
    stored = words(rest)
    last = len(prefix) - 1
    crowded = prefix.take(np.minimum(entry + _FEW, last)) == prefix.take(entry)
    crowded &= entry + _FEW <= last
    if crowded.any():
        entry = entry.copy()
        for number in distinct(prefix[entry[crowded]]):
            members = np.flatnonzero(crowded & (prefix[entry] == number))
            start, end = np.searchsorted(prefix, number, "left"), np.searchsorted(prefix, number, "right")
            group = np.ascontiguousarray(rest[start:end]).view("S24").ravel()
            sought = np.ascontiguousarray(queries.words[chosen[members], 1:]).view("S24").ravel()
            entry[members] = np.minimum(start + np.searchsorted(group, sought), end - 1)
    while len(entry):
        same = equal(stored.take(entry, axis=0), queries, chosen)
        yield chosen[same], entry[same]
        # Those that were searched for stand at the first entry that can be theirs, so a miss ends it.
        onward = _next_is_equal(prefix, entry) & (same | ~crowded)
        chosen, entry, crowded = chosen[onward], entry[onward] + 1, crowded[onward]


def words(rest: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Rests (n, 24) as machine words (n, 3), for equality only; a view where that is possible."""
    return np.ascontiguousarray(rest).view(np.uint64)


def location_words(locations: Locations) -> NDArray[np.uint32]:
    """The memory of locations (n,) as plain numbers (n, 3), which numpy moves four times as fast."""
    return locations.view("<u4").reshape(-1, 3)


def equal(rest: NDArray[np.uint64], queries: Queries, chosen: Positions) -> NDArray[np.bool_]:
    """Whether rests, as words (n, 3), are those of the chosen queries (n,)."""
    wanted = queries.words.take(chosen, axis=0)
    same = (rest[:, 0] == wanted[:, 1]) & (rest[:, 1] == wanted[:, 2]) & (rest[:, 2] == wanted[:, 3])
    return np.asarray(same, np.bool_)


def size_class(entries: int) -> int:
    """Runs of one class are of similar size: within a factor FANIN of each other."""
    number, limit = 0, _SMALLEST_CLASS
    while entries > limit:
        number, limit = number + 1, limit * FANIN
    return number


def _next_is_equal(prefix: Prefixes, entry: Positions) -> NDArray[np.bool_]:
    """Whether the entry that follows has the same prefix."""
    same = (entry + 1 < len(prefix)) & (prefix.take(entry + 1, mode="clip") == prefix[entry])
    return np.asarray(same, np.bool_)


def _order(columns: Columns, *, stretches: bool = True) -> Positions:
    """The permutation that puts entries into run order.

    For a few sorted `stretches`, numpy's stable sort is linear: for uint64 it is Timsort, which merges them. For
    entries in random order its default sort is five times as fast.
    """
    order = np.argsort(columns.prefix, kind="stable" if stretches else None)
    ordered = columns.prefix[order]
    tied = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(tied):
        # Groups of equal prefixes are contiguous, and sorting by prefix first keeps each in its place.
        places = distinct(np.concatenate([tied, tied + 1]))
        members = order[places]
        words = np.ascontiguousarray(columns.rest[members]).view(">u8").astype(np.uint64)
        newest = ~columns.location["pack"][members]
        order[places] = members[np.lexsort((newest, words[:, 2], words[:, 1], words[:, 0], ordered[places]))]
    return order


def _without_twins(columns: Columns) -> Columns:
    """Without entries that are equal in id and location to their predecessor."""
    tied = np.flatnonzero(columns.prefix[1:] == columns.prefix[:-1])
    if len(tied):
        same = (columns.rest[tied] == columns.rest[tied + 1]).all(axis=1)
        same &= columns.location[tied] == columns.location[tied + 1]
        if same.any():
            keep = np.ones(len(columns), np.bool_)
            keep[tied[same] + 1] = False
            return columns.take(keep)
    return columns
