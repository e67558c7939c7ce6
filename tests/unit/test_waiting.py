"""Who waits for whom among processes: readers for nobody, writers for a bounded time, and then they say for whom."""

import os
import threading
from contextlib import contextmanager

import pytest
from store_fixtures import add, content, image, place

from base import locks
from base.disk import Disk
from base.errors import LockedError
from store.catalog import INDEX_FOLDER
from store.upkeep.check import check_repository

ENOUGH_S = 20.0
"""A reader that waits in spite of all gets an error after that, and no other test is slower for it."""


class Stopping(Disk):
    """Stops before one kind of step, until its owner is told to go on."""

    def __init__(self, operation: str, reached: int, onward: int) -> None:
        self.operation, self.reached, self.onward = operation, reached, onward
        self.armed = False

    def step(self, operation: str, path: str) -> None:  # noqa: ARG002  # a Disk's
        if self.armed and operation == self.operation:
            self.armed = False
            os.write(self.reached, b".")
            os.read(self.onward, 1)


@contextmanager
def another(where, work, *, before="lmdb commit"):
    """Another process that does `work(repository, arm)` and stands still before a step once armed; gives its pid."""
    reached, onward = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(onward[1])
            disk = Stopping(before, reached[1], onward[0])
            work(where, disk)
            status = 0
        finally:
            os._exit(status)
    os.close(reached[1])
    os.close(onward[0])
    try:
        assert os.read(reached[0], 1) == b"."
        yield pid
    finally:
        os.close(onward[1])
        assert os.waitpid(pid, 0)[1] == 0
        os.close(reached[0])


def commits(where, disk) -> None:
    with where.open(disk=disk) as repository:
        disk.armed = True
        add(repository, "vm", {"ram": image(9, 40)}, repository.resolve("vm@1"))


def merges(where, disk) -> None:
    with where.open(disk=disk) as repository, repository.environment.role("merge") as mine:
        assert mine
        disk.armed = True
        disk.step(disk.operation, "")


def indexes(where, disk) -> None:
    disk.armed = True
    where.open(disk=disk).close()


@pytest.mark.parametrize("before", ["link", "lmdb commit"])
def test_a_reader_does_not_wait_for_a_commit_whether_its_record_is_published_or_not(before):
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 40)})
        with another(where, commits, before=before) as pid, where.open(lock_wait_s=ENOUGH_S) as repository:
            listed = repository.generations("vm")
            assert [each.number for each in listed] == [1]
            assert content(repository, listed[0], "ram") == image(1, 40)
            assert repository.changed(None, listed[0])["ram"].size
            assert check_repository(repository, read_data=True).findings == []
            assert repository.environment.directory == where.state / INDEX_FOLDER
            held = locks.holder(where.state / INDEX_FOLDER / "writing")
            assert before == "link" or (held.pid, held.purpose) == (pid, "committing a generation")
        with where.open() as repository:
            assert content(repository, repository.resolve("vm@2"), "ram") == image(9, 40)


def test_a_reader_that_is_open_already_does_not_wait_either():
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 40)})
        reached, onward = os.pipe(), os.pipe()
        pid = os.fork()  # the reader: opens, then reads when the writer stands in its transaction
        if pid == 0:
            status = 1
            try:
                with where.open(lock_wait_s=ENOUGH_S) as repository:
                    os.write(reached[1], b".")
                    os.read(onward[0], 1)
                    assert content(repository, repository.resolve("vm@1"), "ram") == image(1, 40)
                    status = 0
            finally:
                os._exit(status)
        assert os.read(reached[0], 1) == b"."
        with another(where, commits):
            os.write(onward[1], b".")
            assert os.waitpid(pid, 0)[1] == 0
        for each in (*reached, *onward):
            os.close(each)


