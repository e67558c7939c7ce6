"""The chunk index against a dict, through merges, dropped packs, crashes and damage."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from base.errors import IntegrityError
from store.index import merging, parts, runs
from store.index.chunks import LOCATION, Index
from store.index.environment import Environment, IndexLostError
from store.index.runs import Queries

KEY = b"k" * 32
NONE = np.empty(0, np.uint32)


@contextmanager
def small_parts(entries=5, smallest=4):
    """Parts and size classes so small that a few entries make many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ENTRIES", entries)
        patch.setattr(runs, "_SMALLEST_CLASS", smallest)
        yield


@contextmanager
def opened(folder):
    with Environment(folder, ("meta", *Index.DATABASES), mac_key=KEY) as env:
        yield env, Index(env, KEY)


def chunk(number):
    """An id of a small universe in which many share their first 8 bytes, and some the first 31."""
    return bytes([0, 0, 0, 0, 0, 0, 0, number % 3]) + bytes(22) + bytes([number // 3 % 2, number])


def as_array(chunks):
    return np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, 32)


def random_ids(seed, count):
    return np.frombuffer(np.random.default_rng(seed).bytes(32 * count), np.uint8).reshape(-1, 32)


def places(packs, frames=0):
    rows = np.zeros(len(packs), LOCATION)
    rows["pack"], rows["frame"] = packs, frames
    return rows


def add(env, index, ids, locations):
    with env.write() as txn:
        index.add(txn, ids, locations)


def lookup(env, index, ids, skip=None):
    with env.read() as txn:
        return index.lookup(txn, ids, skip)


def merge_all(index):
    while index.merge_step():
        pass


def count_of_runs(env, index):
    with env.read() as txn:
        return index.size(txn).runs


# Pure functions

ENTRIES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=40)


def columns_of(entries):
    return runs.sort(as_array([chunk(each) for each, _ in entries]), places([pack for _, pack in entries]))


def in_order(entries):
    return sorted(set(entries), key=lambda each: (chunk(each[0]), -each[1]))


def entries_of(columns):
    return [
        (int(name[-1]), int(pack)) for name, pack in zip(runs.join_ids(columns), columns.location["pack"], strict=True)
    ]


@given(ENTRIES)
def test_sorting_is_that_of_whole_ids_newest_pack_first(entries):
    columns = columns_of(entries)
    assert entries_of(columns) == in_order(entries)
    assert runs.is_sorted(columns)


@given(st.lists(ENTRIES, min_size=1, max_size=4), st.sets(st.integers(1, 6)), st.integers(1, 7), st.integers(1, 9))
def test_a_merge_in_pieces_gives_what_sorting_all_gives(sources, dead, window, wanted):
    inputs = [columns_of(each) for each in sources]
    at, merged = [0] * len(inputs), []
    dead_packs = np.array(sorted(dead), np.uint32)
    while any(start < len(each) for start, each in zip(at, inputs, strict=True)):
        windows = [each.cut(start, start + window) for start, each in zip(at, inputs, strict=True)]
        ends = [start + window >= len(each) for start, each in zip(at, inputs, strict=True)]
        piece, consumed = runs.merge_front(windows, ends, dead_packs, wanted)
        assert sum(consumed) > 0
        assert len(piece) <= wanted
        at = [start + count for start, count in zip(at, consumed, strict=True)]
        merged += entries_of(piece)
    everything = [each for entries in sources for each in entries if each[1] not in dead]
    assert sorted(set(merged), key=merged.index) == in_order(everything)


