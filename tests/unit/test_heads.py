"""Heads of history where packs are damaged: each equals its source, is as hurt as it, and can be built on."""

import random

import pytest
from store_fixtures import add, content, memory_file, place

from base import extents as ranges
from base.errors import IntegrityError
from perdure.supervision import heads
from store.chunker import PackingSettings
from store.format import PACK_DATA
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.upkeep.repair import repair

PAGE, CHUNK = 4096, 64 << 10
SMALL_PACKS = PackingSettings(pack_bytes=200_000, frame_bytes=64 << 10)
KEPT = 60 * PAGE
SIZES = {"pm0": ("pmem", 100 * PAGE, PAGE), "disk:one": ("disk", 4 * CHUNK, CHUNK), "device": ("device", PAGE, PAGE)}


def again(repository, source):
    return heads.again(repository, "demo", source)


def cloned(repository, source):
    return heads.again(repository, "clone", source)


def of_several(repository, source):
    return heads.of_several(repository, heads.Mixed(source, {"one": source}, source, ("one",)))


def kept_of(repository, source):
    return heads.kept_of(repository, "demo", source, "boot")


HEADS = pytest.mark.parametrize("made", [again, cloned, of_several, kept_of])


def full(repository, seed: int, parent=None):
    """A generation with all kinds of regions, and what they hold."""
    held = {name: random.Random(f"{name}{seed}").randbytes(length) for name, (_, length, _) in SIZES.items()}
    with repository.writer("demo", parent) as writer:
        for name, (kind, length, size) in SIZES.items():
            with memory_file(held[name]) as descriptor:
                writer.replace(writer.region(name, kind, length, chunk_size=size), descriptor)
        return writer.commit("snapshot", metadata={"kept": {"pm0": [[0, KEPT]]}}), held


def expected(made, held) -> dict[str, bytes]:
    return {"pm0": held["pm0"][:KEPT] + bytes(len(held["pm0"]) - KEPT)} if made is kept_of else held


def lose_a_pack_of(where, generation, kind=None, without=()) -> None:
    """Its file is gone: the next host that looks notes that."""
    with where.elsewhere() as repository, repository.environment.read() as txn:
        headers = [repository.catalog.pack(number).header for number in repository.catalog.pack_numbers(txn)]
    packs = set(generation.packs) - {pack for each in without for pack in each.packs}
    wanted = [each.pack_id.hex() for each in headers if kind is None or each.kind == kind]
    (where.path / "packs" / next(each for each in wanted if each in packs)).unlink()


def holds(repository, generation, wanted) -> None:
    """Each page on its own, so that it shows how many are wrong."""
    assert set(generation.regions) == set(wanted)
    for name, right in wanted.items():
        found = content(repository, generation, name)
        assert [at for at in range(0, len(right), PAGE) if found[at : at + PAGE] != right[at : at + PAGE]] == []
        assert len(found) == len(right)


@HEADS
def test_a_head_equals_its_source_while_a_pack_of_another_vm_is_known_to_be_lost(made):
    """And so does what is built on it when the damage is repaired: only what was written since is looked at then."""
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            source, held = full(repository, 1)
            full(repository, 2, source)
            other = add(repository, "other", {"ram": random.Random(3).randbytes(100 * PAGE)})
        lose_a_pack_of(where, other)
        with where.elsewhere() as repository:
            assert len(repository.damaged()) == 1
            head = made(repository, repository.resolve("demo@1"))
            wanted = expected(made, held)
            holds(repository, head, wanted)
            repair(repository)
            head = repository.resolve(head.name)
            assert (repository.damaged(), head.hurt) == ([], {})
            prune(repository, PruneSettings(max_unused_percent=0, scattered_least=1))
            now = {name: b"new" + data[3:] for name, data in wanted.items()}
            with repository.writer(head.vm, head) as writer:
                for name, data in now.items():
                    kind, length, size = SIZES[name]
                    draft = writer.region(name, kind, length, chunk_size=size)
                    assert not draft.anew
                    with memory_file(data) as descriptor:
                        writer.replace(draft, descriptor, ranges.normalise([(0, PAGE)]))
                after = writer.commit("snapshot")
            holds(repository, head, wanted)
            holds(repository, after, now)
            assert [each.name for each in check_repository(repository, read_data=True).hurt] == ["other@1"]


@HEADS
def test_a_head_is_as_hurt_as_its_source(made):
    """The loss is known and nobody has looked yet what it hurts; a repair then marks both alike, until it is offered
    again."""
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            source, held = full(repository, 1)
        lose_a_pack_of(where, source, PACK_DATA)
        with where.elsewhere() as repository:
            source = repository.resolve("demo@1")
            assert (len(repository.damaged()), source.hurt) == (1, {})
            head = made(repository, source)
            for name in set(head.regions) - ({"pm0"} if made is kept_of else set()):
                assert head.regions[name] == source.regions[name]
            with pytest.raises(IntegrityError):
                content(repository, head, "pm0")
            repair(repository)
            source, head = repository.resolve(source.name), repository.resolve(head.name)
            assert source.hurt.keys() == head.hurt.keys() == {"pm0"}
            assert made is kept_of or head.hurt == source.hurt
            add(repository, "other", {name: held[name] for name in source.hurt})
            repair(repository)
            assert (repository.resolve(source.name).hurt, repository.resolve(head.name).hurt) == ({}, {})
            holds(repository, head, expected(made, held))


@HEADS
def test_of_what_is_marked_as_hurt_and_is_not_whole_there_is_no_head(made):
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            stale, held = full(repository, 1)
        lose_a_pack_of(where, stale, PACK_DATA)
        with where.elsewhere() as repository:
            repair(repository)
            source = repository.resolve("demo@1")
            assert source.hurt.keys() == {"pm0"}
            for each in (source, stale):  # also for who has it from before it was marked
                with pytest.raises(IntegrityError, match=r"pm0 is hurt: .*`perdure export --partial demo@1 pm0 FILE`"):
                    made(repository, each)
            assert repository.vms() == ["demo"] and len(repository.generations("demo")) == 1
            add(repository, "other", {"ram": held["pm0"]})  # it is marked still, but whole again
            head = made(repository, source)
            holds(repository, head, expected(made, held))
            assert not head.hurt


def test_what_does_not_survive_a_boot_may_be_hurt():
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            first = add(repository, "demo", {"pm0": random.Random("pm01").randbytes(100 * PAGE)})
            source, held = full(repository, 1, first)
        lose_a_pack_of(where, source, PACK_DATA, without=[first])
        with where.elsewhere() as repository:
            repair(repository)
            source = repository.resolve(source.name)
            assert "pm0" not in source.hurt and "disk:one" in source.hurt
            holds(repository, kept_of(repository, source), expected(kept_of, held))
            with pytest.raises(IntegrityError, match="disk:one is hurt"):
                again(repository, source)
