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

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from base.errors import PerdureError, StorageError
from base.extents import Extents
from base.progress import Progress, silent
from capture.disks import DiskRead, Disks, recorded, store_disks
from capture.journal import Journal
from capture.making import Making
from capture.pause import Execution, Limits, PauseModel, Stopped, pause
from capture.sources import CapturedRegion, Source, content_of
from store.records import Generation
from store.repository import Repository
from store.writer import GenerationWriter
from vm.config import DEVICES, RAM


@dataclass(frozen=True, slots=True)
class Captured:
    """A generation that was made. `changed`: where each region differs from the parent; `seconds` to the commit;
    `forgotten`: generations that the guest had caused, to stay within the VM's quota; `disks`: how each was captured;
    `stopped`: how the guest was stopped for it.
    """

    generation: Generation
    changed: dict[str, Extents]
    seconds: float
    forgotten: tuple[Generation, ...] = ()
    disks: dict[str, DiskRead] = field(default_factory=dict)
    stopped: Stopped | None = None


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
    limits: Limits | None = None,
    pauses: PauseModel | None = None,
    making: Making | None = None,
    progress: Progress = silent,
) -> Captured:
    """Make one generation. `execution` None: the guest is held and stays so. `parent`: the generation that this one
    follows, None if there is none. `full`: with all of the `regions`, which have main memory among them, and the state
    of the devices; not of a held guest. `disks` are captured as of the same instant. `limits` of what a running guest
    may be stopped for; `pauses`: what is known of this VM's, and learns. `making`: what was stored ahead; it is
    used, if it still serves, and closed in any case.

    Raises StorageError, IntegrityError, WorkerError, VirtualMachineError, ConflictError (the limits cannot be kept):
    the guest runs on, and a next capture begins from the same bases. Nothing was committed, unless closing what it was
    made with failed.
    """
    began = time.monotonic()
    bases = {each.name: each.base for each in regions if each.base is not None}
    bases |= {each.region: each.base for each in (disks.captured if disks is not None else ()) if each.base is not None}
    if making is not None and not making.serves(parent, bases):
        making.close()
        making = None
    with ExitStack() as stack:
        making = stack.enter_context(making or Making(repository, vm, parent, bases))
        writer, parent, bases = making.writer, making.parent, making.bases
        sources = making.open(regions, full=full)
        journal.begin_collect(region.name for region in regions)
        facts = dict(metadata or {})
        read: dict[str, DiskRead] = {}
        with ExitStack() as frozen:
            if disks is not None:
                frozen.callback(disks.release)
            if execution is None:
                assert not full
                stopped = None
                _store_held(sources, writer, disks, progress)
            else:
                stopped = pause(
                    sources,
                    writer,
                    execution,
                    disks,
                    stack,
                    vm=vm,
                    full=full,
                    limits=limits or Limits(),
                    model=pauses or PauseModel(),
                    progress=progress,
                )
                facts |= execution.facts
                if stopped.devices is not None:
                    device = writer.region(DEVICES, DEVICES, os.fstat(stopped.devices).st_size)
                    writer.replace(device, stopped.devices)
            if disks is not None:
                read = store_disks(writer, disks, bases, progress)
                facts |= recorded(disks.captured, read)
        facts["kept"] = _kept([source.region for source in sources])
        generation = writer.commit(
            cause, tags=tags, metadata=facts, pause_ms=None if stopped is None else stopped.pause_ms
        )
        with suppress(StorageError):  # true all the same: it costs the next supervisor a scan
            journal.committed(generation.id, [region.name for region in regions])
        seconds = time.monotonic() - began
        # Inside the writer's lease: all that both stand on is there, also if somebody forgets them now.
        changed = _changed(repository, parent, generation)
    # Last of all: whoever gets an error from here goes on from the old bases, which trackers must not have left.
    for region in regions:
        region.tracker.committed()
    return Captured(generation, changed, seconds, tuple(writer.forgotten), read, stopped)


def _changed(repository: Repository, parent: Generation | None, generation: Generation) -> dict[str, Extents]:
    """Where they differ; everything, where what would say so is lost, or cannot be read just now."""
    try:
        return repository.changed(parent, generation, leased=True)
    except PerdureError:
        return {name: content_of(generation, name) for name in generation.regions}


def _store_held(sources: Sequence[Source], writer: GenerationWriter, disks: Disks | None, progress: Progress) -> None:
    """The guest stands still: all is read where it lies."""
    if disks is not None:
        disks.prepare()
        disks.freeze()
    for source in sources:
        source.collect(running=False)
        source.store(writer, progress)


def _kept(regions: Sequence[CapturedRegion]) -> dict[str, list[list[int]]]:
    """What of each region survives a reboot, also where more of it is in the generation."""
    return {region.name: region.kept.tolist() for region in regions if region.name != RAM}
