"""Page servers killed again and again while a guest is resumed: it never sees a wrong byte, and loses none of its own.

Six each time the tests run; as many as one likes with PERDURE_SOAK_KILLS=300. Each server is killed when it has placed
so and so many pages, sometimes none, sometimes before it is attached to QEMU; every third is only stopped, for the
supervisor to notice. Judged by the guest, which checks
every page of an area against checksums from before, in any order, and walks over another one that it writes, and at
the end by QEMU's own pmemsave of all memory against a generation that is captured then.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
from collections.abc import Iterator

import pytest
from supervised import NAME, PAGE, SECONDS, Image, Supervised
from test_back import reported
from test_full import ORDINARY, full, goes_on, judged, walked
from test_lazy import all_there, resume, words
from test_survival import boot

from restore import claims as record

pytestmark = pytest.mark.qemu

KILLS = int(os.environ.get("PERDURE_SOAK_KILLS", "6"))
KILLS_EACH = 25
"""In one resume; then it comes to its end, and everything is looked at."""
CLAIMS_FROM = PAGE
PLACED_MOST = 6000
"""Pages of a server before it is killed."""
CHECKED = """
import hashlib, random
SIZE = 32 << 20
area_pages = SIZE // PAGE
checked_area = mmap.mmap(-1, SIZE)
for page in range(area_pages):
    checked_area[page * PAGE : (page + 1) * PAGE] = random.Random(page).randbytes(64) * 64

def sum_of(page):
    return hashlib.blake2b(checked_area[page * PAGE : (page + 1) * PAGE], digest_size=8).digest()

sums, wrong, looked = [sum_of(page) for page in range(area_pages)], [], [0]

def look():
    page = random.randrange(area_pages)
    if sum_of(page) != sums[page]:
        wrong.append(page)
    looked[0] += 1

def look_at_all():
    return [page for page in range(area_pages) if checked_area[page * PAGE : (page + 1) * PAGE]
            != random.Random(page).randbytes(64) * 64]

work(look)
"""


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    with contextlib.closing(Supervised(guest_image)) as vm, reported(vm):
        yield vm


class Killer:
    """Of the page servers of one resume after the other."""

    def __init__(self, vm: Supervised) -> None:
        self.killed: set[int] = set()
        self._vm, self._chance, self._attached = vm, random.Random(KILLS), 0

    def resume(self, point: str) -> None:
        """Go back, and kill until all is there, or it is enough for now."""
        resume(self._vm, point)
        self._attached = 0
        target = min(KILLS, len(self.killed) + KILLS_EACH)
        while len(self.killed) < target and self._one():
            pass

    def _one(self) -> bool:
        """End a server that is new, at some moment of its life; whether there was one before all was there."""
        vm, chance = self._vm, self._chance
        vm.until(lambda: finished(vm) or words(vm, record.SERVER) not in (0, *self.killed), "another page server")
        server = words(vm, record.SERVER)
        limit = chance.choice((None, 0, chance.randrange(100), chance.randrange(PLACED_MOST)))
        if limit is not None:
            vm.until(lambda: finished(vm) or words(vm, record.SERVERS) > self._attached, "it serves")
            began = placed(vm)
            vm.until(lambda: finished(vm) or placed(vm) >= began + limit, "it has placed some pages")
        if finished(vm):
            return False
        hangs = limit is not None and len(self.killed) % 3 == 1
        self.killed.add(server)
        with contextlib.suppress(ProcessLookupError):  # it had come to its end
            descriptor = os.pidfd_open(server)
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP if hangs else signal.SIGKILL)
            assert select.select([descriptor], [], [], SECONDS)[0]
            os.close(descriptor)
        self._attached = words(vm, record.SERVERS)
        return True


def placed(vm: Supervised) -> int:
    """Pages that are claimed."""
    with contextlib.suppress(FileNotFoundError):
        for path in vm.runtime.glob(f"memory*/{record.CLAIMS}"):
            return path.read_bytes()[CLAIMS_FROM:].count(1)
    return 0


def finished(vm: Supervised) -> bool:
    """Whether all is there, or nothing is left of the restore."""
    return not list(vm.runtime.glob(f"memory*/{record.FACTS}")) or words(vm, record.PHASE) == record.DONE


@pytest.mark.timeout(300 + 4 * KILLS)  # every third one hangs, which takes the supervisor two seconds to be sure of
def test_page_servers_that_are_killed_again_and_again_give_no_wrong_byte(vm: Supervised) -> None:
    boot(vm)
    vm.guest.run(ORDINARY + CHECKED, SECONDS)
    goes_on(vm)
    point, booted = f"{NAME}@{full(vm)['generation']}", vm.guest.boot_id
    killer, resumes = Killer(vm), 0
    while len(killer.killed) < KILLS:
        killer.resume(point)
        resumes += 1
        assert vm.guest.wait_ready(SECONDS) == booted
        all_there(vm)
        looked, step = vm.guest.run("looked[0]"), walked(vm)
        assert vm.guest.run("look_at_all()", SECONDS) == []
        vm.until(lambda: vm.guest.run("looked[0]") > looked, "the guest goes on")  # noqa: B023  used up in this turn
        assert vm.guest.run("wrong[:3]") == []
        goes_on(vm)
        assert walked(vm) > step
    judged(vm)
    print(f"{len(killer.killed)} page servers killed in {resumes} resumes")
