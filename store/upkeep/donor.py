"""Another repository that may have what is missing here: a copy of this one, or any other.

A copy has the same keys: packs are put back byte for byte, chunks and page-map nodes are found through its index by
their ids. Of any other repository all chunks are read and hashed under our id key, and those taken that are missing
here; its page maps are of no use, since ids in them are those of its own key. Whatever comes in is verified first.
Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError
from base.progress import Progress, silent
from base.workers import usable_cores
from store import format as layout
from store.chunker import chunk_ids
from store.nodes import by_frame
from store.packs import open_frame
from store.salvage import chunks_are, examine
from store.upkeep.repacking import Repacking
from store.upkeep.survey import Survey

if TYPE_CHECKING:
    from store.repository import Repository

_PIECE = 4 << 20
_BATCH = 1 << 14
_ID = np.dtype("V32")
Ids = NDArray[np.uint8]


class Donor:
    """`other` gives to `repository`; both are open."""

    def __init__(self, repository: Repository, other: Repository, progress: Progress = silent) -> None:
        self._repository, self._other, self._progress = repository, other, progress
        self.is_copy = repository.keys.repository_id == other.keys.repository_id

    def has_whole(self, pack_id: bytes) -> bool:
        """Whether it is a copy that has this pack, undamaged: reads all of it."""
        if not self.is_copy:
            return False
        with ThreadPoolExecutor(usable_cores()) as threads:
            found = examine(self._other.storage, self._repository.keys, pack_id, threads=threads)
        return not found.problems

    def put_back(self, pack_id: bytes) -> None:
        """Make a pack again what it was. Raises IntegrityError (what was written is not whole), StorageError."""
        repository, name = self._repository, layout.pack_name(pack_id)
        repository.storage.put_back(name, self._pieces(name))
        with ThreadPoolExecutor(usable_cores()) as threads:
            found = examine(repository.storage, repository.keys, pack_id, threads=threads)
        if found.info is None or found.problems:
            raise IntegrityError(name, f"was put back and is not whole: {found.problems[0].text}")
        with repository.environment.write() as txn:
            repository.catalog.heal_pack(txn, found.info)

    def _pieces(self, name: str) -> Iterator[bytes]:
        size = self._other.storage.size(name)
        for at in range(0, size, _PIECE):
            yield self._other.storage.get_range(name, at, min(_PIECE, size - at))

    def take_missing(self, bad: dict[int, frozenset[int] | None]) -> int:
        """Store what generations need and what is nowhere here; gives the number of chunks and nodes.

        `bad`: packs here of which frames are unreadable. Call again until there is nothing more: below a node that was
        lost, more may be missing. Raises IntegrityError, StorageError.
        """
        missing = self._missing(bad)
        repository = self._repository
        repacking = Repacking(repository.storage, repository.keys, repository.frames, repository.settings)
        count = 0
        try:
            with ThreadPoolExecutor(usable_cores()) as threads:
                for kind, ids, chunks in self._offered(missing, threads):
                    repacking.add(kind, ids, chunks, threads)
                    count += len(ids)
                added = repacking.finish()
            if added:
                repository.storage.settle("packs")
        except BaseException:
            repacking.abandon()
            raise
        if added:
            with repacking.committed():
                repository.swap(added, [])
        return count

    def _missing(self, bad: dict[int, frozenset[int] | None]) -> dict[int, Ids]:
        """Ids (n, 32) of what is lost: chunks by 0, nodes by 1, each once, ascending."""
        parts: dict[int, list[Ids]] = {0: [], 1: []}
        survey = Survey(self._repository, bad, lambda *_: 0, lambda level, ids: parts[min(level, 1)].append(ids))
        for vm in self._repository.vms():
            for generation in self._repository.generations(vm):
                for region in generation.regions.values():
                    survey.region(region)
        return {
            level: np.unique(np.concatenate(found).view(_ID).reshape(-1)).view(np.uint8).reshape(-1, layout.ID_BYTES)
            for level, found in parts.items()
            if found
        }

    def _offered(self, missing: dict[int, Ids], threads: ThreadPoolExecutor) -> Iterator[tuple[int, Ids, Ids]]:
        """What the other has of it: (kind of pack, ids (n, 32), chunks (n, size))."""
        for level, ids in missing.items():
            kind = layout.PACK_NODES if level else layout.PACK_DATA
            if self.is_copy:
                yield from ((kind, *each) for each in self._by_id(kind, ids))
            elif kind == layout.PACK_DATA:
                yield from ((kind, *each) for each in self._by_content(ids, threads))

    def _by_id(self, kind: int, wanted: Ids) -> Iterator[tuple[Ids, Ids]]:
        other = self._other
        for start in range(0, len(wanted), _BATCH):
            ids = wanted[start : start + _BATCH]
            locations = other.nodes.locate(ids)
            for pack, frame, members in by_frame(locations):
                try:
                    chunks = (
                        other.frames.chunks(pack, frame, locations["slot"][members], ids[members]) if pack else None
                    )
                except IntegrityError:  # damaged there too
                    continue
                if chunks is not None and chunks_are(self._repository.keys, kind, ids[members], chunks):
                    yield ids[members], chunks
            self._progress("looking in the other repository", min(start + _BATCH, len(wanted)), len(wanted))

    def _by_content(self, wanted: Ids, threads: ThreadPoolExecutor) -> Iterator[tuple[Ids, Ids]]:
        """All data of another repository, hashed under our id key; of equal chunks the first."""
        names, taken = wanted.view(_ID).reshape(-1), np.zeros(len(wanted), np.bool_)
        other, key = self._other, self._repository.keys.id_key("chunk")
        with other.environment.read() as txn:
            numbers = other.catalog.pack_numbers(txn)
        for at, number in enumerate(numbers):
            entry = other.catalog.pack(number)
            header, edges, name = entry.header, entry.offsets.tolist(), layout.pack_name(entry.header.pack_id)
            self._progress("looking in the other repository", at + 1, len(numbers))
            if header.kind != layout.PACK_DATA or taken.all():
                continue
            sealer = other.keys.sealer(header.kind, header.pack_id, header.epoch, header.salt)

            def hashed(frame: int) -> tuple[Ids, Ids] | None:
                begin, end = edges[frame], edges[frame + 1]  # noqa: B023  # used up in this turn
                try:
                    data = other.storage.get_range(name, begin + 4, end - begin - 4)  # noqa: B023
                    chunks = open_frame(sealer, frame, data, name, begin)[1]  # noqa: B023
                except IntegrityError:
                    return None
                return chunk_ids(chunks, key), chunks

            for found in threads.map(hashed, range(len(edges) - 1)):
                if found is not None:
                    _, first = np.unique(found[0].view(_ID).reshape(-1), return_index=True)
                    offered = found[0][first].view(_ID).reshape(-1)
                    places = np.minimum(np.searchsorted(names, offered), len(names) - 1)
                    take = (names[places] == offered) & ~taken[places]
                    taken[places[take]] = True
                    if take.any():
                        yield found[0][first[take]], found[1][first[take]]
