"""Repair: what is left is kept, what is lost is marked, what somebody else has is taken."""

import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from store_fixtures import CHEAP, PASSPHRASE, add, content, image, memory_file, place

from base import extents as ranges
from base.errors import ConflictError, IntegrityError, LockedError
from store.chunker import PackingSettings
from store.creation import create
from store.format import PACK_DATA, PACK_NODES
from store.keyring.files import read_key_files
from store.keyring.slots import new_keyring, unlock
from store.reader import GenerationReader
from store.repository import Repository
from store.upkeep.check import check_repository
from store.upkeep.donor import Donor
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.upkeep.repair import DROP, PUT_BACK, REPLACE, Repair, repair

SMALL_PACKS = PackingSettings(pack_bytes=200_000, frame_bytes=64 << 10)
PAGE = 4096
DATA = {1: random.Random(1).randbytes(200 * PAGE)}
DATA[2] = random.Random(2).randbytes(60 * PAGE) + DATA[1][60 * PAGE :]
DATA[3] = random.Random(3).randbytes(20 * PAGE) + DATA[2][20 * PAGE :]


def filled(where) -> None:
    with where.open() as repository:
        generation = None
        for number, data in DATA.items():
            generation = add(repository, "vm", {"ram": data, "disk": image(number, 5)}, generation)


def packs_of(where, kind) -> list:
    """Files of the packs of a kind, oldest first."""
    with where.elsewhere() as repository, repository.environment.read() as txn:
        headers = [repository.catalog.pack(number).header for number in repository.catalog.pack_numbers(txn)]
    return [where.path / "packs" / header.pack_id.hex() for header in headers if header.kind == kind]


