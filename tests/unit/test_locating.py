"""Locations found from memory, or by what follows a few in their packs, are those that the index has."""

import itertools

import numpy as np
import pytest
from store_fixtures import add, image, place

from restore.plan import MovedError, RegionPlan
from store import pagemap
from store.chunker import PackingSettings
from store.index import held
from store.locating import Locator

PAGE = 4096


def ids_of(repository, generation, name="ram"):
    root = generation.regions[name].root
    return np.concatenate([ids for _, ids in pagemap.leaves(root, repository.nodes, 0, root.chunks)])


@pytest.fixture
def stored():
    """A repository whose newest generation has content of three, in packs of three sizes, and its page ids in order."""
    with place(PackingSettings(pack_bytes=1 << 20)) as where, where.open() as repository:
        first, second = image(1, 3000), image(2, 900)
        one = add(repository, "vm", {"ram": first})
        two = add(repository, "vm", {"ram": second + first[900 * PAGE : 2000 * PAGE]}, one)
        mixed = bytearray(first[: 2500 * PAGE])
        for page in range(0, 2500, 37):
            mixed[page * PAGE : (page + 1) * PAGE] = second[page % 800 * PAGE : (page % 800 + 1) * PAGE]
        mixed += image(3, 300)
        generation = add(repository, "vm", {"ram": bytes(mixed)}, two)
        yield where, repository, ids_of(repository, generation)


def locator_of(repository, holds):
    found = Locator(repository.nodes, repository.frames)
    if holds:
        found.hold()
    return found


def places(repository, ids, found):
    """Whether each frame that was found has the id wanted, at that place."""
    for name, place_ in zip(ids, found.tolist(), strict=True):
        pack, frame, slot, _ = place_
        frame_ids, _ = repository.frames.frame(pack, frame)
        if bytes(frame_ids[slot]) != bytes(name):
            return False
    return True


@pytest.mark.parametrize("holds", [True, False])
def test_what_is_stored_is_found_where_it_is_in_any_number_and_order(stored, holds):
    _, repository, ids = stored
    locator = locator_of(repository, holds)
    shuffled = np.random.default_rng(1).permutation(len(ids))
    for wanted in (ids, ids[:1], ids[:64], ids[500:565], ids[::3], ids[shuffled], ids[:0]):
        assert places(repository, wanted, locator.locate(wanted))
        assert (locator.locate(wanted)["pack"] > 0).all()


@pytest.mark.parametrize("holds", [True, False])
def test_what_is_not_stored_is_not_found_and_what_is_stored_later_is(stored, holds):
    _, repository, ids = stored
    locator = locator_of(repository, holds)
    strangers = np.random.default_rng(1).integers(0, 256, (200, 32), np.uint8)
    assert not locator.locate(strangers)["pack"].any()
    mixed = np.concatenate([ids[:300], strangers, ids[300:600]])
    found = locator.locate(mixed)
    assert np.flatnonzero(found["pack"] == 0).tolist() == list(range(300, 500))
    later = ids_of(repository, add(repository, "vm", {"ram": image(9, 400)}))
    assert places(repository, later, locator.locate(later))


def test_of_neighbours_few_are_looked_up(stored):
    _, repository, _ = stored
    pages = [np.random.default_rng(n).bytes(PAGE) for n in range(2000)]
    for at in range(0, 2000, 11):
        pages[at] = pages[at % 7]  # stored once, so that the others are not where they would be
    ids = ids_of(repository, add(repository, "vm", {"ram": b"".join(pages)}))
    asked = []

    class Asked:
        def locate(self, some):
            asked.append(len(some))
            return repository.nodes.locate(some)

    Locator(Asked(), repository.frames).locate(ids)
    assert sum(asked) * 4 < len(ids)


