"""Disks at one instant on real QEMU, without a supervisor: the NBD client against QEMU's own tools, and no room."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, Place
from guest_fixtures import load

from base.errors import VirtualMachineError
from base.extents import total
from vm import disks
from vm.config import Disk
from vm.identity import ended
from vm.monitor import Monitor
from vm.nbd import Export

pytestmark = pytest.mark.qemu

client = load(Path(__file__).resolve().parents[1] / "guest" / "client.py")
SECONDS = 120
SIZE = 200 * MIB + 512
"""Neither a multiple of a page nor of what is read at once."""
WRITER = """
import os, threading
disk, steps = os.open("/dev/vda", os.O_RDWR | os.O_DSYNC), [0]
def write():
    while True:
        steps[0] += 1
        os.pwrite(disk, os.urandom(65536), steps[0] * 7 % 100 * 65536)
threading.Thread(target=write, daemon=True).start()
"""


@pytest.fixture
def image(short_folder: Path) -> Path:
    """A raw image with data at its beginning, its end, and between."""
    path, data = short_folder / "raw", random.Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at, size in ((0, 3 * MIB), (5 * MIB + 4096, 5 * MIB), (20 * MIB, MIB), (SIZE - 8704, 8704)):
            file.seek(at)
            file.write(data.randbytes(size))
    return path


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_export_is_read_as_it_is(image: Path, short_folder: Path, kind: str) -> None:
    path, address, copy = short_folder / f"disk.{kind}", short_folder / "nbd.sock", short_folder / "copy"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, image, path], check=True)
    words = ["qemu-nbd", "-r", "-t", "-x", "disk", "-f", kind, "-k", str(address), "--fork", "--pid-file", "pid"]
    subprocess.run([*words, str(path)], check=True, cwd=short_folder)
    try:
        with Export("demo", address, "disk") as export, copy.open("wb") as file:
            assert export.size == SIZE
            file.truncate(SIZE)
            there = export.data(0, SIZE)
            assert 8 * MIB < total(there) < 16 * MIB
            export.read_into(file.fileno(), there)
        assert copy.read_bytes() == image.read_bytes()
        with pytest.raises(VirtualMachineError, match=r"VM demo: disk other: .*not present"):
            Export("demo", address, "other")
    finally:
        server = os.pidfd_open(int((short_folder / "pid").read_text()))
        signal.pidfd_send_signal(server, signal.SIGTERM)
        assert ended(server, SECONDS)  # or it removes its files while the folder is removed
        os.close(server)


@pytest.fixture
def little_room(short_folder: Path) -> Iterator[Path]:
    """A file in a file system with half a megabyte."""
    folder = short_folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=True)
    yield folder / "file"
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_no_room_for_what_the_guest_overwrites_breaks_the_instant_and_not_its_writes(
    place: Place, little_room: Path
) -> None:
    file = place.root / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", file, "16M"], check=True)
    port = '{"driver":"virtserialport","chardev":"test","name":"org.perdure.test.0"}'
    described = place.describe(
        kernel=place.image.kernel,
        initrd=place.image.initrd,
        append=place.image.append,
        disks=(Disk("one", file),),
        extra=("-chardev", f"socket,id=test,path={place.root}/test.sock,server=on,wait=off", "-device", port),
    )
    asyncio.run(run_out_of_room(place, described, little_room))


async def run_out_of_room(place: Place, described: Any, little_room: Path) -> None:
    names, folder = disks.captured(described), place.folder
    async with await Monitor.connect(place.launch(described)) as monitor:
        await monitor.cont()
        with client.GuestShell(place.root / "test.sock") as guest:
            await asyncio.to_thread(guest.wait_ready, SECONDS)
            await asyncio.to_thread(guest.run, WRITER)
            await disks.prepare(monitor, folder, names)
            [old] = folder.path.glob("perdure-old-*")
            with little_room.open("wb") as small:
                small.truncate(old.stat().st_size)
            old.unlink()
            old.symlink_to(little_room)
            await monitor.stop()
            await disks.freeze(monitor, folder, names)
            await monitor.cont()
            await disks.export(monitor, folder, names)
            began = await asyncio.to_thread(guest.run, "steps[0]")
            while await asyncio.to_thread(guest.run, "steps[0]") < began + 100:  # every write of it succeeds
                assert await monitor.query_status() == "running"
            with pytest.raises(VirtualMachineError, match=r"disk one: .*is there room"):
                await asyncio.to_thread(read_all, folder.disks, place.root / "copy")
            assert await disks.release(monitor, folder)
            assert not await disks.release(monitor, folder)
            nodes = await monitor.execute("query-named-block-nodes", flat=True)
            assert sorted(each["node-name"] for each in nodes) == ["disk-one", "file-one"]
            began = await asyncio.to_thread(guest.run, "steps[0]")
            while await asyncio.to_thread(guest.run, "steps[0]") == began:
                assert await monitor.query_status() == "running"


def read_all(address: Path, copy: Path) -> None:
    with Export("demo", address, "one") as export, copy.open("wb") as file:
        export.read_into(file.fileno(), export.data(0, export.size))


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_is_zeroed_or_written_after_the_instant_is_read_as_it_was(place: Place, image: Path, kind: str) -> None:
    """Requests begin, end and cross the borders of what QEMU has copied by then."""
    file = place.root / f"disk.{kind}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, image, file], check=True)
    described = place.describe(disks=(Disk("one", file, format=kind),))
    asyncio.run(change_after_the_instant(place, described, image.read_bytes()))


async def change_after_the_instant(place: Place, described: Any, expected: bytes) -> None:
    names, folder, copy = disks.captured(described), place.folder, place.root / "copy"
    async with await Monitor.connect(place.launch(described)) as monitor:
        await disks.prepare(monitor, folder, names)
        await disks.freeze(monitor, folder, names)
        for change in (
            "write -z 12k 100k",
            "write -z -u 1M 1M",
            "write -P 5 6M 200k",
            "write -P 6 100M 4k",
            "write -P 7 20416k 64k",  # nothing, just before something
            "write -z 3M 8M",
        ):
            await change_disk(monitor, change)
        await disks.export(monitor, folder, names)
        with Export("demo", folder.disks, "one", copies=disks.copies(folder, 0)) as export, copy.open("wb") as file:
            file.truncate(export.size)
            there = export.data(0, export.size)
            await change_disk(monitor, "write -z 2M 500k")  # in what is to be read
            await asyncio.to_thread(export.read_into, file.fileno(), there)
        assert copy.read_bytes()[: len(expected)] == expected
        assert await disks.release(monitor, folder)


async def change_disk(monitor: Monitor, how: str) -> None:
    """As the guest's device would."""
    device = "drive-one/virtio-backend"
    assert await monitor.human(f'qemu-io -d {device} "{how}"') == ""
