"""The chunk index at size: python -m bench.index [ENTRIES] [--directory FOLDER].

Adds random ids in commits of a full pack's size, merging after each as a background merger does, then measures
look-ups, small commits, space and memory, and ends with a line of JSON. Ids are made again from seeds when they are
needed, so that what is measured is the index's memory and not the benchmark's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.environment import Environment
from store.index import LOCATION, Index

BATCH = 1 << 18
KEY = b"benchmark key of thirty-two byte"


def ids(batch: int, count: int) -> NDArray[np.uint8]:
    """The ids of a batch, uint8 (count, 32), always the same."""
    return np.frombuffer(np.random.default_rng(batch).bytes(count * 32), np.uint8).reshape(-1, 32)


def places(batch: int, count: int) -> NDArray[np.void]:
    """Locations for the ids of a batch, which is one pack."""
    rows = np.zeros(count, LOCATION)
    rows["pack"] = batch + 1
    rows["frame"], rows["slot"] = np.arange(count) // 16, np.arange(count) % 16
    return rows


class PeakMemory:
    """Peak of this process's anonymous memory (bytes) while a block runs, sampled."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def lookup_seconds(environment: Environment, index: Index, wanted: list[NDArray[np.uint8]], hit: bool) -> list[float]:
    """Seconds for each batch; checks that all or none of its ids are found."""
    seconds = []
    for batch in wanted:
        began = time.perf_counter()
        with environment.read() as txn:
            found = index.lookup(txn, batch)
        seconds.append(time.perf_counter() - began)
        assert bool(((found["pack"] != 0) == hit).all())
    return seconds


def sample(batches: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Ids taken evenly from all batches that were added, shuffled, uint8 (size, 32)."""
    random = np.random.default_rng(seed)
    each = -(-size // batches)
    rows = [ids(batch, BATCH)[random.integers(0, BATCH, each)] for batch in range(batches)]
    return np.ascontiguousarray(random.permutation(np.concatenate(rows))[:size])


def used_bytes(environment: Environment) -> int:
    """Bytes of LMDB pages in use by the index, without free ones."""
    with environment.read() as txn:
        stats = [txn.stat(environment.database(name)) for name in Index.DATABASES]
    return sum(s["psize"] * (s["leaf_pages"] + s["branch_pages"] + s["overflow_pages"]) for s in stats)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="measure the chunk index at size")
    parser.add_argument("entries", type=int, nargs="?", default=2_000_000)
    parser.add_argument("--directory", type=Path, help="where to make it (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perdure-index-", dir=arguments.directory))
    try:
        with Environment(folder, Index.DATABASES, mac_key=KEY) as environment, PeakMemory() as memory:
            print(json.dumps(measure(environment, max(1, arguments.entries // BATCH), memory)))
    finally:
        shutil.rmtree(folder)


def measure(environment: Environment, batches: int, memory: PeakMemory) -> dict[str, float]:
    """Build, then measure; figures by name."""
    index = Index(environment, KEY)
    baseline = anonymous()
    adding, merging, largest_ratio = [], 0.0, 0.0
    for batch in range(batches):
        new, where = ids(batch, BATCH), places(batch, BATCH)
        began = time.perf_counter()
        with environment.write() as txn:
            index.add(txn, new, where)
        adding.append(time.perf_counter() - began)
        began = time.perf_counter()
        index.merge()
        merging += time.perf_counter() - began
        largest_ratio = max(largest_ratio, environment.size() / used_bytes(environment))
    with environment.read() as txn:
        size = index.size(txn)
    print(f"{size.entries} entries in {size.runs} runs")
    print(f"adding {BATCH}: median {statistics.median(adding) * 1e3:.1f} ms; merging in all {merging:.1f} s")
    used = used_bytes(environment)
    print(f"{used / size.entries:.1f} bytes an entry live, file at most {largest_ratio:.2f} times the live bytes")
    figures = {
        "index_entries": size.entries,
        "index_runs": size.runs,
        "index_bytes_per_entry": round(used / size.entries, 2),
        "index_file_vs_live": round(largest_ratio, 3),
        "index_merge_us_per_entry": round(merging / size.entries * 1e6, 3),
    }
    began = time.perf_counter()
    with environment.read() as txn:
        Index(environment, KEY).lookup(txn, sample(batches, BATCH, 7))
    print(f"first batch of a process, all MACs checked: {(time.perf_counter() - began) * 1e3:.0f} ms")
    for size_of_batch in (BATCH, 16384, 1024):
        for what, hit in (("hit", True), ("miss", False)):
            count = 7
            wanted = [
                sample(batches, size_of_batch, seed) if hit else ids(-1 - seed & 0xFFFFFFFF, size_of_batch)
                for seed in range(count)
            ]
            median = statistics.median(lookup_seconds(environment, index, wanted, hit)) / size_of_batch * 1e6
            print(f"look-up in batches of {size_of_batch:6}, {what:4}: {median:.2f} us")
            figures[f"index_us_per_lookup_{what}_{size_of_batch}"] = round(median, 3)
    small = []
    for number in range(20):
        new, where = ids(1_000_000 + number, 5000), places(1_000_000 + number, 5000)
        began = time.perf_counter()
        with environment.write() as txn:
            index.add(txn, new, where)
        small.append(time.perf_counter() - began)
    print(f"a commit of 5000: median {statistics.median(small) * 1e3:.2f} ms, worst {max(small) * 1e3:.2f} ms")
    figures["index_small_commit_ms"] = round(statistics.median(small) * 1e3, 3)
    figures["index_small_commit_ms_max"] = round(max(small) * 1e3, 3)
    index.merge()
    print(f"peak anonymous memory: {memory.peak >> 20} MiB, of which {baseline >> 20} before anything was done")
    figures["index_us_per_lookup"] = max(figures[f"index_us_per_lookup_{what}_{BATCH}"] for what in ("hit", "miss"))
    figures["index_peak_anonymous_mib"] = memory.peak >> 20
    return figures


if __name__ == "__main__":
    main()
