"""The held reboot: why the guest is stopped, what of its memory may be scrubbed, how it goes on.

QEMU runs with `-action reboot=shutdown,shutdown=pause,panic=pause`: every reboot and poweroff of the guest stops it
with a SHUTDOWN event, whose reason says which it was, and a panic with GUEST_PANICKED (also with panic=shutdown: no
SHUTDOWN comes while shutdown=pause). Scrubbing comes before `resume_after_hold`, since the reset reloads firmware
and option ROMs into guest memory.

The coroutines belong to the monitor's event loop; the rest is pure.

Source: QEMU, qapi/run-state.json; SeaBIOS, src/resume.c and src/fw/shadow.c.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from base import extents
from base.errors import VirtualMachineError
from base.extents import Extents
from vm.addresses import AddressMap
from vm.config import RAM
from vm.firmware import Kind
from vm.monitor import DeadlineError, Event, Events, Monitor

RESET_SECONDS = 10
SECOND_RESET_SECONDS = 20
"""SeaBIOS resets again some 30 ms after the guest goes on; this is for a host that is busy."""

HOLD_EVENTS = ("SHUTDOWN", "GUEST_PANICKED")
"""What to listen for, and to give to `classify`."""
HELD_STATES = ("shutdown", "guest-panicked")
"""QEMU's run states while the guest is held."""

SEABIOS_KEPT = (0xC0000, 0x100000)
"""Guest-physical range that SeaBIOS runs from after a reset: the chipset still shows memory there and not the ROM,
and the code in it brings the ROM back and resets once more. Punched out, the boot hangs."""


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
        await events.next(RESET_SECONDS)


async def hold_on_reset(monitor: Monitor) -> None:
    """From now on the guest's resets are held, whatever was set before: for a VM that is taken over."""
    await monitor.execute("set-action", reboot="shutdown", shutdown="pause", panic="pause")


async def resume_after_hold(
    monitor: Monitor, firmware: Kind, *, second_reset_seconds: float = SECOND_RESET_SECONDS
) -> bool:
    """Reset the held guest and let it run, with its next reboot held again.

    Gives whether the firmware did what was expected of it: False if SeaBIOS did not reset a second time, in which
    case that reset, if it is only late, shows as a reboot of the guest. Raises VirtualMachineError; resets are held
    again then too, if QEMU still answers.
    """
    with monitor.events("RESET") as resets:
        try:
            as_expected = await _reset(monitor, firmware, resets, second_reset_seconds)
        except BaseException:
            with contextlib.suppress(VirtualMachineError):  # the first error says what is wrong
                await hold_on_reset(monitor)
            raise
    await hold_on_reset(monitor)
    return as_expected


async def _reset(monitor: Monitor, firmware: Kind, resets: Events, second_reset_seconds: float) -> bool:
    # With reboot=shutdown our own system_reset would be turned into another hold.
    await monitor.execute("set-action", reboot="reset")
    await monitor.execute("system_reset")
    await resets.next(RESET_SECONDS)
    await monitor.cont()
    if firmware != "seabios":
        return True
    try:
        await resets.next(second_reset_seconds, guest=True)
    except DeadlineError:
        return False
    return True


def scrubbable_ram(firmware: Kind, addresses: AddressMap) -> Extents:
    """What of main memory's backing file may be punched out while the guest is held, as file offsets."""
    spans = addresses.of(RAM)
    everything = extents.normalise([(span.offset, span.offset + span.size) for span in spans])
    if firmware != "seabios":
        return everything
    start, end = SEABIOS_KEPT
    _, offset = addresses.locate(start, end - start)
    return extents.subtract(everything, extents.normalise([(offset, offset + end - start)]))


def _event(line: bytes) -> Event | None:
    """An event of the journal; None for a greeting, an answer, or a line that was cut short."""
    try:
        message: Mapping[str, Any] = json.loads(line.strip(b"\0 "))
        return Event.of(message)
    except (ValueError, KeyError, TypeError):
        return None
