"""A lazy restore beside a running VM: its page server is watched and replaced, until it is not needed any more.

Coroutines of the supervisor's loop. What they wait for never waits for the guest: the guest may be waiting for a page.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from base.errors import (
    ConflictError,
    IntegrityError,
    PerdureError,
    StorageError,
    VirtualMachineError,
    explained,
    one_line,
)
from base.units import format_size
from capture.choice import Facts, Kernel, kernel_obstacle, obstacle
from restore import claims
from restore.lazy import LazyRestore
from store.records import Generation
from vm.config import Description
from vm.mappings import shared_mappings
from vm.qemu import Qemu
from vm.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from perdure.supervision.machine import Machine
    from perdure.supervision.preparing import Prepared
    from perdure.supervision.supervisor import Supervisor

_MUCH_BYTES = 256 << 20
"""Of persistent memory, some 0.3 s to restore: more is served to a guest that boots."""
_LOOK_S = 0.1
_AGAIN_S = 1.0
"""Between attempts to start a page server, if one fails."""
_NOT_BEGUN = "or interrupt `perdure run`, and begin elsewhere with --from VM@N"
_BEGUN = "or go back elsewhere with `perdure rollback VM@N --discard`"
"""What can be done about memory that cannot be read, before the guest goes on and after that."""


def suits(
    description: Description, generation: Generation, *, resumes: bool, wanted: bool | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether memory is to be served when it is touched, and what to say where that was to be expected and is not.

    Where the user leaves it open (None): whenever a VM is resumed, and for boots with much persistent memory; not if a
    hook is to look at memory before the guest does.
    """
    much = sum(each.kept_bytes for each in generation.regions.values() if each.kind == "pmem") >= _MUCH_BYTES
    if wanted is False or (wanted is None and not resumes and not much):
        return False, ()
    if wanted is None and description.hooks.before_boot:
        return False, ()
    problem = kernel_obstacle(Kernel.probe())
    return problem is None, () if problem is None else (_before(problem),)


def _before(problem: str) -> str:
    return f"memory is restored before the guest begins: {problem}"


class NotLazyError(VirtualMachineError):
    """This QEMU's memory cannot be served; the message says why."""


async def serve(lazy: LazyRestore, qemu: Qemu, facts: Facts) -> None:
    """First touches of a fresh QEMU's memory are answered then. Raises NotLazyError, and what the server found."""
    problem = obstacle(facts)
    if problem is not None:
        raise NotLazyError(problem)
    try:
        await asyncio.to_thread(lazy.serve, qemu.record.identity)
    except VirtualMachineError as error:
        raise NotLazyError(str(error)) from error


async def launch(
    supervisor: Supervisor,
    prepared: Prepared,
    *,
    after: int | None = None,
    give_back: Callable[[], Awaitable[None]] | None = None,
) -> tuple[Machine, Prepared]:
    """Launch what was prepared; where its memory cannot be served, once more, restored before. Gives what it was then.

    `give_back`: ends an earlier QEMU, beside whose memory there is no room for all of it. Raises what a launch raises.
    """
    launcher, preparation = supervisor.launcher, supervisor.preparation
    try:
        return await launcher.launch(prepared, supervisor.in_store, after=after), prepared
    except NotLazyError as error:
        why = _before(one_line(error))
        supervisor.tell(f"{supervisor.vm}: {why}")
    if give_back is not None:
        await give_back()
    again = await supervisor.in_store(lambda: preparation.eagerly(supervisor.repository, prepared, supervisor.progress))
    again = replace(again, warnings=(*again.warnings, why))
    return await launcher.launch(again, supervisor.in_store), again


