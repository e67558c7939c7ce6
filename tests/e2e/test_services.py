"""Real services keep their data: Debian's redis-server, and SQLite on a DAX file system, each as of the right instant.

Judged by their own client in the guest, which checks every record that it wrote, by SQLite's integrity check, and, of
a generation, by e2fsck and SQLite on the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, GuestImage
from supervised import MIB, NAME, SECONDS, GuestShell, Supervised
from test_back import reported
from test_clone import Copy
from test_survival import boot, reboot

pytestmark = pytest.mark.qemu

SETTINGS = """
[[region]]
name = "files"
size = "64MiB"
mode = "fsdax"
"""
DATA = 2 * MIB
"""Where the file system begins on its device."""
IN_GUEST = (Path(__file__).parent / "in_guest_services.py").read_text()


@pytest.fixture
def vm(guest_image: GuestImage) -> Iterator[Supervised]:
    subprocess.run([str(ROOT / "scripts" / "build-guest-services")], check=True, stdin=subprocess.DEVNULL)
    image = replace(guest_image, initrd=guest_image.initrd.with_name("services.img"))
    with contextlib.closing(Supervised(image, settings=SETTINGS)) as vm, reported(vm):
        yield vm


def start(vm: Supervised) -> None:
    """The services of a guest that has booted: they find what is there."""
    vm.guest.run(IN_GUEST)
    assert "dax=always" in vm.guest.run("start_services()")


def writes(vm: Supervised, count: int = 20, guest: GuestShell | None = None) -> int:
    """The client gets so many answers; how many it has then."""
    guest = guest or vm.guest
    began = guest.run("client.written")
    vm.until(lambda: guest.run("client.written") >= began + count, "the client writes on")
    return int(guest.run("client.written"))


def has(guest: GuestShell, kept: list[str], heap: list[str]) -> dict[str, dict[str, int]]:
    """What each service has while no client writes: records of these epochs and no others, one after the other."""
    found: dict[str, dict[str, int]] = guest.run("checked()", SECONDS)
    assert {name: list(counts) for name, counts in found.items()} == {"files": kept, "sqlite": kept, "heap": heap}
    return found


def totals(found: dict[str, dict[str, int]]) -> list[int]:
    """Records in the two services that keep them."""
    return [sum(found[name].values()) for name in ("files", "sqlite")]


def on_the_host(vm: Supervised, generation: int) -> int:
    """How many records the database has in a generation, as the host's programs read it."""
    image, database = vm.folder / "files.img", vm.folder / "records"
    vm.perdure("export", f"{NAME}@{generation}", "files", image)
    with image.open("r+b") as file:
        content = file.read()[DATA:]
        file.seek(0)
        file.write(content)
        file.truncate()
    assert subprocess.run(["e2fsck", "-fy", image], capture_output=True).returncode in (0, 1)  # its journal
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    for name in ("records", "records-wal"):
        dump = f"dump /{name} {vm.folder / name}"
        subprocess.run(["debugfs", "-R", dump, image], check=True, capture_output=True)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        texts = [text for (text,) in connection.execute("SELECT text FROM records ORDER BY number")]
    for text in texts:
        content, _, checksum = text.rpartition(" ")
        assert hashlib.sha256(f"{content} ".encode()).hexdigest() == checksum
    image.unlink()
    return len(texts)


def test_redis_and_sqlite_keep_their_data_whatever_happens_to_the_vm(vm: Supervised) -> None:
    """The client writes on all the time, so each generation is one of services in the middle of something."""
    boot(vm)
    vm.guest.run(IN_GUEST)
    vm.guest.run("run('mkfs.ext4', '-q', '-b', '4096', device())")
    start(vm)
    vm.guest.run("client = Client('first')")
    writes(vm)
    point, booted = f"{NAME}@{vm.perdure('snapshot', NAME, '--full')['generation']}", vm.guest.boot_id
    vm.guest.run("client.epoch = 'after'")

    answered = writes(vm)
    reboot(vm)
    start(vm)
    at_reboot = has(vm.guest, kept=["first", "after"], heap=[])
    assert min(totals(at_reboot)) >= answered
    rebooted = vm.log()[-1]["generation"]

    vm.guest.run("client = Client('rebooted')")
    writes(vm)
    code = "[client.written, perdure_guest.checkpoint('services').generation, client.written]"
    answered, checkpoint, written = vm.guest.run(code, SECONDS)
    vm.guest.run("client.epoch = 'lost'")
    writes(vm)
    vm.lose_power()
    boot(vm)
    start(vm)
    found = has(vm.guest, kept=["first", "after", "rebooted"], heap=[])
    assert all(answered <= total <= written + 1 for total in totals(found))
    assert on_the_host(vm, checkpoint) == totals(found)[1]

    vm.guest.run("client = Client('forgotten')")
    writes(vm)
    vm.perdure("rollback", f"{NAME}@{rebooted}")
    vm.guest.wait_ready(SECONDS)
    vm.guest.run((Path(__file__).parent / "in_guest.py").read_text())
    start(vm)
    assert has(vm.guest, kept=["first", "after"], heap=[]) == at_reboot

    vm.guest.run("client = Client('forgotten')")
    writes(vm)
    assert vm.perdure("rollback", point, "--lazy")["resumed"]
    assert vm.guest.wait_ready(SECONDS) == booted
    vm.guest.run("client.epoch = 'resumed'")
    writes(vm)

    copy = Copy(vm, "copy")
    with contextlib.closing(copy.guest):
        copy.start("--from", point).expect("tracker:? ")
        assert copy.guest.wait_ready(SECONDS) == booted
        copy.guest.run("client.epoch = 'copied'")
        writes(vm, guest=copy.guest)
        writes(vm)
        for guest, epoch in ((vm.guest, "resumed"), (copy.guest, "copied")):
            guest.run("client.end()")
            found = has(guest, kept=["first", epoch], heap=["first", epoch])
            assert len({sum(counts.values()) for counts in found.values()}) == 1
