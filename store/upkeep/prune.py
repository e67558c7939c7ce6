"""Prune: giving back what no generation needs, while others read and write.

One at a time per repository. What is in use is marked (store.upkeep.liveness), a pure plan chooses packs
(store.upkeep.prune_plan), and then, in this order:

1. *Doom*: a record names the packs that are to go. From there on nothing new comes to rely on them.
2. Writers whose lease is older than that record may have found chunks in these packs: they are waited for, readers
   never are. Which packs are handled is decided pack by pack, by the record since which each is doomed, so what a
   busy repository does not allow now is done by the next prune.
3. What came since is marked as well: leases are listed, then the history is replayed, then the generations that leases
   stand on are walked, those that are there, and all that were made since the first marking, be they forgotten by now
   or not. Whoever takes his lease after that list has replayed the doom, shares nothing with doomed packs by look-ups,
   and inherits from a generation that he found there: it was there at the first marking, or is one of those made since,
   or was made by such a writer in turn. So nothing that anybody can come to need is only in packs without a mark.
4. *Swap* of packs in which nothing is marked, so that space comes back before any is taken. Then, slice by slice,
   what is marked and has no other place is copied in the order in which restores want it, published, and swapped in
   for the packs that it came from. A pack of which something cannot be read stays, and stays doomed, so that nothing
   comes to rely on it on any host; this one notes that it is damaged.
5. After each swap the index is made durable, then files are unlinked. Packs that no record names go once every writer
   that was there when they were found has ended.

Killed anywhere, the repository is whole: what was published and not swapped in is named by no record, what was swapped
out and not unlinked is unlinked by the next prune, and what is doomed is only not shared any more until then. On a
full disk the emergency file (store.upkeep.reserve) is given up for the few blocks that records take.

A chunk that is stored twice is kept once, and which of its places can be read is not tried: `perdure check --read-data`
does that. `steps` is a generator, so that tests can let others do anything between any two steps. Belongs to one
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from errno import ENOSPC
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from base import locks
from base.errors import ConflictError, IntegrityError, StorageError
from base.progress import Progress, silent
from base.workers import usable_cores
from store import format as layout
from store import leases
from store.catalog import DamagedPack
from store.leases import HeldLease
from store.packs import PackEntry, WrittenPack
from store.records import GenerationBody, UncertainCommitError
from store.salvage import examine
from store.upkeep import reserve, strays
from store.upkeep.copying import Copying
from store.upkeep.liveness import Below, Marks, Slots, in_frames, use_of
from store.upkeep.prune_plan import FRAME_COST, PackUse, PrunePlan, PruneSettings, Scatter, plan
from store.upkeep.repacking import Repacking
from store.upkeep.strays import Orphans

if TYPE_CHECKING:
    import lmdb

    from store.repository import Repository

LOCK = "prune.lock"
"""Name of the lock's file in the folder of leases."""

_SLICE_BYTES = 256 << 20
_SLICE_CHUNKS = 1 << 18
_SLICE_PACKS = 1 << 12
"""What a swap changes in the index at once: captures that want to commit wait for no more than that."""

T = TypeVar("T")


@dataclass(slots=True)
class PruneResult:
    """What a prune did. Bytes are those of packs as they are stored."""

    removed_packs: int = 0
    removed_bytes: int = 0
    rewritten_packs: int = 0
    """Packs whose content was copied before they went; among `removed_packs`."""
    rewritten_bytes: int = 0
    """What was written to take their place."""
    orphans: int = 0
    """Packs that no record named."""
    lost_chunks: int = 0
    """Chunks that generations need and that are in no pack."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Packs that had to stay because of damage, and why."""
    waiting: tuple[HeldLease, ...] = ()
    """Writers that are older than what was doomed."""
    waiting_packs: int = 0
    waiting_bytes: int = 0
    """What is left for the next prune because of them."""

    @property
    def freed_bytes(self) -> int:
        """What the repository is smaller by."""
        return self.removed_bytes - self.rewritten_bytes


