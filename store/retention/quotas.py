"""Quotas: what a VM stores, and whether one generation more is allowed.

What counts is worked out from the history alone, so that every host comes to the same figure. A listed generation
counts what was stored (packs added, compressed) since the listed one before it, since it may still need what
forgotten ones between them stored; but where there were such, at most the bytes in which it differs from the listed one
before. So
forgetting makes room at once, though prune gives back the disk's; and what other VMs have stored costs nothing.

While all that a VM has ever stored is within its quota, admission is two look-ups. Only beyond that are page maps
compared. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from base import extents as ranges
from base.errors import ConflictError, IntegrityError, QuotaError
from base.extents import Extents
from store import format as layout
from store import pagemap
from store.records import Generation
from store.retention.policy import Policy
from store.retention.rules import by_guest, plan

if TYPE_CHECKING:
    from store.repository import Repository


@dataclass(frozen=True, slots=True)
class WantedRegion:
    """A region of a generation that is about to be committed: what it began from, and the chunk numbers that were
    given other content since; None if that was not noted."""

    name: str
    base: pagemap.Root
    changed: Extents | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A generation that is about to be committed. Sizes in bytes, as in `Generation`."""

    vm: str
    cause: str
    tags: tuple[str, ...]
    stored_bytes: int
    kept_bytes: int
    regions: tuple[WantedRegion, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """What an admission rests on: if it is another at the commit, the admission is void."""

    policy: Policy | None
    stored: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A generation is allowed, once these have been forgotten: oldest first, none of them the operator's."""

    standing: Standing
    forget: tuple[Generation, ...]


class OvertakenError(Exception):
    """Another generation or policy of the VM came between admission and commit."""


def admit(repository: Repository, wanted: Wanted) -> Admission:
    """Whether a generation is allowed. Raises QuotaError where it is not, and nothing may be forgotten for it."""
    with repository.environment.read() as txn:
        found = repository.catalog.vm(txn, wanted.vm)
        standing = Standing(
            repository.catalog.policy(txn, wanted.vm), 0 if found is None else repository.catalog.stored(txn, found[0])
        )
    policy = standing.policy
    if policy is None or policy.quota is None or standing.stored + wanted.stored_bytes <= policy.quota:
        return Admission(standing, ())
    account = _Account(repository, wanted.vm)
    used, added = account.used, account.added(wanted)
    forgotten = []
    for each in _candidates(account.listed, policy, wanted):
        if account.used + account.added(wanted) <= policy.quota:
            break
        account.forget(each)
        forgotten.append(each)
    if account.used + account.added(wanted) > policy.quota:
        raise QuotaError(wanted.vm, policy.quota, used, added)
    return Admission(standing, tuple(forgotten))


def used_bytes(repository: Repository, vm: str) -> int:
    """What counts against a VM's quota now."""
    return _Account(repository, vm).used


class _Account:
    """What a VM's listed generations count, kept up to date while some of them are struck out."""

    def __init__(self, repository: Repository, vm: str) -> None:
        self._repository = repository
        with repository.environment.read() as txn:
            found = repository.catalog.vm(txn, vm)
            self.listed = repository.catalog.generations(txn, vm)
            vm_id, self._highest = found or (b"", 0)
            self._sums = {each.id: repository.catalog.stored(txn, vm_id, each.number) for each in self.listed}
            self._total = repository.catalog.stored(txn, vm_id) if found else 0
        self._before = dict(zip([each.id for each in self.listed], [None, *self.listed], strict=False))
        self._after = {before.id: each for each, before in zip(self.listed[1:], self.listed, strict=False)}
        self._last = self.listed[-1] if self.listed else None
        self.used = sum(
            self._counted(before, each) for before, each in zip([None, *self.listed], self.listed, strict=False)
        )

    def forget(self, gone: Generation) -> None:
        """Count as if it were forgotten."""
        before, after = self._before.pop(gone.id), self._after.pop(gone.id, None)
        self.used -= self._counted(before, gone)
        if before is not None and after is not None:
            self._after[before.id] = after
        elif before is not None:
            self._after.pop(before.id)
        if after is None:
            self._last = before
        else:
            self._before[after.id] = before
            self.used += self._counted(before, after) - self._counted(gone, after)

    def added(self, wanted: Wanted) -> int:
        """What a new generation would count, at most: its own page maps are not to be read yet."""
        since = self._total - (self._sums[self._last.id] if self._last else 0) + wanted.stored_bytes
        if self._highest == (self._last.number if self._last else 0):
            return since  # nothing was forgotten between them
        apart = [self._apart(each) for each in wanted.regions]
        return min(since, wanted.kept_bytes, *([] if None in apart else [sum(each or 0 for each in apart)]))

    def _apart(self, region: WantedRegion) -> int | None:
        """Bytes in which a region of a new generation may differ from that of the last listed one."""
        size, changed = region.base.chunk_size, region.changed
        last = self._last.regions.get(region.name) if self._last else None
        before = last.root if last else pagemap.Root(0, size, 0, layout.ZERO_ID)
        if changed is None or before.chunk_size != size:
            return None
        if before != region.base:
            nodes = self._repository.nodes
            try:
                changed = ranges.union(changed, *pagemap.diff(before, region.base, nodes, nodes))
            except IntegrityError:
                return None
        return ranges.total(changed) * size

    def _counted(self, before: Generation | None, each: Generation) -> int:
        since = self._sums[each.id] - (self._sums[before.id] if before else 0)
        if since == 0 or each.number == (before.number if before else 0) + 1:
            return since  # nothing was forgotten between them
        differs = _differing(self._repository, before, each)
        return since if differs is None else min(since, each.region_bytes, differs)


def _candidates(listed: Sequence[Generation], policy: Policy, wanted: Wanted) -> list[Generation]:
    """What may be forgotten for the new generation, oldest first: caused by the guest, kept by no rule."""
    new = Generation(
        vm=wanted.vm, vm_id="", number=0, id="", parent=None, sequence=1 << 62, time=datetime.now(UTC).isoformat(),
        cause=wanted.cause, host="", tags=wanted.tags, regions={}, packs=(), dirty_bytes=0, stored_bytes=0,
        pause_ms=None, metadata={},
    )  # fmt: skip
    verdicts = plan([*listed, new], policy, datetime.now(UTC))
    return [each.generation for each in reversed(verdicts) if not each.reasons and by_guest(each.generation.cause)]


def _differing(repository: Repository, a: Generation | None, b: Generation) -> int | None:
    """Bytes of chunks in which two generations differ; None where that cannot be said. Compared once in a process."""
    pair = "" if a is None else a.id, b.id
    count = repository.differences.get(pair)
    if count is None:
        count = _compared(repository, a, b)
        if count is not None:
            repository.differences[pair] = count
    return count


def _compared(repository: Repository, a: Generation | None, b: Generation) -> int | None:
    count = 0
    try:
        for name in {**(a.regions if a else {}), **b.regions}:
            roots = [each.regions[name].root for each in (a, b) if each is not None and name in each.regions]
            size = roots[-1].chunk_size
            if roots[0].chunk_size != size:
                return None
            empty = pagemap.Root(0, size, 0, layout.ZERO_ID)
            one, two = (
                each.regions[name].root if each is not None and name in each.regions else empty for each in (a, b)
            )
            for part in pagemap.diff(one, two, repository.nodes, repository.nodes):
                count += ranges.total(part) * size
    except (ConflictError, IntegrityError):  # damage is check's to find: here it only means that nothing is taken off
        return None
    return count