def flip(path, at: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


def readable(repository) -> set[int]:
    """Numbers of generations that can be read, and are then right."""
    found = set()
    for generation in repository.generations("vm"):
        with suppress(IntegrityError):
            assert content(repository, generation, "ram") == DATA[min(3, generation.number)]
            found.add(generation.number)
    return found


def marked(repository) -> set[int]:
    return {each.number for each in repository.generations("vm") if each.hurt}


def everywhere_the_same(where) -> set[int]:
    """Clean, and marked are just those that cannot be read, here and on a new host; gives those that can."""
    for open_repository in (where.open, where.elsewhere):
        with open_repository() as repository:
            assert check_repository(repository, read_data=True).findings == []
            good = readable(repository)
            assert marked(repository) == {1, 2, 3} - good
    return good


def test_nothing_is_done_where_nothing_is_damaged():
    with place(SMALL_PACKS) as where:
        filled(where)
        with where.open() as repository:
            before = repository.sequence
            planned, result = repair(repository)
            assert planned.empty
            assert not planned.impossible
            assert (result.replaced_packs, result.hurt, repository.sequence) == (0, (), before)


@pytest.mark.parametrize("host", ["same", "new"])
@pytest.mark.parametrize("kind", [PACK_DATA, PACK_NODES])
@pytest.mark.parametrize("how", ["frame", "footer", "missing", "header", "truncated"])
def test_damaged_packs_are_replaced_by_what_is_left_of_them(how, kind, host):
    with place(SMALL_PACKS) as where:
        filled(where)
        path = packs_of(where, kind)[-1]
        size = path.stat().st_size
        match how:
            case "frame":
                flip(path, 64 + 4 + 50)
            case "footer":
                flip(path, size - 40)
            case "missing":
                path.unlink()
            case "header":
                path.write_bytes(bytes(64) + path.read_bytes()[64:])
            case "truncated":
                path.write_bytes(path.read_bytes()[: size * 2 // 3])
        with where.open() if host == "same" else where.elsewhere() as repository:
            before = readable(repository)
            dry = Repair(repository, None).look()
            planned, result = repair(repository)
            assert planned == dry
            (done,) = planned.packs
            knows_header = how != "header" or host == "same"
            assert done.action == (DROP if how == "missing" or not knows_header or not done.chunks else REPLACE)
            assert result.replaced_packs == 1
            assert {each.number for each in result.hurt} == marked(repository) == {1, 2, 3} - readable(repository)
            assert readable(repository) >= before
        assert not path.exists()
        good = everywhere_the_same(where)
        if how == "footer":
            assert good == {1, 2, 3}
        with where.open() as repository:
            assert repair(repository)[0].empty


def test_what_a_hurt_generation_lost_is_counted():
    with place(SMALL_PACKS) as where:
        filled(where)
        flip(packs_of(where, PACK_DATA)[0], 64 + 4 + 50)  # one frame of 16 pages
        with where.open() as repository:
            _, result = repair(repository)
            lost = {each.name: each.regions for each in result.hurt}
            assert lost["vm@1"] == {"ram": 16 * PAGE}
            with GenerationReader(repository, repository.resolve("vm@1")) as reader:
                holes = reader.holes(reader.region("ram"))
            assert holes.tolist() == [[0, 16 * PAGE]]
            report = check_repository(repository)
            assert report.findings == []
            assert [(each.name, each.regions) for each in report.hurt] == list(lost.items())


def test_marks_go_once_what_was_lost_is_offered_again():
    with place(SMALL_PACKS) as where:
        filled(where)
        packs_of(where, PACK_DATA)[0].unlink()
        with where.open() as repository:
            repair(repository)
            assert 1 in marked(repository)
            add(repository, "other", {"ram": DATA[1], "disk": image(1, 5)})
            assert 1 in readable(repository)
            assert 1 in marked(repository)  # advice, until somebody looks
            planned, result = repair(repository)
            assert "vm@1" in planned.healed
            assert "vm@1" in result.healed
            assert 1 not in marked(repository)


def test_a_generation_with_a_hurt_parent_is_whole():
    with place(SMALL_PACKS) as where:
        filled(where)
        packs_of(where, PACK_DATA)[0].unlink()
        with where.open() as repository:
            repair(repository)
            parent = repository.resolve("vm@3")
            assert parent.hurt
            with repository.writer("vm", parent) as writer:
                for name, data in (("ram", DATA[3]), ("disk", image(3, 5))):
                    draft = writer.region(name, "image", len(data))
                    assert draft.anew == (name in parent.hurt)
                    with memory_file(data) as descriptor:
                        writer.replace(draft, descriptor)
                writer.commit("import")
            assert {3, 4} <= readable(repository)


def test_a_writer_that_began_before_is_waited_for_and_then_looked_at():
    with place(SMALL_PACKS) as where:
        filled(where)
        packs_of(where, PACK_DATA)[0].unlink()
        with where.elsewhere() as writing, where.open() as repository:
            parent = writing.resolve("vm@3")
            with writing.environment.write() as txn:  # it does not know of the damage, as a host with an older index
                for each in writing.catalog.damaged(txn):
                    txn.delete(bytes.fromhex(each.pack_id), db=writing.environment.database("damaged"))
            with writing.writer("vm", parent) as writer:
                draft = writer.region("ram", "image", len(DATA[3]))
                assert not draft.anew
                with memory_file(DATA[3][:PAGE]) as descriptor:
                    writer.replace(draft, descriptor, None)
                with pytest.raises(LockedError, match="writer of VM vm, process"):
                    repair(repository)
                assert marked(repository) == {1, 2, 3} - readable(repository)
                with suppress(IntegrityError):
                    writer.commit("import")
            _, result = repair(repository)
            assert result.replaced_packs == 1
        with where.elsewhere() as repository:
            assert check_repository(repository, read_data=True).findings == []


@pytest.mark.parametrize("put_back", [False, True])
def test_a_lost_frame_is_remembered_until_it_is_put_back(put_back):
    """Header and footer of the pack are whole, so that they say nothing: by them a repair that had to leave off was
    forgotten by the next command, and captures relied on what is lost."""
    with place(SMALL_PACKS) as where:
        filled(where)
        path = packs_of(where, PACK_DATA)[0]
        flip(path, 64 + 4 + 50)
        with where.elsewhere() as writing, writing.writer("other"), where.open() as repository:
            with pytest.raises(LockedError):
                repair(repository)
            noted = repository.damaged()
            assert [each.pack_id for each in noted] == [path.name]
        if put_back:
            flip(path, 64 + 4 + 50)
        with where.open() as repository:
            assert repository.damaged() == ([] if put_back else noted)
            kinds = [] if put_back else ["frame"]
            assert [each.kind for each in check_repository(repository).findings] == kinds, "it is known"
            if put_back:
                repair(repository)
            else:
                with pytest.raises(IntegrityError, match="nothing is pruned"):
                    prune(repository, PruneSettings())
            for number, data in DATA.items():
                add(repository, f"again{number}", {"ram": data, "disk": image(number, 5)})
            assert readable(repository) == {1, 2, 3}
            repair(repository)
        assert everywhere_the_same(where) == {1, 2, 3}


def test_a_frame_that_is_put_back_does_not_hide_another():
    with place(SMALL_PACKS) as where:
        filled(where)
        path = packs_of(where, PACK_DATA)[0]
        with where.elsewhere() as writing, writing.writer("other"), where.open() as repository:
            with repository.environment.read() as txn:
                number = repository.catalog.pack_number(txn, bytes.fromhex(path.name))
            second = int(repository.catalog.pack(number).offsets[1])
            flip(path, 64 + 4 + 50)
            flip(path, second + 4 + 50)
            with pytest.raises(LockedError):
                repair(repository)
        flip(path, 64 + 4 + 50)
        with where.open() as repository:
            assert len(repository.damaged()) == 1


def test_a_writer_that_gives_way_is_waited_for(monkeypatch):
    with place(SMALL_PACKS) as where:
        filled(where)
        packs_of(where, PACK_DATA)[0].unlink()
        with where.elsewhere() as writing, where.open() as repository:
            writer = writing.writer("other", ahead=True)
            monkeypatch.setattr(time, "sleep", lambda _: writer.close())  # as it does after a look
            _, result = repair(repository)
            assert result.replaced_packs == 1


def copied(where):
    return shutil.copytree(where.path, where.root / "copy")


def test_a_copy_puts_packs_back():
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = copied(where)
        data, nodes = packs_of(where, PACK_DATA), packs_of(where, PACK_NODES)
        data[0].unlink()
        flip(data[1], 100)
        flip(nodes[0], 100)
        flip(copy / "packs" / data[1].name, 100)  # there too: its other frames are as good as ours
        for open_repository in (where.elsewhere, where.open):
            with open_repository() as repository, opened_copy(where, copy) as other:
                planned, result = repair(repository, Donor(repository, other))
                if open_repository == where.elsewhere:
                    actions = {each.pack: each.action for each in planned.packs}
                    assert actions == {data[0].name: PUT_BACK, nodes[0].name: PUT_BACK, data[1].name: REPLACE}
                    assert result.put_back == 2
                    assert result.replaced_packs == 1
        assert data[0].exists()
        assert everywhere_the_same(where) != {1, 2, 3}


def opened_copy(where, copy):
    path, where.path = where.path, copy
    try:
        return where.elsewhere()
    finally:
        where.path = path


def test_chunks_and_nodes_are_taken_from_a_copy_that_has_other_packs():
    """What a copy has repacked is found by its ids; below a node that comes back more may be missing."""
    with place(SMALL_PACKS) as where:
        filled(where)
        copy = copied(where)
        with opened_copy(where, copy) as other:
            flip(copy / "packs" / packs_of(where, PACK_DATA)[0].name, -20)
            flip(copy / "packs" / packs_of(where, PACK_NODES)[0].name, -20)
            repair(other)
        for path in (*packs_of(where, PACK_DATA), *packs_of(where, PACK_NODES)):
            path.unlink()
        with where.elsewhere() as repository, opened_copy(where, copy) as other:
            assert readable(repository) == set()
            _, result = repair(repository, Donor(repository, other))
            assert result.put_back > 0
            assert result.taken_chunks > 0
            assert result.hurt == ()
        assert everywhere_the_same(where) == {1, 2, 3}


def test_chunks_are_taken_from_any_repository():
    with place(SMALL_PACKS) as where:
        filled(where)
        elsewhere = Elsewhere(where.root / "another")
        with elsewhere.open() as other:
            add(other, "strange", {"memory": random.Random(9).randbytes(30 * PAGE) + DATA[1]})
        packs_of(where, PACK_DATA)[0].unlink()
        with where.elsewhere() as repository, elsewhere.open() as other:
            assert not Donor(repository, other).is_copy
            assert 1 not in readable(repository)
            _, result = repair(repository, Donor(repository, other))
            assert result.taken_chunks > 0
            assert result.put_back == 0
            assert 1 in readable(repository)
        assert 1 in everywhere_the_same(where)


class Elsewhere:
    """A repository with keys of its own."""

    def __init__(self, root: Path) -> None:
        self.path, self.state = root / "repository", root / "state"
        made = new_keyring(PASSPHRASE, CHEAP)
        create(self.path, made.files, made.keys, SMALL_PACKS)

    def open(self) -> Repository:
        return Repository(self.path, unlock(read_key_files(self.path), PASSPHRASE), self.state)


@pytest.mark.parametrize("seed", range(8))
def test_others_capture_while_it_repairs(seed):
    """Another host, whose index is older than the damage, begins and ends captures between any two steps. In the end
    all that is not marked is whole, whatever it was built on and relies upon."""
    rng = random.Random(seed)
    with place(SMALL_PACKS) as where:
        filled(where)
        expected = {number: DATA[number] for number in DATA}
        with where.open() as repository, where.elsewhere() as other:
            victims = rng.sample([*packs_of(where, PACK_DATA), *packs_of(where, PACK_NODES)], 2)
            flip(victims[0], 64 + 4 + 50)
            flip(victims[1], rng.choice([20, 64 + 4 + 50, -20]))
            open_writers: list = []

            def meanwhile() -> None:
                if rng.random() < 0.6:
                    begin(other, rng, expected, open_writers)
                if open_writers and rng.random() < 0.6:
                    end(open_writers, expected, rng)

            for _ in range(20):
                try:
                    for _ in Repair(repository, None).steps():
                        meanwhile()
                    break
                except LockedError:
                    end(open_writers, expected, rng)
            while open_writers:
                end(open_writers, expected, rng)
            other.refresh()
        for open_repository in (where.open, where.elsewhere):
            with open_repository() as repository:
                for generation in repository.generations("vm"):
                    try:
                        assert content(repository, generation, "ram") == expected[generation.number]
                    except IntegrityError:
                        assert generation.hurt, generation.name
                assert check_repository(repository, read_data=True).findings == []


def begin(other, rng, expected, open_writers) -> None:
    """A capture of some changed pages of the latest generation, as far as storing them."""
    other.refresh()
    parent = other.resolve("vm@latest")
    data = bytearray(expected[parent.number])
    at = rng.randrange(150) * PAGE
    data[at : at + 20 * PAGE] = rng.choice([rng.randbytes(20 * PAGE), DATA[1][at : at + 20 * PAGE]])
    try:
        writer = other.writer("vm", parent)
        draft = writer.region("ram", "image", len(data))
        with memory_file(bytes(data)) as descriptor:
            extents = None if draft.anew else ranges.normalise([(at, at + 20 * PAGE)])
            writer.replace(draft, descriptor, extents)
        open_writers.append((writer, bytes(data)))
    except IntegrityError:  # a node that it needs is damaged: such a capture fails until a repair
        writer.close()


def end(open_writers, expected, rng) -> None:
    """Commit one of the captures that were begun; what it shares may be gone by then."""
    writer, data = open_writers.pop(rng.randrange(len(open_writers)))
    with writer, suppress(IntegrityError, ConflictError):
        expected[writer.commit("import").number] = data
