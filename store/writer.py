"""Making a generation: pages in, packs and page maps out, one signed record at the end.

A `GenerationWriter` holds a lease from before its first look-up, starts from its parent's page maps, and takes
the new content of ranges from files. Nothing is visible until `commit`; leaving the context without it drops
everything. Belongs to one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from base import extents as ranges
from base.arrays import distinct
from base.errors import PerdureError
from base.extents import Extents
from base.progress import Progress, silent
from base.units import PAGE
from store import format as layout
from store import leases, pagemap
from store.lanes import Batch, Lanes, LocalLane
from store.nodes import NodeWriter
from store.packs import WrittenPack, delete_packs
from store.records import Generation, UncertainCommitError
from store.retention.quotas import Admission, OvertakenError, Wanted, WantedRegion, admit
from store.stored_ids import StoredIds

if TYPE_CHECKING:
    from store.repository import Repository

_BATCH_RANGES = 512
"""So that all that is on its way to a worker (8 KiB a batch) fits its pipe: nobody waits for somebody who waits."""
_WINDOW = 1 << 18
"""Changed chunks after which a page map is brought up to date: bounds memory (40 bytes each)."""
_BEFORE_WINDOW = 1 << 13
"""Chunks of the parent's page map that are held for comparison: 256 KiB of ids, three at a time. Larger ones took so
long to read that workers ran out of batches meanwhile."""
_DENSE = 8
"""A batch that spans at most so many chunks for each that it has is compared window by window."""
_READ_ANYWAY = 64 << 10
"""Ranges up to so many bytes are read without looking for holes: zeros tell as much, and cost less than two calls."""
_SMALL = 16 << 20
"""Work below this many bytes is done in this process: sending it elsewhere costs more."""


@dataclass(slots=True)
class RegionDraft:
    """A region of the generation being made. `anew`: something of the parent's is lost, so it begins empty, and all of
    its content must be offered, also what did not change; what is stored already costs a look-up."""

    name: str
    kind: str
    root: pagemap.Root
    kept_bytes: int
    anew: bool = False
    base: pagemap.Root = field(init=False)
    """What it began from."""
    changed: Extents | None = None
    """Chunk numbers given other content so far, if that is noted: for quotas."""

    def __post_init__(self) -> None:
        self.base = self.root


class GenerationWriter:
    """One generation in the making; made by `Repository.writer`.

    A region begins as it is in the parent. One that not every generation has, as main memory, may have another base in
    `bases`, by name: the last generation that has it, since which it is known what changed.
    """

    def __init__(
        self,
        repository: Repository,
        vm: str,
        parent: Generation | None,
        bases: Mapping[str, Generation],
        *,
        ahead: bool = False,
    ) -> None:
        self._repository, self._vm, self._parent, self._bases = repository, vm, parent, bases
        stands_on = {each.id: each for each in (*bases.values(), *([parent] if parent else ()))}
        self._lease = repository.lease(leases.WRITER, f"writer of VM {vm}", list(stands_on.values()), yields=ahead)
        self._nodes = NodeWriter(repository.storage, repository.keys, repository.nodes, repository.settings.pack_bytes)
        self._local: LocalLane | None = None
        self._workers: Lanes | None = None
        self._drafts: dict[str, RegionDraft] = {}
        self._new = StoredIds(repository.environment.directory.parent, repository.disk)
        self._hit_packs: set[int] = set()
        self._published: list[WrittenPack] = []
        self.dirty_bytes = 0
        self.forgotten: list[Generation] = []
        policy = repository.policy(vm)
        self._counts = policy is not None and policy.quota is not None

    def __enter__(self) -> GenerationWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def region(
        self, name: str, kind: str, length: int, *, chunk_size: int = PAGE, kept_bytes: int | None = None
    ) -> RegionDraft:
        """Begin a region with the content that it has in its base, or empty. `kept_bytes` defaults to `length`."""
        base = self._bases.get(name, self._parent)
        before = base.regions.get(name) if base else None
        anew = base is not None and before is not None and name in self._repository.unfit(base)
        if before is not None and not anew and before.root.chunk_size == chunk_size:
            root = self._resized(before.root, length)
        else:
            root = pagemap.Root(length, chunk_size, 0, layout.ZERO_ID)
        return self._begin(RegionDraft(name, kind, root, length if kept_bytes is None else kept_bytes, anew))

    def same(self, name: str, *, kept_bytes: int | None = None) -> RegionDraft:
        """Begin a region that equals that of its base, which has it: with its page map in any case, since nobody offers
        its content. What the base has lost, it has lost too. `kept_bytes` defaults to the base's."""
        base = self._bases.get(name, self._parent)
        assert base is not None
        region = base.regions[name]
        kept = region.kept_bytes if kept_bytes is None else kept_bytes
        return self._begin(RegionDraft(name, region.kind, region.root, kept))

    def drop(self, name: str) -> None:
        """Leave out a region that was begun; what of it is in packs already may serve a later generation."""
        del self._drafts[name]

    @property
    def in_the_way(self) -> bool:
        """Whether packs have been doomed since this writer began, so that who prunes waits for it.

        As far as records were replayed; not for long, if it was begun `ahead`.
        """
        repository = self._repository
        with repository.environment.read() as txn:
            doomed = repository.catalog.doomed(txn)["since"]
        return self._lease is not None and bool((doomed > self._lease.facts.sequence).any())

    @property
    def stands_on_lost_ground(self) -> bool:
        """Whether something was found to be lost since, of what a region began from."""
        for name, draft in self._drafts.items():
            base = self._bases.get(name, self._parent)
            if not draft.anew and base is not None and name in base.regions and name in self._repository.unfit(base):
                return True
        return False

    def replace(
        self,
        draft: RegionDraft,
        descriptor: int,
        extents: Extents | None = None,
        progress: Progress = silent,
        *,
        here: bool = False,
    ) -> None:
        """Make the content of `extents` (None: everything) that of the file, whose offsets are the region's.

        Holes cost nothing; pages that are as before cost a hash. `here`: in this process, not by workers. Raises
        StorageError, IntegrityError, WorkerError.
        """
        length, chunk = draft.root.length, draft.root.chunk_size
        everything = ranges.normalise([(0, -(-length // chunk) * chunk)])
        wanted = everything if extents is None else ranges.intersect(ranges.widen(extents, chunk), everything)
        size = ranges.length(descriptor)
        present = ranges.intersect(ranges.widen(_present(descriptor, wanted, min(size, length)), chunk), wanted)
        self.clear(draft, ranges.subtract(wanted, present))
        total = ranges.total(present)
        judge = _Judge(self, draft, total, progress)
        lanes = self._lanes(total, here=here)
        lanes.drive(descriptor, chunk, _batches(present, chunk, lanes.batch_bytes), judge)
        judge.flush()

    def clear(self, draft: RegionDraft, extents: Extents) -> None:
        """Make ranges zero."""
        if len(extents) and draft.root.id != layout.ZERO_ID:
            chunks = ranges.widen(extents, draft.root.chunk_size) // draft.root.chunk_size
            draft.root = pagemap.clear(draft.root, chunks, self._nodes, self._nodes, self._repository.node_hasher)

    def commit(
        self,
        cause: str,
        *,
        tags: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
        pause_ms: float | None = None,
    ) -> Generation:
        """Publish packs, then the record.

        Generations that the guest caused and no rule keeps are forgotten where a quota makes that necessary: they
        then stand in `forgotten`. Raises QuotaError where that does not help, StorageError, IntegrityError,
        WorkerError: then nothing was committed (UncertainCommitError: perhaps).
        """
        self._published += self._nodes.finish()
        for lane in (self._workers, self._local):  # after the nodes: frames of theirs may still be being compressed
            if lane is not None:
                self._published[:0] = lane.finish()
        if self._published:
            self._repository.storage.settle("packs")
        packs, self._published = self._published, []  # as soon as the record may be there, its packs must be
        try:
            generation, admission = self._publish(packs, cause, tags, metadata or {}, pause_ms)
        except UncertainCommitError:
            raise
        except PerdureError:
            self._published = packs
            raise
        for each in admission.forget:
            with suppress(PerdureError):  # protected meanwhile, say: what is committed is not undone for it
                self._repository.forget(each)
                self.forgotten.append(each)
        return generation

    def close(self) -> None:
        """Drop whatever is certainly not committed, packs that became visible included, and give back the lease."""
        try:
            for lane in (self._workers, self._local, self._nodes):
                if lane is not None:
                    lane.abandon()
            delete_packs(self._repository.storage, self._published)
            if self._workers is not None:
                self._repository.storage.remove_leftovers("packs")  # of workers that died
        finally:
            self._published = []
            self._new.close()
            if self._lease is not None:
                self._lease.release()
            self._repository.storage.close()  # what is deleted from now on must not be kept on the disk by us

    def _publish(
        self,
        packs: list[WrittenPack],
        cause: str,
        tags: tuple[str, ...],
        metadata: dict[str, Any],
        pause_ms: float | None,
    ) -> tuple[Generation, Admission]:
        drafts = list(self._drafts.values())
        wanted = Wanted(
            vm=self._vm,
            cause=cause,
            tags=tags,
            stored_bytes=sum(pack.size for pack in packs),
            kept_bytes=sum(each.kept_bytes for each in drafts),
            regions=tuple(WantedRegion(each.name, each.base, each.changed) for each in drafts),
        )
        while True:
            admission = admit(self._repository, wanted)
            try:
                generation = self._repository.publish_generation(
                    self._vm,
                    parent=self._parent,
                    drafts=drafts,
                    packs=packs,
                    hit_packs=self._hit_packs | self._nodes.hit_packs,
                    dirty_bytes=self.dirty_bytes,
                    cause=cause,
                    tags=tags,
                    metadata=metadata,
                    pause_ms=pause_ms,
                    admission=admission,
                )
            except OvertakenError:
                self._repository.refresh()  # it may be another host's, which that attempt did not keep
            else:
                return generation, admission

    def _begin(self, draft: RegionDraft) -> RegionDraft:
        draft.changed = ranges.EMPTY if self._counts else None
        self._drafts[draft.name] = draft
        return draft

    def _resized(self, root: pagemap.Root, length: int) -> pagemap.Root:
        none = np.empty(0, np.uint64), np.empty((0, layout.ID_BYTES), np.uint8)
        if root.length == length:
            return root
        return pagemap.update(root, length, *none, self._nodes, self._nodes, self._repository.node_hasher)

    def _lanes(self, total: int, *, here: bool) -> Lanes:
        repository = self._repository
        if total > _SMALL and not here and repository.pool is not None:
            if self._workers is None:
                self._workers = repository.worker_lanes()
            return self._workers
        if self._local is None:
            self._local = LocalLane(repository.storage, repository.keys, repository.settings)
        return self._local

    def new_chunks(self, ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of these ids (n, 32) nobody has stored yet, each only at its first place; remembers them as stored."""
        wanted = np.zeros(len(ids), np.bool_)
        live = np.flatnonzero(ids.any(axis=1))
        if not len(live):
            return wanted
        locations = self._repository.nodes.reusable(ids[live])
        known = locations["pack"] != 0
        self._hit_packs.update(distinct(locations["pack"][known]).tolist())
        candidates = live[~known]
        wanted[candidates] = self._new.fresh(ids[candidates])
        return wanted

    def last_chunk(self, draft: RegionDraft, outside: Extents) -> int | None:
        """Number of the last chunk of a region, as it is by now, that has something, outside of ranges of whole chunks;
        None if there is none. Raises IntegrityError."""
        return pagemap.last(draft.root, self._nodes, outside // draft.root.chunk_size)

    def before(self, root: pagemap.Root) -> _Before:
        """What the page map holds, for batches that come more or less in order."""
        return _Before(root, self._nodes)

    def updated(self, root: pagemap.Root, numbers: NDArray[np.uint64], ids: NDArray[np.uint8]) -> pagemap.Root:
        """The page map with these chunks set."""
        return pagemap.update(root, root.length, numbers, ids, self._nodes, self._nodes, self._repository.node_hasher)


class _Judge:
    """Compares batches with the page map, deduplicates, and collects what changed."""

    def __init__(self, writer: GenerationWriter, draft: RegionDraft, total: int, progress: Progress) -> None:
        self._writer, self._draft, self._total, self._progress = writer, draft, total, progress
        self._base = draft.root
        self._before = writer.before(draft.root)
        self._numbers: list[NDArray[np.uint64]] = []
        self._ids: list[NDArray[np.uint8]] = []
        self._count = self._done = 0

    def __call__(self, numbers: NDArray[np.uint64], ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
        changed = self._changed(numbers, ids)
        wanted = np.zeros(len(ids), np.bool_)
        if changed.any():
            some = ids[changed]
            wanted[changed] = self._writer.new_chunks(some)
            self._numbers.append(numbers[changed])
            self._ids.append(some)
            self._count += len(some)
            self._writer.dirty_bytes += len(some) * self._base.chunk_size
            if self._count >= _WINDOW:
                self.flush()
        self._done += len(ids) * self._base.chunk_size
        self._progress(self._draft.name, min(self._done, self._total), self._total)
        return wanted

    def _changed(self, numbers: NDArray[np.uint64], ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
        differs = ids.view(np.uint64)
        if self._base.id != layout.ZERO_ID:
            differs = differs ^ self._before(numbers).view(np.uint64)
        changed: NDArray[np.bool_] = np.logical_or.reduce(differs, axis=1)
        return changed

    def flush(self) -> None:
        """Bring the page map up to date with what was collected. Batches come back in any order."""
        if self._count:
            numbers, ids = np.concatenate(self._numbers), np.concatenate(self._ids)
            order = np.argsort(numbers)
            self._draft.root = self._writer.updated(self._draft.root, numbers[order], ids[order])
            if self._draft.changed is not None:
                self._draft.changed = ranges.union(self._draft.changed, ranges.from_numbers(numbers[order], 1))
            self._numbers, self._ids, self._count = [], [], 0


class _Before:
    """Ids that a page map has at chunk numbers. Where batches are dense, whole windows of it are read at once: level
    by level for each batch would cost five times as much as hashing the batch."""

    def __init__(self, root: pagemap.Root, source: pagemap.NodeSource) -> None:
        self._root, self._source = root, source
        self._windows: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    def __call__(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Ids (n, 32) at ascending chunk numbers (n,)."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first > _DENSE * len(numbers):
            return pagemap.lookup(self._root, self._source, numbers)
        found = np.empty((len(numbers), layout.ID_BYTES), np.uint8)
        for window in range(first // _BEFORE_WINDOW, last // _BEFORE_WINDOW + 1):
            start = np.uint64(window * _BEFORE_WINDOW)
            inside = (numbers >= start) & (numbers < start + np.uint64(_BEFORE_WINDOW))
            found[inside] = self._window(window)[numbers[inside] - start]
        return found

    def _window(self, window: int) -> NDArray[np.uint8]:
        ids = self._windows.get(window)
        if ids is None:
            start = window * _BEFORE_WINDOW
            ids = np.zeros((_BEFORE_WINDOW, layout.ID_BYTES), np.uint8)
            for numbers, some in pagemap.leaves(self._root, self._source, start, start + _BEFORE_WINDOW):
                ids[numbers - np.uint64(start)] = some
            self._windows[window] = ids
            if len(self._windows) > 3:  # batches come back in nearly the order that they were sent
                self._windows.popitem(last=False)
        return ids


def _present(descriptor: int, wanted: Extents, size: int) -> Extents:
    """What of `wanted` is not a hole. Looks only inside `wanted`, so that a few pages of a huge file cost little."""
    rows = []
    for start, end in wanted.tolist():
        if end - start > _READ_ANYWAY:
            rows += ranges.resident(descriptor, min(end, size), start).tolist()
        elif start < size:
            rows.append((start, min(end, size)))
    return ranges.normalise(rows)


def _batches(present: Extents, chunk: int, size: int) -> Iterator[Batch]:
    """Cut ranges into batches of at most `size` bytes, without ever holding a list of all chunks."""
    for piece in ranges.pieces(present, max(1, size // chunk) * chunk, _BATCH_RANGES):
        yield Batch(piece, ranges.numbers(piece, chunk))
