"""Shared by the end-to-end tests: guests that boot in a second or two, and private places for them to run in.

A guest is the kernel of the built test guest (scripts/build-guest, under a lock of its own, so that it runs once
for all test processes) with either its initramfs or a tiny one made here: busybox and one script as /init.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from supervised import CPU, QEMU, QUICK, QUICK_APPEND

from base.disk import Disk
from vm import firmware, qemu
from vm.command_line import Platform, command_line
from vm.config import Description, Size
from vm.folder import RuntimeFolder
from vm.memory import Memory
from vm.monitor import Monitor
from vm.qemu import Qemu

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
BOOT_SECONDS = 120
"""For a guest to come up; a second or two where nothing else runs."""

PROLOGUE = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox --install -s /bin
exec >/dev/ttyS0 2>&1
"""


@dataclass(frozen=True)
class GuestImage:
    """The built test guest. `kernel` starts sooner; `packed` is the same as a bzImage, as distributions have it, which
    unpacks itself: for UEFI, and where main memory is to hold nothing before the first instruction."""

    kernel: Path
    initrd: Path
    busybox: Path
    packed: Path
    append: str = QUICK_APPEND
    settings: str = QUICK


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The test guest, built if it is not there yet."""
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    cache = ROOT / ".cache" / "guest"
    return GuestImage(cache / "vmlinux", cache / "initrd.img", cache / "base" / "bin" / "busybox", cache / "vmlinuz")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder in tmpfs with a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="p-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@dataclass
class Place:
    """Where one VM of a test runs; launches it and knows how to take everything back."""

    vm: str
    image: GuestImage
    root: Path
    folder: RuntimeFolder = field(init=False)
    memory: Memory | None = None

    def __post_init__(self) -> None:
        self.folder = RuntimeFolder(self.vm, self.root / self.vm)
        self.folder.create()

    def describe(self, script: str | None = None, **settings: Any) -> Description:
        """A VM of 256 MiB that boots into a script; `settings` go over that."""
        kernel: dict[str, Any] = {}
        if script is not None:
            kernel = {
                "kernel": self.image.kernel if settings.get("firmware", "seabios") == "seabios" else self.image.packed,
                "initrd": self.initramfs(script),
                "append": self.image.append,
            }
        usual = {"name": self.vm, "memory": Size(256 * MIB), "accelerator": "tcg", "cpu": CPU, "qemu": str(QEMU)}
        return Description(**(usual | kernel | settings))

    def initramfs(self, script: str) -> Path:
        """Busybox and a script that is run as /init, its output on the console."""
        path = self.root / f"{self.vm}.cpio"
        entries = [
            ("bin", 0o40755, b""),
            ("dev", 0o40755, b""),
            ("bin/busybox", 0o100755, self.image.busybox.read_bytes()),
        ]
        entries += [("init", 0o100755, (PROLOGUE + script).encode()), ("TRAILER!!!", 0, b"")]
        path.write_bytes(b"".join(_newc(number, *entry) for number, entry in enumerate(entries, 1)))
        return path

    def launch(self, description: Description, memory: Memory | None = None) -> Qemu:
        """Memory, QEMU, paused; Perdure's own way, by hand."""
        self.memory = memory or Memory.prepare(self.vm, self.folder.memory, description.backing_sizes)
        binary = qemu.find_binary(self.vm, description.qemu)
        firm = firmware.find(self.vm, description.firmware)
        platform = Platform(
            binary=binary,
            version=qemu.version(self.vm, binary),
            machine=qemu.resolve_machine(self.vm, binary, description.machine),
            accelerator="tcg",
            cpu=description.cpu or "max",
            firmware=firm,
            variables=firmware.variables(self.vm, firm, self.root, Disk()),
            uuid=str(uuid.uuid4()),
        )
        argv = command_line(description, platform, self.folder, self.memory.files)
        return Qemu.launch(self.folder, argv, Disk())

    def console(self) -> str:
        """What the guest has written so far."""
        path = self.folder.console
        return path.read_text(errors="replace") if path.exists() else ""

    async def said(self, text: str, times: int = 1) -> None:
        """Wait until the guest has written something, so many times."""
        try:
            async with asyncio.timeout(BOOT_SECONDS):
                while self.console().count(text) < times:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            found = self.console()
            raise AssertionError(f"{text!r} is {found.count(text)} and not {times} times in: {found[-800:]}") from None

    def remove(self) -> None:
        """End QEMU, whoever started it, and give the memory back."""
        running = Qemu.find(self.folder)
        if running is not None:
            with running:
                running.kill()
        Memory(self.vm, self.folder.memory, {}).release()


@pytest.fixture
def place(guest_image: GuestImage, short_folder: Path) -> Iterator[Place]:
    """Room for one VM, named demo."""
    made = Place("demo", guest_image, short_folder)
    yield made
    made.remove()


@pytest.fixture
def judge(short_folder: Path) -> Callable[[Monitor, int, int], Coroutine[Any, Any, bytes]]:
    """`await judge(monitor, address, size)`: guest-physical memory, as QEMU's own pmemsave sees it."""

    async def read(monitor: Monitor, address: int, size: int) -> bytes:
        path = short_folder / f"dump-{uuid.uuid4().hex}"
        await monitor.execute("pmemsave", val=address, size=size, filename=str(path))
        content = path.read_bytes()
        path.unlink()
        return content

    return read


def _newc(number: int, name: str, mode: int, content: bytes) -> bytes:
    """One member of a cpio archive. Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % each for each in fields) + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
