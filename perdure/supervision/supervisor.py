"""The supervisor: one process per VM, in the foreground, that owns QEMU's monitor, the guest channel and captures.

States: starting, running, held (a reboot or shutdown waits for its capture and scrub), rolling back, ended. One
operation at a time; the repository is used from one thread only. A failure of ours never harms a running guest: a
capture that fails at a reboot is reported and the reboot goes on, since what is tagged stays in memory; a restore
that fails leaves the old QEMU as it was, or starts none. SIGKILL leaves QEMU running; the next `perdure run` takes
it over. Everything here runs in one event loop's thread; blocking work goes to `_store`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from base.errors import ConflictError, IntegrityError, PerdureError, VirtualMachineError, explained, one_line
from base.progress import Progress
from capture.generation import Captured
from perdure import documents
from perdure.control import serve
from perdure.disks.filling import Filling
from perdure.disks.state import disks_of
from perdure.supervision import background, lazily, leftovers
from perdure.supervision.capturing import Capturing
from perdure.supervision.draining import Draining
from perdure.supervision.execution import settle_bitmaps
from perdure.supervision.launcher import Launcher
from perdure.supervision.machine import Machine
from perdure.supervision.preparing import Preparation, Prepared
from perdure.supervision.preview import preview
from perdure.supervision.reconnecting import Reconnecting
from perdure.supervision.requests import Requests
from perdure.supervision.rollback import Rollback, RolledBack, carry_out
from perdure.supervision.schedule import Due, Timetable
from store.records import Generation
from store.repository import Repository
from vm.hold import Cause, Hold
from vm.qemu import Qemu

_LEFT = "runs on unsupervised: take it over with perdure run"

T = TypeVar("T")
"""Result of work that is sent to the repository's thread."""

Begin = Callable[[bool, Progress], Generation | None]
"""Called in the repository's thread once the VM is ours: given whether it runs already, says what a launch restores."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a supervisor returned. `detached`: the guest runs on without it; `forgotten`: nothing of it is left here."""

    reason: str
    detached: bool = False
    interrupted: bool = False
    failed: bool = False
    generation: int | None = None
    forgotten: bool = False


class _LeavingError(PerdureError):
    """A start was interrupted."""


