"""The page server on a process that is not QEMU, with a real userfaultfd: what it maps is what was stored, whatever
ends or damages what."""

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from store_fixtures import add, image, index_made_anew, place

from base import extents as ranges
from base.errors import ConflictError
from restore import claims as record
from restore.lazy import LazyRestore
from restore.lazy_fill import fill
from restore.nursery import Nursery
from restore.working_set import WorkingSet
from store.reader import GenerationReader
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from vm.identity import Identity
from vm.mappings import shared_mappings
from vm.pagemap import Pagemap
from vm.userfaultfd import Userfaultfd

PAGE = 4096
PAGES = 2500
SECONDS = 60
TARGET = """
import mmap, os, sys
files = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
maps = [mmap.mmap(each, 0) for each in files]
print("ready", flush=True)
while line := os.read(0, 200).decode().split():
    verb, region, page = line[0], int(line[1]), int(line[2])
    if verb == "write":
        maps[region][page * 4096] = 7
    if verb == "punch":
        maps[region].madvise(mmap.MADV_REMOVE, page * 4096, 4096)
    os.write(1, maps[region][page * 4096 : (page + 1) * 4096])
"""


class Guest:
    """In QEMU's place: maps the files, and touches one page at a time."""

    def __init__(self, *files: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", TARGET, *map(str, files)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._read(6) == b"ready\n"
        self.identity = Identity.of(self._process.pid)

    def begin(self, verb: str, region: int, page: int) -> None:
        """Touch a page; it may have to wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {region} {page}".encode())

    def end(self) -> bytes:
        """What it found."""
        return self._read(PAGE)

    def touch(self, page: int, region: int = 0, verb: str = "read") -> bytes:
        self.begin(verb, region, page)
        return self.end()

    @property
    def waits(self) -> bool:
        """Whether it has found nothing yet."""
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], 0)[0]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = b""
        while len(found) < size:
            assert select.select([self._process.stdout], [], [], SECONDS)[0], "it waits for ever"
            found += os.read(self._process.stdout.fileno(), size - len(found))
        return found


class Lazily:
    """A repository with one generation, and its lazy restore into a guest. At first, nothing but faults is served."""

    def __init__(self, stack: contextlib.ExitStack, pages: int = PAGES) -> None:
        self.nursery = stack.enter_context(Nursery.fork())  # before LMDB is open
        self.place = stack.enter_context(place())
        self.repository = stack.enter_context(self.place.open())
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.content = image(1, pages)[: (pages - 1) * PAGE] + bytes(64 * PAGE)
        self.small = image(2, 40)[: 30 * PAGE]
        self.generation = add(self.repository, "vm", {"ram": self.content, "pm0": self.small})
        self.files = {}
        for name, content in (("ram", self.content), ("pm0", self.small)):
            self.files[name] = self.folder / f"{name}.memory"
            with self.files[name].open("wb") as file:
                file.truncate(len(content))
        self.lazy = LazyRestore.begin(
            self.repository, self.generation, self.folder, self.files, self.folder, self.working_sets, self.nursery
        )
        self.lazy.claims.set(record.PACE, record.FAULTS_ONLY)
        stack.callback(self.lazy.close)
        self.guest = Guest(*self.files.values())
        stack.callback(self.guest.close)
        stack.callback(self.lazy.kill)

    @property
    def working_sets(self) -> Path:
        return self.place.root / "working-sets"

    def page(self, number: int) -> bytes:
        return self.content[number * PAGE : (number + 1) * PAGE]

    def serve(self) -> None:
        self.lazy.serve(self.guest.identity)

    def another(self) -> None:
        """The server is gone: the next one takes over."""
        self.lazy.reap()
        self.serve()

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.001)  # between two looks

    def filled(self) -> None:
        self.lazy.hurry()
        self.until(lambda: self.lazy.phase == record.DONE, "it never ends")

    def right(self) -> None:
        """All of it is in the backing files."""
        with GenerationReader(self.repository, self.generation) as reader:
            for name, file in self.files.items():
                with file.open("rb") as opened:
                    reader.verify(reader.region(name), opened.fileno(), str(file))


@pytest.fixture
def lazily():
    with contextlib.ExitStack() as stack:
        yield Lazily(stack)


def test_what_is_touched_first_is_what_was_stored_and_then_comes_the_rest(lazily):
    order = random.Random(3).sample(range(PAGES + 63), 300)
    lazily.serve()
    for page in order:
        assert lazily.guest.touch(page) == lazily.page(page)
    assert lazily.guest.touch(3, 1) == lazily.small[3 * PAGE : 4 * PAGE]
    lazily.filled()
    for page in range(PAGES + 63):
        assert lazily.guest.touch(page) == lazily.page(page)
    lazily.right()
    told = lazily.lazy.status()
    assert (told["percent"], told["planned_all"], told["problem"], told["waiting"]) == (100, True, None, 0)
    assert (
        told["planned_bytes"]
        == told["resident_bytes"]
        == sum(
            any(each[at : at + PAGE]) * PAGE
            for each in (lazily.content, lazily.small)
            for at in range(0, len(each), PAGE)
        )
    )
    assert told["faults"] > 0
    assert 0 < told["fault_us_p50"] <= told["fault_us_p99"]


def test_what_stands_in_the_same_frame_comes_along_and_zeros_with_their_neighbours(lazily):
    lazily.serve()
    claims, first = lazily.lazy.claims, -(-PAGES // 16) * 16
    before = claims.word(record.FAULTS)
    assert lazily.guest.touch(first + 5) == bytes(PAGE)
    lazily.until(lambda: claims.pages["ram"][first : first + 16].all(), "its neighbours are missing")
    page = next(page for page in range(1000, PAGES) if any(lazily.page(page)))
    assert lazily.guest.touch(page) == lazily.page(page)
    lazily.until(lambda: claims.word(record.PLACED) >= 20, "nothing came along")  # of a frame of 32
    assert claims.word(record.FAULTS) == before + 2


def test_pages_that_are_placed_do_not_count_as_written_and_those_that_are_written_do(lazily):
    lazily.serve()
    first = next(page for page in range(PAGES) if any(lazily.page(page)))
    with lazily.files["ram"].open("rb") as file:
        [mapping] = shared_mappings(lazily.guest.identity.pid, file.fileno())
    with Userfaultfd.of(lazily.guest.identity.pid) as descriptor, Pagemap(descriptor.pid) as pagemap:
        descriptor.write_protect(mapping.start, mapping.size)
        lazily.guest.touch(first)
        lazily.filled()
        assert not len(pagemap.written([mapping], rearm=False))
        lazily.guest.touch(first + 1, verb="write")
        lazily.guest.touch(PAGES + 20, verb="write")  # zero in the generation
        dirty = ranges.from_numbers(np.array([first + 1, PAGES + 20], np.uint64), PAGE)
        assert np.array_equal(pagemap.written([mapping], rearm=False), dirty)
        descriptor.unregister(mapping.start, mapping.size)
    lazily.lazy.finish()
    assert sorted(each.name for each in lazily.folder.glob("lazy.*")) == []
    assert lazily.guest.touch(first) == lazily.page(first)


def test_a_page_that_is_punched_after_it_was_placed_is_zeros(lazily):
    lazily.serve()
    page = next(page for page in range(PAGES) if any(lazily.page(page)))
    assert lazily.guest.touch(page) == lazily.page(page)
    assert lazily.guest.touch(page, verb="punch") == bytes(PAGE)
    lazily.filled()
    assert lazily.guest.touch(page) == bytes(PAGE)


def test_servers_are_killed_again_and_again_and_no_page_is_lost_or_doubled(lazily):
    rng = random.Random(5)
    lazily.serve()
    lazily.lazy.hurry(on=False)
    for _ in range(11):
        placed = lazily.lazy.claims.word(record.PLACED) + rng.randrange(100)
        lazily.guest.begin("read", 0, page := rng.randrange(PAGES))
        lazily.until(
            lambda: lazily.lazy.claims.word(record.PLACED) >= placed or lazily.lazy.phase == record.DONE,  # noqa: B023  used up in this turn
            "it goes on",
        )
        lazily.lazy.kill()
        assert not lazily.lazy.claims.served()
        lazily.another()
        assert lazily.guest.end() == lazily.page(page)
    lazily.filled()
    lazily.right()
    assert lazily.lazy.status()["servers"] == 12


def test_a_server_that_is_stopped_while_somebody_waits_is_noticed_and_the_next_one_goes_on(lazily):
    lazily.serve()
    server, target = lazily.lazy.claims.word(record.SERVER), lazily.guest.identity.pid
    os.kill(server, signal.SIGSTOP)
    page = next(page for page in range(PAGES) if any(lazily.page(page)))
    lazily.guest.begin("read", 0, page)
    assert lazily.lazy.hung(target) == ""  # it may be that nobody had looked for long
    lazily.until(lambda: lazily.lazy.hung(target), "it is not noticed")
    assert f"process {server}) was stopped" in lazily.lazy.hung(target)
    assert lazily.guest.waits
    lazily.lazy.kill()
    lazily.another()
    assert lazily.guest.end() == lazily.page(page)
    assert lazily.lazy.hung(target) == ""
    lazily.filled()
    lazily.right()


def test_a_server_that_was_killed_between_placing_and_claiming_is_followed_by_one_that_knows_it(lazily):
    lazily.serve()
    lazily.filled()
    lazily.lazy.kill()
    claims = lazily.lazy.claims
    pages = [page for page in range(PAGES) if any(lazily.page(page))][10:14]
    claims.pages["ram"][pages[0] : pages[-1] + 1] = 0
    claims.intend(0, pages[0], pages[-1] + 1 - pages[0])
    lazily.another()
    lazily.filled()
    lazily.right()
    assert claims.pages["ram"][pages].all()
    assert not claims.word(record.INTENT_REGION)


def test_a_generation_that_is_forgotten_and_pruned_meanwhile_is_served_to_its_end(lazily):
    """By the next server, too; and what was missing when the VM ended is there."""
    repository = lazily.repository
    add(repository, "vm", {"ram": image(3, 50)})  # the latest is never forgotten
    lazily.serve()
    page = next(page for page in range(PAGES) if any(lazily.page(page)))
    assert lazily.guest.touch(page) == lazily.page(page)
    repository.forget(lazily.generation)
    prune(repository, PruneSettings())
    lazily.lazy.kill()
    lazily.another()
    page = next(page for page in reversed(range(PAGES)) if any(lazily.page(page)))
    assert lazily.guest.touch(page) == lazily.page(page)
    lazily.guest.close()
    lazily.until(lambda: not lazily.lazy.claims.served(), "the server ends with its guest")
    fill(repository, lazily.folder, ["ram", "pm0"])
    assert lazily.files["ram"].read_bytes() == lazily.content
    assert lazily.files["pm0"].read_bytes() == lazily.small


def test_a_page_that_nobody_of_us_has_placed_stops_everything(lazily):
    """Also for whoever takes over."""
    with lazily.files["ram"].open("r+b") as file:
        file.seek(77 * PAGE)
        file.write(b"\1")
    for _ in range(2):
        with pytest.raises(ConflictError, match="page 77 of region ram was there before"):
            lazily.serve()
        assert lazily.lazy.phase == record.BROKEN
        assert "page 77 of region ram" in lazily.lazy.held
        lazily.lazy.reap()


def test_a_page_that_appears_behind_our_back_stops_everything(lazily):
    page = next(page for page in reversed(range(PAGES)) if any(lazily.page(page)))
    lazily.serve()
    with lazily.files["ram"].open("r+b") as file:
        file.seek(page * PAGE)
        file.write(b"\1")
    lazily.lazy.hurry()
    lazily.until(lambda: lazily.lazy.phase == record.BROKEN, "it is never noticed")
    assert f"page {page} of region ram" in lazily.lazy.held


def test_what_cannot_be_read_holds_who_waits_for_it_until_it_can(lazily):
    packs, away = lazily.place.path / "packs", lazily.place.root / "away"
    shutil.copytree(packs, away)
    damaged = sorted(path for path in packs.iterdir() if path.is_file())
    for path in damaged:
        data = bytearray(path.read_bytes())
        for at in range(200, len(data) - 300, 50):  # every frame, but neither header nor footer
            data[at] ^= 1
        path.write_bytes(data)
    page = next(page for page in range(PAGES) if any(lazily.page(page)))
    lazily.serve()
    lazily.guest.begin("read", 0, page)
    lazily.until(lambda: lazily.lazy.held, "nothing is said")
    lazily.until(lambda: lazily.lazy.status()["waiting"] or "page map" in lazily.lazy.held, "nobody waits")
    assert "vm@1: " in lazily.lazy.held
    assert "packs/" in lazily.lazy.held
    assert lazily.guest.waits
    for path in damaged:
        path.write_bytes((away / path.name).read_bytes())
    assert lazily.guest.end() == lazily.page(page)
    lazily.filled()
    lazily.right()
    assert lazily.lazy.held == ""


def test_a_server_whose_index_was_made_anew_ends_and_the_next_one_goes_on(lazily):
    lazily.serve()
    server = os.pidfd_open(lazily.lazy.claims.word(record.SERVER))
    page, *_, other = (page for page in range(PAGES) if any(lazily.page(page)))
    assert lazily.guest.touch(page) == lazily.page(page)
    index_made_anew(lazily.place)
    lazily.guest.begin("read", 0, other)
    try:
        assert select.select([server], [], [], SECONDS)[0], "it goes on with an index that is gone"
    finally:
        os.close(server)
    assert lazily.guest.waits
    lazily.another()
    assert lazily.guest.end() == lazily.page(other)
    lazily.filled()
    assert lazily.lazy.held == ""
    with lazily.place.elsewhere() as repository, GenerationReader(repository, lazily.generation) as reader:
        for name, file in lazily.files.items():
            with file.open("rb") as opened:
                reader.verify(reader.region(name), opened.fileno(), str(file))


def test_what_an_ended_vm_had_not_touched_is_filled_in_before_it_is_captured(lazily):
    lazily.serve()
    page = next(page for page in range(PAGES) if any(lazily.page(page)))
    lazily.guest.touch(page, verb="write")
    lazily.guest.close()
    lazily.until(lambda: not lazily.lazy.claims.served(), "the server ends with its guest")
    fill(lazily.repository, lazily.folder, ["ram", "pm0"])
    with lazily.files["ram"].open("r+b") as file:
        file.seek(page * PAGE)
        assert file.read(1) == b"\7"
        file.seek(page * PAGE)
        file.write(lazily.page(page)[:1])
    lazily.right()
    assert sorted(each.name for each in lazily.folder.glob("lazy.*")) == []


@contextlib.contextmanager
def next_time(lazily, generation, *, plans=True):
    """The restore of a generation after one that is at its end: when what is known has been fetched, and no more; or
    with a server that takes over, and has not even planned."""
    lazily.lazy.finish()
    for file in lazily.files.values():
        size = file.stat().st_size
        os.truncate(file, 0)
        os.truncate(file, size)
    again = LazyRestore.begin(
        lazily.repository, generation, lazily.folder, lazily.files, lazily.folder, lazily.working_sets, lazily.nursery
    )
    guest = Guest(*lazily.files.values())
    try:
        again.claims.set(record.PACE, record.FAULTS_ONLY)
        again.serve(guest.identity)
        if plans:
            again.claims.set(record.PACE, record.FOR_A_SHARE)
            lazily.until(lambda: again.claims.word(record.FETCHED), "it never fetches")
            again.claims.set(record.PACE, record.FAULTS_ONLY)
        else:
            again.kill()
            again.serve(guest.identity)
        yield again, guest
    finally:
        guest.close()
        again.abandon()


def test_what_was_touched_is_fetched_ahead_the_next_time(lazily):
    lazily.serve()
    touched = [5, 1024, 1500, 2100, PAGES + 10]  # the second one begins a window, the last one is zeros
    for page in touched:
        lazily.guest.touch(page)
    lazily.filled()
    assert not lazily.lazy.status()["prefetched_bytes"]
    [known] = lazily.working_sets.iterdir()
    assert known.stat().st_mode & 0o077 == 0
    with next_time(lazily, lazily.generation) as (again, guest):
        assert again.status()["prefetched_bytes"] > 0
        for page in touched:
            assert guest.touch(page) == lazily.page(page)
        assert again.status()["faults"] == 0
        again.claims.set(record.PACE, record.AT_ONCE)
        lazily.until(lambda: again.phase == record.DONE, "it never ends")
        told = again.status()
        assert (told["resident_bytes"], told["percent"]) == (told["planned_bytes"], 100)
        assert again.claims.word(record.PLACED) == again.claims.word(record.PLANNED)


def test_pages_around_a_known_one_that_are_of_two_windows_count_once(lazily):
    lazily.serve()
    lazily.guest.touch(1024)  # the first one of a window
    lazily.filled()
    with next_time(lazily, lazily.generation, plans=False) as (again, guest):
        guest.touch(3)  # which plans the window before, and only that
        again.claims.set(record.PACE, record.AT_ONCE)
        lazily.until(lambda: again.phase == record.DONE, "it never ends")
        assert again.claims.word(record.PLACED) == again.claims.word(record.PLANNED)


def test_what_was_touched_is_fetched_ahead_from_the_next_generation_too(lazily):
    """Whatever is there by then."""
    touched = [5, 1500, 2100, PAGES + 10]
    later = bytearray(lazily.content)
    for page in (1500, PAGES + 10):
        later[page * PAGE : (page + 1) * PAGE] = bytes([page % 251]) * PAGE
    later[2100 * PAGE : 2101 * PAGE] = bytes(PAGE)
    generation = add(lazily.repository, "vm", {"ram": bytes(later), "pm0": lazily.small}, lazily.generation)
    lazily.serve()
    for page in touched:
        lazily.guest.touch(page)
    lazily.filled()
    with next_time(lazily, generation) as (again, guest):
        for page in touched:
            assert guest.touch(page) == later[page * PAGE : (page + 1) * PAGE]
        assert again.status()["faults"] == 0
        assert guest.touch(700) == later[700 * PAGE : 701 * PAGE]  # waited for: it comes before them from now on
        again.claims.set(record.PACE, record.AT_ONCE)
        lazily.until(lambda: again.phase == record.DONE, "it never ends")
    names = ["ram", "pm0"]
    assert WorkingSet.of(lazily.working_sets, generation, names).pages("ram").tolist() == [700, *touched]
    assert WorkingSet.of(lazily.working_sets, lazily.generation, names).pages("ram").tolist() == touched
    assert not len(WorkingSet.of(lazily.working_sets, generation, ["pm0"]).pages("pm0"))
