"""The held reboot: why the guest is stopped, and how it goes on.

QEMU runs with `-action reboot=shutdown,shutdown=pause,panic=pause`: every reboot and poweroff of the guest stops it
with a SHUTDOWN event, whose reason says which it was, and a panic with GUEST_PANICKED (also with panic=shutdown: no
SHUTDOWN comes while shutdown=pause). Scrubbing comes before `resume_after_hold`, since the reset reloads firmware
and option ROMs into guest memory.

Every reset by a running guest is held, without exception: only between our own reset and `cont`, while no
instruction of the guest is run, would QEMU carry one out by itself. Firmware that resets once more on its own, as
SeaBIOS does from its shadow, would be held like a reboot; vm.shadow takes its reason away.

The coroutines belong to the monitor's event loop; the rest is pure.

Source: QEMU, qapi/run-state.json, softmmu/runstate.c.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from base.errors import VirtualMachineError
from vm import shadow
from vm.monitor import COMMAND_SECONDS, Event, Monitor

HOLD_EVENTS = ("SHUTDOWN", "GUEST_PANICKED")
"""What to listen for, and to give to `classify`."""
HELD_STATES = ("shutdown", "guest-panicked")
"""QEMU's run states while the guest is held."""


class Cause(Enum):
    """Why QEMU wants to end or reset the guest."""

    REBOOT = "reboot"
    POWEROFF = "poweroff"
    PANIC = "panic"
    TERMINATION = "termination"
    """QEMU itself is asked to end: `quit`, a signal."""


_CAUSES = {
    "guest-reset": Cause.REBOOT,
    "host-qmp-system-reset": Cause.REBOOT,
    "guest-shutdown": Cause.POWEROFF,
    "guest-panic": Cause.PANIC,
}


@dataclass(frozen=True, slots=True)
class Hold:
    """The guest is stopped and waits for us. `reason` is QEMU's word."""

    cause: Cause
    reason: str


def classify(event: Event) -> Hold:
    """What one of HOLD_EVENTS means."""
    reason = "guest-panic" if event.name == "GUEST_PANICKED" else str(event.data.get("reason", "unknown"))
    return Hold(_CAUSES.get(reason, Cause.TERMINATION), reason)


def pending(status: str, journal: bytes) -> Hold | None:
    """The hold that a VM is in, for a supervisor that was not there when it began.

    `status` is QEMU's run state, `journal` the event journal (its end is enough). None if the guest is not held.
    A supervisor may have died between its reset and letting the guest go on (`prelaunch`): all of it is done again.
    """
    if status not in (*HELD_STATES, "prelaunch"):
        return None
    for line in reversed(journal.splitlines()):
        event = _event(line)
        if event is not None and event.name in HOLD_EVENTS:
            return classify(event)
        if event is not None and event.name == "RESUME":
            return None
    return None


def began(journal: bytes) -> bool:
    """Whether the event journal tells of a guest that has run, or that somebody did something with."""
    events = (_event(line) for line in journal.splitlines())
    return any(event is not None and event.name in (*HOLD_EVENTS, "RESUME", "STOP", "RESET") for event in events)


async def hold_for_reset(monitor: Monitor) -> None:
    """Hold the guest as a reboot of its own would, journal entry included. Raises VirtualMachineError."""
    with monitor.events("SHUTDOWN") as events:
        await monitor.execute("system_reset")
        await events.next(COMMAND_SECONDS)


async def hold_on_reset(monitor: Monitor) -> None:
    """From now on the guest's resets are held, whatever was set before: for a VM that is taken over."""
    await monitor.execute("set-action", reboot="shutdown", shutdown="pause", panic="pause")


async def resume_after_hold(monitor: Monitor) -> None:
    """Reset the held guest and let it run, with its next reboot held again.

    Raises VirtualMachineError; the guest waits then as before, and resets are held, if QEMU still answers.
    """
    await shadow.remove(monitor)
    with monitor.events("RESET") as resets:
        try:
            # With reboot=shutdown our own system_reset would be turned into another hold.
            await monitor.execute("set-action", reboot="reset")
            await monitor.execute("system_reset")
            await resets.next(COMMAND_SECONDS)
        except BaseException:
            with contextlib.suppress(VirtualMachineError):  # the first error says what is wrong
                await hold_on_reset(monitor)
            raise
    await hold_on_reset(monitor)
    await monitor.cont()


def _event(line: bytes) -> Event | None:
    """An event of the journal; None for a greeting, an answer, or a line that was cut short."""
    try:
        message: Mapping[str, Any] = json.loads(line.strip(b"\0 "))
        return Event.of(message)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
