"""A guest for tests of captures: one region in a file, its tracker, and its QEMU, in one object."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store_fixtures import content

from base import extents as ranges
from base.disk import Disk
from base.extents import EMPTY, Extents
from base.units import PAGE
from capture.generation import Captured, capture
from capture.journal import Journal
from capture.making import Making
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
        self.kept = EVERYTHING
        self.model: PauseModel | None = None

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
        fresh = self.peek().fresh
        self.written.clear()
        self.since = None if self.since is None else ranges.union(self.since, fresh)
        if running:
            self.write()
        return Dirty(self.since, fresh)

    def peek(self) -> Dirty:
        fresh = ranges.normalise([(page * PAGE, (page + 1) * PAGE) for page in self.written])
        return Dirty(None if self.since is None else ranges.union(self.since, fresh), fresh)

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

    def unsettle(self) -> None: ...

    facts: Mapping[str, Any] = {}

    def kept_now(self) -> Mapping[str, Extents]:
        return {"pm0": self.kept}

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

    def region(self) -> CapturedRegion:
        """As it is to be captured now."""
        base = self.parent if self.baseline else None
        return CapturedRegion("pm0", "pmem", self.path, PAGES * PAGE, self.kept, self, base)

    def capture(self, repository: Repository, limits: Limits | None = None, making: Making | None = None) -> Captured:
        """As a supervisor does it."""
        self.model = PauseModel(SLOW.fixed_ms, SLOW.fixed_full_ms, SLOW.bytes_per_ms)
        done = capture(
            repository,
            "vm",
            [self.region()],
            self.journal,
            self,
            cause="test",
            parent=self.parent,
            limits=limits,
            pauses=self.model,
            making=making,
        )
        self.parent, self.baseline = done.generation, True
        wanted = bytearray(PAGES * PAGE)
        for start, end in self.kept.tolist():
            wanted[start:end] = self.stopped_with[start:end]
        assert content(repository, done.generation, "pm0") == wanted
        return done
