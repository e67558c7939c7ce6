"""A supervised machine for tests without QEMU: a process that maps a file as QEMU does, and on it the real tracker,
journal, region table, store, `Machine` and `Capturing`."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from store_fixtures import content, place

from base.disk import Disk
from base.progress import silent
from base.units import PAGE
from capture.choice import Facts, Kernel
from capture.journal import Journal
from capture.tracking import start_tracking
from perdure.supervision.capturing import Capturing
from perdure.supervision.machine import Machine
from store.records import Generation
from store.repository import Repository
from vm.command_line import Platform
from vm.config import Description, Region, Size
from vm.firmware import Firmware
from vm.identity import Identity
from vm.memory import BackingFile, Memory
from vm.regions import INFO_BLOCK, Device, RegionTable

SIZE = 16 << 20
ADDRESS = 1 << 32
DEVICES = [Device("pm0", ADDRESS, SIZE)]
AREA = ADDRESS + INFO_BLOCK, 1 << 20
"""A range that tests tag: address and size."""
INSIDE, OUTSIDE = INFO_BLOCK // PAGE + 88, SIZE // PAGE - 88
"""A page of it, and one that is never tagged."""

PLATFORM = Platform(Path("qemu"), "7.2", "pc-q35-7.2", "tcg", "max", Firmware("seabios"), None, "uuid")

T = TypeVar("T")
"""Result of work that is sent to the repository's thread."""

_PROCESS = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(file, os.fstat(file).st_size, mmap.MAP_SHARED)
print("ready", flush=True)
for line in sys.stdin:
    page, byte = map(int, line.split())
    memory[page * 4096 : (page + 1) * 4096] = bytes([byte]) * 4096
    print("done", flush=True)
"""


class NoDevices:
    """What a QEMU without disks, networks and devices says."""

    async def execute(self, *_: object, **__: object) -> list[object]:
        return []

    async def human(self, *_: object, **__: object) -> str:
        return ""


class Supervised:
    """One region, `pm0`, of a guest that writes what it is told to, and stands still else. `served`: what others ask of
    its supervisor, one after the other, each while a piece of work is done in the repository's thread."""

    def __init__(self, folder: Path, repository: Repository, disk: Disk) -> None:
        self.repository = repository
        self.served: list[Callable[[], None]] = []
        self.path = folder / "pm0.memory"
        self.path.touch()
        os.truncate(self.path, SIZE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(self.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answered("ready\n")
        identity, kernel = Identity.of(self.process.pid), Kernel.probe()
        self.journal = Journal(folder / "journal.json", identity, disk)
        self.table = RegionTable.create(folder / "regions.json", "vm", DEVICES, disk=disk)
        tracking = start_tracking("vm", identity, {"pm0": self.path}, Facts(kernel), self.journal, running=True)
        assert tracking.choice.kind == "userfaultfd" or not kernel.pagemap_scan, tracking.choice.reason
        description = Description(name="vm", memory=Size(0), regions=(Region("pm0", Size(SIZE)),))
        self.machine = Machine(
            description=description,
            described=description,
            platform=PLATFORM,
            qemu=SimpleNamespace(vm="vm", pid=self.process.pid),
            monitor=NoDevices(),
            memory=Memory("vm", folder, {"pm0": BackingFile("pm0", self.path, SIZE)}),
            table=self.table,
            addresses=None,
            holds=None,
            journal=self.journal,
            tracking=tracking,
            parent=None,
            bases={},
            restored=None,
            resumed=False,
            full_problems=(),
            warnings=(),
            accelerator_reason="",
            measurements={},
        )
        self.vm, self.state, self.local, self.filling = "vm", "held", self, None
        self.description, self.policy, self.draining = description, description.policy, self
        self.operation, self.progress = asyncio.Lock(), silent
        self.said: list[str] = []
        self.say = self.said.append

    def write(self, page: int, byte: int) -> None:
        """As the guest does."""
        self.process.stdin.write(f"{page} {byte}\n")
        self.process.stdin.flush()
        self._answered("done\n")

    def capture(self) -> Generation:
        """As a supervisor does it of a guest that is held."""

        async def make() -> Generation:
            capturing = Capturing(self)
            done = await capturing.snapshot("test")
            await capturing.settle()
            return done.generation

        return asyncio.run(make())

    def captured_page(self, generation: Generation, page: int) -> int:
        """What a generation has of a page that is full of one byte."""
        [byte] = set(content(self.repository, generation, "pm0")[page * PAGE : (page + 1) * PAGE])
        return byte

    # Supervisor, as far as captures need one

    async def in_store(self, work: Callable[[], T]) -> T:
        """What others ask meanwhile is served then."""
        done = work()
        if self.served:
            self.served.pop(0)()
        return done

    def take(self) -> None:
        """Nothing is stored ahead."""

    def close(self) -> None:
        self.machine.tracking.close()
        self.process.kill()
        self.process.communicate()

    def _answered(self, line: str) -> None:
        assert self.process.stdout.readline() == line


@contextmanager
def supervised(disk: Disk | None = None) -> Iterator[Supervised]:
    """A machine whose tracker has begun; nothing is captured or tagged yet."""
    with place() as where, where.open() as repository, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = Supervised(Path(folder), repository, disk or Disk())
        try:
            yield made
        finally:
            made.close()