def test_a_writer_waits_for_a_bounded_time_and_says_for_whom():
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 40)})
        with another(where, commits) as pid, where.open(lock_wait_s=0.05) as repository:
            packs = set((where.path / "packs").iterdir())
            with pytest.raises(LockedError, match="committing a generation") as caught:
                add(repository, "other", {"ram": image(2, 40)})
            assert (caught.value.pid, caught.value.purpose) == (pid, "committing a generation")
            assert caught.value.host and caught.value.since
            assert caught.value.exit_code == 11
            assert set((where.path / "packs").iterdir()) == packs
        with where.open(lock_wait_s=0.05) as repository:
            assert add(repository, "other", {"ram": image(2, 40)}).number == 1


def test_who_opened_it_while_another_wrote_can_write_afterwards_beside_its_own_readers():
    with place() as where:
        with where.open() as repository:
            first = add(repository, "vm", {"ram": image(1, 40)})
        context = another(where, commits)
        context.__enter__()
        with where.open(lock_wait_s=ENOUGH_S) as repository:
            begin, errors = threading.Barrier(3), []

            def read() -> None:
                begin.wait()
                for _ in range(30):
                    try:
                        with repository.environment.read() as txn:
                            assert repository.catalog.generation(txn, "vm", 1).id == first.id
                    except BaseException as error:
                        errors.append(error)

            readers = [threading.Thread(target=read) for _ in range(2)]
            for each in readers:
                each.start()
            context.__exit__(None, None, None)
            begin.wait()
            made = add(repository, "vm", {"ram": image(3, 40)}, first)
            for each in readers:
                each.join()
            assert not errors
            assert made.number == 3
            assert content(repository, made, "ram") == image(3, 40)


def test_who_finds_the_index_being_filled_waits_for_that_and_sees_everything():
    with place() as where:
        with where.elsewhere() as repository:
            for seed in range(1, 4):
                add(repository, "vm", {"ram": image(seed, 10)})
        with another(where, indexes) as pid:
            with pytest.raises(LockedError) as caught:
                where.open(lock_wait_s=0.05)
            assert (caught.value.pid, caught.value.purpose) == (pid, "indexing records")
            opened = []
            thread = threading.Thread(target=lambda: opened.append(where.open(lock_wait_s=ENOUGH_S)))
            thread.start()
        thread.join()
        with opened[0] as repository:
            assert [each.number for each in repository.generations("vm")] == [1, 2, 3]


def test_a_role_keeps_nobody_from_reading_or_writing():
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 40)})
        with another(where, merges), where.open(lock_wait_s=0) as repository:
            assert content(repository, repository.resolve("vm@1"), "ram") == image(1, 40)
            assert add(repository, "vm", {"ram": image(2, 40)}).number == 2


def test_merging_makes_way_for_a_commit():
    with place() as where:
        with where.open() as repository:
            for seed in range(12):
                add(repository, "vm", {"ram": image(seed, 40)})
        with another(where, commits), where.open(lock_wait_s=ENOUGH_S) as repository:
            with pytest.raises(LockedError):
                while repository.index.merge_step():
                    pass
                with repository.environment.write(wait_s=0):
                    pass
            repository.tidy(1.0)  # gives up at once, and so does closing


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    with locks.held(path, "counting sheep", 0):
        held = locks.holder(path)
        assert (held.pid, held.purpose) == (os.getpid(), "counting sheep")
        with pytest.raises(LockedError, match="counting sheep") as caught, locks.held(path, "another", 0.02):
            pass
        assert (caught.value.pid, caught.value.host, caught.value.since) == (os.getpid(), held.host, held.since)
    assert locks.holder(path) is None
    reached = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locks.held(path, "dying", 0):
            os.write(reached[1], b".")
            os.kill(os.getpid(), 9)
    assert os.read(reached[0], 1) == b"."
    os.waitpid(pid, 0)
    assert locks.holder(path) is None
    with locks.held(path, "after it", 0):
        assert locks.holder(path).purpose == "after it"
    for each in reached:
        os.close(each)
