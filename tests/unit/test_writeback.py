"""Write-back: whatever is stored ahead, given up or interrupted, a generation is what memory was at its instant."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from capture_fixtures import EVERYTHING, PAGES, WritingGuest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import Place, place

from base import extents as ranges
from base.disk import Disk
from base.errors import StorageError
from base.units import PAGE
from capture.heat import Heat
from capture.journal import Journal
from capture.pace import LOOK_SECONDS_MAX, LOOK_SECONDS_MIN, Budget, Pace
from capture.writeback import Plan, WriteBack
from store.repository import Repository
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from vm.identity import Identity

FAST = Budget(1 << 40, 1.0)


@pytest.fixture
def where() -> Iterator[Place]:
    with place() as made:
        yield made


class Drained:
    """A guest and its write-back, which looks as often as it is asked."""

    def __init__(self, repository: Repository, folder: Path, pages: int) -> None:
        self.repository = repository
        self.guest = WritingGuest(folder, [pages])
        self.writeback = WriteBack(repository, "vm", FAST)

    def step(self) -> None:
        self.writeback.pace.look_seconds = 0.0
        guest = self.guest
        bases = {"pm0": guest.parent} if guest.parent is not None and guest.baseline else {}
        self.writeback.step(Plan([guest.region()], guest.parent, bases, False), guest.journal)

    def capture(self):
        return self.guest.capture(self.repository, making=self.writeback.take())


def packs(place: Place) -> set[str]:
    return {each.name for each in (place.path / "packs").rglob("*") if each.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_between_captures_they_are_what_memory_was(where, tmp_path, seed, monkeypatch):
    monkeypatch.setattr("store.leases._YIELD_SECONDS", 0.0)  # nobody is there to give way meanwhile
    chance = random.Random(seed)
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 40)
        for _ in range(14):
            for _ in range(chance.randrange(6)):
                vm.guest.write()
                what = chance.choice(["step", "step", "step", "step", "drop", "kept", "forget", "prune", "supervisor"])
                if what == "step":
                    vm.step()
                elif what == "drop":
                    vm.writeback.drop()
                elif what == "kept":
                    start = chance.randrange(PAGES // 2)
                    vm.guest.kept = ranges.normalise([(0, 8 * PAGE), (start * PAGE, (start + PAGES // 3) * PAGE)])
                elif what == "forget" and vm.guest.parent and repository.has(vm.guest.parent):
                    repository.forget(vm.guest.parent)
                elif what == "prune":
                    vm.writeback._checked_at = 0.0  # two seconds have passed, whoever prunes would have waited them
                    prune(repository, PruneSettings(max_unused_percent=0.0))
                else:  # a crash: what the journal says is all that is known
                    vm.writeback.drop()
                    vm.guest.baseline = vm.guest.parent is not None and vm.guest.journal.baseline("pm0") is not None
                    vm.guest.since = ranges.EMPTY if vm.guest.baseline else None
            vm.capture()
        vm.writeback.drop()
        assert not check_repository(repository).findings


def test_most_of_what_is_dirty_is_stored_ahead_and_hot_pages_are_left_for_last(where, tmp_path):
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 0)
        guest = vm.guest
        guest.capture(repository)
        guest.plan = [2000]
        guest.write()
        guest.plan = [0]
        hot = set(range(100))
        for _ in range(12):
            vm.step()
            with guest.path.open("r+b") as file:
                for page in hot:
                    file.seek(page * PAGE)
                    file.write(guest.random.randbytes(64))
            guest.written |= hot
        making = vm.writeback._making
        assert making is not None
        [source] = making.open([guest.region()], full=False)
        assert set(ranges.numbers(source.pending, PAGE).tolist()) == hot
        assert vm.writeback.standing.stored_bytes >= 1900 * PAGE
        stored = vm.writeback.standing.stored_bytes
        assert stored <= 2100 * PAGE  # hot ones are not stored again and again
        before = guest.journal.baseline("pm0")
        assert before is None  # bits were cleared: it was written down
        made = vm.capture().generation
        assert guest.journal.baseline("pm0") == made.id


def test_what_is_given_up_leaves_nothing_in_the_repository(where, tmp_path):
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 3000)
        vm.guest.write()
        vm.capture()
        before = packs(where)
        vm.guest.write()
        for _ in range(4):
            vm.step()
        assert vm.writeback.standing.stored_bytes
        vm.writeback.drop()
        assert packs(where) == before
        vm.capture()


def test_who_prunes_is_given_way_to(where, tmp_path):
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 3000)
        for _ in range(3):
            vm.guest.write()
            vm.capture()
        vm.guest.write()
        vm.step()
        vm.step()
        first = vm.writeback._making
        assert first is not None and not first.writer.in_the_way
        for each in repository.generations("vm")[:-1]:
            repository.forget(each)
        published = [each for each in packs(where) if not each.startswith(".")]
        repository.doom([bytes.fromhex(min(published))])
        assert first.writer.in_the_way
        vm.writeback._checked_at = 0.0
        vm.step()
        assert vm.writeback._making is not first
        vm.capture()


def test_an_error_gives_up_what_was_stored_ahead_and_the_next_capture_has_everything(where, tmp_path, monkeypatch):
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 1000)
        vm.guest.write()
        vm.capture()
        vm.guest.write()
        vm.step()

        def full(*_, **__):
            raise StorageError("packs", "the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("store.writer.GenerationWriter.replace", full)
            with pytest.raises(StorageError):
                for _ in range(3):
                    vm.step()
        assert vm.writeback.take() is None
        vm.capture()


def test_a_guest_that_writes_the_same_again_and_again_does_not_fill_the_store(where, tmp_path, monkeypatch):
    monkeypatch.setattr("capture.writeback._VAIN_MIN", 256 * PAGE)
    monkeypatch.setattr("capture.writeback._VAIN_SHARE", 0.0)
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 0)
        guest = vm.guest
        guest.capture(repository)
        before = sum((where.path / "packs" / name).stat().st_size for name in packs(where))
        for turn in range(60):
            if turn % 2 == 0:  # they rest for a look, are stored, and are written again
                with guest.path.open("r+b") as file:
                    file.write(guest.random.randbytes(300 * PAGE))
                guest.written |= set(range(300))
            vm.step()
        assert vm.writeback.standing.reason is not None
        assert sum((where.path / "packs" / name).stat().st_size for name in packs(where)) - before < 1000 * PAGE
        vm.capture()
        guest.plan = [400]
        guest.write()
        vm.step()
        vm.step()
        assert vm.writeback.standing.reason is None
        vm.capture()


def test_another_qemu_begins_anew_and_its_journal_knows_of_it(where, tmp_path):
    with where.open() as repository:
        vm = Drained(repository, tmp_path, 1000)
        vm.guest.write()
        vm.capture()
        vm.guest.write()
        vm.step()
        first = vm.writeback._making
        noted = vm.guest.journal
        vm.guest.journal = Journal(tmp_path / "another.json", Identity(1, 2, ""), Disk())
        vm.guest.journal.committed(vm.guest.parent.id, ["pm0"])
        assert vm.guest.journal.baseline("pm0") == vm.guest.parent.id
        vm.step()
        assert vm.writeback._making is not first
        assert vm.guest.journal is not noted and vm.guest.journal.baseline("pm0") is None


looks = st.lists(st.sets(st.integers(0, 40), max_size=20), min_size=1, max_size=12)


@given(looks, st.sets(st.integers(0, 40)), st.integers(0, 50))
def test_heat_is_what_the_last_eight_looks_found(found, pending, count):
    heat = Heat()
    for each in found:
        heat.look(extents(each))

    def temperature(page: int) -> int:
        return sum(128 >> age for age, each in enumerate(found[::-1][:8]) if page in each)

    cold = ranges.numbers(heat.coldest(extents(pending), count * PAGE), PAGE).tolist()
    resting = sorted((page for page in pending if temperature(page) < 128), key=lambda page: (temperature(page), page))
    assert cold == sorted(resting[:count])


def extents(pages: set[int]) -> ranges.Extents:
    return ranges.from_numbers(np.array(sorted(pages), np.uint64), PAGE)


def test_the_pace_keeps_both_limits_and_follows_the_guest():
    pace = Pace(Budget(10 << 20, 0.25))
    assert pace.rest(10 << 20, 0.01, 0.1) == pytest.approx(0.9)
    assert pace.rest(1 << 10, 0.5, 0.5) == pytest.approx(1.5)
    assert pace.rest(0, 0.0, 0.0) == 0.0
    for _ in range(5):
        pace.looked(1.0, 8 << 20, 4 << 20, 4 << 20)  # all of it was in vain
    assert pace.look_seconds == LOOK_SECONDS_MAX
    for _ in range(5):
        pace.looked(1.0, 8 << 20, 4 << 20, 0)
    assert pace.look_seconds == LOOK_SECONDS_MIN
    assert pace.dirty_rate == pytest.approx(8 << 20, rel=0.05)
    assert len(EVERYTHING) == 1
