"""Captures of disks that are cut short, on real QEMU without a guest: the supervisor killed after every single command
that it gives QEMU, QEMU killed, no room in the repository.

What a guest would write is written by QEMU's own qemu-io through the disks' devices; what the disks hold is known from
that. After each fault a new supervisor's steps are gone through: nothing of ours is left in QEMU, and the next capture
reads what was written, no less and hardly more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import store_fixtures
from conftest import Place
from judge import SOCKET, Judge

from base.disk import Disk as HostDisk
from base.errors import StorageError, VirtualMachineError
from capture.choice import Choice
from capture.disks import reads_of
from capture.generation import Captured, capture
from capture.journal import Journal
from capture.tracking import Tracking
from perdure.supervision.execution import DiskInstant, Execution, settle_bitmaps
from perdure.supervision.machine import Machine
from store.repository import Repository
from vm import disks, hold, migration
from vm.config import Disk
from vm.identity import Identity
from vm.monitor import COMMAND_SECONDS, Monitor
from vm.regions import Regions

pytestmark = pytest.mark.qemu

KIB = 1 << 10
SIZE = 2 << 20
KILLED = 99
SECONDS = 60
FORMATS = {"one": "raw", "two": "qcow2"}


class MortalMonitor(Monitor):
    """Carries out some more commands, then its supervisor, this process, is no more."""

    left: int | None = None

    async def execute(self, command: str, /, *, timeout_s: float = COMMAND_SECONDS, **arguments: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os._exit(KILLED)
        return await super().execute(command, timeout_s=timeout_s, **arguments)


class Instant(DiskInstant):
    """Knows what the disks held then, and has the guest write on while it is read."""

    def freeze(self) -> None:
        self.contents = {name: bytes(data) for name, data in self._machine.contents.items()}
        super().freeze()

    def frozen(self) -> Iterator[Any]:
        if self._machine.monitor.left is None:
            self._machine.write()
        yield from super().frozen()


class Rig:
    """One QEMU with two disks and, one after the other, its supervisors."""

    stop, cont, go_on, held, device_state = (
        Machine.stop,
        Machine.cont,
        Machine.go_on,
        Machine.held,
        Machine.device_state,
    )
    disks, find_disk_bases, go_on_if_paused = Machine.disks, Machine.find_disk_bases, Machine.go_on_if_paused

    repository: Repository
    monitor: MortalMonitor
    monitor_class = MortalMonitor

    def __init__(self, place: Place, store: store_fixtures.Place) -> None:
        self.place, self.store = place, store
        self.random, self.judge = random.Random(1), Judge(place.root)
        self.contents = {name: bytearray(SIZE) for name in FORMATS}
        for name, kind in FORMATS.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, place.root / name, str(SIZE)], check=True)
        self.description = place.describe(
            disks=tuple(Disk(name, place.root / name, kind) for name, kind in FORMATS.items()),  # type: ignore[arg-type]
            extra=("-qmp", f"unix:{place.root}/{SOCKET},server=on,wait=off"),
        )
        self.disk_bases: dict[str, Any] = {}
        self.table = SimpleNamespace(regions=Regions.of("demo", []))
        self.tracking = Tracking(
            "demo", Choice("scan", "there are no regions", False, False), {}, contextlib.ExitStack()
        )
        self.launch()

    def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A supervisor, for as long as that takes."""

        async def supervised() -> None:
            async with asyncio.timeout(SECONDS):
                await self.supervise()
                await work()
            await self.monitor.disconnect()

        with self.store.open() as self.repository:
            asyncio.run(supervised())

    def die(self, commands: int) -> bool:
        """A supervisor, in a process of its own, that is killed after so many commands of a capture; whether it was."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                self.run(lambda: self._capture_until(commands))
                os._exit(0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        return code == KILLED

    async def _capture_until(self, commands: int) -> None:
        self.monitor.left = commands
        await self.capture()
        self.monitor.left = None

    def launch(self) -> None:
        self.qemu = self.place.launch(self.description, self.place.memory)

    async def supervise(self) -> None:
        """As the launcher and the supervisor take a VM over."""
        self.monitor = await self.monitor_class.connect(self.qemu)  # type: ignore[assignment]
        await migration.clean_up(self.monitor)
        await disks.release(self.monitor, self.qemu.folder)
        await hold.hold_on_reset(self.monitor)
        self.find_disk_bases(self.repository)  # type: ignore[arg-type]
        if not await self.go_on_if_paused():  # type: ignore[arg-type]
            await self.monitor.cont()
        await settle_bitmaps(self)  # type: ignore[arg-type]

    def write(self) -> None:
        """Some of each disk, through its device as a guest writes and discards, if it runs."""
        if self.judge.execute("query-status")["status"] != "running":
            return
        for name, data in self.contents.items():
            start, size = self.random.randrange(SIZE // 512 - 20) * 512, self.random.randrange(1, 20) * 512
            byte = self.random.choice((0, *self.random.sample(range(1, 256), 3)))
            how = f"-P {byte}" if byte else "-z -u"  # zeros, and the room for them is given back
            line = f'qemu-io -d drive-{name}/virtio-backend "write {how} {start} {size}"'
            said = self.judge.execute("human-monitor-command", **{"command-line": line})
            assert said == "", said  # it writes elsewhere what is no error
            data[start : start + size] = bytes([byte]) * size

    async def capture(self) -> tuple[Captured, Instant]:
        instant = await Instant.plan(self, full=True)  # type: ignore[arg-type]
        assert isinstance(instant, Instant)
        loop = asyncio.get_running_loop()
        execution = Execution(self, loop)  # type: ignore[arg-type]
        journal = Journal(self.place.root / "journal.json", Identity(1, 2, "boot"), HostDisk())

        def work() -> Captured:
            parent = self.repository.latest("demo")
            return capture(
                *(self.repository, "demo", [], journal, execution),
                cause="test",
                parent=parent,
                full=True,
                disks=instant,
            )

        try:
            done = await asyncio.to_thread(work)
            self.disk_bases |= dict.fromkeys(done.disks, done.generation)
        finally:
            await settle_bitmaps(self)  # type: ignore[arg-type]
        return done, instant

    async def captured(self, method: str | dict[str, str]) -> None:
        """A generation that holds what the disks held, read in the way that is expected; nothing is left of it."""
        done, instant = await self.capture()
        wanted = method if isinstance(method, dict) else dict.fromkeys(FORMATS, method)
        assert {name: each["method"] for name, each in reads_of(done.generation).items()} == wanted
        for name in FORMATS:
            assert store_fixtures.content(self.repository, done.generation, f"disk:{name}") == instant.contents[name]
        await self.nothing_is_left()

    async def nothing_is_left(self) -> None:
        """But for one bitmap a disk, which follows it."""
        nodes = await self.monitor.execute("query-named-block-nodes", flat=True)
        bitmaps = {
            each["node-name"]: [bitmap["name"].rpartition("-")[0] for bitmap in each.get("dirty-bitmaps", ())]
            for each in nodes
        }
        assert bitmaps == {
            "file-one": [],
            "file-two": [],
            "disk-one": ["perdure-since"],
            "disk-two": ["perdure-kept"],
        }
        assert await self.monitor.execute("query-block-exports") == []
        assert await self.monitor.execute("query-jobs") == []
        capabilities = await self.monitor.execute("query-migrate-capabilities")
        assert [each["capability"] for each in capabilities if each["state"]] == []
        assert await self.monitor.query_status() == "running"
        assert not list(self.qemu.folder.path.glob("perdure-*"))


@pytest.fixture
def rig(place: Place) -> Iterator[Rig]:
    with store_fixtures.place() as store:
        yield Rig(place, store)


def test_a_supervisor_that_is_killed_after_any_command_leaves_nothing_and_loses_nothing(rig: Rig) -> None:
    async def first() -> None:
        rig.write()
        await rig.captured("rescan")

    async def next_one() -> None:
        await rig.nothing_is_left()
        rig.write()
        await rig.captured("bitmap")

    rig.run(first)
    killed = 0
    for commands in range(1000):
        rig.write()
        if not rig.die(commands):
            break
        killed += 1
        rig.write()
        rig.run(next_one)
    assert killed > 30


def test_a_repository_that_is_full_costs_a_generation_and_nothing_else(place: Place, short_folder: Path) -> None:
    small = short_folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], check=True)
    try:
        rig = Rig(place, store_fixtures.Place(small, store_fixtures.SETTINGS))

        async def fill_up() -> None:
            rig.write()
            await rig.captured("rescan")
            rig.write()
            with (small / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while ballast.write(os.urandom(4 * KIB)):
                    pass
            with pytest.raises(StorageError):
                await rig.capture()
            await rig.nothing_is_left()
            (small / "ballast").unlink()
            rig.write()
            await rig.captured("bitmap")

        rig.run(fill_up)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_qemu_that_is_killed_in_a_capture_is_followed_by_one_whose_disks_are_read_in_full(rig: Rig) -> None:
    async def killed() -> None:
        rig.write()
        await rig.captured("rescan")
        rig.write()
        instant = Instant.freeze

        def freeze(self: Instant) -> None:
            instant(self)
            rig.qemu.kill()

        with pytest.MonkeyPatch.context() as patch, pytest.raises(VirtualMachineError, match="SIGKILL"):
            patch.setattr(Instant, "freeze", freeze)
            await rig.capture()

    async def again() -> None:
        rig.write()
        await rig.captured("rescan")

    rig.run(killed)
    rig.qemu.close()
    rig.launch()
    rig.run(again)
