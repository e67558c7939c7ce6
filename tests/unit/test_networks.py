"""Addresses of network devices: found where QEMU finds them, and made new for a copy."""

import json
from itertools import pairwise

from vm.networks import Card, cards, changed, with_new_addresses, without_addresses

ARGUMENTS = [
    *("-device", "virtio-net-pci,netdev=a"),
    *("-netdev", "user,id=a"),
    *("-nic", "user,model=virtio-net-pci"),
    *("-device", '{"driver":"e1000","netdev":"b","mac":"52:54:00:12:34:56"}'),
    *("-device", "virtio-rng-pci"),
    *("-nic", "none"),
    *("-net", "nic,macaddr=52-54-00-AA-BB-CC"),
]


def test_devices_have_the_addresses_that_qemu_gives_them():
    assert cards(ARGUMENTS) == [
        Card(1, "52:54:00:12:34:58"),  # counted after those of -nic
        Card(5, "52:54:00:12:34:57"),  # the first one is taken
        Card(7, "52:54:00:12:34:56"),
        Card(13, "52:54:00:aa:bb:cc"),
    ]
    assert cards(["-device", "virtio-blk-pci,drive=x", "-nic"]) == []


def test_a_copy_has_other_addresses_which_are_always_the_same_and_its_own():
    copy, pairs = with_new_addresses(ARGUMENTS, "one")
    assert [old for old, _ in pairs] == [each.address for each in cards(ARGUMENTS)]
    assert [new for _, new in pairs] == [each.address for each in cards(copy)]
    assert all(int(new[:2], 16) & 3 == 2 for _, new in pairs)  # locally administered, and one station's
    assert with_new_addresses(ARGUMENTS, "one") == (copy, pairs)
    others = {new for seed in ("one", "two", "three") for _, new in with_new_addresses(ARGUMENTS, seed)[1]}
    assert len(others) == 12
    assert json.loads(copy[7])["netdev"] == "b"
    assert copy[5].startswith("user,model=virtio-net-pci,mac=52:")
    unlike = [each for each, other in zip(copy, ARGUMENTS, strict=True) if each != other]
    assert len(unlike) == 4


def test_copies_are_alike_but_for_addresses():
    def listed(extra):
        return [f"{option} {value}" for option, value in pairwise(extra) if option.startswith("-")]

    here = with_new_addresses(ARGUMENTS, "one")[0]
    there = with_new_addresses(ARGUMENTS, "two")[0]
    addresses = [[each.address for each in cards(extra)] for extra in (here, there)]
    assert changed(listed(here), listed(there)) == list(zip(*addresses, strict=True))
    assert changed(listed(here), listed(here)) == []
    assert without_addresses(listed(here)) == without_addresses(listed(there)) == without_addresses(listed(ARGUMENTS))
    assert without_addresses(["-usb", "-device pvpanic-pci"]) == ["-usb ", "-device pvpanic-pci"]
