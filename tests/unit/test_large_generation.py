"""Generations with more chunks than go into the index at once, and commits whose index fails after the record."""

import pytest
from store_fixtures import add, content, image, place

from base.errors import StorageError
from store import ledger
from store.catalog import Catalog
from store.chunker import PackingSettings
from store.index.chunks import Index

SMALL_PACKS = PackingSettings(pack_bytes=64 << 10)
PAGES = 900


@pytest.fixture
def slices(monkeypatch):
    """Entries by transaction, as the index gets them, at some 100 at once."""
    monkeypatch.setattr(ledger, "_REPLAY_AT_ONCE", 100)
    sizes, original = [], Index.add

    def noted(self, txn, ids, locations):
        sizes.append(len(ids))
        original(self, txn, ids, locations)

    monkeypatch.setattr(Index, "add", noted)
    return sizes


def test_a_large_generation_is_indexed_some_packs_at_a_time_by_its_writer_and_by_others(slices):
    with place(SMALL_PACKS) as where, where.open() as repository:
        data = image(1, PAGES)
        generation = add(repository, "vm", {"ram": data})
        assert len(generation.packs) > 5
        assert len(slices) > 3
        assert max(slices) < 200  # a pack more than the limit at most
        assert content(repository, generation, "ram") == data
        assert add(repository, "other", {"ram": data}).stored_bytes == 0
        slices.clear()
        with where.elsewhere() as elsewhere:
            assert len(slices) > 3
            assert max(slices) < 200
            assert content(elsewhere, elsewhere.resolve("vm@1"), "ram") == data


def test_an_indexing_that_is_cut_off_inside_a_generation_goes_on_from_there(slices, monkeypatch):
    data = image(2, PAGES)
    with place(SMALL_PACKS) as where:
        with where.open() as repository:
            add(repository, "vm", {"ram": data})
        slices.clear()
        state = where.root / "fresh"
        elsewhere = where.at(where.root)
        elsewhere.state = state
        counted, original = [], Catalog.add_gathered

        def cut(self, txn, gathered):
            counted.append(1)
            if len(counted) == 3:
                raise StorageError("index", "no room")
            original(self, txn, gathered)

        with monkeypatch.context() as patched:
            patched.setattr(Catalog, "add_gathered", cut)
            with pytest.raises(StorageError, match="no room"):
                elsewhere.open()
        before = sum(slices)
        assert before
        with elsewhere.open() as repository:
            assert content(repository, repository.resolve("vm@1"), "ram") == data
            with repository.environment.read() as txn:
                entries = sum(each.entries for each in repository.index.runs(txn))
            assert sum(slices) == entries  # none of them twice


def test_once_the_record_stands_a_failure_of_the_index_is_no_failure_of_the_capture(monkeypatch):
    """Else its packs would be taken back, and the generation would be listed without them."""
    data = image(3, PAGES)
    with place() as where:
        with where.open() as repository:

            def fail(*_):
                raise StorageError("index", "no room")

            with monkeypatch.context() as patched:
                patched.setattr(Catalog, "apply", fail)
                generation = add(repository, "vm", {"ram": data})
            assert generation.name == "vm@1"
            repository.refresh()
            assert content(repository, repository.resolve("vm@1"), "ram") == data
        with where.elsewhere() as elsewhere:
            assert content(elsewhere, elsewhere.resolve("vm@1"), "ram") == data
