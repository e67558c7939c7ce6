"""Generations of one supervisor's VM: what is captured, how long the guest may stand still for it, and what follows.

Under the supervisor's lock; capture itself and the repository are used in the repository's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from base.errors import ConflictError, StorageError, explained, one_line
from base.progress import Progress
from capture.disks import reads_of
from capture.generation import Captured, capture
from capture.pause import Limits
from perdure import documents
from perdure.disks.texts import reads_text
from perdure.supervision import following, lazily
from perdure.supervision.execution import DiskInstant, Execution, settle_bitmaps
from perdure.supervision.forgetting import forget_by_policy
from perdure.supervision.machine import Machine
from perdure.supervision.quiescing import Instant, Mode, Quiescing

if TYPE_CHECKING:
    from perdure.supervision.supervisor import Supervisor

_TIDY_SECONDS = 0.2
"""Merging of the index after each capture, beside whatever the guest does."""


class Wanted(TypedDict, total=False):
    """What else may be said of a generation. `memory`: main memory is in it, also if it is not full."""

    memory: bool
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    progress: Progress


class Capturing:
    """Of one supervisor's VM. `quiescing` is what its guest answers when it is told to freeze its file systems."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        policy = supervisor.local.description.policy
        self._limits = Limits(policy.pause_ms_max, policy.rounds_max, policy.over_limit == "exceed")
        self._quiesce = policy.quiesce
        self.quiescing = Quiescing(supervisor.vm, policy.quiesce_seconds)
        self._tidying: asyncio.Task[None] | None = None
        self._tidies, self._untidy = True, False

    async def snapshot(
        self, cause: str, *, full: bool = False, quiesce: bool = False, **more: Unpack[Wanted]
    ) -> Captured:
        """A generation of the running VM, or of one that is held; `quiesce`: only with frozen file systems, else by
        policy. Raises what capture raises, and ConflictError where a full one cannot be had; the guest runs on in any
        case."""
        supervisor = self._supervisor
        async with supervisor.operation:
            if full and supervisor.state == "held":
                raise ConflictError(f"VM {supervisor.vm} is held: there can be a full generation when it runs")
            if quiesce and supervisor.state == "held":
                raise ConflictError(f"VM {supervisor.vm} is held: its file systems can be frozen when it runs")
            return await self.as_it_is(cause, full=full, quiesce=quiesce, **more)

    async def as_it_is(
        self, cause: str, *, full: bool = False, quiesce: bool = False, **more: Unpack[Wanted]
    ) -> Captured:
        """The same under the supervisor's lock."""
        supervisor = self._supervisor
        machine = supervisor.machine
        if full:
            await machine.require_full()
        execution = None
        if supervisor.state != "held":
            execution = self.execution(machine, "require" if quiesce else self._quiesce)
        return await self.of(machine, cause, execution, full=full, **more)

    async def tried(self, machine: Machine, cause: str) -> Captured | None:
        """Of a held VM. A failed capture must not keep a guest down: what it would have kept is still in memory."""
        supervisor = self._supervisor
        try:
            return await self.of(machine, cause, None)
        except Exception as error:
            supervisor.say(f"{supervisor.vm} NOT CAPTURED at {cause}: {explained(error)}")
            return None

    async def before_rollback(self, machine: Machine, *, full: bool) -> Captured:
        """The guest is stopped afterwards: nothing of it is lost between this and its end."""
        if not full:
            await machine.stop()
            return await self.of(machine, "before rollback", None)
        mode: Mode = "off" if self._quiesce == "off" else "try"
        execution = self.execution(machine, mode, leave_stopped=True)
        return await self.of(machine, "before rollback", execution, full=True)

    def execution(self, machine: Machine, mode: Mode, *, leave_stopped: bool = False) -> Execution:
        """How a running guest is stopped and goes on."""
        quiesced = None
        if mode != "off":
            quiesced = Instant(self.quiescing, machine, self._supervisor.say, require=mode == "require")
        return Execution(machine, asyncio.get_running_loop(), leave_stopped=leave_stopped, quiesced=quiesced)

    async def of(
        self,
        machine: Machine,
        cause: str,
        execution: Execution | None,
        *,
        full: bool = False,
        **more: Unpack[Wanted],
    ) -> Captured:
        """A generation of a machine, which stands still already if `execution` is None. Raises what capture raises."""
        supervisor = self._supervisor
        await lazily.whole(machine, supervisor.say)
        await following.renew(supervisor, machine)
        table = machine.table.regions  # of one moment: the guest may change it meanwhile
        regions = await supervisor.in_store(
            lambda: machine.captured_regions(table, full=full, memory=more.get("memory", False))
        )
        disks = await DiskInstant.plan(machine, full=full)
        facts = {**machine.metadata(table, full=full), **more.get("metadata", {})}

        def work() -> Captured:
            return capture(
                supervisor.repository,
                supervisor.vm,
                regions,
                machine.journal,
                execution,
                cause=cause,
                parent=machine.parent,
                full=full,
                disks=disks,
                tags=more.get("tags", ()),
                metadata=facts,
                limits=self._limits,
                pauses=machine.pauses,
                making=supervisor.draining.take(),
                progress=more.get("progress", supervisor.progress),
            )

        filling = supervisor.filling
        async with filling.paused(while_=disks is not None) if filling is not None else nullcontext():
            try:
                done = await supervisor.in_store(work)
                try:
                    machine.committed(done)
                except StorageError as error:  # what was captured is good: only a next supervisor will not know of it
                    supervisor.say(f"{supervisor.vm}: after the capture: {one_line(error)}")
            finally:
                if disks is not None:
                    await settle_bitmaps(machine)
        self._untidy = True
        self._begin_to_tidy()
        self._report(done, cause)
        return done

    @contextmanager
    def tidying_later(self) -> Iterator[None]:
        """What follows a capture in the block waits for its end: no rule may keep what a rollback goes back to, once
        there is one more generation."""
        self._tidies = False
        try:
            yield
        finally:
            self._tidies = True
            self._begin_to_tidy()

    def _begin_to_tidy(self) -> None:
        if self._tidies and self._untidy:
            self._untidy = False
            self._tidying = asyncio.create_task(self._tidy())

    async def settle(self) -> None:
        """Wait for what follows the last generation."""
        if self._tidying is not None:
            await self._tidying

    def _report(self, done: Captured, cause: str) -> None:
        supervisor = self._supervisor
        supervisor.say(documents.made_text(done.generation, done.seconds)[0] + f" ({cause})")
        for line in (
            *reads_text(reads_of(done.generation)),
            *documents.forgotten_text(done.forgotten),
            *documents.over_limit(done.stopped, self._limits),
        ):
            supervisor.say(f"{supervisor.vm}: {line}")

    async def _tidy(self) -> None:
        """After a capture: forget what no rule keeps, if that is wanted, and merge the index."""
        supervisor = self._supervisor
        try:
            if supervisor.policy.forget_after_capture:
                gone = await supervisor.in_store(lambda: forget_by_policy(supervisor.repository, supervisor.vm))
                if gone:
                    supervisor.say(f"{supervisor.vm}: forgotten by policy: {', '.join(each.name for each in gone)}")
            await supervisor.in_store(lambda: supervisor.repository.tidy(_TIDY_SECONDS))
        except Exception as error:
            supervisor.say(f"{supervisor.vm}: after the capture: {explained(error)}")
