"""The chunk index: where each chunk id is, as sorted runs in LMDB.

Every commit adds a run; runs of similar size are merged. One LMDB key per random id rewrites about a leaf for each
new chunk once the index is large (5.7 us and 185 bytes an entry at 10 M); a run is written once, in one piece.

Invariants:
- An entry is found as soon as the transaction that added it has committed, and until the pack is dropped. Of several
  locations of an id the one in the pack with the highest number is given: pack numbers must rise with time, and
  never be used again.
- Parts are immutable, and run numbers are never used again. Readers in other processes keep their snapshot.
- A merge moves entries in order from its inputs to its output, at most one part (2 MiB) a transaction; each
  transaction leaves an index that is complete and right, so a merge may be killed anywhere, leaves nothing to
  clean up, and is continued by whoever calls next. Moving, instead of swapping at the end, also means that merging
  takes no space: beside the inputs there is never a whole copy of them.
- `add` merges what is smaller than a part itself, so small commits never pile up. With that, and `merge_step` called
  until there is nothing left, there are at most FANIN - 1 = 3 runs of a size class: with n entries in all,
  3 * (1 + log4(n / 1024)) rounded up, or 27 at 20 M and 30 at 100 M; usually half of that. While a merge is under way
  its inputs count beside them. Nothing breaks above that; look-ups only get dearer.
- What is read is checked: every value's MAC when this process first uses it (store.index.held does without: hints).
  IndexLostError names the file; the caller discards the environment and fills a new one by replay.

An `Index` may be shared between threads. Arrays that it gives out are copies; views of LMDB's map never leave
a method. Memory is bounded, whatever the size: look-ups are cut into batches, merging holds a few parts (47 MiB at
most when 20 M entries were added and merged), and a transaction holds what it adds (44 bytes an entry).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import LockedError
from store.index import merging, parts, runs
from store.index.environment import Environment
from store.index.lookup import IndexReader
from store.index.merging import Delete, Put
from store.index.parts import Role, State
from store.index.runs import LOCATION, Columns, Locations

if TYPE_CHECKING:
    import lmdb

__all__ = ["LOCATION", "Additions", "Index"]

_MERGING = "merging runs of the index"
_ATTEMPTS = 3
"""Times that a step of merging is prepared outside the write transaction before commits wait for it once."""


class Additions:
    """Entries that go into the index together: a run for each of many small packs would cost as much as replaying them.

    `len` is their number; 44 bytes each.
    """

    def __init__(self) -> None:
        self._ids: list[NDArray[np.uint8]] = []
        self._locations: list[Locations] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, ids: NDArray[np.uint8], locations: Locations) -> None:
        """Ids uint8 (n, 32) and where they are, LOCATION (n,)."""
        self._ids.append(ids)
        self._locations.append(locations)
        self._count += len(ids)

    def take(self) -> tuple[NDArray[np.uint8], Locations]:
        """All of them, which are then given up; there must be some."""
        ids, locations = np.concatenate(self._ids), np.concatenate(self._locations)
        self._ids, self._locations, self._count = [], [], 0
        return ids, locations


class Index(IndexReader):
    """Chunk locations of one repository in an environment that was opened with Index.DATABASES among its databases.

    `mac_key`: 32 bytes.
    """

    DATABASES = ("runs", "parts")

    def __init__(self, environment: Environment, mac_key: bytes) -> None:
        super().__init__(environment.path, environment.database, mac_key)
        self._environment = environment

    def add(self, txn: lmdb.Transaction, ids: NDArray[np.uint8], locations: Locations) -> None:
        """Add entries in the caller's write transaction: ids uint8 (n, 32), locations LOCATION (n,).

        Costs the writing of these entries, and now and then of one part more, whatever the size of the index.
        What a transaction adds stays in memory until it ends. Raises IndexLostError, lmdb.Error.
        """
        assert locations.dtype == LOCATION and len(locations) == len(ids)
        columns = runs.sort(ids, locations)
        assert bool((columns.location["pack"] != 0).all())
        with self.naming():
            state, dead = self.state(txn), self.dead(txn)
            columns = merging.living(columns, dead)
            at_rest = [each for each in self.runs(txn) if each.role is Role.AT_REST]
            while True:
                peers = [each for each in at_rest if runs.size_class(each.entries) == runs.size_class(len(columns))]
                total = len(columns) + sum(each.entries for each in peers)
                if len(peers) < runs.FANIN - 1 or total > parts.PART_ENTRIES:
                    break
                small = [self.columns(txn, each, at) for each in peers for at in range(len(each.fences))]
                columns = merging.living(runs.merge([columns, *small]), dead)
                for each in peers:
                    self._apply(txn, [], merging.removal(each, len(each.fences)))
                    at_rest.remove(each)
            if len(columns):
                self._put_run(txn, state, columns)

    def drop_packs(self, txn: lmdb.Transaction, packs: NDArray[np.uint32]) -> None:
        """From now on nothing is found in these packs; merging takes their entries away. Their numbers are used up.

        In the caller's write transaction. Raises IndexLostError, lmdb.Error.
        """
        with self.naming():
            state, dead = self.state(txn), self.dead(txn)
        both = distinct(np.concatenate([dead, packs]).astype(np.uint32))
        if len(both) > len(dead):
            state = replace(state, serial=state.serial + 1)
            self._apply(txn, [self._state_put(state), ("runs", parts.DEAD_KEY, parts.encode_dead(both, self._key))])

    def merge(self, seconds: float | None = None) -> bool:
        """Merge what is worth it, for at most about so long; True if there is more to do.

        Call after commits, and when there is nothing else to do, outside transactions. One process at a time
        does this: where another one does, there is nothing to do here. Raises IndexLostError, StorageError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._environment.role("merge") as mine:
            try:
                while mine and self.merge_step():
                    if deadline is not None and time.monotonic() > deadline:
                        return True
            except LockedError:  # somebody commits: that goes first
                return True
        return False

    def merge_step(self) -> bool:
        """One step of merging: reads a few parts and writes at most one. False: there was nothing to do.

        The work is done on a snapshot, so that the write transaction is short; if what it stands on has changed
        meanwhile, it is done again, in the end inside the transaction. Waits for nobody: raises LockedError where
        somebody else writes, IndexLostError, StorageError.
        """
        for _ in range(_ATTEMPTS):
            with self._environment.read() as txn, self.naming():
                step = merging.plan(self, txn, self._key)
            if step is None:
                return False
            with self._environment.write(_MERGING, 0) as txn:
                if all(self.get(txn, key) == value for key, value in step.expected.items()):
                    self._apply(txn, step.puts, step.deletes)
                    return True
        with self._environment.write(_MERGING, 0) as txn, self.naming():
            step = merging.plan(self, txn, self._key)
            if step is not None:
                self._apply(txn, step.puts, step.deletes)
        return step is not None

    def _put_run(self, txn: lmdb.Transaction, state: State, columns: Columns) -> None:
        """Store sorted columns as a new run."""
        run = parts.new_run(state.next_run, state.serial)
        for start in range(0, len(columns), parts.PART_ENTRIES):
            piece = columns.cut(start, start + parts.PART_ENTRIES)
            run = run.extended(piece)
            self._apply(txn, merging.part_puts(run, piece, self._key))
        state = replace(state, next_run=state.next_run + 1)
        self._apply(txn, [("runs", run.key(), parts.encode_run(run, self._key)), self._state_put(state)])

    def _state_put(self, state: State) -> Put:
        return "runs", parts.STATE_KEY, parts.encode_state(state, self._key)

    def _apply(self, txn: lmdb.Transaction, puts: list[Put], deletes: Sequence[Delete] = ()) -> None:
        for database, key in deletes:
            txn.delete(key, db=self._database(database))
        for database, key, value in puts:
            txn.put(key, value, db=self._database(database))
