"""Leaving a QEMU that somebody else launched as it was: what of ours is in it is taken away, a guest that was stopped
for us goes on, and QEMU does by itself again what it does when a guest reboots, powers off or panics.

`put_back` is for a supervisor that leaves, and for its guard (perdure.supervision.guard) after one that was killed;
it may be done again. What it has to know stands in the record of the process (`Attachment`) and in a file beside it
that says why the guest is stopped, made before a stop and removed after it.

Coroutines of the monitor's loop.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from base.errors import StorageError, VirtualMachineError
from vm import disks, hold, migration, shadow
from vm.folder import RuntimeFolder
from vm.hold import Cause
from vm.monitor import COMMAND_SECONDS, Monitor
from vm.naming import Names
from vm.qemu import Record

FACT = "attached"
"""Under which an attachment stands in the record of the process."""
CAPTURE = "capture"
"""Why a guest is stopped that is not held."""
_STOPPED_STATES = ("paused", "postmigrate", "finish-migrate")

Reboots = Literal["hold", "pass"]


class Attachment(msgspec.Struct, frozen=True):
    """What is to be known of a QEMU that is not ours: the sockets that were named, what it does by itself (vm.actions),
    the names of its parts, how fast it may migrate (bytes a second), whether its reboots are held, and scrubbed."""

    socket: str
    agent: str | None
    actions: dict[str, str]
    names: Names
    bandwidth: int
    reboots: Reboots = "hold"
    scrubs: bool = False

    @property
    def holds(self) -> bool:
        """Whether what the guest does stops it, for us."""
        return self.reboots == "hold"


def attachment_of(record: Record) -> Attachment | None:
    """None for a QEMU of our own. Raises VirtualMachineError for one of another version."""
    found = record.facts.get(FACT)
    if found is None:
        return None
    try:
        return msgspec.json.decode(found, type=Attachment)
    except (ValueError, RecursionError) as error:
        raise VirtualMachineError(f"QEMU (process {record.pid}) was attached by another version of Perdure") from error


def forget(folder: RuntimeFolder) -> None:
    """Blocking: remove what is left of a VM's runtime folder after it was detached, or has ended."""
    memory = memory_folder(folder)
    if not memory.exists() and not folder.monitor.is_symlink():  # nothing of an attached VM is in it
        with suppress(OSError):
            folder.path.rmdir()
        return
    with suppress(OSError):
        for path in (folder.monitor, folder.agent, folder.process, _note(folder), *folder.path.glob("journal.json")):
            path.unlink(missing_ok=True)
        (folder.path / "parent").unlink(missing_ok=True)
        for path in memory.glob("*"):
            path.unlink()
        memory.rmdir()
        folder.path.rmdir()


def memory_folder(folder: RuntimeFolder) -> Path:
    """Where the region table of memory lies that is not ours; the memory itself is where QEMU was given it."""
    return folder.path / "attached"


def note_stopped(folder: RuntimeFolder, why: str) -> None:
    """Say why the guest is about to be stopped, or is. Raises StorageError."""
    try:
        _note(folder).write_text(why)
    except OSError as error:
        raise StorageError.from_os(error, str(_note(folder)), "write") from error


def note_going_on(folder: RuntimeFolder) -> None:
    """It goes on, or is not stopped for us."""
    _note(folder).unlink(missing_ok=True)


def stopped_for(folder: RuntimeFolder) -> str | None:
    """Why the guest is stopped, as far as that was for us: CAPTURE or a Cause; None if it was not."""
    try:
        return _note(folder).read_text()
    except OSError:
        return None


async def clean(monitor: Monitor, folder: RuntimeFolder, attachment: Attachment) -> None:
    """Take away what a capture has in QEMU, also one that was killed, and let a guest go on that was stopped for it;
    that comes as early as it can. Raises VirtualMachineError."""
    monitor.names, monitor.migration_bandwidth = attachment.names, attachment.bandwidth
    await migration.clean_up(monitor)
    if stopped_for(folder) is not None and await monitor.query_status() in _STOPPED_STATES:
        await monitor.cont()
    await disks.release(monitor, folder)


async def put_back(monitor: Monitor, folder: RuntimeFolder, attachment: Attachment) -> None:
    """All of that. Raises VirtualMachineError."""
    await clean(monitor, folder, attachment)
    if attachment.holds:
        arguments: dict[str, Any] = dict(attachment.actions)
        await monitor.execute("set-action", **arguments)
        if await monitor.query_status() in hold.HELD_STATES:
            why = stopped_for(folder)
            await _go_on_by_itself(monitor, attachment, Cause(why) if why in _CAUSES else Cause.REBOOT)
    note_going_on(folder)


_CAUSES = tuple(each.value for each in Cause)


async def _go_on_by_itself(monitor: Monitor, attachment: Attachment, cause: Cause) -> None:
    """What QEMU would have done when the guest stopped itself."""
    actions = attachment.actions
    ends = actions["shutdown"] == "poweroff"
    if cause is Cause.PANIC and actions["panic"] in ("none", "pause"):
        if actions["panic"] == "none":
            await monitor.cont()
        return
    if cause is Cause.REBOOT and actions["reboot"] == "reset":
        await shadow.remove(monitor)
        with monitor.events("RESET") as resets:
            await monitor.execute("system_reset")
            await resets.next(COMMAND_SECONDS)
        await monitor.cont()
    elif ends:
        await monitor.execute("quit")


def _note(folder: RuntimeFolder) -> Path:
    return folder.path / "stopped"
