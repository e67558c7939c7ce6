"""Full and other generations of one VM in any order, against a model: each region is compared with the right base.

The guest is two files and what the tracker of each has noted; QEMU is a list of what it was told.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from store_fixtures import Place, content, place

from base import extents as ranges
from base.disk import Disk
from base.errors import VirtualMachineError
from base.extents import EMPTY, Extents
from base.units import PAGE
from capture.disks import DISK_CHUNK, CapturedDisk, token_of
from capture.generation import Captured, capture
from capture.journal import Journal
from capture.sources import CapturedRegion
from capture.trackers import Dirty, Kind
from store.records import Generation, HurtGeneration
from store.repository import Repository
from vm.identity import Identity

PAGES = {"ram": 96, "pm0": 48}
KEPT = ranges.normalise([(0, 4 * PAGE), (16 * PAGE, 24 * PAGE)])


EVERYTHING = [
    "prepare",
    "prepare_disks",
    "settle",
    "stop",
    "device_state",
    "freeze_disks",
    "cont",
    "take_back",
    "unsettle",
]
CHUNK = DISK_CHUNK


class MemoryDisk:
    """What QEMU shows of a disk's instant."""

    def __init__(self, name: str, data: bytes, written: Extents | None) -> None:
        self.name, self.size, self._data, self._written = name, len(data), data, written
        self.read = 0

    def data(self, start: int, end: int) -> Extents:
        """Only where there is something."""
        pages = [at for at in range(start // PAGE * PAGE, end, PAGE) if any(self._data[at : at + PAGE])]
        return ranges.normalise([(max(at, start), min(at + PAGE, end)) for at in pages])

    def written(self, start: int, end: int) -> Extents:
        assert self._written is not None
        return ranges.intersect(self._written, ranges.normalise([(start, end)]))

    def read_into(self, descriptor: int, extents: Extents) -> None:
        self.read += ranges.total(extents)
        for start, end in extents.tolist():
            os.pwrite(descriptor, self._data[start:end], start)

    def __enter__(self) -> MemoryDisk:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


class NotingTracker:
    """Knows what was written, as the kernel does."""

    kind: Kind = "userfaultfd"
    direct_io = False

    def __init__(self) -> None:
        self.written: set[int] = set()
        self._since: Extents | None = None

    def arm(self, *, running: bool) -> None:
        raise AssertionError(f"armed by its first collection, running={running}")

    def take_over(self) -> None:
        self._since = EMPTY

    def collect(self, *, running: bool, known: Extents | None = None) -> Dirty:  # noqa: ARG002  the protocol's
        fresh = ranges.normalise([(page * PAGE, (page + 1) * PAGE) for page in self.written])
        self.written.clear()
        self._since = None if self._since is None else ranges.union(self._since, fresh)
        return Dirty(self._since, fresh)

    def peek(self) -> Dirty:
        return Dirty(None, ranges.normalise([(page * PAGE, (page + 1) * PAGE) for page in self.written]))

    def committed(self) -> None:
        self._since = EMPTY

    def forget(self) -> None:
        self._since = None

    def detach(self) -> None:
        self._since = None

    def close(self) -> None:
        """Nothing to do."""


class GuestDisk:
    """A disk and its bitmaps, as QEMU has them: by token, chunks that were written since."""

    def __init__(self, guest: Guest) -> None:
        self._guest, self._random = guest, guest.random
        self.data = bytearray(5 * CHUNK)
        self._largest = len(self.data)
        self.bitmaps: dict[str, set[int]] = {}
        self.captured: list[CapturedDisk] = []
        self.base: Generation | None = None
        self.shown: list[MemoryDisk] = []
        self.writes_on = True

    def write(self, chunk: int | None = None) -> None:
        chunk = self._random.randrange(-(-len(self.data) // CHUNK)) if chunk is None else chunk
        start = chunk * CHUNK
        piece = self._random.choice([bytes(PAGE), b"a" * PAGE, self._random.randbytes(PAGE)])
        self.data[start : start + PAGE] = piece[: len(self.data) - start]
        for written in self.bitmaps.values():
            written.add(chunk)

    def resize(self, size: int) -> None:
        """Cut-off bits are gone; what comes back is zero, and what was never there may, on a device, be anything."""
        del self.data[size:]
        self.data += bytes(max(0, min(size, self._largest) - len(self.data)))
        self.data += self._random.randbytes(max(0, size - len(self.data)))
        self._largest = max(size, self._largest)
        for token, written in self.bitmaps.items():
            self.bitmaps[token] = {chunk for chunk in written if chunk * CHUNK < size}

    def restart(self) -> None:
        """QEMU ends; a raw image has no bitmaps afterwards."""
        self.bitmaps.clear()

    def plan(self) -> None:
        token = token_of(self.base, "root")
        problem = None if token in self.bitmaps else "QEMU was started anew"
        self.captured = [CapturedDisk("root", self.base, problem, f"token{self._random.random()}")]

    # Disks

    def prepare(self) -> None:
        self._guest.note("prepare_disks")

    def freeze(self) -> None:
        self._guest.note("freeze_disks")
        [plan] = self.captured
        written = None
        if plan.problem is None:
            numbers = np.array(sorted(self.bitmaps[str(token_of(plan.base, "root"))]), np.uint64)
            written = ranges.from_numbers(numbers, CHUNK)
        self.bitmaps[plan.token] = set()
        self.instant = bytes(self.data)
        self.shown = [MemoryDisk("root", self.instant, written)]

    def frozen(self) -> Iterator[MemoryDisk]:
        self._guest.note("disks")
        if self.writes_on:
            self.write()
        yield from self.shown

    def release(self) -> None:
        self._guest.note("release_disks")

    def settle(self) -> None:
        """What the supervisor has QEMU do after each capture."""
        token = token_of(self.base, "root")
        self.bitmaps = {each: written for each, written in self.bitmaps.items() if each == token}


class Guest:
    """Two regions in files, a disk, and a QEMU that is told to stop and go on, and may fail at one of these."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.files = {name: folder / name for name in PAGES}
        self.trackers = {name: NotingTracker() for name in PAGES}
        self.bases: dict[str, Generation] = {}
        self.parent: Generation | None = None
        self.journal = Journal(folder / "journal.json", Identity(1, 2, "boot"), Disk())
        self.told: list[str] = []
        self.fails_at: str | None = None
        self.devices = b""
        self.disk = GuestDisk(self)
        for name, path in self.files.items():
            path.touch()
            os.truncate(path, PAGES[name] * PAGE)

    def write(self, pages: int) -> None:
        """Some pages of both, some of them with what they have already."""
        for name, path in self.files.items():
            with path.open("r+b") as file:
                for page in self.random.sample(range(PAGES[name]), pages):
                    file.seek(page * PAGE)
                    file.write(bytes([self.random.randrange(4)]) * PAGE)
                    self.trackers[name].written.add(page)

    def scrub(self) -> None:
        """Holes in main memory, which no tracker sees."""
        self.journal.begin_collect(["ram"])
        self.trackers["ram"].forget()
        os.truncate(self.files["ram"], 0)
        os.truncate(self.files["ram"], PAGES["ram"] * PAGE)

    def capture(self, repository: Repository, *, full: bool) -> Captured:
        regions = [
            CapturedRegion(
                name,
                "ram" if name == "ram" else "pmem",
                path,
                PAGES[name] * PAGE,
                EMPTY if name == "ram" else KEPT,
                self.trackers[name],
                self.bases.get(name),
            )
            for name, path in self.files.items()
            if full or name != "ram"
        ]
        self.told.clear()
        self.disk.plan()
        disks = self.disk if full else None
        try:
            done = capture(
                repository, "vm", regions, self.journal, self, cause="test", parent=self.parent, full=full, disks=disks
            )
            if full:
                self.disk.base = done.generation
        finally:
            self.disk.settle()
        self.parent = done.generation
        self.bases |= {name: done.generation for name in done.generation.regions if name in PAGES}
        return done

    # Execution

    def prepare(self) -> None:
        self.note("prepare")
        self.write(2)  # it still runs

    def runs(self) -> bool:
        return True

    def settle(self) -> None:
        self.note("settle")

    def stop(self) -> None:
        self.note("stop")

    def device_state(self) -> int:
        self.note("device_state")
        self.write(1)  # by QEMU
        self.devices = self.random.randbytes(5000)
        descriptor = os.memfd_create("devices")
        os.write(descriptor, self.devices)
        return descriptor

    def kept_now(self) -> dict[str, Extents]:
        return {"pm0": KEPT}

    def cont(self) -> None:
        self.note("cont")
        self.stopped_with = {name: path.read_bytes() for name, path in self.files.items()}
        self.write(2)

    def take_back(self) -> None:
        self.note("take_back")

    def unsettle(self) -> None:
        self.note("unsettle")

    facts = MappingProxyType({"quiesced": 3})

    def note(self, what: str) -> None:
        """What is done now; it may fail."""
        self.told.append(what)
        if what == self.fails_at:
            raise VirtualMachineError(f"no {what}")


@pytest.fixture
def where() -> Iterator[Place]:
    with place() as made:
        yield made


def judge(repository: Repository, guest: Guest, done: Captured, *, full: bool) -> None:
    """The generation has what memory had when the guest went on."""
    made = done.generation
    assert made.full is full
    assert made.metadata["quiesced"] == 3
    assert guest.journal.baseline("pm0") == made.id
    if full:
        assert guest.told == [*EVERYTHING, "disks", "release_disks"]
        assert list(made.regions) == ["ram", "pm0", "device", "disk:root"]
        assert content(repository, made, "disk:root") == guest.disk.instant
        assert content(repository, made, "device") == guest.devices
        for name, there in guest.stopped_with.items():
            assert content(repository, made, name) == there
        assert made.region_bytes == sum(PAGES.values()) * PAGE + len(guest.devices) + len(guest.disk.instant)
        assert guest.journal.baseline("ram") == made.id
    else:
        assert guest.told == ["settle", "stop", "cont", "unsettle"]
        assert list(made.regions) == ["pm0"]
        wanted = bytearray(PAGES["pm0"] * PAGE)
        for start, end in KEPT.tolist():
            wanted[start:end] = guest.stopped_with["pm0"][start:end]
        assert content(repository, made, "pm0") == wanted
    assert made.metadata["kept"] == {"pm0": KEPT.tolist()}


@pytest.mark.parametrize("seed", range(8))
def test_generations_of_both_sorts_in_any_order(where: Place, tmp_path: Path, seed: int) -> None:
    guest = Guest(tmp_path, seed)
    with where.open() as repository:
        for _ in range(18):
            guest.write(guest.random.randrange(6))
            what = guest.random.choice(["full", "full", "part", "part", "scrub", "fail", "forget", "resize", "restart"])
            for _ in range(guest.random.randrange(3)):
                guest.disk.write()
            if what == "resize":
                for _ in range(guest.random.randrange(1, 3)):  # smaller and larger again, too
                    guest.disk.resize(guest.random.choice([2 * CHUNK, 3 * CHUNK + 512, 5 * CHUNK, 7 * CHUNK - 1024]))
            elif what == "restart":
                guest.disk.restart()
            elif what == "scrub":
                guest.scrub()
                assert guest.journal.baseline("ram") is None
            elif what == "forget" and guest.bases:
                forgotten = guest.random.choice(list(guest.bases.values()))
                if repository.has(forgotten):
                    repository.forget(forgotten)
            elif what == "fail":
                fail(repository, guest, guest.random.choice([*EVERYTHING[:6], "disks"]))
            else:
                full = what == "full"
                judge(repository, guest, guest.capture(repository, full=full), full=full)


def fail(repository: Repository, guest: Guest, at: str) -> None:
    """A full capture fails: nothing is committed, and the guest goes on if it was stopped."""
    latest = repository.latest("vm")
    guest.fails_at = at
    with pytest.raises(VirtualMachineError, match=at):
        guest.capture(repository, full=True)
    guest.fails_at = None
    assert repository.latest("vm") == latest
    assert (
        guest.told
        == {
            "prepare": ["prepare", "unsettle", "release_disks"],
            "prepare_disks": ["prepare", "prepare_disks", "take_back", "unsettle", "release_disks"],
            "settle": [*EVERYTHING[:3], "take_back", "unsettle", "release_disks"],
            "stop": [*EVERYTHING[:4], "cont", "take_back", "unsettle", "release_disks"],  # it may stop after all
            "device_state": [*EVERYTHING[:5], "cont", "take_back", "unsettle", "release_disks"],
            "freeze_disks": [*EVERYTHING, "release_disks"],
            "disks": [*EVERYTHING, "disks", "release_disks"],
        }[at]
    )


def test_only_what_changed_since_the_last_full_generation_is_looked_at(where: Place, tmp_path: Path) -> None:
    """Shown by a change that no tracker has noted, which real memory cannot have."""
    guest = Guest(tmp_path, 1)
    with where.open() as repository:
        guest.write(20)
        first = guest.capture(repository, full=True).generation
        guest.capture(repository, full=False)
        before = content(repository, first, "ram")
        guest.trackers["ram"].written.clear()
        with guest.files["ram"].open("r+b") as file:
            file.write(b"unseen")
        second = guest.capture(repository, full=True).generation
        assert content(repository, second, "ram")[:PAGE] == before[:PAGE]
        guest.scrub()
        third = guest.capture(repository, full=True).generation
        assert content(repository, third, "ram") == guest.stopped_with["ram"]


def test_a_followed_disk_is_read_where_it_was_written_and_where_its_bitmap_cannot_tell(
    where: Place, tmp_path: Path
) -> None:
    guest = Guest(tmp_path, 3)
    disk = guest.disk
    disk.data[:] = guest.random.randbytes(len(disk.data))
    disk.writes_on = False

    def captured() -> tuple[str, int]:
        done = guest.capture(where_open, full=True)
        assert content(where_open, done.generation, "disk:root") == disk.instant
        assert sum(each.read for each in disk.shown) >= done.disks["root"].read_bytes
        return done.disks["root"].method, done.disks["root"].read_bytes

    with where.open() as where_open:
        assert captured() == ("rescan", 5 * CHUNK)
        disk.write(1)
        assert captured() == ("bitmap", CHUNK)
        disk.resize(7 * CHUNK - 512)
        assert captured() == ("bitmap", 2 * CHUNK - 512)
        disk.resize(4 * CHUNK + 512)
        assert captured()[0] == "bitmap"
        disk.resize(2 * CHUNK)
        disk.resize(4 * CHUNK + 512)
        assert captured() == ("rescan", 2 * CHUNK)
        disk.restart()
        assert captured()[0] == "rescan"


def test_a_full_generation_that_has_lost_something_is_no_base(where: Place, tmp_path: Path) -> None:
    guest = Guest(tmp_path, 2)
    with where.open() as repository:
        guest.write(20)
        first = guest.capture(repository, full=True).generation
        repository.mark_hurt([HurtGeneration(vm_id=first.vm_id, number=first.number, regions={"ram": 1})])
        with guest.files["ram"].open("r+b") as file:
            file.write(b"unseen")
        second = guest.capture(repository, full=True).generation
        assert content(repository, second, "ram") == guest.stopped_with["ram"]
