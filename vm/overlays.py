"""Images of disks that went back to a generation: qcow2 files whose rest is read over NBD until they are filled.

Until then an image is worth nothing without the server behind it, and says so itself: its header names the socket, so
that a program which opens it alone fails instead of reading zeros. QEMU is given the server's node by name
(`node`), with a patience of years: while there is no server, the guest waits.

Coroutines of the monitor's loop; the others block. Source: QEMU, qapi/block-core.json (nbd, block-stream), qemu-img(1).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from base.disk import Disk
from base.errors import StorageError, VirtualMachineError
from vm.monitor import Monitor

_OURS = "fill-"
_PATIENCE_SECONDS = 10 * 365 * 86400
_OPEN_SECONDS = 20
_TOOL_SECONDS = 120


def base_of(disk: str) -> str:
    """Block node of what a disk's image is filled from."""
    return f"base-{disk}"


def job_of(disk: str) -> str:
    """Id of the job that fills a disk's image."""
    return f"{_OURS}{disk}"


def node(disk: str, socket: Path, export: str) -> dict[str, Any]:
    """The block node of what stands behind an image, as -blockdev has it."""
    return {
        "driver": "nbd",
        "node-name": base_of(disk),
        "server": {"type": "unix", "path": str(socket)},
        "export": export,
        "read-only": True,
        "reconnect-delay": _PATIENCE_SECONDS,
        "open-timeout": _OPEN_SECONDS,
    }


def create(disk: Disk, path: Path, size: int, socket: Path, export: str) -> None:
    """Blocking: a new, private image of `size` bytes that has nothing yet; durable.

    Raises StorageError, VirtualMachineError (there is no qemu-img).
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "make") from error
    try:
        behind = f"nbd+unix:///{export}?socket={socket}"
        _tool("create", "-q", "-u", "-f", "qcow2", "-b", behind, "-F", "raw", str(path), str(size), about=path)
        disk.fsync(descriptor, path)
        disk.fsync_directory(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


async def begin(monitor: Monitor, disk: str, bandwidth: int) -> None:
    """Begin to fill an image, `bandwidth` bytes a second at most (0: no limit). Raises VirtualMachineError."""
    arguments: dict[str, Any] = {"job-id": job_of(disk), "device": f"disk-{disk}", "speed": bandwidth}
    await monitor.execute("block-stream", **arguments)


async def jobs(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """By disk, (bytes done, bytes in all) of the images that are being filled. Raises VirtualMachineError."""
    return {
        each["device"].removeprefix(_OURS): (int(each["offset"]), int(each["len"]))
        for each in await monitor.execute("query-block-jobs")
        if each["device"].startswith(_OURS)
    }


async def end(monitor: Monitor, disk: str) -> None:
    """Ask the job to end as it is; what is filled stays. That it has is seen in `jobs`. Raises VirtualMachineError."""
    await monitor.execute("block-job-cancel", device=job_of(disk))


async def unfilled(monitor: Monitor) -> list[str]:
    """Disks whose images still read from a server. Raises VirtualMachineError."""
    nodes = await monitor.execute("query-named-block-nodes", flat=False)
    return [
        each["node-name"].removeprefix("disk-")
        for each in nodes
        if each["node-name"].startswith("disk-") and "backing-image" in each["image"]
    ]


async def let_go(monitor: Monitor, disk: str) -> None:
    """End QEMU's connection to the server of a filled image. Raises VirtualMachineError."""
    arguments: dict[str, Any] = {"node-name": base_of(disk)}
    await monitor.execute("blockdev-del", **arguments)


def _tool(*words: str, about: Path) -> None:
    try:
        done = subprocess.run(
            ["qemu-img", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TOOL_SECONDS
        )
    except FileNotFoundError as error:
        raise VirtualMachineError(f"{about}: there is no program qemu-img: install package qemu-utils") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VirtualMachineError(f"{about}: qemu-img {words[0]} failed: {error}") from error
    if done.returncode:
        raise VirtualMachineError(f"{about}: qemu-img {words[0]} failed: {' '.join(done.stderr.split())}")
