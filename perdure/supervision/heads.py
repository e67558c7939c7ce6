"""What history goes on from when a VM goes back: the latest generation is always the one that the VM descends from.

A head equals its source by definition, also while the host knows of damage: nobody offers its content again, as a
capture does. It is as hurt as its source, which nobody has marked yet then; of one that is marked and not whole none is
made. Blocking calls of the repository's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from base import extents as ranges
from base.errors import PerdureError, one_line
from base.extents import Extents
from restore.scrub import scrub
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from store.writer import GenerationWriter, RegionDraft
from vm.config import DISK_PREFIX
from vm.memory import Memory

_CAUSES = ("rollback", "boot", "clone")


def again(repository: Repository, vm: str, generation: Generation, more: Mapping[str, Any] | None = None) -> Generation:
    """A generation that equals an older one and follows it: history goes on from there. `more` metadata than it has.

    Of another VM it is the first one, of a clone. Raises IntegrityError, StorageError.
    """
    with repository.writer(vm, generation) as writer:
        for region in generation.regions.values():
            if region.kind == "disk" and not generation.full:
                continue
            _same(repository, writer, generation, region.name)
        cause = "rollback" if vm == generation.vm else "clone"
        return writer.commit(cause, metadata={**generation.metadata, **(more or {})})


def take_back(repository: Repository, vm: str, before: Generation | None, say: Callable[[str], None]) -> None:
    """Forget a head that was made after `before`, which was the latest: the VM does not go on from it after all, and
    the next run must not. That it was done is said, or that it cannot be."""
    head = None
    try:
        repository.refresh()
        head = repository.latest(vm)
        if head is None or head.cause not in _CAUSES or (before is not None and head.number <= before.number):
            return
        repository.forget(head)
    except PerdureError as error:
        made = "a head of history that was just made" if head is None else head.name
        say(f"{vm} does not go on from {made}, which cannot be forgotten: {one_line(error)}")
        return
    say(f"{vm} does not go on from {head.name} after all, which is forgotten")


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a VM goes on from that has not all of one instant: memory and devices of one generation, of each disk the
    generation that it is of; those in `names` go `back` to one."""

    memory: Generation
    disks: dict[str, Generation]
    back: Generation
    names: tuple[str, ...]


def of_several(repository: Repository, mixed: Mixed, more: Mapping[str, Any] | None = None) -> Generation:
    """A generation that holds such a mix, and follows the one that its memory is of. Raises IntegrityError,
    StorageError."""
    memory = mixed.memory
    sources = {f"{DISK_PREFIX}{name}": generation for name, generation in mixed.disks.items()}
    sources |= {name: memory for name, region in memory.regions.items() if region.kind != "disk"}
    facts = {name: each.metadata.get("disks", {}).get(name) for name, each in mixed.disks.items()}
    with repository.writer(memory.vm, memory, sources) as writer:
        for name, source in sources.items():
            _same(repository, writer, source, name)
        known = {name: each for name, each in facts.items() if each is not None}
        return writer.commit("rollback", metadata={**memory.metadata, "disks": known, **(more or {})})


def kept_of(repository: Repository, vm: str, generation: Generation, cause: str) -> Generation:
    """A generation that follows a full one and has what of it survives a boot. Raises IntegrityError, StorageError."""
    with repository.writer(vm, generation) as writer:
        for region in generation.regions.values():
            kept = _kept(generation, region.name)
            if kept is not None:
                draft = _same(repository, writer, generation, region.name, kept_bytes=ranges.total(kept))
                writer.clear(draft, ranges.subtract(ranges.normalise([(0, region.root.length)]), kept))
        metadata = {name: value for name, value in generation.metadata.items() if name != "devices"}
        return writer.commit(cause, metadata=metadata)


def _same(
    repository: Repository, writer: GenerationWriter, source: Generation, name: str, *, kept_bytes: int | None = None
) -> RegionDraft:
    """Begin a region as its source has it, which must not be known to have lost something of it."""
    source = repository.resolve(source.id)  # marked, perhaps, since somebody looked it up
    if name in source.hurt:
        with GenerationReader(repository, source) as reader:
            reader.require_whole(source.regions[name])
    return writer.same(name, kept_bytes=kept_bytes)


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
