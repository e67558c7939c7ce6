"""Memory that a QEMU left when it died: captured, unless it is spare or nobody wants it, and given back."""

from __future__ import annotations

from pathlib import Path

from base.progress import Progress
from capture.generation import Captured, capture
from capture.sources import CapturedRegion
from capture.trackers import ScanTracker
from perdure.supervision.local import Local
from restore.lazy_fill import fill
from store.repository import Repository
from vm.identity import Identity
from vm.memory import Memory
from vm.regions import RegionTable


def salvage(local: Local, repository: Repository, progress: Progress) -> Captured | None:
    """Blocking: capture what a dead QEMU left in memory, then give that back. Raises what capture raises."""
    done = None
    for folder in local.memory_folders():
        if local.table(folder).exists() and not Memory.is_spare(folder):
            fill(repository, folder, [region.name for region in local.description.regions], progress)
            done = _capture(local, repository, folder, progress)
        local.release_memory(folder)
    return done


def drop(local: Local) -> None:
    """Blocking: give back what a dead QEMU left, without a look at it."""
    for folder in local.memory_folders():
        local.release_memory(folder)


def _capture(local: Local, repository: Repository, folder: Path, progress: Progress) -> Captured:
    """What a dead QEMU left: nobody writes it any more, and what was dirty is not known."""
    memory = local.existing_memory(folder)
    table = RegionTable.load(local.table(folder), local.name).regions
    regions = [
        CapturedRegion(
            region.name,
            "pmem",
            memory.files[region.name].path,
            int(region.size),
            table.kept(region.name),
            ScanTracker(),
        )
        for region in local.description.regions
    ]
    journal = local.journal(Identity(0, 0, ""))
    return capture(
        repository,
        local.name,
        regions,
        journal,
        None,
        cause="crash",
        parent=local.parent(repository),
        metadata={"tags": table.to_tags(), "measurements": local.measurements},
        progress=progress,
    )
