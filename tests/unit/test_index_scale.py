"""The chunk index with twenty million entries, added in commits of two million while others read and merge.

What it costs in time is bench/index.py's to say; here are its size, its answers, and what a small commit writes.
"""

import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from store.index.chunks import LOCATION, Index
from store.index.environment import Environment

KEY = b"k" * 32
COMMIT, COMMITS = 1 << 21, 10
SAMPLE = 4096


def ids_of(commit: int, count: int = COMMIT):
    return np.frombuffer(np.random.default_rng(commit).bytes(count * 32), np.uint8).reshape(-1, 32)


def places_of(commit: int, count: int = COMMIT):
    rows = np.zeros(count, LOCATION)
    rows["pack"], rows["frame"], rows["slot"] = commit + 1, np.arange(count) // 16, np.arange(count) % 16
    return rows


@contextmanager
def opened(folder):
    with Environment(Path(folder), ("meta", *Index.DATABASES), mac_key=KEY) as environment:
        yield environment, Index(environment, KEY)


def start(work, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def merge_for_ever(folder, ready: int) -> None:
    with opened(folder) as (_, index):
        os.write(ready, b".")
        while True:
            index.merge()


def add_all(folder, *told: int) -> None:
    with opened(folder) as (environment, index):
        for commit in range(COMMITS):
            with environment.write() as txn:
                index.add(txn, ids_of(commit), places_of(commit))
                txn.put(b"commits", (commit + 1).to_bytes(2, "big"), db=environment.database("meta"))
            assert environment.path.stat().st_size < 2.2 * live_bytes(environment)
            for each in told:
                os.write(each, b".")


def right(environment, index, commit: int) -> bool:
    """Whether ids of a commit are where they were put, and others are nowhere."""
    with environment.read() as txn:
        found = index.lookup(txn, ids_of(commit, SAMPLE))
        missing = index.lookup(txn, ids_of(1000 + commit, SAMPLE))
    return bool((found == places_of(commit, SAMPLE)).all()) and not missing["pack"].any()


def read_while_it_grows(folder, told: int, writing_end: int) -> None:
    os.close(writing_end)
    rng = np.random.default_rng(5)
    with opened(folder) as (environment, index):
        last = 0
        while os.read(told, 1):
            with environment.read() as txn:
                last = int.from_bytes(bytes(txn.get(b"commits", db=environment.database("meta"))), "big")
            assert right(environment, index, int(rng.integers(last)))
        assert last == COMMITS


def live_bytes(environment) -> int:
    with environment.read() as txn:
        facts = [txn.stat(environment.database(each)) for each in Index.DATABASES]
    return sum(each["psize"] * (each["leaf_pages"] + each["branch_pages"] + each["overflow_pages"]) for each in facts)


def written_bytes(environment, index, commit: int, monkeypatch) -> int:
    """Bytes of the values that a commit of 5000 entries writes."""
    written = []
    apply = Index._apply

    def counting(self, txn, puts, deletes=()):
        written.append(sum(len(value) for _, _, value in puts))
        apply(self, txn, puts, deletes)

    with monkeypatch.context() as patch, environment.write() as txn:
        patch.setattr(Index, "_apply", counting)
        index.add(txn, ids_of(commit, 5000), places_of(commit, 5000))
    return sum(written)


@pytest.mark.timeout(900)
def test_twenty_million_entries(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with opened(folder):
            pass
        ready, done, seen = os.pipe(), os.pipe(), os.pipe()
        others = [start(add_all, folder, done[1], seen[1]), start(read_while_it_grows, folder, *seen)]
        os.close(done[1])
        os.close(seen[1])
        merger = start(merge_for_ever, folder, ready[1])
        added = 0
        while os.read(done[0], 1):
            added += 1
            if added % 2 == 0:  # wherever it is
                os.read(ready[0], 1)
                os.kill(merger, signal.SIGKILL)
                os.waitpid(merger, 0)
                merger = start(merge_for_ever, folder, ready[1])
        os.kill(merger, signal.SIGKILL)
        os.waitpid(merger, 0)
        assert [os.waitpid(each, 0)[1] for each in others] == [0, 0]
        with opened(folder) as (environment, index):
            while index.merge():
                pass
            with environment.read() as txn:
                size = index.size(txn)
            assert size.entries == COMMITS * COMMIT
            assert size.runs <= 27
            assert live_bytes(environment) / size.entries < 50
            assert environment.path.stat().st_size < 2.2 * live_bytes(environment)
            assert all(right(environment, index, commit) for commit in range(COMMITS))
            large = [written_bytes(environment, index, 500 + n, monkeypatch) for n in range(10)]
        with tempfile.TemporaryDirectory(dir="/dev/shm") as empty, opened(empty) as (environment, index):
            small = [written_bytes(environment, index, 500 + n, monkeypatch) for n in range(10)]
        assert sum(large) < 1.5 * sum(small)
        for each in (*ready, done[0], seen[0]):
            os.close(each)