class Supervisor:
    """One VM, from launch or take-over to its end."""

    def __init__(
        self, preparation: Preparation, repository: Repository, say: Callable[[str], None], progress: Progress
    ) -> None:
        local = preparation.local
        self.local, self.preparation, self.repository, self.say = local, preparation, repository, say
        self.launcher = Launcher(local, self.tell, lambda: self._leaving is not None)
        self.vm = local.name
        self.state = "starting"
        self.began = time.time()
        self.progress = progress
        self.operation = asyncio.Lock()
        self._store = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._machine: Machine | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._lazy: asyncio.Task[None] | None = None
        self._told: Callable[[str], None] | None = None
        self._requests = Requests(self)
        self.filling: Filling | None = None
        """Of the disks that went back, while there is a QEMU."""
        self.policy = local.description.policy
        self.timetable = Timetable(self.vm, local.description.schedules, datetime.now(UTC))
        self.draining = Draining(self)
        self.left = _LEFT
        self.capturing = Capturing(self)
        self._reconnecting = Reconnecting(self)
        self._beside: list[asyncio.Task[None]] = []

    @property
    def machine(self) -> Machine:
        """The QEMU of now. Raises ConflictError while there is none."""
        if self._machine is None:
            raise ConflictError(f"VM {self.vm} is {self.state}: try again in a moment")
        return self._machine

    async def run(self, begin: Begin, *, boot: bool | None = None, lazy: bool | None = None) -> Ended:
        """Supervise until the VM ends or this process is told to leave it. `boot`: whether a launch from a full
        generation is not to resume it; None: as its disks have gone on since, if it has some. `lazy`: whether memory is
        restored when it is touched; None: where that suits (perdure.supervision.lazily).

        Raises LockedError if the VM has a supervisor; nothing of it is touched before that is known.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupted, number)
        try:
            async with await serve(self.local.folder.control, self._requests.commands(), self.say):
                self._beside.append(asyncio.create_task(background.keep_keys(self)))
                async with self.operation:
                    await self._start(begin, boot, lazy=lazy)
                schedule = background.keep_schedule(self.vm, self.timetable, self._scheduled, self.say)
                self._beside.append(asyncio.create_task(schedule))
                if self.draining.wanted:
                    drained = background.keep_drained(self.vm, self.draining.step, self.say)
                    self._beside.append(asyncio.create_task(drained))
                return await self._ended
        except _LeavingError:
            return Ended("not started: interrupted", interrupted=True)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            for task in self._beside:
                task.cancel()
            await self.capturing.settle()
            await self._let_go()
            self.draining.close()
            self._store.shutdown()

    async def in_store(self, work: Callable[[], T]) -> T:
        """Run blocking work, the repository's above all, in its one thread."""
        return await asyncio.get_running_loop().run_in_executor(self._store, work)

    @property
    def undisturbed(self) -> bool:
        """Whether the VM runs, and nobody is about to leave it."""
        return self._machine is not None and self.state == "running" and self._leaving is None

    async def _scheduled(self, due: Due) -> None:
        if self._leaving is None:
            await self.capturing.snapshot("schedule", full=due.full and self.state != "held", tags=due.tags)

    async def stop(self, *, keep: bool) -> Ended:
        """End the VM, captured first if `keep`; if that fails the guest runs on."""
        async with self.operation:
            machine = self.machine
            number = None
            if keep:
                try:
                    await machine.stop()
                    number = (await self.capturing.of(machine, "stop", None)).generation.number
                except BaseException:
                    await self.go_on(machine)
                    raise
            await self.quit_machine(machine)
            ended = Ended("stopped", generation=number)
            self._end(ended)
            return ended

    async def detach(self) -> Ended:
        """Leave the VM to whoever launched it; refused, since that was a supervisor."""
        raise ConflictError(f"VM {self.vm} was launched by perdure run: SIGTERM of that leaves it running")

    async def reboot(self) -> Captured | None:
        """Reboot the VM from the host: capture, scrub, reset, as when the guest does it."""
        async with self.operation:
            machine = self.machine
            await machine.hold_for_reset()
            return await self._go_through_reboot(machine, "host reboot")

    async def roll_back(
        self, wanted: Rollback, progress: Progress, told: Callable[[str], None] | None = None
    ) -> RolledBack:
        """Boot a fresh QEMU with the persistent memory of a generation, or resume a full one; see rollback. `told`: who
        asked for it, and is told as well what holds it up."""
        async with self.operation:
            self._told = told
            try:
                return await carry_out(self, wanted, progress)
            finally:
                self._told = None

    def tell(self, text: str) -> None:
        """Say something, also to who waits for a rollback."""
        self.say(text)
        if self._told is not None:
            self._told(text)

    async def preview(self, wanted: Rollback) -> dict[str, Any]:
        """What that would change, as a document; nothing is changed."""
        async with self.operation:
            machine, held = self.machine, self.state == "held"
            return await self.in_store(
                lambda: preview(self.preparation, self.repository, self.own(wanted.point), wanted, machine, held=held)
            )

    async def _start(self, begin: Begin, boot: bool | None, *, lazy: bool | None) -> None:
        await self.in_store(self.local.disks.look_again)
        qemu = self.launcher.find()
        if qemu is not None and not await self.launcher.began(qemu):
            unborn, qemu = qemu, None
            await self.in_store(lambda: self.launcher.undo_launch(unborn))
            self.say(f"{self.vm} had been launched by a supervisor that ended before the guest began: once more")
        generation = await self.in_store(lambda: begin(qemu is not None, self._unless_leaving))
        if qemu is None:
            await self.in_store(lambda: self.local.disks.settle(self.repository))
        for line in self.local.disks.remarks():
            self.say(f"{self.vm}: {line}")
        if qemu is not None:
            await self._adopt(qemu)
        else:
            await self._launch(generation, boot, lazy=lazy)

    async def _launch(self, generation: Generation | None, boot: bool | None, *, lazy: bool | None) -> None:
        if boot is None:
            with_disks = generation is not None and generation.full and bool(disks_of(generation))
            boot = generation is not None and with_disks and not self.local.disks.pristine(generation)
            if generation is not None and boot:
                self.say(f"{generation.name} is full and has disks: the VM boots; --from {generation.name} goes back")
        try:
            prepare, unless_leaving = self.preparation.prepare, self._unless_leaving
            prepared = await self.in_store(
                lambda: prepare(self.repository, generation, unless_leaving, boot=boot, lazy=lazy)
            )
        except IntegrityError as error:
            problem = (
                f"{error.problem}: {self.vm} is not started on part of its memory; choose an older generation with "
                "--from, or --without-restore"
            )
            raise IntegrityError(error.object, problem, offset=error.offset, chunk=error.chunk) from error
        try:
            go_on_from = self.preparation.go_on_from
            head = await self.in_store(lambda: go_on_from(self.repository, prepared, self.say))
        except BaseException:
            await self.discard(prepared)
            raise
        machine, prepared = await lazily.launch(self, head)
        await self.follow(machine)
        how = f"started (pid {machine.pid}, {machine.platform.accelerator}): {prepared.summary}"
        self.introduce(machine, prepared.warnings, how)

    async def discard(self, prepared: Prepared) -> None:
        """Give back what is not going to be launched, after an error that is not to be hidden by another one."""
        try:
            await self.in_store(prepared.discard)
        except PerdureError as error:  # memory that is lost to the host until somebody unmounts it
            self.say(f"{self.vm}: {one_line(error)}")

    def introduce(self, machine: Machine, warnings: Sequence[str], how: str) -> None:
        """Say what the user should know of a machine that is new here."""
        for warning in warnings:
            self.say(f"warning: {warning}")
        self.say(f"{self.vm} {how}")
        for problem in machine.full_problems:
            self.say(f"{self.vm} cannot be captured in full: {problem}")
        self.say(f"{self.vm} tracker: {machine.tracking.choice.kind} ({machine.tracking.choice.reason})")

    async def _adopt(self, qemu: Qemu) -> None:
        machine = await self.launcher.adopt(qemu, self.repository, self.in_store)
        await self.follow(machine)
        self.say(f"{self.vm} taken over (pid {machine.pid}), tracker {machine.tracking.choice.kind}")
        await settle_bitmaps(machine)
        waiting = await machine.pending_hold()
        if waiting is not None:
            await self._held(machine, waiting)
        elif await machine.go_on_if_paused():
            self.say(f"{self.vm} was paused, and goes on")

    async def follow(self, machine: Machine) -> None:
        self._machine = machine
        self.state = "running"
        machine.open_channel(self._requests, self.say)
        self.filling = Filling(machine.monitor, self.local.disks, machine.description, self.say)
        self.filling.begin()
        self._watcher = asyncio.create_task(self._watch(machine))
        self._watcher.add_done_callback(self._watched)
        await self.in_store(lambda: machine.find_disk_bases(self.repository))
        if machine.lazy is not None:
            self._lazy = asyncio.create_task(lazily.see_to(self, machine, machine.lazy))
            self._lazy.add_done_callback(self._watched)

    async def _watch(self, machine: Machine) -> None:
        """Act on what QEMU says until it is gone."""
        while True:
            try:
                found = await machine.next_hold()
                if found is None:
                    break
                async with self.operation:
                    if self._machine is not machine:
                        return
                    if await machine.held():  # and not rebooted by a command meanwhile
                        await self._held(machine, found)
            except VirtualMachineError as error:
                await self.reconnect(machine, error)
        if self._machine is machine:
            await self._died(machine)

    async def reconnect(self, machine: Machine, error: VirtualMachineError) -> None:
        """Go on after the session with the monitor has ended with an error, or raise it."""
        await self._reconnecting.after(machine, error)

    def is_of(self, machine: Machine) -> bool:
        """Whether this machine is still the one that is supervised."""
        return self._machine is machine

    async def go_on_from_hold(self, machine: Machine, found: Hold) -> None:
        """A hold that nobody saw begin; under the lock."""
        await self._held(machine, found)

    def _watched(self, watcher: asyncio.Task[None]) -> None:
        """Without a watcher, and be it for a defect of ours, there is no supervisor."""
        error = None if watcher.cancelled() else watcher.exception()
        if error is not None:
            self.fail(error)

    async def _died(self, machine: Machine) -> None:
        """QEMU ended by itself: what it left in memory is captured."""
        async with self.operation:
            self._machine = None
            await self.draining.drop()
            self.say(f"{self.vm}: {machine.last_words()}")
            await self._end_filling()
            await machine.disconnect()
            saved = await self.in_store(lambda: leftovers.salvage(self.local, self.repository, self.progress))
            if saved is not None:
                self.say(documents.made_text(saved.generation, saved.seconds)[0] + " (crash)")
            self._end(Ended("QEMU ended", failed=True, generation=saved.generation.number if saved else None))

    async def _held(self, machine: Machine, found: Hold) -> None:
        self.state = "held"
        if found.cause is Cause.REBOOT:
            if await lazily.whole_or_said(machine, self.say):
                await self._go_through_reboot(machine, "reboot")
            return
        number = None
        poweroff = found.cause is Cause.POWEROFF
        if self.policy.capture_on_shutdown if poweroff else self.policy.capture_on_panic:
            done = await self.capturing.tried(machine, "shutdown" if found.cause is Cause.POWEROFF else "panic")
            if done is None:
                self.say(f"{self.vm} stays held, its memory as it was: `perdure stop {self.vm} --capture` tries again")
                return
            number = done.generation.number
        await self.quit_machine(machine)
        self._end(
            Ended("the guest shut down" if found.cause is Cause.POWEROFF else "the guest panicked", generation=number)
        )

    async def again_if_held(self, machine: Machine) -> None:
        """What a held guest waits for, after something that was missing for it is there."""
        if self.state == "held" and (waiting := await machine.pending_hold()) is not None:
            await self._held(machine, waiting)

    async def _go_through_reboot(self, machine: Machine, cause: str) -> Captured | None:
        """A held VM: capture, scrub, verify, the user's hook, reset. What is tagged stays where it is.

        The cause says who wanted it: what a guest causes is counted apart by policies (store.retention.rules).
        """
        self.state = "held"
        done = await self.capturing.tried(machine, cause) if self.policy.capture_on_reboot else None
        await lazily.whole(machine, self.say)
        await self.draining.drop()  # it knows nothing of the holes that a scrub makes
        scrubbed = await self.in_store(machine.scrub)
        await self.launcher.before_boot(machine)
        await machine.go_on_after_hold()
        self.state = "running"
        self.say(f"{self.vm} rebooted: {machine.scrubbed_text(scrubbed)}")
        return done

    def own(self, point: str) -> Generation:
        self.repository.refresh()
        generation = self.repository.resolve(point)
        if generation.vm != self.vm:
            raise ConflictError(f"{generation.name} is a generation of another VM than {self.vm}")
        return generation

    async def go_on(self, machine: Machine) -> None:
        """After something failed: as it was, running or held. Raises nothing; where QEMU does not answer just now, it
        has been told, and the guest goes on when it moves again."""
        if self.state == "running":
            try:
                await machine.cont()
            except PerdureError:
                machine.go_on_without_session()

    async def quit_machine(self, machine: Machine) -> None:
        await self.end_machine(machine)
        await machine.ended()

    async def end_machine(self, machine: Machine) -> None:
        """Another QEMU may be launched then; `machine.ended` is still to be waited for."""
        self._machine = None
        for task in (self._watcher, self._lazy):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        await self._end_filling()
        await machine.end(aside=True)

    async def _end_filling(self) -> None:
        if self.filling is not None:
            filling, self.filling = self.filling, None
            await filling.close()

    async def _let_go(self) -> None:
        """Leave a running QEMU, and the servers of its disks, to the next supervisor."""
        for task in (self._watcher, self._lazy):
            if task is not None:
                task.cancel()
        await self._end_filling()
        if self._machine is None:
            self.local.disks.end_servers()
        self.local.disks.let_go()
        if self._machine is not None:
            machine, self._machine = self._machine, None
            await self.draining.drop()
            await machine.disconnect()

    def _interrupted(self, number: int) -> None:
        if not self._leaving:
            self._leaving = asyncio.create_task(self._leave(signal.Signals(number)))

    async def _leave(self, number: signal.Signals) -> None:
        """Ctrl-C and SIGTERM: capture if the policy says so, and leave the guest running. What is under way is not
        left half done (the guest may be stopped for it), but for a start, which gives up; see `_unless_leaving`."""
        if self.operation.locked():
            self.say(f"{self.vm}: leaving it when what is under way is done")
        async with self.operation:
            wanted = number is signal.SIGTERM and self.policy.capture_on_terminate
            if wanted and self._machine is not None:
                try:
                    await self.capturing.as_it_is("terminate", full=wanted == "full" and self.state != "held")
                except Exception as error:  # whatever it was, who wants us to end is not to wait for ever
                    self.say(f"{self.vm} NOT CAPTURED: {explained(error)}")
            runs = self._machine is not None
            self._end(Ended(self.left if runs else "interrupted", detached=runs, interrupted=True))

    def _unless_leaving(self, what: str, done: int, total: int) -> None:
        """Progress of a start, which is interrupted where it reports: what it has made is taken back then."""
        if self._leaving is not None:
            raise _LeavingError(f"VM {self.vm}: interrupted")
        self.progress(what, done, total)

    def _end(self, ended: Ended) -> None:
        self.state = "ended"
        if not self._ended.done():
            self._ended.set_result(ended)

    def fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
