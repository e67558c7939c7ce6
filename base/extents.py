"""Sets of byte ranges as numpy arrays. Pure functions, safe anywhere.

An extents array has dtype int64 and shape (n, 2): rows [start, end), in bytes, sorted, not empty, not
touching each other. Functions take arrays in this form and give them in this form; `normalise` makes one
from anything. Work is done by sorting and cumulative sums, never in a loop over rows; but for `pieces`, of which each
row is read then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Extents = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE_PUNCH_HOLE = 1 | 2

EMPTY: Extents = np.empty((0, 2), np.int64)
EMPTY.setflags(write=False)


def normalise(rows: Iterable[tuple[int, int]] | Extents) -> Extents:
    """Sort, drop empty rows, join what overlaps or touches. `rows` are (start, end) pairs in bytes."""
    array = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), np.int64).reshape(-1, 2)
    return _combine([array[array[:, 0] < array[:, 1]]], 1)


def union(*sets: Extents) -> Extents:
    """Bytes in any of the sets."""
    return _combine(list(sets), 1)


def intersect(a: Extents, b: Extents) -> Extents:
    """Bytes in both sets."""
    return _combine([a, b], 2)


def subtract(a: Extents, b: Extents) -> Extents:
    """Bytes of `a` that are not in `b`."""
    if not len(a) or not len(b):
        return a.copy()
    low, high = int(a[0, 0]), int(a[-1, 1])
    edges = np.concatenate([[low], np.clip(b, low, high).ravel(), [high]]).reshape(-1, 2)
    return intersect(a, normalise(edges))


def total(extents: Extents) -> int:
    """Bytes covered."""
    return int((extents[:, 1] - extents[:, 0]).sum())


def widen(extents: Extents, unit: int) -> Extents:
    """Each range grown outwards to whole units."""
    return normalise(np.stack([extents[:, 0] // unit * unit, -(-extents[:, 1] // unit) * unit], axis=1))


def numbers(extents: Extents, unit: int) -> NDArray[np.uint64]:
    """Numbers of all units that the ranges touch, ascending: uint64, shape (k,)."""
    if not len(extents):
        return np.empty(0, np.uint64)
    wide = widen(extents, unit) // unit
    lengths = wide[:, 1] - wide[:, 0]
    starts = np.repeat(wide[:, 0] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return (starts + np.arange(int(lengths.sum()))).astype(np.uint64)


def from_numbers(units: NDArray[np.uint64], unit: int) -> Extents:
    """Ranges that cover the given unit numbers; `units` must be ascending and unique."""
    if not len(units):
        return EMPTY.copy()
    signed = units.astype(np.int64)
    breaks = np.flatnonzero(np.diff(signed) != 1)
    first = np.concatenate([[0], breaks + 1])
    last = np.concatenate([breaks, [len(signed) - 1]])
    return np.stack([signed[first] * unit, (signed[last] + 1) * unit], axis=1)


def pieces(extents: Extents, size: int, rows_max: int = 1 << 62) -> Iterator[Extents]:
    """Cut ranges into sets of at most `size` bytes and so many ranges, in order."""
    rows: list[tuple[int, int]] = []
    room = size
    for start, end in extents.tolist():
        while start < end:
            stop = min(end, start + room)
            rows.append((start, stop))
            room -= stop - start
            start = stop
            if not room or len(rows) == rows_max:
                yield normalise(rows)
                rows, room = [], size
    if rows:
        yield normalise(rows)


def length(descriptor: int) -> int:
    """Bytes that a regular file or a block device holds. Raises OSError."""
    facts = os.fstat(descriptor)
    return os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(facts.st_mode) else facts.st_size


def resident(descriptor: int, size: int, start: int = 0) -> Extents:
    """Ranges of a file within [start, size) that are not holes.

    Raises OSError. Source: lseek(2), SEEK_DATA and SEEK_HOLE. One pair of system calls a range, so memory
    and time follow what is in the file, not its length.
    """
    rows: list[tuple[int, int]] = []
    at = start
    while at < size:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            if error.errno == errno.EINVAL:  # a block device tells no holes
                rows.append((at, size))
                break
            raise
        if data >= size:
            break
        at = min(os.lseek(descriptor, data, os.SEEK_HOLE), size)
        rows.append((data, at))
    return normalise(rows)


def punch(descriptor: int, extents: Extents) -> None:
    """Make these ranges of a file read as zeros and give back what they took; its length stays.

    Raises OSError. Source: fallocate(2), FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE.
    """
    for start, end in extents.tolist():
        if _libc.fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, start, end - start):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _combine(sets: list[Extents], needed: int) -> Extents:
    """Bytes that at least `needed` of the sets cover, by counting openings and closings."""
    edges = np.concatenate(sets) if sets else EMPTY
    if len(edges) < 2:
        return edges[: 2 - needed].copy()  # one is covered once
    at = np.concatenate([edges[:, 0], edges[:, 1]])
    change = np.concatenate([np.ones(len(edges), np.int64), np.full(len(edges), -1, np.int64)])
    order = np.lexsort((-change, at))  # at one address openings come first, so that neighbours join
    depth = np.cumsum(change[order])
    at = at[order]
    before = np.concatenate([[0], depth[:-1]])
    starts = at[(before < needed) & (depth >= needed)]
    ends = at[(before >= needed) & (depth < needed)]
    keep = starts < ends  # neighbours that only touch cross the count for zero bytes
    return np.stack([starts[keep], ends[keep]], axis=1)
