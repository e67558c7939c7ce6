"""`perdure disks`: where the disks of a VM are, running or not."""

from __future__ import annotations

import fcntl
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from base.errors import ConflictError, NotFoundError
from perdure import places
from perdure.commands.vm import CONTROL
from perdure.control import call
from perdure.disks import state as disk_state
from perdure.disks.images import Disks
from perdure.output import Output, table
from vm.config import Description, Size
from vm.folder import RuntimeFolder
from vm.qemu import Qemu


def disks(options: Namespace) -> None:
    """`perdure disks VM`, `disks VM --reset DISK`, `disks VM --clean`"""
    output = Output(options.json, options.quiet)
    if options.reset or options.clean:
        _change(options, output)
        return
    found = _of(options.vm)
    output.result(found, lambda: text(found["disks"], found["left"]))


def _change(options: Namespace, output: Output) -> None:
    """Of a VM that does not run: its folder's lock is held meanwhile."""
    folder = RuntimeFolder(options.vm, places.vm_runtime(options.vm))
    folder.create()
    with _unsupervised(folder):
        if Qemu.find(folder) is not None:
            raise ConflictError(f"VM {options.vm} runs: stop it first")
        disks = Disks(Description(name=options.vm, memory=Size(0)), folder, places.vm_state(options.vm))
        reset = [disks.reset(options.reset).path] if options.reset else []
        removed = [each.overlay.path for each in disks.clean()] if options.clean else []
    output.result(
        {"vm": options.vm, "reset": options.reset, "left": reset, "removed": removed},
        lambda: [
            *(f"disk {options.reset} is the file that the description names; {path} is left over" for path in reset),
            *(f"removed {path}" for path in removed),
        ],
    )


@contextmanager
def _unsupervised(folder: RuntimeFolder) -> Iterator[None]:
    """No supervisor begins inside: the lock of the control socket's folder is held (perdure.control)."""
    directory = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(f"VM {folder.vm} runs: stop it first") from error
        yield
    finally:
        os.close(directory)


def _of(vm: str) -> dict[str, Any]:
    """From its supervisor, or what is noted on this host of a VM that does not run."""
    state = disk_state.read(places.vm_state(vm))
    left = [{"disk": each.disk, "path": each.overlay.path, "point": each.overlay.point} for each in state.left]
    try:
        return {**call(places.vm_runtime(vm) / CONTROL, "disks", {}), "left": left}
    except NotFoundError:
        if not state.disks:
            raise
    rows = [
        {
            "disk": name,
            "path": each.overlay.path,
            "format": "qcow2",
            "first_path": each.first.path,
            "state": "filled" if each.overlay.filled else "filling",
            "readonly": False,
            "went_back_to": each.overlay.point,
        }
        for name, each in state.disks.items()
    ]
    return {"vm": vm, "disks": rows, "left": left}


def text(found: list[dict[str, Any]], left: list[dict[str, Any]]) -> list[str]:
    """Lines of a table; images that are left over follow."""
    rows = [
        (
            each["disk"],
            state_text(each),
            each["path"],
            "" if each["path"] == each["first_path"] else each["first_path"] or "-",
        )
        for each in found
    ]
    lines = table(("DISK", "STATE", "PATH", "FIRST PATH"), rows)
    return lines + [f"left over: {each['path']} (disk {each['disk']}, from {each['point']})" for each in left]


def state_text(disk: dict[str, Any]) -> str:
    """How one disk stands, in words."""
    words = str(disk["state"])
    if disk.get("filled_percent") is not None and words == "filling":
        words += f" {disk['filled_percent']} %"
    if disk.get("went_back_to"):
        words += f" ({disk['went_back_to']})"
    if disk.get("held"):
        words += f", the guest waits: {disk['held']}"
    return words