class Prune:
    """One prune; made by `prune`, which holds the lock.

    `wait_s`: how long to wait for older writers. `keep_reserve`: make the emergency file at the end.
    """

    def __init__(
        self,
        repository: Repository,
        settings: PruneSettings,
        *,
        wait_s: float = 0.0,
        dry_run: bool = False,
        keep_reserve: bool = False,
        progress: Progress = silent,
    ) -> None:
        self._repository, self._settings = repository, settings
        self._wait_s, self._dry_run, self._keep_reserve, self._progress = wait_s, dry_run, keep_reserve, progress
        self.result = PruneResult()
        self.plan: PrunePlan | None = None
        self._marked: set[int] = set()
        self._marked_to: int | None = None
        self._ready: dict[int, PackUse] = {}

    def steps(self) -> Iterator[str]:
        """All of it; gives the name of each step when it is done.

        Raises ConflictError (others have changed what it stands on: what was done is whole), IntegrityError,
        StorageError.
        """
        repository = self._repository
        repository.refresh()
        self._require_no_damage()
        if not self._dry_run:
            strays.unlink_swapped(repository)
            yield "unlinked"
        orphans = Orphans(repository)
        self._slots = Slots(repository)
        self._live = Marks(repository, self._slots)
        self._mark()
        yield "marked"
        self.plan = plan(self._uses(), self._scatters(), self._settings, repository.settings.pack_bytes)
        if self._dry_run:
            return
        self._doom(self.plan)
        yield "doomed"
        self._wait_for_writers(self.plan)
        yield "waited"
        self._mark()
        yield "marked again"
        yield from self._remove_unused()
        yield from self._rewrite()
        yield "rewritten"
        self.result.lost_chunks = self._live.lost
        self.result.orphans = orphans.remove()
        if self._keep_reserve:
            reserve.make(repository.path, repository.disk)

    # What is there

    def _require_no_damage(self) -> None:
        """What is damaged may be put back or repaired; what it leads to cannot be seen until then."""
        with self._repository.environment.read() as txn:
            damaged = self._repository.catalog.damaged(txn)
        if damaged:
            name = layout.pack_name(bytes.fromhex(damaged[0].pack_id))
            raise IntegrityError(
                name, f"{damaged[0].problem}: nothing is pruned before it is put back or `perdure repair` has run"
            )

    def _mark(self) -> None:
        """Mark what has not been marked. The order of listing and replaying matters: see the module's docstring."""
        repository = self._repository
        held = leases.held(repository.leases)
        repository.refresh()
        roots = self._generations()
        stood_on = {sequence for each in held for sequence in each.facts.generations}
        for sequence in sorted(stood_on.union(self._made_since()).difference(roots)):
            roots[sequence] = Below.of(repository.generation_at(sequence))
        todo = {sequence: each for sequence, each in roots.items() if sequence not in self._marked}
        for at, (sequence, generation) in enumerate(sorted(todo.items())):
            for root in generation.roots:
                self._live.mark(root)
            self._marked.add(sequence)
            self._progress("marking generations", at + 1, len(todo))
        self._marked_to = repository.sequence
        self._roots = roots

    def _made_since(self) -> Iterator[int]:
        """Sequences of generations made since the marking before; none at the first."""
        if self._marked_to is not None:
            for sequence in range(self._marked_to + 1, self._repository.sequence + 1):
                if isinstance(self._repository.record(sequence).body, GenerationBody):
                    yield sequence

    def _generations(self) -> dict[int, Below]:
        """Those that are there, by sequence, without all else that they say: they may be many."""
        catalog, found = self._repository.catalog, {}
        with self._repository.environment.read() as txn:
            for vm in catalog.vms(txn):
                for number in catalog.generation_numbers(txn, vm):
                    generation = catalog.generation(txn, vm, number)
                    found[generation.sequence] = Below.of(generation)
        return found

    def _uses(self) -> Iterator[PackUse]:
        for number, entry, doomed in self._entries():
            live, used = use_of(entry, self._live.of(number))
            yield PackUse(
                number=number,
                id=entry.header.pack_id.hex(),
                epoch=entry.header.epoch,
                size=entry.size,
                chunks=int(entry.counts.sum()),
                live=live,
                used_bytes=used,
                doomed=doomed,
            )

    def _entries(self) -> Iterator[tuple[int, PackEntry, bool]]:
        """(number, entry, whether it is doomed) of the packs that have slots and are still there."""
        catalog = self._repository.catalog
        with self._repository.environment.read() as txn:
            there = set(catalog.pack_numbers(txn))
            doomed = set(catalog.doomed(txn)["pack"].tolist())
            for number in self._slots.packs.tolist():
                if number in there:
                    yield number, catalog.entry(txn, number), number in doomed

    def _scatters(self) -> Iterator[Scatter]:
        """What the newest generation of each VM costs to restore. Nothing to say where packs are sealed anew.

        What the newest of another VM needs does not count as opened in vain: gathering could not part the two, and
        would be tried again and again.
        """
        newest = {each.vm: each for _, each in sorted(self._roots.items())} if self._settings.epoch is None else {}
        everybody = self._marked_below(newest.values())
        for vm, generation in newest.items():
            marks = self._marked_below([generation]) if len(newest) > 1 else everybody
            packs: dict[int, tuple[float, float]] = {}
            for number, entry, _ in self._entries():
                mine = in_frames(entry, marks.of(number))
                touched = mine > 0
                if touched.any():
                    counts = entry.counts[touched].astype(np.int64)
                    full = int(entry.counts.max())
                    wanted = in_frames(entry, everybody.of(number))[touched]
                    needed = float(mine.sum()) * (1 + FRAME_COST / full)
                    vain = float((counts - wanted).sum()) + FRAME_COST * float((1 - wanted / full).sum())
                    packs[number] = needed + vain, needed
            yield Scatter(vm, packs)

    def _marked_below(self, generations: Iterable[Below]) -> Marks:
        marks = Marks(self._repository, self._slots)
        for generation in generations:
            for root in generation.roots:
                marks.mark(root)
        return marks

    # Doom

    def _doom(self, made: PrunePlan) -> None:
        wanted = [bytes.fromhex(each.id) for each in made.doomed]
        with self._repository.environment.read() as txn:
            standing = {bytes(each) for each in self._repository.catalog.doomed(txn)["pack_id"]}
        # Another host's repair may have doomed these for damage that this one does not know of.
        self._note_damaged(standing.difference(wanted))
        self._require_no_damage()
        if set(wanted) != standing:
            self._with_room(lambda: self._repository.doom(wanted))

    def _wait_for_writers(self, made: PrunePlan) -> None:
        """Find which doomed packs no writer can have shared chunks with before they were doomed."""
        since = self._doomed_since = self._since()
        latest = max(since.values(), default=0)
        older = leases.wait_for_writers(self._repository.leases, latest, self._wait_s)
        oldest = min((each.facts.sequence for each in older), default=latest)
        for use in made.doomed:
            if use.number not in since:
                continue  # it was found whole and has another number now: left for the next prune
            if since[use.number] <= oldest:
                self._ready[use.number] = use
            else:
                self.result.waiting_packs += 1
                self.result.waiting_bytes += use.unused_bytes
        if self.result.waiting_packs:
            self.result.waiting = tuple(older)

    def _since(self) -> dict[int, int]:
        with self._repository.environment.read() as txn:
            doomed = self._repository.catalog.doomed(txn)
        return {int(each["pack"]): int(each["since"]) for each in doomed}

    def _note_damaged(self, packs: Collection[bytes]) -> None:
        """Read all of these packs; of those that are not whole that is remembered. Raises StorageError."""
        repository, found = self._repository, []
        with ThreadPoolExecutor(usable_cores()) as threads:
            for at, pack_id in enumerate(packs):
                with repository.environment.read() as txn:
                    number = repository.catalog.pack_number(txn, pack_id)
                known = repository.catalog.pack(number) if number else None
                found.append(examine(repository.storage, repository.keys, pack_id, known, threads))
                self._progress("reading packs", at + 1, len(packs))
        damaged = [DamagedPack.of(each) for each in found if each.problems]
        if damaged:
            self._with_room(partial(self._note, damaged))

    def _note(self, damaged: list[DamagedPack]) -> None:
        with self._repository.environment.write("noting packs that are damaged") as txn:
            for each in damaged:
                self._repository.catalog.note_damage(txn, each)

    # Swap

    def _remove_unused(self) -> Iterator[str]:
        """Packs without anything in use."""
        unused = [use for use in self._ready.values() if not self._live.of(use.number).any()]
        for at in range(0, len(unused), _SLICE_PACKS):
            some = unused[at : at + _SLICE_PACKS]
            self._with_room(partial(self._swap, some, [], set()))
            yield "swapped"
            self._unlink(some)
            yield "unlinked"

    def _rewrite(self) -> Iterator[str]:
        """Packs of which something is in use, slice by slice."""
        todo = [use for use in self._ready.values() if self._live.of(use.number).any()]
        copying = Copying(self._repository, self._slots, self._live, self._roots, todo, self._progress)
        for some in _slices(todo):
            yield from self._rewrite_slice(some, copying)

    def _rewrite_slice(self, some: list[PackUse], copying: Copying) -> Iterator[str]:
        repository = self._repository
        repacking = Repacking(repository.storage, repository.keys, repository.frames, repository.settings)
        try:
            relied = copying.copy(some, repacking)
            added = [] if repacking.spoiled else repacking.finish()
            yield "copied"
            if not repacking.spoiled:
                repository.storage.settle("packs")
                yield "settled"
        except GeneratorExit:
            raise  # a test plays a crash
        except BaseException:
            repacking.abandon()
            raise
        if repacking.spoiled:  # once more without them: what they and others hold is copied from the others
            repacking.abandon()
            self.result.unreadable |= {
                use.id: str(repacking.spoiled[use.number]) for use in some if use.number in repacking.spoiled
            }
            self._note_damaged([bytes.fromhex(use.id) for use in some if use.number in repacking.spoiled])
            left = [use for use in some if use.number not in repacking.spoiled]
            if left:
                yield from self._rewrite_slice(left, copying)
            return
        with repacking.committed():
            self._swap(some, added, relied)
        self.result.rewritten_packs += len(some)
        self.result.rewritten_bytes += sum(each.size for each in added)
        yield "swapped"
        self._unlink(some)
        yield "unlinked"

    def _swap(self, gone: list[PackUse], added: list[WrittenPack], relied: set[int]) -> None:
        """Append the record, if nobody has changed meanwhile what it stands on."""
        catalog, since = self._repository.catalog, self._doomed_since

        def require(txn: lmdb.Transaction) -> None:
            now = {int(each["pack"]): int(each["since"]) for each in catalog.doomed(txn)}
            if any(now.get(use.number) != since[use.number] for use in gone):
                raise ConflictError("packs that are to be removed are doomed no longer, or anew")

        self._repository.swap(added, [bytes.fromhex(use.id) for use in gone], relied, require)

    def _unlink(self, gone: list[PackUse]) -> None:
        """Remove the files of packs that were swapped out: the index must not claim them after a power loss."""
        self._with_room(self._repository.refresh)
        self._repository.environment.flush()
        for use in gone:
            self._repository.storage.delete(layout.pack_name(bytes.fromhex(use.id)))
            self.result.removed_packs += 1
            self.result.removed_bytes += use.size

    def _with_room(self, action: Callable[[], T]) -> T:
        """Do it; on a full disk give up the emergency file and do it again."""
        try:
            return action()
        except UncertainCommitError:
            raise
        except StorageError as error:
            if error.errno != ENOSPC or not reserve.give_up(self._repository.path, self._repository.disk):
                raise
        return action()


