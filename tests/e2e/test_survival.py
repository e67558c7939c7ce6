"""The main job, end to end, on real QEMU: tagged memory survives reboots, power loss and rollback, nothing else does.

What a guest has is judged by QEMU's own pmemsave and by programs in the guest: see supervised.py. A VM is booted
once and lent to one test after the other, without tags; a test that leaves it unhealthy costs the next one a boot.
"""

from __future__ import annotations

import random
import shutil
import signal
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
from supervised import MIB, NAME, PAGE, SECONDS, Area, Image, Supervised

from vm.pagemap import has_pagemap_scan

pytestmark = pytest.mark.qemu

TRACKERS = ["userfaultfd", "scan"] if has_pagemap_scan() else ["scan"]
SIZE = 4 * MIB
INFO_BLOCK = Area(0, 2 * MIB, 0)
"""What the guest's kernel keeps at the start of the device: kept as it is, like a tagged range."""
FIRMWARE = range(0xA0000 // PAGE, 0x100000 // PAGE)
"""Pages of main memory through which firmware is seen, and that SeaBIOS needs for its second reset."""

HELPERS = """
import mmap, os, random, threading, time

def content(seed, size):
    return random.Random(seed).randbytes(size)

def write(name, size, seed):
    global memory
    memory = area(name, size)
    memory[:] = content(seed, size)

def holds(name, size, seed):
    return bytes(area(name, size)) == content(seed, size)

def change(pages, seed):
    for page in pages:
        memory[page * 4096 : (page + 1) * 4096] = content(seed + page, 4096)

def untagged(size):
    '''The end of the device, which nothing is tagged of.'''
    device = perdure_guest.dax_devices()[0]
    offset = device.end - device.start - size
    descriptor = os.open(device.path, os.O_RDWR)
    return device.start + offset, mmap.mmap(descriptor, size, offset=offset)

def forget_tags():
    for each in perdure_guest.query_persistent_regions():
        if each.class_ == 'persistent':
            perdure_guest.unmark_persistent(each.address, each.size)

def count(name):
    '''Counts in tagged memory, for ever; goes on from what is there.'''
    numbers = area(name, 4096).cast('Q')
    def work():
        while True:
            numbers[0] += 1
    threading.Thread(target=work, daemon=True).start()
    return numbers
"""


def content(seed: int, size: int = SIZE) -> bytes:
    """What the guest's function of that name gives."""
    return random.Random(seed).randbytes(size)


class Lender:
    """Keeps VMs that run, by tracker."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._vms: dict[str, Supervised] = {}

    def lend(self, tracker: str) -> Supervised:
        """A VM whose guest is up and has no tags."""
        vm = self._vms.get(tracker)
        if vm is not None and not vm.healthy():
            self._vms.pop(tracker).close()
            vm = None
        if vm is None:
            vm = self._vms[tracker] = Supervised(self.image, tracker=tracker)
            vm.boot()
        vm.guest.run(HELPERS)
        vm.guest.run("forget_tags()")
        return vm

    def close(self) -> None:
        """End all of them."""
        while self._vms:
            self._vms.popitem()[1].close()


@pytest.fixture(scope="module")
def lender(guest_image: Image) -> Iterator[Lender]:
    made = Lender(guest_image)
    yield made
    made.close()


@pytest.fixture(params=TRACKERS)
def vm(request: pytest.FixtureRequest, lender: Lender) -> Supervised:
    """A running VM, with each tracker that this kernel can have."""
    return lender.lend(request.param)


@pytest.fixture
def any_vm(lender: Lender) -> Supervised:
    """A running VM with the tracker that Perdure chooses."""
    return lender.lend("auto")


def boot(vm: Supervised, *words: str) -> None:
    """`perdure run`, and the guest's helpers."""
    vm.boot(*words)
    vm.guest.run(HELPERS)


def reboot(vm: Supervised) -> None:
    """From inside the guest."""
    vm.guest.reboot(SECONDS)
    vm.guest.run(HELPERS)


def write(vm: Supervised, name: str, seed: int, size: int = SIZE) -> Area:
    """A program of the guest tags an area and fills it; the judge sees what it wrote."""
    vm.guest.run(f"write({name!r}, {size}, {seed})")
    area = vm.area(name)
    assert vm.judge.read(area.address, area.size) == content(seed, size)
    return area


def only(region: bytes, *kept: Area) -> bytes:
    """What should be left of a region: the areas, zero elsewhere."""
    left = bytearray(len(region))
    for each in (INFO_BLOCK, *kept):
        left[each.offset : each.offset + each.size] = each.of(region)
    return bytes(left)


def pages_with_content(memory: bytes) -> set[int]:
    """Numbers of the pages that are not zero."""
    pages = np.frombuffer(memory, np.uint64).reshape(-1, PAGE // 8)
    return set(np.flatnonzero(pages.any(axis=1)).tolist())


def hide(vm: Supervised, secret: bytes) -> None:
    """The guest puts a secret into main memory and into untagged pmem; the judge finds it in both."""
    vm.guest.run(f"hidden = mmap.mmap(-1, 8 << 20); hidden[:] = {secret!r} * (len(hidden) // {len(secret)})")
    vm.guest.run(f"_, there = untagged(2 << 20); there[:] = {secret!r} * (len(there) // {len(secret)})")
    with vm.memory() as running:
        assert all(running[region].find(secret) >= 0 for region in ("ram", "pm0"))


def new_secret() -> bytes:
    """64 bytes that nobody else has."""
    return b"".join(uuid.uuid4().hex.encode() for _ in range(2))


def assert_reboot_keeps_only_what_is_tagged(vm: Supervised) -> None:
    area = write(vm, "kept", 1)
    secret = new_secret()
    hide(vm, secret)
    with vm.memory() as running:
        expected = only(running["pm0"][:], area)
    boots = vm.boots
    reboot(vm)
    assert vm.boots == boots + 1
    with vm.before_boot() as found:
        assert found["pm0"][:] == expected
        assert all(each.find(secret) < 0 for each in found.values())
        assert pages_with_content(found["ram"]) <= set(FIRMWARE)
    assert vm.guest.run(f"holds('kept', {SIZE}, 1)")
    assert vm.export() == expected


def test_a_reboot_keeps_what_is_tagged_and_nothing_else(vm: Supervised) -> None:
    assert_reboot_keeps_only_what_is_tagged(vm)


def test_a_reboot_under_uefi_keeps_what_is_tagged_and_nothing_else(guest_image: Image) -> None:
    vm = Supervised(guest_image, settings='firmware = "ovmf"')
    try:
        boot(vm)
        assert_reboot_keeps_only_what_is_tagged(vm)
    finally:
        vm.close()
