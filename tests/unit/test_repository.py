"""Generations in and out, against plain bytes."""

import os
import random
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from store_fixtures import PASSPHRASE, add, content, image, memory_file, place

from base import extents as ranges
from base.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    RepositoryMissingError,
    UsageError,
    WrongPassphraseError,
)
from base.workers import WorkerPool
from store.catalog import INDEX_FOLDER
from store.creation import create, read_mark
from store.keyring.files import read_key_files
from store.keyring.slots import change, unlock
from store.reader import GenerationReader
from store.workers import serve

PAGE = 4096


def test_a_generation_comes_back_bit_for_bit():
    with place() as where, where.open() as repository:
        data = image(1, 700)
        first = add(repository, "vm", {"ram": data, "disk": image(2, 33)})
        assert (first.number, first.parent, first.name) == (1, None, "vm@1")
        assert content(repository, first, "ram") == data
        assert content(repository, first, "disk") == image(2, 33)


def test_dirty_ranges_are_all_that_is_read():
    with place() as where, where.open() as repository:
        data = bytearray(image(3, 300))
        first = add(repository, "vm", {"ram": bytes(data)})
        data[5 * PAGE : 6 * PAGE] = b"\xee" * PAGE
        data[7 * PAGE : 8 * PAGE] = b"\xdd" * PAGE  # changed, but not said to be
        second = add(repository, "vm", {"ram": bytes(data)}, first, {"ram": ranges.normalise([(5 * PAGE, 6 * PAGE)])})
        assert second.parent == first.id
        assert second.dirty_bytes <= PAGE
        found = content(repository, second, "ram")
        assert found[5 * PAGE : 6 * PAGE] == b"\xee" * PAGE
        assert found[7 * PAGE : 8 * PAGE] == image(3, 300)[7 * PAGE : 8 * PAGE]


def test_an_unchanged_image_stores_next_to_nothing():
    with place() as where, where.open() as repository:
        data = image(4, 500)
        first = add(repository, "vm", {"ram": data})
        second = add(repository, "vm", {"ram": data}, first)
        other = add(repository, "other", {"ram": data})
        assert second.dirty_bytes == 0
        assert second.stored_bytes == other.stored_bytes == 0
        assert second.regions["ram"].root == first.regions["ram"].root == other.regions["ram"].root


def test_worker_processes_make_the_same_generation():
    with place() as where, WorkerPool(2, serve) as pool, where.open(pool=pool) as repository:
        data = image(5, 9000)
        with_workers = add(repository, "vm", {"ram": data})
        assert with_workers.stored_bytes > 0
        assert content(repository, with_workers, "ram") == data
        repository.pool = None
        without = add(repository, "vm", {"ram": data})
        assert without.regions["ram"].root == with_workers.regions["ram"].root


def test_every_other_page_goes_through_worker_processes():
    """As many ranges as pages: batches are full of ranges, are judged together, and come back in any order."""
    with place() as where, WorkerPool(2, serve) as pool, where.open(pool=pool) as repository:
        before, after = (image(seed, 11001)[: 11000 * PAGE] for seed in (15, 16))
        first, expected = add(repository, "vm", {"ram": before}), bytearray(before)
        rows = ranges.normalise([(at, at + PAGE) for at in range(0, len(before), 2 * PAGE)])
        with repository.writer("vm", first) as writer, memory_file(after) as descriptor:
            writer.replace(writer.region("ram", "image", len(after)), descriptor, rows)
            second = writer.commit("import")
        for at, end in rows.tolist():
            expected[at:end] = after[at:end]
        assert content(repository, second, "ram") == expected


def test_another_host_indexes_the_repository_by_itself():
    with place() as where:
        with where.open() as repository:
            data = image(6, 100)
            for seed in range(5):
                add(repository, "vm", {"ram": data + image(seed, 20)})
        seen = []
        with where.elsewhere(progress=lambda what, done, total: seen.append((what, done, total))) as repository:
            assert [each.number for each in repository.generations("vm")] == [1, 2, 3, 4, 5]
            assert content(repository, repository.resolve("vm@3"), "ram") == data + image(2, 20)
        assert seen[-1] == ("indexing records", 6, 6)


