"""Leases, and readers that look up again."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from store_fixtures import add, content, image, memory_file, place

from base.errors import NotFoundError
from store import format as layout
from store import leases
from store.reader import GenerationReader


def taken(tmp_path, **facts):
    return leases.take(tmp_path, 7, "a test", **facts)


def test_what_a_lease_says(tmp_path):
    with taken(tmp_path, role=leases.WRITER, generations=[3, 5]) as lease:
        (found,) = leases.held(tmp_path)
        assert found.name == lease.path.name
        assert (found.facts.sequence, found.facts.role, found.facts.generations) == (7, "writer", (3, 5))
        lease.advance(9)
        assert leases.held(tmp_path)[0].facts.sequence == 9
        lease.advance(8)  # it never goes back
        assert leases.held(tmp_path)[0].facts.sequence == 9
    assert leases.held(tmp_path) == []


def test_half_of_a_change_is_not_read(tmp_path):
    with taken(tmp_path) as lease:
        lease.advance(1234)
        data = lease.path.read_bytes()
        first = data.index(b"\n") + 1
        for cut in range(first, len(data)):
            os.truncate(lease.path, cut)
            assert leases.held(tmp_path)[0].facts.sequence == 7
            lease.path.write_bytes(data)
        os.truncate(lease.path, first - 1)
        assert leases.held(tmp_path)[0].facts.sequence == 0  # the worst is assumed
        assert leases.held(tmp_path)[0].facts.role == leases.WRITER


def test_the_lease_of_a_dead_holder_is_removed(tmp_path):
    lease = taken(tmp_path)
    os.close(lease._descriptor)
    assert leases.held(tmp_path) == []
    assert not lease.path.exists()


def test_readers_and_writers_stand_on_generations_that_are_there():
    with place() as where, where.open() as repository, where.elsewhere() as other:
        first = add(repository, "vm", {"ram": image(1, 10)})
        second = add(repository, "vm", {"ram": image(2, 10)}, first)
        with GenerationReader(repository, first), repository.writer("vm", second):
            held = {each.facts.role: each.facts for each in leases.held(repository.leases)}
            assert held["reader"].generations == (first.sequence,)
            assert held["writer"].generations == (second.sequence,)
            assert held["writer"].sequence == repository.sequence
        other.refresh()
        other.forget(first)  # which this host has not seen
        for begin in (lambda: GenerationReader(repository, first), lambda: repository.writer("vm", first)):
            with pytest.raises(NotFoundError, match="was forgotten"):
                begin()
        with pytest.raises(NotFoundError, match="was forgotten"):
            repository.changed(first, second)
        assert leases.held(repository.leases) == []


def moved(repository, other) -> None:
    """What a prune does: every pack's content lies in another pack now, and the packs are gone.

    `other` has none of their files open, or it would go on reading them.
    """
    with repository.environment.read() as txn:
        numbers = repository.catalog.pack_numbers(txn)
        old = [repository.catalog.entry(txn, each).header.pack_id for each in numbers]
        generations = repository.catalog.generations(txn, "vm")
    repository.doom(old)
    for each in generations:
        add(repository, "twin", {name: content(repository, each, name) for name in each.regions})
    repository.swap([], old)
    for each in old:
        repository.storage.delete(layout.pack_name(each))
    other.storage.close()


def test_a_reader_that_misses_a_pack_looks_up_again():
    """Of another host, which has not seen the swap; and that twice, in the middle of a region."""
    data = image(3, 2500)
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": data})
        with where.elsewhere() as other, GenerationReader(other, other.resolve("vm@1")) as reader:
            region = reader.region("ram")
            moved(repository, other)
            assert reader.read(region, 0, 8192) == data[:8192]
            stream = reader.stream(region, 1 << 20)
            pieces = [next(stream)]
            moved(repository, other)
            pieces += list(stream)
            assert b"".join(pieces) == data
            moved(repository, other)
            with memory_file(bytes(len(data))) as descriptor:
                reader.restore(region, descriptor, "test")
                assert os.pread(descriptor, len(data), 0) == data
                moved(repository, other)
                reader.verify(region, descriptor, "test")


def test_a_writer_reads_its_parent_though_prune_moves_it():
    one, two = image(4, 1500), image(5, 1500)
    mixed = one[: 700 * 4096] + two[700 * 4096 :]
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": one})
        with where.elsewhere() as other, other.writer("vm", other.resolve("vm@1")) as writer:
            draft = writer.region("ram", "image", len(mixed))
            moved(repository, other)
            with memory_file(mixed) as descriptor:
                writer.replace(draft, descriptor)
            generation = writer.commit("import")
            assert content(other, generation, "ram") == mixed


def test_deleted_files_are_not_kept_open():
    with place() as where, where.open() as repository, where.elsewhere() as other:
        data = image(6, 100)
        generation = add(repository, "vm", {"ram": data})
        other.refresh()
        with GenerationReader(other, generation) as reader:
            assert reader.read(reader.region("ram"), 0, len(data)) == data
            assert open_packs(where.path)
            moved(repository, repository)
            other.refresh()
            assert not [each for each in open_packs(where.path) if "(deleted)" in each]
            assert reader.read(reader.region("ram"), 0, len(data)) == data
        assert open_packs(where.path) == []


def open_packs(repository: Path) -> list[str]:
    """The packs of this repository that the process holds open: other tests may have left theirs to the collector."""
    found = []
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{each}"))
    return [each for each in found if each.startswith(f"{repository}/packs/")]
