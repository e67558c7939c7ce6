"""Generations that have lost something: what is still given out, what is refused, and how a new one goes on."""

import os
import random
import tempfile
from datetime import UTC, datetime

import numpy as np
import pytest
from store_fixtures import add, content, image, memory_file, place
from test_full_capture import Guest, judge

from base import extents as ranges
from base.errors import IntegrityError
from store.chunker import PackingSettings
from store.format import PACK_DATA, PACK_NODES
from store.holes import Holes
from store.reader import GenerationReader
from store.records import HurtGeneration
from store.retention.policy import Policy
from store.retention.rules import plan
from store.upkeep.check import check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.upkeep.repair import repair

SMALL_PACKS = PackingSettings(pack_bytes=200_000, frame_bytes=64 << 10)
PAGE = 4096
DATA = random.Random(1).randbytes(400 * PAGE + 100)


def part(repository, generation) -> tuple[bytes, bytes, np.ndarray]:
    """(exported, streamed, holes) of region ram."""
    with GenerationReader(repository, generation) as reader, tempfile.TemporaryFile(dir="/dev/shm") as file:
        region = reader.region("ram")
        holes, again = Holes(region.root), Holes(region.root)
        os.ftruncate(file.fileno(), region.root.length)
        reader.restore(region, file.fileno(), "test", holes=holes)
        streamed = b"".join(reader.stream(region, 1 << 20, again))
        assert np.array_equal(holes.extents, again.extents)
        return os.pread(file.fileno(), region.root.length, 0), streamed, holes.extents


def with_zeros(data: bytes, holes) -> bytes:
    out = bytearray(data)
    for start, end in holes.tolist():
        out[start:end] = bytes(end - start)
    return bytes(out)


def packs_of(where, repository, kind) -> list:
    found = []
    with repository.environment.read() as txn:
        for number in repository.catalog.pack_numbers(txn):
            header = repository.catalog.pack(number).header
            if header.kind == kind:
                found.append(where.path / "packs" / header.pack_id.hex())
    return found


def mark(repository, *generations) -> None:
    repository.mark_hurt(
        [HurtGeneration(vm_id=each.vm_id, number=each.number, regions={"ram": 1}) for each in generations]
    )


@pytest.mark.parametrize("kind", [PACK_DATA, PACK_NODES])
@pytest.mark.parametrize("how", ["missing", "frame"])
def test_what_is_left_is_exported_and_holes_are_told(kind, how):
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": DATA})
            path = packs_of(where, repository, kind)[-1]
        if how == "missing":
            path.unlink()
        else:
            damaged = bytearray(path.read_bytes())
            damaged[64 + 100] ^= 1
            path.write_bytes(damaged)
        for open_repository in (where.open, where.elsewhere):
            with open_repository() as repository:
                generation = repository.resolve("vm@1")
                with pytest.raises(IntegrityError):
                    content(repository, generation, "ram")
                exported, streamed, holes = part(repository, generation)
                assert exported == streamed == with_zeros(DATA, holes)
                assert ranges.total(holes) >= 16 * PAGE if kind == PACK_DATA else 32 * PAGE
                if kind == PACK_DATA:
                    assert ranges.total(holes) < len(DATA)
                assert int(holes[-1, 1]) <= len(DATA)


def test_a_whole_generation_has_no_holes():
    with place(SMALL_PACKS) as where, where.open() as repository:
        generation = add(repository, "vm", {"ram": DATA})
        exported, streamed, holes = part(repository, generation)
        assert exported == streamed == DATA
        assert not len(holes)


def test_marks_are_seen_everywhere_replaced_and_forgotten_with_their_generation():
    with place() as where, where.open() as repository, where.elsewhere() as other:
        one = add(repository, "vm", {"ram": DATA})
        two = add(repository, "vm", {"ram": DATA[PAGE:]})
        mark(repository, one, two)
        other.refresh()
        for each in (repository, other):
            assert [generation.hurt for generation in each.generations("vm")] == [{"ram": 1}] * 2
        mark(repository, two)
        assert [each.hurt for each in repository.generations("vm")] == [{}, {"ram": 1}]
        repository.forget(two)
        with repository.environment.read() as txn:
            assert repository.catalog.all_hurt(txn) == []
        with where.elsewhere() as third:
            assert [each.hurt for each in third.generations("vm")] == [{}]


