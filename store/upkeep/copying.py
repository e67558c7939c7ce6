"""What of packs that are to go prune copies, and in which order: marked chunks that have no other place that lasts.

The order is that in which restores want them: the newest generation of each VM first, then older ones. Belongs to one
thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import IntegrityError
from base.progress import Progress
from store import format as layout
from store.index.chunks import LOCATION
from store.nodes import NODE_BYTES
from store.packs import read_pack
from store.upkeep.liveness import Below, Bits, Marks, Slots
from store.upkeep.prune_plan import PackUse
from store.upkeep.repacking import Repacking, Wanted

if TYPE_CHECKING:
    from store.repository import Repository

_UNRANKED = np.iinfo(np.int64).max

_Marked = tuple[int, NDArray[np.uint8], NDArray[np.void], NDArray[np.int64], Bits]


class Copying:
    """Copies out of packs, of which `live` says what is in use by the generations in `roots`, by sequence."""

    def __init__(
        self,
        repository: Repository,
        slots: Slots,
        live: Marks,
        roots: dict[int, Below],
        packs: list[PackUse],
        progress: Progress,
    ) -> None:
        self._repository, self._slots, self._live, self._roots = repository, slots, live, roots
        self._progress = progress
        self._total = sum(use.used_bytes for use in packs)
        self._ranks = self._ranked(packs) if packs else {}

    def copy(self, some: list[PackUse], repacking: Repacking) -> set[int]:
        """Copy what is marked in some of these packs and has no other place that lasts; gives the numbers of the packs
        of what has one. What cannot be read spoils its pack, which `repacking` notes. Raises StorageError."""
        relied: set[int] = set()
        for kind in (layout.PACK_DATA, layout.PACK_NODES):
            parts = [self._marked_of(use, repacking) for use in some]
            rows = [each for each in parts if each is not None and each[0] == kind]
            if not rows:
                continue
            ids, locations, sizes, rank = (np.concatenate([row[at] for row in rows]) for at in (1, 2, 3, 4))
            order = np.lexsort((locations["slot"], locations["frame"], locations["pack"], rank))
            _, first = np.unique(np.ascontiguousarray(ids[order]).view("V32").ravel(), return_index=True)
            order = order[np.sort(first)]  # of two marked places of one chunk, one is copied
            lasting = self._repository.nodes.reusable(ids[order])["pack"]
            relied |= set(distinct(lasting).tolist()) - {0}
            order = order[lasting == 0]
            repacking.copy(kind, Wanted(ids[order], locations[order], sizes[order]), self._progress, self._total)
        return relied

    def _ranked(self, todo: list[PackUse]) -> dict[int, Bits]:
        """For each slot of these packs when a restore of the newest generation of a VM wants it, then of older ones."""
        ranks = {use.number: np.full(self._slots.sizes_of(use.number), _UNRANKED) for use in todo}
        count = 0

        def found(_: int, bits: Bits) -> None:
            nonlocal count
            index = self._slots.pack_index(bits)
            numbers = self._slots.packs[index]
            within = self._slots.within(bits, index)
            mine = np.flatnonzero(np.isin(numbers, np.fromiter(ranks, np.uint32)))
            for number in distinct(numbers[mine]).tolist():
                at = mine[numbers[mine] == number]
                ranks[number][within[at]] = count + at
            count += len(bits)

        marks = Marks(self._repository, self._slots)
        newest = {each.vm: sequence for sequence, each in sorted(self._roots.items())}
        order = sorted(self._roots, key=lambda sequence: (sequence not in newest.values(), -sequence))
        for at, sequence in enumerate(order):
            for root in self._roots[sequence].roots:
                marks.mark(root, found)
            self._progress("putting in order", at + 1, len(order))
        return ranks

    def _marked_of(self, use: PackUse, repacking: Repacking) -> _Marked | None:
        """(kind, ids, locations, sizes, ranks) of what is marked in a pack; None if its footer cannot be read."""
        repository = self._repository
        try:
            entry = repository.catalog.pack(use.number)
            footer = read_pack(repository.storage, repository.keys, entry.header.pack_id).footer
            if not np.array_equal(footer.counts, entry.counts):
                raise IntegrityError(layout.pack_name(entry.header.pack_id), "is not the pack that was indexed")
        except IntegrityError as error:
            repacking.spoiled[use.number] = error
            return None
        counts = entry.counts.astype(np.int64)
        at = np.flatnonzero(self._live.of(use.number))
        frame = np.repeat(np.arange(len(counts)), counts)[at]
        locations = np.zeros(len(at), LOCATION)
        locations["pack"], locations["frame"] = use.number, frame
        locations["slot"] = at - (np.cumsum(counts) - counts)[frame]
        nodes = entry.header.kind == layout.PACK_NODES
        sizes = np.full(len(at), NODE_BYTES) if nodes else -(-repository.settings.frame_bytes // counts[frame])
        return entry.header.kind, footer.ids[at], locations, sizes, self._ranks[use.number][at]
