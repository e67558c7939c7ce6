"""What a rollback that fails leaves: the guest goes on first, then what was prepared is given back."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from base.errors import QuotaError, StorageError, VirtualMachineError
from perdure.supervision.rollback import Rollback, carry_out
from perdure.supervision.supervisor import Supervisor

REFUSED = QuotaError("demo", 7, 7, 1)


class FakeMachine:
    """Does nothing, and notes it. `waits`: for memory, before it is stopped and then; `answers`: to `cont`."""

    def __init__(self, done, waits=(False, False), answers=True):
        self.done, self.waits, self.answers = done, waits, answers
        self.monitor, self.memory = SimpleNamespace(stopped=False), None

    @property
    def waits_for_memory(self):
        return self.waits[self.monitor.stopped]

    async def stop(self):
        self.monitor.stopped = True
        self.done.append("stop")

    async def cont(self):
        self.done.append("cont")
        if not self.answers:
            raise VirtualMachineError("QEMU did not give the answer to `cont`")

    def go_on_without_session(self):
        self.done.append("cont without a session")


class FakeSupervisor:
    """Prepares what cannot be given back, and has no room for a head of history."""

    def __init__(self, machine):
        self.machine, self.state, self.repository, self.preparation = machine, "running", None, self
        self.said = []
        self.capturing, self.draining = SimpleNamespace(tidying_later=nullcontext), self
        self.say = self.tell = self.said.append
        self.vm = "demo"

    async def discard(self, prepared):
        await Supervisor.discard(self, SimpleNamespace(discard=prepared.fail))

    async def in_store(self, work):
        return work()

    async def drop(self):
        """What was stored ahead, of which there is nothing."""

    def own(self, _):
        return None

    def prepare(self, *_, **__):
        return self

    def go_on_from(self, *_, **__):
        raise REFUSED

    def fail(self):
        """To give back what was prepared."""
        self.machine.done.append("discard")
        raise StorageError("memory", "is busy")

    async def go_on(self, machine):
        await Supervisor.go_on(self, machine)


@pytest.mark.parametrize(
    ("waits", "answers", "expected"),
    [
        ((False, False), True, ["stop", "cont", "discard"]),
        ((False, True), True, ["stop", "cont", "discard"]),
        ((False, True), False, ["stop", "cont", "cont without a session", "discard"]),
        ((True, True), True, ["discard"]),
    ],
)
def test_a_guest_that_was_stopped_for_a_rollback_that_fails_goes_on_whatever_else_fails(waits, answers, expected):
    done = []
    supervisor = FakeSupervisor(FakeMachine(done, waits, answers))
    with pytest.raises(QuotaError) as raised:
        asyncio.run(carry_out(supervisor, Rollback("demo@1", discard=True), print))
    assert raised.value is REFUSED
    assert done == expected
    assert any("is busy" in each for each in supervisor.said)