@asynccontextmanager
async def beside(
    lazy: LazyRestore | None, qemu: Qemu, say: Callable[[str], None], leaving: Callable[[], bool]
) -> AsyncIterator[None]:
    """While a QEMU is launched or taken over whose memory is served, and which may wait for it at any step: a server
    that ends is replaced, what cannot be read is said at once, and waited for until we are `leaving`.

    Raises VirtualMachineError then.
    """
    if lazy is None:
        yield
        return
    try:
        async with asyncio.timeout(None) as limit:
            tasks = [
                asyncio.create_task(watch(lazy, qemu, say, _NOT_BEGUN)),
                asyncio.create_task(_give_up(lazy, leaving, limit)),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise VirtualMachineError(f"VM {lazy.vm}: interrupted while it waited for memory") from error


async def _give_up(lazy: LazyRestore, leaving: Callable[[], bool], limit: asyncio.Timeout) -> None:
    while not (leaving() and lazy.waiting):
        await asyncio.sleep(_LOOK_S)
    limit.reschedule(asyncio.get_running_loop().time())


async def take_over(lazy: LazyRestore, qemu: Qemu) -> None:
    """Have a page server before anything is asked of QEMU. Raises VirtualMachineError, and what the server found."""
    if lazy.pidfd < 0 and lazy.phase != claims.BROKEN:
        await asyncio.to_thread(lazy.serve, qemu.record.identity)


def explain(error: BaseException, lazy: LazyRestore | None) -> None:
    """Raises IntegrityError in place of QEMU's silence, if that came from waiting for memory that cannot be read."""
    if isinstance(error, VirtualMachineError) and lazy is not None and lazy.held:
        raise IntegrityError(f"memory of VM {lazy.vm}", f"is waited for: {lazy.held}") from error


async def see_to(supervisor: Supervisor, machine: Machine, lazy: LazyRestore) -> None:
    """Beside a VM whose memory is not all there yet; ends with that, or with the VM."""
    vm, said = supervisor.vm, ""
    while machine.lazy is lazy and await watch(lazy, machine.qemu, supervisor.say, _BEGUN):
        async with supervisor.operation:
            if machine.lazy is not lazy:  # a capture needed all of it
                return
            placed = lazy.status()["resident_bytes"]
            try:
                await retire(machine)
            except VirtualMachineError:  # QEMU has ended, which is noticed elsewhere, or does not answer just now
                await asyncio.sleep(_AGAIN_S)
                continue
            except Exception as error:  # no room for the journal, say
                if explained(error) != said:
                    said = explained(error)
                    supervisor.say(f"{vm}: its restore cannot come to its end, and that is tried again: {said}")
                await asyncio.sleep(_AGAIN_S)
                continue
            supervisor.say(f"{vm}: all of its memory is there, {format_size(placed)}")
            await supervisor.again_if_held(machine)


async def watch(lazy: LazyRestore, qemu: Qemu, say: Callable[[str], None], advice: str) -> bool:
    """Until all of the VM's memory is there: a server that ends or hangs is replaced, and what holds the guest is said,
    with what can be done about it.

    Gives False if memory turned out to be wrong: nothing goes on then.
    """
    vm = lazy.vm
    while lazy.phase not in (claims.DONE, claims.BROKEN):
        if await _ended(lazy):
            if lazy.phase in (claims.DONE, claims.BROKEN):  # and with DONE nobody needs one any more
                break
            await _replace(lazy, qemu, say)
            continue
        if hung := lazy.hung(qemu.pid):
            say(f"{vm}: its page server {hung}: it is killed")
            await asyncio.to_thread(lazy.kill)
            continue
        if lazy.outdated:
            say(f"{vm}: keys were changed, and its page server is given the new ones")
            lazy.kill()
            continue
        held = lazy.held
        if held != lazy.told:
            lazy.told = held
            advised = f"; it goes on when that can be read: put the file back, or `perdure repair`; {advice}"
            say(f"{vm} waits for memory: {held}{advised}" if held else f"{vm}: all of its memory can be read again")
    if lazy.phase == claims.BROKEN:
        say(f"{vm} IS HELD FOR GOOD: {lazy.held}")
        return False
    return True


async def whole(machine: Machine, say: Callable[[str], None]) -> None:
    """Wait until all of the VM's memory is there, as fast as that can be, and let the restore come to its end.

    Raises StorageError, which says what cannot be read; the restore then goes on as before.
    """
    lazy = machine.lazy
    if lazy is None:
        return
    lazy.hurry()
    if lazy.phase != claims.DONE:
        left = lazy.status()
        size = format_size(left["planned_bytes"] - left["resident_bytes"])
        say(f"{machine.description.name}: its memory is fetched first, {size} or more are left")
    try:
        while lazy.phase != claims.DONE:
            if lazy.held:
                raise StorageError(f"memory of VM {machine.description.name}", f"is not all there: {lazy.held}")
            await asyncio.sleep(_LOOK_S / 5)
    except BaseException:
        if machine.lazy is lazy:
            lazy.hurry(on=False)
        raise
    await retire(machine)


async def whole_or_said(machine: Machine, say: Callable[[str], None]) -> bool:
    """The same for a held guest: whether it can go on. If not, it does when all of its memory is there."""
    try:
        await whole(machine, say)
    except StorageError as error:
        say(f"{machine.description.name} stays held: {one_line(error)}")
        return False
    return True


async def retire(machine: Machine) -> None:
    """All is placed: first touches are governed no more, writes still are, and the page server ends.

    Within one stop, in which everything that was written so far is collected: registering anew makes it look written.
    Raises VirtualMachineError, StorageError: the restore has not come to its end then, and that can be tried again.
    """
    lazy = machine.lazy
    if lazy is None:
        return
    runs = await machine.monitor.query_status() == "running"
    try:
        if runs:
            await machine.stop()
        await asyncio.to_thread(_let_go, machine, lazy)
        machine.lazy = None
        lazy.finish()
    except BaseException:
        if runs:  # also where QEMU has not answered: it is told now, and stops and goes on when it moves again
            with suppress(VirtualMachineError):  # the first error says what is wrong
                await machine.go_on()
        raise
    if runs:
        await machine.go_on()


def _let_go(machine: Machine, lazy: LazyRestore) -> None:
    tracking, journal = machine.tracking, machine.journal
    followed = [name for name in lazy.regions if name in tracking.trackers]
    journal.begin_collect(followed)
    with Userfaultfd.of(machine.pid) as descriptor:
        for name in lazy.regions:
            if name in followed and tracking.trackers[name].kind == "userfaultfd":
                tracking.trackers[name].follow_writes_only()
                continue
            file = machine.memory.files[name].open()
            try:
                for mapping in shared_mappings(machine.pid, file):
                    descriptor.unregister(mapping.start, mapping.size)
            finally:
                os.close(file)


async def _ended(lazy: LazyRestore) -> bool:
    """Wait a moment; whether there is no server any more."""
    if lazy.pidfd < 0:
        return True
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    pidfd = os.dup(lazy.pidfd)
    loop.add_reader(pidfd, end.set)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(end.wait(), _LOOK_S)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    if end.is_set():
        lazy.reap()
    return end.is_set()


async def _replace(lazy: LazyRestore, qemu: Qemu, say: Callable[[str], None]) -> None:
    if not qemu.alive():
        await asyncio.sleep(_LOOK_S)  # the supervisor is going to notice
        return
    vm = lazy.vm
    try:
        await asyncio.to_thread(lazy.serve, qemu.record.identity)
        say(f"{vm}: its page server had ended, another one goes on")
    except ConflictError as error:
        say(f"{vm}: {one_line(error)}")
        await asyncio.sleep(_AGAIN_S)
    except PerdureError as error:
        say(f"{vm} waits for memory: no page server can be started: {one_line(error)}")
        lazy.kill()
        await asyncio.sleep(_AGAIN_S)
