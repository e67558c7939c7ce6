"""Checking a repository: pure reading, typed findings.

The structure: the files of key slots; every record's place in the chain, signature and seal; every pack's header,
footer and length; this host's index against them; every page map down to chunks that some pack holds. With data: every
frame of the packs chosen opened, decompressed and every chunk hashed. All page maps are walked, each node once, to say
which generations and regions are hurt. Memory follows the number of packs and nodes, never that of chunks.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from base.errors import FormatVersionError, IntegrityError, NotFoundError, UsageError
from base.progress import Progress, silent
from base.workers import usable_cores
from store import format as layout
from store import leases
from store.catalog import DamagedPack
from store.index.environment import IndexLostError
from store.index.parts import DamagedValueError
from store.keyring.files import read_key_files
from store.keyring.layout import slot_name
from store.keyring.slots import list_slots
from store.records import Generation, GenerationBody, Record, decode_record, generation_of
from store.salvage import Examined, Problem, examine
from store.storage import ObjectMissingError
from store.upkeep.comparison import Comparison, misplaced
from store.upkeep.findings import Finding, Hurt, Report
from store.upkeep.survey import MAX_CAUSES, Lost, Survey, Verdict, bits

if TYPE_CHECKING:
    import lmdb
    import numpy as np
    from numpy.typing import NDArray

    from store.repository import Repository


@dataclass(frozen=True, slots=True)
class Subset:
    """Which packs are read: part `number` of `parts`, by their ids, so that all parts together are all packs; or with
    `parts` 0 a random `percent` of them, at least one."""

    number: int = 0
    parts: int = 0
    percent: float = 100.0

    @classmethod
    def parse(cls, text: str) -> Subset:
        """`n/t` or `P%`. Raises UsageError."""
        try:
            if text.endswith("%"):
                subset = cls(percent=float(text[:-1]))
                if 0 < subset.percent <= 100:
                    return subset
            else:
                number, _, parts = text.partition("/")
                subset = cls(int(number), int(parts))
                if 1 <= subset.number <= subset.parts:
                    return subset
        except ValueError:
            pass
        raise UsageError(f"{text!r} is no part of the data: write n/t with n from 1 to t, or P% with P up to 100")

    def choose(self, packs: list[bytes]) -> set[bytes]:
        """Of these pack ids those to read."""
        if self.parts:
            return {each for each in packs if int.from_bytes(each[:8], "big") % self.parts == self.number - 1}
        count = min(len(packs), max(1, round(len(packs) * self.percent / 100)))
        return set(secrets.SystemRandom().sample(packs, count))


EVERYTHING = Subset()


def check_repository(
    repository: Repository, *, read_data: bool | Subset = False, progress: Progress = silent
) -> Report:
    """Verify everything; changes nothing. `read_data`: all packs, or those of a subset.

    Raises StorageError only where the system refuses to read at all.
    """
    lease = repository.lease(leases.READER, "check", [])
    try:
        subset = (EVERYTHING if read_data else None) if isinstance(read_data, bool) else read_data
        return Checkup(repository, subset, progress).run()
    finally:
        if lease is not None:
            lease.release()


@dataclass(frozen=True, slots=True)
class PackDamage:
    """A pack that is not whole, in short. `number` 0: nothing of it is in this host's index; `chunks`: those that can
    be read; `frames` that cannot; `noted`: what this host's catalog is to remember of it."""

    pack_id: bytes
    number: int
    missing: bool
    problems: tuple[str, ...]
    chunks: int
    frames: int
    noted: DamagedPack


