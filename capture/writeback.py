"""Write-back: dirty pages go into the store in the background, so that a capture finds little left to do.

What is stored ahead belongs to a generation in the making (`capture.making`), which the next capture goes on with. It
may be given up at any time, for a prune that waits, a baseline that changed, an error: that costs work and never a
page, since the trackers still know all that was collected since the last generation; and after a crash the journal, in
which `begin_collect` stands before the first bit is cleared, has the next generation look at everything.

Only regions whose writes are followed, that have a baseline, and whose bits may be cleared while the guest runs.
Plain calls in the repository's thread; short ones, since a capture waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from base import extents as ranges
from base.extents import EMPTY, Extents
from capture.heat import Heat
from capture.journal import Journal
from capture.making import Making
from capture.pace import Budget, Pace
from capture.sources import CapturedRegion, Source
from store.records import Generation
from store.repository import Repository

_BEGIN_ABOVE = 1 << 20
"""Dirty bytes below which nothing is begun: the next capture stores them in no time."""
_CHECK_SECONDS = 2.0
"""Between looks whether somebody who prunes waits for us."""
_VAIN_SHARE = 0.25
_VAIN_MIN = 64 << 20
"""Of the regions' bytes: so much may have been stored ahead and written again. More would fill the store with what no
generation has, where a guest writes the same memory again and again between two captures that are far apart."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next capture will be: its regions, the generation it follows, and by region what it begins from."""

    regions: Sequence[CapturedRegion]
    parent: Generation | None
    bases: Mapping[str, Generation]
    full: bool


@dataclass(slots=True)
class Standing:
    """How far it has come, in bytes and bytes a second. `reason`: why nothing is done; None if something is."""

    dirty_bytes: int = 0
    drain_rate: float = 0.0
    dirty_rate: float = 0.0
    stored_bytes: int = 0
    reason: str | None = None


