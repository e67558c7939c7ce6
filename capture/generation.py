"""Making a generation of a VM, running or held, by its trackers' dirty pages, with a short pause.

Order for a running VM whose dirty pages are tracked: most of the dirty pages go into packs while the guest runs
(they may be torn: whatever is written again is dirty again); then the guest stops, the trackers are read once more,
the last dirty pages are copied into private memory, and the guest goes on; hashing, compressing and the commit
follow. Without tracking, everything resident is stored while the guest runs and hashed once more while it is
stopped. A held VM (at a reboot) does not change: its pages are read where they lie.

A full generation has the state of the devices too, saved by QEMU in the same pause, into private memory; the disks,
whose instant QEMU keeps from then on, so that they are read while the guest writes on; and main memory, which other
generations leave out: each region is compared with the generation that its tracker is relative
to, its `base`, and that of main memory is the last full one.

The journal says that bits are being cleared before they are: whatever interrupts a capture after that, the next
one looks at everything. Plain calls; one thread at a time.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from base import extents as ranges
from base.errors import IntegrityError, StorageError
from base.extents import Extents
from base.progress import Progress, silent
from capture.disks import DiskRead, Disks, recorded, store_disks
from capture.journal import Journal
from capture.trackers import Tracker
from store.records import Generation
from store.repository import Repository
from store.writer import GenerationWriter, RegionDraft
from vm.config import DEVICES, RAM

_PRIVATE_COPY_MAX = 256 << 20
"""Bytes of last dirty pages that are copied; more are stored while the guest stands still, which bounds memory."""
_DRAIN_ABOVE = 4 << 20
"""Dirty bytes above which a round of storing while the guest runs makes the pause shorter."""
_DRAIN_ROUNDS = 4
"""Rounds at most: a guest that writes faster than we store has its last dirty pages copied in the pause."""


@dataclass(frozen=True, slots=True)
class CapturedRegion:
    """A region as a capture sees it: its backing file (offsets are the region's), and what of it goes into the
    generation, `kept` (over a reboot) or, in a full generation, all of it.

    `base` is the generation that the tracker's baseline is, None while it has none: then all is looked at.
    """

    name: str
    kind: str
    path: Path
    length: int
    kept: Extents
    tracker: Tracker
    base: Generation | None = None


class Execution(Protocol):
    """Stops and continues the guest; both return when it is so. The others are for full generations."""

    def prepare(self) -> None:
        """What `device_state` needs and can be done before `stop`."""

    def stop(self) -> None: ...

    def device_state(self) -> int:
        """The stopped guest's, in a memory file without a name that the caller closes."""

    def cont(self) -> None: ...

    def take_back(self) -> None:
        """Undo `prepare`; after `cont`."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A generation that was made. `changed`: where each region differs from the parent; `seconds` to the commit;
    `forgotten`: generations that the guest had caused, to stay within the VM's quota; `disks`: how each was captured.
    """

    generation: Generation
    changed: dict[str, Extents]
    seconds: float
    forgotten: tuple[Generation, ...] = ()
    disks: dict[str, DiskRead] = field(default_factory=dict)


class _Source:
    """One region of one capture: its open file, its draft, and what is still to be looked at."""

    def __init__(self, region: CapturedRegion, draft: RegionDraft, content: Extents, pending: Extents) -> None:
        self.region, self.draft, self.content, self.pending = region, draft, content, pending
        self._asked = False
        try:
            self.descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError.from_os(error, str(region.path), "open") from error

    def close(self) -> None:
        os.close(self.descriptor)

    def collect(self, *, running: bool) -> None:
        """Ask the tracker; the first time all since the baseline is pending, later what came since."""
        found = self.region.tracker.collect(running=running, known=self.content)
        changed = found.fresh if self._asked else found.extents
        changed = self.content if changed is None else ranges.intersect(changed, self.content)
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
    full: bool = False,
    disks: Disks | None = None,
    tags: tuple[str, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Captured:
    """Make one generation. `execution` None: the guest is held and stays so. `parent`: the generation that this one
    follows, None if there is none. `full`: with all of the `regions`, which have main memory among them, and the state
    of the devices; not of a held guest. `disks` are captured as of the same instant.

    Raises StorageError, IntegrityError, WorkerError, VirtualMachineError: nothing was committed, the guest runs on.
    """
    began = time.monotonic()
    repository.refresh()
    if parent is not None and not repository.has(parent):
        parent = None  # forgotten meanwhile: nothing is known of what there is, so all of it is looked at
    with ExitStack() as stack:
        bases = {each.name: each.base for each in regions if each.base is not None and repository.has(each.base)}
        for disk in disks.captured if disks is not None else ():
            if disk.base is not None and repository.has(disk.base):
                bases[disk.region] = disk.base
        writer = stack.enter_context(repository.writer(vm, parent, bases))
        sources = []
        for region in regions:
            known = region.name in bases
            base = bases.get(region.name, parent)
            sources.append(_open(stack, writer, region, base, known=known, full=full))
        journal.begin_collect(region.name for region in regions)
        facts = {**(metadata or {}), "kept": _kept(regions)}
        read: dict[str, DiskRead] = {}
        with ExitStack() as frozen:
            if disks is not None:
                frozen.callback(disks.release)
            if execution is None:
                assert not full
                pause_ms = None
                _store_held(sources, writer, disks, progress)
            else:
                _store_while_running(sources, writer, progress)
                pause_ms = _pause(sources, writer, execution, disks, stack, full=full)
            if disks is not None:
                read = store_disks(writer, disks, bases, progress)
                facts |= recorded(disks.captured, read)
        generation = writer.commit(cause, tags=tags, metadata=facts, pause_ms=pause_ms)
        for region in regions:
            region.tracker.committed()
        journal.committed(generation.id, [region.name for region in regions])
        seconds = time.monotonic() - began
        # Inside the writer's lease: all that both stand on is there, also if somebody forgets them now.
        changed = _changed(repository, parent, generation)
    return Captured(generation, changed, seconds, tuple(writer.forgotten), read)


def _changed(repository: Repository, parent: Generation | None, generation: Generation) -> dict[str, Extents]:
    """Where they differ; everything, where the parent has lost what would say so."""
    try:
        return repository.changed(parent, generation, leased=True)
    except IntegrityError:
        return repository.changed(None, generation, leased=True)


def _open(
    stack: ExitStack,
    writer: GenerationWriter,
    region: CapturedRegion,
    base: Generation | None,
    *,
    known: bool,
    full: bool,
) -> _Source:
    """Begin a region: what is new in it since its base is to be looked at, what is not in it any more becomes zero.

    All is looked at where it is not `known` what changed since the base, and where something of that is lost: memory
    still has it.
    """
    everything = ranges.normalise([(0, region.length)])
    content = everything if full else region.kept
    draft = writer.region(region.name, region.kind, region.length, kept_bytes=ranges.total(content))
    before = ranges.EMPTY if base is None else _content(base, region.name)
    writer.clear(draft, ranges.subtract(before, content))
    pending = content if not known or draft.anew else ranges.subtract(content, before)
    source = _Source(region, draft, content, pending)
    stack.callback(source.close)
    return source


def _content(generation: Generation, name: str) -> Extents:
    """What of a region a generation has."""
    region = generation.regions.get(name)
    if region is None:
        return ranges.EMPTY
    if generation.full:
        return ranges.normalise([(0, region.root.length)])
    return ranges.normalise([(start, end) for start, end in generation.metadata.get("kept", {}).get(name, [])])


def _store_held(sources: Sequence[_Source], writer: GenerationWriter, disks: Disks | None, progress: Progress) -> None:
    """The guest stands still: all is read where it lies."""
    if disks is not None:
        disks.prepare()
        disks.freeze()
    for source in sources:
        source.collect(running=False)
        source.store(writer, progress)


def _store_while_running(sources: Sequence[_Source], writer: GenerationWriter, progress: Progress) -> None:
    """Rounds before the pause. What is written meanwhile is found again in the pause: as dirty where writes are
    tracked, by a second look at everything where they are not. Where bits must not be cleared under a running guest
    (O_DIRECT), there is no such round: what is dirty is not known."""
    for source in sources:
        tracker = source.region.tracker
        for _ in range(1 if tracker.kind == "scan" or tracker.direct_io else _DRAIN_ROUNDS):
            if tracker.kind == "scan" or not tracker.direct_io:
                source.collect(running=True)
            if ranges.total(source.pending) <= _DRAIN_ABOVE:
                break
            source.store(writer, progress)


def _pause(
    sources: Sequence[_Source],
    writer: GenerationWriter,
    execution: Execution,
    disks: Disks | None,
    stack: ExitStack,
    *,
    full: bool,
) -> float:
    """Stop, save the devices, collect, copy what is dirty (or store it at once), continue; then store the copies.

    The devices come first, so that what QEMU might write into memory for it is in the generation. Gives how long the
    guest was stopped, in milliseconds.
    """
    copies: list[tuple[_Source, int]] = []
    devices: int | None = None
    with ExitStack() as around:
        if full:
            execution.prepare()
            around.callback(execution.take_back)
        if disks is not None:
            disks.prepare()
        began = time.monotonic()
        execution.stop()
        try:
            if full:
                devices = execution.device_state()
                stack.callback(os.close, devices)
            if disks is not None:
                disks.freeze()
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
    if devices is not None:
        writer.replace(writer.region(DEVICES, DEVICES, os.fstat(devices).st_size), devices)
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
    """What of each region survives a reboot, also where more of it is in the generation."""
    return {region.name: region.kept.tolist() for region in regions if region.name != RAM}