@given(ENTRIES.filter(bool), st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_matches_are_those_of_whole_ids(entries, sought):
    columns = columns_of(entries)
    queries, order = Queries.of(as_array([chunk(each) for each in sought]))
    entry = np.searchsorted(columns.prefix, queries.prefix)
    chosen = np.flatnonzero(columns.prefix.take(entry, mode="clip") == queries.prefix)
    found = []
    for query, place in runs.matches(columns.prefix, columns.rest, queries, chosen, entry[chosen]):
        assert len(set(query.tolist())) == len(query)
        found += zip(order[query].tolist(), columns.location["pack"][place].tolist(), strict=True)
    wanted = [(at, pack) for at, number in enumerate(sought) for each, pack in set(entries) if each == number]
    assert sorted(found) == sorted(wanted)


def test_a_hundred_thousand_ids_with_one_prefix_are_told_apart():
    count = 100_000
    ids = np.zeros((count, 32), np.uint8)
    ids[:, 28:] = np.arange(count, dtype=">u4").view(np.uint8).reshape(-1, 4)
    ids[:, 8] = 255 - ids[:, 31]  # neither in order of making nor all different early
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as (env, index):
        half = np.random.default_rng(3).permutation(count)
        add(env, index, ids[half[: count // 2]], places(half[: count // 2] + 1))
        add(env, index, ids[half[count // 2 :]], places(half[count // 2 :] + 1))
        assert (lookup(env, index, ids)["pack"] == np.arange(count) + 1).all()
        others = ids.copy()
        others[:, 20] = 1
        assert not lookup(env, index, others)["pack"].any()


# The index


def test_an_empty_index_finds_nothing(tmp_path):
    with opened(tmp_path) as (env, index):
        assert not lookup(env, index, random_ids(1, 10))["pack"].any()
        assert not len(lookup(env, index, random_ids(1, 0)))
        assert index.merge_step() is False


def test_look_ups_in_any_order_and_of_any_number(tmp_path, monkeypatch):
    monkeypatch.setattr("store.index.lookup.BATCH", 1000)
    with opened(tmp_path) as (env, index):
        ids = random_ids(1, 60_000)  # more than a part
        add(env, index, ids, places(np.full(60_000, 7), np.arange(60_000)))
        add(env, index, random_ids(2, 100), places(np.full(100, 8)))
        for wanted in (np.arange(60_000), np.random.default_rng(1).permutation(60_000)[:5001], [5, 5, 59_999, 5], [17]):
            found = lookup(env, index, ids[wanted])
            assert (found["pack"] == 7).all()
            assert (found["frame"] == wanted).all()
            assert found.flags.owndata
        mixed = np.concatenate([random_ids(9, 50), ids[:50], random_ids(2, 100)])
        assert lookup(env, index, mixed)["pack"].tolist() == [0] * 50 + [7] * 50 + [8] * 100


def test_of_several_locations_the_newest_that_is_not_skipped(tmp_path):
    with opened(tmp_path) as (env, index):
        ids = random_ids(1, 1)
        for pack in (4, 9, 2):
            add(env, index, ids, places([pack]))
        assert lookup(env, index, ids)["pack"].tolist() == [9]
        assert lookup(env, index, ids, np.array([9], np.uint32))["pack"].tolist() == [4]
        assert lookup(env, index, ids, np.array([9, 2, 4], np.uint32))["pack"].tolist() == [0]
        with env.read() as txn:
            assert index.locations(txn, ids.tobytes())["pack"].tolist() == [9, 4, 2]
            assert not len(index.locations(txn, bytes(32)))


def test_locations_of_one_id_in_several_parts_are_all_seen(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(1):
        ids = np.repeat(random_ids(1, 3), 4, axis=0)
        add(env, index, ids, places([4, 9, 2, 7, 1, 2, 3, 4, 8, 7, 6, 5]))
        assert lookup(env, index, random_ids(1, 3))["pack"].tolist() == [9, 4, 8]
        skip = np.array([8, 9], np.uint32)
        assert lookup(env, index, random_ids(1, 3), skip)["pack"].tolist() == [7, 4, 7]


def test_an_aborted_commit_leaves_nothing_behind(tmp_path):
    with opened(tmp_path) as (env, index):
        with pytest.raises(KeyError), env.write() as txn:
            index.add(txn, random_ids(1, 100), places(np.full(100, 1)))
            assert index.lookup(txn, random_ids(1, 100))["pack"].all()
            raise KeyError
        # The next run gets the number of the one that never was, with other content.
        add(env, index, random_ids(2, 100), places(np.full(100, 2)))
        assert not lookup(env, index, random_ids(1, 100))["pack"].any()
        assert lookup(env, index, random_ids(2, 100))["pack"].all()


def test_the_number_of_runs_is_bounded(tmp_path):
    with opened(tmp_path) as (env, index):
        total = 0
        for number in range(150):
            count = int(np.random.default_rng(number).integers(1, 3000))
            add(env, index, random_ids(number, count), places(np.full(count, number + 1)))
            total += count
            if number % 10 == 0:
                merge_all(index)
        merge_all(index)
        with env.read() as txn:
            classes = [runs.size_class(each.entries) for each in index.runs(txn)]
            assert index.size(txn).entries == total
        assert max(classes.count(each) for each in classes) < runs.FANIN
        for number in range(150):
            assert (lookup(env, index, random_ids(number, 5))["pack"] == number + 1).all()


def test_small_commits_do_not_pile_up_even_if_nobody_merges(tmp_path):
    with opened(tmp_path) as (env, index):
        for number in range(300):
            add(env, index, random_ids(number, 10), places(np.full(10, number + 1)))
        assert count_of_runs(env, index) <= 3 * (1 + runs.size_class(3000))


def test_dropped_packs_are_gone_at_once_and_their_entries_in_time(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(50):
        for pack in range(1, 9):
            add(env, index, random_ids(pack, 100), places(np.full(100, pack)))
        add(env, index, random_ids(1, 100), places(np.full(100, 20)))
        with env.write() as txn:
            index.drop_packs(txn, np.array([3, 1, 5], np.uint32))
        add(env, index, random_ids(3, 100), places(np.full(100, 5)))  # a mistake, and without effect
        for _ in range(2):
            found = [set(lookup(env, index, random_ids(pack, 100))["pack"].tolist()) for pack in range(1, 9)]
            assert found == [{20}, {2}, {0}, {4}, {0}, {6}, {7}, {8}]
            merge_all(index)
        with env.read() as txn:
            assert index.size(txn).entries == 600
            assert not len(index.dead(txn))
        with env.write() as txn:
            index.drop_packs(txn, np.array([2, 4, 6, 7, 8, 20], np.uint32))
        merge_all(index)
        with env.read() as txn:
            assert (index.size(txn).entries, index.size(txn).runs) == (0, 0)
            assert txn.stat(env.database("parts"))["entries"] == 0


def test_dropped_packs_do_not_come_back_with_small_runs_that_a_commit_absorbs(tmp_path):
    with opened(tmp_path) as (env, index):
        for pack in range(1, 4):
            add(env, index, random_ids(pack, 10), places(np.full(10, pack)))
        with env.write() as txn:
            index.drop_packs(txn, np.array([2], np.uint32))
        add(env, index, random_ids(4, 10), places(np.full(10, 4)))
        assert count_of_runs(env, index) == 1
        merge_all(index)
        with env.read() as txn:
            assert not len(index.dead(txn))
        found = [set(lookup(env, index, random_ids(pack, 10))["pack"].tolist()) for pack in range(1, 5)]
        assert found == [{1}, {0}, {3}, {4}]


def test_a_snapshot_stays_as_it_was_while_others_add_drop_and_merge(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(50):
        for number in range(1, 12):
            add(env, index, random_ids(number, 60), places(np.full(60, number)))
        with env.read() as old:
            before = index.lookup(old, random_ids(3, 60))
            add(env, index, random_ids(3, 60), places(np.full(60, 50)))
            with env.write() as txn:
                index.drop_packs(txn, np.array([3], np.uint32))
            merge_all(index)
            assert (index.lookup(old, random_ids(3, 60)) == before).all()
            assert (Index(env, KEY).lookup(old, random_ids(3, 60)) == before).all()
        assert (lookup(env, index, random_ids(3, 60))["pack"] == 50).all()


def test_merging_takes_no_space(tmp_path):
    with opened(tmp_path) as (env, index):
        largest = 0.0
        for number in range(40):
            add(env, index, random_ids(number, 30_000), places(np.full(30_000, number + 1)))
            merge_all(index)
            if number >= 8:
                largest = max(largest, env.path.stat().st_size / (30_000 * (number + 1)))
        with env.read() as txn:
            facts = txn.stat(env.database("parts"))
        live = (facts["overflow_pages"] + facts["leaf_pages"] + facts["branch_pages"]) * 4096 / (40 * 30_000)
        assert live < 50
        assert largest < 2.2 * live


def test_a_merge_that_another_process_does_is_left_to_it(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(50):
        for number in range(1, 12):
            add(env, index, random_ids(number, 60), places(np.full(60, number)))
        before = count_of_runs(env, index)
        with env.role("merge"):
            assert index.merge() is False
        assert count_of_runs(env, index) == before
        assert index.merge(seconds=0) is True
        assert index.merge() is False
        assert count_of_runs(env, index) < before


@pytest.mark.parametrize("how", ["a step", "all steps", "an add", "a drop"])
@pytest.mark.parametrize("times", [1, 10])
def test_a_step_that_was_overtaken_is_planned_again(tmp_path, monkeypatch, how, times):
    with opened(tmp_path) as (env, index), small_parts(50):
        for number in range(1, 12):
            add(env, index, random_ids(number, 60), places(np.full(60, number)))
        plan, overtaken = merging.plan, []

        def slow_plan(reader, *arguments):
            step = plan(reader, *arguments)
            if reader is index and step and len(overtaken) < times:
                overtaken.append(True)
                if how in ("a drop", "an add"):
                    new = np.full(60, 100 + len(overtaken))
                    add(env, Index(env, KEY), random_ids(100 + len(overtaken), 60), places(new))
                if how == "a drop":
                    with env.write() as txn:
                        index.drop_packs(txn, np.array([100 + len(overtaken)], np.uint32))
                if how == "a step":
                    Index(env, KEY).merge_step()
                if how == "all steps":
                    merge_all(Index(env, KEY))
            return step

        monkeypatch.setattr(merging, "plan", slow_plan)
        monkeypatch.setattr("store.index.chunks._ATTEMPTS", times + 1)
        merge_all(index)
        assert overtaken
        with env.read() as txn:
            assert list(index.check(txn)) == []
        for number in range(1, 12):
            assert (lookup(env, index, random_ids(number, 60))["pack"] == number).all()
        for number in range(101, 101 + len(overtaken) if how in ("an add", "a drop") else 0):
            wanted = number if how == "an add" else 0
            assert (lookup(env, index, random_ids(number, 60))["pack"] == wanted).all()


def test_a_step_that_moves_nothing_over_can_be_overtaken_too(tmp_path, monkeypatch):
    with opened(tmp_path) as (env, index), small_parts():
        add(env, index, random_ids(1, 300), places(np.full(300, 1)))
        with env.write() as txn:
            index.drop_packs(txn, np.array([1], np.uint32))
        index.merge_step()  # begins to rewrite the run, of which nothing is left
        plan = merging.plan

        def slow_plan(*arguments):
            step = plan(*arguments)
            monkeypatch.setattr(merging, "plan", plan)
            assert [Index(env, KEY).merge_step() for _ in range(2)] == [True, True]
            return step

        monkeypatch.setattr(merging, "plan", slow_plan)
        merge_all(index)
        with env.read() as txn:
            assert list(index.check(txn)) == []
            assert index.size(txn).runs == 0


def test_a_step_that_is_overtaken_again_and_again_is_done_inside_the_transaction(tmp_path, monkeypatch):
    with opened(tmp_path) as (env, index), small_parts(50):
        for number in range(1, 12):
            add(env, index, random_ids(number, 60), places(np.full(60, number)))
        get, overtaken = index.get, []

        def always_other(_txn, key):
            overtaken.append(key)
            return b"other"

        plan = merging.plan

        def plan_then_change(*arguments):
            monkeypatch.setattr(index, "get", get)
            step = plan(*arguments)
            monkeypatch.setattr(index, "get", always_other)
            return step

        monkeypatch.setattr(merging, "plan", plan_then_change)
        assert index.merge_step() is True
        monkeypatch.undo()
        assert len(overtaken) == 3
        with env.read() as txn:
            assert list(index.check(txn)) == []
            assert any(each.merge for each in index.runs(txn))


# Damage


def test_any_flipped_bit_is_found_at_first_use(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(30):
        for number in range(1, 4):
            add(env, index, random_ids(number, 100), places(np.full(100, number)))
        with env.write() as txn:
            index.drop_packs(txn, np.array([99], np.uint32))
        index.merge_step()
        with env.read() as txn:
            stored = [
                (name, bytes(key), bytes(value))
                for name in Index.DATABASES
                for key, value in txn.cursor(db=env.database(name))
            ]
        assert len(stored) > 20
        everything = np.concatenate([random_ids(number, 100) for number in range(1, 4)])
        random = np.random.default_rng(5)
        for name, key, value in stored:
            for at in {0, len(value) - 1, int(random.integers(len(value)))}:
                damaged = bytearray(value)
                damaged[at] ^= 1 << int(random.integers(8))
                with env.write() as txn:
                    txn.put(key, bytes(damaged), db=env.database(name))
                fresh = Index(env, KEY)
                with env.read() as txn:
                    assert len(list(fresh.check(txn))) > 0
                if key == parts.STATE_KEY:
                    continue  # look-ups have no use for it
                with pytest.raises(IntegrityError) as caught:
                    lookup(env, fresh, everything)
                assert isinstance(caught.value, IndexLostError)
                assert caught.value.object == str(env.path)
            with env.write() as txn:
                txn.put(key, value, db=env.database(name))
        assert lookup(env, Index(env, KEY), everything)["pack"].all()


def test_values_cannot_stand_in_for_each_other_or_be_missing(tmp_path):
    with opened(tmp_path) as (env, index), small_parts(30):
        add(env, index, random_ids(1, 60), places(np.full(60, 1)))
        with env.read() as txn:
            (key, value), (_, other_value) = [
                (bytes(key), bytes(value)) for key, value in txn.cursor(db=env.database("parts")) if key[-1] == 1
            ][:2]
        assert len(value) == len(other_value)
        for swapped in (other_value, None):
            with env.write() as txn:
                if swapped is None:
                    txn.delete(key, db=env.database("parts"))
                else:
                    txn.put(key, swapped, db=env.database("parts"))
            with pytest.raises(IndexLostError):
                lookup(env, Index(env, KEY), random_ids(1, 60))


# Crashes


def in_killed_child(folder, work, after):
    """Run `work(env, index)` in a forked child that is killed when it has changed `after` values; whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            left = [after]
            apply = Index._apply

            def counted(self, txn, puts, deletes=()):
                for change in [*(([], [each]) for each in deletes), *(([each], []) for each in puts)]:
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    apply(self, txn, *change)

            Index._apply = counted
            with opened(folder) as (env, index):
                work(env, index)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_merge_killed_at_any_step_loses_nothing_and_goes_on(tmp_path):
    with small_parts(20):
        with opened(tmp_path) as (env, index):
            for number in range(1, 12):
                add(env, index, random_ids(number, 33), places(np.full(33, number)))
            with env.write() as txn:
                index.drop_packs(txn, np.array([4], np.uint32))
        kills = 0
        while in_killed_child(tmp_path, lambda _, index: merge_all(index), kills % 40):
            kills += 1
            with opened(tmp_path) as (env, index):
                found = [set(lookup(env, index, random_ids(number, 33))["pack"].tolist()) for number in range(1, 12)]
                assert found == [{number if number != 4 else 0} for number in range(1, 12)]
                with env.read() as txn:
                    assert list(index.check(txn)) == []
        assert kills > 5
        with opened(tmp_path) as (env, index):
            assert index.merge_step() is False
            with env.read() as txn:
                assert index.size(txn).entries == 330


WRITER = """
import os, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from test_index import add, opened, places, random_ids
with opened(Path({folder!r})) as (env, index):
    while True:
        with env.write() as txn:
            number = int(bytes(txn.get(b"count", b"0", db=env.database("meta"))))
            index.add(txn, random_ids(number, 4000), places(np.full(4000, number + 1)))
            txn.put(b"count", b"%d" % (number + 1), db=env.database("meta"))
        print(number, flush=True)
        index.merge()
"""


READER = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from test_index import opened, random_ids
with opened(Path({folder!r})) as (env, index):
    print("ready", flush=True)
    looks = 0
    while True:
        with env.read() as txn:
            count = int(bytes(txn.get(b"count", b"0", db=env.database("meta"))))
            for number in {{count - 1, count // 2, looks % max(count, 1)}}:
                if 0 <= number < count:
                    assert (index.lookup(txn, random_ids(number, 4000)[::9])["pack"] == number + 1).all(), number
            assert not index.lookup(txn, random_ids(count, 4000)[::9])["pack"].any(), count
        looks += 1
        if count >= {until}:
            break
    print("right", flush=True)
"""


def start(code, folder, **more):
    code = code.format(tests=str(Path(__file__).parent), folder=str(folder), **more)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())


def test_processes_read_while_another_adds_and_merges_and_is_killed(tmp_path):
    opened_once = opened(tmp_path)
    with opened_once:
        pass
    readers = [start(READER, tmp_path, until=40) for _ in range(2)]
    try:
        assert [each.stdout.readline() for each in readers] == ["ready\n"] * 2
        last = -1
        while last < 40:
            writer = start(WRITER, tmp_path)
            try:
                for _ in range(23):
                    last = int(writer.stdout.readline())
            finally:
                writer.kill()  # wherever it is
                writer.communicate()
        assert [each.stdout.readline() for each in readers] == ["right\n"] * 2
    finally:
        for each in readers:
            each.kill()
            each.communicate()
    with opened(tmp_path) as (env, index), env.read() as txn:
        assert list(index.check(txn)) == []
        assert index.size(txn).entries == 4000 * int(bytes(txn.get(b"count", db=env.database("meta"))))


class IndexAgainstDict(RuleBasedStateMachine):
    """Adds, drops, merges and crashes; after each, every id is where the dict says."""

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.patches = small_parts()
        self.patches.__enter__()
        self.model = {}
        self.dropped = set()
        self.next_pack = 1
        self.open()

    def open(self):
        self.context = opened(Path(self.folder.name))
        self.env, self.index = self.context.__enter__()

    def close(self):
        self.context.__exit__(None, None, None)

    def teardown(self):
        if hasattr(self, "folder"):
            self.close()
            self.patches.__exit__(None, None, None)
            self.folder.cleanup()

    def new_entries(self, numbers, packs):
        first = self.next_pack
        self.next_pack += packs
        return [(number, first + at % packs, at) for at, number in enumerate(numbers)]

    def add_entries(self, env, index, entries, abort=False):
        locations = places([pack for _, pack, _ in entries], [frame for _, _, frame in entries])
        with env.write() as txn:
            index.add(txn, as_array([chunk(number) for number, _, _ in entries]), locations)
            if abort:
                raise KeyError

    def remember(self, entries):
        for number, pack, frame in entries:
            self.model.setdefault(number, set()).add((pack, frame))

    @rule(numbers=st.lists(st.integers(0, 90), min_size=1, max_size=30), packs=st.integers(1, 3))
    def adds(self, numbers, packs):
        entries = self.new_entries(numbers, packs)
        self.add_entries(self.env, self.index, entries)
        self.remember(entries)

    @rule(numbers=st.lists(st.integers(0, 90), min_size=1, max_size=30))
    def adds_and_aborts(self, numbers):
        with pytest.raises(KeyError):
            self.add_entries(self.env, self.index, self.new_entries(numbers, 1), abort=True)

    @rule(steps=st.integers(1, 6))
    def merges(self, steps):
        for _ in range(steps):
            self.index.merge_step()

    @rule()
    def merges_all(self):
        merge_all(self.index)
        with self.env.read() as txn:
            assert not len(self.index.dead(txn))
            everything = self.index.runs(txn)
            assert sum(each.entries for each in everything) == sum(len(each) for each in self.model.values())
            classes = [runs.size_class(each.entries) for each in everything]
        assert all(classes.count(each) < runs.FANIN for each in classes)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drops(self, data):
        alive = sorted({pack for places in self.model.values() for pack, _ in places})
        gone = data.draw(st.sets(st.sampled_from(alive), max_size=4))
        with self.env.write() as txn:
            self.index.drop_packs(txn, np.array(sorted(gone), np.uint32))
        self.dropped |= gone
        self.model = {
            number: left
            for number, places in self.model.items()
            if (left := {place for place in places if place[0] not in gone})
        }

    @rule()
    def reopens(self):
        self.close()
        self.open()

    @rule(numbers=st.lists(st.integers(0, 90), min_size=1, max_size=30), after=st.integers(0, 40))
    def crashes(self, numbers, after):
        """Another process merges, adds, merges, and is killed on the way, unless it was done before."""
        self.close()
        entries = self.new_entries(numbers, 1)

        def work(env, index):
            index.merge_step()
            self.add_entries(env, index, entries)
            merge_all(index)

        in_killed_child(Path(self.folder.name), work, after)
        self.open()
        found = lookup(self.env, self.index, as_array([chunk(number) for number, _, _ in entries]))
        added = found["pack"] == entries[0][1]
        assert added.all() or not added.any()
        if added.all():
            self.remember(entries)

    @invariant()
    def everything_is_where_the_model_says(self):
        if not hasattr(self, "env"):
            return
        ids = as_array([chunk(number) for number in range(100)])
        for skip in ({0}, {pack for pack in range(1, self.next_pack) if pack % 3 == 0}):
            found = lookup(self.env, self.index, ids, np.array(sorted(skip), np.uint32))
            for number in range(100):
                wanted = [place for place in self.model.get(number, ()) if place[0] not in skip]
                newest = max((pack for pack, _ in wanted), default=0)
                assert int(found["pack"][number]) == newest
                assert not wanted or (newest, int(found["frame"][number])) in wanted
        with self.env.read() as txn:
            assert list(self.index.check(txn)) == []
            everything = self.index.locations(txn, chunk(17))
        got = [(int(each["pack"]), int(each["frame"])) for each in everything]
        assert set(got) == self.model.get(17, set())
        assert [pack for pack, _ in got] == sorted((pack for pack, _ in got), reverse=True)


IndexAgainstDict.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
TestIndexAgainstDict = IndexAgainstDict.TestCase
