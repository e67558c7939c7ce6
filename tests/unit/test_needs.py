"""Needs: what outlives processes keeps its generation, from `forget` and from prune; and how such disks are read."""

import pytest
from store_fixtures import add, image, memory_file, place

from base.disk import Disk
from base.errors import ConflictError, NotFoundError
from restore.disk_source import Access, GenerationDisk
from store import needs
from store.keyring.keys import Keys
from store.reader import GenerationReader
from store.repository import Repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings

CHUNK = 64 << 10
EVERYTHING = PruneSettings(max_unused_percent=0, scattered_least=1)


def with_disk(repository, content):
    with repository.writer("vm") as writer, memory_file(content) as descriptor:
        writer.replace(writer.region("disk:one", "disk", len(content), chunk_size=CHUNK), descriptor)
        return writer.commit("snapshot")


def need(repository, generation) -> str:
    name = needs.new_name()
    needs.record(Disk(), repository.leases, name, "disk one of VM vm", [generation.sequence])
    return name


def test_a_needed_generation_is_not_forgotten_until_the_need_ends():
    with place() as where, where.open() as repository:
        generation = add(repository, "vm", {"ram": image(1, 10)})
        name = need(repository, generation)
        with where.elsewhere() as other, pytest.raises(ConflictError, match="vm@1 is needed by disk one of VM vm on "):
            other.forget(other.resolve("vm@1"))
        needs.drop(repository.leases, name)
        needs.drop(repository.leases, name)
        repository.forget(generation)


def test_what_was_forgotten_in_that_moment_stays_readable_until_the_need_ends():
    content = image(2, 64)
    with place() as where, where.open() as repository:
        generation = with_disk(repository, content)
        repository.forget(generation)
        name = need(repository, generation)  # too late to be refused, in time to keep the content
        add(repository, "other", {"ram": image(3, 10)})
        assert prune(repository, EVERYTHING)[1].removed_packs == 0
        with pytest.raises(NotFoundError, match="was forgotten"):
            GenerationReader(repository, generation)
        disk = GenerationDisk(Access(repository), repository.generation_at(generation.sequence), "disk:one")
        assert disk.read(0, disk.size) == content
        disk.close()
        needs.drop(repository.leases, name)
        assert prune(repository, EVERYTHING)[1].removed_packs > 0


def test_a_disk_is_read_in_any_pieces_with_keys_that_were_handed_over():
    content = bytes(5 * CHUNK) + image(4, 200) + bytes(3 * CHUNK)
    with place() as where:
        with where.open() as repository:
            generation = with_disk(repository, content)
            keys = Keys.from_handover(repository.keys.handover(), repository.storage.get)
        with Repository(where.path, keys, where.state) as repository:
            disk = GenerationDisk(Access(repository), repository.resolve(generation.id), "disk:one")
            there = disk.data(0, disk.size)
            assert int(there[0, 0]) >= 5 * CHUNK
            assert int(there[-1, 1]) <= disk.size - 2 * CHUNK
            for start, end in ((0, disk.size), (4 * CHUNK + 512, 6 * CHUNK + 7), (disk.size - 9, disk.size), (5, 5)):
                assert disk.read(start, end) == content[start:end]
            for at in range(0, disk.size, 40961):
                assert disk.read(at, min(at + 4096, disk.size)) == content[at : at + 4096]
            disk.close()