def test_points_in_time():
    with place() as where, where.open() as repository:
        made = [add(repository, "vm", {"ram": image(seed, 3)}) for seed in range(3)]
        assert repository.resolve("vm@2").id == made[1].id
        assert repository.resolve("vm@latest").id == made[2].id
        assert repository.resolve("vm@-1").id == made[1].id
        assert repository.resolve(made[0].id[:10]).id == made[0].id
        for wrong, error in (
            ("vm@4", NotFoundError),
            ("vm@-3", NotFoundError),
            ("nobody@1", NotFoundError),
            ("0123456789", NotFoundError),
            ("vm@x", UsageError),
            ("vm", UsageError),
        ):
            with pytest.raises(error):
                repository.resolve(wrong)


def test_a_forgotten_number_is_never_used_again():
    with place() as where:
        with where.open() as repository:
            for seed in range(3):
                add(repository, "vm", {"ram": image(seed, 3)})
            repository.forget(repository.resolve("vm@3"))
            with pytest.raises(NotFoundError, match="was forgotten"):
                repository.resolve("vm@3")
        with where.elsewhere() as repository:
            assert add(repository, "vm", {"ram": image(9, 3)}).number == 4
            assert [each.number for each in repository.generations("vm")] == [1, 2, 4]


def test_history_that_went_back_is_noticed():
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 3)})
            newest = add(repository, "vm", {"ram": image(2, 3)})
        (where.path / f"records/{newest.sequence:012d}").unlink()
        with pytest.raises(IntegrityError):
            where.open().close()
        for path in (where.state / INDEX_FOLDER).iterdir():  # also when the index is lost
            path.unlink()
        with pytest.raises(IntegrityError, match="went back"):
            where.open().close()


@pytest.mark.parametrize("lost", [False, True])
def test_a_history_that_others_have_changed_is_noticed_with_an_index_and_without(lost):
    with place() as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 3)})
        shutil.copytree(where.path, where.root / "backup")
        with where.open() as repository:
            add(repository, "vm", {"ram": image(2, 3)})
        remembered = (where.state / "history.json").read_bytes()
        shutil.rmtree(where.path)
        shutil.copytree(where.root / "backup", where.path)
        with where.elsewhere() as repository:  # which has not seen what was there before
            for seed in (3, 4):
                add(repository, "vm", {"ram": image(seed, 3)})
        if lost:
            shutil.rmtree(where.state / INDEX_FOLDER)
        for _ in range(2):  # being refused once changes nothing about what this host remembers
            with pytest.raises(IntegrityError, match="history was changed"):
                where.open().close()
        assert (where.state / "history.json").read_bytes() == remembered


def test_a_few_pages_of_a_terabyte_cost_a_few_pages():
    """Anything that follows the region's size and not what is in it would not come to an end."""
    with place() as where, where.open() as repository, tempfile.TemporaryFile(dir="/dev/shm") as file:
        length = 1 << 40
        os.ftruncate(file.fileno(), length)
        os.pwrite(file.fileno(), b"first" * 1000, 5 * PAGE)
        os.pwrite(file.fileno(), b"last", length - 4)
        parent = None
        for dirty in (None, ranges.normalise([(1 << 39, (1 << 39) + PAGE)])):
            with repository.writer("vm", parent) as writer:
                draft = writer.region("ram", "image", length)
                writer.replace(draft, file.fileno(), dirty)
                parent = writer.commit("import")
            assert parent.dirty_bytes <= 3 * PAGE
            assert parent.stored_bytes < 40_000
            os.pwrite(file.fileno(), b"middle", 1 << 39)
        first, second = repository.generations("vm")
        assert repository.changed(first, second)["ram"].tolist() == [[1 << 39, (1 << 39) + PAGE]]
        with GenerationReader(repository, second) as reader:
            region = reader.region("ram")
            assert reader.read(region, length - 4, length) == b"last"
            assert reader.read(region, 1 << 39, (1 << 39) + 8) == b"middle\0\0"
            assert sum(ranges.total(each) for each in reader.content(region)) == 4 * PAGE


