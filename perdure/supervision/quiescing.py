"""File systems of the guest that are frozen for the instant of a capture: asked of its agent, waited for, let go again.

Nothing depends on us for the end of it: the agent keeps them frozen in a process that lets them go after the time that
it was given, whatever becomes of the agent, of the channel or of us. So an instant is only taken for quiesced if the
guest stood still well before that time was up; the clock is ours and began when the guest was asked.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from base.errors import PerdureError, VirtualMachineError, one_line

if TYPE_CHECKING:
    from perdure.supervision.machine import Machine

Mode = Literal["off", "try", "require"]

_MARGIN_SECONDS = 1.0
"""Before the guest's time is up: its clock is another one."""


class Quiescing:
    """Of one supervisor, one capture at a time. Coroutines of its loop."""

    def __init__(self, vm: str, seconds: int) -> None:
        self._vm, self._seconds = vm, seconds
        self._token = 0
        self._answer: asyncio.Future[int] | None = None
        self._asked_at = 0.0

    def frozen(self, token: int, count: int, error: str | None) -> None:
        """From the guest: what became of it."""
        if self._answer is None or self._answer.done() or token != self._token:
            return
        if error is not None:
            self._answer.set_exception(VirtualMachineError(self._text(f"in the guest: {error}")))
        else:
            self._answer.set_result(count)

    async def freeze(self, machine: Machine) -> int:
        """Have file systems frozen; how many. Raises VirtualMachineError, and lets go of what there may be then."""
        self._token = secrets.randbits(52)
        self._answer = asyncio.get_running_loop().create_future()
        self._asked_at = time.monotonic()
        channel = machine.channel
        if channel is None:
            raise VirtualMachineError(self._text("no guest channel was named: perdure attach --agent SOCKET"))
        if not channel.freeze(self._token, self._seconds):
            raise VirtualMachineError(self._text("its agent is not connected"))
        try:
            return await asyncio.wait_for(self._answer, self._seconds / 2)
        except TimeoutError as error:
            problem = f"its agent did not do it within {self._seconds / 2:g} s: is perdure-guest running, and new?"
            raise VirtualMachineError(self._text(problem)) from error
        finally:
            if not self._answer.done() or self._answer.cancelled() or self._answer.exception() is not None:
                channel.thaw()

    @property
    def in_time(self) -> bool:
        """Whether file systems that were frozen still are, if the guest stands still now."""
        return time.monotonic() - self._asked_at < self._seconds - _MARGIN_SECONDS

    def require_in_time(self) -> None:
        """The guest stands still now. Raises VirtualMachineError if its file systems may have gone on before."""
        if not self.in_time:
            raise VirtualMachineError(
                self._text(f"for as long as it took to stop the guest: {self._seconds} s (quiesce_seconds)")
            )

    def _text(self, why: str) -> str:
        return f"VM {self._vm}: file systems could not be frozen, {why}"


class Instant:
    """What one capture does about it. `require`: without frozen file systems there is no capture; else that is said."""

    def __init__(self, quiescing: Quiescing, machine: Machine, say: Callable[[str], None], *, require: bool) -> None:
        self._quiescing, self._machine, self._say, self._require = quiescing, machine, say, require
        self._frozen: int | None = None

    @property
    def facts(self) -> dict[str, int]:
        """What is recorded of the generation: how many file systems were frozen, if that was so at the instant."""
        return {} if self._frozen is None else {"quiesced": self._frozen}

    async def begin(self) -> None:
        """Freeze, while the guest runs. Raises VirtualMachineError if that is required and cannot be."""
        self._frozen = None
        try:
            self._frozen = await self._quiescing.freeze(self._machine)
        except PerdureError as error:
            self._failed(error)

    def reached(self) -> None:
        """The guest stands still. Raises as `begin`."""
        if self._frozen is None:
            return
        try:
            self._quiescing.require_in_time()
        except PerdureError as error:
            self._frozen = None
            self._failed(error)

    def end(self) -> None:
        """Thaw, whatever has become of it."""
        if self._machine.channel is not None:
            self._machine.channel.thaw()

    def _failed(self, error: PerdureError) -> None:
        if self._require:
            raise error
        self._say(f"{one_line(error)}; captured without")