def test_a_marked_region_is_refused_before_anything_is_written_but_not_if_it_is_whole_again():
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": DATA, "disk": image(1, 10)})
            packs_of(where, repository, PACK_DATA)[0].unlink()
        with where.elsewhere() as repository:
            mark(repository, repository.resolve("vm@1"))
            generation = repository.resolve("vm@1")
            with tempfile.TemporaryFile(dir="/dev/shm") as file, GenerationReader(repository, generation) as reader:
                with pytest.raises(IntegrityError, match=r"region ram is hurt: .* export --partial vm@1 ram"):
                    reader.restore(reader.region("ram"), file.fileno(), "test")
                with pytest.raises(IntegrityError, match="is hurt"):
                    next(reader.stream(reader.region("ram")))
                assert os.fstat(file.fileno()).st_blocks == 0
            assert content(repository, generation, "disk") == image(1, 10)
            add(repository, "vm", {"ram": DATA})
            assert content(repository, generation, "ram") == DATA  # the mark is still there


def test_a_generation_is_not_built_on_what_its_parent_has_lost():
    """All of the region must be offered, and then the parent is whole again too."""
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            one = add(repository, "vm", {"ram": DATA, "disk": image(1, 10)})
            packs_of(where, repository, PACK_DATA)[0].unlink()
            mark(repository, one)
        with where.elsewhere() as repository:
            one = repository.resolve("vm@1")
            with repository.writer("vm", one) as writer:
                draft = writer.region("ram", "image", len(DATA))
                assert draft.anew
                with memory_file(DATA) as descriptor:
                    writer.replace(draft, descriptor)
                two = writer.commit("import")
            assert two.parent == one.id
            for each in (one, two):
                assert content(repository, each, "ram") == DATA


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("kind", [PACK_DATA, PACK_NODES])
def test_a_capture_of_a_running_vm_whose_parent_is_hurt_looks_at_everything(kind, repaired, tmp_path):
    with place(SMALL_PACKS) as where:
        guest = Guest(tmp_path, 1)
        with where.open() as repository:
            for name, path in guest.files.items():
                path.write_bytes(random.Random(3).randbytes(path.stat().st_size))
                guest.trackers[name].written.update(range(path.stat().st_size // PAGE))
            guest.capture(repository, full=False)
            instant = guest.stopped_with["pm0"]
            for path in packs_of(where, repository, kind):
                path.unlink()
        with where.elsewhere() as repository:
            if repaired:
                repair(repository)
                assert repository.resolve("vm@1").hurt
            guest.files["pm0"].write_bytes(instant)  # what was written since is undone, and only one page is dirty
            guest.trackers["pm0"].written = {0}
            done = guest.capture(repository, full=False)
            judge(repository, guest, done, full=False)
            repair(repository)
            assert not repository.resolve("vm@1").hurt  # all was offered again
            guest.write(3)
            later = guest.capture(repository, full=False).generation
            assert later.dirty_bytes < done.generation.dirty_bytes  # it can be built on again


def test_forgetting_by_rules_does_not_keep_hurt_generations_for_whole_ones():
    with place() as where, where.open() as repository:
        made = [add(repository, "vm", {"ram": DATA[number * PAGE :]}) for number in range(5)]
        mark(repository, made[2], made[4])
        verdicts = plan(repository.generations("vm"), Policy(last=2), datetime.now(UTC))
        kept = {each.generation.number: each.reasons for each in verdicts if each.reasons}
        assert kept == {5: ("newest",), 4: ("newest whole", "last"), 2: ("last",)}


def test_prune_leaves_what_is_left_of_hurt_generations():
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            one = add(repository, "vm", {"ram": DATA})
            add(repository, "vm", {"ram": random.Random(2).randbytes(100 * PAGE) + DATA[100 * PAGE :]}, one)
            packs_of(where, repository, PACK_DATA)[0].unlink()
        with where.elsewhere() as repository:
            with pytest.raises(IntegrityError, match="perdure repair"):
                prune(repository, PruneSettings(max_unused_percent=0))
            repair(repository)
            before = part(repository, repository.resolve("vm@1"))
            assert len(before[2])
            prune(repository, PruneSettings(max_unused_percent=0, scattered_least=1))
            after = part(repository, repository.resolve("vm@1"))
            assert after[0] == before[0]
            assert np.array_equal(after[2], before[2])
            assert content(repository, repository.resolve("vm@2"), "ram")[100 * PAGE :] == DATA[100 * PAGE :]
            assert check_repository(repository, read_data=True).findings == []
