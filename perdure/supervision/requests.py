"""What a supervisor does for others: commands on its control socket, and requests of its guest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from base.errors import QuotaError, UsageError, one_line
from base.progress import Progress
from base.units import format_size
from perdure import documents
from perdure.control import Reporter
from perdure.supervision.background import schedule_document
from perdure.supervision.disk_status import disk_status
from perdure.supervision.rollback import Rollback
from vm.channel import TokenBucket
from vm.protocol import Committed, RegionEntry, RequestRefusedError, Welcome

if TYPE_CHECKING:
    from capture.generation import Captured
    from perdure.supervision.machine import Machine
    from perdure.supervision.supervisor import Supervisor

Command = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]
"""Takes the arguments of a command and where its progress goes; gives the JSON document of its result."""


class Requests:
    """One supervisor's answers. Everything runs in its event loop."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._agent: str | None = None
        self._lines = TokenBucket(1, 20)

    def commands(self) -> dict[str, Command]:
        """Commands of the control socket by name."""
        return {
            "status": self._status,
            "stop": self._stop,
            "detach": self._detach,
            "reboot": self._reboot,
            "snapshot": self._snapshot,
            "rollback": self._rollback,
            "regions": self._regions,
            "disks": self._disks,
            "mark": self._mark,
            "unmark": self._unmark,
        }

    async def hello(self, boot_id: str, agent: str) -> Welcome:
        """From the guest: its agent has started."""
        supervisor = self._supervisor
        machine = supervisor.machine
        if self._agent != boot_id:
            self._say(f"guest agent {agent} is up")
        self._agent = boot_id
        return Welcome(supervisor.vm, machine.restored, machine.table.query())

    async def mark(self, address: int, size: int, name: str | None, owner: str) -> None:
        """From the guest: make a range persistent."""
        self._supervisor.machine.table.mark(address, size, name, owner)
        label = "" if name is None else f" {name!r}"
        self._say(f"tagged{label}: {format_size(size)} at {address:#x}")

    async def unmark(self, address: int, size: int) -> None:
        """From the guest: make a range volatile."""
        self._supervisor.machine.table.unmark(address, size)
        self._say(f"untagged {format_size(size)} at {address:#x}")

    async def query(self) -> Sequence[RegionEntry]:
        """From the guest: all devices and tags."""
        return self._supervisor.machine.table.query()

    async def frozen(self, token: int, count: int, error: str | None) -> None:
        """From the guest: its file systems are frozen, or are not."""
        self._supervisor.capturing.quiescing.frozen(token, count, error)

    async def checkpoint(self, request: int, name: str | None) -> Committed:
        """From the guest: a generation on request, committed when this returns."""
        metadata = {"checkpoint": {"request": request, "name": name}}
        try:
            done = await self._supervisor.capturing.snapshot("checkpoint", metadata=metadata)
        except QuotaError as error:
            self._say(f"checkpoint refused: {one_line(error)}")
            raise RequestRefusedError("limit", "this VM may store no more on its host: its quota is reached") from error
        return Committed(done.generation.number, done.generation.id)

    def _say(self, what: str) -> None:
        """Report something that the guest did, unless it does it too often."""
        if self._lines.has(1):
            self._supervisor.say(f"{self._supervisor.vm} {what}")

    async def _status(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del arguments, progress
        supervisor = self._supervisor
        document: dict[str, Any] = {
            "vm": supervisor.vm,
            "state": supervisor.state,
            "supervisor_since": supervisor.began,
            "repository": str(supervisor.repository.path),
        }
        if supervisor.state in ("running", "held"):
            document |= supervisor.machine.status()
            document["agent"] = self._agent
            document["disks"] = await self._followed_disks(supervisor.machine)
            document["next_capture"] = schedule_document(supervisor.timetable)
            document["write_back"] = await supervisor.draining.document()
        elif supervisor.launcher.lazy is not None:
            document["lazy"] = supervisor.launcher.lazy.status()
        return document

    def _disk_facts(self) -> list[dict[str, Any]]:
        supervisor = self._supervisor
        found = supervisor.local.disks.facts()
        return found if supervisor.filling is None else [supervisor.filling.fact(each) for each in found]

    async def _followed_disks(self, machine: Machine) -> list[dict[str, Any]]:
        followed = await disk_status(machine)
        return [each | followed.get(each["disk"], {}) for each in self._disk_facts()]

    async def _disks(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del arguments, progress
        return {"vm": self._supervisor.vm, "disks": self._disk_facts()}

    async def _stop(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        ended = await self._supervisor.stop(keep=bool(arguments.get("capture")))
        return {"vm": self._supervisor.vm, "stopped": True, "generation": ended.generation}

    async def _detach(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del arguments, progress
        await self._supervisor.detach()
        return {"vm": self._supervisor.vm, "detached": True}

    async def _reboot(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del arguments, progress
        return {"vm": self._supervisor.vm, "captured": _number(await self._supervisor.reboot())}

    async def _snapshot(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        tags = tuple(str(each) for each in arguments.get("tags", ()))
        full, memory = bool(arguments.get("full")), bool(arguments.get("memory"))
        quiesce = bool(arguments.get("quiesce"))
        done = await self._supervisor.capturing.snapshot(
            "snapshot", full=full, memory=memory, tags=tags, progress=progress, quiesce=quiesce
        )
        return documents.made(done.generation, done.seconds, done.forgotten)

    async def _rollback(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        wanted = Rollback(
            point=str(arguments["point"]),
            discard=bool(arguments.get("discard")),
            boot=bool(arguments.get("boot")),
            memory_only=bool(arguments.get("memory_only")),
            disks=tuple(str(each) for each in arguments.get("disks", ())),
            force=bool(arguments.get("force")),
            lazy=None if arguments.get("lazy") is None else bool(arguments["lazy"]),
        )
        if arguments.get("dry_run"):
            return await self._supervisor.preview(wanted)
        told = progress.notice if isinstance(progress, Reporter) else None
        done = await self._supervisor.roll_back(wanted, progress, told)
        return {
            **documents.point(done.generation),
            "goes_on_as": done.head.number,
            "resumed": done.head.full,
            "lazy": done.lazy,
            "captured": _number(done.captured),
        }

    async def _regions(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del arguments, progress
        entries: list[dict[str, Any]] = msgspec.to_builtins(self._supervisor.machine.table.query())
        return {"vm": self._supervisor.vm, "regions": entries}

    async def _mark(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name = arguments.get("name")
        self._supervisor.machine.table.mark(*_range(arguments), None if name is None else str(name))
        return await self._regions({}, progress)

    async def _unmark(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        self._supervisor.machine.table.unmark(*_range(arguments))
        return await self._regions({}, progress)


def _range(arguments: dict[str, Any]) -> tuple[int, int]:
    try:
        return int(arguments["address"]), int(arguments["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"a range needs an address and a size: {error}") from error


def _number(done: Captured | None) -> int | None:
    return None if done is None else done.generation.number
