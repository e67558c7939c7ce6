"""One region of a generation in the making: its open backing file, its draft, and what of it is still to be looked at.

Belongs to the thread of the writer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from base import extents as ranges
from base import private
from base.extents import Extents
from base.progress import Progress, silent
from capture.trackers import Tracker
from store.records import Generation
from store.writer import GenerationWriter, RegionDraft
from vm.config import RAM
from vm.content import Place, open_content

_WINDOW = 32 << 20
"""Bytes of memory that no file shows which are copied at a time."""
_READ_ANYWAY = 64 << 10
"""Ranges up to so many bytes are copied without looking for holes."""


@dataclass(frozen=True, slots=True)
class CapturedRegion:
    """A region as a capture sees it: where its bytes are, and what of it goes into the generation,
    `kept` (over a reboot) or, in a full generation, all of it.

    `base` is the generation that the tracker's baseline is, None while it has none: then all is looked at.
    """

    name: str
    kind: str
    place: Place
    length: int
    kept: Extents
    tracker: Tracker
    base: Generation | None = None


class Source:
    """One region of one capture: its open file, its draft, and what is still to be looked at."""

    def __init__(self, region: CapturedRegion, draft: RegionDraft, content: Extents, pending: Extents) -> None:
        self.region, self.draft, self.content, self.pending = region, draft, content, pending
        self._asked = False
        self.memory = open_content(region.place)

    @classmethod
    def begin(
        cls, writer: GenerationWriter, region: CapturedRegion, base: Generation | None, *, known: bool, full: bool
    ) -> Source:
        """Begin a region: what is new in it since its base is to be looked at, what is not in it any more becomes zero.

        All is looked at where it is not `known` what changed since the base, and where something of that is lost:
        memory still has it. Raises StorageError.
        """
        content = _content(region, full=full)
        draft = writer.region(region.name, region.kind, region.length, kept_bytes=ranges.total(content))
        before = ranges.EMPTY if base is None else content_of(base, region.name)
        writer.clear(draft, ranges.subtract(before, content))
        pending = content if not known or draft.anew else ranges.subtract(content, before)
        return cls(region, draft, content, pending)

    def serves(self, region: CapturedRegion) -> bool:
        """Whether a capture of that region can go on from here: the same memory, followed by the same tracker."""
        ours = self.region
        return region.tracker is ours.tracker and (region.place, region.length) == (ours.place, ours.length)

    def go_on(self, writer: GenerationWriter, region: CapturedRegion, *, full: bool) -> None:
        """As it is to be captured now: what belongs to it may be something else than when it was begun."""
        content = _content(region, full=full)
        writer.clear(self.draft, ranges.subtract(self.content, content))
        self.pending = ranges.union(ranges.intersect(self.pending, content), ranges.subtract(content, self.content))
        self.draft.kept_bytes = ranges.total(content)
        self.region, self.content = region, content

    def close(self) -> None:
        self.memory.close()

    def collect(self, *, running: bool) -> Extents:
        """Ask the tracker; the first time all since the baseline is pending, later what came since. Gives that."""
        found = self.region.tracker.collect(running=running, known=self.content)
        changed = found.fresh if self._asked else found.extents
        changed = self.content if changed is None else ranges.intersect(changed, self.content)
        self._asked = True
        self.pending = ranges.union(self.pending, changed)
        return changed

    def store(self, writer: GenerationWriter, progress: Progress) -> None:
        """Put what is pending into packs, from where it lies."""
        self._put(writer, self.pending, progress)
        self.pending = ranges.EMPTY

    def store_some(self, writer: GenerationWriter, extents: Extents) -> None:
        """Put some of what is pending into packs, from where it lies."""
        self._put(writer, extents, silent, here=True)
        self.pending = ranges.subtract(self.pending, extents)

    def _put(self, writer: GenerationWriter, extents: Extents, progress: Progress, *, here: bool = False) -> None:
        """From where it lies, if that is a file; else by way of copies, a window at a time."""
        if self.memory.descriptor is not None:
            writer.replace(self.draft, self.memory.descriptor, extents, progress, here=here)
            return
        present = self.present_of(extents)
        writer.clear(self.draft, ranges.subtract(extents, present))
        done, total = 0, ranges.total(present)
        for window in ranges.pieces(present, _WINDOW):
            name, length = self.region.name, self.region.length
            descriptor = private.file(name, length)
            try:
                with private.mapped(name, descriptor, length) as copy, memoryview(copy) as view:
                    for start, end in window.tolist():
                        self.memory.read_into(view[start:end], start)
                writer.replace(self.draft, descriptor, window, here=here)
            finally:
                os.close(descriptor)
            done += ranges.total(window)
            progress(self.region.name, done, total)

    def store_from(self, writer: GenerationWriter, copy: int) -> None:
        """Put what is pending into packs, from a copy of it at the same offsets of another file."""
        writer.replace(self.draft, copy, self.pending)
        self.pending = ranges.EMPTY

    @property
    def followed(self) -> bool:
        """Whether its tracker knows what was written; else all that is resident is looked at."""
        return self.region.tracker.kind != "scan"

    @property
    def present(self) -> Extents:
        """What of the pending ranges is no hole, or so small that looking costs more than reading zeros."""
        return self.present_of(self.pending)

    def present_of(self, extents: Extents) -> Extents:
        """The same of any ranges."""
        small = extents[:, 1] - extents[:, 0] <= _READ_ANYWAY
        found = [extents[small]]
        for start, end in extents[~small].tolist():
            found.append(self.memory.resident(min(end, self.region.length), start))
        return ranges.normalise(np.concatenate(found))

    @property
    def resident_bytes(self) -> int:
        """Bytes of `present`."""
        return ranges.total(self.present)


def content_of(generation: Generation, name: str) -> Extents:
    """What of a region a generation has."""
    region = generation.regions.get(name)
    if region is None:
        return ranges.EMPTY
    if generation.full or name == RAM:
        return ranges.normalise([(0, region.root.length)])
    return ranges.normalise([(start, end) for start, end in generation.metadata.get("kept", {}).get(name, [])])


def _content(region: CapturedRegion, *, full: bool) -> Extents:
    """What of a region goes into a generation."""
    return ranges.normalise([(0, region.length)]) if full else region.kept
