"""Rounds and limits of the pause, with a guest that writes on while it runs: whenever it runs, it writes some pages."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_fixtures import Place, content, place

from base import extents as ranges
from base.disk import Disk
from base.errors import ConflictError
from base.extents import EMPTY, Extents
from base.units import PAGE
from capture.generation import Captured, capture
from capture.journal import Journal
from capture.pause import Limits, PauseModel
from capture.sources import CapturedRegion
from capture.trackers import Dirty, Kind
from store.records import Generation
from store.repository import Repository
from vm.identity import Identity

PAGES = 4096
EVERYTHING = ranges.normalise([(0, PAGES * PAGE)])
SLOW = PauseModel(fixed_ms=0, fixed_full_ms=0, bytes_per_ms=PAGE)
"""A page a millisecond, so that limits count pages."""


class WritingGuest:
    """One region, its tracker and its QEMU: what it writes between two looks is `plan`, in pages, the last for ever."""

    def __init__(self, folder: Path, plan: list[int], kind: Kind = "userfaultfd", *, direct_io: bool = False) -> None:
        self.kind, self.direct_io, self.plan = kind, direct_io, plan
        self.random = random.Random(7)
        self.path = folder / "memory"
        self.path.touch()
        os.truncate(self.path, PAGES * PAGE)
        self.journal = Journal(folder / "journal.json", Identity(1, 2, "boot"), Disk())
        self.written: set[int] = set()
        self.since: Extents | None = None
        self.running = True
        self.stops = 0
        self.stopped_with = b""
        self.parent: Generation | None = None
        self.baseline = False

    def write(self) -> None:
        """Some pages, as planned."""
        count = self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]
        with self.path.open("r+b") as file:
            for page in self.random.sample(range(PAGES), count):
                file.seek(page * PAGE)
                file.write(self.random.randbytes(64))
                self.written.add(page)

    # Tracker

    def collect(self, *, running: bool, known: Extents | None = None) -> Dirty:  # noqa: ARG002  the protocol's
        assert running == self.running and not (running and self.direct_io)
        if self.kind == "scan":
            return Dirty(None, None)
        fresh = self.peek()
        self.written.clear()
        self.since = None if self.since is None else ranges.union(self.since, fresh)
        if running:
            self.write()
        return Dirty(self.since, fresh)

    def peek(self) -> Extents:
        return ranges.normalise([(page * PAGE, (page + 1) * PAGE) for page in self.written])

    def committed(self) -> None:
        self.since = EMPTY

    def arm(self, *, running: bool) -> None: ...

    def take_over(self) -> None: ...

    def forget(self) -> None: ...

    def detach(self) -> None: ...

    def close(self) -> None: ...

    # Execution

    def runs(self) -> bool:
        return self.running

    def settle(self) -> None: ...

    def prepare(self) -> None: ...

    def take_back(self) -> None: ...

    def device_state(self) -> int:
        raise AssertionError

    def stop(self) -> None:
        self.stops += 1
        self.running = False
        self.stopped_with = self.path.read_bytes()

    def cont(self) -> None:
        assert self.path.read_bytes() == self.stopped_with
        self.running = True
        self.write()

    def capture(self, repository: Repository, limits: Limits) -> Captured:
        """As a supervisor does it."""
        base = self.parent if self.baseline else None
        region = CapturedRegion("pm0", "pmem", self.path, PAGES * PAGE, EVERYTHING, self, base)
        model = PauseModel(SLOW.fixed_ms, SLOW.fixed_full_ms, SLOW.bytes_per_ms)
        done = capture(
            repository,
            "vm",
            [region],
            self.journal,
            self,
            cause="test",
            parent=self.parent,
            limits=limits,
            pauses=model,
        )
        self.parent, self.baseline = done.generation, True
        assert content(repository, done.generation, "pm0") == self.stopped_with
        return done


@pytest.fixture
def where() -> Iterator[Place]:
    with place() as made:
        yield made


def test_rounds_go_on_until_the_rest_fits(where, tmp_path):
    guest = WritingGuest(tmp_path, [3000, 800, 200, 50, 10])
    guest.write()
    with where.open() as repository:
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=20, exceed=False))
        assert done.stopped is not None and done.stopped.rounds in (3, 4) and guest.stops == 1
        guest.plan = [500, 500, 500, 500, 10]
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=20, exceed=False))
        assert done.stopped.rounds > 3


def test_a_capture_that_cannot_keep_its_limit_is_given_up_and_the_next_one_has_everything(where, tmp_path):
    guest = WritingGuest(tmp_path, [1000])
    guest.write()
    with where.open() as repository:
        guest.capture(repository, Limits())
        with pytest.raises(
            ConflictError, match=r"VM vm: given up, .* after 3 rounds, .* pause_ms_max is 100"
        ) as caught:
            guest.capture(repository, Limits(pause_ms_max=100, rounds_max=3, exceed=False))
        assert "\n" not in str(caught.value) and guest.running
        assert [each.number for each in repository.generations("vm")] == [1]
        assert guest.journal.baseline("pm0") is None  # bits were cleared: a next supervisor looks at everything
        done = guest.capture(repository, Limits(pause_ms_max=100, rounds_max=3))
        assert done.stopped is not None and done.stopped.rounds == 3


def test_under_direct_io_a_round_begins_with_a_stop(where, tmp_path):
    guest = WritingGuest(tmp_path, [3000, 400, 20], direct_io=True)
    guest.write()
    with where.open() as repository:
        done = guest.capture(repository, Limits())
        assert done.stopped is not None and done.stopped.rounds == 1 and guest.stops == 2
        guest.plan = [10]
        guest.capture(repository, Limits())
        guest.capture(repository, Limits())
        assert guest.stops == 4  # little is dirty: one is enough


def test_a_scan_hashes_nothing_while_the_guest_stands_still(where, tmp_path, monkeypatch):
    guest = WritingGuest(tmp_path, [100], "scan")
    guest.write()
    with where.open() as repository:
        replace = type(repository.writer("other")).replace

        def replaced(*arguments):
            assert guest.running
            return replace(*arguments)

        monkeypatch.setattr("store.writer.GenerationWriter.replace", replaced)
        for _ in range(3):
            done = guest.capture(repository, Limits(pause_ms_max=1))
            assert done.stopped is not None and guest.stops == 1
            guest.stops = 0
            guest.write()


def test_what_pauses_are_made_of_is_learnt():
    model = PauseModel(5, 30, PAGE)
    for _ in range(20):
        model.learn(22.0, 20.0, 20 << 20, full=False)
    assert model.expected_ms(10 << 20, full=False) == pytest.approx(12, rel=0.01)
    assert model.allowed_bytes(12, full=False) == pytest.approx(10 << 20, rel=0.01)
    assert model.allowed_bytes(20, full=True) == 0
    assert model.allowed_bytes(None, full=True) == float("inf")