def test_a_pack_whose_footer_cannot_be_read_costs_look_ups_and_no_more(stored):
    where, repository, ids = stored
    expected = repository.nodes.locate(ids)
    for pack in (where.path / "packs").iterdir():
        with pack.open("r+b") as file:
            file.seek(-40, 2)
            file.write(bytes(8))
    assert np.array_equal(Locator(repository.nodes, repository.frames).locate(ids), expected)


def test_an_index_that_is_too_large_or_empty_is_not_held(stored, monkeypatch):
    _, repository, ids = stored
    monkeypatch.setattr(held, "ENTRIES_MAX", 100)
    assert repository.nodes.held() is None
    locator = Locator(repository.nodes, repository.frames)
    locator.hold()
    assert (locator.locate(ids)["pack"] > 0).all()
    with place() as fresh, fresh.open() as empty:
        assert empty.nodes.held() is None


def test_what_was_dropped_is_not_held(stored):
    _, repository, ids = stored
    before = repository.nodes.held().locate(ids)
    dropped = np.array([before["pack"][0]], np.uint32)
    with repository.environment.write() as txn:
        repository.index.drop_packs(txn, dropped)
    after = repository.nodes.held().locate(ids)
    assert (before["pack"] == dropped).any()
    assert not (after["pack"] == dropped).any()


def test_lowest_nodes_here_and_there_have_what_a_walk_finds():
    with place() as where, where.open() as repository:
        for pages in (1, 20, 33, 1100):
            generation = add(
                repository, f"vm{pages}", {"ram": b"".join(n.to_bytes(4, "big") * 1024 for n in range(1, pages + 1))}
            )
            root = generation.regions["ram"].root
            wanted = np.array(sorted({0, 1, pages // 32, pages // 32 + 5}), np.int64)
            found = pagemap.leaf_nodes(root, repository.nodes, wanted)
            walked = {
                int(n): bytes(i)
                for ns, ids in pagemap.leaves(root, repository.nodes, 0, pages)
                for n, i in zip(ns, ids, strict=True)
            }
            for leaf, slot in itertools.product(range(len(wanted)), range(32)):
                assert bytes(found[leaf, slot]) == walked.get(int(wanted[leaf]) * 32 + slot, bytes(32))


def test_what_memory_says_is_no_more_than_a_hint():
    """Whatever it says, what is opened is what the page map has."""
    with place() as where, where.open() as repository:
        content = image(5, 1301)[: 1300 * PAGE]
        generation = add(repository, "vm", {"ram": content})
        locator = Locator(repository.nodes, repository.frames)
        locator.hold()
        known = locator._held._words
        known[:] = np.random.default_rng(1).permutation(known)
        known[::7, 0], known[1::7, 1], known[2::7, 2] = 4_000_000, 4_000_000, 65_535  # no such pack, frame, slot
        plan = RegionPlan(repository.nodes, locator, repository.frames, generation.regions["ram"])
        plan.plan(0, plan.count)
        for window in plan.windows.values():
            for at, page in enumerate(window.numbers.tolist()):
                frame, slot = plan.open(window, at)
                assert frame.chunks[slot].tobytes() == content[page * PAGE : (page + 1) * PAGE]
        [around] = plan.around(np.array([640]))
        assert set(around.numbers.tolist()) == {
            n for n in range(19 * 32, 22 * 32) if any(content[n * PAGE : (n + 1) * PAGE])
        }
        locator.hold()
        known = locator._held._words
        known[:] = known[::-1]
        plan = RegionPlan(repository.nodes, locator, repository.frames, generation.regions["ram"])
        plan.plan(0, 1)
        window = plan.windows[0]
        left = np.arange(len(window.numbers))
        while len(left):
            members = left[window.frames[left] == window.frames[left[0]]]
            try:
                found = plan.chunks(window, members)
            except MovedError:
                continue
            for page, chunk in zip(window.numbers[members].tolist(), found, strict=True):
                assert chunk.tobytes() == content[page * PAGE : (page + 1) * PAGE]
            left = np.setdiff1d(left, members)
