"""Making a generation of a VM, running or held, by its trackers' dirty pages, with a short pause.

Order for a running VM whose dirty pages are tracked: most of the dirty pages go into packs while the guest runs
(they may be torn: whatever is written again is dirty again); then the guest stops, the trackers are read once more,
the last dirty pages are copied into private memory, and the guest goes on; hashing, compressing and the commit
follow. Without tracking, everything resident is stored while the guest runs and hashed once more while it is
stopped. A held VM (at a reboot) does not change: its pages are read where they lie.

The journal says that bits are being cleared before they are: whatever interrupts a capture after that, the next
one looks at everything. Plain calls; one thread at a time.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from base import extents as ranges
from base.errors import StorageError
from base.extents import Extents
from base.progress import Progress, silent
from capture.journal import Journal
from capture.trackers import Tracker
from store.records import Generation
from store.repository import Repository
from store.writer import GenerationWriter, RegionDraft

_PRIVATE_COPY_MAX = 256 << 20
"""Bytes of last dirty pages that are copied; more are stored while the guest stands still, which bounds memory."""
_DRAIN_ABOVE = 4 << 20
"""Dirty bytes above which a round of storing while the guest runs makes the pause shorter."""


@dataclass(frozen=True, slots=True)
class CapturedRegion:
    """A region as a capture sees it: its backing file (offsets are the region's) and what of it is kept."""

    name: str
    kind: str
    path: Path
    length: int
    kept: Extents
    tracker: Tracker


class Execution(Protocol):
    """Stops and continues the guest; both return when it is so."""

    def stop(self) -> None: ...

    def cont(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Captured:
    """A generation that was made. `changed`: where each region differs from the parent; `seconds` to the commit;
    `forgotten`: generations that the guest had caused, to stay within the VM's quota."""

    generation: Generation
    changed: dict[str, Extents]
    seconds: float
    forgotten: tuple[Generation, ...] = ()


class _Source:
    """One region of one capture: its open file, its draft, and what is still to be looked at."""

    def __init__(self, region: CapturedRegion, draft: RegionDraft, pending: Extents) -> None:
        self.region, self.draft, self.pending = region, draft, pending
        self._asked = False
        try:
            self.descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError.from_os(error, str(region.path), "open") from error

    def close(self) -> None:
        os.close(self.descriptor)

    def collect(self, *, running: bool) -> None:
        """Ask the tracker; the first time all since the baseline is pending, later what came since."""
        found = self.region.tracker.collect(running=running, known=self.region.kept)
        changed = found.fresh if self._asked else found.extents
        changed = self.region.kept if changed is None else ranges.intersect(changed, self.region.kept)
        self._asked = True
        self.pending = ranges.union(self.pending, changed)

    def store(self, writer: GenerationWriter, progress: Progress) -> None:
        """Put what is pending into packs, from where it lies."""
        writer.replace(self.draft, self.descriptor, self.pending, progress)
        self.pending = ranges.EMPTY


def capture(
    repository: Repository,
    vm: str,
    regions: Sequence[CapturedRegion],
    journal: Journal,
    execution: Execution | None,
    *,
    cause: str,
    parent: Generation | None,
    tags: tuple[str, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Captured:
    """Make one generation. `execution` None: the guest is held and stays so. `parent`: the generation whose content
    the memory had when the trackers began, None if there is none.

    Raises StorageError, IntegrityError, WorkerError, VirtualMachineError: nothing was committed, the guest runs on.
    """
    began = time.monotonic()
    repository.refresh()
    if parent is not None and not repository.has(parent):
        parent = None  # forgotten meanwhile: nothing is known of what there is, so all of it is looked at
    with ExitStack() as stack:
        writer = stack.enter_context(repository.writer(vm, parent))
        sources = [_open(stack, writer, region, parent) for region in regions]
        journal.begin_collect()
        if execution is None:
            for source in sources:
                source.collect(running=False)
                source.store(writer, progress)
            pause_ms = None
        else:
            _store_while_running(sources, writer, progress)
            pause_ms = _pause(sources, writer, execution, stack)
        generation = writer.commit(
            cause, tags=tags, metadata={**(metadata or {}), "kept": _kept(regions)}, pause_ms=pause_ms
        )
        for region in regions:
            region.tracker.committed()
        journal.committed(generation.id)
        seconds = time.monotonic() - began
        # Inside the writer's lease: all that both stand on is there, also if somebody forgets them now.
        changed = repository.changed(parent, generation, leased=True)
    return Captured(generation, changed, seconds, tuple(writer.forgotten))


def _open(stack: ExitStack, writer: GenerationWriter, region: CapturedRegion, parent: Generation | None) -> _Source:
    """Begin a region: what was tagged since the parent is to be looked at, what was untagged becomes zero. Where the
    parent has lost something, all is looked at: memory still has it."""
    before = ranges.EMPTY
    if parent is not None and region.name in parent.regions:
        before = ranges.normalise([(start, end) for start, end in parent.metadata.get("kept", {}).get(region.name, [])])
    draft = writer.region(region.name, region.kind, region.length, kept_bytes=ranges.total(region.kept))
    writer.clear(draft, ranges.subtract(before, region.kept))
    source = _Source(region, draft, region.kept if draft.anew else ranges.subtract(region.kept, before))
    stack.callback(source.close)
    return source


def _store_while_running(sources: Sequence[_Source], writer: GenerationWriter, progress: Progress) -> None:
    """The round before the pause. What is written meanwhile is found again in the pause: as dirty where writes are
    tracked, by a second look at everything where they are not. Where bits must not be cleared under a running guest
    (O_DIRECT), there is no such round: what is dirty is not known."""
    for source in sources:
        tracker = source.region.tracker
        if tracker.kind == "scan" or not tracker.direct_io:
            source.collect(running=True)
        if ranges.total(source.pending) > _DRAIN_ABOVE:
            source.store(writer, progress)


def _pause(sources: Sequence[_Source], writer: GenerationWriter, execution: Execution, stack: ExitStack) -> float:
    """Stop, collect, copy what is dirty (or store it at once), continue; then store the copies.

    Gives how long the guest was stopped, in milliseconds.
    """
    copies: list[tuple[_Source, int]] = []
    began = time.monotonic()
    execution.stop()
    try:
        for source in sources:
            source.collect(running=False)
        for source in sources:
            if source.region.tracker.kind == "scan" or ranges.total(source.pending) > _PRIVATE_COPY_MAX:
                source.store(writer, silent)
            elif len(source.pending):
                copy = _private_copy(source)
                stack.callback(os.close, copy)
                copies.append((source, copy))
    finally:
        execution.cont()
    pause_ms = (time.monotonic() - began) * 1e3
    for source, copy in copies:
        writer.replace(source.draft, copy, source.pending)
        source.pending = ranges.EMPTY
    return pause_ms


def _private_copy(source: _Source) -> int:
    """A memory file that holds the pending pages at their offsets and is holes elsewhere; the caller closes it."""
    descriptor = os.memfd_create(f"perdure {source.region.name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, source.region.length)
        present = ranges.intersect(ranges.resident(source.descriptor, source.region.length), source.pending)
        with mmap.mmap(descriptor, source.region.length) as memory, memoryview(memory) as view:
            for start, end in present.tolist():
                at = start
                while at < end:
                    got = os.preadv(source.descriptor, [view[at:end]], at)
                    if not got:
                        break
                    at += got
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _kept(regions: Sequence[CapturedRegion]) -> dict[str, list[list[int]]]:
    return {region.name: region.kept.tolist() for region in regions}