class WriteBack:
    """Of one VM."""

    def __init__(self, repository: Repository, vm: str, budget: Budget) -> None:
        self._repository, self._vm = repository, vm
        self.pace = Pace(budget)
        self.standing = Standing()
        self._making: Making | None = None
        self._journal: Journal | None = None
        self._begun: set[str] = set()
        self._in_vain = 0
        self._heat: dict[str, Heat] = {}
        self._stored: dict[str, Extents] = {}  # since the last look
        self._ahead: dict[str, Extents] = {}  # and not written again
        self._looked_at = self._checked_at = 0.0

    def step(self, plan: Plan, journal: Journal) -> float:
        """Do a piece of work; gives the seconds to wait before the next one.

        Raises PerdureError: what was stored ahead is dropped then, whatever the error, and nothing else is lost.
        """
        regions = [each for each in plan.regions if self._can_be_drained(each, plan)]
        if not regions:
            self.drop()
            self.standing = Standing(reason=_reason(plan))
            return self.pace.look_seconds
        try:
            return self._step(plan, regions, journal)
        except BaseException:
            self.drop()
            raise

    def observe(self, plan: Plan) -> None:
        """Count what is dirty, where nothing is drained."""
        if self._making is None:
            self.standing.dirty_bytes = _dirty_bytes(plan.regions)

    def take(self) -> Making | None:
        """What was stored ahead: the caller's from now on."""
        making, self._making = self._making, None
        self._heat.clear()
        self._stored.clear()
        self._ahead.clear()
        self._begun.clear()
        self._in_vain = self.standing.stored_bytes = 0
        return making

    def drop(self) -> None:
        """Give up what was stored ahead."""
        making = self.take()
        if making is not None:
            making.close()

    def _can_be_drained(self, region: CapturedRegion, plan: Plan) -> bool:
        return region.tracker.kind != "scan" and not region.tracker.direct_io and region.name in plan.bases

    def _step(self, plan: Plan, regions: Sequence[CapturedRegion], journal: Journal) -> float:
        began, processor = time.monotonic(), time.process_time()
        making = self._still_serving(plan, journal, began)
        if making is None:
            dirty = self.standing.dirty_bytes = _dirty_bytes(regions)
            self.pace.drain_rate = self.standing.drain_rate = 0.0
            if dirty < _BEGIN_ABOVE:
                return self.pace.look_seconds
            making = self._making = Making(self._repository, self._vm, plan.parent, plan.bases, ahead=True)
            if not making.serves(plan.parent, plan.bases):  # something was forgotten: the next capture sees to it
                self.drop()
                return self.pace.look_seconds
            self._journal, self._looked_at = journal, 0.0
        names = {region.name for region in regions}
        if not names <= self._begun:
            journal.begin_collect(names)
            self._begun |= names
        sources = making.open(regions, full=plan.full)
        if began - self._looked_at >= self.pace.look_seconds:
            self._look(sources, began)
        tired = self._in_vain > max(_VAIN_MIN, _VAIN_SHARE * sum(region.length for region in regions))
        stored = 0 if tired else self._store(making, sources)
        self._account(sources)
        if tired:
            self.standing.reason = "resting until the next capture: what is stored ahead is written again"
        elapsed = time.monotonic() - began
        rest = self.pace.rest(stored, time.process_time() - processor, elapsed)
        until_look = max(0.0, self._looked_at + self.pace.look_seconds - began - elapsed)
        return rest if stored else until_look

    def _still_serving(self, plan: Plan, journal: Journal, now: float) -> Making | None:
        """What was stored ahead, unless it is of no use any more or in the way, or another QEMU's."""
        making = self._making
        if making is not None and not (journal is self._journal and making.begins_from(plan.parent, plan.bases)):
            self.drop()
        if self._making is not None and now - self._checked_at >= _CHECK_SECONDS:
            self._checked_at = now
            self._repository.refresh()
            if self._making.writer.in_the_way or not self._making.serves(plan.parent, plan.bases):
                self.drop()
        return self._making

    def _look(self, sources: Sequence[Source], now: float) -> None:
        fresh_bytes = stored_bytes = in_vain = 0
        for source in sources:
            name = source.region.name
            fresh = source.collect(running=True)
            stored = self._stored.pop(name, EMPTY)
            fresh_bytes += ranges.total(fresh)
            stored_bytes += ranges.total(stored)
            in_vain += ranges.total(ranges.intersect(stored, fresh))
            self._heat.setdefault(name, Heat()).look(fresh)
            ahead = self._ahead.get(name, EMPTY)
            self._ahead[name] = ranges.subtract(ahead, fresh)
            self._in_vain += ranges.total(ahead) - ranges.total(self._ahead[name])
        seconds = now - self._looked_at if self._looked_at else 0.0
        self.pace.looked(seconds, fresh_bytes, stored_bytes, in_vain)
        self._looked_at = now

    def _store(self, making: Making, sources: Sequence[Source]) -> int:
        room = self.pace.piece
        for source in sources:
            name = source.region.name
            cold = self._heat[name].coldest(source.pending, room) if len(source.pending) else EMPTY
            if len(cold):
                source.store_some(making.writer, cold)
                self._stored[name] = ranges.union(self._stored.get(name, EMPTY), cold)
                self._ahead[name] = ranges.union(self._ahead.get(name, EMPTY), cold)
                room -= ranges.total(cold)
        return self.pace.piece - room

    def _account(self, sources: Sequence[Source]) -> None:
        pending = sum(ranges.total(source.pending) for source in sources)
        ahead = sum(ranges.total(each) for each in self._ahead.values())
        self.standing = Standing(pending, self.pace.drain_rate, self.pace.dirty_rate, ahead)


def _dirty_bytes(regions: Sequence[CapturedRegion]) -> int:
    """All of a region where it is unknown what was written."""
    dirty = [each.tracker.peek().extents for each in regions]
    return sum(
        each.length if found is None else ranges.total(found) for each, found in zip(regions, dirty, strict=True)
    )


def _reason(plan: Plan) -> str:
    if any(each.tracker.direct_io for each in plan.regions):
        return "a disk has cache=none, and dirty pages are only collected while the guest stands still"
    if all(each.tracker.kind == "scan" for each in plan.regions):
        return "changes are found by scanning"
    return "there is no generation yet"
