"""A supervisor outlives changes of the keys that it was started with."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from supervised import NAME, Image, Supervised

pytestmark = pytest.mark.qemu


@pytest.fixture
def vm(guest_image: Image) -> Iterator[Supervised]:
    vm = Supervised(guest_image, tracker="scan", passphrase="correct horse")
    try:
        vm.boot()
        yield vm
        print(vm.report())
    finally:
        vm.close()


def test_rotation_and_a_new_passphrase_under_a_running_vm(vm: Supervised) -> None:
    """Others write with the new keys, the supervisor goes on, and so does a host that has seen nothing."""
    passphrase = vm.folder / "passphrase"
    vm.perdure("snapshot", NAME)
    vm.perdure("key", "rotate")
    (vm.folder / "image").write_bytes(os.urandom(1 << 20))
    vm.perdure("import", "other", f"ram={vm.folder / 'image'}")
    vm.perdure("snapshot", NAME)

    vm.environment["PERDURE_NEW_PASSWORD"] = "another"
    vm.perdure("key", "change-passphrase")
    passphrase.write_text("another\n")
    vm.perdure("key", "rotate")
    vm.perdure("import", "other", f"ram={vm.folder / 'image'}", "--parent", "other@1")
    made = vm.perdure("snapshot", NAME)
    assert made["generation"] == 3
    vm.perdure("reboot", NAME)
    assert [each["generation"] for each in vm.log()] == [1, 2, 3, 4]

    vm.environment["PERDURE_STATE_DIR"] = str(vm.folder / "another host")
    assert [each["cause"] for each in vm.log()] == ["snapshot", "snapshot", "snapshot", "host reboot"]
    assert vm.perdure("check", "--read-data")["clean"]
    vm.environment["PERDURE_STATE_DIR"] = str(vm.state)
