"""A repository: opening it, what is in it, and who may use what.

An open repository is a ledger (store.ledger) with what reads and writes chunks around it. One per process and path;
belongs to one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import lmdb

from base import extents as ranges
from base.disk import Disk
from base.errors import (
    ConflictError,
    FormatVersionError,
    IntegrityError,
    LockedError,
    NotFoundError,
    PerdureError,
    StorageError,
    UsageError,
)
from base.extents import Extents
from base.progress import Progress, silent
from base.workers import WorkerPool
from store import format as layout
from store import leases, pagemap
from store.catalog import DamagedPack
from store.chunker import PackingSettings
from store.creation import read_mark
from store.index.environment import LOCK_WAIT_S
from store.keyring.keys import Keys
from store.lanes import WorkerLanes
from store.leases import Lease
from store.ledger import Ledger
from store.nodes import StoredNodes
from store.packs import FrameReader
from store.records import (
    Generation,
    GenesisBody,
    decode_record,
)
from store.retention.policy import Policy
from store.salvage import whole_again
from store.writer import GenerationWriter

_TIDY_SECONDS = 0.2
"""Merging of the index when a repository is closed."""


class Repository(Ledger):
    """An open repository, unlocked with `keys`; a context manager.

    `state` is this host's private folder for it (index and remembered history). `pool` (made with
    store.workers.serve, before this is opened) takes large work. `unlock` opens the newest keyring again after
    somebody has changed keys; without it, this stops where the first record of a newer epoch stands. `lock_wait_s`
    bounds every wait for other processes of this host (LockedError). Who reads waits for nobody, but for one who opens
    the index or fills it.
    """

    def __init__(
        self,
        path: Path,
        keys: Keys,
        state: Path,
        *,
        pool: WorkerPool | None = None,
        progress: Progress = silent,
        disk: Disk | None = None,
        unlock: Callable[[], Keys] | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        if read_mark(path) != keys.repository_id:
            raise IntegrityError(str(path / "config"), "belongs to another repository than the keys beside it")
        self.since = time.monotonic()
        """When it was unlocked, by the monotonic clock."""
        self.pool, self.state = pool, state
        self.leases = path / "leases"
        self.settings = PackingSettings()
        self._swept = False
        self.differences: dict[tuple[str, str], int] = {}
        """By ids of two generations, the bytes in which they differ: what store.retention.quotas has found out."""
        super().__init__(path, keys, state, disk=disk, unlock=unlock, lock_wait_s=lock_wait_s)
        try:
            self.frames = FrameReader(self.storage, self.keys, self.catalog)
            self.nodes = StoredNodes(self.environment, self.index, self.frames, self)
            self._history.check(self._remembered_hash)  # before anything newer is remembered
            self._read_settings()
            self.refresh(progress, wait=False)
            self._look_again_at_damaged()
            self._require_no_gap()
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close files and index."""
        try:
            with suppress(PerdureError):  # it only makes later look-ups faster
                self.tidy(_TIDY_SECONDS)
        finally:
            self._undo.close()

    def vms(self) -> list[str]:
        """Names of all VMs that have generations."""
        with self.environment.read() as txn:
            return self.catalog.vms(txn)

    def generations(self, vm: str) -> list[Generation]:
        """All generations of a VM, oldest first. Raises NotFoundError."""
        with self.environment.read() as txn:
            found = self.catalog.generations(txn, vm)
        if not found:
            raise NotFoundError(f"no VM {vm} in this repository")
        return found

    def latest(self, vm: str) -> Generation | None:
        """The newest generation of a VM, None if it has none."""
        with self.environment.read() as txn, suppress(NotFoundError):
            return self.catalog.latest(txn, vm)
        return None

    def newest_with(self, vm: str, regions: Collection[str]) -> dict[str, Generation]:
        """By region, the newest generation of a VM that has it; regions that none has are left out."""
        found: dict[str, Generation] = {}
        with self.environment.read() as txn:
            for generation in self.catalog.newest_first(txn, vm):
                found |= {name: generation for name in regions if name in generation.regions and name not in found}
                if len(found) == len(regions):
                    break
        return found

    def resolve(self, point: str) -> Generation:
        """A generation from `VM@N`, `VM@latest`, `VM@-1` or a prefix of its id. Raises UsageError, NotFoundError."""
        vm, at, which = point.rpartition("@")
        with self.environment.read() as txn:
            if not at:
                return self._by_prefix(txn, point)
            if which == "latest":
                return self.catalog.latest(txn, vm)
            if which.lstrip("-").isdigit() and which.count("-") <= 1:
                number = int(which)
                return self.catalog.generation(txn, vm, number) if number > 0 else self.catalog.latest(txn, vm, -number)
        raise UsageError(f"{point!r} is no point in time: write VM@7, VM@latest, VM@-1 or the beginning of an id")

    def changed(self, a: Generation | None, b: Generation, *, leased: bool = False) -> dict[str, Extents]:
        """Where two generations differ, in bytes by region; a region that one of them lacks counts as zero there.

        `leased`: the caller holds a lease from before that keeps what both stand on. Raises ConflictError where a
        region was kept in chunks of another size, NotFoundError, IntegrityError.
        """
        both = [each for each in (a, b) if each is not None]
        lease = None if leased else self.lease(leases.READER, f"difference to {b.name}", both)
        try:
            return self._changed(a, b)
        finally:
            if lease is not None:
                lease.release()

    def _changed(self, a: Generation | None, b: Generation) -> dict[str, Extents]:
        found: dict[str, Extents] = {}
        before = {} if a is None else a.regions
        for name in dict.fromkeys([*before, *b.regions]):
            roots = [regions[name].root for regions in (before, b.regions) if name in regions]
            size = roots[0].chunk_size
            if roots[-1].chunk_size != size:
                raise ConflictError(
                    f"region {name} has chunks of {size} and {roots[-1].chunk_size} bytes: not comparable"
                )
            empty = pagemap.Root(0, size, 0, layout.ZERO_ID)
            one, two = (regions[name].root if name in regions else empty for regions in (before, b.regions))
            found[name] = ranges.union(*(part * size for part in pagemap.diff(one, two, self.nodes, self.nodes)))
        return found

    def lease(
        self,
        role: str,
        purpose: str,
        generations: Sequence[Generation] = (),
        *,
        yields: bool = False,
        kept: bool = False,
    ) -> Lease | None:
        """A lease on what is there now, from before the first look-up; None where nothing can be written.

        `generations` are those that it stands on; `kept`: they may be forgotten by now, and somebody else's lease that
        ends later keeps what they need, if anything does. Raises NotFoundError for one that was forgotten otherwise;
        what `refresh` does.
        """
        lease = leases.take(
            self.leases,
            self.sequence,
            purpose,
            role=role,
            generations=[each.sequence for each in generations],
            yields=yields,
        )
        try:
            self.refresh(wait=role != leases.READER)  # who misses a pack looks again, and waits then
            for each in generations:
                if not kept and not self.has(each):
                    raise NotFoundError(f"generation {each.name} was forgotten")
            if lease is not None:
                lease.advance(self.sequence)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return lease

    def has(self, generation: Generation) -> bool:
        """Whether a generation is not forgotten, as far as this host has seen."""
        with self.environment.read() as txn:
            return self.catalog.has(txn, generation.id)

    def writer(
        self,
        vm: str,
        parent: Generation | None = None,
        bases: Mapping[str, Generation] | None = None,
        *,
        ahead: bool = False,
    ) -> GenerationWriter:
        """Begin a generation of a VM, from its parent's content if one is given, or that of another base, by region.
        `ahead`: long before it is committed, so whoever prunes is given way to.

        Raises NotFoundError if one of them was forgotten; what `refresh` does.
        """
        if not self._swept:  # once: 10 ms where there are 20,000 packs
            self.storage.remove_leftovers("packs")
            self._swept = True
        if not self._locked_out:
            try:
                self.renew_keys()
            except PerdureError:  # the keys at hand will do until somebody has written with newer ones
                self._locked_out = True
        return GenerationWriter(self, vm, parent, bases or {}, ahead=ahead)

    def damaged(self) -> list[DamagedPack]:
        """Packs that this host knows to be damaged or missing, and that were not repaired."""
        with self.environment.read() as txn:
            return self.catalog.damaged(txn)

    def unfit(self, parent: Generation | None) -> frozenset[str]:
        """Regions of a parent on which a new generation must not be built, since something of them is lost.

        As long as this host knows of damage that was not repaired, these are all: nobody knows what it hurts.
        """
        if parent is None:
            return frozenset()
        with self.environment.read() as txn:
            return frozenset(parent.regions if self.catalog.damaged(txn) else self.catalog.hurt(txn, parent))

    def worker_lanes(self) -> WorkerLanes:
        """Lanes in the processes of the pool."""
        assert self.pool is not None
        return WorkerLanes(self.pool, self.storage, self.keys.worker_material(), self.settings)

    def node_hasher(self, level: int) -> bytes:
        """Key of the ids of page-map nodes of a level."""
        return self.keys.id_key("node", level)

    def tidy(self, seconds: float) -> None:
        """Merge runs of the index for at most so long; for when there is nothing more urgent."""
        self.index.merge(seconds)

    def policies(self) -> dict[str | None, Policy]:
        """Policies by VM name; None for the one that holds for every VM that has none of its own."""
        with self.environment.read() as txn:
            return self.catalog.policies(txn)

    def policy(self, vm: str, *, whole: bool = False) -> Policy | None:
        """What holds for a VM: its own policy, else that for all; None if there is neither.

        `whole`: refuse one that a newer Perdure has made and that is not all understood (ConflictError).
        """
        with self.environment.read() as txn:
            return self.catalog.policy(txn, vm, whole=whole)

    def renew_keys(self) -> None:
        super().renew_keys()
        self.frames.renew(self.keys)

    def _look_again_at_damaged(self) -> None:
        """What was damaged may have been put back."""
        with self.environment.read() as txn:
            noted = self.catalog.damaged(txn)
        for each in noted:
            with suppress(IntegrityError, FormatVersionError, StorageError, LockedError):
                pack = whole_again(self.storage, self.keys, bytes.fromhex(each.pack_id), each.frame)
                with self.environment.write("noting a pack that was put back", 0) as txn:
                    self.catalog.heal_pack(txn, pack)

    def _read_settings(self) -> None:
        genesis = decode_record(self.keys, self._record_bytes(1), 1, layout.ZERO_ID).body
        if not isinstance(genesis, GenesisBody):
            raise IntegrityError(layout.record_name(1), "is not the beginning of a history")
        self.settings = PackingSettings(genesis.level, genesis.frame_bytes, genesis.pack_bytes)

    def _by_prefix(self, txn: lmdb.Transaction, prefix: str) -> Generation:
        text = prefix.lower()
        if len(text) < 4 or len(text) > 64 or any(each not in "0123456789abcdef" for each in text):
            raise UsageError(f"{prefix!r} is no point in time: write VM@7, VM@latest, VM@-1 or the beginning of an id")
        found = self.catalog.by_prefix(txn, text)
        if not found:
            raise NotFoundError(f"no generation has an id that begins with {prefix}")
        if len(found) > 1:
            raise UsageError(f"several generations have ids that begin with {prefix}: {found[0].name}, {found[1].name}")
        return found[0]
