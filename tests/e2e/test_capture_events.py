"""What a guest, or somebody else, does to a VM in the middle of a capture: ballooning, a device that is plugged in, a
reboot, a panic. The capture is held up by one worker that does not move; judged by QEMU's own pmemsave.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from supervised import MIB, NAME, SECONDS, GuestGoneError, Image, Supervised
from test_back import reported
from test_faults import Background, assert_next_snapshot_is_right, boot, packs, ready, worker_stopped
from test_full import ORDINARY, export, goes_on, judged

pytestmark = pytest.mark.qemu

LARGE = 20 * MIB
POLICY = 'write_back = "off"\n'
EXTRA = ("-device", "virtio-balloon-pci", "-device", "pcie-root-port,id=socket0,chassis=7")


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    with contextlib.closing(Supervised(guest_image, extra=EXTRA, policy=POLICY)) as vm, reported(vm):
        boot(vm)
        yield vm


@contextlib.contextmanager
def captured_meanwhile(vm: Supervised, *words: str, refused: str = "") -> Iterator[None]:
    """A snapshot that is in its middle while the block does something, and then comes to its end, good or bad."""
    vm.guest.run(f"fill('large', {LARGE})")
    before = packs(vm)
    with worker_stopped(vm) as worker:
        command = Background(vm, "snapshot", NAME, *words)
        vm.until(lambda: packs(vm) - before, "a pack of another worker")
        assert not command.ended
        yield
        os.kill(worker, signal.SIGCONT)
        if refused:
            assert refused in command.refused()
        else:
            command.done()


def go_down(vm: Supervised, how: str) -> None:
    """The guest does something to itself, in which QEMU holds it."""
    with contextlib.suppress(GuestGoneError):
        vm.guest.start(how)
    vm.until(lambda: vm.judge.execute("query-status")["status"] != "running", "the guest is held")


def test_what_happens_to_a_guest_in_the_middle_of_a_capture(vm: Supervised) -> None:
    vm.guest.run(ORDINARY)
    with captured_meanwhile(vm, "--full"):
        vm.judge.execute("balloon", value=224 * MIB)
        vm.until(lambda: vm.judge.execute("query-balloon")["actual"] <= 224 * MIB, "the guest has given memory back")
    goes_on(vm)
    judged(vm)
    before = vm.log()
    with captured_meanwhile(vm, "--full", refused="cannot be captured in full: device plugged was plugged in after"):
        vm.judge.execute("device_add", driver="virtio-rng-pci", bus="socket0", id="plugged")
    assert "device plugged was plugged in" in vm.refused("snapshot", NAME, "--full")
    assert "device plugged was plugged in" in vm.status()["full"]
    assert vm.log() == before
    goes_on(vm)

    vm.guest.run("finish(); write('kept', 1 << 20, 1)")
    area, booted = vm.area("kept"), vm.guest.boot_id
    expected = vm.judge.read(area.address, area.size)
    with captured_meanwhile(vm):
        number = len(vm.log()) + 1
        go_down(vm, "reboot()")
    assert area.of(export(vm, number, "pm0")) == expected
    vm.guest.wait_ready(SECONDS, after=booted)
    ready(vm)
    assert vm.guest.run("holds('kept', 1 << 20, 1)")
    assert [each["cause"] for each in vm.log()[number - 1 :]] == ["snapshot", "reboot"]
    assert_next_snapshot_is_right(vm)

    with captured_meanwhile(vm):
        expected = vm.judge.read(area.address, area.size)
        go_down(vm, "panic()")
    assert vm.run.ended() == 0
    assert [each["cause"] for each in vm.log()[-2:]] == ["snapshot", "panic"]
    assert area.of(vm.export()) == expected
    assert vm.perdure("check", "--read-data")["clean"]
