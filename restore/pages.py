"""The page server's work: answering first touches of memory that is not there yet, and filling in the rest.

One thread does everything, so that two placements never meet. A fault is answered by its frame: the page that is waited
for first, then all other pages of its window that are in the frame. In between, one step of the filling at a time
(planning some windows, or one frame), for a bounded share of the time and never right after a fault. A frame that
cannot be read holds whoever waits for it, is told in the claim record, and is tried again and again; everything else
goes on. Nothing is ever placed but content that is proven to be that of the page map, and zeros where the page map
has nothing or the page was placed and punched since.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError, LockedError, StorageError, VirtualMachineError
from base.units import PAGE
from restore import claims as record
from restore.claims import Claims, wrong_page
from restore.plan import NOTHING, WINDOW, MovedError, RegionPlan, Window
from restore.working_set import WorkingSet
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from vm.mappings import Mapping, shared_mappings
from vm.userfaultfd import Userfaultfd

SHARE = 0.5
"""Of one processor, at most, for filling in what nobody waits for."""
_AFTER_FAULT_S, _STARVED_S = 0.002, 0.02
"""Filling waits so long after a fault, since more are likely to come, but never longer than the second."""
_RETRY_S = 0.25
_PLAN_BATCH = 4
_PLAN_AHEAD = 1 << 20
"""Pages that are planned and not placed, at most: 64 bytes each."""
_PREFETCH_BYTES = 64 << 20
_FOREVER_MS = 1000

UNREADABLE = (IntegrityError, StorageError, LockedError)
"""What reading the store fails with: whoever waits for it goes on waiting."""

_ZERO = np.zeros(PAGE, np.uint8)


@dataclass(slots=True, eq=False)
class _Served:
    """One region: its plan, claims, backing file, and where QEMU shows it."""

    at: int
    name: str
    plan: RegionPlan
    claims: NDArray[np.uint8]
    backing: int
    mappings: list[Mapping]

    def address(self, page: int) -> tuple[int, int]:
        """QEMU's address of a page, and how many pages follow it there without a gap."""
        offset = page * PAGE
        for each in self.mappings:
            if each.offset <= offset < each.offset + each.size:
                return each.start + offset - each.offset, (each.offset + each.size - offset) // PAGE
        raise VirtualMachineError(f"region {self.name}: QEMU does not show its page {page} anywhere")


