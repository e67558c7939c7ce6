"""A VM's disks as they were at one instant, while the guest writes on.

`freeze`, called while the guest is stopped, puts a copy-before-write filter between each disk and its device: what the
guest overwrites from then on is first copied into a sparse file of ours. `export` shows that instant over NBD on a
private Unix socket. If the copy fails (our file's disk is full, say), the instant is lost and not the guest's write:
readers get an error then. `release` takes everything back, whatever there is; it is also for what a supervisor left
that was killed. All names of ours begin with `perdure-`. Coroutines of the monitor's loop.

Migration refuses to run with filters in place: device state is saved before `freeze`.

Source: QEMU, qapi/block-core.json, drivers copy-before-write and snapshot-access (7.1 and newer).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.errors import StorageError, VirtualMachineError
from vm.config import Description
from vm.folder import RuntimeFolder
from vm.monitor import Monitor
from vm.naming import device_path

_OURS = "perdure-"
_OLD, _FILTER, _THEN = f"{_OURS}old-", f"{_OURS}filter-", f"{_OURS}then-"
_GONE_SECONDS = 30
_LOOK_SECONDS = 0.005


def captured(vm: Description, *, full: bool = True) -> list[str]:
    """Names of the disks that a generation has: those that the guest can write to, or, if it is not a full one, those
    of them that the description names for it."""
    return [disk.name for disk in vm.disks if not disk.readonly and (full or disk.capture)]


async def stuck(monitor: Monitor, *, timeout_s: float) -> dict[str, str]:
    """By disk, why QEMU could not do what the guest wanted of it, and so has stopped the guest. Goes on with `cont`.

    Raises VirtualMachineError.
    """
    found: dict[str, str] = {}
    if (await monitor.execute("query-status", timeout_s=timeout_s))["status"] != "io-error":
        return found  # what QEMU says of a device is not always taken back when the guest goes on
    for each in await monitor.execute("query-block", timeout_s=timeout_s):
        disk = monitor.names.disk_at(device_path(each))
        status = each.get("io-status", "ok")
        if disk is not None and status != "ok":
            why = "there is no room for what it writes" if status == "nospace" else "an input/output error"
            found[disk] = why
    return found


def sync(vm: Description) -> None:
    """Blocking: write out what the host has cached of the disks, so that QEMU has little to flush when it stops.

    An image that this does not work for costs some of the pause and nothing else.
    """
    for disk in vm.disks:
        if not disk.readonly:
            with contextlib.suppress(OSError), disk.file.open("rb") as image:
                os.fdatasync(image.fileno())


async def prepare(monitor: Monitor, folder: RuntimeFolder, disks: Sequence[str]) -> None:
    """Make the files for `freeze`, before the guest is stopped. Raises VirtualMachineError, StorageError."""
    await release(monitor, folder)
    nodes = {each["node-name"]: each for each in await monitor.execute("query-named-block-nodes", flat=True)}
    for number, disk in enumerate(disks):
        size = int(nodes[monitor.names.node(disk)]["image"]["virtual-size"])
        path = copies(folder, number)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, str(path), "make") from error


async def freeze(monitor: Monitor, folder: RuntimeFolder, disks: Sequence[str]) -> None:
    """Keep this instant of the disks of a stopped guest.

    Raises VirtualMachineError; `release` is needed in any case.
    """
    for number, disk in enumerate(disks):
        old = {"driver": "file", "filename": str(copies(folder, number)), "node-name": f"{_OLD}{number}"}
        await _add(monitor, old | {"discard": "unmap"})
        filter_ = {"driver": "copy-before-write", "node-name": f"{_FILTER}{number}", "file": monitor.names.node(disk)}
        await _add(monitor, filter_ | {"target": f"{_OLD}{number}", "on-cbw-error": "break-snapshot"})
        await _use(monitor, disk, f"{_FILTER}{number}")


async def export(
    monitor: Monitor, folder: RuntimeFolder, disks: Sequence[str], bitmaps: Mapping[str, str] | None = None
) -> None:
    """Show the instant on `folder.disks`, under the disks' names, and of some disks a bitmap of that name.

    Raises VirtualMachineError.
    """
    address = {"type": "unix", "data": {"path": str(folder.disks)}}
    await monitor.execute("nbd-server-start", addr=address)
    for number, disk in enumerate(disks):
        then = {"driver": "snapshot-access", "node-name": f"{_THEN}{number}", "file": f"{_FILTER}{number}"}
        await _add(monitor, then)  # the filter has kept the instant: showing it need not be in the pause
        arguments: dict[str, Any] = {"type": "nbd", "id": f"{_OURS}{number}", "node-name": f"{_THEN}{number}"}
        if bitmaps and disk in bitmaps:
            arguments["bitmaps"] = [{"node": monitor.names.node(disk), "name": bitmaps[disk]}]
        await monitor.execute("block-export-add", **arguments, name=disk, writable=False)


async def release(monitor: Monitor, folder: RuntimeFolder) -> bool:
    """Take back everything of ours, of whichever disks; whether there was anything in QEMU.

    Raises VirtualMachineError.
    """
    nodes = await _nodes(monitor)
    if nodes:
        for each in await monitor.execute("query-block-exports"):
            if each["id"].startswith(_OURS):
                await monitor.execute("block-export-del", id=each["id"], mode="hard")
        await _gone(monitor)
        if folder.disks.exists():  # else it was not started, or one that runs is somebody else's
            with contextlib.suppress(VirtualMachineError):
                await monitor.execute("nbd-server-stop")
        await _delete(monitor, _THEN, nodes)
        for disk in await _filtered(monitor):
            await _use(monitor, disk, monitor.names.node(disk))
        await _delete(monitor, _FILTER, nodes)
        await _delete(monitor, _OLD, nodes)
    with contextlib.suppress(OSError):
        folder.disks.unlink(missing_ok=True)
        for path in folder.path.glob(f"{_OLD}*"):
            path.unlink(missing_ok=True)
    return bool(nodes)


def copies(folder: RuntimeFolder, number: int) -> Path:
    """To which QEMU copies what the guest overwrites of the disk of that number, from `freeze` to `release`."""
    return folder.path / f"{_OLD}{number}"


async def _add(monitor: Monitor, node: dict[str, Any]) -> None:
    await monitor.execute("blockdev-add", **node)


async def _use(monitor: Monitor, disk: str, node: str) -> None:
    await monitor.execute("qom-set", path=monitor.names.device(disk), property="drive", value=node)


async def _delete(monitor: Monitor, prefix: str, there: Sequence[str]) -> None:
    for node in there:
        if node.startswith(prefix):
            arguments: dict[str, Any] = {"node-name": node}
            await monitor.execute("blockdev-del", **arguments)


async def _filtered(monitor: Monitor) -> list[str]:
    """Disks whose devices have a filter of ours between them and their disk, by what QEMU says: the description may be
    another one by now."""
    found = []
    for each in await monitor.execute("query-block"):
        disk = monitor.names.disk_at(device_path(each))
        inserted = each.get("inserted") or {}
        if str(inserted.get("node-name", "")).startswith(_FILTER) and disk is not None:
            found.append(disk)
    return found


async def _nodes(monitor: Monitor) -> list[str]:
    found = await monitor.execute("query-named-block-nodes", flat=True)
    return [str(each["node-name"]) for each in found if each["node-name"].startswith(_OURS)]


async def _gone(monitor: Monitor) -> None:
    """Wait until exports of ours are gone: QEMU closes their connections first."""
    deadline = asyncio.get_running_loop().time() + _GONE_SECONDS
    while any(each["id"].startswith(_OURS) for each in await monitor.execute("query-block-exports")):
        if asyncio.get_running_loop().time() > deadline:
            raise VirtualMachineError(f"VM {monitor.vm}: QEMU does not end the export of its disks")
        await asyncio.sleep(_LOOK_SECONDS)
