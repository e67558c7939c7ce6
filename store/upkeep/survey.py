"""Which regions of which generations need something that is lost, found by walking page maps, each node once.

What is lost has a cause, which the caller numbers: an unreadable frame, a pack, "in no pack at all". A survey gives
the causes that hurt a region as the bits of a number, and how much of it is lost. A chunk or node that is lost in one
place and whole in another is not lost. What is missing is looked up again if others have moved anything meanwhile.

Memory: two bytes for each node of the repository that was visited, whatever the number of generations, and what
damage there is: eight more bytes for nodes of packs that hold a hurt one; combinations of causes are kept once each,
and bounded. Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError
from store import format as layout
from store.nodes import by_frame
from store.pagemap import FANOUT

if TYPE_CHECKING:
    import lmdb

    from store.records import Region
    from store.repository import Repository

MAX_CAUSES = 4096
"""Causes that are told apart; those beyond count as the last one."""
_MAX_SETS = (1 << 16) - 2
_BATCH = 1024
_UNSEEN, _WHOLE = 0, 1

Ids = NDArray[np.uint8]
Sets = NDArray[np.uint16]
Chunks = NDArray[np.float64]
"""Numbers of chunks; those below a lost node of a high level are more than an integer holds."""
Cause = Callable[[int, int, int, IntegrityError | None, Ids], int]
"""Number of the cause by which ids (n, 32) of a level (0: chunks) are lost: (level, pack, frame, what reading it said,
ids); pack 0: they are in no pack. Asked again for one place, it gives the same."""
Lost = Callable[[int, Ids], None]
"""Told what is lost: the level (0: chunks) and the ids (n, 32), some perhaps more than once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a region has lost: causes as bits, 0 if it is whole; bytes, at most (below a lost node nobody knows)."""

    causes: int
    lost_bytes: int


class Survey:
    """Walks regions. `bad`: for pack numbers, the frames that are unreadable, None for all of them."""

    def __init__(
        self,
        repository: Repository,
        bad: dict[int, frozenset[int] | None],
        cause: Cause,
        lost: Lost | None = None,
    ) -> None:
        self._repository, self._cause, self._lost = repository, cause, lost
        self.bad: dict[int, set[int] | None] = {
            pack: None if frames is None else set(frames) for pack, frames in bad.items()
        }
        """As given, and what reading nodes has added."""
        self._sets: list[int] = [0, 0]  # by number of a set: its causes as bits; 0 is unseen, 1 is whole
        self._numbers: dict[int, int] = {0: _WHOLE}
        self._visited: dict[int, Sets] = {}
        self._below: dict[int, Chunks] = {}
        self._sequence = repository.sequence

    def region(self, region: Region) -> Verdict:
        """What a region has lost. Raises StorageError, IndexLostError."""
        root = region.root
        if root.id == layout.ZERO_ID:
            return Verdict(0, 0)
        ids = np.frombuffer(root.id, np.uint8).reshape(1, -1)
        found, lost = self._chunks(ids) if root.height == 0 else self._nodes(root.height, ids)
        return Verdict(self._sets[int(found[0])], int(min(float(lost[0]) * root.chunk_size, root.length)))

    def _nodes(self, level: int, ids: Ids) -> tuple[Sets, Chunks]:
        """For each node (n, 32) of a level: the set of causes in it and below, and the chunks that are lost."""
        found, lost = np.empty(len(ids), np.uint16), np.empty(len(ids), np.float64)
        for at in range(0, len(ids), _BATCH):
            found[at : at + _BATCH], lost[at : at + _BATCH] = self._batch(level, ids[at : at + _BATCH])
        return found, lost

    def _batch(self, level: int, ids: Ids) -> tuple[Sets, Chunks]:
        locations, found = self._located(level, ids)
        below = np.where(found > _WHOLE, float(FANOUT) ** level, 0.0)
        fresh = []
        for pack, frame, members in by_frame(locations):
            if pack:
                slots = locations["slot"][members]
                found[members] = self._table(pack, frame, int(slots.max()))[frame, slots]
                if pack in self._below:
                    below[members] = self._below[pack][frame, slots]
                fresh.append(members[found[members] == _UNSEEN])
        left = np.concatenate(fresh) if fresh else np.empty(0, np.intp)
        if not len(left):
            return found, below
        content = self._read(level, ids, locations, found, below, left)
        left = left[found[left] == _UNSEEN]
        children = content[left].reshape(-1, layout.ID_BYTES)
        live = np.flatnonzero(children.any(axis=1))
        sets, lost = np.full(len(children), _WHOLE, np.uint16), np.zeros(len(children), np.float64)
        wanted = children[live]
        sets[live], lost[live] = self._chunks(wanted) if level == 1 else self._nodes(level - 1, wanted)
        found[left] = self._unions(sets.reshape(-1, FANOUT))
        below[left] = lost.reshape(-1, FANOUT).sum(axis=1)
        self._remember(locations[left], found[left], below[left])
        return found, below

    def _remember(self, locations: NDArray[np.void], found: Sets, below: Chunks) -> None:
        for pack, frame, members in by_frame(locations):
            slots = locations["slot"][members]
            table = self._table(pack, frame, int(slots.max()))
            table[frame, slots] = found[members]
            if below[members].any() and pack not in self._below:
                self._below[pack] = np.zeros(table.shape, np.float64)
            if pack in self._below:
                self._below[pack][frame, slots] = below[members]

    def _read(
        self,
        level: int,
        ids: Ids,
        locations: NDArray[np.void],
        found: Sets,
        below: Chunks,
        left: NDArray[np.intp],
    ) -> Ids:
        """Nodes (n, 32, 32), those in `left`; where a frame proves unreadable, `found` and `below` say so."""
        content = np.zeros((len(ids), FANOUT, layout.ID_BYTES), np.uint8)
        for pack, frame, members in by_frame(locations[left]):
            at = left[members]
            try:
                content[at] = self._repository.nodes.read(ids[at], locations[at])
            except IntegrityError as error:
                if not self._moved():  # else prune has put it elsewhere
                    frames = self.bad.setdefault(pack, set())
                    if frames is not None:
                        frames.add(frame)
                    self._cause(level, pack, frame, error, ids[at])
                found[at], below[at] = self._batch(level, ids[at])  # it may be whole in another place
        return content

    def _chunks(self, ids: Ids) -> tuple[Sets, Chunks]:
        locations, found = self._located(0, ids)
        found[locations["pack"] != 0] = _WHOLE
        return found, (found > _WHOLE).astype(np.float64)

    def _located(self, level: int, ids: Ids) -> tuple[NDArray[np.void], Sets]:
        """(locations outside what is bad, pack 0 where there is none; sets: causes where lost, else unseen)."""
        while True:
            locations, found, lost = self._looked_up(level, ids)
            if not len(lost):
                break
            if not self._moved():
                if self._lost is not None:
                    self._lost(level, ids[lost])
                break
        return locations, found

    def _moved(self) -> bool:
        """Whether others have changed the repository since this was last asked: what is missing may be elsewhere."""
        self._repository.refresh()
        before, self._sequence = self._sequence, self._repository.sequence
        return before != self._sequence

    def _looked_up(self, level: int, ids: Ids) -> tuple[NDArray[np.void], Sets, NDArray[np.intp]]:
        """Also: which are lost."""
        index = self._repository.index
        found = np.zeros(len(ids), np.uint16)
        skip = np.array(sorted(self.bad), np.uint32)
        with self._repository.environment.read() as txn:
            locations = index.lookup(txn, ids, skip)
            missing = np.flatnonzero(locations["pack"] == 0)
            if not len(missing):
                return locations, found, missing
            if len(skip):
                self._look_in_bad(txn, level, ids, missing, locations, found)
        nowhere = missing[(locations["pack"][missing] == 0) & (found[missing] == 0)]
        if len(nowhere):
            found[nowhere] = self._number(1 << self._cause(level, 0, 0, None, ids[nowhere]))
        return locations, found, missing[locations["pack"][missing] == 0]

    def _look_in_bad(
        self,
        txn: lmdb.Transaction,
        level: int,
        ids: Ids,
        missing: NDArray[np.intp],
        locations: NDArray[np.void],
        found: Sets,
    ) -> None:
        """What is only in packs that are damaged: it may be in a frame that is whole."""
        index = self._repository.index
        inside = index.lookup(txn, ids[missing])
        for pack, frame, members in by_frame(inside):
            if not pack:
                continue
            at = missing[members]
            if self.usable(pack, frame):
                locations[at] = inside[members]
                continue
            for one in at.tolist():
                places = index.locations(txn, bytes(ids[one]))
                good = [each for each in places if self.usable(int(each["pack"]), int(each["frame"]))]
                if good:
                    locations[one] = good[0]
                else:
                    found[one] = self._number(1 << self._cause(level, pack, frame, None, ids[at]))

    def usable(self, pack: int, frame: int) -> bool:
        """Whether a frame can be read, as far as that is known."""
        frames = self.bad.get(pack, _NONE)
        return frames is not None and frame not in frames

    def _table(self, pack: int, frame: int, slot: int) -> Sets:
        """Sets by frame and slot of a pack; a slot of a node that was not visited is unseen."""
        table = self._visited.get(pack)
        if table is None or table.shape[0] <= frame or table.shape[1] <= slot:
            frames = frame + 1 if table is None else max(2 * table.shape[0], frame + 1)
            slots = max(64, 1 << slot.bit_length(), 0 if table is None else table.shape[1])
            table = self._visited[pack] = _wider(table, frames, slots, np.dtype(np.uint16))
            if pack in self._below:
                self._below[pack] = _wider(self._below[pack], frames, slots, np.dtype(np.float64))
        return table

    def _unions(self, below: Sets) -> Sets:
        """Sets (n,) that have all causes of those in each row (n, 32)."""
        result = np.full(len(below), _WHOLE, np.uint16)
        for row in np.flatnonzero((below > _WHOLE).any(axis=1)).tolist():
            causes = 0
            for number in set(below[row].tolist()):
                causes |= self._sets[number]
            result[row] = self._number(causes)
        return result

    def _number(self, causes: int) -> int:
        number = self._numbers.get(causes)
        if number is None:
            if len(self._sets) > _MAX_SETS:  # so much damage that nobody reads which did what
                return len(self._sets) - 1
            number = self._numbers[causes] = len(self._sets)
            self._sets.append(causes)
        return number


_NONE: frozenset[int] = frozenset()


def _wider(table: NDArray[np.generic] | None, frames: int, slots: int, dtype: np.dtype) -> NDArray:  # type: ignore[type-arg]  # either of two
    wider = np.zeros((frames, slots), dtype)
    if table is not None:
        wider[: table.shape[0], : table.shape[1]] = table
    return wider


def bits(causes: int) -> list[int]:
    """Numbers of the causes in a set."""
    return [at for at in range(causes.bit_length()) if causes >> at & 1]
