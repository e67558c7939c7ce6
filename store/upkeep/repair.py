"""Repair: what can be made whole is, what cannot is said, and nothing stays that looks whole and is not.

A plan is made from one look at everything (`store.upkeep.check.Checkup`), purely, and then carried out while others
read and write:

1. Packs of which another copy of this repository has a whole one are put back, byte for byte, and chunks that another
   repository has are taken (`store.upkeep.donor`).
2. What can be read of a damaged pack is copied into new packs, which are published.
3. A *hurt* record lists the generations that have lost something, so that nothing is built upon them any more.
4. *Doom*, as in store.upkeep.prune: nothing new comes to rely on the damaged packs. Writers that began before are
   waited for, and what they have committed meanwhile is looked at again, until the list of step 3 is complete.
5. *Swap* of the damaged packs for the new ones; the index is made durable; their files are unlinked.

Killed anywhere, the repository is whole but for what was lost before, and the next repair goes on: packs that were
published and not swapped in are named by no record, and prune removes them. `Repair.steps` is a generator, so that
tests can let others do anything between any two steps. Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from base import locks
from base.errors import IntegrityError, LockedError
from base.progress import Progress, silent
from base.workers import usable_cores
from store import format as layout
from store import leases
from store.packs import open_frame
from store.records import HurtGeneration
from store.salvage import examine
from store.upkeep.check import EVERYTHING, Checkup, PackDamage
from store.upkeep.findings import Finding, Hurt
from store.upkeep.prune import LOCK
from store.upkeep.repacking import Repacking

if TYPE_CHECKING:
    from store.repository import Repository
    from store.upkeep.donor import Donor

PUT_BACK, REPLACE, DROP = "put back", "replace", "drop"


@dataclass(frozen=True, slots=True)
class PackRepair:
    """What becomes of a damaged pack. `action`: put back (whole, from another copy), replace (by what can be read of
    it: `chunks`), drop (nothing can). `lost_frames`: those known to be unreadable."""

    pack: str
    action: str
    problems: tuple[str, ...]
    chunks: int
    lost_frames: int


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What is to be done. `hurt`: generations that are marked then, `healed`: that are marked now and then no longer;
    `impossible`: what no repair can mend, with what can be done instead."""

    packs: tuple[PackRepair, ...]
    hurt: tuple[Hurt, ...]
    healed: tuple[str, ...]
    marks_change: bool
    impossible: tuple[Finding, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.packs or self.marks_change)


@dataclass(slots=True)
class RepairResult:
    """What a repair did."""

    put_back: int = 0
    taken_chunks: int = 0
    replaced_packs: int = 0
    copied_bytes: int = 0
    hurt: tuple[Hurt, ...] = ()
    healed: tuple[str, ...] = ()
    """Generations that were marked before and are no longer."""


def plan(checkup: Checkup, marked: dict[tuple[str, int], tuple[str, dict[str, int]]], whole: set[bytes]) -> RepairPlan:
    """Purely from facts: what was found; what is marked now ((VM id, number) to (name, bytes by region)); the ids of
    damaged packs that another copy has whole."""
    packs = tuple(_pack_repair(each, whole) for each in checkup.damaged)
    found = {(each.vm_id, each.number): each.regions for each in checkup.hurt}
    return RepairPlan(
        packs=packs,
        hurt=tuple(checkup.hurt),
        healed=tuple(name for key, (name, _) in marked.items() if key not in found),
        marks_change=found != {key: regions for key, (_, regions) in marked.items()},
        impossible=tuple(each for each in checkup.report.findings if each.kind in _ADVICE),
    )


def advice(finding: Finding) -> str:
    """What can be done about something that a repair cannot mend."""
    return _ADVICE[finding.kind]


_ADVICE = {
    "slot": "put the file back from a copy of the repository, or make a new slot with `perdure key add` or "
    "`perdure key change-passphrase` and remove this one with `perdure key remove`",
    "record": "put the file back from a copy of the repository: `perdure repair --from COPY`. Hosts whose index is "
    "older than the damage go on working; a new one cannot verify the history, and so cannot open it",
}


