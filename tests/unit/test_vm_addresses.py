"""The address map from QEMU's answers as recorded (QEMU 7.2, q35; file memory_maps.json), and the scrub limits."""

import json
from pathlib import Path

import pytest

from base.errors import NotFoundError, VirtualMachineError
from vm.addresses import AddressMap, Span, address_map

MIB = 1 << 20
GIB = 1 << 30
RECORDED = json.loads(Path(__file__).with_name("memory_maps.json").read_text())


def recorded(name: str, ram: int) -> AddressMap:
    return address_map("demo", RECORDED[name]["devices"], "\r\n".join(RECORDED[name]["mtree"]), ram)


def test_memory_and_modules_before_and_after_the_firmware_ran():
    fresh = recorded("fresh", 512 * MIB)
    assert fresh.spans == (Span("ram", 0, 512 * MIB), Span("pm0", 4 * GIB, 64 * MIB))
    booted = recorded("booted", 512 * MIB)
    assert booted.spans == (*fresh.spans, Span("pm1", 4 * GIB + 64 * MIB, 32 * MIB))
    assert recorded("ovmf", 512 * MIB).spans == fresh.spans


def test_memory_that_is_split_below_4_gib():
    ram = (Span("ram", 0, 2 * GIB), Span("ram", 4 * GIB, 2 * GIB, 2 * GIB))
    assert recorded("plain", 4 * GIB).spans == ram
    assert recorded("4g", 4 * GIB).spans == (*ram, Span("pm0", 6 * GIB, 64 * MIB))


def test_locate_and_address_of_are_inverse():
    found = recorded("4g", 4 * GIB)
    for address, place in (
        (0, ("ram", 0)),
        (0xC0000, ("ram", 0xC0000)),  # option ROMs lie over it at the time of the recording
        (4 * GIB, ("ram", 2 * GIB)),
        (6 * GIB - 4096, ("ram", 4 * GIB - 4096)),
        (6 * GIB, ("pm0", 0)),
        (6 * GIB + 3 * MIB, ("pm0", 3 * MIB)),
    ):
        assert found.locate(address, 4096) == place
        assert found.address_of(*place) == address


@pytest.mark.parametrize(
    ("address", "size"),
    [(2 * GIB, 1), (2 * GIB - 4096, 8192), (6 * GIB - 1, 2), (6 * GIB + 64 * MIB, 1), (-1, 1), (0, 0), (1 << 64, 1)],
)
def test_what_is_not_in_one_region_is_refused(address, size):
    with pytest.raises(NotFoundError, match="VM demo"):
        recorded("4g", 4 * GIB).locate(address, size)


def test_offsets_and_regions_that_do_not_exist():
    found = recorded("fresh", 512 * MIB)
    with pytest.raises(NotFoundError, match="region pm0 has no byte at offset 0x4000000"):
        found.address_of("pm0", 64 * MIB)
    with pytest.raises(NotFoundError, match="no region pm7"):
        found.address_of("pm7", 0)


def test_answers_that_contradict_each_other():
    devices, mtree = RECORDED["fresh"]["devices"], "\n".join(RECORDED["fresh"]["mtree"])
    moved = json.loads(json.dumps(devices))
    moved[0]["data"]["addr"] += 4096
    with pytest.raises(VirtualMachineError, match="region pm0 is not at"):
        address_map("demo", moved, mtree, 512 * MIB)
    with pytest.raises(VirtualMachineError, match="main memory"):
        address_map("demo", devices, mtree, 256 * MIB)
    with pytest.raises(VirtualMachineError, match="main memory"):
        address_map("demo", devices, mtree.replace(": ram", ": pc.ram"), 512 * MIB)
    with pytest.raises(VirtualMachineError, match="no view"):
        address_map("demo", devices, "", 512 * MIB)
