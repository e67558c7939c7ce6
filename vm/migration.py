"""A VM's device state through QEMU's migration: saved from a stopped guest, loaded into a fresh QEMU.

With the capability x-ignore-shared the stream leaves out memory that lies in shared backing files; what it holds is
the state of processors and devices, ROMs, flash and video memory, so that it is as secret as memory: it goes into a
memory file without a name, out of it over a pipe, and is never on a disk. (`exec:` is not used: under `-sandbox
spawn=deny` it kills QEMU.)

A save is three steps, so that only the second is in the guest's pause: `prepare`, `save`, `take_back`. Nothing of ours
stays in QEMU after the third, whatever the second did; after a supervisor that was killed between them, `clean_up` is
for the next one. Coroutines of the monitor's loop.

Source: QEMU, qapi/migration.json, docs/devel/migration.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Collection
from typing import Any

from base import private
from base.errors import VirtualMachineError
from vm.command_line import VARIABLES_NODE
from vm.monitor import Monitor

SECONDS = 60
"""For a stream of some hundred kilobytes, or some ten megabytes with video memory."""
STATE_BYTES_MAX = 1 << 30
"""More is no state of devices, and is not kept."""

_NAME = "perdure-state"
_URI = f"fd:{_NAME}"
_FILES, _ACTIVATES = (8, 2), (10, 0)
"""From which version of QEMU on it migrates to files, and has `blockdev-set-active`."""
_SHARED = "x-ignore-shared"
_BANDWIDTH = 1 << 40  # bytes a second: no limit, since the guest is stopped
_LOOK_SECONDS = 0.001
_ENDED = ("completed", "failed", "cancelled")


async def obstacles(monitor: Monitor, disks: Collection[str]) -> tuple[str, ...]:
    """Why this VM's device state cannot be saved, or not with all that belongs to that instant; empty if it can.

    `disks` are the block nodes that are captured with it. Raises VirtualMachineError.
    """
    known = (VARIABLES_NODE, *disks)
    found = await monitor.execute("query-migrate")
    problems = [" ".join(str(each).split()).rstrip(".") for each in found.get("blocked-reasons", ())]
    for each in await monitor.execute("query-block"):
        inserted = each.get("inserted")
        if inserted is not None and not inserted.get("ro") and inserted.get("node-name") not in known:
            name = str(each.get("qdev") or each.get("device") or inserted.get("node-name"))
            name = name.removesuffix("/virtio-backend").rpartition("/")[2]
            problems.append(f"disk {name} is writable, and only disks under [[disk]] are captured")
    return tuple(problems)


async def prepare(monitor: Monitor) -> None:
    """What can be set before the guest is stopped. Raises VirtualMachineError: nothing is left then."""
    limit = int((await monitor.execute("query-migrate-parameters"))["max-bandwidth"])
    if limit != _BANDWIDTH:
        monitor.migration_bandwidth = limit
    try:
        await _set_shared(monitor, True)  # first here and last in `_reset`: `clean_up` goes by it
        await _set_bandwidth(monitor, _BANDWIDTH)
    except BaseException:
        with contextlib.suppress(VirtualMachineError):  # the first error says what is wrong
            await take_back(monitor)
        raise


async def save(monitor: Monitor) -> int:
    """The device state of a stopped guest, in a memory file without a name that the caller closes.

    Raises VirtualMachineError, StorageError; the guest can go on in any case.
    """
    memory = private.file(f"devices of VM {monitor.vm}")
    try:
        await _write_state(monitor, memory)
        size = os.fstat(memory).st_size
        if size > STATE_BYTES_MAX:
            raise VirtualMachineError(f"VM {monitor.vm}: its device state has {size} bytes: {STATE_BYTES_MAX} at most")
    except BaseException:
        os.close(memory)
        raise
    return memory


async def _write_state(monitor: Monitor, memory: int) -> None:
    """Have QEMU write it, itself: with a pipe and a reader in between, 4 MiB of UEFI's flash took twice as long."""
    try:
        await monitor.execute("migrate", uri=await _given(monitor, memory))
        await _completed(monitor, "save")
    except BaseException:
        with contextlib.suppress(VirtualMachineError):
            await _abandon(monitor)
        raise
    await _activate_disks(monitor)


async def _given(monitor: Monitor, memory: int) -> str:
    """The address of a memory file for `migrate`: since 8.2 QEMU has one for files, and `fd:` is for streams.

    Raises VirtualMachineError."""
    if monitor.version < _FILES:
        await monitor.give_descriptor(_NAME, memory)
        return _URI
    try:
        writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise VirtualMachineError(f"VM {monitor.vm}: no file for its device state: {error.strerror}") from error
    try:
        return f"file:/dev/fdset/{await monitor.add_descriptor(_NAME, writable)}"
    finally:
        os.close(writable)


async def take_back(monitor: Monitor) -> None:
    """Undo `prepare`, and let go of what QEMU was given. Raises VirtualMachineError."""
    await _set_bandwidth(monitor, monitor.migration_bandwidth)
    for each in await monitor.execute("query-fdsets"):
        if any(one.get("opaque") == _NAME for one in each["fds"]):
            arguments: dict[str, Any] = {"fdset-id": each["fdset-id"]}
            await monitor.execute("remove-fd", **arguments)
    await _set_shared(monitor, False)


async def load(monitor: Monitor, state: bytes) -> None:
    """Load a device state into a QEMU that was started with `-incoming defer`; the guest stays stopped.

    Raises VirtualMachineError; QEMU may have ended then, or hang, and is of no use.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    given_up = os.eventfd(0, os.EFD_CLOEXEC)
    writing = asyncio.create_task(asyncio.to_thread(_write_all, write_end, state, given_up))
    try:
        try:
            await _set_shared(monitor, True)
            await monitor.give_descriptor(_NAME, read_end)
            await monitor.execute("migrate-incoming", uri=_URI)
            await _completed(monitor, "load")
            await _set_shared(monitor, False)
        finally:
            os.close(read_end)
            os.eventfd_write(given_up, 1)  # a QEMU that hangs has a copy of the pipe, and does not read it
            await writing
    finally:
        os.close(given_up)


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
    clock = asyncio.get_running_loop().time
    deadline = clock() + SECONDS
    while True:
        asked = clock()
        found: dict[str, Any] = await monitor.execute("query-migrate")
        if found.get("status", "none") in states:
            return found
        deadline += clock() - asked  # an answer has a time limit of its own, which is not always the same
        if clock() > deadline:
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
    if monitor.version >= _ACTIVATES:
        await monitor.execute("blockdev-set-active", active=True)


def _write_all(write_end: int, data: bytes, given_up: int) -> None:
    """All of it into a pipe, which is closed then, unless its reader is gone, or there is something to read in
    `given_up`."""
    os.set_blocking(write_end, False)
    poll = select.poll()
    poll.register(write_end, select.POLLOUT)
    poll.register(given_up, select.POLLIN)
    with open(write_end, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
        view = memoryview(data)
        while view and given_up not in dict(poll.poll()):
            view = view[pipe.write(view) or 0 :]