class Repair:
    """One repair; `repair` holds the lock. `donor`: another repository that may have what is missing here."""

    def __init__(
        self, repository: Repository, donor: Donor | None, wait_s: float = 0.0, progress: Progress = silent
    ) -> None:
        self._repository, self._donor, self._wait_s, self._progress = repository, donor, wait_s, progress
        self.result = RepairResult()
        self.plan: RepairPlan | None = None

    def look(self) -> RepairPlan:
        """The plan; changes nothing."""
        self._repository.refresh()
        self._checkup = Checkup(self._repository, EVERYTHING, self._progress)
        self._checkup.run()
        whole = set()
        if self._donor is not None:
            whole = {each.pack_id for each in self._checkup.damaged if self._donor.has_whole(each.pack_id)}
        self.plan = plan(self._checkup, self._marked(), whole)
        return self.plan

    def steps(self) -> Iterator[str]:
        """All of it; gives the name of each step when it is done.

        Raises LockedError (a writer that began before has not ended: what was done stands), StorageError.
        """
        before = self._marked()
        made = self.look()
        yield "planned"
        if self._donor is not None:
            yield from self._take(made)
            made = self.look()
            yield "looked again"
        if made.packs:
            yield from self._replace()
        else:
            yield from self._mark()
        self.result.hurt = tuple(self._checkup.hurt)
        left = {(each.vm_id, each.number) for each in self._checkup.hurt}
        self.result.healed = tuple(name for key, (name, _) in before.items() if key not in left)

    # From another repository

    def _take(self, made: RepairPlan) -> Iterator[str]:
        """Packs that another copy has whole, then chunks, until it has nothing more that is missing here."""
        assert self._donor is not None
        for each in made.packs:
            if each.action == PUT_BACK:
                self._donor.put_back(bytes.fromhex(each.pack))
                self.result.put_back += 1
                yield "put back"
        whole = {each.number for each in self._checkup.damaged if self._is_put_back(made, each)}
        bad = {number: frames for number, frames in self._checkup.bad.items() if number not in whole}
        while count := self._donor.take_missing(bad):
            self.result.taken_chunks += count
            yield "taken"

    @staticmethod
    def _is_put_back(made: RepairPlan, damaged: PackDamage) -> bool:
        return any(each.action == PUT_BACK for each in made.packs if each.pack == damaged.pack_id.hex())

    # Damaged packs

    def _replace(self) -> Iterator[str]:
        repository, damaged = self._repository, self._checkup.damaged
        with repository.environment.write() as txn:
            for each in damaged:
                repository.catalog.note_damage(txn, each.noted)
        repacking = Repacking(repository.storage, repository.keys, repository.frames, repository.settings)
        try:
            with ThreadPoolExecutor(usable_cores()) as threads:
                for at, each in enumerate(damaged):
                    self._copy(each, repacking, threads)
                    self._progress("copying what can be read", at + 1, len(damaged))
            added = repacking.finish()
            yield "copied"
            repository.storage.settle("packs")
            yield "settled"
            yield from self._mark()
            yield from self._doom(damaged)
        except GeneratorExit:
            raise  # a test plays a crash
        except BaseException:
            repacking.abandon()
            raise
        with repacking.committed():
            repository.swap(added, [each.pack_id for each in damaged])
        yield "swapped"
        repository.environment.flush()
        for each in damaged:
            repository.storage.delete(layout.pack_name(each.pack_id))
        self.result.replaced_packs = len(damaged)
        self.result.copied_bytes = sum(each.size for each in added)
        yield "unlinked"

    def _copy(self, damaged: PackDamage, repacking: Repacking, threads: ThreadPoolExecutor) -> None:
        """Every frame that opens and holds what its ids say."""
        repository = self._repository
        known = repository.catalog.pack(damaged.number) if damaged.number else None
        found = examine(repository.storage, repository.keys, damaged.pack_id, known, threads)
        if found.info is None:
            return
        header, edges = found.info.header, found.info.edges.tolist()
        sealer = repository.keys.sealer(header.kind, header.pack_id, header.epoch, header.salt)
        for frame in np.flatnonzero(found.info.footer.counts).tolist():
            begin, end = edges[frame], edges[frame + 1]
            data = repository.storage.get_range(found.info.name, begin, end - begin)
            with suppress(IntegrityError):  # it could be read a moment ago; then it is lost now
                ids, chunks = open_frame(sealer, frame, memoryview(data)[4:], found.info.name, begin)
                repacking.add(header.kind, ids, chunks, threads)

    def _doom(self, damaged: list[PackDamage]) -> Iterator[str]:
        """Doom, then wait for older writers, and mark what they have committed meanwhile."""
        repository = self._repository
        with repository.environment.read() as txn:
            standing = [bytes(each) for each in repository.catalog.doomed(txn)["pack_id"]]
        wanted = list(dict.fromkeys([*standing, *(each.pack_id for each in damaged)]))
        if set(wanted) != set(standing):
            repository.doom(wanted)
        yield "doomed"
        while True:
            self._wait_for_writers(repository.sequence)
            yield "waited"
            before = repository.sequence
            yield from self._mark()
            if repository.sequence == before:
                return

    def _wait_for_writers(self, sequence: int) -> None:
        """Until no writer is there that had not seen this record when it began."""
        older = leases.wait_for_writers(self._repository.leases, sequence, self._wait_s)
        if older:
            first = older[0].facts
            raise LockedError(
                f"{first.purpose}, process {first.pid} on {first.host}, writes since {first.since}: what is hurt "
                "is marked; damaged packs are replaced by a `perdure repair` after that (see --lock-wait)"
            )

    # Marks

    def _mark(self) -> Iterator[str]:
        """Make the list of hurt generations what it should be."""
        repository = self._repository
        repository.refresh()
        found = self._checkup.hurt_now()
        marked = {key: regions for key, (_, regions) in self._marked().items()}
        if {(each.vm_id, each.number): each.regions for each in found} != marked:
            repository.mark_hurt(
                [HurtGeneration(vm_id=each.vm_id, number=each.number, regions=each.regions) for each in found]
            )
            yield "marked"

    def _marked(self) -> dict[tuple[str, int], tuple[str, dict[str, int]]]:
        catalog = self._repository.catalog
        with self._repository.environment.read() as txn:
            names = {facts[0].hex(): vm for vm in catalog.vms(txn) if (facts := catalog.vm(txn, vm))}
            return {
                (each.vm_id, each.number): (f"{names.get(each.vm_id, each.vm_id)}@{each.number}", each.regions)
                for each in catalog.all_hurt(txn)
            }


def index_problems(repository: Repository, progress: Progress = silent) -> list[str]:
    """What is wrong with this host's index; `Environment.discard`, and opening again, makes a new one."""
    checkup = Checkup(repository, None, progress)
    checkup.packs()
    checkup.index()
    return checkup.index_problems


def repair(
    repository: Repository, donor: Donor | None = None, *, wait_s: float = 0.0, progress: Progress = silent
) -> tuple[RepairPlan, RepairResult]:
    """Plan and carry out. `wait_s` bounds waiting for a prune or another repair, and for older writers.

    Raises LockedError, StorageError.
    """
    with locks.held(repository.leases / LOCK, "repairing", wait_s):
        work = Repair(repository, donor, wait_s, progress)
        first = None
        for _ in work.steps():
            first = first or work.plan
    assert first is not None
    return first, work.result


def _pack_repair(each: PackDamage, whole: set[bytes]) -> PackRepair:
    action = PUT_BACK if each.pack_id in whole else REPLACE if each.chunks else DROP
    return PackRepair(each.pack_id.hex(), action, each.problems, each.chunks, each.frames)
