"""Doomed and swapped packs in records, replay and catalog: what prune and repair stand on."""

import numpy as np
import pytest
from minimal_reader import Reader
from store_fixtures import PASSPHRASE, add, content, image, place

from base.errors import ConflictError, IntegrityError
from store import format as layout
from store.packs import read_pack


def ids_of(repository) -> list[bytes]:
    """Ids of the packs in the catalog, by number."""
    with repository.environment.read() as txn:
        return [repository.catalog.entry(txn, number).header.pack_id for number in repository.catalog.pack_numbers(txn)]


def doomed(repository) -> dict[int, int]:
    with repository.environment.read() as txn:
        return {int(each["pack"]): int(each["since"]) for each in repository.catalog.doomed(txn)}


def swap_all(repository, generation):
    """Take away every pack, after what they hold was stored again: by another VM with the same content."""
    old = ids_of(repository)
    repository.doom(old)
    twin = add(repository, "twin", {"ram": content(repository, generation, "ram")})
    repository.swap([], old)
    return old, twin


def test_deduplication_misses_what_is_doomed_and_reads_hit_it():
    with place() as where, where.open() as repository:
        data = image(1, 60)
        first = add(repository, "vm", {"ram": data})
        assert add(repository, "b", {"ram": data}).stored_bytes == 0
        repository.doom(ids_of(repository))
        assert content(repository, first, "ram") == data
        again = add(repository, "c", {"ram": data})
        assert again.stored_bytes == first.stored_bytes
        assert add(repository, "d", {"ram": data}).stored_bytes == 0
        assert content(repository, again, "ram") == data


def test_what_was_swapped_out_is_gone_and_what_took_its_place_serves_all():
    with place() as where, where.open() as repository:
        data = image(2, 60)
        first = add(repository, "vm", {"ram": data})
        old, twin = swap_all(repository, first)
        assert not set(old) & set(ids_of(repository))
        assert doomed(repository) == {}
        for each in old:
            repository.storage.delete(layout.pack_name(each))
        assert content(repository, first, "ram") == content(repository, twin, "ram") == data
        reader = Reader(where.path, PASSPHRASE)
        assert len(reader.generations) == 2


@pytest.mark.parametrize("unlinked", [0, 1, 2])
def test_an_empty_index_is_filled_though_swapped_packs_are_gone(unlinked):
    with place() as where, where.open() as repository:
        data = image(3, 60)
        first = add(repository, "vm", {"ram": data})
        old, _ = swap_all(repository, first)
        assert len(old) == 2
        for each in old[:unlinked]:
            repository.storage.delete(layout.pack_name(each))
        with where.elsewhere() as other:
            assert content(other, other.resolve("vm@1"), "ram") == data
            assert not set(old) & set(ids_of(other))
            with other.environment.read() as txn:
                assert all(other.catalog.was_removed(txn, each) for each in old)
                assert not other.catalog.was_removed(txn, ids_of(other)[0])


def test_a_pack_that_no_swap_removed_is_missed():
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": image(4, 20)})
        swap_all(repository, repository.resolve("vm@1"))
        repository.storage.delete(layout.pack_name(ids_of(repository)[0]))
        with where.elsewhere() as other, pytest.raises(IntegrityError, match="in no pack"):
            content(other, other.resolve("vm@1"), "ram")


def test_the_doomed_set_is_replaced_and_remembers_since_when():
    with place() as where, where.open() as repository:
        for each in range(3):
            add(repository, f"vm{each}", {"ram": image(each, 20)})
        packs = ids_of(repository)
        numbers = range(1, len(packs) + 1)
        first = repository.doom(packs[:2])
        second = repository.doom(packs[1:3])
        assert doomed(repository) == {numbers[1]: first, numbers[2]: second}
        third = repository.doom(packs[:1])
        assert doomed(repository) == {numbers[0]: third}
        with where.elsewhere() as other:
            assert list(doomed(other).values()) == [third]
        assert repository.doom([]) and doomed(repository) == {}


def test_a_swap_stands_on_what_it_was_planned_with():
    with place() as where, where.open() as repository:
        first = add(repository, "vm", {"ram": image(5, 20)})
        packs = ids_of(repository)
        before = repository.sequence
        with pytest.raises(ConflictError, match="doomed no longer"):
            repository.swap([], packs[:1])
        repository.doom(packs[:1])
        with pytest.raises(ConflictError, match="doomed or removed"):
            repository.swap([], packs[:1], {1})
        with pytest.raises(ConflictError, match="doomed or removed"):
            repository.swap([], packs[:1], {77})
        assert repository.sequence == before + 1
        assert content(repository, first, "ram") == image(5, 20)


def test_a_commit_that_relies_on_a_pack_swapped_out_meanwhile_is_refused():
    with place() as where, where.open() as repository:
        data = image(6, 40)
        first = add(repository, "vm", {"ram": data})
        with repository.writer("late", None) as writer:
            draft = writer.region("ram", "image", len(data))
            ids = np.frombuffer(first.regions["ram"].root.id, np.uint8).reshape(1, 32)
            assert not writer.new_chunks(ids).any()
            swap_all(repository, first)
            with pytest.raises(ConflictError, match="capture again"):
                writer.commit("import")
            assert draft.root.id == layout.ZERO_ID


def test_pack_facts_in_the_catalog_are_those_of_the_footer():
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": image(7, 90)})
        for number, pack_id in enumerate(ids_of(repository), 1):
            entry, info = repository.catalog.pack(number), read_pack(repository.storage, repository.keys, pack_id)
            assert entry.size == info.size
            assert entry.counts.tolist() == info.footer.counts.tolist()
            assert entry.offsets[:-1].tolist() == info.footer.offsets.tolist()
