"""What a page server does while nobody waits: it opens what earlier resumes touched, plans, and fills in the rest.

Steps, each of a millisecond at most or about one frame, between which faults are answered. Those that need no QEMU yet
(`get_ready`) are taken while it starts. Belongs to the server's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError, LockedError, StorageError
from base.units import PAGE
from restore import claims as record
from restore.claims import Claims
from restore.placement import ZEROS, Placer, Served, add, by_frame
from restore.plan import NOTHING, WINDOW, MovedError, Window
from restore.working_set import WorkingSet
from store.locating import Locator

UNREADABLE = (IntegrityError, StorageError, LockedError)
"""What reading the store fails with: whoever waits for it goes on waiting."""

_PLAN_BATCH, _PLAN_BATCH_EARLY = 4, 32
"""Windows that are planned in one step, while a fault may come in between and before that: together they are
cheaper."""
_PLAN_AHEAD = 1 << 20
"""Pages that are planned and not placed, at most: 64 bytes each."""
_KNOWN_BATCH = 32
"""Known pages that are looked up in one step."""
_KEPT_BYTES = 64 << 20
"""Opened before there is a QEMU to put it into, at most."""

_Fetched = tuple[Served, NDArray[np.int64], NDArray[np.uint8]]
"""Pages of a region and their content."""


class Background:
    """Of one server. `unread(served, window, why)` is told what cannot be read, and tries it again."""

    def __init__(
        self,
        regions: Sequence[Served],
        locator: Locator,
        claims: Claims,
        working_set: WorkingSet,
        unread: Callable[[Served, int, str], None],
    ) -> None:
        self._regions, self._claims, self._unread = regions, claims, unread
        self._fetching: Iterator[_Fetched | None] | None = self._known(working_set)
        self._kept: deque[_Fetched] = deque()
        self._zeros: deque[tuple[Served, int, Window]] = deque()
        self._kept_bytes = 0
        self._placer: Placer | None = None
        self._first = deque([*(served.plan.read_nodes_ahead for served in regions), locator.hold])
        self.begin()

    def begin(self) -> None:
        """Plan and fill from the first page on; what is placed is passed over."""
        self._ranges: Iterator[tuple[Served, int, int]] | None = self._occupied()
        self._range: tuple[Served, int, int] | None = None
        self._planned: deque[tuple[Served, int]] = deque()
        self._filling: Iterator[None] | None = None

    def attach(self, placer: Placer) -> None:
        """There is a QEMU to put pages into."""
        self._placer = placer

    # Steps

    def get_ready(self) -> bool:
        """One step that needs no QEMU; False if there is none. What cannot be read now is met again."""
        try:
            if self._first:
                self._first.popleft()()
                return True
            if self._fetching is not None and self._kept_bytes < _KEPT_BYTES:
                try:
                    found = next(self._fetching)
                except StopIteration:
                    self._fetching = None
                    return True
                if found is not None:
                    self._kept.append(found)
                    self._kept_bytes += found[2].nbytes
                return True
            return self._ahead < _PLAN_AHEAD and self._plan_next(_PLAN_BATCH_EARLY)
        except UNREADABLE:
            self.begin()
            return False

    def fetch(self) -> bool:
        """Put one frame of what earlier resumes touched first; False if that is done. Raises ConflictError."""
        if self._zeros:
            self.put_zeros(*self._zeros.popleft())
            return True
        if self._kept:
            self._put_known(*self._kept.popleft())
            return True
        if self._fetching is not None:
            try:
                found = next(self._fetching)
            except StopIteration:
                self._fetching = None
            else:
                if found is not None:
                    self._put_known(*found)
                return True
        self._claims.set(record.FETCHED, 1)
        return False

    def fill(self) -> bool:
        """One step of the rest; False if nothing is left. Raises ConflictError, and UNREADABLE for the page map."""
        if self._filling is not None:
            if next(self._filling, self) is self:
                self._filling = None
            return True
        if self._ahead < _PLAN_AHEAD and self._plan_next(_PLAN_BATCH):
            return True
        if self._planned:
            self._filling = self.fill_window(*self._planned.popleft())
            return True
        return False

    def fill_window(self, served: Served, number: int) -> Iterator[None]:
        """Place what is missing, frame by frame; the window is finished then, or told as one that cannot be read."""
        failure, again = "", True
        while again:
            again = False
            window = self.window(served, number)
            for each in by_frame(window, np.arange(len(window.numbers))):
                members = served.missing(window, each)
                if len(members):
                    try:
                        self.put(served, window.numbers[members], served.plan.chunks(window, members))
                    except MovedError:
                        again = True
                    except UNREADABLE as error:
                        pages = window.numbers[members]
                        where = f"{int(pages[0]) * PAGE:#x}-{(int(pages[-1]) + 1) * PAGE:#x}"
                        failure = failure or f"{where} of region {served.name} cannot be read: {error}"
                    yield
        if failure:
            self._unread(served, number, failure)
        elif number < len(served.plan.finished):
            served.plan.finish(number)

    # Plans

    def window(self, served: Served, number: int) -> Window:
        """A window, planned if it was not. Raises UNREADABLE."""
        if served.is_finished(number):
            return NOTHING
        if number not in served.plan.windows:
            self._plan(served, number, number + 1)
        return served.plan.windows[number]

    def _plan(self, served: Served, first: int, last: int) -> None:
        """Plan windows, and count what there is in those that were not planned."""
        for window in served.plan.plan(first, last):
            add(self._claims, record.PLANNED, len(window.numbers))
            add(self._claims, record.PLACED, int(np.count_nonzero(served.claims[window.numbers])))

    def _plan_next(self, batch: int) -> bool:
        """Plan the next windows; False if all are."""
        if self._range is None and self._ranges is not None:
            self._range = next(self._ranges, None)
        if self._range is None:
            self._ranges = None
            self._claims.set(record.PLAN_COMPLETE, 1)
            return False
        served, low, last = self._range
        high = min(low + batch, last)
        self._plan(served, low, high)
        self._planned += [(served, number) for number in range(low, high)]
        self._range = (served, high, last) if high < last else None
        return True

    def _occupied(self) -> Iterator[tuple[Served, int, int]]:
        for served in self._regions:
            for first, last in served.plan.occupied(_PLAN_BATCH_EARLY):
                yield served, first, last

    @property
    def _ahead(self) -> int:
        return len(self._planned) * WINDOW

    # Pages

    def _known(self, working_set: WorkingSet) -> Iterator[_Fetched | None]:
        """Frames of the pages that earlier resumes waited for, in that order, with all that they hold of the leaves
        around. None is a step that opens none; pages of zeros are noted."""
        for served in self._regions:
            pages = working_set.pages(served.name)
            pages = pages[pages < len(served.claims)]
            there = np.zeros(len(served.claims), np.bool_)  # what is opened
            for some in np.split(pages, range(_KNOWN_BATCH, len(pages), _KNOWN_BATCH)):
                found = self._found(served, some[(served.claims[some] == 0) & ~there[some]])
                yield None
                for window, at, place in found:
                    number = window.numbers[at]
                    if there[number] or served.claims[number]:
                        continue
                    try:
                        frame, _ = served.plan.open(window, at, place)
                    except UNREADABLE:  # which is met again
                        continue
                    members, slots = window.held_by(frame)
                    there[window.numbers[members]] = True
                    yield served, window.numbers[members], frame.take(slots)

    def _found(self, served: Served, pages: NDArray[np.int64]) -> list[tuple[Window, int, NDArray[np.void]]]:
        """What is around known pages, their members there, and where these are."""
        members = []
        try:
            for page, window in zip(pages.tolist(), served.plan.around(pages), strict=True):
                at = window.find(page)
                if at >= 0:
                    members.append((window, at))
                else:
                    self._zeros.append((served, page, window))
            if not members:
                return []
            places = served.plan.places(np.stack([window.ids[at] for window, at in members]))
            served.plan.expect(places)
        except UNREADABLE:  # which is met again
            return []
        return [(window, at, places[each : each + 1]) for each, (window, at) in enumerate(members)]

    def put_zeros(self, served: Served, page: int, window: Window) -> None:
        """A page that is zero in the generation, with its neighbours that are. Raises ConflictError."""
        assert self._placer is not None
        first, last = window.zeros(page, ZEROS)
        self._placer.zeros(served, first, min(last, len(served.claims)))

    def _put_known(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> None:
        self.put(served, numbers, chunks)
        add(self._claims, record.PREFETCHED, len(numbers))

    def put(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> None:
        """Pages and their content (n, PAGE), those that are there left out. Raises ConflictError."""
        assert self._placer is not None
        if len(numbers) and numbers[0] // WINDOW != numbers[-1] // WINDOW:  # what is around a leaf may be of two
            cut = int(np.searchsorted(numbers, numbers[-1] // WINDOW * WINDOW))
            self.put(served, numbers[:cut], chunks[:cut])
            numbers, chunks = numbers[cut:], chunks[cut:]
        self.count(served, numbers, self._placer.several(served, numbers, chunks))

    def count(self, served: Served, numbers: NDArray[np.int64], put: int) -> None:
        """So many pages of one window were put; in one that is planned later they count then."""
        if put and int(numbers[0]) // WINDOW in served.plan.windows:
            add(self._claims, record.PLACED, put)
