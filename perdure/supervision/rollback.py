"""Going back: what a rollback does to the VM that runs, in which order, so that an error on the way changes nothing.

Memory is restored and verified beside the old one, the VM is captured, history gets its new head (and the disks their
images with it), the old QEMU ends, the new one is launched. A mix of instants, memory of one with disks of another,
is only made by force: a guest has caches of its disks in its memory.

Part of the supervisor: everything runs in its loop, under its lock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.errors import ConflictError, NotFoundError, PerdureError, UsageError, one_line
from base.progress import Progress
from capture.generation import Captured
from perdure.disks.state import disks_of
from perdure.supervision import lazily
from perdure.supervision.heads import Mixed
from perdure.supervision.machine import Machine
from perdure.supervision.preparing import Prepared
from store.records import Generation

if TYPE_CHECKING:
    from perdure.supervision.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Rollback:
    """What is wanted. `memory_only`: the disks stay as they are; `disks`: only these go back, and the rest stays.
    `lazy`: memory comes as it is touched; None: where that suits."""

    point: str
    discard: bool = False
    boot: bool = False
    memory_only: bool = False
    disks: tuple[str, ...] = ()
    force: bool = False
    lazy: bool | None = None

    @property
    def mixes(self) -> bool:
        """Whether memory and disks will be of different instants."""
        return self.memory_only or bool(self.disks)


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What was done: the generation gone back to, the one that history goes on from, what was captured before, and
    whether memory comes as it is touched."""

    generation: Generation
    head: Generation
    captured: Captured | None
    lazy: bool


def require_sense(generation: Generation, wanted: Rollback) -> None:
    """Raises UsageError, ConflictError, NotFoundError for what cannot be done, or only by force."""
    if not wanted.mixes:
        return
    if wanted.memory_only and wanted.disks:
        raise UsageError("--memory-only and --disk exclude each other")
    if wanted.discard or wanted.boot:
        raise UsageError("--memory-only and --disk go on from what is captured now: not with --discard or --boot")
    if wanted.memory_only and not generation.full:
        raise ConflictError(f"{generation.name} is not full: without --memory-only the VM boots with its memory")
    for name in wanted.disks:
        if name not in disks_of(generation):
            has = ", ".join(disks_of(generation)) or "none"
            raise NotFoundError(f"{generation.name} has no disk {name}: it has {has}")
    if not wanted.force:
        raise ConflictError(f"{risk(generation, wanted)}: --force does it all the same")


def risk(generation: Generation, wanted: Rollback) -> str:
    """What may break by a mix, in words."""
    if wanted.memory_only:
        return (
            f"memory would be of {generation.name} and disks of now: what the guest has cached of its file systems is "
            "older than what they hold, and what it writes next may destroy them"
        )
    return (
        f"disk {', '.join(wanted.disks)} would be of {generation.name} and memory of now: what the guest has cached of "
        "its file systems is newer than what they hold, and what it writes next may destroy them, unless they are not "
        "mounted"
    )


async def carry_out(supervisor: Supervisor, wanted: Rollback, progress: Progress) -> RolledBack:
    """Go back. Until the old QEMU is ended, any error leaves the guest as it was."""
    with supervisor.capturing.tidying_later():
        return await _carry_out(supervisor, wanted, progress)


async def _carry_out(supervisor: Supervisor, wanted: Rollback, progress: Progress) -> RolledBack:
    machine = supervisor.machine
    generation = await supervisor.in_store(lambda: supervisor.own(wanted.point))
    require_sense(generation, wanted)
    prepared: Prepared | None = None
    captured: Captured | None = None
    try:
        if wanted.disks:  # memory goes on from what is captured now
            captured = await _capture(supervisor, machine, full=True)
        if wanted.discard:  # nor would the old memory be given back while what stores it ahead has it open
            await supervisor.draining.drop()
        source = generation if captured is None else captured.generation
        prepared = made = await supervisor.in_store(
            lambda: supervisor.preparation.prepare(
                supervisor.repository, source, progress, machine.memory, boot=wanted.boot, lazy=wanted.lazy
            )
        )
        if captured is None and not wanted.discard:
            captured = await _capture(supervisor, machine, full=made.devices is not None)
        if not (wanted.discard and machine.waits_for_memory):  # nor would it answer
            await machine.stop()
        mixed = _mixed(generation, wanted, captured)
        drops = wanted.discard or (captured is not None and captured.generation.full)
        head = await supervisor.in_store(
            lambda: supervisor.preparation.go_on_from(
                supervisor.repository, made, supervisor.tell, drop_disks=drops, mixed=mixed
            )
        )
    except BaseException:
        try:
            if machine.monitor.stopped:
                await supervisor.go_on(machine)
        finally:
            if prepared is not None:
                await supervisor.discard(prepared)
        raise
    supervisor.state = "rolling back"
    await supervisor.end_machine(machine)
    may_end = asyncio.Event()

    async def end() -> None:
        await may_end.wait()
        await machine.ended()  # which takes as long as its memory is large

    async def give_back() -> None:
        may_end.set()
        await asyncio.wait([ending])

    ending = asyncio.create_task(end())
    try:
        if head.lazy is None:  # else there is room for what is touched meanwhile
            await give_back()
        following, head = await lazily.launch(supervisor, head, after=machine.pid, give_back=give_back)
        await supervisor.follow(following)
    except BaseException as error:  # there is no VM any more: the next run launches it from `head`
        await give_back()
        supervisor.say(_left_with(supervisor.vm, head, captured))
        supervisor.fail(error)
        raise
    await give_back()
    try:
        await ending
    except PerdureError as error:  # memory that is lost to the host until somebody unmounts it
        supervisor.say(f"{supervisor.vm}: {one_line(error)}")
    what = f"disk {', '.join(wanted.disks)} of {generation.name}" if wanted.disks else generation.name
    supervisor.say(f"rolled back to {what}: {head.summary}")
    return RolledBack(generation, head.parent or generation, captured, head.lazy is not None)


async def _capture(supervisor: Supervisor, machine: Machine, *, full: bool) -> Captured:
    if full:
        if supervisor.state == "held":
            raise ConflictError(f"VM {supervisor.vm} is held and cannot be captured in full: --discard does without")
        await machine.require_full()
    return await supervisor.capturing.before_rollback(machine, full=full)


def _left_with(vm: str, head: Prepared, captured: Captured | None) -> str:
    """What there is when a rollback has failed after the old QEMU's end."""
    kept = "was not captured before" if captured is None else f"was captured before, as {captured.generation.name}"
    return (
        f"{vm} does not run: it {kept}; the next `perdure run` goes on from "
        f"{'nothing' if head.parent is None else head.parent.name}, or with --from from another generation"
    )


def _mixed(generation: Generation, wanted: Rollback, captured: Captured | None) -> Mixed | None:
    if not wanted.mixes:
        return None
    assert captured is not None
    now = captured.generation
    return Mixed(
        memory=generation if wanted.memory_only else now,
        disks={name: generation if name in wanted.disks else now for name in disks_of(now)},
        back=generation,
        names=wanted.disks,
    )
