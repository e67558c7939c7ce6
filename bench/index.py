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

from store.index.chunks import LOCATION, Index
from store.index.environment import Environment

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
    """By how many bytes this process's anonymous memory grows while a block runs, at its peak, sampled."""

    def __init__(self) -> None:
        self.growth = 0
        self._before = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.growth = max(self.growth, anonymous() - self._before)


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def lookup_seconds(
    environment: Environment, index: Index, wanted: list[NDArray[np.uint8]], hit: bool
) -> list[tuple[float, float]]:
    """Seconds for each batch, by the clock and of the processor; checks that all or none of its ids are found."""
    seconds = []
    for batch in wanted:
        began, worked = time.perf_counter(), time.thread_time()
        with environment.read() as txn:
            found = index.lookup(txn, batch)
        seconds.append((time.perf_counter() - began, time.thread_time() - worked))
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
    batches = max(1, arguments.entries // BATCH)
    figures: dict[str, float] = {}
    try:
        with Environment(folder, Index.DATABASES, mac_key=KEY) as environment:
            index = Index(environment, KEY)
            figures |= build(environment, index, batches)
            figures |= lookups(environment, index, batches)
            figures |= small_commits(environment, index)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures))


def build(environment: Environment, index: Index, batches: int) -> dict[str, float]:
    """Add and merge; gives figures of space and time by name."""
    adding, merging, largest = [], 0.0, 0.0
    with PeakMemory() as memory:
        for batch in range(batches):
            new, where = ids(batch, BATCH), places(batch, BATCH)
            began = time.perf_counter()
            with environment.write() as txn:
                index.add(txn, new, where)
            adding.append(time.perf_counter() - began)
            began = time.perf_counter()
            index.merge()
            merging += time.perf_counter() - began
            largest = max(largest, environment.path.stat().st_size / used_bytes(environment))
    with environment.read() as txn:
        size = index.size(txn)
    used = used_bytes(environment) / size.entries
    print(f"{size.entries} entries in {size.runs} runs")
    print(f"adding {BATCH}: median {statistics.median(adding) * 1e3:.1f} ms; merging in all {merging:.1f} s")
    print(f"{used:.1f} bytes an entry live, file at most {largest:.2f} times the live bytes")
    print(f"adding and merging: at most {memory.growth >> 20} MiB of anonymous memory")
    return {
        "index_entries": size.entries,
        "index_runs": size.runs,
        "index_bytes_per_entry": round(used, 2),
        "index_file_vs_live": round(largest, 3),
        "index_add_us_per_entry": round(statistics.median(adding) / BATCH * 1e6, 3),
        "index_merge_us_per_entry": round(merging / size.entries * 1e6, 3),
        "index_build_peak_mib": memory.growth >> 20,
    }


def lookups(environment: Environment, index: Index, batches: int) -> dict[str, float]:
    """Look up in batches of several sizes; gives microseconds by name."""
    figures: dict[str, float] = {}
    first = sample(batches, BATCH, 7)
    began = time.perf_counter()
    with environment.read() as txn:
        Index(environment, KEY).lookup(txn, first)
    figures["index_first_lookup_ms"] = round((time.perf_counter() - began) * 1e3, 1)
    print(f"first batch of a process, all MACs checked: {figures['index_first_lookup_ms']} ms")
    growth = 0
    for size in (BATCH, 16384, 1024):
        for what, hit in (("hit", True), ("miss", False)):
            wanted = [sample(batches, size, seed) if hit else ids((1 << 32) + seed, size) for seed in range(7)]
            with PeakMemory() as memory:
                seconds = lookup_seconds(environment, index, wanted, hit)
                median, worked = (statistics.median(each) / size * 1e6 for each in zip(*seconds, strict=True))
            growth = max(growth, memory.growth)
            print(f"look-up in batches of {size:6}, {what:4}: {median:.2f} us, {worked:.2f} us of the processor")
            figures[f"index_us_per_lookup_{what}_{size}"] = round(median, 3)
            figures[f"index_cpu_us_per_lookup_{what}_{size}"] = round(worked, 3)
    print(f"look-ups: at most {growth >> 20} MiB of anonymous memory")
    figures["index_us_per_lookup"] = max(figures[f"index_us_per_lookup_{what}_{BATCH}"] for what in ("hit", "miss"))
    figures["index_lookup_peak_mib"] = growth >> 20
    return figures


def small_commits(environment: Environment, index: Index) -> dict[str, float]:
    """Commits of 5000 entries, as a 1 GiB image makes when 2 % of it changed; gives milliseconds by name."""
    seconds = []
    for number in range(20):
        new, where = ids((2 << 32) + number, 5000), places(1_000_000 + number, 5000)
        began = time.perf_counter()
        with environment.write() as txn:
            index.add(txn, new, where)
        seconds.append(time.perf_counter() - began)
    median, worst = statistics.median(seconds) * 1e3, max(seconds) * 1e3
    print(f"a commit of 5000: median {median:.2f} ms, worst {worst:.2f} ms")
    return {"index_small_commit_ms": round(median, 3), "index_small_commit_ms_max": round(worst, 3)}


if __name__ == "__main__":
    main()
