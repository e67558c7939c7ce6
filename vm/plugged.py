"""Devices that were plugged in or out since QEMU was launched: a fresh QEMU, made by the same arguments, differs in
them, and refuses the state of the devices.

Only devices with an id are told apart, as management programs give them.

Source: QEMU, qapi/qom.json; system/qdev-monitor.c puts devices with an id under /machine/peripheral.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from vm.monitor import Monitor


async def changes(monitor: Monitor, argv: Sequence[str]) -> tuple[str, ...]:
    """Why a QEMU that is launched with these arguments could not go on from the state of this one, which was; empty if
    it can. Raises VirtualMachineError."""
    listed = await monitor.execute("qom-list", path="/machine/peripheral")
    now = {str(each["name"]) for each in listed if str(each["type"]).startswith("child<")}
    if "-readconfig" in argv:  # what that file makes is not known here
        return ()
    then = ids(argv)
    found = [f"device {name} was plugged in after the launch: unplug it, or give it in extra" for name in now - then]
    found += [f"device {name} was unplugged after the launch" for name in then - now]
    return tuple(sorted(found))


def ids(argv: Sequence[str]) -> set[str]:
    """Of the devices that arguments make."""
    found = {_id(value) for option, value in pairwise(argv) if option in ("-device", "--device")}
    return found - {""}


def _id(value: str) -> str:
    if value.lstrip().startswith("{"):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError):
            return ""
        return str(fields.get("id", "")) if isinstance(fields, dict) else ""
    return next((each.removeprefix("id=") for each in value.split(",") if each.startswith("id=")), "")
