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
   for the packs that it came from. A pack of which something cannot be read stays, and is doomed no longer.
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

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from errno import ENOSPC
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from base import locks
from base.errors import ConflictError, IntegrityError, StorageError
from base.progress import Progress, silent
from store import format as layout
from store import leases
from store.index.chunks import LOCATION
from store.leases import HeldLease
from store.nodes import NODE_BYTES
from store.packs import PackEntry, WrittenPack, read_pack
from store.pagemap import Root
from store.records import Generation, GenerationBody, SwapBody, UncertainCommitError
from store.upkeep import reserve
from store.upkeep.liveness import Bits, Marks, Slots, in_frames, use_of
from store.upkeep.prune_plan import FRAME_COST, PackUse, PrunePlan, PruneSettings, Scatter, plan
from store.upkeep.repacking import Repacking, Wanted

if TYPE_CHECKING:
    import lmdb

    from store.repository import Repository

LOCK = "prune.lock"
"""Name of the lock's file in the folder of leases."""

_SLICE_BYTES = 256 << 20
_SLICE_CHUNKS = 1 << 18
_SLICE_PACKS = 1 << 12
"""What a swap changes in the index at once: captures that want to commit wait for no more than that."""
_YIELD_SECONDS = 15.0
"""For writers that give way when somebody waits for them: they look every few seconds."""
_POLL_SECONDS = 0.1
_UNRANKED = np.iinfo(np.int64).max

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


