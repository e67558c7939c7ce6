"""A process that dies at any step of a capture: whatever is listed afterwards restores bit for bit."""

import os
import signal

import pytest
from store_fixtures import add, content, image, place

from base.disk import Disk
from base.errors import PerdureError, StorageError
from base.workers import WorkerPool
from store.chunker import PackingSettings
from store.workers import serve

SMALL_PACKS = PackingSettings(pack_bytes=300_000)


class CountingDisk(Disk):
    """Does something at one step; before that, what a Disk does."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act, self.seen = at, act, []

    def step(self, operation: str, path: str) -> None:
        self.seen.append(operation)
        if len(self.seen) == self.at:
            self.act(operation, path)


class WorkersDisk(CountingDisk):
    """Does it in worker processes only; each counts its own steps."""

    def __init__(self, at: int, act) -> None:
        super().__init__(at, act)
        self.owner = os.getpid()

    def step(self, operation: str, path: str) -> None:
        if os.getpid() != self.owner:
            super().step(operation, path)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(operation, path):
    raise StorageError(path, f"cannot {operation}: no space left on device", errno=28)


def steps_of_a_capture(data: list[bytes]) -> int:
    with place(SMALL_PACKS) as where:
        disk = CountingDisk(0, die)
        with where.open(disk=disk) as repository:
            first = add(repository, "vm", {"ram": data[0]})
            before = len(disk.seen)
            add(repository, "vm", {"ram": data[1]}, first)
            assert {"fsync", "link", "fsync directory", "lmdb commit", "unlink"} <= set(disk.seen[before:])
            return len(disk.seen) - before


def images() -> list[bytes]:
    """Three states of about a megabyte, so that a capture has several packs of data and one of nodes."""
    first = image(1, 500)
    second = image(2, 300) + first[300 * 4096 :]
    return [first, second, image(3, 100) + second[100 * 4096 :]]


def check_everything(where, expected: dict[int, bytes]) -> list[int]:
    """Every listed generation restores, here and on a host that has not seen the repository; gives their numbers."""
    for open_repository in (where.open, where.elsewhere):
        with open_repository() as repository:
            listed = repository.generations("vm")
            for generation in listed:
                assert content(repository, generation, "ram") == expected[generation.number]
    return [each.number for each in listed]


def in_child(work) -> int:
    """Run in a forked process; gives its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_killed_at_every_step():
    data = images()
    outcomes = set()
    for step in range(1, steps_of_a_capture(data) + 1):
        with place(SMALL_PACKS) as where:
            with where.open() as repository:
                add(repository, "vm", {"ram": data[0]})

            def work(step=step, where=where):
                disk = CountingDisk(-1, die)
                with where.open(disk=disk) as repository:
                    disk.at = len(disk.seen) + step
                    add(repository, "vm", {"ram": data[1]}, repository.resolve("vm@1"))

            assert os.WIFSIGNALED(in_child(work)), step
            numbers = check_everything(where, {1: data[0], 2: data[1]})
            outcomes.add(tuple(numbers))
            with where.open() as repository:  # and the next capture is right
                after = add(repository, "vm", {"ram": data[2]}, repository.resolve("vm@latest"))
                assert after.number == numbers[-1] + 1
                assert content(repository, after, "ram") == data[2]
                leftovers = [path.name for path in (where.path / "packs").iterdir() if path.name.startswith(".")]
                assert not leftovers
    assert outcomes == {(1,), (1, 2)}  # before the commit, and after it


def test_an_error_at_every_step_leaves_nothing_half_made():
    data = images()
    for step in range(1, steps_of_a_capture(data) + 1):
        with place(SMALL_PACKS) as where:
            disk = CountingDisk(-1, fail)
            with where.open(disk=disk) as repository:
                first = add(repository, "vm", {"ram": data[0]})
                packs = set((where.path / "packs").iterdir())
                disk.at = len(disk.seen) + step
                try:
                    add(repository, "vm", {"ram": data[1]}, first)
                    committed = True
                except StorageError:
                    committed = False
                refused = disk.seen[disk.at - 1]
                disk.at = -1
                repository.refresh()
                numbers = [each.number for each in repository.generations("vm")]
                if committed:
                    assert numbers == [1, 2]
                if numbers == [1] and refused != "unlink":
                    assert not set((where.path / "packs").iterdir()) - packs
                after = add(repository, "vm", {"ram": data[2]}, repository.resolve("vm@latest"))
                assert content(repository, after, "ram") == data[2]
            expected = {1: data[0], 2: data[1], 3: data[2]} if 2 in numbers else {1: data[0], 2: data[2]}
            check_everything(where, expected)


@pytest.mark.parametrize("act", [die, fail])
def test_a_worker_that_dies_or_fails_fails_the_capture_only(act):
    data = image(7, 9000)
    for step in (1, 2, 5, 8):
        with place() as where:
            disk = WorkersDisk(step, act)
            with WorkerPool(2, serve) as pool, where.open(disk=disk, pool=pool) as repository:
                with pytest.raises(PerdureError):
                    add(repository, "vm", {"ram": data})
                assert repository.vms() == []
                repository.pool = None
                assert content(repository, add(repository, "vm", {"ram": data}), "ram") == data
