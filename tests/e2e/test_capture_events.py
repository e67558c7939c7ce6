"""What happens to a VM in the middle of a capture; judged by QEMU's own pmemsave.

Its supervisor is killed at stages of a full one, each before a command to QEMU or an operation on the disk: at some
stages each time the tests run, at all of them with PERDURE_FAULTS=all. The guest gives memory back, a device is plugged
in, the guest reboots and panics: in a capture that is held up by one worker that does not move.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import MIB, NAME, SECONDS, GuestGoneError, Image, Supervised
from test_back import reported
from test_drained_guest import plug_disk
from test_faults import Background, assert_next_snapshot_is_right, boot, packs, ready, worker_stopped
from test_full import ORDINARY, export, goes_on, judged, nothing_is_left

pytestmark = pytest.mark.qemu

LARGE = 20 * MIB
POLICY = """\
write_back = "off"
capture_on_shutdown = false
"""
EXTRA = (
    *("-device", "virtio-balloon-pci", "-device", "pcie-root-port,id=socket0,chassis=7"),
    *("-device", "pcie-root-port,id=socket1,chassis=8"),
)


STAGES = None if os.environ.get("PERDURE_FAULTS") == "all" else 2
"""At how many a supervisor is killed; None is all."""


@pytest.fixture(scope="module")
def running(guest_image: Image) -> Iterator[Supervised]:
    with contextlib.closing(Supervised(guest_image, extra=EXTRA, policy=POLICY)) as vm:
        paths = (str(Path(__file__).parent / "stages"), vm.environment["PYTHONPATH"])
        vm.run_environment = {"PYTHONPATH": os.pathsep.join(paths), "PERDURE_TEST_STAGES": str(vm.folder)}
        boot(vm)
        yield vm


@pytest.fixture
def vm(running: Supervised) -> Iterator[Supervised]:
    with reported(running):
        yield running


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


def test_a_supervisor_that_is_killed_at_any_stage_of_a_capture_is_followed_by_one_that_is_right(
    vm: Supervised,
) -> None:
    armed, trace = vm.folder / "armed", vm.folder / "trace"
    vm.guest.run(ORDINARY + f"write('area', {MIB}, 1)")
    judged(vm)
    armed.write_text(str(1 << 30))
    vm.perdure("snapshot", NAME, "--full")
    armed.unlink()
    total = len(trace.read_text().splitlines())
    assert total > 30
    for stage in range(total) if STAGES is None else [total * each // STAGES + 2 for each in range(STAGES)]:
        vm.guest.run(f"change([{stage % 256}, {stage * 7 % 256}], {stage})")
        history = vm.log()
        armed.write_text(str(stage))
        command = Background(vm, "snapshot", NAME, "--full")
        if STAGES is None and not gone(command, armed):  # there were fewer than the last time
            continue
        assert "supervisor ended" in command.refused()
        assert vm.run.ended() == -signal.SIGKILL
        boot(vm)
        made = vm.log()
        assert made[: len(history)] == history and len(made) <= len(history) + 1
        goes_on(vm)
        judged(vm)
        nothing_is_left(vm)
    assert vm.perdure("check", "--read-data")["clean"]


def gone(command: Background, armed: Path) -> bool:
    """Whether the supervisor was killed; if not, it is not going to be."""
    command.wait()
    if armed.exists():
        armed.unlink()
        return False
    return True


def test_what_happens_to_a_guest_in_the_middle_of_a_capture(vm: Supervised) -> None:
    ready(vm)
    vm.guest.run("finish()\n" + ORDINARY)
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
    followed = vm.status()["tracker"].startswith("userfaultfd")
    direct = "a disk has cache.direct=on by now" if followed else ""  # reads in flight escaped the rounds before
    with captured_meanwhile(vm, refused=direct):
        plug_disk(vm.judge, "socket1")
    assert direct in vm.status()["tracker"]
    assert_next_snapshot_is_right(vm)
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
