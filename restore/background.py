"""What a page server does while nobody waits: it opens what earlier resumes touched, plans, and fills in the rest.

Steps, each of a millisecond at most or about one frame, between which faults are answered. Those that need no QEMU yet
(`get_ready`) are taken while it starts. Belongs to the server's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import IntegrityError, LockedError, StorageError
from base.units import PAGE
from restore import claims as record
from restore.claims import Claims
from restore.placement import ZEROS, Placer, Served, add, by_frame
from restore.plan import NOTHING, WINDOW, MovedError, Window
from restore.working_set import WorkingSet

UNREADABLE = (IntegrityError, StorageError, LockedError)
"""What reading the store fails with: whoever waits for it goes on waiting."""

_PLAN_BATCH, _PLAN_BATCH_EARLY = 4, 32
"""Windows that are planned in one step, while a fault may come in between and before that: together they are
cheaper."""
_PLAN_AHEAD = 1 << 20
"""Pages that are planned and not placed, at most: 64 bytes each."""
_GAP = 8
"""Windows between two that are known: planned with them, since that is cheaper than to begin anew."""
_KNOWN_BATCH = 256
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
        claims: Claims,
        working_set: WorkingSet,
        unread: Callable[[Served, int, str], None],
    ) -> None:
        self._regions, self._claims, self._unread = regions, claims, unread
        self._fetching: Iterator[_Fetched | None] | None = self._known(working_set)
        self._kept: deque[_Fetched] = deque()
        self._zeros: deque[tuple[Served, int]] = deque()
        self._kept_bytes = 0
        self._placer: Placer | None = None
        unknown = [served for served in regions if not len(working_set.pages(served.name))]
        for served in unknown:  # a cold QEMU starts, and reads from the same disk: what nobody is known to want waits
            served.plan.reads_ahead = False
        self._nodes_ahead = deque(unknown)
        self.begin()

    def begin(self) -> None:
        """Plan and fill from the first page on; what is placed is passed over."""
        self._ranges: Iterator[tuple[Served, int, int]] | None = self._occupied()
        self._range: tuple[Served, int, int] | None = None
        self._planned: deque[tuple[Served, int]] = deque()
        self._unlocated: deque[tuple[Served, int]] = deque()
        self._filling: Iterator[None] | None = None

    def attach(self, placer: Placer) -> None:
        """There is a QEMU to put pages into."""
        self._placer = placer
        for served in self._regions:
            served.plan.read_ahead()

    # Steps

    def get_ready(self) -> bool:
        """One step that needs no QEMU; False if there is none. What cannot be read now is met again."""
        try:
            if self._nodes_ahead:
                self._nodes_ahead.popleft().plan.read_nodes_ahead()
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
            if self._ahead < _PLAN_AHEAD and self._plan_next(_PLAN_BATCH_EARLY):
                return True
            return self._locate_some(_PLAN_BATCH_EARLY)
        except UNREADABLE:
            self.begin()
            return False

    def _locate_some(self, batch: int) -> bool:
        """Look up where the next planned windows are; False if that is known of all."""
        if not self._unlocated:
            return False
        served = self._unlocated[0][0]
        numbers: list[int] = []
        while self._unlocated and self._unlocated[0][0] is served and len(numbers) < batch:
            numbers.append(self._unlocated.popleft()[1])
        served.plan.locate(*(served.plan.windows[each] for each in numbers if each in served.plan.windows))
        return True

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
        if self._locate_some(_PLAN_BATCH):
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
            served.plan.locate(window)
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
        plan = served.plan
        if served.is_finished(number):
            return NOTHING
        if number not in plan.windows:
            self._plan(served, number, number + 1)
        return plan.windows[number]

    def _plan(self, served: Served, first: int, last: int) -> list[Window]:
        """Plan windows, and count what there is in those that were not planned, which are given."""
        windows = served.plan.plan(first, last)
        for window in windows:
            add(self._claims, record.PLANNED, len(window.numbers))
            add(self._claims, record.PLACED, int(np.count_nonzero(served.claims[window.numbers])))
        return windows

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
        served.plan.foresee(self._plan(served, low, high))
        planned = [(served, number) for number in range(low, high)]
        self._planned += planned
        self._unlocated += planned
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
        """Frames of the pages that earlier resumes waited for, in that order, with all of the window that they hold, as
        it came along then. None is a step that opens none; pages of zeros are noted."""
        for served in self._regions:
            pages = working_set.pages(served.name)
            pages = pages[pages < len(served.claims)]
            for first, last in _ranges(pages // WINDOW):
                with suppress(*UNREADABLE):  # which is met again
                    served.plan.foresee(self._plan(served, first, last))
                yield None
            for start in range(0, len(pages), _KNOWN_BATCH):
                found = self._found(served, pages[start : start + _KNOWN_BATCH])
                yield None
                yield from self._opened(served, found)

    def _found(self, served: Served, pages: NDArray[np.int64]) -> list[tuple[Window, int, NDArray[np.void]]]:
        """Windows of known pages, their members there, and where these are."""
        members = []
        for page in pages.tolist():
            number = page // WINDOW
            if not served.is_finished(number) and number not in served.plan.windows:
                continue  # it could not be planned: nothing is known of it
            window = self.window(served, number)
            at = window.find(page)
            if at >= 0:
                members.append((window, at))
            elif not served.claims[page]:
                self._zeros.append((served, page))
        if not members:
            return []
        try:
            places = served.plan.places(np.stack([window.ids[at] for window, at in members]))
        except UNREADABLE:
            return []
        return [(window, at, places[each : each + 1]) for each, (window, at) in enumerate(members)]

    def _opened(self, served: Served, found: list[tuple[Window, int, NDArray[np.void]]]) -> Iterator[_Fetched]:
        seen: set[tuple[int, int, int]] = set()
        for window, at, place in found:
            key = int(window.numbers[0]), int(place["pack"][0]), int(place["frame"][0])
            if key in seen or served.claims[window.numbers[at]]:
                continue
            seen.add(key)
            try:
                frame, _ = served.plan.open(window, at, place)
            except UNREADABLE:
                continue
            members, slots = window.held_by(frame)
            yield served, window.numbers[members], frame.take(slots)

    def put_zeros(self, served: Served, page: int) -> None:
        """A page that is zero in the generation, with its neighbours that are. Raises ConflictError."""
        assert self._placer is not None
        first, last = self.window(served, page // WINDOW).zeros(page, ZEROS)
        self._placer.zeros(served, first, min(last, len(served.claims)))

    def _put_known(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> None:
        self.put(served, numbers, chunks)
        add(self._claims, record.PREFETCHED, len(numbers))

    def put(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> None:
        """Pages and their content (n, PAGE), those that are there left out. Raises ConflictError."""
        assert self._placer is not None
        add(self._claims, record.PLACED, self._placer.several(served, numbers, chunks))


def _ranges(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of windows that cover these numbers, at most a batch in each."""
    ranges: list[tuple[int, int]] = []
    for number in distinct(numbers).tolist():
        if ranges and number - ranges[-1][1] <= _GAP and number - ranges[-1][0] < _PLAN_BATCH_EARLY:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return ranges
