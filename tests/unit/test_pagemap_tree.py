"""Page maps against a dict, and against a naive tree that is built anew from the dict each time."""

import time

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from base import extents
from store import pagemap
from store.pagemap import ZERO_ID, Root

CHUNK = 4096
TEBIBYTE = 1 << 40
PAGES_OF_1_GIB = 1 << 18


def key(level: int) -> bytes:
    return bytes([level]) * 32


class Memory:
    """Nodes in a dict; counts, and checks what it is given."""

    def __init__(self):
        self.nodes = {}
        self.fetched = self.put_count = self.largest = 0
        self.put_ids = set()

    def fetch(self, level, ids):
        assert ids.any(axis=1).all()
        self.fetched += len(ids)
        self.largest = max(self.largest, len(ids))
        return np.stack([np.frombuffer(self.nodes[level, bytes(each)], np.uint8) for each in ids]).reshape(-1, 32, 32)

    def put(self, level, ids, nodes):
        self.put_count += len(ids)
        self.largest = max(self.largest, len(ids))
        for name, node in zip(ids, nodes, strict=True):
            content = node.tobytes()
            assert any(content)
            assert blake3(content, key=key(level)).digest() == bytes(name)
            assert all(not any(child) or self.knows(level - 1, bytes(child)) for child in node), "parent before child"
            self.nodes[level, bytes(name)] = content
            self.put_ids.add((level, bytes(name)))

    def knows(self, level, name):
        return level == 0 or (level, name) in self.nodes

    def reset(self):
        self.fetched = self.put_count = self.largest = 0
        self.put_ids = set()


def empty(chunks: int) -> Root:
    return Root(chunks * CHUNK, CHUNK, 0, ZERO_ID)


