"""Where each page of a region comes from: the page map as arrays, window by window, only as far as it is wanted.

A window is 1024 pages (4 MiB). Planning one is a walk to the 32 lowest nodes, which gives the ids of its pages. Where
they are stored is looked up after that, for a window that somebody waits for at once, for the rest in batches: looking
up is most of planning (0.3 of 0.4 s for 2 GiB). Of a few known pages it is looked up by their ids alone, since the
frame that one is in says by its own ids which other pages of the window it holds. The nodes above are kept, at most
8 MiB of them, and a window is given up when nothing of it is left to place, so that memory follows what is planned
ahead and never the region. Belongs to one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import ConflictError, IntegrityError
from base.units import PAGE
from store import pagemap
from store.index.chunks import LOCATION
from store.nodes import LOOKS, StoredNodes
from store.packs import FrameReader
from store.records import Region

WINDOW = 1024
_KEPT_NODES, _KEPT_FRAMES = 8192, 2
_EXPECTED_PACKS = 16
_TOGETHER = 8
"""Pages that are placed in one step where somebody may come to wait: 5 us each."""
_FORESEEN = 128
"""Of so many pages one says in which pack they are likely to be."""


@dataclass(slots=True, eq=False)
class Window:
    """Non-zero pages of a window, ascending: `numbers` int64 (n,), `ids` uint8 (n, 32); once it is `located` also
    `locations` LOCATION (n,), and `frames` uint64 (n,), which is equal for pages that are in one frame."""

    numbers: NDArray[np.int64]
    ids: NDArray[np.uint8]
    locations: NDArray[np.void] = field(default_factory=lambda: np.empty(0, LOCATION))
    frames: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    located: bool = False

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
            keys, mine = _prefixes(frame.ids), _prefixes(self.ids)
            order = np.argsort(keys)
            slots = order[np.minimum(np.searchsorted(keys, mine, sorter=order), len(keys) - 1)]
            members = np.flatnonzero(keys[slots] == mine)
            slots = slots[members]
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

    def __init__(self, nodes: StoredNodes, frames: FrameReader, region: Region) -> None:
        """Raises ConflictError for a region that is not kept in pages."""
        if region.root.chunk_size != PAGE or region.root.length % PAGE:
            raise ConflictError(f"region {region.name} is not kept in pages, and cannot be restored lazily")
        self.region = region
        self.windows: dict[int, Window] = {}
        self.finished = np.zeros(self.count, np.bool_)
        """Windows of which nothing is left to place: what of them is not claimed is zero."""
        self._nodes, self._stored, self._frames = _KeptNodes(nodes), nodes, frames
        self._expected, self._put_off = {0}, set[int]()
        self.reads_ahead = True
        """Whether packs that come up are read ahead at once; `read_ahead` does it for those that came up before."""
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
        new = []
        edges = np.searchsorted(numbers, np.arange(first, last + 1) * WINDOW).tolist()
        for window, low, high in zip(range(first, last), edges[:-1], edges[1:], strict=True):
            if window not in self.windows and not self.finished[window]:
                found = Window(numbers[low:high], ids[low:high])
                self.windows[window] = found
                new.append(found)
        return new

    def locate(self, *windows: Window) -> None:
        """Look up where all of some windows is. Raises StorageError, IntegrityError."""
        wanted = [window for window in windows if not window.located]
        if wanted:
            locations = self._stored.locate(np.concatenate([window.ids for window in wanted]))
            self._expect(locations)
            for window, mine in zip(
                wanted, np.split(locations, np.cumsum([len(each.ids) for each in wanted[:-1]])), strict=True
            ):
                window.locations, window.frames, window.located = mine.copy(), _frames(mine), True

    def foresee(self, windows: Sequence[Window]) -> None:
        """Have the kernel read packs that some windows are in: those of a few of their pages. Raises as `locate`."""
        some = [window.ids[::_FORESEEN] for window in windows if not window.located]
        if some:
            self._expect(self._stored.locate(np.concatenate(some)))

    def open(self, window: Window, at: int, place: NDArray[np.void] | None = None) -> tuple[Frame, int]:
        """The frame that holds a member of a window, and the slot where it is; `place` LOCATION (1,), if that is known.

        What was moved meanwhile is looked up again. Raises IntegrityError, StorageError.
        """
        wanted = window.ids[at : at + 1]
        if place is None:
            self.locate(window)  # others wait for pages of it soon; a few of its pages would be half as dear
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
        places = self._stored.locate(ids)
        self._expect(places)
        return places

    def read_ahead(self) -> None:
        """From now on, and for what came up before."""
        self.reads_ahead = True
        self._read(self._put_off)

    def read_nodes_ahead(self) -> None:
        """Have the kernel read the packs in which the page map is, as far as its top tells. Raises IntegrityError,
        StorageError."""
        root = self.region.root
        if root.height > 2:
            [top] = self._nodes.fetch(root.height, np.frombuffer(root.id, np.uint8).reshape(1, -1))
            self._read(set(self._stored.locate(top[top.any(axis=1)])["pack"].tolist()))

    def _expect(self, locations: NDArray[np.void]) -> None:
        """Have the kernel read packs that come up first: on a cold disk a frame takes nearly twice as long."""
        packs = set(distinct(locations["pack"]).tolist())
        if self.reads_ahead:
            self._read(packs)
        else:
            self._put_off |= packs

    def _read(self, packs: set[int]) -> None:
        for pack in sorted(packs - self._expected):
            if len(self._expected) <= _EXPECTED_PACKS:
                self._expected.add(pack)
                with suppress(IntegrityError):
                    self._frames.expect(pack)

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


NOTHING = Window(np.empty(0, np.int64), np.empty((0, pagemap.ID_BYTES), np.uint8), located=True)
"""A window in which nothing is left to place."""


class MovedError(Exception):
    """Pages that were in one frame are in several now: the window knows which, and has to be asked again."""


class _KeptNodes:
    """Nodes above the lowest level, kept: each window asks for the same ones."""

    def __init__(self, nodes: StoredNodes) -> None:
        self._nodes = nodes
        self._kept: dict[bytes, NDArray[np.uint8]] = {}

    def fetch(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As of store.pagemap.NodeSource."""
        if level == 1:
            return self._nodes.fetch(level, ids)
        names = [bytes(each) for each in ids]
        missing = [at for at, name in enumerate(names) if name not in self._kept]
        if missing:
            if len(self._kept) + len(missing) > _KEPT_NODES:
                self._kept.clear()
                missing = list(range(len(names)))
            for at, node in zip(missing, self._nodes.fetch(level, ids[missing]), strict=True):
                self._kept[names[at]] = node
        return np.stack([self._kept[name] for name in names])


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


def _prefixes(ids: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first eight bytes of ids (n, 32)."""
    return np.ascontiguousarray(ids[:, :8]).view(np.uint64).reshape(-1)


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