class PageServer:
    """Serves one QEMU process from one generation; a context manager. `prepare` needs no QEMU yet."""

    def __init__(self, repository: Repository, generation: Generation, claims: Claims, working_set: WorkingSet) -> None:
        """Raises ConflictError, NotFoundError, IntegrityError (a region is hurt), StorageError."""
        self._repository, self._claims, self._working_set = repository, claims, working_set
        self._name = generation.name
        self._resources = ExitStack()
        self._regions: list[_Served] = []
        try:
            reader = self._resources.enter_context(GenerationReader(repository, generation))  # for its lease
            for at, (name, file, size) in enumerate(claims.facts.regions):
                region = reader.region(name)
                reader.require_whole(region)
                assert region.root.length == size
                backing = os.open(claims.folder / file, os.O_RDONLY | os.O_CLOEXEC)
                self._resources.callback(os.close, backing)
                plan = RegionPlan(repository.nodes, repository.frames, region)
                self._regions.append(_Served(at, name, plan, claims.pages[name], backing, []))
        except BaseException:
            self._resources.close()
            raise
        for word in (record.PLANNED, record.PLACED, record.PLAN_COMPLETE, record.HELD):
            claims.set(word, 0)
        self._fetched: list[tuple[_Served, NDArray[np.int64], NDArray[np.uint8]]] = []
        self._held: dict[tuple[int, int], str] = {}
        self._unread: dict[tuple[int, int], str] = {}  # by region and window
        self._no_map = ""
        self._failed_at = self._next_fill = self._filled_at = 0.0
        self._filling: Iterator[bool] | None = self._fill()

    def prepare(self) -> None:
        """Plan and open what earlier resumes touched first, up to 64 MiB of it. Nothing fails here: what cannot be read
        now is met again."""
        size = 0
        for served in self._regions:
            for number, pages in self._working_set.windows(served.name, WINDOW):
                if size > _PREFETCH_BYTES:
                    return
                try:
                    window = self._window(served, number)
                    for members in _frames(window, np.flatnonzero(np.isin(window.numbers, pages))):
                        if not served.claims[window.numbers[members]].all():
                            whole = np.flatnonzero(window.frames == window.frames[members[0]])
                            chunks = served.plan.chunks(window, whole)
                            self._fetched.append((served, window.numbers[whole], chunks))
                            size += chunks.nbytes
                except (*UNREADABLE, MovedError):
                    continue

    def attach(self, descriptor: Userfaultfd) -> None:
        """Govern QEMU's mappings, and take over from a server that ended. Raises ConflictError, VirtualMachineError."""
        self._descriptor = descriptor
        for served in self._regions:
            try:
                served.mappings = shared_mappings(descriptor.pid, served.backing)
            except OSError as error:
                raise VirtualMachineError(f"QEMU (pid {descriptor.pid}) has ended: {error.strerror}") from error
            if not served.mappings:
                raise VirtualMachineError(f"QEMU (pid {descriptor.pid}) does not map region {served.name}")
            for mapping in served.mappings:
                descriptor.register(mapping.start, mapping.size, missing=True)
        self._claims.take_over({served.name: served.backing for served in self._regions})
        for served in self._regions:
            for mapping in served.mappings:
                descriptor.wake(mapping.start, mapping.size)
        self._claims.tell_problem("")
        self._claims.set(record.SERVERS, self._claims.word(record.SERVERS) + 1)
        self._claims.set(record.PHASE, record.SERVING)

    def prefetch(self) -> None:
        """Place what `prepare` has opened."""
        for served, numbers, chunks in self._fetched:
            self._place(served, numbers, chunks)
            self._add(record.PREFETCHED, len(numbers))
        self._fetched.clear()

    def serve(self, qemu: int) -> None:
        """Until QEMU ends (`qemu` is its pidfd), or somebody ends this process.

        Raises ConflictError if a page is there that nobody of us has placed: the guest is held then.
        """
        poll = select.poll()
        poll.register(self._descriptor.descriptor, select.POLLIN)
        poll.register(qemu, select.POLLIN)
        empty = time.monotonic()  # when there was no fault yet, as far as is known
        while True:
            waiting = self._pause_ms(empty)
            events = dict(poll.poll(waiting))
            if qemu in events:
                return
            faults = self._descriptor.descriptor in events
            if waiting or not faults:
                empty = time.monotonic()
            if faults:
                self._answer(empty)
                empty = time.monotonic()
            else:
                self._in_between()

    def close(self) -> None:
        """Let go of everything; what is registered stays so, in QEMU."""
        self._working_set.save()
        self._resources.close()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Faults

    def _answer(self, since: float) -> None:
        """All that wait; `since` is the latest time at which nobody is known to have waited."""
        try:
            for address in self._descriptor.faults():
                served, page = self._place_of(address)
                if served.claims[page]:
                    self._touched_again(address)
                elif self._bring(served, page):
                    self._claims.count_latency((time.monotonic() - since) * 1e6)
                    self._working_set.touched(served.name, page)
        except ProcessLookupError:
            return  # QEMU has ended, which the next poll tells
        self._next_fill = max(self._next_fill, min(time.monotonic() + _AFTER_FAULT_S, self._filled_at + _STARVED_S))

    def _place_of(self, address: int) -> tuple[_Served, int]:
        for served in self._regions:
            for mapping in served.mappings:
                if mapping.start <= address < mapping.end:
                    return served, (mapping.offset + address - mapping.start) // PAGE
        raise VirtualMachineError(f"QEMU (pid {self._descriptor.pid}) waits for {address:#x}, which is no memory of it")

    def _touched_again(self, address: int) -> None:
        """A page that was placed: either the fault is older than that, or the page was punched since, and is zeros."""
        if not self._descriptor.place(address, _address_of(_ZERO), PAGE):
            self._descriptor.wake(address, PAGE)

    def _bring(self, served: _Served, page: int) -> bool:
        """Place a page that somebody waits for, with all that comes along; False if it is held for now."""
        try:
            self._place_page(served, page)
        except UNREADABLE as error:
            self._hold(served, page, error)
            return False
        if self._held.pop((served.at, page), None) is not None:
            self._tell()
        return True

    def _place_page(self, served: _Served, page: int) -> None:
        while True:
            window = self._window(served, page // WINDOW)
            at = window.find(page)
            if at < 0:
                self._place(served, np.array([page]), _ZERO.reshape(1, PAGE), counted=False)
                return
            members = self._missing(served, window, np.flatnonzero(window.frames == window.frames[at]))
            try:
                chunks = served.plan.chunks(window, members)
            except MovedError:
                continue
            first = int(np.searchsorted(members, at))
            self._place(served, window.numbers[members[first : first + 1]], chunks[first : first + 1])
            rest = np.arange(len(members)) != first
            if rest.any():
                # Neighbours before and after the page: two copies at most, mostly of rows that stand together.
                self._place(served, window.numbers[members[:first]], chunks[:first])
                self._place(served, window.numbers[members[first + 1 :]], chunks[first + 1 :])
            return

    def _hold(self, served: _Served, page: int, error: Exception) -> None:
        where = f"{page * PAGE:#x}-{(page + 1) * PAGE:#x}"
        self._held[served.at, page] = f"{self._name}: {where} of region {served.name} cannot be read: {error}"
        self._failed_at = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        """What the guest waits for in vain, or would, is in the record, for whoever looks."""
        problems = [*self._held.values(), *self._unread.values(), self._no_map]
        if self._claims.problem != problems[0]:
            self._claims.tell_problem(problems[0])
        self._claims.set(record.HELD, len(self._held))

    # Filling

    @property
    def _trouble(self) -> bool:
        return bool(self._held or self._unread or self._no_map)

    def _pause_ms(self, now: float) -> float:
        """How long to wait for faults before something else is done."""
        if self._filling is not None:
            return 0 if self._claims.word(record.PACE) else max(0.0, (self._next_fill - now) * 1e3)
        if self._trouble:
            return max(1.0, (self._failed_at + _RETRY_S - now) * 1e3)
        return _FOREVER_MS if self._claims.word(record.PHASE) == record.DONE else 0

    def _in_between(self) -> None:
        began = time.monotonic()
        try:
            if self._trouble and began - self._failed_at >= _RETRY_S:
                self._try_again()
            elif self._filling is not None and next(self._filling, None) is None:
                self._filling = None
        except ProcessLookupError:
            return  # QEMU has ended, which the next poll tells
        except UNREADABLE as error:  # the page map itself
            self._filling, self._failed_at = None, time.monotonic()
            self._no_map = f"{self._name}: its page map cannot be read: {error}"
            self._tell()
        if self._filling is None and not self._trouble:
            self._working_set.save()
            self._claims.set(record.PHASE, record.DONE)
        self._filled_at = time.monotonic()
        spent = self._filled_at - began
        self._next_fill = max(self._next_fill, self._filled_at + spent * (1 / SHARE - 1))

    def _try_again(self) -> None:
        """What could not be read: the store may be back, or somebody may have repaired it."""
        self._failed_at = time.monotonic()
        self._repository.storage.close()  # files that were opened before may not be those that are there now
        for at, page in list(self._held):
            served = self._regions[at]
            if served.claims[page]:
                del self._held[at, page]
            elif not self._bring(served, page):
                return
        for at, number in list(self._unread):
            served = self._regions[at]
            if not served.plan.finished[number]:
                for _ in self._fill_window(served, number):
                    pass
                if not served.plan.finished[number]:
                    return
            del self._unread[at, number]
        if self._no_map:
            self._no_map, self._filling = "", self._fill()
        self._tell()

    def _fill(self) -> Iterator[bool]:
        """Steps: plan everything ahead, as far as memory for it is allowed, then place it, and so on."""
        planned: list[tuple[_Served, int]] = []
        ahead = 0
        for served in self._regions:
            for first, last in served.plan.occupied(_PLAN_BATCH):
                for low in range(first, last, _PLAN_BATCH):
                    high = min(low + _PLAN_BATCH, last)
                    ahead += self._plan(served, low, high)
                    planned += [(served, number) for number in range(low, high)]
                    yield True
                if ahead > _PLAN_AHEAD:
                    yield from self._fill_planned(planned)
                    planned, ahead = [], 0
        self._claims.set(record.PLAN_COMPLETE, 1)
        yield from self._fill_planned(planned)

    def _fill_planned(self, planned: list[tuple[_Served, int]]) -> Iterator[bool]:
        for served, number in planned:
            yield from self._fill_window(served, number)

    def _fill_window(self, served: _Served, number: int) -> Iterator[bool]:
        """Place what is missing, frame by frame; the window is finished then, or noted as one that cannot be read."""
        failure, again = "", True
        while again:
            again = False
            window = self._window(served, number)
            for each in _frames(window, np.arange(len(window.numbers))):
                members = self._missing(served, window, each)
                if len(members):
                    try:
                        self._place(served, window.numbers[members], served.plan.chunks(window, members))
                    except MovedError:
                        again = True
                    except UNREADABLE as error:
                        pages = window.numbers[members]
                        where = f"{int(pages[0]) * PAGE:#x}-{(int(pages[-1]) + 1) * PAGE:#x}"
                        failure = failure or f"{self._name}: {where} of region {served.name} cannot be read: {error}"
                    yield True
        if failure:
            self._unread[served.at, number] = failure
            self._failed_at = time.monotonic()
            self._tell()
        elif number < len(served.plan.finished):
            served.plan.finish(number)

    # Placing

    def _window(self, served: _Served, number: int) -> Window:
        """A window, planned if it was not."""
        plan = served.plan
        if number >= len(plan.finished) or plan.finished[number]:
            return NOTHING
        if number not in plan.windows:
            self._plan(served, number, number + 1)
        return plan.windows[number]

    def _plan(self, served: _Served, first: int, last: int) -> int:
        """Plan windows, and count what there is in those that were not planned."""
        pages = 0
        for window in served.plan.plan(first, last):
            pages += len(window.numbers)
            self._add(record.PLACED, int(np.count_nonzero(served.claims[window.numbers])))
        self._add(record.PLANNED, pages)
        return pages

    def _add(self, word: int, count: int) -> None:
        self._claims.set(word, self._claims.word(word) + count)

    def _missing(self, served: _Served, window: Window, members: NDArray[np.intp]) -> NDArray[np.intp]:
        found: NDArray[np.intp] = members[served.claims[window.numbers[members]] == 0]
        return found

    def _place(
        self, served: _Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8], *, counted: bool = True
    ) -> None:
        """Put rows of `chunks` (n, PAGE) to pages `numbers` (n,), ascending, those that are claimed left out."""
        free = served.claims[numbers] == 0
        if not free.all():
            numbers, chunks = numbers[free], np.ascontiguousarray(chunks[free])
        if not len(numbers):
            return
        source = _address_of(chunks)
        cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
        for start, end in zip([0, *cuts], [*cuts, len(numbers)], strict=True):
            while start < end:
                address, room = served.address(int(numbers[start]))
                count = min(end - start, room)
                first = int(numbers[start])
                self._claims.intend(served.at, first, count)
                done = self._descriptor.place(address, source + start * PAGE, count * PAGE) // PAGE
                if done < count:
                    raise wrong_page(self._claims.facts.vm, served.name, first + done)
                self._claims.claim(served.name, first, count)
                start += count
        if counted:
            self._add(record.PLACED, len(numbers))


def _frames(window: Window, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Members of a window by frame, each ascending, in order of pack and frame."""
    if not len(members):
        return []
    keys = window.frames[members]
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(members[order], cuts)


def _address_of(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])
