"""Checking a repository: pure reading, typed findings.

The structure: the files of key slots; every record's place in the chain, signature and seal; every pack's header,
footer and length; every page map down to chunks that some pack holds. With `read_data`: every frame opened,
decompressed and every chunk hashed. When something is damaged, all generations are walked to say which of them, and
which regions, are hurt.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from base.errors import IntegrityError
from base.progress import Progress, silent
from base.workers import usable_cores
from store import format as layout
from store import leases, pagemap
from store.chunker import chunk_ids
from store.format_keys import MAX_LEVEL, slot_name
from store.keychain import read_key_files
from store.packs import PackInfo, open_frame, read_pack
from store.records import Generation, Region, decode_record
from store.slots import list_slots
from store.storage import ObjectMissingError

if TYPE_CHECKING:
    from store.keys import Sealer
    from store.repository import Repository

_WINDOW = 1 << 18


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `kind`: repository, keyring, slot, record, pack, frame, node or chunk; `offset` in bytes
    of `object`, None if it is about all of it; `generations` (vm@n) and `regions` that cannot be restored because of
    it."""

    kind: str
    object: str
    offset: int | None
    problem: str
    generations: tuple[str, ...]
    regions: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """Result of a check; clean if there are no findings."""

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("generations", "packs", "chunks", "bytes"), 0)
    )


@dataclass(slots=True)
class _Damage:
    """A finding in the making: the chunks that are lost with it."""

    kind: str
    object: str
    offset: int | None
    problem: str
    pack: int
    frame: int | None


def check_repository(repository: Repository, *, read_data: bool = False, progress: Progress = silent) -> Report:
    """Verify everything; changes nothing. Raises StorageError only where the system refuses to read at all."""
    repository.refresh()
    with repository.environment.read() as txn:
        last = repository.catalog.last(txn)[0]
        numbers = repository.catalog.pack_numbers(txn)
        generations = [each for vm in repository.catalog.vms(txn) for each in repository.catalog.generations(txn, vm)]
    lease = leases.take(repository.leases, last, "check")
    try:
        return _Check(repository, read_data, progress).run(last, numbers, generations)
    finally:
        if lease is not None:
            lease.release()


