"""What a rollback would change: `perdure rollback --dry-run`. Reads, and changes nothing."""

from __future__ import annotations

from typing import Any

from base import extents as ranges
from base.errors import ConflictError
from perdure import documents
from perdure.disks.state import disks_of
from perdure.supervision.machine import Machine
from perdure.supervision.preparing import Preparation
from perdure.supervision.rollback import Rollback, require_sense, risk
from store.records import Generation
from store.repository import Repository


def preview(
    preparation: Preparation,
    repository: Repository,
    generation: Generation,
    wanted: Rollback,
    machine: Machine,
    *,
    held: bool,
) -> dict[str, Any]:
    """Blocking. All that stops a rollback before it begins is raised here too; a mix needs no force.

    Compared is the newest generation that the VM descends from: what the guest has written since comes on top, and is
    captured first.
    """
    forced = Rollback(wanted.point, wanted.discard, wanted.boot, wanted.memory_only, wanted.disks, force=True)
    require_sense(generation, forced)
    _, _, warnings = preparation.fitting(generation, boot=wanted.boot)
    resumes = generation.full and not wanted.boot
    first = None if wanted.discard else "full" if resumes or wanted.disks else "kept"
    if first == "full" and held:
        raise ConflictError(f"VM {generation.vm} is held and cannot be captured in full: --discard does without")
    names = _disks(generation, wanted) if resumes or wanted.disks else ()
    regions = () if wanted.disks else _regions(generation, resumes=resumes)
    since = machine.parent if machine.parent is not None and repository.has(machine.parent) else None
    changed = {} if since is None else repository.changed(since, generation)

    def changed_bytes(name: str) -> int | None:
        return None if since is None or name not in since.regions else ranges.total(changed[name])

    disks = preparation.local.disks.preview(repository, generation, names)
    return {
        **documents.point(generation),
        "dry_run": True,
        "resumes": resumes,
        "captured_first": first,
        "compared_with": None if since is None else since.name,
        "regions": [
            {
                "name": name,
                "bytes": generation.regions[name].kept_bytes,
                "changed_bytes": changed_bytes(name),
            }
            for name in regions
        ],
        "disks": [each | {"changed_bytes": changed_bytes(f"disk:{each['disk']}")} for each in disks],
        "warnings": [*warnings, *([risk(generation, wanted)] if wanted.mixes else [])],
    }


def _disks(generation: Generation, wanted: Rollback) -> tuple[str, ...]:
    return () if wanted.memory_only else wanted.disks or tuple(disks_of(generation))


def _regions(generation: Generation, *, resumes: bool) -> tuple[str, ...]:
    kinds = ("pmem", "ram", "device") if resumes else ("pmem",)
    return tuple(name for name, region in generation.regions.items() if region.kind in kinds)
