"""What check reads, how often, and what it says of a local index that is wrong."""

import random
import re

import msgspec
import numpy as np
import pytest
from store_fixtures import add, image, place

from base.errors import UsageError
from store.chunker import PackingSettings
from store.index.chunks import LOCATION
from store.packs import PackInfo
from store.upkeep.check import Subset, check_repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings

SMALL_PACKS = PackingSettings(pack_bytes=200_000, frame_bytes=64 << 10)


@pytest.mark.parametrize(
    "text", ["", "0/3", "4/3", "1/0", "-1/3", "a/b", "1.5/3", "0%", "101%", "%", "nan%", "3", "1/2/3"]
)
def test_parts_of_the_data_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="no part of the data"):
        Subset.parse(text)


def test_all_parts_together_are_all_packs_each_once():
    packs = [bytes([number % 256]) * 7 + bytes([number // 256]) + bytes(8) for number in range(1000)]
    parts = [Subset.parse(f"{number}/7").choose(packs) for number in range(1, 8)]
    assert set().union(*parts) == set(packs)
    assert sum(map(len, parts)) == len(packs)
    assert Subset.parse("3/7").choose(packs) == parts[2]


def test_a_share_of_the_packs_is_chosen_at_random_and_at_least_one():
    packs = [bytes([number]) * 16 for number in range(200)]
    found = {frozenset(Subset.parse("2.5%").choose(packs)) for _ in range(8)}
    assert {len(each) for each in found} == {5}
    assert len(found) > 1
    assert len(Subset.parse("0.01%").choose(packs)) == 1
    assert Subset.parse("100%").choose(packs) == set(packs)
    assert Subset.parse("50%").choose([]) == set()


def test_only_the_packs_chosen_are_read():
    with place(SMALL_PACKS) as where, where.open() as repository:
        add(repository, "vm", {"ram": image(1, 600)})
        report = check_repository(repository)
        assert report.counts["read_packs"] == 0
        assert report.counts["packs"] > 4
        damaged = where.path / "packs" / repository.resolve("vm@1").packs[0]
        data = bytearray(damaged.read_bytes())
        data[100] ^= 1
        damaged.write_bytes(data)
        reports = [check_repository(repository, read_data=Subset(part, 3)) for part in (1, 2, 3)]
        assert sum(each.counts["read_packs"] for each in reports) == report.counts["packs"] - 1  # one is damaged
        (finding,) = [finding for each in reports for finding in each.findings]
        assert (finding.object, finding.offset, finding.generations) == (f"packs/{damaged.name}", 64, ("vm@1",))


def test_each_node_is_read_once_whatever_the_number_of_generations(monkeypatch):
    with place() as where, where.open() as repository:
        data = bytearray(image(1, 1500))
        generation = add(repository, "vm", {"ram": data})
        for number in range(8):
            data[number * 4096 : number * 4096 + 16] = bytes([number + 1]) * 16
            generation = add(repository, "vm", {"ram": data}, generation)
        read = []
        original = repository.nodes.read

        def counting(ids, locations):
            read.extend(map(bytes, ids))
            return original(ids, locations)

        monkeypatch.setattr(repository.nodes, "read", counting)
        assert check_repository(repository).findings == []
        assert len(read) == len(set(read))


def test_an_index_that_says_of_chunks_that_they_are_where_they_are_not(monkeypatch):
    original = PackInfo.locations

    def swapped(pack, number):
        found = original(pack, number)
        found[:2] = found[[1, 0]]
        found["pack"] = number
        return found

    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": image(1, 300)})
        monkeypatch.setattr(PackInfo, "locations", swapped)
        with where.elsewhere() as repository:
            monkeypatch.setattr(PackInfo, "locations", original)
            findings = check_repository(repository).findings
            index = [each for each in findings if each.kind == "index"]
            assert index
            assert re.search("is said to be in frame 0, slot [01], and is not", index[0].problem)
            assert "packs/" in index[0].problem
        with where.elsewhere() as repository:
            assert check_repository(repository).findings == []


def test_entries_that_are_missing_or_too_many_are_found():
    with place(SMALL_PACKS) as where, where.open() as repository:
        add(repository, "vm", {"ram": image(1, 300)})
        with repository.environment.write() as txn:
            extra = np.zeros(2, LOCATION)
            extra["pack"] = [1, 77]
            repository.index.add(txn, np.arange(64, dtype=np.uint8).reshape(2, 32), extra)
        problems = [each.problem for each in check_repository(repository).findings]
        assert len(problems) == 2
        assert "entries of this pack" in problems[0]
        assert "frame 0, slot 0, and is not" in problems[0]
        assert "1 entries of a pack that is not there" in problems[1]


def test_a_generation_that_the_index_has_otherwise_than_its_record_is_found():
    with place() as where, where.open() as repository:
        add(repository, "vm", {"ram": image(1, 10)})
        with repository.environment.write() as txn:
            database = repository.environment.database("generations")
            ((key, value),) = [(bytes(key), bytes(value)) for key, value in txn.cursor(db=database)]
            body = msgspec.json.decode(value[72:])
            body["host"] = "elsewhere"
            txn.put(key, value[:72] + msgspec.json.encode(body), db=database)
        (finding,) = check_repository(repository).findings
        assert finding.kind == "index"
        assert "vm@1" in finding.problem


def test_damage_is_told_with_all_whom_it_hurts_and_nobody_else():
    with place(SMALL_PACKS) as where, where.open() as repository:
        data = image(1, 300)
        one = add(repository, "vm", {"ram": data, "disk": image(5, 100)})
        add(repository, "vm", {"ram": image(2, 50) + data[50 * 4096 :], "disk": image(6, 100)}, one)
        add(repository, "other", {"ram": random.Random(1).randbytes(4096 * 100)})
        path = where.path / "packs" / one.packs[0]
        path.write_bytes(path.read_bytes()[:-1])
        (finding,) = check_repository(repository).findings
        assert (finding.kind, finding.generations) == ("pack", ())  # its footer: all chunks can be read
        path.unlink()
        (finding,) = check_repository(repository).findings
        assert (finding.kind, finding.object, finding.problem) == (
            "pack",
            f"packs/{one.packs[0]}",
            "is missing from the repository",
        )
        assert finding.generations == ("vm@1", "vm@2")
        assert "ram" in finding.regions


def test_more_damage_than_is_told_apart_still_names_all_whom_it_hurts(monkeypatch):
    monkeypatch.setattr("store.upkeep.check.MAX_CAUSES", 2)
    monkeypatch.setattr("store.upkeep.survey._MAX_SETS", 4)
    with place(SMALL_PACKS) as where, where.open() as repository:
        made = [add(repository, "vm", {"ram": random.Random(seed).randbytes(4096 * 40)}) for seed in range(5)]
        for each in made:
            for name in each.packs:
                (where.path / "packs" / name).unlink()
        findings = check_repository(repository).findings
        assert len(findings) == sum(len(each.packs) for each in made)
        assert {name for each in findings for name in each.generations} == {each.name for each in made}


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_others_do_meanwhile_is_no_damage(seed, read_data):
    """Another host commits, forgets and prunes whenever check says how far it is."""
    rng = random.Random(seed)
    with place(SMALL_PACKS) as where, where.open() as repository, where.elsewhere() as other:
        data = bytearray(rng.randbytes(4096 * 150))
        generation = None
        for _ in range(6):
            data[: 4096 * 30] = rng.randbytes(4096 * 30)
            generation = add(other, "vm", {"ram": bytes(data)}, generation)
        done = []

        def progress(*_):
            if len(done) < 30:
                what = rng.choice(["add", "forget", "prune", "nothing"])
                listed = other.generations("vm")
                if what == "add":
                    data[: 4096 * 30] = rng.randbytes(4096 * 30)
                    add(other, "vm", {"ram": bytes(data)}, listed[-1])
                elif what == "forget" and len(listed) > 2:
                    other.forget(rng.choice(listed[:-1]))
                elif what == "prune":
                    prune(other, PruneSettings(max_unused_percent=0, scattered_least=1))
                done.append(what)

        assert check_repository(repository, read_data=read_data, progress=progress).findings == []
        assert {"add", "forget", "prune"} <= set(done)
        assert check_repository(repository, read_data=True).findings == []
