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
from restore.placement import ZERO, Placer, Served, add, by_frame
from restore.plan import NOTHING, WINDOW, MovedError, Window
from restore.working_set import WorkingSet

UNREADABLE = (IntegrityError, StorageError, LockedError)
"""What reading the store fails with: whoever waits for it goes on waiting."""

_PLAN_BATCH, _PLAN_BATCH_EARLY = 4, 32
"""Windows that are planned in one step, while a fault may come in between and before that: together they are cheaper
(0.97 ms for one, 0.36 for each of 4, 0.2 for each of 32)."""
_PLAN_AHEAD = 1 << 20
"""Pages that are planned and not placed, at most: 64 bytes each."""
_BLOCK = 4
"""Pages that are fetched ahead together: all of a frame would be 27 times what was waited for, and take as long."""
_KEPT_BYTES = 64 << 20
"""Opened before there is a QEMU to put it into, at most."""

_Fetched = tuple[Served, NDArray[np.int64], NDArray[np.uint8] | None]
"""Pages of a region and their content; None is zeros."""


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
        self._fetching: Iterator[_Fetched] | None = self._known(working_set)
        self._kept: deque[_Fetched] = deque()
        self._kept_bytes = 0
        self._placer: Placer | None = None
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
            if self._fetching is not None and self._kept_bytes < _KEPT_BYTES:
                found = next(self._fetching, None)
                if found is None:
                    self._fetching = None
                else:
                    self._kept.append(found)
                    self._kept_bytes += 0 if found[2] is None else found[2].nbytes
                return True
            return self._ahead < _PLAN_AHEAD and self._plan_next(_PLAN_BATCH_EARLY)
        except UNREADABLE:
            self.begin()
            return False

    def fetch(self) -> bool:
        """Put one frame of what earlier resumes touched first; False if that is done. Raises ConflictError."""
        if self._kept:
            self._put_known(*self._kept.popleft())
            return True
        if self._fetching is not None:
            found = next(self._fetching, None)
            if found is not None:
                self._put_known(*found)
                return True
            self._fetching = None
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
                        self._put(served, window.numbers[members], served.plan.chunks(window, members))
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
        if number >= len(plan.finished) or plan.finished[number]:
            return NOTHING
        if number not in plan.windows:
            self._plan(served, number, number + 1)
        return plan.windows[number]

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

    def _known(self, working_set: WorkingSet) -> Iterator[_Fetched]:
        """Pages that earlier resumes waited for, frame by frame, with a few neighbours; pages of zeros among them."""
        for served in self._regions:
            for number, pages in working_set.windows(served.name, WINDOW):
                try:
                    window = self.window(served, number)
                    wanted = np.isin(window.numbers // _BLOCK, pages // _BLOCK)
                    for members in by_frame(window, np.flatnonzero(wanted)):
                        if not served.claims[window.numbers[members]].all():
                            # A copy, since a view would keep all of the frame.
                            yield served, window.numbers[members], served.plan.chunks(window, members).copy()
                    zeros = np.setdiff1d(pages[pages < len(served.claims)], window.numbers)
                    if len(zeros):
                        yield served, zeros, None
                except (*UNREADABLE, MovedError):
                    continue

    def _put_known(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8] | None) -> None:
        assert self._placer is not None
        if chunks is not None:
            self._put(served, numbers, chunks)
            add(self._claims, record.PREFETCHED, len(numbers))
            return
        for page in numbers[served.claims[numbers] == 0].tolist():  # no window counts them
            self._placer.one(served, page, ZERO)

    def _put(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> None:
        assert self._placer is not None
        add(self._claims, record.PLACED, self._placer.several(served, numbers, chunks))
