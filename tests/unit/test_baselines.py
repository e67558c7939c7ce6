"""What the next generation is compared with: whatever fails, is scrubbed or tagged between two captures, it has what
memory has."""

import pytest
from machine_fixtures import AREA, DEVICES, INSIDE, OUTSIDE, supervised

from base.disk import Disk
from base.errors import IntegrityError, StorageError
from base.units import PAGE
from perdure.supervision.execution import Execution
from store.repository import Repository
from store.writer import GenerationWriter
from vm.regions import RegionTable


@pytest.fixture
def guest():
    with supervised() as made:
        yield made


class Full(Disk):
    """Has room for so many more writes of a file; None: of any number."""

    def __init__(self, name):
        self.name, self.room, self.refused = name, None, 0

    def step(self, operation, path):
        if operation == "create" and self.name in path and self.room is not None:
            if not self.room:
                self.refused += 1
                raise StorageError(path, "No space left on device")
            self.room -= 1


@pytest.mark.parametrize(("file", "room"), [("journal.json", 1), ("regions.json", 0)])
def test_a_file_that_cannot_be_written_after_the_commit_changes_no_baseline_alone(file, room):
    """Of the journal, what is written before a bit is cleared could be written still."""
    disk = Full(file)
    with supervised(disk) as guest:
        guest.table.mark(*AREA)
        guest.write(INSIDE, 1)
        guest.capture()
        guest.write(INSIDE, 2)
        disk.room = room
        second = guest.capture()
        assert disk.refused == 1
        assert guest.machine.parent == second
        disk.room = None
        guest.write(INSIDE + 1, 3)
        third = guest.capture()
        assert third.parent == second.id
        assert [guest.captured_page(third, page) for page in (INSIDE, INSIDE + 1)] == [2, 3]


@pytest.mark.parametrize("error", [StorageError("packs", "cannot be read"), IntegrityError("packs", "is damaged")])
def test_where_a_generation_differs_may_be_unreadable_and_it_is_made_all_the_same(monkeypatch, error):
    def fail(*_, **__):
        raise error

    with supervised() as guest:
        guest.table.mark(*AREA)
        guest.write(INSIDE, 1)
        first = guest.capture()
        guest.write(INSIDE, 2)
        with monkeypatch.context() as patched:
            patched.setattr(Repository, "changed", fail)
            second = guest.capture()
        assert guest.machine.parent == second
        assert [tag.generation for tag in guest.table.regions.tags] == [second.number]  # it may have changed
        assert first.id == second.parent
        guest.write(INSIDE + 1, 3)
        third = guest.capture()
        assert [guest.captured_page(third, page) for page in (INSIDE, INSIDE + 1)] == [2, 3]


def test_an_error_after_the_commit_moves_no_baseline(monkeypatch):
    """As where the lease cannot be given back."""
    close = GenerationWriter.close

    def closed(writer):
        close(writer)
        raise StorageError("leases", "cannot be removed")

    with supervised() as guest:
        guest.table.mark(*AREA)
        guest.write(INSIDE, 1)
        first = guest.capture()
        guest.write(INSIDE, 2)
        with monkeypatch.context() as patched, pytest.raises(StorageError, match="cannot be removed"):
            patched.setattr(GenerationWriter, "close", closed)
            guest.capture()
        assert guest.machine.parent == first
        guest.write(INSIDE + 1, 3)
        third = guest.capture()
        assert [guest.captured_page(third, page) for page in (INSIDE, INSIDE + 1)] == [2, 3]


def test_what_is_scrubbed_stays_so_when_it_is_tagged_again(guest):
    """Untagged since the last generation, scrubbed at a reboot before which nothing was captured, and tagged again."""
    guest.table.mark(*AREA)
    guest.write(INSIDE, 1)
    guest.capture()
    guest.table.unmark(*AREA)
    assert guest.machine.scrub() == PAGE
    guest.table.mark(*AREA)
    guest.write(INSIDE + 1, 2)
    after = guest.capture()
    assert [guest.captured_page(after, page) for page in (INSIDE, INSIDE + 1)] == [0, 2]


def test_a_scrub_of_what_no_generation_has_costs_no_scan(guest):
    guest.table.mark(*AREA)
    guest.write(INSIDE, 1)
    guest.write(OUTSIDE, 1)
    guest.capture()
    assert guest.machine.scrub() == PAGE
    if guest.machine.tracking.choice.kind == "userfaultfd":  # as it is where the kernel has PAGEMAP_SCAN
        assert guest.machine.tracking.trackers["pm0"].peek().extents is not None


def mark(guest):
    guest.table.mark(*AREA)


def unmark(guest):
    guest.table.unmark(*AREA)


@pytest.mark.parametrize(("before", "meanwhile"), [((), mark), ((mark,), unmark)])
def test_tags_that_change_while_a_capture_begins_are_those_of_what_it_keeps(guest, before, meanwhile):
    for each in before:
        each(guest)
    guest.write(INSIDE, 1)
    guest.served.append(lambda: meanwhile(guest))
    made = guest.capture()
    assert not guest.served
    table = RegionTable.from_tags(guest.path.with_name("restored"), "vm", DEVICES, made.metadata["tags"])
    assert table.regions.kept("pm0").tolist() == made.metadata["kept"]["pm0"]
    assert guest.captured_page(made, INSIDE) == (1 if table.regions.tags else 0)
    after = guest.capture()
    assert guest.captured_page(after, INSIDE) == (1 if guest.table.regions.tags else 0)


def test_the_tags_of_an_instant_are_those_of_what_it_keeps(guest):
    instant = Execution(guest.machine, None)
    mark(guest)
    kept = instant.kept_now()["pm0"]
    unmark(guest)
    made = RegionTable.from_tags(guest.path.with_name("restored"), "vm", DEVICES, instant.facts["tags"])
    assert kept.tolist() == made.regions.kept("pm0").tolist()
    assert len(made.regions.tags) == 1