def test_a_keyring_that_went_back_is_noticed():
    with place() as where:
        files = read_key_files(where.path)
        changed = change(files, unlock(files, PASSPHRASE), new_epoch=True)
        for name, data in changed.put.items():
            (where.path / name).write_bytes(data)
        with where.open() as repository:
            generation = add(repository, "vm", {"ram": image(1, 3)})
            assert content(repository, generation, "ram") == image(1, 3)
        (where.path / "keyring/00000002").unlink()
        with pytest.raises(IntegrityError, match="which this host has seen"):
            where.open().close()


def test_what_is_no_repository():
    with place() as where:
        with pytest.raises(RepositoryMissingError):
            read_mark(where.root / "nowhere")
        with pytest.raises(WrongPassphraseError):
            unlock(read_key_files(where.path), b"wrong")
        with where.open() as repository, pytest.raises(ConflictError):
            create(where.path, {}, repository.keys, repository.settings)


def test_two_processes_may_write_in_turn():
    """The second has an index that knows nothing of the first's generation until it looks."""
    with place() as where, where.open() as one, where.elsewhere() as two:
        add(one, "vm", {"ram": image(1, 50)})
        second = add(two, "vm", {"ram": image(1, 50)})
        assert second.number == 2
        one.refresh()
        assert [each.number for each in one.generations("vm")] == [1, 2]
        assert content(one, second, "ram") == image(1, 50)


def test_verify_sees_every_difference():
    with place() as where, where.open() as repository:
        data = bytearray(image(8, 64))
        generation = add(repository, "vm", {"ram": bytes(data)})
        with GenerationReader(repository, generation) as reader:
            region = reader.region("ram")
            for at in (0, 40 * PAGE + 17, len(data) - 1):
                changed = bytearray(data)
                changed[at] ^= 1
                with memory_file(bytes(changed)) as descriptor, pytest.raises(IntegrityError, match="does not hold"):
                    reader.verify(region, descriptor, "file")
            live = next(at for at in range(64) if any(data[at * PAGE : (at + 1) * PAGE]))
            data[live * PAGE : (live + 1) * PAGE] = bytes(PAGE)
            with memory_file(bytes(data)) as descriptor, pytest.raises(IntegrityError, match="does not hold"):
                reader.verify(region, descriptor, "file")


class History(RuleBasedStateMachine):
    """Random histories of several VMs against a dict of bytes, reopened here and elsewhere."""

    generations = Bundle("generations")

    @initialize()
    def begin(self):
        self.context = place()
        self.where = self.context.__enter__()
        self.repository = self.where.open()
        self.model = {}

    def teardown(self):
        if hasattr(self, "repository"):
            self.repository.close()
            self.context.__exit__(None, None, None)

    @rule(target=generations, vm=st.sampled_from("ab"), seed=st.integers(0, 5), pages=st.integers(0, 80))
    def whole(self, vm, seed, pages):
        data = image(seed, pages)
        generation = add(self.repository, vm, {"ram": data})
        self.model[generation.id] = data
        return generation

    @rule(
        target=generations,
        parent=generations,
        rows=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9))),
        seed=st.integers(),
    )
    def changed(self, parent, rows, seed):
        if parent.id not in self.model:
            return parent
        data = bytearray(self.model[parent.id])
        rng = random.Random(seed)
        dirty = []
        for at, count in rows:
            start, end = min(at * PAGE, len(data)), min((at + count) * PAGE, len(data))
            data[start:end] = rng.choice([bytes(end - start), rng.randbytes(end - start)])
            dirty.append((start, end))
        generation = add(self.repository, parent.vm, {"ram": bytes(data)}, parent, {"ram": ranges.normalise(dirty)})
        self.model[generation.id] = bytes(data)
        return generation

    @rule(generation=consumes(generations))
    def forget(self, generation):
        if self.model.pop(generation.id, None) is not None:
            self.repository.forget(generation)

    @rule(generation=generations)
    def restore(self, generation):
        if generation.id in self.model:
            assert content(self.repository, generation, "ram") == self.model[generation.id]

    @rule(elsewhere=st.booleans())
    def reopen(self, elsewhere):
        self.repository.close()
        self.repository = self.where.elsewhere() if elsewhere else self.where.open()
        listed = {each.id for vm in self.repository.vms() for each in self.repository.generations(vm)}
        assert listed == set(self.model)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=25, stateful_step_count=15, suppress_health_check=list(HealthCheck))
