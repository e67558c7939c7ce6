"""Packs that are damaged or gone: whoever opens the repository can work, and nothing new relies on what is lost."""

import random
from contextlib import suppress

import pytest
from store_fixtures import add, content, image, memory_file, place

from base.errors import ConflictError, IntegrityError
from store.chunker import PackingSettings
from store.format import PACK_DATA
from store.upkeep.check import check_repository

SMALL_PACKS = PackingSettings(pack_bytes=200_000)
DATA = {1: image(1, 300), 2: image(2, 60) + image(1, 300)[60 * 4096 :]}
DATA[3] = DATA[2]


def filled(where) -> list:
    """Two generations; gives the files of the packs, those of the first generation before those of the second."""
    with where.open() as repository:
        first = add(repository, "vm", {"ram": DATA[1]})
        second = add(repository, "vm", {"ram": DATA[2]}, first)
        return [where.path / "packs" / each for each in (*first.packs, *second.packs)]


def flip(path, at: int, bit: int = 0) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)


def cut(path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def footer_at(path) -> int:
    data = path.read_bytes()
    return len(data) - 16 - int.from_bytes(data[-16:-12], "little")


LOSSES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: cut(path, 0),
    "truncated": lambda path: cut(path, path.stat().st_size // 2),
    "zeroed header": lambda path: path.write_bytes(bytes(64) + path.read_bytes()[64:]),
    "another pack": lambda path: path.write_bytes(
        max(path.parent.iterdir(), key=lambda each: each.name != path.name).read_bytes()
    ),
}


def readable(repository) -> list[int]:
    """Numbers of generations that can be read, and are then right."""
    found = []
    for generation in repository.generations("vm"):
        with suppress(IntegrityError):
            assert content(repository, generation, "ram") == DATA[generation.number]
            found.append(generation.number)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_a_new_host_opens_works_and_heals(loss):
    with place(SMALL_PACKS) as where:
        packs = filled(where)
        with where.open() as repository:
            own = set(repository.resolve("vm@2").packs)
        lost = next(path for path in packs if path.name in own)
        LOSSES[loss](lost)
        with where.elsewhere() as repository:
            assert readable(repository) == [1]
            with repository.environment.read() as txn:
                (noted,) = repository.catalog.damaged(txn)
            assert noted.pack_id == lost.name
            assert noted.problem
            add(repository, "vm", {"ram": DATA[3]})
            assert readable(repository) == [1, 2, 3]
        for again in (where.elsewhere, where.open):
            with again() as repository:
                assert 3 in readable(repository)


def test_a_host_that_knew_the_pack_does_not_rely_on_it_either():
    for at in range(2):
        with place(SMALL_PACKS) as where:
            packs = filled(where)
            with where.open() as repository:
                assert readable(repository) == [1, 2]
                for path in packs:
                    if at:
                        path.unlink()
                    else:
                        cut(path, 100)
                add(repository, "vm", {"ram": DATA[2]})
                assert content(repository, repository.resolve("vm@3"), "ram") == DATA[2]
            for again in (where.open, where.elsewhere):
                with again() as repository:
                    assert readable(repository) == [2, 3]


def test_a_pack_that_vanishes_during_a_capture_is_noticed_at_its_commit():
    with place(SMALL_PACKS) as where:
        packs = filled(where)
        with where.open() as repository, repository.writer("vm") as writer:
            draft = writer.region("ram", "image", len(DATA[1]))
            with memory_file(DATA[1]) as descriptor:
                writer.replace(draft, descriptor)
            for path in packs:
                path.unlink()
            with pytest.raises(ConflictError, match="gone: capture again"):
                writer.commit("import")


def test_whatever_is_damaged_but_frames_costs_nothing():
    """A flipped bit in header, lengths, footer or trailer: all chunks are still read, on a new host too."""
    rng = random.Random(3)
    with place(SMALL_PACKS) as where:
        packs = filled(where)
        for path in packs:
            original = path.read_bytes()
            footer = footer_at(path)
            end = len(original)
            places = [*range(0, 64, 5), 31, 32, 63, 64, footer, footer + 13, end - 17, *range(end - 16, end, 3)]
            for at in places:
                flip(path, at, rng.randrange(8))
                with where.elsewhere() as repository:
                    assert readable(repository) == [1, 2], f"{path.name} at {at} of {end}"
                path.write_bytes(original)


def test_a_damaged_frame_costs_itself_even_without_a_footer():
    with place(SMALL_PACKS) as where:
        packs = filled(where)
        path = max(packs, key=lambda each: each.stat().st_size)
        flip(path, footer_at(path) + 20)
        flip(path, 64 + 4 + 100)
        with where.elsewhere() as repository:
            with repository.environment.read() as txn:
                number = repository.catalog.pack_number(txn, bytes.fromhex(path.name))
                assert number in repository.catalog.avoided(txn)
            entry = repository.catalog.pack(number)
            for frame in range(1, len(entry.offsets) - 1):
                repository.frames.frame(number, frame)
            with pytest.raises(IntegrityError, match=f"{path.name} at offset 64"):
                repository.frames.frame(number, 0)


def test_a_pack_that_is_put_back_counts_again():
    with place(SMALL_PACKS) as where:
        packs = filled(where)
        original = packs[0].read_bytes()
        packs[0].unlink()
        with where.elsewhere() as repository:
            state = repository.environment.directory.parent
            assert 1 not in readable(repository)
        packs[0].write_bytes(original)
        where.state = state
        with where.open() as repository:
            assert readable(repository) == [1, 2]
            with repository.environment.read() as txn:
                assert not repository.catalog.damaged(txn)


def test_what_is_stored_twice_is_read_where_it_is_whole():
    """Two writers that did not know of each other; each of their packs is damaged in turn."""
    with place(SMALL_PACKS) as where:
        with where.open() as repository, repository.writer("one") as one, repository.writer("vm") as two:
            for writer in (one, two):
                draft = writer.region("ram", "image", len(DATA[1]))
                with memory_file(DATA[1]) as descriptor:
                    writer.replace(draft, descriptor)
            made = [one.commit("import"), two.commit("import")]
        for generation in made:
            packs = [where.path / "packs" / name for name in generation.packs]
            packs = [path for path in packs if path.read_bytes()[10] == PACK_DATA]
            assert packs
            for path in packs:
                flip(path, 200)
            with where.open() as repository:
                for vm in ("one", "vm"):
                    assert content(repository, repository.resolve(f"{vm}@1"), "ram") == DATA[1]
                findings = check_repository(repository, read_data=True).findings
                assert {each.kind for each in findings} == {"frame"}
                assert {each.generations for each in findings} == {()}
            for path in packs:
                flip(path, 200)
