"""Which regions of which generations need something that is lost, found by walking page maps, each node once.

What is lost has a cause, which the caller numbers: an unreadable frame, a pack, "in no pack at all". A survey gives
the causes that hurt a region as the bits of a number. A chunk or node that is lost in one place and whole in another
is not lost.

Memory: two bytes for each node of the repository that was visited, whatever the number of generations, and what
damage there is: combinations of causes are kept once each, and bounded. Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable
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

Cause = Callable[[int, int, int, IntegrityError | None, NDArray[np.uint8]], int]
"""Number of the cause by which ids (n, 32) of a level (0: chunks) are lost: (level, pack, frame, what reading it said,
ids); pack 0: they are in no pack. Asked again for one place, it gives the same."""
Lost = Callable[[int, NDArray[np.uint8]], None]
"""Told what is lost: the level (0: chunks) and the ids (n, 32), some perhaps more than once."""


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
        self._bad: dict[int, set[int] | None] = {
            pack: None if frames is None else set(frames) for pack, frames in bad.items()
        }
        self._sets: list[int] = [0, 0]  # by number of a set: its causes as bits; 0 is unseen, 1 is whole
        self._numbers: dict[int, int] = {0: _WHOLE}
        self._visited: dict[int, NDArray[np.uint16]] = {}
        self._sequence = repository.sequence

    def region(self, region: Region) -> int:
        """Causes that hurt it, as bits; 0: all of it can be restored. Raises StorageError, IndexLostError."""
        root = region.root
        if root.id == layout.ZERO_ID:
            return 0
        ids = np.frombuffer(root.id, np.uint8).reshape(1, -1)
        found = self._chunks(ids) if root.height == 0 else self._nodes(root.height, ids)
        return self._sets[int(found[0])]

    def _nodes(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """For each node (n, 32) of a level, the number of the set of causes in it and below."""
        found = np.empty(len(ids), np.uint16)
        for at in range(0, len(ids), _BATCH):
            found[at : at + _BATCH] = self._batch(level, ids[at : at + _BATCH])
        return found

    def _batch(self, level: int, ids: NDArray[np.uint8]) -> NDArray[np.uint16]:
        locations, found = self._located(level, ids)
        fresh = []
        for pack, frame, members in by_frame(locations):
            if pack:
                seen = self._table(pack, frame, int(locations["slot"][members].max()))
                found[members] = seen[frame, locations["slot"][members]]
                fresh.append(members[found[members] == _UNSEEN])
        left = np.concatenate(fresh) if fresh else np.empty(0, np.intp)
        if not len(left):
            return found
        content = self._read(level, ids, locations, found, left)
        left = left[found[left] == _UNSEEN]
        children = content[left].reshape(-1, layout.ID_BYTES)
        live = np.flatnonzero(children.any(axis=1))
        below = np.full(len(children), _WHOLE, np.uint16)
        wanted = children[live]
        below[live] = self._chunks(wanted) if level == 1 else self._nodes(level - 1, wanted)
        found[left] = self._unions(below.reshape(-1, FANOUT))
        for pack, frame, members in by_frame(locations[left]):
            self._visited[pack][frame, locations["slot"][left[members]]] = found[left[members]]
        return found

    def _read(
        self,
        level: int,
        ids: NDArray[np.uint8],
        locations: NDArray[np.void],
        found: NDArray[np.uint16],
        left: NDArray[np.intp],
    ) -> NDArray[np.uint8]:
        """Nodes (n, 32, 32), those in `left`; where a frame proves unreadable, `found` says so."""
        content = np.zeros((len(ids), FANOUT, layout.ID_BYTES), np.uint8)
        for pack, frame, members in by_frame(locations[left]):
            at = left[members]
            try:
                content[at] = self._repository.nodes.read(ids[at], locations[at])
            except IntegrityError as error:
                if self._moved():  # prune has put it elsewhere
                    found[at] = self._batch(level, ids[at])
                    continue
                frames = self._bad.setdefault(pack, set())
                if frames is not None:
                    frames.add(frame)
                found[at] = self._number(1 << self._cause(level, pack, frame, error, ids[at]))
                self._tell(level, ids[at])
        return content

    def _chunks(self, ids: NDArray[np.uint8]) -> NDArray[np.uint16]:
        locations, found = self._located(0, ids)
        found[locations["pack"] != 0] = _WHOLE
        return found

    def _located(self, level: int, ids: NDArray[np.uint8]) -> tuple[NDArray[np.void], NDArray[np.uint16]]:
        """(locations outside what is bad, pack 0 where there is none; sets: causes where lost, else unseen)."""
        while True:
            locations, found, lost = self._looked_up(level, ids)
            if not len(lost):
                break
            if not self._moved():
                self._tell(level, ids[lost])
                break
        return locations, found

    def _moved(self) -> bool:
        """Whether others have changed the repository since this was last asked: what is missing may be elsewhere."""
        self._repository.refresh()
        before, self._sequence = self._sequence, self._repository.sequence
        return before != self._sequence

    def _looked_up(
        self, level: int, ids: NDArray[np.uint8]
    ) -> tuple[NDArray[np.void], NDArray[np.uint16], NDArray[np.intp]]:
        """Also: which are lost."""
        index = self._repository.index
        found = np.zeros(len(ids), np.uint16)
        skip = np.array(sorted(self._bad), np.uint32)
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
        ids: NDArray[np.uint8],
        missing: NDArray[np.intp],
        locations: NDArray[np.void],
        found: NDArray[np.uint16],
    ) -> None:
        """What is only in packs that are damaged: it may be in a frame that is whole."""
        index = self._repository.index
        inside = index.lookup(txn, ids[missing])
        for pack, frame, members in by_frame(inside):
            if not pack:
                continue
            at = missing[members]
            if self._usable(pack, frame):
                locations[at] = inside[members]
                continue
            for one in at.tolist():
                places = index.locations(txn, bytes(ids[one]))
                good = [each for each in places if self._usable(int(each["pack"]), int(each["frame"]))]
                if good:
                    locations[one] = good[0]
                else:
                    found[one] = self._number(1 << self._cause(level, pack, frame, None, ids[at]))

    def _usable(self, pack: int, frame: int) -> bool:
        if pack not in self._bad:
            return True
        frames = self._bad[pack]
        return frames is not None and frame not in frames

    def _table(self, pack: int, frame: int, slot: int) -> NDArray[np.uint16]:
        """Sets by frame and slot of a pack; a slot of a node that was not visited is unseen."""
        table = self._visited.get(pack)
        if table is None or table.shape[0] <= frame or table.shape[1] <= slot:
            frames = max(len(self._repository.catalog.pack(pack).offsets) - 1, frame + 1)
            wider = np.zeros((frames, max(64, 1 << slot.bit_length())), np.uint16)
            if table is not None:
                wider[: table.shape[0], : table.shape[1]] = table
            table = self._visited[pack] = wider
        return table

    def _unions(self, below: NDArray[np.uint16]) -> NDArray[np.uint16]:
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

    def _tell(self, level: int, ids: NDArray[np.uint8]) -> None:
        if self._lost is not None:
            self._lost(level, ids)


def bits(causes: int) -> list[int]:
    """Numbers of the causes in a set."""
    return [at for at in range(causes.bit_length()) if causes >> at & 1]
