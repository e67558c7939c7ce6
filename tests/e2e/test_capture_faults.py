"""Captures of a QEMU that hangs, or whose monitor is lost, in the middle: the guest goes on, the next one is right.

Without a guest, as in test_disk_faults.py: QEMU is stopped (SIGSTOP), or the session with its monitor cut, at one
command after the other that a full capture gives it. Some of the commands each time the tests run, all of them with
PERDURE_FAULTS=all.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import store_fixtures
from conftest import Place
from test_disk_faults import MortalMonitor, Rig

from base.errors import PerdureError, VirtualMachineError
from capture import pause
from capture.disks import reads_of
from perdure.supervision import lazily
from perdure.supervision.borrowed import BorrowedMachine
from perdure.supervision.execution import Execution
from perdure.supervision.machine import Machine
from perdure.supervision.supervisor import Supervisor
from vm.monitor import COMMAND_SECONDS, Monitor

pytestmark = pytest.mark.qemu

STEP = 1 if os.environ.get("PERDURE_FAULTS") == "all" else 6
WITHOUT_END = 1 << 30
HUNG_S = 0.02
"""For an answer of a QEMU that does not move: none comes, be the time short or long."""


class FaultyMonitor(MortalMonitor):
    """Carries out some more commands; then `fault` happens, once."""

    until_fault: int | None = None
    fault = ""
    happened = False

    async def execute(self, command: str, /, *, timeout_s: float = COMMAND_SECONDS, **arguments: Any) -> Any:
        if self.until_fault is not None:
            self.until_fault -= 1
            if self.until_fault < 0:
                self.until_fault, self.happened = None, True
                if self.fault == "hangs":
                    os.kill(self._qemu.pid, signal.SIGSTOP)
                else:
                    await self._client.disconnect()
        hung = self.happened and self.fault == "hangs"
        return await Monitor.execute(self, command, timeout_s=HUNG_S if hung else timeout_s, **arguments)

    async def goes_on(self) -> None:
        """What had hung moves again."""
        os.kill(self._qemu.pid, signal.SIGCONT)
        self.happened = False


class FaultyRig(Rig):
    """Its monitors can be made to fail."""

    monitor_class = FaultyMonitor
    monitor: FaultyMonitor
    go_on_without_session = Machine.go_on_without_session

    def fail_at(self, command: int, fault: str) -> bool:
        """One supervisor, whose capture meets a fault at a command; whether it came to that."""
        happened = False

        async def meet() -> None:
            nonlocal happened
            before = self.repository.latest("demo")
            self.monitor.until_fault, self.monitor.fault = command, fault
            self.monitor.left = WITHOUT_END  # the disks are left alone meanwhile: nobody would answer
            try:
                await self.capture()
            except PerdureError as error:
                assert isinstance(error, VirtualMachineError) and "VM demo" in str(error), error
                assert self.repository.latest("demo") == before
            happened = self.monitor.happened
            self.monitor.until_fault = self.monitor.left = None
            if happened and fault == "hangs":
                await self.monitor.goes_on()
                while await self.monitor.query_status() != "running":
                    assert self.qemu.alive()
                self.write()
                await self.right_again()

        self.run(meet)
        return happened

    async def right_again(self) -> None:
        """The next capture holds what the disks hold, by whatever way, and nothing is left."""
        done, instant = await self.capture()
        assert set(reads_of(done.generation)) == set(self.contents)
        for name in self.contents:
            assert store_fixtures.content(self.repository, done.generation, f"disk:{name}") == instant.contents[name]
        await self.nothing_is_left()


@pytest.fixture
def rig(place: Place) -> Iterator[FaultyRig]:
    with store_fixtures.place() as store:
        yield FaultyRig(place, store)


@pytest.mark.parametrize("fault", ["hangs", "loses its monitor"])
def test_a_qemu_that_fails_a_capture_in_the_middle_goes_on_and_the_next_one_is_right(
    rig: FaultyRig, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vm.monitor._END_SECONDS", 0.05)  # QEMU does not end, be the time short or long
    rig.run(lambda: rig.captured("rescan"))
    faults = 0
    for command in range(0, 1000, STEP):
        rig.write()
        if not rig.fail_at(command, fault):
            break
        faults += 1
        rig.write()
        rig.run(rig.right_again)
    assert faults > 20 / STEP


async def stop_captured(rig: FaultyRig) -> None:
    supervisor: Any = object.__new__(Supervisor)
    supervisor.vm, supervisor.state, supervisor._machine, supervisor.operation = "demo", "running", rig, asyncio.Lock()
    rig.monitor.until_fault = 0
    await supervisor.stop(keep=True)


async def retire(rig: FaultyRig) -> None:
    rig.lazy = SimpleNamespace()  # type: ignore[attr-defined]
    rig.monitor.until_fault = 1
    await lazily.retire(rig)  # type: ignore[arg-type]


async def capture_of_what_somebody_else_has_stopped(rig: FaultyRig) -> None:
    rig.judge.execute("stop")
    machine: Any = object.__new__(BorrowedMachine)
    machine.monitor, machine.qemu, machine.attachment = rig.monitor, rig.qemu, SimpleNamespace(holds=True)
    machine._runs = True  # it did the last time
    rig.monitor.until_fault = 0
    execution = Execution(machine, asyncio.get_running_loop())
    await asyncio.to_thread(pause._stop, execution)


@pytest.mark.parametrize(
    ("work", "status"),
    [(stop_captured, "running"), (retire, "running"), (capture_of_what_somebody_else_has_stopped, "paused")],
)
def test_a_guest_that_qemu_stops_too_late_is_not_left_stopped(
    rig: FaultyRig, work: Callable[[FaultyRig], Coroutine[Any, Any, None]], status: str
) -> None:
    """By what stops guests, but for a capture in its pause, which the test above has."""

    async def late() -> None:
        rig.monitor.fault = "hangs"
        with pytest.raises(VirtualMachineError, match=r"the answer to `(stop|query-status)`"):
            await work(rig)
        await rig.monitor.goes_on()
        assert await rig.monitor.query_status() == status  # asked after all that it had not read yet

    rig.run(late)
