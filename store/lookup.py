"""Reading the chunk index in a snapshot: which location an id has.

Values are checked when this process first uses them, and damage is told as IndexLostError, naming the file.
Arrays given out are copies; views of LMDB's map never leave a method. May be shared between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from store import parts, runs
from store.environment import IndexLostError
from store.parts import DamagedValueError, Dead, Part, Run, State
from store.runs import LOCATION, Locations, Positions, Queries

if TYPE_CHECKING:
    import lmdb

BATCH = 1 << 18
"""Ids looked up at once; more are cut: bounds memory (some 100 bytes each)."""


@dataclass(frozen=True, slots=True)
class IndexSize:
    """How large the index is: runs, entries (also of dropped packs not yet merged away), bytes of its values."""

    runs: int
    entries: int
    value_bytes: int


class IndexReader:
    """Look-ups in the databases `runs` and `parts`. `path` is the file, for messages; `mac_key` is 32 bytes."""

    def __init__(self, path: Path, database: Callable[[str], lmdb._Database], mac_key: bytes) -> None:
        self._path, self._database, self._key = path, database, mac_key
        self._known: dict[int, tuple[bytes, Run, set[bytes]]] = {}

    def lookup(
        self, txn: lmdb.Transaction, ids: NDArray[np.uint8], skip_packs: NDArray[np.uint32] | None = None
    ) -> Locations:
        """Locations LOCATION (n,) of ids uint8 (n, 32) in any order; pack 0 where there is none.

        Locations in `skip_packs` do not count. A big batch is far cheaper an id than a small one: every part that
        may hold one of the ids costs some 10 us. Raises IndexLostError, lmdb.Error.
        """
        found = np.zeros(len(ids), LOCATION)
        with self.naming():
            skip = self.dead(txn).packs
            if skip_packs is not None and len(skip_packs):
                skip = np.union1d(skip, skip_packs).astype(np.uint32)
            descriptors = self.runs(txn)
            for start in range(0, len(ids), BATCH):
                queries, order = Queries.of(ids[start : start + BATCH])
                best = np.zeros(len(queries), LOCATION)
                for run in descriptors:
                    for chosen, locations in self._search(txn, run, queries):
                        better = locations["pack"] > best["pack"][chosen]
                        better &= ~runs.among(locations["pack"], skip)
                        best[chosen[better]] = locations[better]
                found[start + order] = best
        return found

    def locations(self, txn: lmdb.Transaction, chunk: bytes) -> Locations:
        """All locations of one id, LOCATION (n,), highest pack number first. Raises IndexLostError, lmdb.Error."""
        queries, _ = Queries.of(np.frombuffer(chunk, np.uint8).reshape(1, -1))
        rows = [np.empty(0, LOCATION)]
        with self.naming():
            dead = self.dead(txn).packs
            for run in self.runs(txn):
                rows += [locations for _, locations in self._search(txn, run, queries)]
        everything = np.unique(np.concatenate(rows))
        everything = everything[~runs.among(everything["pack"], dead)]
        return everything[np.argsort(everything["pack"], kind="stable")[::-1]]

    def size(self, txn: lmdb.Transaction) -> IndexSize:
        """How large it is. Raises IndexLostError, lmdb.Error."""
        with self.naming():
            descriptors = self.runs(txn)
        stored = sum(int(each.fences["entries"].sum(dtype=np.int64)) for each in descriptors)
        count = sum(len(each.fences) for each in descriptors)
        entries = sum(each.entries for each in descriptors)
        return IndexSize(len(descriptors), entries, stored * parts.ENTRY_BYTES + count * parts.PART_HEADER)

    def check(self, txn: lmdb.Transaction) -> Iterator[str]:
        """What is wrong with it, one line each; reads all of it. Raises lmdb.Error."""
        try:
            self.state(txn)
            self.dead(txn)
            descriptors = self.runs(txn)
        except DamagedValueError as error:
            yield str(error)
            return
        expected = set()
        for run in descriptors:
            for at in range(len(run.fences)):
                expected.add(run.part_key(at))
                try:
                    columns = self.part(txn, run, at).columns()
                except DamagedValueError as error:
                    yield str(error)
                    continue
                ends = columns.prefix[0], columns.prefix[-1]
                if ends != (run.fences["first"][at], run.fences["last"][at]) or not runs.is_sorted(columns):
                    yield f"run {run.number}, part {at}: is not in order"
        with txn.cursor(db=self._database("parts")) as cursor:
            stray = sum(bytes(key) not in expected for key in cursor.iternext(keys=True, values=False))
        if stray:
            yield f"{stray} parts belong to no run"

    def state(self, txn: lmdb.Transaction) -> State:
        return parts.decode_state(self.get(txn, parts.STATE_KEY), self._key)

    def dead(self, txn: lmdb.Transaction) -> Dead:
        return parts.decode_dead(self.get(txn, parts.DEAD_KEY), self._key)

    def get(self, txn: lmdb.Transaction, key: bytes) -> bytes | None:
        value = txn.get(key, db=self._database("runs"))
        return None if value is None else bytes(value)

    def runs(self, txn: lmdb.Transaction) -> list[Run]:
        """All descriptors, oldest first. One that is byte for byte as last time is not decoded again."""
        known: dict[int, tuple[bytes, Run, set[bytes]]] = {}
        with txn.cursor(db=self._database("runs")) as cursor:
            found = cursor.set_range(parts.RUN_PREFIX)
            while found and bytes(cursor.key()[:1]) == parts.RUN_PREFIX and len(cursor.key()) == parts.RUN_KEY_BYTES:
                number = parts.run_number(bytes(cursor.key()))
                value = bytes(cursor.value())
                before = self._known.get(number)
                if before is None or before[0] != value:
                    trusted = before[2] if before else set()
                    before = value, parts.decode_run(number, value, self._key), trusted
                known[number] = before
                found = cursor.next()
        self._known = known
        return [run for _, run, _ in known.values()]

    def part(self, txn: lmdb.Transaction, run: Run, at: int) -> Part:
        value = txn.get(run.part_key(at), db=self._database("parts"))
        known = self._known.get(run.number)
        trusted = known[2] if known else set()
        return Part(None if value is None else memoryview(value), run, at, self._key, trusted)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Damage found inside is told as what it means to the caller."""
        try:
            yield
        except DamagedValueError as error:
            raise IndexLostError(str(self._path), f"the index of this host is damaged: {error}") from error

    def _search(self, txn: lmdb.Transaction, run: Run, queries: Queries) -> Iterator[tuple[Positions, Locations]]:
        """What a run knows about queries: (queries, each once, and a location for each), copies.

        Few queries meet many parts, so what is done for each part is little: the search in the prefix column.
        Which searches were hits is found for all parts at once, and the rest is done only for parts with hits.
        """
        low = np.searchsorted(queries.prefix, run.fences["first"], "left")
        high = np.searchsorted(queries.prefix, run.fences["last"], "right")
        wanted = np.flatnonzero(high > low)
        lengths = (high - low)[wanted]
        ends = np.cumsum(lengths)
        entry, seen = np.empty(int(lengths.sum()), np.intp), np.empty(int(lengths.sum()), np.uint64)
        met: list[tuple[Part, int]] = []
        for at, start, end, to in zip(
            wanted.tolist(), low[wanted].tolist(), high[wanted].tolist(), ends.tolist(), strict=True
        ):
            part = self.part(txn, run, at)
            first = run.skip if at == 0 else 0
            prefix = part.prefix()[first:]
            met.append((part, first))
            found = prefix.searchsorted(queries.prefix[start:end])
            entry[to - (end - start) : to] = found
            prefix.take(found, mode="clip", out=seen[to - (end - start) : to])
        asked = np.arange(len(entry)) + np.repeat(low[wanted] - (ends - lengths), lengths)
        hits = np.flatnonzero(seen == queries.prefix[asked])
        edges = np.searchsorted(hits, ends)
        for number in np.flatnonzero(np.diff(edges, prepend=0)).tolist():
            part, first = met[number]
            mine = hits[edges[number - 1] if number else 0 : edges[number]]
            columns = part.columns().cut(first, len(part))
            for chosen, entries in runs.matches(columns.prefix, columns.rest, queries, asked[mine], entry[mine]):
                yield chosen, columns.location[entries]
