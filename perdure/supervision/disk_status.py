"""What `perdure status` says of a VM's disks: how each is followed, and what the guest has written since."""

from __future__ import annotations

from typing import Any

from base.errors import VirtualMachineError
from capture.disks import token_of
from perdure.supervision.execution import problem_of
from perdure.supervision.machine import Machine
from store.records import Generation
from vm import bitmaps, disks
from vm.bitmaps import Followed
from vm.config import Disk

_SECONDS = 1
"""For QEMU's answer: a status without it is better than none, and QEMU may be waiting itself."""


async def disk_status(machine: Machine) -> dict[str, Any]:
    """By name. `tracking` is null, and `problem` says why, where the next capture reads all of the disk; `dirty_bytes`,
    what it reads otherwise, is QEMU's count; `stuck` says why the guest waits for the disk. Raises nothing of QEMU's:
    it is asked for a moment only."""
    try:
        followed = await bitmaps.look(machine.monitor, machine.disks, timeout_s=_SECONDS)
        stuck = await disks.stuck(machine.monitor, timeout_s=_SECONDS)
    except VirtualMachineError:
        followed, stuck = {}, {}
    return {
        disk.name: _status(disk, machine.disk_bases.get(disk.name), followed.get(disk.name))
        | {"stuck": stuck.get(disk.name)}
        for disk in machine.description.disks
    }


def _status(disk: Disk, base: Generation | None, followed: Followed | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "captured": "never" if disk.readonly else "always" if disk.capture else "full",
        "tracking": None,
        "since": None if base is None else base.name,
        "dirty_bytes": None,
        "problem": None,
    }
    if disk.readonly:
        return document
    if followed is None:
        return document | {"problem": "QEMU did not say it in time"}
    token = token_of(base, disk.name)
    bitmap = None if token is None else followed.since(token)
    if bitmap is None:
        return document | {"problem": problem_of(disk.name, base, followed)}
    return document | {
        "tracking": "bitmap, kept in the image" if bitmap.kept else "bitmap, in memory",
        "dirty_bytes": bitmap.dirty_bytes,
    }