def naive(length: int, content: dict[int, bytes]) -> Root:
    """The definition, word for word."""
    if not content:
        return Root(length, CHUNK, 0, ZERO_ID)
    height = 0
    while 32**height <= max(content):
        height += 1
    level = dict(content)
    for at in range(1, height + 1):
        above = {}
        for number, name in level.items():
            above.setdefault(number // 32, bytearray(1024))[number % 32 * 32 : number % 32 * 32 + 32] = name
        level = {number: blake3(bytes(node), key=key(at)).digest() for number, node in above.items()}
    assert list(level) == [0]
    return Root(length, CHUNK, height, level[0])


def arrays(content: dict[int, bytes]):
    numbers = np.array(sorted(content), np.uint64)
    ids = b"".join(content[each] for each in sorted(content))
    return numbers, np.frombuffer(ids, np.uint8).reshape(-1, 32)


def random_ids(count: int, seed: int = 1):
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def read(root, source, start=0, stop=1 << 60) -> dict[int, bytes]:
    found = {}
    for numbers, ids in pagemap.leaves(root, source, start, stop):
        assert numbers.dtype == np.uint64
        assert 0 < len(numbers) <= 32768
        assert not found or max(found) < int(numbers[0])
        found.update(zip(numbers.tolist(), map(bytes, ids), strict=True))
    assert list(found) == sorted(found)
    return found


def tree(root, source) -> set[tuple[int, bytes]]:
    return {(level, bytes(each)) for level, ids in pagemap.nodes(root, source) for each in ids}


NUMBERS = st.one_of(
    st.integers(0, 70),
    st.integers(0, 40_000),
    st.tuples(st.integers(1, 8), st.integers(-2, 2)).map(lambda pair: max(0, 32 ** pair[0] + pair[1])),
    st.integers(0, 1 << 28),
    st.integers(0, 1 << 45),
)
IDS = st.sampled_from([ZERO_ID, *(bytes([each]) * 32 for each in range(1, 5)), bytes(31) + b"\1", b"\1" + bytes(31)])
LENGTHS = st.tuples(NUMBERS, st.integers(1, CHUNK)).map(lambda pair: pair[0] * CHUNK + pair[1])


class PageMaps(RuleBasedStateMachine):
    """One map changed in every way; all earlier roots stay readable."""

    @initialize(length=LENGTHS)
    def begin(self, length):
        self.memory = Memory()
        self.root = Root(length, CHUNK, 0, ZERO_ID)
        self.content = {}
        self.history = [(self.root, {})]

    def became(self, root, content):
        assert self.memory.put_ids <= tree(root, self.memory), "nodes that the new tree does not have"
        self.memory.reset()
        self.root, self.content = root, content
        self.history.append((root, dict(content)))

    @rule(length=LENGTHS | st.none(), changes=st.dictionaries(NUMBERS, IDS, max_size=40))
    def update(self, length, changes):
        length = self.root.length if length is None else length
        chunks = -(-length // CHUNK)
        changes = {number: name for number, name in changes.items() if number < chunks}
        root = pagemap.update(self.root, length, *arrays(changes), self.memory, self.memory, key)
        content = {**{number: name for number, name in self.content.items() if number < chunks}, **changes}
        self.became(root, {number: name for number, name in content.items() if name != ZERO_ID})

    @rule(start=NUMBERS, count=st.integers(1, 3000), name=IDS)
    def fill(self, start, count, name):
        numbers = range(start, min(start + count, self.root.chunks))
        changes = dict.fromkeys(numbers, name)
        root = pagemap.update(self.root, self.root.length, *arrays(changes), self.memory, self.memory, key)
        content = {**self.content, **changes}
        self.became(root, {number: name for number, name in content.items() if name != ZERO_ID})

    @rule(rows=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6))
    def clear(self, rows):
        ranges = np.array(rows, np.int64).reshape(-1, 2)
        root = pagemap.clear(self.root, ranges, self.memory, self.memory, key)
        kept = {
            number: name for number, name in self.content.items() if not any(low <= number < high for low, high in rows)
        }
        self.became(root, kept)

    @rule(at=st.integers(0, 1 << 30))
    def go_back(self, at):
        self.root, content = self.history[at % len(self.history)]
        self.content = dict(content)

    @rule(numbers=st.sets(NUMBERS, max_size=30))
    def look_up(self, numbers):
        wanted = sorted(numbers | set(list(self.content)[:20]))
        found = pagemap.lookup(self.root, self.memory, np.array(wanted, np.uint64))
        assert [bytes(each) for each in found] == [self.content.get(each, ZERO_ID) for each in wanted]

    @rule(start=NUMBERS, stop=NUMBERS, at=st.none() | st.tuples(*[st.integers(0, 10_000)] * 2, st.integers(-1, 1)))
    def read_window(self, start, stop, at):
        if at is not None and self.content:  # edges where something is
            known = sorted(self.content)
            start, stop = known[at[0] % len(known)] + at[2], known[at[1] % len(known)] + at[2]
            start, stop = max(0, min(start, stop)), max(start, stop)
        wanted = {number: name for number, name in self.content.items() if start <= number < stop}
        assert read(self.root, self.memory, start, stop) == wanted

    @rule(at=st.integers(0, 1 << 30))
    def compare(self, at):
        other, content = self.history[at % len(self.history)]
        wanted = {
            number for number in content.keys() | self.content.keys() if content.get(number) != self.content.get(number)
        }
        for a, b in ((self.root, other), (other, self.root)):
            parts = list(pagemap.diff(a, b, self.memory, self.memory))
            rows = np.concatenate([extents.EMPTY, *parts])
            assert (np.diff(rows.ravel()) >= 0).all()
            assert set(extents.numbers(extents.normalise(rows), 1).tolist()) == wanted

    @invariant()
    def equals_the_definition(self):
        assert self.root == naive(self.root.length, self.content)
        assert read(self.root, self.memory) == self.content


def test_every_window_of_a_small_map():
    memory = Memory()
    content = {number: bytes([number + 1]) * 32 for number in (0, 1, 31, 32, 33, 64, 100)}
    root = pagemap.update(empty(128), 128 * CHUNK, *arrays(content), memory, memory, key)
    for start in range(130):
        for stop in (*range(130), 1 << 40):
            assert read(root, memory, start, stop).keys() == {each for each in content if start <= each < stop}


TestPageMaps = PageMaps.TestCase
TestPageMaps.settings = settings(max_examples=150, stateful_step_count=20)


def build(chunks, seed=1):
    memory = Memory()
    numbers = np.arange(chunks, dtype=np.uint64)
    root = pagemap.update(empty(chunks), chunks * CHUNK, numbers, random_ids(chunks, seed), memory, memory, key)
    return memory, root


@given(st.integers(1, 5000), st.integers(1, 700), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_windows_in_any_order_give_the_same_root(chunks, window, random):
    ids = random_ids(chunks)
    memory = Memory()
    root = empty(chunks)
    starts = list(range(0, chunks, window))
    random.shuffle(starts)
    for start in starts:
        numbers = np.arange(start, min(start + window, chunks), dtype=np.uint64)
        root = pagemap.update(root, root.length, numbers, ids[start : start + window], memory, memory, key)
    assert root == build(chunks)[1]


def test_two_percent_dirty_of_1_gib_emits_about_1_mib():
    memory, root = build(PAGES_OF_1_GIB)
    assert memory.put_count == 8192 + 256 + 8 + 1
    generator = np.random.default_rng(2)
    for aligned in (8, 1):
        starts = generator.choice(PAGES_OF_1_GIB // 8 - 1, PAGES_OF_1_GIB // 400, replace=False) * 8
        starts += 0 if aligned == 8 else generator.integers(0, 8, len(starts))
        dirty = np.unique(starts[:, None] + np.arange(8)).astype(np.uint64)
        memory.reset()
        changed = pagemap.update(root, root.length, dirty, random_ids(len(dirty), 3), memory, memory, key)
        mebibytes = memory.put_count / 1024
        print(f"{len(dirty)} dirty pages in runs of 8 aligned to {aligned}: {mebibytes:.2f} MiB of nodes")
        assert 0.7 < mebibytes < 1.1
        assert memory.fetched == memory.put_count
        memory.reset()
        found = np.concatenate(list(pagemap.diff(root, changed, memory, memory)))
        assert np.array_equal(extents.numbers(extents.normalise(found), 1), dirty)
        assert memory.fetched <= 2 * 1024 * 1.1


class Nowhere:
    """A sink that costs nothing."""

    def fetch(self, level, _):
        raise AssertionError(f"a new map reads nothing, but a node of level {level} was asked for")

    def put(self, level, ids, nodes):
        pass


def test_a_full_build_is_fast():
    numbers, ids = np.arange(PAGES_OF_1_GIB, dtype=np.uint64), random_ids(PAGES_OF_1_GIB)
    best = 9.0
    for _ in range(5):
        began = time.process_time()
        pagemap.update(empty(PAGES_OF_1_GIB), 1 << 30, numbers, ids, Nowhere(), Nowhere(), key)
        best = min(best, time.process_time() - began)
    print(f"full build of {PAGES_OF_1_GIB} pages: {best * 1000:.0f} ms")
    assert best < 0.2


@pytest.mark.parametrize("chunks", [PAGES_OF_1_GIB, TEBIBYTE // CHUNK])
def test_one_change_costs_one_path(chunks):
    memory = Memory()
    numbers = np.unique(np.random.default_rng(5).integers(0, chunks, 3000)).astype(np.uint64)
    numbers = np.union1d(numbers, np.array([chunks - 1], np.uint64))
    root = pagemap.update(empty(chunks), chunks * CHUNK, numbers, random_ids(len(numbers)), memory, memory, key)
    for number in (0, int(numbers[1000]), chunks - 1):
        memory.reset()
        at = np.array([number], np.uint64)
        changed = pagemap.update(root, root.length, at, random_ids(1, 9), memory, memory, key)
        assert memory.put_count <= root.height
        assert memory.fetched <= root.height
        memory.reset()
        assert pagemap.update(changed, root.length, at, random_ids(1, 9), memory, memory, key) == changed
        assert not memory.put_count, "nothing changed, so nothing is new"
        memory.reset()
        assert [each.tolist() for each in pagemap.diff(root, changed, memory, memory)] == [[[number, number + 1]]]
        assert memory.fetched <= 2 * root.height


def test_wide_ranges_are_cleared_without_being_counted():
    chunks = TEBIBYTE // CHUNK
    memory = Memory()
    numbers = np.unique(np.random.default_rng(6).integers(0, chunks, 20_000)).astype(np.uint64)
    root = pagemap.update(empty(chunks), TEBIBYTE, numbers, random_ids(len(numbers)), memory, memory, key)
    for rows, most in (
        ([(1, chunks - 1)], 2 * root.height),
        ([(0, chunks)], root.height),
        ([(0, 1 << 59)], root.height),
    ):
        memory.reset()
        left = pagemap.clear(root, np.array(rows, np.int64), memory, memory, key)
        assert memory.fetched <= most
        assert memory.put_count <= most
        assert read(left, memory).keys() == {
            each for each in numbers.tolist() if not any(low <= each < high for low, high in rows)
        }
    memory.reset()
    assert pagemap.update(root, CHUNK, *arrays({}), memory, memory, key).height == 0
    assert memory.fetched <= root.height


def test_a_batch_is_never_more_than_1024_nodes():
    chunks = 1 << 40
    memory = Memory()
    numbers = np.arange(0, chunks, chunks // 6000).astype(np.uint64)  # every one in a node of its own
    root = pagemap.update(empty(chunks), chunks * CHUNK, numbers, random_ids(len(numbers)), memory, memory, key)
    for _ in pagemap.leaves(root, memory, 0, chunks):
        pass
    for _ in pagemap.diff(empty(chunks), root, memory, memory):
        pass
    for _, ids in pagemap.nodes(root, memory, lowest=0):
        assert len(ids) <= 1024
    assert memory.largest <= 1024
    pagemap.lookup(root, memory, numbers)
    assert memory.largest <= 8192


def test_nodes_leave_out_what_was_seen():
    memory, root = build(40_000)
    changed = pagemap.update(root, root.length, np.array([77], np.uint64), random_ids(1, 4), memory, memory, key)
    seen = set()

    def fresh(ids):
        names = [bytes(each) for each in ids]
        mask = np.array([each not in seen for each in names], np.bool_)
        seen.update(names)
        return mask

    first = [(level, len(ids)) for level, ids in pagemap.nodes(root, memory, fresh, lowest=0)]
    assert sum(count for level, count in first if level == 0) == 40_000
    memory.reset()
    again = [(level, len(ids)) for level, ids in pagemap.nodes(changed, memory, fresh, lowest=0)]
    assert again == [(level, 1) for level in range(root.height, -1, -1)]
    assert memory.fetched == root.height
    memory.reset()
    assert len(tree(root, memory)) == 1250 + 40 + 2 + 1
    assert memory.fetched == 40 + 2 + 1, "nodes of level 1 need not be read to be named"


def test_small_and_empty_maps():
    memory = Memory()
    one = pagemap.update(empty(1), 5, np.zeros(1, np.uint64), random_ids(1), memory, memory, key)
    assert one == Root(5, CHUNK, 0, random_ids(1).tobytes())
    assert not memory.put_count
    assert read(one, memory) == {0: one.id}
    assert list(pagemap.nodes(one, memory)) == []
    assert [(level, bytes(ids[0])) for level, ids in pagemap.nodes(one, memory, lowest=0)] == [(0, one.id)]
    assert read(empty(1 << 28), memory) == {}
    assert not pagemap.lookup(empty(9), memory, np.arange(20, dtype=np.uint64)).any()
    assert pagemap.clear(empty(1 << 28), np.array([[0, 1 << 28]]), memory, memory, key) == empty(1 << 28)
    assert pagemap.update(one, 0, *arrays({}), memory, memory, key) == Root(0, CHUNK, 0, ZERO_ID)


def test_numbers_that_do_not_fit_are_refused():
    memory = Memory()
    for wrong in ([8], [3, 3], [5, 4], [1 << 63]):
        with pytest.raises(ValueError, match="below 8"):
            pagemap.update(empty(8), 8 * CHUNK, np.array(wrong, np.uint64), random_ids(len(wrong)), memory, memory, key)
    with pytest.raises(ValueError, match="too many"):
        pagemap.update(empty(8), CHUNK << 61, *arrays({}), memory, memory, key)
    with pytest.raises(ValueError, match="compared"):
        list(pagemap.diff(empty(8), Root(8, 8192, 0, ZERO_ID), memory, memory))


def test_ids_bind_their_level():
    memory = Memory()
    node = random_ids(32)
    low = pagemap.update(empty(32), 32 * CHUNK, np.arange(32, dtype=np.uint64), node, memory, memory, key)
    assert bytes(pagemap.node_ids(key(2), node.reshape(1, 32, 32))) != low.id
    assert bytes(pagemap.node_ids(key(1), node.reshape(1, 32, 32))) == low.id