def prune(
    repository: Repository,
    settings: PruneSettings,
    *,
    wait_s: float = 0.0,
    dry_run: bool = False,
    keep_reserve: bool = False,
    progress: Progress = silent,
) -> tuple[PrunePlan, PruneResult]:
    """Plan, and unless `dry_run` carry it out. `wait_s` bounds waiting for another prune, and for older writers.

    Raises LockedError (another one is at work), and what `Prune.steps` does.
    """
    with locks.held(repository.leases / LOCK, "pruning", wait_s):
        work = Prune(repository, settings, wait_s=wait_s, dry_run=dry_run, keep_reserve=keep_reserve, progress=progress)
        for _ in work.steps():
            pass
    assert work.plan is not None
    return work.plan, work.result


def _slices(todo: list[PackUse]) -> Iterator[list[PackUse]]:
    """Packs to be rewritten at a time: so much is written before anything of it is removed."""
    some: list[PackUse] = []
    size = chunks = 0
    for use in todo:
        size, chunks = size + use.used_bytes, chunks + use.live
        if some and (size > _SLICE_BYTES or chunks > _SLICE_CHUNKS or len(some) == _SLICE_PACKS):
            yield some
            some, size, chunks = [], use.used_bytes, use.live
        some.append(use)
    if some:
        yield some