class _Check:
    def __init__(self, repository: Repository, read_data: bool, progress: Progress) -> None:
        self._repository, self._read_data, self._progress = repository, read_data, progress
        self._report = Report()
        self._damage: list[_Damage] = []

    def run(self, last: int, numbers: list[int], generations: list[Generation]) -> Report:
        self._slots()
        self._records(last)
        self._packs(numbers)
        broken = self._page_maps(generations)
        hurt = self._hurt(generations) if self._damage else {}
        for at, damage in enumerate(self._damage):
            names = hurt.get(at, [])
            self._report.findings.append(
                Finding(
                    damage.kind,
                    damage.object,
                    damage.offset,
                    damage.problem,
                    tuple(dict.fromkeys(name for name, _ in names)),
                    tuple(dict.fromkeys(region for _, region in names)),
                )
            )
        known = {(each.object, each.offset) for each in self._report.findings}
        self._report.findings += [each for each in broken if (each.object, each.offset) not in known]
        self._report.counts["generations"] = len(generations)
        return self._report

    def _slots(self) -> None:
        """A slot that is damaged keeps its owner out, who may not try it before he needs it."""
        for info in list_slots(read_key_files(self._repository.path)):
            if info.problem is not None:
                name = slot_name(info.slot_id)
                problem = info.problem.removeprefix(f"{name}: ")
                self._report.findings.append(Finding("slot", name, None, problem, (), ()))

    def _records(self, last: int) -> None:
        previous: bytes | None = layout.ZERO_ID
        epoch = 0
        for sequence in range(1, last + 1):
            name = layout.record_name(sequence)
            try:
                data = self._repository.storage.get(name)
                record = decode_record(self._repository.keys, data, sequence, previous, epoch)
                previous, epoch = record.id, record.header.epoch
            except IntegrityError as error:
                previous = None  # the next one's link cannot be held against it
                self._report.findings.append(Finding("record", name, error.offset, error.problem, (), ()))
            self._progress("checking records", sequence, last)

    def _packs(self, numbers: list[int]) -> None:
        with ThreadPoolExecutor(usable_cores()) as threads:
            for at, number in enumerate(numbers):
                entry = self._repository.catalog.pack(number)
                name = layout.pack_name(entry.header.pack_id)
                pack: PackInfo | None = None
                try:
                    pack = read_pack(self._repository.storage, self._repository.keys, entry.header.pack_id)
                except IntegrityError as error:
                    self._damage.append(_Damage("pack", name, error.offset, error.problem, number, None))
                    if isinstance(error, ObjectMissingError) or not self._read_data:
                        continue  # else its frames may be whole all the same
                else:
                    if not np.array_equal(pack.footer.offsets, entry.offsets[:-1]):
                        self._damage.append(
                            _Damage("pack", name, None, "is not the pack that was indexed", number, None)
                        )
                        continue
                    self._report.counts["packs"] += 1
                    self._report.counts["chunks"] += len(pack.footer.ids)
                    self._report.counts["bytes"] += pack.size
                if self._read_data:
                    self._frames(number, pack, threads)
                self._progress("checking packs", at + 1, len(numbers))

    def _frames(self, number: int, pack: PackInfo | None, threads: ThreadPoolExecutor) -> None:
        """Open and hash every frame of a pack, by what the index knows of its places."""
        repository = self._repository
        entry = repository.catalog.pack(number)
        header, name = entry.header, layout.pack_name(entry.header.pack_id)
        sealer = repository.keys.sealer(header.kind, header.pack_id, header.epoch, header.salt)
        starts = np.cumsum(pack.footer.counts) - pack.footer.counts if pack is not None else None

        def verify(frame: int) -> IntegrityError | None:
            offset, end = int(entry.offsets[frame]), int(entry.offsets[frame + 1])
            try:
                ids = self._verify_frame(sealer, header.kind, frame, name, offset, end)
                if pack is not None and starts is not None:
                    start = int(starts[frame])
                    if not np.array_equal(ids, pack.footer.ids[start : start + int(pack.footer.counts[frame])]):
                        raise IntegrityError(
                            name, f"frame {frame} holds other chunks than its footer says", offset=offset
                        )
            except IntegrityError as error:
                return error
            return None

        for frame, error in enumerate(threads.map(verify, range(len(entry.offsets) - 1))):
            if error is not None:
                self._damage.append(_Damage("frame", name, error.offset, error.problem, number, frame))

    def _verify_frame(
        self, sealer: Sealer, kind: int, frame: int, name: str, offset: int, end: int
    ) -> NDArray[np.uint8]:
        data = self._repository.storage.get_range(name, offset, end - offset)
        if len(data) < 4 or layout.FRAME_LENGTH.unpack_from(data)[0] != len(data) - 4:
            raise IntegrityError(name, f"frame {frame} is truncated or its length is damaged", offset=offset)
        ids, chunks = open_frame(sealer, frame, memoryview(data)[4:], name, offset)
        keys = self._repository.keys
        if kind == layout.PACK_DATA:
            good = np.array_equal(chunk_ids(chunks, keys.id_key("chunk")), ids)
        else:
            nodes = chunks.reshape(len(ids), -1)
            by_level = (chunk_ids(nodes, keys.id_key("node", level)) == ids for level in range(1, MAX_LEVEL + 1))
            good = bool(np.any([each.all(axis=1) for each in by_level], axis=0).all())
        if not good:
            raise IntegrityError(name, f"frame {frame} holds a chunk that is not what its id says", offset=offset)
        return ids

    def _page_maps(self, generations: list[Generation]) -> list[Finding]:
        """Every node there and every chunk in some pack. Nodes shared between generations are looked at once."""
        findings = []
        seen: set[bytes] = set()
        for at, generation in enumerate(generations):
            for region in generation.regions.values():
                try:
                    self._walk(region, seen)
                except IntegrityError as error:
                    problem = error.problem + ("" if error.chunk is None else f" (chunk {error.chunk[:16]})")
                    kind = "node" if error.object == "page map" else "chunk"
                    findings.append(
                        Finding(kind, error.object, error.offset, problem, (generation.name,), (region.name,))
                    )
            self._progress("checking page maps", at + 1, len(generations))
        return findings

    def _walk(self, region: Region, seen: set[bytes]) -> None:
        nodes = self._repository.nodes

        def fresh(ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
            names = [bytes(each) for each in ids]
            new = np.array([each not in seen for each in names], np.bool_)
            seen.update(names)
            return new

        for level, ids in pagemap.nodes(region.root, nodes, fresh):
            if level == 1:
                children = nodes.fetch(1, ids).reshape(-1, layout.ID_BYTES)
                self._require(children[children.any(axis=1)])
        if region.root.height == 0 and region.root.id != layout.ZERO_ID:
            self._require(np.frombuffer(region.root.id, np.uint8).reshape(1, -1))

    def _require(self, ids: NDArray[np.uint8]) -> None:
        missing = np.flatnonzero(self._repository.nodes.locate(ids)["pack"] == 0)
        if len(missing):
            raise IntegrityError("chunk", "is in no pack", chunk=bytes(ids[missing[0]]).hex())

    def _hurt(self, generations: list[Generation]) -> dict[int, list[tuple[str, str]]]:
        """For each damage, the (generation, region) pairs that need a chunk lost with it and found nowhere else."""
        bad = {(each.pack, each.frame): at for at, each in enumerate(self._damage)}
        packs = np.array(sorted({pack for pack, _ in bad}), np.uint32)
        hurt: dict[int, list[tuple[str, str]]] = {}
        for generation in generations:
            for region in generation.regions.values():
                for at in self._needed(region, bad, packs):
                    hurt.setdefault(at, []).append((generation.name, region.name))
        return hurt

    def _needed(self, region: Region, bad: dict[tuple[int, int | None], int], packs: NDArray[np.uint32]) -> set[int]:
        found: set[int] = set()
        try:
            for ids in self._all_ids(region):
                locations = self._repository.nodes.locate(ids)
                touched = np.isin(locations["pack"], packs)
                places = np.unique(locations[["pack", "frame"]][touched])
                for pack, frame in places.tolist():
                    found |= {bad[key] for key in ((pack, frame), (pack, None)) if key in bad}
        except IntegrityError as error:  # a node is unreadable: that damage hurts this region
            found |= {
                at
                for at, each in enumerate(self._damage)
                if each.object == error.object and each.offset in (None, error.offset)
            }
        return found

    def _all_ids(self, region: Region) -> Iterator[NDArray[np.uint8]]:
        for _, ids in pagemap.nodes(region.root, self._repository.nodes):
            yield ids
        limit = -(-region.root.length // region.root.chunk_size)
        for _, ids in pagemap.leaves(region.root, self._repository.nodes, 0, limit):
            yield ids
