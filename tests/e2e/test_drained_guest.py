"""Write-back on real QEMU: what is stored ahead while the guest writes is in the next generation exactly as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge import Judge
from supervised import MIB, NAME, SECONDS, Image, Supervised
from test_full import ORDINARY, full, judged
from test_survival import boot, write

pytestmark = pytest.mark.qemu

POLICY = """\
write_back = "on"
background_bandwidth = "1 GiB"
background_cpu_percent = 100
"""
SCRIBBLE = f"""
import random, time
chance, field = random.Random(5), mmap.mmap(-1, {8 * MIB})
use("scribbled", {2 * MIB})

def scribble():
    # few pages again and again, and now and then any page, in tagged and in other memory
    for target in (memory, field):
        page = chance.randrange(16) if chance.random() < 0.9 else chance.randrange(len(target) // PAGE)
        at = page * PAGE + chance.randrange(PAGE - 8)
        target[at : at + 8] = chance.randbytes(8)
    time.sleep(0.002)

work(scribble)
"""
BURST = f"for at in range(0, {8 * MIB}, PAGE): field[at : at + 8] = chance.randbytes(8)"


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    extra = ("-device", "pcie-root-port,id=socket,chassis=7")
    made = Supervised(guest_image, policy=POLICY, extra=extra)
    yield made
    print(made.report())
    made.close()


def ahead(vm: Supervised) -> Any:
    """Wait until much is stored ahead of the next generation; what the status says of it."""

    def stored() -> bool:
        found.append(vm.status()["write_back"])
        return bool(found[-1]["stored_ahead_bytes"] >= 4 * MIB)

    found: list[Any] = []
    vm.until(stored, "dirty pages stored ahead")
    return found[-1]


def plug_disk(judge: Judge, socket: str) -> None:
    """One whose reads go past the host's cache, and which is not captured."""
    node = {"driver": "null-co", "node-name": "later", "read-only": True, "cache": {"direct": True}}
    judge.execute("blockdev-add", **node)
    judge.execute("device_add", driver="virtio-blk-pci", bus=socket, drive="later")


def memory_of(pid: int) -> list[str]:
    """Backing files that a process has open; of those that were unmounted only the names are left."""
    opened = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    return [path for path in opened if ".memory" in path]


def test_generations_are_what_memory_was_whatever_was_stored_ahead(vm: Supervised) -> None:
    boot(vm)
    vm.guest.run(ORDINARY)
    write(vm, "kept", 1)
    vm.guest.run(SCRIBBLE)
    full(vm)
    for _ in range(3):
        vm.guest.run(BURST)
        standing = ahead(vm)
        assert standing["state"] == "on"
        assert standing["expected_pause_ms"] > 0
        judged(vm)
        assert vm.status()["write_back"]["stored_ahead_bytes"] < 4 * MIB
    vm.guest.run(BURST)
    ahead(vm)
    vm.run.kill()  # bits were cleared, and what was stored ahead is gone with it
    assert vm.baseline is None
    vm.boot()
    vm.perdure("rollback", f"{NAME}@1", "--dry-run")  # waits for the take-over, which lets a stopped guest go on
    vm.guest.run(BURST)
    judged(vm)
    vm.guest.run(BURST)
    ahead(vm)
    judged(vm)
    vm.guest.run(BURST)
    ahead(vm)
    vm.perdure("rollback", f"{NAME}@1", "--lazy", "--discard")
    assert all(str(vm.runtime) in path for path in memory_of(vm.run.process.pid))  # the old memory is not held
    vm.until(lambda: vm.status()["lazy"] is None, "all of its memory is there")
    vm.guest.wait_ready(SECONDS)
    vm.guest.run(BURST)
    ahead(vm)
    plug_disk(vm.judge, "socket")
    vm.until(lambda: vm.status()["write_back"]["state"].startswith("a disk has cache=none"), "it is noticed")
    assert vm.status()["write_back"]["stored_ahead_bytes"] == 0 and vm.baseline is None
    vm.run.expect("a disk has cache.direct=on by now: the next capture looks at everything")
    judged(vm)
    assert vm.perdure("check")["findings"] == []
    assert any(line.startswith("write-back ") for line in vm.lines("status", NAME))
