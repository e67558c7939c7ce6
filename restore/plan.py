"""Where each page of a region comes from: the page map as arrays, window by window, only as far as it is wanted.

A window is 1024 pages (4 MiB): planning it is a walk to the 32 lowest nodes, which have the ids of its pages, and
finding out where these are stored, in batches, since that is cheaper. Of a page that is known to be wanted no more
than its leaf is needed, the 32 pages of one lowest node, and the two beside it: the frame that the page is in says by
its own ids which of them it holds. The nodes above are kept, at most 8 MiB of them, and a window is given up
when nothing of it is left to place, so that memory follows what is planned ahead and never the region. Belongs to one
thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import ConflictError, IntegrityError
from base.units import PAGE
from store import pagemap
from store.index.chunks import LOCATION
from store.index.runs import prefixes
from store.locating import Locator
from store.nodes import LOOKS, StoredNodes
from store.packs import FrameReader
from store.records import Region

WINDOW, LEAF = 1024, pagemap.FANOUT
_KEPT_NODES, _KEPT_FRAMES = 8192, 2
_TOGETHER = 8
"""Pages that are placed in one step where somebody may come to wait: 5 us each."""
_AHEAD = 16
_BEFORE, _AFTER = 1, 2
"""Frames that the kernel reads together, some 0.5 MiB of a pack, where somebody waited for two of them; and around the
first."""


@dataclass(slots=True, eq=False)
class Window:
    """Non-zero pages of a window, ascending: `numbers` int64 (n,), `ids` uint8 (n, 32), `locations` LOCATION (n,), and
    `frames` uint64 (n,), which is equal for pages that are in one frame. Of few leaves the latter two are empty: it is
    not `located`."""

    numbers: NDArray[np.int64]
    ids: NDArray[np.uint8]
    locations: NDArray[np.void] = field(default_factory=lambda: np.empty(0, LOCATION))
    frames: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def located(self) -> bool:
        """Whether it says where its pages are."""
        return len(self.locations) == len(self.ids)

    def find(self, page: int) -> int:
        """Its place in the arrays; -1 if the page is zero."""
        at = int(np.searchsorted(self.numbers, page))
        return at if at < len(self.numbers) and self.numbers[at] == page else -1

    def zeros(self, page: int, around: int) -> tuple[int, int]:
        """Pages [first, last) that are zero, `page` among them, within an aligned block of so many."""
        first = page - page % around
        at = int(np.searchsorted(self.numbers, page))
        before = int(self.numbers[at - 1]) + 1 if at else first
        after = int(self.numbers[at]) if at < len(self.numbers) else first + around
        return max(first, before), min(first + around, after)

    def held_by(self, frame: Frame) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Members whose content is in an opened frame, ascending, and their slots there (m,): those whose ids are
        there."""
        if self.located:
            members = np.flatnonzero(self.frames == np.uint64(frame.pack << 32 | frame.number))
            slots = np.minimum(self.locations["slot"][members].astype(np.intp), len(frame.ids) - 1)
        else:
            members, slots = np.nonzero(prefixes(self.ids)[:, None] == prefixes(frame.ids))
        same = (frame.ids[slots] == self.ids[members]).all(axis=1)
        return (members, slots) if same.all() else (members[same], slots[same])


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """An opened frame: `ids` uint8 (c, 32), `chunks` uint8 (c, PAGE), read-only."""

    pack: int
    number: int
    ids: NDArray[np.uint8]
    chunks: NDArray[np.uint8]

    def take(self, slots: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The chunks in these slots, contiguous (m, PAGE); a view of the frame where they are neighbours there."""
        if len(slots) and bool((np.diff(slots) == 1).all()):
            return self.chunks[slots[0] : slots[-1] + 1]
        return self.chunks[slots]


class RegionPlan:
    """One region's; `windows` are the planned ones by number."""

    def __init__(self, nodes: StoredNodes, locator: Locator, frames: FrameReader, region: Region) -> None:
        """`locator` may be shared by regions. Raises ConflictError for a region that is not kept in pages."""
        if region.root.chunk_size != PAGE or region.root.length % PAGE:
            raise ConflictError(f"region {region.name} is not kept in pages, and cannot be restored lazily")
        self.region = region
        self.windows: dict[int, Window] = {}
        self.finished = np.zeros(self.count, np.bool_)
        """Windows of which nothing is left to place: what of them is not claimed is zero."""
        self._nodes, self._stored, self._frames = _KeptNodes(nodes, locator), nodes, frames
        self._locator = locator
        self._waited: dict[tuple[int, int], int] = {}
        self._opened: OrderedDict[tuple[int, int], Frame] = OrderedDict()

    @property
    def count(self) -> int:
        """Windows of the region, up to the last page that is not zero."""
        pages = min(self.region.root.length // PAGE, pagemap.FANOUT**self.region.root.height)
        return -(-pages // WINDOW) if self.region.root.id != pagemap.ZERO_ID else 0

    def finish(self, number: int) -> None:
        """Nothing is left to place of a window."""
        self.finished[number] = True
        self.windows.pop(number, None)

    def plan(self, first: int, last: int) -> list[Window]:
        """Plan windows [first, last); gives those that were not planned. Raises IntegrityError, StorageError."""
        parts = list(pagemap.leaves(self.region.root, self._nodes, first * WINDOW, last * WINDOW))
        numbers = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in parts)]).astype(np.int64)
        ids = np.concatenate([np.empty((0, pagemap.ID_BYTES), np.uint8), *(each for _, each in parts)])
        locations = self._locator.locate(ids)
        frames = _frames(locations)
        new = []
        edges = np.searchsorted(numbers, np.arange(first, last + 1) * WINDOW).tolist()
        for window, low, high in zip(range(first, last), edges[:-1], edges[1:], strict=True):
            if window not in self.windows and not self.finished[window]:
                part = slice(low, high)
                found = Window(numbers[part], ids[part], locations[part], frames[part])
                self.windows[window] = found
                new.append(found)
        return new

    def around(self, pages: NDArray[np.int64]) -> list[Window]:
        """For each of these pages (n,) its leaf and the two beside it, in which all is that a frame has with it; not
        located. Raises IntegrityError, StorageError."""
        leaves = pages // LEAF
        wanted = distinct(np.concatenate([leaves + 1, leaves, np.maximum(leaves - 1, 0)]))
        nodes = pagemap.leaf_nodes(self.region.root, self._nodes, wanted)
        found = []
        for leaf in leaves.tolist():
            some = slice(*np.searchsorted(wanted, [leaf - 1, leaf + 2]).tolist())
            ids = nodes[some].reshape(-1, pagemap.ID_BYTES)
            live = np.flatnonzero(ids.any(axis=1))
            found.append(Window(live + int(wanted[some.start]) * LEAF, ids[live]))
        return found

    def open(self, window: Window, at: int, place: NDArray[np.void] | None = None) -> tuple[Frame, int]:
        """The frame that holds a member of a window, and the slot where it is; `place` LOCATION (1,), for one
        that is not located.

        What was moved meanwhile is looked up again. Raises IntegrityError, StorageError.
        """
        wanted = window.ids[at : at + 1]
        if place is None:
            place = window.locations[at : at + 1]
        for _ in range(LOOKS):
            try:
                if not place["pack"][0]:
                    raise IntegrityError(
                        "page map", "it needs a chunk that is in no pack", chunk=bytes(wanted[0]).hex()
                    )
                frame = self._frame(int(place["pack"][0]), int(place["frame"][0]))
                self._frames.proven(frame.pack, frame.number, (frame.ids, frame.chunks), place["slot"], wanted)
                return frame, int(place["slot"][0])
            except IntegrityError as error:
                failure = error
                again = self._stored.located_anew(wanted, place)
                if again is None:
                    raise
                place = again
                if window.located:
                    window.locations[at : at + 1], window.frames[at : at + 1] = again, _frames(again)
        raise failure

    def _frame(self, pack: int, number: int) -> Frame:
        """An opened frame; the last two are kept, since of one of which not all is placed yet the next page is often
        waited for. Raises IntegrityError, StorageError."""
        frame = self._opened.pop((pack, number), None) or Frame(
            pack, number, *self._frames.frame(pack, number, cache=False)
        )
        self._opened[pack, number] = frame
        if len(self._opened) > _KEPT_FRAMES:
            self._opened.popitem(last=False)
        return frame

    def places(self, ids: NDArray[np.uint8]) -> NDArray[np.void]:
        """Where ids (n, 32) are: LOCATION (n,), pack 0 for what is nowhere. Raises StorageError, IntegrityError."""
        return self._locator.locate(ids)

    def expect(self, places: NDArray[np.void]) -> None:
        """Have the kernel read the frames at these places (n,): they are going to be opened."""
        for pack, frame in dict.fromkeys(zip(places["pack"].tolist(), places["frame"].tolist(), strict=True)):
            self._expect(pack, frame, frame + 1)

    def read_nodes_ahead(self) -> None:
        """Have the kernel read the packs in which the page map is, as far as its top tells. Raises IntegrityError,
        StorageError."""
        root = self.region.root
        if root.height > 2:
            [top] = self._nodes.fetch(root.height, np.frombuffer(root.id, np.uint8).reshape(1, -1))
            for pack in set(self._stored.locate(top[top.any(axis=1)])["pack"].tolist()) - {0}:
                self._expect(pack)

    def read_ahead(self, frame: Frame) -> None:
        """Have the kernel read what stands around a frame in its pack: neighbours of a page that somebody waited for
        are likely to be next, and a frame that is read from the disk takes twice as long. Of a page that stands alone
        it is little, since whoever waits next waits for that as well."""
        some = frame.pack, frame.number // _AHEAD
        times = self._waited[some] = self._waited.get(some, 0) + 1
        if times == 1:
            self._expect(frame.pack, max(0, frame.number - _BEFORE), frame.number + 1 + _AFTER)
        elif times == 2:
            self._expect(frame.pack, some[1] * _AHEAD, (some[1] + 1) * _AHEAD)

    def _expect(self, pack: int, first: int = 0, last: int | None = None) -> None:
        with suppress(IntegrityError):  # it is gone meanwhile
            self._frames.expect(pack, first, last)

    def occupied(self, batch: int) -> Iterator[tuple[int, int]]:
        """Ranges of windows, at most `batch` in each, that cover all pages that are not zero; what is empty on high
        levels is skipped. Raises IntegrityError, StorageError."""
        yield from _occupied(self.region.root, self._nodes, self.count, batch)

    def chunks(self, window: Window, members: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The content (m, PAGE) of members of a located window that are in one frame. What was moved meanwhile is
        looked up again, and the window then says where it is. Raises IntegrityError, StorageError."""
        for _ in range(LOOKS):
            place = window.locations[members[0]]
            wanted = window.ids[members]
            try:
                if not place["pack"]:
                    raise IntegrityError(
                        "page map", "it needs a chunk that is in no pack", chunk=bytes(wanted[0]).hex()
                    )
                pack, number = int(place["pack"]), int(place["frame"])
                found = self._frames.frame(pack, number, cache=False)
                chunks = self._frames.proven(pack, number, found, window.locations["slot"][members], wanted)
                return np.ascontiguousarray(chunks)
            except IntegrityError as error:
                failure = error
                again = self._stored.located_anew(wanted, window.locations[members])
                if again is None:
                    raise
                window.locations[members] = again
                window.frames[members] = _frames(again)
                if len(distinct(window.frames[members])) > 1:
                    raise MovedError from error
        raise failure


NOTHING = Window(np.empty(0, np.int64), np.empty((0, pagemap.ID_BYTES), np.uint8))
"""A window in which nothing is left to place."""


class MovedError(Exception):
    """Pages that were in one frame are in several now: the window knows which, and has to be asked again."""


class _KeptNodes:
    """Nodes above the lowest level, kept: each window asks for the same ones."""

    def __init__(self, nodes: StoredNodes, locator: Locator) -> None:
        self._nodes, self._locator = nodes, locator
        self._kept: dict[bytes, NDArray[np.uint8]] = {}

    def fetch(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As of store.pagemap.NodeSource."""
        if level == 1:
            return self._read(level, ids)
        names = [bytes(each) for each in ids]
        missing = [at for at, name in enumerate(names) if name not in self._kept]
        if missing:
            if len(self._kept) + len(missing) > _KEPT_NODES:
                self._kept.clear()
                missing = list(range(len(names)))
            for at, node in zip(missing, self._read(level, ids[missing]), strict=True):
                self._kept[names[at]] = node
        return np.stack([self._kept[name] for name in names])

    def _read(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._nodes.fetch(level, ids, self._locator.locate(ids))


def nearest_first(numbers: NDArray[np.int64], page: int) -> Iterator[slice]:
    """Slices of page numbers (n,), ascending: those from a page on, some at a time, then those before it."""
    at = int(np.searchsorted(numbers, page))
    for first in range(at, len(numbers), _TOGETHER):
        yield slice(first, first + _TOGETHER)
    for last in range(at, 0, -_TOGETHER):
        yield slice(max(0, last - _TOGETHER), last)


def _frames(locations: NDArray[np.void]) -> NDArray[np.uint64]:
    """One number for each frame."""
    found: NDArray[np.uint64] = (locations["pack"].astype(np.uint64) << np.uint64(32)) | locations["frame"]
    return found


def _occupied(root: pagemap.Root, nodes: _KeptNodes, count: int, batch: int) -> Iterator[tuple[int, int]]:
    if root.height <= 2:
        if count:
            yield 0, count
        return
    top = np.frombuffer(root.id, np.uint8).reshape(1, -1)
    waiting: tuple[int, int] | None = None
    for window in _below(root.height, np.zeros(1, np.int64), top, nodes):
        if waiting is not None and window == waiting[1] and window - waiting[0] < batch:
            waiting = waiting[0], window + 1
            continue
        if waiting is not None:
            yield waiting
        waiting = window, window + 1
    if waiting is not None:
        yield waiting


def _below(level: int, places: NDArray[np.int64], ids: NDArray[np.uint8], nodes: _KeptNodes) -> Iterator[int]:
    """Places of the nodes of level 2 that are there, each of which is a window, ascending."""
    if level == 2:
        yield from places.tolist()
        return
    for place, node in zip(places.tolist(), nodes.fetch(level, ids), strict=True):
        children = np.flatnonzero(node.any(axis=1))
        yield from _below(level - 1, place * pagemap.FANOUT + children, node[children], nodes)
