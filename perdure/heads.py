"""What history goes on from when a VM goes back: the latest generation is always the one that the VM descends from.

Blocking calls of the repository's thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from base import extents as ranges
from base.extents import Extents
from restore.scrub import scrub
from store.records import Generation
from store.repository import Repository
from vm.memory import Memory


def again(repository: Repository, generation: Generation, more: Mapping[str, Any] | None = None) -> Generation:
    """A generation that equals an older one and follows it: history goes on from there. `more` metadata than it has.

    Disks go back with a full one only. Raises StorageError.
    """
    with repository.writer(generation.vm, generation) as writer:
        for region in generation.regions.values():
            if region.kind == "disk" and not generation.full:
                continue
            writer.region(
                region.name,
                region.kind,
                region.root.length,
                chunk_size=region.root.chunk_size,
                kept_bytes=region.kept_bytes,
            )
        return writer.commit("rollback", metadata={**generation.metadata, **(more or {})})


def kept_of(repository: Repository, generation: Generation, cause: str) -> Generation:
    """A generation that follows a full one and has what of it survives a boot. Raises StorageError."""
    with repository.writer(generation.vm, generation) as writer:
        for region in generation.regions.values():
            kept = _kept(generation, region.name)
            if kept is not None:
                length = region.root.length
                draft = writer.region(region.name, region.kind, length, kept_bytes=ranges.total(kept))
                writer.clear(draft, ranges.subtract(ranges.normalise([(0, length)]), kept))
        metadata = {name: value for name, value in generation.metadata.items() if name != "devices"}
        return writer.commit(cause, metadata=metadata)


def _kept(generation: Generation, region: str) -> Extents | None:
    """What of a region survives a reboot; None for what is no persistent memory."""
    rows = generation.metadata.get("kept", {}).get(region)
    return None if rows is None else ranges.normalise([(start, end) for start, end in rows])


def scrub_to_kept(memory: Memory, generation: Generation) -> None:
    """A full generation has all of its persistent memory, of which a boot gets what it would find after a reboot.

    Blocking; for memory that no guest uses yet. Raises StorageError, IntegrityError.
    """
    for name, file in memory.files.items():
        kept = _kept(generation, name)
        if kept is not None:
            descriptor = file.open()
            try:
                scrub(descriptor, str(file.path), ranges.subtract(ranges.normalise([(0, file.size)]), kept))
            finally:
                os.close(descriptor)
