"""Filling the images of disks that went back, beside the guest: QEMU's block-stream, and the servers behind it.

Two tasks of the supervisor's loop: one keeps servers alive and never speaks to QEMU, which may be waiting for one of
them; the other begins jobs, sees which images are filled, and lets go of their servers. A full capture ends the jobs
and they begin again after it: migration refuses to run beside them, and what is filled stays filled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from base.errors import PerdureError, VirtualMachineError, one_line
from perdure.disks.images import Disks
from vm import overlays
from vm.config import Description
from vm.monitor import Monitor

_LOOK_SECONDS = 0.5
_WATCH_SECONDS = 0.2
_END_SECONDS = 60


class Filling:
    """The images of one running VM."""

    def __init__(self, monitor: Monitor, disks: Disks, description: Description, say: Callable[[str], None]) -> None:
        self._monitor, self._disks, self._say = monitor, disks, say
        self._vm, self._bandwidth = description.name, int(description.policy.fill_bandwidth)
        self._jobs: dict[str, tuple[int, int]] = {}
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._said: dict[str, str] = {}

    def begin(self) -> None:
        """Fill, until everything is."""
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._fill())]

    async def close(self) -> None:
        """Leave it as it is; jobs go on in QEMU."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def busy(self) -> bool:
        """Whether there may be a disk that is not filled."""
        return not all(task.done() for task in self._tasks)

    @asynccontextmanager
    async def paused(self, *, while_: bool = True) -> AsyncIterator[None]:
        """No job runs inside, if `while_`. Raises VirtualMachineError."""
        if not while_:
            yield
            return
        async with self._turn:
            await self._end_jobs()
            yield

    def fact(self, document: dict[str, Any]) -> dict[str, Any]:
        """What perdure.disks.images says of a disk, with how far it is, and why the guest waits for it."""
        done, total = self._jobs.get(document["disk"], (0, 0))
        if document["state"] == "filling" and total:
            document = document | {"filled_percent": 100 * done // total}
        why = self._said.get(document["disk"])
        return document if why is None else document | {"held": why}

    async def _watch(self) -> None:
        while await asyncio.to_thread(self._disks.unfilled):
            try:
                said = await asyncio.to_thread(self._disks.watch)
                held = await asyncio.to_thread(self._disks.held)
            except PerdureError as error:
                said, held = [one_line(error)], self._said
            for line in said:
                self._say(f"{self._vm}: {line}")
            for name, why in held.items():
                if self._said.get(name) != why:
                    self._say(f"{self._vm}: disk {name} cannot be read, and the guest waits for it: {why}")
            for name in self._said.keys() - held.keys():
                self._say(f"{self._vm}: disk {name} can be read again")
            self._said = dict(held)
            await asyncio.sleep(_WATCH_SECONDS)

    async def _fill(self) -> None:
        failed = ""
        while await asyncio.to_thread(self._disks.unfilled):
            try:
                async with self._turn:
                    await self._look()
                failed = ""
            except PerdureError as error:
                if one_line(error) != failed:
                    failed = one_line(error)
                    self._say(f"{self._vm}: disks are not being filled: {failed}")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self) -> None:
        """Begin jobs that are not under way, and end what is done."""
        unfilled = await asyncio.to_thread(self._disks.unfilled)
        self._jobs = await overlays.jobs(self._monitor)
        behind = await overlays.unfilled(self._monitor)
        for name, token in unfilled.items():
            if name in self._jobs:
                continue
            if name in behind:
                await overlays.begin(self._monitor, name, self._bandwidth)
                continue
            with suppress(VirtualMachineError):  # an earlier supervisor may have come as far as this
                await overlays.let_go(self._monitor, name)
            await asyncio.to_thread(self._disks.note_filled, name, token)
            self._say(f"{self._vm}: disk {name} is filled, and needs its generation no longer")
        if not await asyncio.to_thread(self._disks.unfilled):
            await asyncio.to_thread(self._disks.watch)

    async def _end_jobs(self) -> None:
        deadline = asyncio.get_running_loop().time() + _END_SECONDS
        asked: set[str] = set()
        while running := await overlays.jobs(self._monitor):
            for name in running.keys() - asked:
                asked.add(name)
                with suppress(VirtualMachineError):  # it may just have ended
                    await overlays.end(self._monitor, name)
            if asyncio.get_running_loop().time() > deadline:
                raise VirtualMachineError(f"VM {self._vm}: QEMU does not end the filling of disk {', '.join(running)}")
            await asyncio.sleep(0.01)
