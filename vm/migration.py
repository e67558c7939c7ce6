"""A VM's device state through QEMU's migration, over a pipe: saved from a stopped guest, loaded into a fresh QEMU.

With the capability x-ignore-shared the stream leaves out memory that lies in shared backing files; what it holds is
the state of processors and devices, ROMs, and video memory, so that it is as secret as memory: it goes over a pipe
(`getfd`, `fd:`) and is never a file. (`exec:` is not used: under `-sandbox spawn=deny` it kills QEMU.)

A save is three steps, so that only the second is in the guest's pause: `prepare`, `save`, `take_back`. Nothing of ours
stays in QEMU after the third, whatever the second did; after a supervisor that was killed between them, `clean_up` is
for the next one. Coroutines of the monitor's loop.

Source: QEMU, qapi/migration.json, docs/devel/migration.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Any

from base.errors import VirtualMachineError
from vm.monitor import Monitor

SECONDS = 60
"""For a stream of some hundred kilobytes, or some ten megabytes with video memory."""

_NAME = "perdure-state"
_URI = f"fd:{_NAME}"
_SHARED = "x-ignore-shared"
_BANDWIDTH_DEFAULT = 128 << 20  # QEMU's own
_BANDWIDTH = 1 << 40  # bytes a second: no limit, since the guest is stopped
_LOOK_SECONDS = 0.001
_ENDED = ("completed", "failed", "cancelled")


async def blockers(monitor: Monitor) -> tuple[str, ...]:
    """Why this VM's device state cannot be saved, in QEMU's words; empty if it can. Raises VirtualMachineError."""
    found = await monitor.execute("query-migrate")
    return tuple(" ".join(str(each).split()).rstrip(".") for each in found.get("blocked-reasons", ()))


async def prepare(monitor: Monitor) -> None:
    """What can be set before the guest is stopped. Raises VirtualMachineError: nothing is left then."""
    try:
        await _set_shared(monitor, True)  # first here and last in `_reset`: `clean_up` goes by it
        await _set_bandwidth(monitor, _BANDWIDTH)
    except BaseException:
        with contextlib.suppress(VirtualMachineError):  # the first error says what is wrong
            await take_back(monitor)
        raise


async def save(monitor: Monitor, write_end: int) -> None:
    """Write the device state of a stopped guest into a pipe, whose other end somebody reads meanwhile.

    `write_end` stays the caller's, who closes it now: the stream ends when QEMU closes its copy. Raises
    VirtualMachineError; the guest can go on in any case.
    """
    try:
        await monitor.give_descriptor(_NAME, write_end)
        await monitor.execute("migrate", uri=_URI)
        await _completed(monitor, "save")
    except BaseException:
        with contextlib.suppress(VirtualMachineError):
            await _abandon(monitor)
        raise
    await _activate_disks(monitor)


async def take_back(monitor: Monitor) -> None:
    """Undo `prepare`. Raises VirtualMachineError."""
    await _set_bandwidth(monitor, _BANDWIDTH_DEFAULT)
    await _set_shared(monitor, False)


async def load(monitor: Monitor, read_end: int) -> None:
    """Load a device state out of a pipe into a QEMU that was started with `-incoming defer`; the guest stays stopped.

    `read_end` stays the caller's. Raises VirtualMachineError; QEMU may have ended then, and is of no use.
    """
    await _set_shared(monitor, True)
    await monitor.give_descriptor(_NAME, read_end)
    await monitor.execute("migrate-incoming", uri=_URI)
    await _completed(monitor, "load")
    await _set_shared(monitor, False)


async def clean_up(monitor: Monitor) -> bool:
    """Take back what a supervisor left that was killed while it saved; whether there was anything.

    Raises VirtualMachineError. The guest is as it was: stopped, if it had been stopped for that.
    """
    capabilities = await monitor.execute("query-migrate-capabilities")
    if not any(each["capability"] == _SHARED and each["state"] for each in capabilities):
        return False
    await _abandon(monitor)
    await take_back(monitor)
    await _activate_disks(monitor)
    return True


async def _set_shared(monitor: Monitor, state: bool) -> None:
    await monitor.execute("migrate-set-capabilities", capabilities=[{"capability": _SHARED, "state": state}])


async def _set_bandwidth(monitor: Monitor, value: int) -> None:
    arguments: dict[str, Any] = {"max-bandwidth": value}
    await monitor.execute("migrate-set-parameters", **arguments)


async def _completed(monitor: Monitor, what: str) -> None:
    found = await _ended(monitor, _ENDED)
    if found.get("status") != "completed":
        why = found.get("error-desc") or f"it {found.get('status')}"
        raise VirtualMachineError(f"VM {monitor.vm}: QEMU could not {what} the device state: {why}")


async def _ended(monitor: Monitor, states: Collection[str]) -> dict[str, Any]:
    """What `query-migrate` says when it is in one of these states; `none` is before the first migration, and also for a
    moment after `migrate-incoming`."""
    deadline = asyncio.get_running_loop().time() + SECONDS
    while True:
        found: dict[str, Any] = await monitor.execute("query-migrate")
        if found.get("status", "none") in states:
            return found
        if asyncio.get_running_loop().time() > deadline:
            raise VirtualMachineError(f"VM {monitor.vm}: QEMU did not finish with the device state in {SECONDS} s")
        await asyncio.sleep(_LOOK_SECONDS)


async def _abandon(monitor: Monitor) -> None:
    """End a migration that may be under way, and drop the descriptor that may wait for one."""
    await monitor.execute("migrate_cancel")
    await _ended(monitor, ("none", *_ENDED))
    with contextlib.suppress(VirtualMachineError):  # `migrate` took it
        await monitor.execute("closefd", fdname=_NAME)


async def _activate_disks(monitor: Monitor) -> None:
    """QEMU 10 leaves disks to whom they were migrated until it is told; older versions take them back by `cont`."""
    try:
        await monitor.execute("blockdev-set-active", active=True)
    except VirtualMachineError as error:
        if "has not been found" not in str(error):
            raise
