"""What a generation has stored so far: a set that forgets nothing, in bounded memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from base.disk import Disk
from store import stored_ids
from store.stored_ids import StoredIds


def ids(numbers):
    """An id for each number; those of neighbours begin with the same bytes."""
    rows = np.zeros((len(numbers), 32), np.uint8)
    rows[:, 0] = np.array(numbers, np.uint64) % 7 + 1
    rows[:, 24:] = np.array(numbers, ">u8").reshape(-1, 1).view(np.uint8)
    return rows


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@given(some.lists(some.lists(some.integers(0, 300), max_size=60), max_size=12))
@settings(max_examples=40)
def test_it_knows_what_a_set_would_know(state, batches):
    """With room for 50 in memory, so that most is looked up on the disk."""
    before, stored_ids._HELD = stored_ids._HELD, 50
    known = StoredIds(state, Disk())
    try:
        model = set()
        for batch in batches:
            wanted = [number not in model and not model.add(number) for number in batch]
            assert known.fresh(ids(batch)).tolist() == wanted
            assert len(known._held) <= 50 + 60
    finally:
        stored_ids._HELD = before
        known.close()
    assert not list(state.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_ids, "_HELD", 10)
    (tmp_path / "stored-dead").mkdir()
    (tmp_path / "stored-dead" / "lock").write_bytes(b"")
    first, second = StoredIds(tmp_path, Disk()), StoredIds(tmp_path, Disk())
    first.fresh(ids(range(20)))
    second.fresh(ids(range(30)))
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2 and not (tmp_path / "stored-dead").exists()
    assert not first.fresh(ids(range(20))).any()
    first.close()
    assert not second.fresh(ids(range(30))).any()
    second.close()
    assert not list(tmp_path.iterdir())