@dataclass(frozen=True, slots=True)
class _Below:
    """A generation as far as marking goes: whose it is, and the roots of its regions."""

    vm: str
    roots: tuple[Root, ...]

    @classmethod
    def of(cls, generation: Generation) -> _Below:
        return cls(generation.vm, tuple(region.root for region in generation.regions.values()))


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
            self._unlink_swapped()
            yield "unlinked"
        orphans = self._orphans()
        writers = {each.name for each in self._writers()}
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
        self._end_doom()
        yield "rewritten"
        self.result.lost_chunks = self._live.lost
        self._remove_orphans(orphans, writers)
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

    def _writers(self) -> list[HeldLease]:
        return [each for each in leases.held(self._repository.leases) if each.facts.role != leases.READER]

    def _mark(self) -> None:
        """Mark what has not been marked. The order of listing and replaying matters: see the module's docstring."""
        repository = self._repository
        held = leases.held(repository.leases)
        repository.refresh()
        roots = self._generations()
        stood_on = {sequence for each in held for sequence in each.facts.generations}
        for sequence in sorted(stood_on.union(self._made_since()).difference(roots)):
            roots[sequence] = _Below.of(repository.generation_at(sequence))
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

    def _generations(self) -> dict[int, _Below]:
        """Those that are there, by sequence, without all else that they say: they may be many."""
        catalog, found = self._repository.catalog, {}
        with self._repository.environment.read() as txn:
            for vm in catalog.vms(txn):
                for number in catalog.generation_numbers(txn, vm):
                    generation = catalog.generation(txn, vm, number)
                    found[generation.sequence] = _Below.of(generation)
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

    def _marked_below(self, generations: Iterable[_Below]) -> Marks:
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
        if set(wanted) != standing:
            self._with_room(lambda: self._repository.doom(wanted))

    def _wait_for_writers(self, made: PrunePlan) -> None:
        """Find which doomed packs no writer can have shared chunks with before they were doomed."""
        since = self._doomed_since = self._since()
        latest = max(since.values(), default=0)
        began = time.monotonic()
        while True:
            older = [each for each in self._writers() if each.facts.sequence < latest]
            patience = self._wait_s
            if all(each.facts.yields for each in older):
                patience = max(patience, _YIELD_SECONDS)
            if not older or time.monotonic() - began >= patience:
                break
            time.sleep(_POLL_SECONDS)
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

    def _end_doom(self) -> None:
        """Packs that had to stay are doomed no longer."""
        spoiled = {bytes.fromhex(each) for each in self.result.unreadable}
        with self._repository.environment.read() as txn:
            standing = [bytes(each) for each in self._repository.catalog.doomed(txn)["pack_id"]]
        if spoiled.intersection(standing):
            self._with_room(lambda: self._repository.doom([each for each in standing if each not in spoiled]))

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
        ranks = self._ranks(todo) if todo else {}
        total = sum(use.used_bytes for use in todo)
        for some in _slices(todo):
            yield from self._rewrite_slice(some, ranks, total)

    def _rewrite_slice(self, some: list[PackUse], ranks: dict[int, Bits], total: int) -> Iterator[str]:
        repository = self._repository
        repacking = Repacking(repository.storage, repository.keys, repository.frames, repository.settings)
        try:
            relied = self._copy(some, ranks, repacking, total)
            added = [] if repacking.spoiled else repacking.finish()
            yield "copied"
            if not repacking.spoiled:
                repository.storage.settle("packs")
                yield "settled"
                self._swap(some, added, relied)
        except (UncertainCommitError, GeneratorExit):
            raise  # the record may be there: its packs must be; or a test plays a crash
        except BaseException:
            repacking.abandon()
            raise
        if repacking.spoiled:  # once more without them: what they and others hold is copied from the others
            repacking.abandon()
            self.result.unreadable |= {
                use.id: str(repacking.spoiled[use.number]) for use in some if use.number in repacking.spoiled
            }
            left = [use for use in some if use.number not in repacking.spoiled]
            if left:
                yield from self._rewrite_slice(left, ranks, total)
            return
        self.result.rewritten_packs += len(some)
        self.result.rewritten_bytes += sum(each.size for each in added)
        yield "swapped"
        self._unlink(some)
        yield "unlinked"

    def _ranks(self, todo: list[PackUse]) -> dict[int, Bits]:
        """For each slot of these packs when a restore of the newest generation of a VM wants it, then of older ones."""
        ranks = {use.number: np.full(self._slots.sizes_of(use.number), _UNRANKED) for use in todo}
        count = 0

        def found(_: int, bits: Bits) -> None:
            nonlocal count
            index = self._slots.pack_index(bits)
            numbers = self._slots.packs[index]
            within = self._slots.within(bits, index)
            mine = np.flatnonzero(np.isin(numbers, np.fromiter(ranks, np.uint32)))
            for number in np.unique(numbers[mine]).tolist():
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

    def _copy(self, some: list[PackUse], ranks: dict[int, Bits], repacking: Repacking, total: int) -> set[int]:
        """Copy what is marked in these packs and has no other place that lasts; gives the packs of what has one."""
        relied: set[int] = set()
        for kind in (layout.PACK_DATA, layout.PACK_NODES):
            parts = [self._marked_of(use, ranks[use.number], repacking) for use in some]
            rows = [each for each in parts if each is not None and each[0] == kind]
            if not rows:
                continue
            ids, locations, sizes, rank = (np.concatenate([row[at] for row in rows]) for at in (1, 2, 3, 4))
            order = np.lexsort((locations["slot"], locations["frame"], locations["pack"], rank))
            _, first = np.unique(np.ascontiguousarray(ids[order]).view("V32").ravel(), return_index=True)
            order = order[np.sort(first)]  # of two marked places of one chunk, one is copied
            lasting = self._repository.nodes.reusable(ids[order])["pack"]
            relied |= set(np.unique(lasting).tolist()) - {0}
            order = order[lasting == 0]
            repacking.copy(kind, Wanted(ids[order], locations[order], sizes[order]), self._progress, total)
        return relied

    def _marked_of(self, use: PackUse, rank: Bits, repacking: Repacking) -> _Marked | None:
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
        return entry.header.kind, footer.ids[at], locations, sizes, rank[at]

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

    # Left-overs

    def _unlink_swapped(self) -> None:
        """Files that a killed prune swapped out and did not remove."""
        with self._repository.environment.read() as txn:
            gone = [name for name, each in self._stored() if self._repository.catalog.was_removed(txn, each)]
        if gone:
            self._repository.environment.flush()
            for name in gone:
                self._repository.storage.delete(name)

    def _orphans(self) -> list[bytes]:
        """Packs that no record names; perhaps one is about to."""
        with self._repository.environment.read() as txn:
            return [each for _, each in self._stored() if not self._repository.catalog.names(txn, each)]

    def _stored(self) -> Iterator[tuple[str, bytes]]:
        for name in self._repository.storage.list("packs"):
            with suppress(ValueError):  # not ours
                pack_id = bytes.fromhex(name.rpartition("/")[2])
                if layout.pack_name(pack_id) == name and len(pack_id) == 16:
                    yield name, pack_id

    def _remove_orphans(self, orphans: list[bytes], writers: set[str]) -> None:
        """Those that were found first go if every writer that was there after that has ended without naming them."""
        if not orphans or writers & {each.name for each in self._writers()}:
            return
        self._repository.refresh()
        named = self._named()  # not from the index: what is deleted here comes back from nowhere
        for pack_id in orphans:
            if pack_id.hex() not in named:
                self._repository.storage.delete(layout.pack_name(pack_id))
                self.result.orphans += 1

    def _named(self) -> set[str]:
        """Ids of all packs that any record has ever named."""
        named: set[str] = set()
        for sequence in range(1, self._repository.sequence + 1):
            body = self._repository.record(sequence).body
            if isinstance(body, GenerationBody):
                named.update(body.packs)
            elif isinstance(body, SwapBody):
                named.update(body.added)
        return named

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


_Marked = tuple[int, NDArray[np.uint8], NDArray[np.void], NDArray[np.int64], Bits]


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
