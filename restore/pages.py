"""The page server's work: answering first touches of memory that is not there yet, and filling in the rest.

One thread does everything, so that two placements never meet. A fault is answered by its frame: the page that is waited
for first, then, when nobody waits, all other pages of its window that are in the frame. In between, one step at a time
of what nobody waits for (restore.background): what earlier resumes touched as fast as that can be, the rest for a
bounded share of the time and never right after a fault. A frame that cannot be read holds whoever waits for it, is told
in the claim record, and is tried again and again; everything else goes on. Nothing is ever placed but content that is
proven to be that of the page map, and zeros where the page map has nothing or the page was placed and punched since.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack

from base.errors import VirtualMachineError
from base.units import PAGE
from base.workers import usable_cores
from restore import claims as record
from restore.background import UNREADABLE, Background
from restore.claims import Claims
from restore.placement import ZERO, Placer, Served, address_of
from restore.plan import WINDOW, Frame, RegionPlan, Window, nearest_first
from restore.working_set import WorkingSet
from store.locating import Locator
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from vm.mappings import shared_mappings
from vm.userfaultfd import Userfaultfd

SHARE = 0.5
"""Of one processor, at most, for filling in what nobody waits for."""
_AFTER_FAULT_S, _STARVED_S = 0.002, 0.02
"""Filling waits so long after a fault, since more are likely to come, but never longer than the second."""
_FIRST_S, _AFTER_FIRST_S, _STARVED_FIRST_S = 2.0, 0.02, 0.25
"""The same for the first seconds, in which a guest that goes on touches most of what it works with."""
_SPIN_S = 0.001
"""The next fault is looked for without sleeping so long after one, where the guest has a core of its own: being woken
takes some 50 us."""
_RESTS_MAX = 64
"""Frames of which a part was not placed yet, at most; what is given up is filled in later."""
_RETRY_S = 0.25
_FOREVER_MS, _PACE_MS = 1000, 20


class PageServer:
    """Serves one QEMU process from one generation; a context manager. `get_ready` needs no QEMU yet."""

    def __init__(self, repository: Repository, generation: Generation, claims: Claims, working_set: WorkingSet) -> None:
        """Raises ConflictError, NotFoundError, IntegrityError (a region is hurt), StorageError."""
        self._repository, self._claims, self._working_set = repository, claims, working_set
        self._name = generation.name
        self._resources = ExitStack()
        self._regions: list[Served] = []
        locator = Locator(repository.nodes, repository.frames)
        try:
            reader = self._resources.enter_context(GenerationReader(repository, generation, kept=True))  # for its lease
            for at, (name, file, size) in enumerate(claims.facts.regions):
                region = reader.region(name)
                reader.require_whole(region)
                assert region.root.length == size
                backing = os.open(claims.folder / file, os.O_RDONLY | os.O_CLOEXEC)
                self._resources.callback(os.close, backing)
                plan = RegionPlan(repository.nodes, locator, repository.frames, region)
                self._regions.append(Served(at, name, plan, claims.pages[name], backing, []))
        except BaseException:
            self._resources.close()
            raise
        for word in (record.PLANNED, record.PLACED, record.PLAN_COMPLETE, record.HELD, record.FETCHED):
            claims.set(word, 0)
        self._held: dict[tuple[int, int], str] = {}
        self._unread: dict[tuple[int, int], str] = {}  # by region and window
        self._no_map = ""
        self._failed_at = self._next_fill = self._filled_at = 0.0
        self._fetches = self._fills = True
        self._rest: deque[Iterator[None]] = deque(maxlen=_RESTS_MAX)
        self._began_at = self._answered_at = 0.0
        self._spins, self._spin_s = False, _SPIN_S if usable_cores() > 1 else 0.0
        self._background = Background(self._regions, locator, claims, working_set, self._not_read)

    def get_ready(self) -> bool:
        """One step of what can be done before there is a QEMU; False if nothing is left of that."""
        return self._background.get_ready()

    def attach(self, descriptor: Userfaultfd) -> None:
        """Govern QEMU's mappings, and take over from a server that ended. Raises ConflictError, VirtualMachineError."""
        self._descriptor, self._placer = descriptor, Placer(self._claims, descriptor)
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
        self._background.attach(self._placer)
        self._claims.tell_problem("")
        self._claims.set(record.SERVERS, self._claims.word(record.SERVERS) + 1)
        self._claims.set(record.PHASE, record.SERVING)
        self._began_at = self._filled_at = time.monotonic()

    def serve(self, qemu: int) -> None:
        """Until QEMU ends (`qemu` is its pidfd), or somebody ends this process.

        Raises ConflictError if a page is there that nobody of us has placed: the guest is held then. Raises
        IndexLostError if the index was made anew: only another server can go on.
        """
        poll = select.poll()
        poll.register(self._descriptor.descriptor, select.POLLIN)
        poll.register(qemu, select.POLLIN)
        empty = time.monotonic()  # when there was no fault yet, as far as is known
        beat = self._claims.word(record.BEAT)
        while True:
            self._claims.set(record.BEAT, beat := (beat + 1) % (1 << 64))
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
        self._answered_at = now = time.monotonic()
        first = now - self._began_at < _FIRST_S
        after, starved = (_AFTER_FIRST_S, _STARVED_FIRST_S) if first else (_AFTER_FAULT_S, _STARVED_S)
        self._next_fill = max(self._next_fill, min(now + after, self._filled_at + starved))

    def _place_of(self, address: int) -> tuple[Served, int]:
        for served in self._regions:
            page = served.page_of(address)
            if page >= 0:
                return served, page
        raise VirtualMachineError(f"QEMU (pid {self._descriptor.pid}) waits for {address:#x}, which is no memory of it")

    def _touched_again(self, address: int) -> None:
        """A page that was placed: either the fault is older than that, or the page was punched since, and is zeros."""
        if not self._descriptor.place(address, address_of(ZERO), PAGE):
            self._descriptor.wake(address, PAGE)

    def _bring(self, served: Served, page: int) -> bool:
        """Place a page that somebody waits for; False if it is held for now. What comes along waits in `_rest`."""
        try:
            self._place_page(served, page)
        except UNREADABLE as error:
            self._hold(served, page, error)
            return False
        if self._held.pop((served.at, page), None) is not None:
            self._tell()
        return True

    def _place_page(self, served: Served, page: int) -> None:
        window = self._background.window(served, page // WINDOW)
        at = window.find(page)
        if at < 0:
            self._placer.one(served, page, ZERO[0])
            self._rest.append(self._zeros_beside(served, page, window))
            return
        frame, slot = served.plan.open(window, at)
        self._placer.one(served, page, frame.chunks[slot])
        self._background.count(served, window.numbers[at : at + 1], 1)
        self._rest.append(self._rest_of(served, window, frame, page))

    def _rest_of(self, served: Served, window: Window, frame: Frame, page: int) -> Iterator[None]:
        """What comes along with a page that was waited for: all that its frame has of the window, some pages a step."""
        served.plan.read_ahead(frame)
        members, slots = window.held_by(frame)
        numbers = window.numbers[members]
        for some in nearest_first(numbers, page):
            yield
            self._background.put(served, numbers[some], frame.take(slots[some]))

    def _zeros_beside(self, served: Served, page: int, window: Window) -> Iterator[None]:
        self._background.put_zeros(served, page, window)
        yield

    def _hold(self, served: Served, page: int, error: Exception) -> None:
        where = f"{page * PAGE:#x}-{(page + 1) * PAGE:#x}"
        self._held[served.at, page] = f"{self._name}: {where} of region {served.name} cannot be read: {error}"
        self._failed_at = time.monotonic()
        self._tell()

    def _not_read(self, served: Served, number: int, why: str) -> None:
        self._unread[served.at, number] = f"{self._name}: {why}"
        self._failed_at = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        """What the guest waits for in vain, or would, is in the record, for whoever looks."""
        problems = [*self._held.values(), *self._unread.values(), self._no_map]
        if self._claims.problem != problems[0]:
            self._claims.tell_problem(problems[0])
        self._claims.set(record.HELD, len(self._held))

    # In between

    @property
    def _trouble(self) -> bool:
        return bool(self._held or self._unread or self._no_map)

    def _pause_ms(self, now: float) -> float:
        """How long to wait for faults before something else is done."""
        self._spins = False
        if self._rest:
            return 0
        pause = self._unhurried_ms(now)
        self._spins = pause > 0 and now - self._answered_at < self._spin_s
        return 0 if self._spins else pause

    def _unhurried_ms(self, now: float) -> float:
        pace = self._claims.word(record.PACE)
        if self._fetches and pace != record.FAULTS_ONLY:
            return 0
        if self._fills and pace != record.FAULTS_ONLY:
            return 0 if pace == record.AT_ONCE else max(0.0, (self._next_fill - now) * 1e3)
        if self._trouble:
            return max(1.0, (self._failed_at + _RETRY_S - now) * 1e3)
        if self._fills:
            return _PACE_MS
        return _FOREVER_MS if self._claims.word(record.PHASE) == record.DONE else 0

    def _place_some(self) -> None:
        """One step of what came along with the page that was waited for last."""
        rest = self._rest[-1]
        if next(rest, rest) is rest:
            self._rest.pop()

    def _in_between(self) -> None:
        began = time.monotonic()
        if self._trouble and began - self._failed_at >= _RETRY_S:
            self._repository.environment.require_current()
        try:
            if self._rest:
                self._place_some()
                return
            if self._spins:
                return
            if self._trouble and began - self._failed_at >= _RETRY_S:
                self._try_again()
            elif self._claims.word(record.PACE) == record.FAULTS_ONLY:
                return
            elif self._fetches:
                self._fetches = self._background.fetch()
                return
            elif self._fills:
                self._fills = self._background.fill()
        except ProcessLookupError:
            return  # QEMU has ended, which the next poll tells
        except UNREADABLE as error:  # the page map itself
            self._fills, self._failed_at = False, time.monotonic()
            self._no_map = f"{self._name}: its page map cannot be read: {error}"
            self._tell()
        if not self._fills and not self._trouble:
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
                for _ in self._background.fill_window(served, number):
                    pass
                if not served.plan.finished[number]:
                    return
            del self._unread[at, number]
        if self._no_map:
            self._no_map, self._fills = "", True
            self._background.begin()
        self._tell()
