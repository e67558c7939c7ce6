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

from base.arrays import distinct
from store.index import parts, runs
from store.index.environment import IndexLostError
from store.index.parts import DamagedValueError, Run, State
from store.index.runs import LOCATION, Columns, Locations, Packs, Positions, Prefixes, Queries

if TYPE_CHECKING:
    import lmdb

BATCH = 1 << 18
"""Ids looked up at once; more are cut: bounds memory (some 100 bytes each)."""

_MANY = 32
"""For so many queries to one part it pays to read its prefix column through first: binary search alone waits for
memory at each of its last steps (0.34 us a query at 20 M entries, with reading through 0.14)."""


@dataclass(frozen=True, slots=True)
class IndexSize:
    """How large the index is. `entries` counts locations, also those in dropped packs until they are merged away."""

    runs: int
    entries: int


class IndexReader:
    """Look-ups in the databases `runs` and `parts`. `path` is the file, for messages; `mac_key` is 32 bytes."""

    def __init__(self, path: Path, database: Callable[[str], lmdb._Database], mac_key: bytes) -> None:
        self._path, self._database, self._key = path, database, mac_key
        self._known: dict[int, tuple[bytes, Run, set[bytes]]] = {}

    def lookup(
        self, txn: lmdb.Transaction, ids: NDArray[np.uint8], skip_packs: NDArray[np.uint32] | None = None
    ) -> Locations:
        """Locations LOCATION (n,) of ids uint8 (n, 32) in any order; pack 0 where there is none.

        Locations in `skip_packs` do not count. A big batch is far cheaper an id than a small one, since every part
        that may hold one of the ids costs some 10 us, and 10 more if it does: at 20 M entries (420 parts) 0.3 us an
        id in batches of 262,144, but 9 us in batches of 1,024. Raises IndexLostError, lmdb.Error.
        """
        found = np.zeros(len(ids), LOCATION)
        with self.naming():
            skip = self.dead(txn)
            if skip_packs is not None and len(skip_packs):
                skip = distinct(np.concatenate([skip, skip_packs.astype(np.uint32)]))
            descriptors = self.runs(txn)
            for start in range(0, len(ids), BATCH):
                queries, order = Queries.of(ids[start : start + BATCH])
                best = np.zeros(len(queries), LOCATION)
                for run in descriptors:
                    for chosen, locations in self._search(txn, run, queries):
                        better = locations["pack"] > best["pack"][chosen]
                        if len(skip):
                            better &= ~runs.among(locations["pack"], skip)
                        if not better.all():
                            chosen, locations = chosen[better], locations[better]
                        runs.location_words(best)[chosen] = runs.location_words(locations)
                place = np.empty(len(order), np.intp)
                place[order] = np.arange(len(order))
                found[start : start + len(order)] = best.take(place)
        return found

    def locations(self, txn: lmdb.Transaction, chunk: bytes) -> Locations:
        """All locations of one id, LOCATION (n,), highest pack number first. Raises IndexLostError, lmdb.Error."""
        queries, _ = Queries.of(np.frombuffer(chunk, np.uint8).reshape(1, -1))
        rows = [np.empty(0, LOCATION)]
        with self.naming():
            dead = self.dead(txn)
            for run in self.runs(txn):
                rows += [locations for _, locations in self._search(txn, run, queries)]
        everything = np.unique(np.concatenate(rows))
        everything = everything[~runs.among(everything["pack"], dead)]
        return everything[np.argsort(everything["pack"], kind="stable")[::-1]]

    def size(self, txn: lmdb.Transaction) -> IndexSize:
        """How large it is. Raises IndexLostError, lmdb.Error."""
        with self.naming():
            descriptors = self.runs(txn)
        return IndexSize(len(descriptors), sum(each.entries for each in descriptors))

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
                expected |= {run.prefix_key(at), run.body_key(at)}
                try:
                    columns = self.columns(txn, run, at)
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
        """The index's counters. Raises DamagedValueError, lmdb.Error."""
        return parts.decode_state(self.get(txn, parts.STATE_KEY), self._key)

    def dead(self, txn: lmdb.Transaction) -> Packs:
        """Dropped packs, ascending, of which entries may be left. Raises DamagedValueError, lmdb.Error."""
        return parts.decode_dead(self.get(txn, parts.DEAD_KEY), self._key)

    def get(self, txn: lmdb.Transaction, key: bytes) -> bytes | None:
        """A copy of a value of the database `runs`. Raises lmdb.Error."""
        value = txn.get(key, db=self._database("runs"))
        return None if value is None else bytes(value)

    def runs(self, txn: lmdb.Transaction) -> list[Run]:
        """All descriptors, oldest first; one that is byte for byte as last time is not decoded again.

        Raises DamagedValueError, lmdb.Error.
        """
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

    def prefix(self, txn: lmdb.Transaction, run: Run, at: int) -> Prefixes:
        """Prefix column of a run's part at a position: a view. Raises DamagedValueError, lmdb.Error."""
        value = txn.get(run.prefix_key(at), db=self._database("parts"))
        return parts.decode_prefix(run, at, value, self._key, self._trusted(run))

    def body(self, txn: lmdb.Transaction, run: Run, at: int) -> tuple[NDArray[np.uint8], Locations]:
        """Rest and location columns of that part: views. Raises DamagedValueError, lmdb.Error."""
        value = txn.get(run.body_key(at), db=self._database("parts"))
        return parts.decode_body(run, at, value, self._key, self._trusted(run))

    def columns(self, txn: lmdb.Transaction, run: Run, at: int) -> Columns:
        """All columns of that part: views. Raises DamagedValueError, lmdb.Error."""
        return Columns(self.prefix(txn, run, at), *self.body(txn, run, at))

    def hints(self, txn: lmdb.Transaction, run: Run, at: int) -> tuple[Prefixes, Locations]:
        """Prefix and location columns of that part, not checked, as of parts.decode_hints: views."""
        values = (txn.get(key, db=self._database("parts")) for key in (run.prefix_key(at), run.body_key(at)))
        return parts.decode_hints(run, at, *values)

    def _trusted(self, run: Run) -> set[bytes]:
        known = self._known.get(run.number)
        return known[2] if known else set()

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
        prefixes: list[Prefixes] = []
        for at, start, end, to in zip(
            wanted.tolist(), low[wanted].tolist(), high[wanted].tolist(), ends.tolist(), strict=True
        ):
            prefix = self.prefix(txn, run, at)
            prefixes.append(prefix)
            if end - start >= _MANY:
                np.add.reduce(prefix[::8])
            found = prefix.searchsorted(queries.prefix[start:end])
            entry[to - (end - start) : to] = found
            prefix.take(found, mode="clip", out=seen[to - (end - start) : to])
        asked = np.arange(len(entry)) + np.repeat(low[wanted] - (ends - lengths), lengths)
        hits = np.flatnonzero(seen == queries.prefix[asked])
        edges = np.searchsorted(hits, ends)
        rest, location = np.empty((len(hits), 3), np.uint64), np.empty(len(hits), LOCATION)
        plain = np.ones(len(hits), np.bool_)
        for number in np.flatnonzero(np.diff(edges, prepend=0)).tolist():
            mine = slice(int(edges[number - 1]) if number else 0, int(edges[number]))
            entries = entry[hits[mine]]
            stored, places = self.body(txn, run, int(wanted[number]))
            if run.fences["tied"][wanted[number]]:
                plain[mine] = False
                for chosen, each in runs.matches(prefixes[number], stored, queries, asked[hits[mine]], entries):
                    yield chosen, places.take(each)
            else:
                runs.words(stored).take(entries, axis=0, mode="clip", out=rest[mine])
                places.take(entries, mode="clip", out=location[mine])
        chosen = asked[hits]
        same = runs.equal(rest, queries, chosen) & plain
        yield (chosen, location) if same.all() else (chosen[same], location[same])
