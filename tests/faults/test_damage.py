"""Bits flipped, files truncated, exchanged or removed, in every structure: found, named, never wrong bytes."""

import random
import shutil
from contextlib import suppress

import numpy as np
import pytest
from store_fixtures import add, content, image, place

from base.errors import (
    FormatVersionError,
    IntegrityError,
    PerdureError,
    RepositoryMissingError,
    WrongPassphraseError,
)
from store.chunker import PackingSettings
from store.format import PACK_DATA, PACK_NODES
from store.upkeep.check import check_repository

DATA = {1: image(1, 300), 2: image(2, 60) + image(1, 300)[60 * 4096 :]}


def filled(where) -> None:
    with where.open() as repository:
        first = add(repository, "vm", {"ram": DATA[1]})
        add(repository, "vm", {"ram": DATA[2]}, first)


def objects(where) -> list:
    return sorted(each for each in where.path.rglob("*") if each.is_file() and each.parent.name != "leases")


def nothing_wrong_comes_out(where) -> list:
    """Opens as another host would; every region read is right or refused. Gives what `check` finds."""
    try:
        with where.elsewhere() as repository:
            for vm in repository.vms():
                for generation in repository.generations(vm):
                    with suppress(IntegrityError):
                        assert content(repository, generation, "ram") == DATA[generation.number]
            return check_repository(repository, read_data=True).findings
    except (IntegrityError, FormatVersionError, WrongPassphraseError) as error:
        return [error]


def test_a_whole_repository_is_clean():
    with place(PackingSettings(pack_bytes=200_000)) as where:
        filled(where)
        assert nothing_wrong_comes_out(where) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_found(seed):
    rng = random.Random(seed)
    with place(PackingSettings(pack_bytes=200_000)) as where:
        filled(where)
        for path in objects(where):
            original = path.read_bytes()
            places = {0, 9, len(original) - 1, *(rng.randrange(len(original)) for _ in range(6))}
            for at in places:
                damaged = bytearray(original)
                damaged[at] ^= 1 << rng.randrange(8)
                path.write_bytes(damaged)
                if path.name == "config" and 10 <= at < 16:
                    continue  # zeros that nothing depends on
                assert nothing_wrong_comes_out(where), f"{path} at {at}"
            path.write_bytes(original)


def test_truncated_emptied_or_removed_files_are_found():
    with place(PackingSettings(pack_bytes=200_000)) as where:
        filled(where)
        for path in objects(where):
            original = path.read_bytes()
            for length in (0, 1, len(original) // 2, len(original) - 1):
                path.write_bytes(original[:length])
                assert nothing_wrong_comes_out(where), f"{path} cut to {length}"
            path.unlink()
            if path.name == "config":
                assert isinstance(error_of(where.elsewhere), RepositoryMissingError)
            elif path.name != f"{3:012d}":  # the newest record: a host that never saw it cannot know
                assert nothing_wrong_comes_out(where), path
            path.write_bytes(original)


def error_of(open_repository) -> PerdureError:
    with pytest.raises(PerdureError) as caught:
        open_repository().close()
    return caught.value


def test_exchanged_packs_and_records_are_found():
    with place(PackingSettings(pack_bytes=200_000)) as where:
        filled(where)
        packs = sorted((where.path / "packs").iterdir())
        one, two = packs[0].read_bytes(), packs[1].read_bytes()
        packs[0].write_bytes(two)
        packs[1].write_bytes(one)
        assert nothing_wrong_comes_out(where)
        packs[0].write_bytes(one)
        packs[1].write_bytes(two)
        records = sorted((where.path / "records").iterdir())
        shutil.copy(records[1], records[2])
        assert isinstance(nothing_wrong_comes_out(where)[0], IntegrityError)


def test_check_names_pack_offset_and_generations_hurt():
    with place(PackingSettings(pack_bytes=200_000)) as where:
        filled(where)
        with where.open() as repository:
            pack = repository.resolve("vm@2").packs[0]
            path = where.path / "packs" / pack
            damaged = bytearray(path.read_bytes())
            damaged[200] ^= 1
            path.write_bytes(damaged)
            assert check_repository(repository).findings == []  # the structure is whole
            (finding,) = check_repository(repository, read_data=True).findings
            assert (finding.kind, finding.object, finding.offset) == ("frame", f"packs/{pack}", 64)
            assert finding.generations == ("vm@2",)
            assert finding.regions == ("ram",)
            with pytest.raises(IntegrityError, match=pack):
                content(repository, repository.resolve("vm@2"), "ram")
            assert content(repository, repository.resolve("vm@1"), "ram") == DATA[1]


def test_check_finds_chunks_and_nodes_that_are_in_no_pack():
    """The index is told to forget packs: page maps then point to what nobody has."""
    for kind in (PACK_DATA, PACK_NODES):
        with place(PackingSettings(pack_bytes=200_000)) as where:
            filled(where)
            with where.open() as repository:
                with repository.environment.write() as txn:
                    numbers = repository.catalog.pack_numbers(txn)
                    kinds = {number: repository.catalog.pack(number).header.kind for number in numbers}
                    gone = next(number for number in numbers if kinds[number] == kind)
                    repository.index.drop_packs(txn, np.array([gone], np.uint32))
                index, lost = check_repository(repository).findings
                assert index.kind == "index"
                assert "has 0 entries of this pack" in index.problem
                assert lost.kind == ("chunk" if kind == PACK_DATA else "node")
                assert "vm@1" in lost.generations