class Checkup:
    """One look at everything. Besides the report it says what a repair needs to know; `lost` is told what is."""

    def __init__(
        self, repository: Repository, subset: Subset | None, progress: Progress, lost: Lost | None = None
    ) -> None:
        self._repository, self._subset, self._progress, self._lost = repository, subset, progress, lost
        self.report = Report()
        self.damaged: list[PackDamage] = []
        self.bad: dict[int, frozenset[int] | None] = {}
        """By number of a pack: frames that cannot be read, None for all."""
        self.index_problems: list[str] = []
        self.hurt: list[Hurt] = []
        """All generations that have lost something, marked or not."""
        self._damage: list[Finding] = []
        self._by_place: dict[tuple[int, int | None], int] = {}
        self._unindexed: list[int] = []
        """Damage by which chunks are lost that this host never knew."""
        self._comparison = Comparison()
        self._survey: Survey | None = None

    def run(self) -> Report:
        """Look at everything."""
        self._slots()
        self._records()
        self.packs()
        self.index()
        self._generations()
        return self.report

    def packs(self) -> None:
        """Look at packs."""
        repository = self._repository
        with repository.environment.read() as txn:
            numbers = repository.catalog.pack_numbers(txn)
            damaged = repository.catalog.damaged(txn)
            lost = [bytes.fromhex(each.pack_id) for each in damaged]
            ids = [repository.catalog.entry(txn, number).header.pack_id for number in numbers]
            places = list(zip(numbers, ids, strict=True))
            places += [(0, each) for each in lost if not repository.catalog.pack_number(txn, each)]
        chosen = set() if self._subset is None else self._subset.choose([each for _, each in places])
        # Of lost frames nothing shows in header and footer.
        chosen |= {bytes.fromhex(each.pack_id) for each in damaged if each.frame is not None}
        what = "checking packs" if self._subset is None else "reading packs"
        with ThreadPoolExecutor(usable_cores()) as threads:
            for at, (number, pack_id) in enumerate(places):
                self._pack(number, pack_id, threads if pack_id in chosen else None)
                self._progress(what, at + 1, len(places))

    def index(self) -> None:
        """Compare the index with the packs that were looked at. Whatever is wrong, indexing anew makes it right."""
        repository = self._repository
        self._progress("checking the index", 0, 1)
        try:
            with repository.environment.read() as txn:
                for problem in repository.index.check(txn):
                    self._found_in_index(problem)
                for each in self._comparison.run(repository.index, txn, set(repository.catalog.pack_numbers(txn))):
                    self._found_in_index(self._explained(txn, each.pack, each.text))
        except DamagedValueError as error:
            self._found_in_index(str(error))
        except IndexLostError as error:
            self._found_in_index(error.problem)
        self._progress("checking the index", 1, 1)

    def _slots(self) -> None:
        """A slot that is damaged keeps its owner out, who may not try it before he needs it."""
        for info in list_slots(read_key_files(self._repository.path)):
            if info.problem is not None:
                name = slot_name(info.slot_id)
                problem = info.problem.removeprefix(f"{name}: ")
                self.report.findings.append(Finding("slot", name, None, problem, (), ()))

    def _records(self) -> None:
        previous: bytes | None = layout.ZERO_ID
        epoch = 0
        last = self._repository.sequence
        for sequence in range(1, last + 1):
            name = layout.record_name(sequence)
            try:
                data = self._repository.storage.get(name)
                record = decode_record(self._repository.keys, data, sequence, previous, epoch)
                previous, epoch = record.id, record.header.epoch
                self._cached(name, record)
            except IntegrityError as error:
                previous = None  # the next one's link cannot be held against it
                self.report.findings.append(Finding("record", name, error.offset, error.problem, (), ()))
            except FormatVersionError as error:
                previous = None
                problem = str(error).removeprefix(f"{name}: ")
                self.report.findings.append(Finding("record", name, None, problem, (), ()))
            self._progress("checking records", sequence, last)

    def _cached(self, name: str, record: Record) -> None:
        """What this host has copied of a generation's record is what the record says."""
        if not isinstance(record.body, GenerationBody):
            return
        repository = self._repository
        try:
            with repository.environment.read() as txn:
                known = repository.catalog.generation(txn, record.body.vm, record.header.number)
        except NotFoundError:  # forgotten
            return
        real = generation_of(record.header, record.body, record.id)
        if known.vm_id == real.vm_id and _bare(known) != real:
            self._found_in_index(f"does not say of generation {real.name} what its record {name} says")

    def _pack(self, number: int, pack_id: bytes, threads: ThreadPoolExecutor | None) -> None:
        repository = self._repository
        try:
            entry = repository.catalog.pack(number) if number else None
        except ObjectMissingError:  # swapped out since packs were listed
            return
        try:
            found = examine(repository.storage, repository.keys, pack_id, entry, threads)
        except FormatVersionError as error:
            found = Examined(pack_id, None, (Problem(None, None, str(error)),))
        if found.problems and self._was_removed(pack_id):
            return
        name = layout.pack_name(pack_id)
        for problem in found.problems:
            if number:
                self._by_place[number, problem.frame] = len(self._damage)
            kind = "pack" if problem.frame is None else "frame"
            self._damage.append(Finding(kind, name, problem.offset, problem.text, (), ()))
        if found.problems:
            self.damaged.append(
                PackDamage(
                    pack_id,
                    number,
                    found.missing,
                    tuple(each.text for each in found.problems),
                    0 if found.info is None else len(found.info.footer.ids),
                    len(found.lost_frames),
                    DamagedPack.of(found),
                )
            )
        if found.problems and not number:
            self._unindexed.append(len(self._damage) - 1)
        if found.info is None:
            self.bad[number] = None
        elif found.lost_frames:
            self.bad[number] = found.lost_frames
        if found.info is None or found.problems:
            return
        edges = found.info.edges
        if entry is not None and not (len(edges) == len(entry.offsets) and bool((edges == entry.offsets).all())):
            self._found_in_index(f"says of {name} that its frames are where they are not")
        else:
            self._comparison.add(number, found.info)
        counts = self.report.counts
        counts["packs"] += 1
        counts["chunks"] += len(found.info.footer.ids)
        counts["bytes"] += found.info.size
        counts["read_packs"] += threads is not None
        counts["read_bytes"] += found.info.size if threads is not None else 0

    def _was_removed(self, pack_id: bytes) -> bool:
        """Whether a pack that is gone is no longer part of the repository."""
        repository = self._repository
        repository.refresh()
        with repository.environment.read() as txn:
            noted = any(each.pack_id == pack_id.hex() for each in repository.catalog.damaged(txn))
            return not noted and not repository.catalog.pack_number(txn, pack_id)

    def _explained(self, txn: lmdb.Transaction, number: int, text: str) -> str:
        repository = self._repository
        try:
            pack_id = repository.catalog.pack(number).header.pack_id
            found = examine(repository.storage, repository.keys, pack_id)
        except IntegrityError:
            return f"{text} (number {number})"
        wrong = None if found.info is None else misplaced(repository.index, txn, number, found.info)
        example = ""
        if wrong is not None:
            example = f": chunk {wrong[0].hex()[:16]} is said to be in frame {wrong[1]}, slot {wrong[2]}, and is not"
        return f"{text} ({layout.pack_name(pack_id)}){example}"

    def _found_in_index(self, problem: str) -> None:
        self.index_problems.append(problem)
        self.report.findings.append(Finding("index", str(self._repository.environment.path), None, problem, (), ()))

    def _generations(self) -> None:
        """Walk all page maps, and say whom each damage hurts."""
        hurt: dict[int, list[tuple[str, str]]] = {}
        try:
            for generation, lost in self._walked():
                self._note(generation, lost)
                for name, verdict in lost.items():
                    for cause in bits(verdict.causes):
                        if not (name in generation.hurt and self._damage[cause].kind in ("chunk", "node")):
                            hurt.setdefault(cause, []).append((generation.name, name))
        except IndexLostError as error:
            self._found_in_index(error.problem)
        for at, damage in enumerate(self._damage):
            generations = tuple(dict.fromkeys(name for name, _ in hurt.get(at, [])))
            regions = tuple(dict.fromkeys(region for _, region in hurt.get(at, [])))
            if damage.kind in ("chunk", "node") and not generations:
                continue  # marked already, or of a generation that was forgotten while this went on
            self.report.findings.append(replace(damage, generations=generations, regions=regions))

    def hurt_now(self) -> list[Hurt]:
        """Generations that have lost something, those included that came since; what was walked is not walked again.

        Raises IndexLostError, StorageError.
        """
        self.report.counts["generations"], self.hurt = 0, []
        for generation, lost in self._walked():
            self._note(generation, lost)
        return self.hurt

    def _walked(self) -> Iterator[tuple[Generation, dict[str, Verdict]]]:
        """Generations that have lost something, with what their regions have lost."""
        if self._survey is None:
            self._survey = Survey(self._repository, self.bad, self._cause, self._lost)
        names = list(self._names())
        for at, (vm, number) in enumerate(names):
            try:
                with self._repository.environment.read() as txn:
                    generation = self._repository.catalog.generation(txn, vm, number)
            except NotFoundError:  # forgotten meanwhile
                continue
            found = {region.name: self._survey.region(region) for region in generation.regions.values()}
            lost = {name: each for name, each in found.items() if each.causes}
            if lost and self._repository.has(generation):
                yield generation, lost
            self.report.counts["generations"] += 1
            self._progress("checking generations", at + 1, len(names))

    def _note(self, generation: Generation, lost: dict[str, Verdict]) -> None:
        regions = {name: each.lost_bytes for name, each in lost.items()}
        found = Hurt(generation.name, generation.vm_id, generation.number, regions)
        self.hurt.append(found)
        if generation.hurt.keys() & regions.keys():
            known = {name: count for name, count in regions.items() if name in generation.hurt}
            self.report.hurt.append(replace(found, regions=known))

    def _names(self) -> Iterator[tuple[str, int]]:
        catalog, environment = self._repository.catalog, self._repository.environment
        for vm in self._repository.vms():
            with environment.read() as txn:
                numbers = catalog.generation_numbers(txn, vm)
            yield from ((vm, number) for number in numbers)

    def _cause(self, level: int, pack: int, frame: int, error: IntegrityError | None, ids: NDArray[np.uint8]) -> int:
        if pack == 0 and len(self._unindexed) == 1:
            return min(self._unindexed[0], MAX_CAUSES - 1)  # there is nothing else that it can have been in
        place = (pack, frame) if pack else (0, -min(level, 1))
        at = self._by_place.get(place, self._by_place.get((pack, None)) if pack else None)
        if at is None:
            at = self._by_place[place] = len(self._damage)
            self._damage.append(self._described(level, error, bytes(ids[0]).hex()))
        return min(at, MAX_CAUSES - 1)

    @staticmethod
    def _described(level: int, error: IntegrityError | None, chunk: str) -> Finding:
        if error is not None:
            return Finding("frame", error.object, error.offset, error.problem, (), ())
        if level:
            return Finding("node", "page map", None, f"node {chunk[:16]} is in no pack, and perhaps others", (), ())
        return Finding("chunk", "chunk", None, f"{chunk[:16]} is in no pack, and perhaps others", (), ())


def _bare(generation: Generation) -> Generation:
    """Without what later records say of it."""
    return replace(generation, protected=False, hurt={})
