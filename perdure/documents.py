"""What commands say of generations: JSON documents (a contract) and their text. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from base.units import format_size
from capture.disks import reads_of
from capture.pause import Limits, Stopped
from perdure.disks.texts import reads_text
from perdure.output import moment
from store.records import Generation


def point(generation: Generation) -> dict[str, Any]:
    """Which generation."""
    return {"vm": generation.vm, "generation": generation.number, "id": generation.id}


def made(generation: Generation, seconds: float, forgotten: Sequence[Generation] = ()) -> dict[str, Any]:
    """A generation that was just made; `seconds` from the unlocked repository to the commit. `forgotten` for it."""
    return {
        **point(generation),
        "region_bytes": generation.region_bytes,
        "dirty_bytes": generation.dirty_bytes,
        "stored_bytes": generation.stored_bytes,
        "pause_ms": generation.pause_ms,
        "full": generation.full,
        "quiesced": generation.metadata.get("quiesced"),
        "seconds": round(seconds, 6),
        "disks": reads_of(generation),
        "forgotten": [point(each) for each in forgotten],
    }


def made_text(generation: Generation, seconds: float, forgotten: Sequence[Generation] = ()) -> list[str]:
    """The same in one line, and one more if there are `forgotten` ones."""
    pause = "" if generation.pause_ms is None else f", paused {generation.pause_ms:.1f} ms"
    return [
        f"{generation.name} {generation.id[:12]}: {format_size(generation.region_bytes)} kept, "
        f"{format_size(generation.dirty_bytes)} changed, {format_size(generation.stored_bytes)} stored "
        f"in {seconds:.2f} s{pause}",
        *reads_text(reads_of(generation)),
        *forgotten_text(forgotten),
    ]


def forgotten_text(forgotten: Sequence[Generation]) -> list[str]:
    """What was forgotten so that a generation fits its VM's quota."""
    if not forgotten:
        return []
    return [f"forgotten to stay within the quota: {', '.join(each.name for each in forgotten)}"]


def over_limit(stopped: Stopped | None, limits: Limits) -> list[str]:
    """A pause that was longer than the policy wants, if it was."""
    if stopped is None or limits.pause_ms_max is None or stopped.longest_ms <= limits.pause_ms_max:
        return []
    return [
        f"stopped for {stopped.longest_ms:.0f} ms, and pause_ms_max is {limits.pause_ms_max}: after {stopped.rounds} "
        "rounds of storing while it ran, what was still dirty did not fit"
    ]


def generation(generation: Generation, *, full: bool = False) -> dict[str, Any]:
    """One generation; `full` adds packs and the VM's description."""
    document = {
        **point(generation),
        "parent": generation.parent,
        "time": generation.time,
        "cause": generation.cause,
        "host": generation.host,
        "tags": list(generation.tags),
        "protected": generation.protected,
        "hurt": generation.hurt,
        "full": generation.full,
        "quiesced": generation.metadata.get("quiesced"),
        "region_bytes": generation.region_bytes,
        "dirty_bytes": generation.dirty_bytes,
        "stored_bytes": generation.stored_bytes,
        "pause_ms": generation.pause_ms,
        "regions": [
            {
                "name": region.name,
                "kind": region.kind,
                "length": region.root.length,
                "kept_bytes": region.kept_bytes,
                "chunk_size": region.root.chunk_size,
                "root": region.root.id.hex(),
            }
            for region in generation.regions.values()
        ],
    }
    if full:
        document |= {
            "sequence": generation.sequence,
            "vm_id": generation.vm_id,
            "packs": list(generation.packs),
            "metadata": generation.metadata,
        }
    return document


def generation_text(generation: Generation) -> Iterator[str]:
    """One generation for people."""
    yield f"generation  {generation.name}"
    yield f"id          {generation.id}"
    yield f"parent      {generation.parent or '-'}"
    yield f"time        {moment(generation.time)} ({generation.cause}, on {generation.host})"
    if generation.tags:
        yield f"tags        {', '.join(generation.tags)}"
    if generation.full:
        yield "full        all memory and the state of the devices: it can be resumed"
    yield f"stored      {format_size(generation.stored_bytes)} in {len(generation.packs)} packs"
    if generation.pause_ms is not None:
        yield f"paused      {generation.pause_ms:.1f} ms"
    for region in generation.regions.values():
        yield (
            f"region      {region.name} ({region.kind}): {format_size(region.kept_bytes)} kept "
            f"of {format_size(region.root.length)}"
        )
    for name, lost in generation.hurt.items():
        yield f"hurt        {name}: {format_size(lost)} were lost, as the last repair found"
    for key, value in generation.metadata.items():
        yield from _fact_text(key, value)


def _fact_text(key: str, value: Any) -> Iterator[str]:
    """One fact of the VM's, whatever its shape: a line, or one for each part of it."""
    if key == "description":  # for copies of the VM
        return
    if key == "quiesced":
        yield f"quiesced    {value} file systems of the guest were frozen at the instant"
        return
    if key == "tags":  # of memory, not the words that a generation is tagged with
        for tag in value:
            place = f"{format_size(tag['size'])} at {tag['device']}+{tag['offset']:#x}"
            yield f"tagged      {tag.get('name') or '-'}: {place}, by {tag.get('owner') or '-'}"
    elif isinstance(value, dict):
        for name, part in value.items():
            yield f"{key:<11} {name}: {part}"
    else:
        yield f"{key:<11} {value}"
