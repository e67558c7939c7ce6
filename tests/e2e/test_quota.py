"""A quota refuses captures, and the guest runs on; what the guest itself caused makes room for what comes after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import MIB, NAME, SECONDS, Image, Supervised

pytestmark = pytest.mark.qemu

SIZE = 4 * MIB
IN_GUEST = (Path(__file__).parent / "in_guest.py").read_text()
REFUSED = "may store 7.0 MiB"


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    vm = Supervised(guest_image)
    try:
        vm.boot()
        vm.guest.run(IN_GUEST)
        yield vm
        print(vm.report())
    finally:
        vm.close()


def write(vm: Supervised, seed: int) -> None:
    """The guest tags and fills its area, with what does not compress."""
    vm.guest.run(f"write('kept', {SIZE}, {seed})")


def reboot(vm: Supervised, seed: int) -> None:
    """From inside; what was written is there afterwards."""
    vm.guest.reboot(SECONDS)
    vm.guest.run(IN_GUEST)
    assert vm.guest.run(f"holds('kept', {SIZE}, {seed})")
    area = vm.area("kept")
    assert vm.judge.read(area.address, area.size) == random.Random(seed).randbytes(SIZE)


def numbers(vm: Supervised) -> list[tuple[int, str]]:
    return [(each["generation"], each["cause"]) for each in vm.log()]


def test_a_refused_capture_leaves_the_guest_as_it_is(vm: Supervised) -> None:
    write(vm, 1)
    vm.perdure("snapshot", NAME)
    vm.perdure("policy", "set", NAME, "--quota", "7MiB")
    write(vm, 2)
    assert REFUSED in vm.refused("snapshot", NAME)
    assert vm.guest.run("refusal(perdure_guest.checkpoint)").endswith("its quota is reached")
    vm.run.expect(f"checkpoint refused: VM {NAME} {REFUSED}")
    reboot(vm, 2)
    vm.run.expect(f"NOT CAPTURED at reboot: VM {NAME} {REFUSED}")
    assert numbers(vm) == [(1, "snapshot")]

    vm.perdure("policy", "set", NAME, "--quota", "10MiB")
    reboot(vm, 2)
    write(vm, 3)
    assert vm.guest.run("perdure_guest.checkpoint().generation", SECONDS) == 3  # which would be 12 MiB
    vm.run.expect(f"forgotten to stay within the quota: {NAME}@2")
    assert numbers(vm) == [(1, "snapshot"), (3, "checkpoint")]
    assert random.Random(3).randbytes(SIZE) in vm.export()
    write(vm, 4)
    made = vm.perdure("snapshot", NAME)
    assert [each["generation"] for each in made["forgotten"]] == [3]
    assert numbers(vm) == [(1, "snapshot"), (4, "snapshot")]

    vm.perdure("policy", "set", NAME, "--quota", "7MiB")
    assert REFUSED in vm.refused("rollback", f"{NAME}@1", "--discard")
    assert vm.guest.run(f"holds('kept', {SIZE}, 4)")
    vm.perdure("stop", NAME)
    assert vm.run.ended() == 0
    assert vm.start("--from", f"{NAME}@1").ended() == 1
    assert REFUSED in vm.run.text
    assert not list(vm.runtime.glob("memory*"))
    assert f"{vm.runtime}/" not in Path("/proc/self/mountinfo").read_text()
