"""The chunk index compared with the packs that it describes, in one pass over each.

What the footers say and what the index says are summed up by pack: a sum does not depend on order, so neither side
has to be sorted or held. Only where sums differ is a pack's share of the index collected and compared entry by entry.
Memory: 16 bytes a pack, one part of the index, and one pack's entries where there is something to tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from store.index import runs
from store.index.runs import Columns
from store.packs import PackInfo

if TYPE_CHECKING:
    import lmdb

    from store.index.chunks import Index

_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that the index says of a pack and that is not so. `pack`: its number."""

    pack: int
    text: str


class Comparison:
    """Told of packs one by one, then compared with a snapshot of the index."""

    def __init__(self) -> None:
        self._expected: dict[int, tuple[int, int]] = {}

    def add(self, number: int, pack: PackInfo) -> None:
        """What a pack really holds."""
        prefix, rest = runs.split_ids(pack.footer.ids)
        columns = Columns(prefix, rest, pack.locations(number))
        self._expected[number] = len(prefix), int(_marks(columns).sum(dtype=np.uint64))

    def run(self, index: Index, txn: lmdb.Transaction, known: set[int]) -> list[Difference]:
        """Packs of which the index says something else. `known`: numbers of all packs that there are.

        Raises DamagedValueError, lmdb.Error.
        """
        found = self._sums(index, txn)
        differing = [
            number
            for number, expected in self._expected.items()
            if number in known and found.get(number, (0, 0)) != expected
        ]
        strange = [number for number in found if number not in known]
        return [
            *(Difference(each, self._text(found.get(each, (0, 0)), self._expected[each])) for each in differing),
            *(Difference(each, f"has {found[each][0]} entries of a pack that is not there") for each in strange),
        ]

    def _sums(self, index: Index, txn: lmdb.Transaction) -> dict[int, tuple[int, int]]:
        sums: dict[int, tuple[int, int]] = {}
        dead = index.dead(txn)
        for run in index.runs(txn):
            for at in range(len(run.fences)):
                columns = index.columns(txn, run, at)
                if at == 0 and run.skip:
                    columns = columns.cut(run.skip, len(columns))
                packs = columns.location["pack"].copy()
                alive = ~runs.among(packs, dead)
                packs, marks = packs[alive], _marks(columns)[alive]
                if not len(packs):
                    continue
                order = np.argsort(packs, kind="stable")
                packs, marks = packs[order], marks[order]
                starts = np.flatnonzero(np.concatenate([[True], packs[1:] != packs[:-1]]))
                counts = np.diff(np.append(starts, len(packs)))
                totals = np.add.reduceat(marks, starts)
                for number, count, total in zip(packs[starts].tolist(), counts.tolist(), totals.tolist(), strict=True):
                    before = sums.get(number, (0, 0))
                    sums[number] = before[0] + count, (before[1] + total) & 0xFFFFFFFFFFFFFFFF
        return sums

    @staticmethod
    def _text(found: tuple[int, int], expected: tuple[int, int]) -> str:
        if found[0] != expected[0]:
            return f"has {found[0]} entries of this pack, which holds {expected[0]} chunks"
        return "has chunks at other places of this pack than they are"


def misplaced(index: Index, txn: lmdb.Transaction, number: int, pack: PackInfo) -> tuple[bytes, int, int] | None:
    """The first (chunk id, frame, slot) that the index has in a pack and that is not there, None if there is none.

    Raises DamagedValueError, lmdb.Error.
    """
    real = {
        (bytes(chunk), int(place["frame"]), int(place["slot"]))
        for chunk, place in zip(pack.footer.ids, pack.locations(number), strict=True)
    }
    for run in index.runs(txn):
        for at in range(len(run.fences)):
            columns = index.columns(txn, run, at)
            mine = np.flatnonzero(columns.location["pack"] == number)
            mine = mine[mine >= run.skip] if at == 0 else mine
            some = columns.take(mine)
            for chunk, place in zip(runs.join_ids(some), some.location, strict=True):
                entry = bytes(chunk), int(place["frame"]), int(place["slot"])
                if entry not in real:
                    return entry
    return None


def _marks(columns: Columns) -> NDArray[np.uint64]:
    """A number for each entry, by its id, frame and slot, mixed so that sums of others do not meet by accident."""
    words = np.ascontiguousarray(columns.rest).view("<u8").reshape(-1, 3)
    mark: NDArray[np.uint64] = columns.prefix * _FACTORS[0]
    for at in range(3):
        mark ^= words[:, at] * _FACTORS[at + 1]
    frame, slot = columns.location["frame"].astype(np.uint64), columns.location["slot"].astype(np.uint64)
    place = frame << np.uint64(16) | slot
    mark += place * _FACTORS[4]
    mark ^= mark >> np.uint64(31)
    mark *= _FACTORS[1]
    mark ^= mark >> np.uint64(29)
    return mark
