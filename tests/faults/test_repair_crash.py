"""A repair that dies at any of its disk's steps: what is left is whole or marked, and the next repair ends the work."""

import os
import random
import signal
from contextlib import suppress

from store_fixtures import add, content, place

from base.disk import Disk
from base.errors import IntegrityError
from store.chunker import PackingSettings
from store.format import PACK_DATA
from store.upkeep.check import check_repository
from store.upkeep.repair import repair

SMALL_PACKS = PackingSettings(pack_bytes=100_000, frame_bytes=64 << 10)
PAGE = 4096
DATA = {1: random.Random(1).randbytes(80 * PAGE)}
DATA[2] = random.Random(2).randbytes(30 * PAGE) + DATA[1][30 * PAGE :]


class DyingDisk(Disk):
    """Kills its process at a step; counts them."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count = at, 0

    def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # the seam's
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def damaged(where) -> None:
    """The first frame is damaged, which only the first generation needs."""
    with where.open() as repository:
        first = add(repository, "vm", {"ram": DATA[1]})
        add(repository, "vm", {"ram": DATA[2]}, first)
        with repository.environment.read() as txn:
            numbers = repository.catalog.pack_numbers(txn)
        headers = [repository.catalog.pack(number).header for number in numbers]
        packs = [where.path / "packs" / each.pack_id.hex() for each in headers if each.kind == PACK_DATA]
    data = bytearray(packs[0].read_bytes())
    data[200] ^= 1
    packs[0].write_bytes(data)


def readable(repository) -> dict[int, bool]:
    found = {}
    for generation in repository.generations("vm"):
        found[generation.number] = False
        with suppress(IntegrityError):
            assert content(repository, generation, "ram") == DATA[generation.number]
            found[generation.number] = True
    return found


def repaired(where, disk: Disk) -> None:
    with where.open(disk=disk) as repository:
        repair(repository)


def test_killed_at_every_step():
    with place(SMALL_PACKS) as where:
        damaged(where)
        disk = DyingDisk()
        repaired(where, disk)
    assert disk.count > 15
    for step in range(1, disk.count + 1):
        with place(SMALL_PACKS) as where:
            damaged(where)
            pid = os.fork()
            if pid == 0:
                try:
                    repaired(where, DyingDisk(step))
                finally:
                    os._exit(0)
            status = os.waitpid(pid, 0)[1]
            assert os.WIFSIGNALED(status), step
            for open_repository in (where.open, where.elsewhere):
                with open_repository() as repository:
                    assert readable(repository) == {1: False, 2: True}, step
            repaired(where, Disk())
            for open_repository in (where.open, where.elsewhere):
                with open_repository() as repository:
                    assert readable(repository) == {1: False, 2: True}, step
                    report = check_repository(repository, read_data=True)
                    assert report.findings == [], step
                    assert [each.name for each in report.hurt] == ["vm@1"], step
                    assert [bool(each.hurt) for each in repository.generations("vm")] == [True, False]
