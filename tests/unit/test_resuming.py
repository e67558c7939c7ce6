"""What a full generation needs to be resumed: what is taken from it, what is refused, and how that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base.errors import ConflictError
from perdure.supervision.resuming import fitting, recorded, require_same_devices, version_warning
from store.records import Generation
from vm.command_line import Platform, devices_of
from vm.config import Description, Region, Size
from vm.firmware import Firmware

MIB = 1 << 20
VM = Description(name="demo", memory=Size(512 * MIB), regions=(Region("pm0", Size(64 * MIB)),))
THEN = Platform(
    binary=Path("/usr/bin/qemu"),
    version="7.2",
    machine="pc-q35-7.2",
    accelerator="tcg",
    cpu="max",
    firmware=Firmware("seabios"),
    variables=None,
    uuid="then",
    generation_id=True,
)
LATER = replace(THEN, version="10.0", machine="pc-q35-10.0", uuid="now", generation_id=False)


def generation(description: Description = VM, platform: Platform = THEN, **metadata: Any) -> Generation:
    """A full one, as far as that is looked at."""
    return Generation(
        vm="demo",
        vm_id="",
        number=7,
        id="",
        parent=None,
        sequence=9,
        time="",
        cause="snapshot",
        host="",
        tags=(),
        regions={},
        packs=(),
        dirty_bytes=0,
        stored_bytes=0,
        pause_ms=None,
        metadata={"machine": recorded(description, platform), **metadata},
    )


def test_words_mean_what_they_meant_then():
    """A machine alias is another machine after an upgrade of QEMU, and devices have changed their defaults."""
    found = fitting(VM, LATER, generation())
    assert found == replace(LATER, machine="pc-q35-7.2", uuid="then", generation_id=True)
    assert version_warning(generation(), LATER) == ("demo@7 was made under QEMU 7.2, and is resumed under 10.0",)
    assert version_warning(generation(), THEN) == ()


def test_a_cpu_and_a_machine_that_are_named_fit_if_they_are_the_same():
    named = Description(name="demo", memory=VM.memory, regions=VM.regions, machine="pc-q35-7.2", cpu="max")
    assert fitting(named, replace(LATER, machine="pc-q35-7.2"), generation()).cpu == "max"


def test_what_was_emulated_is_emulated_again_where_the_description_leaves_that_open():
    assert fitting(VM, replace(LATER, accelerator="kvm", cpu="host"), generation()).accelerator == "tcg"


def described(**settings: Any) -> Description:
    return Description(**({"name": "demo", "memory": VM.memory, "regions": VM.regions} | settings))


@pytest.mark.parametrize(
    ("description", "platform", "said"),
    [
        (described(memory=Size(256 * MIB)), LATER, f"main memory was {512 * MIB} and is {256 * MIB}"),
        (described(cpus=2), LATER, "number of processors was 1 and is 2"),
        (described(regions=()), LATER, f"region pm0 was {64 * MIB} and is none"),
        (described(machine="pc-q35-10.0"), LATER, "machine type was pc-q35-7.2 and is pc-q35-10.0"),
        (described(machine="pc"), replace(LATER, machine="pc-i440fx-10.0"), "machine type was pc-q35-7.2 and is pc"),
        (described(cpu="qemu64"), replace(LATER, cpu="qemu64"), "CPU model was max and is qemu64"),
        (described(accelerator="kvm"), replace(LATER, accelerator="kvm"), "accelerator was tcg and is kvm"),
        (described(firmware="ovmf"), replace(LATER, firmware=Firmware("ovmf")), "firmware was seabios and is ovmf"),
    ],
)
def test_what_does_not_fit_is_named(description, platform, said):
    with pytest.raises(ConflictError) as refused:
        fitting(description, platform, generation())
    assert said in str(refused.value)
    assert "demo@7 does not fit VM demo" in str(refused.value)
    assert "--boot boots the VM with the generation's persistent memory" in str(refused.value)


def test_a_guest_of_kvm_is_not_resumed_under_emulation():
    then = generation(platform=replace(THEN, accelerator="kvm", cpu="host"))
    with pytest.raises(ConflictError, match="accelerator was kvm and is tcg"):
        fitting(VM, LATER, then)
    assert fitting(VM, replace(LATER, accelerator="kvm", cpu="max"), then).cpu == "host"


def test_a_generation_that_does_not_say_its_machine_is_refused():
    with pytest.raises(ConflictError, match="demo@7 does not say what machine it is of"):
        fitting(VM, LATER, replace(generation(), metadata={}))


def test_devices_are_compared_as_they_were_asked_for():
    arguments = ["qemu", "-m", "1G", "-device", "a,b=c", "-nic", "none", "-chardev", "null,id=x", "-usb", "-S"]
    devices = devices_of(arguments)
    assert devices == ["-device a,b=c", "-nic none", "-usb"]
    made = generation(devices=devices)
    require_same_devices(made, devices)
    for other, said in (
        (devices[1:], "it lacks -device a,b=c"),
        ([*devices, "-device d"], "it has -device d, which the generation lacks"),
        (devices[::-1], "its devices are in another order"),
        ([*devices, devices[0]], "its devices are in another order"),
    ):
        with pytest.raises(ConflictError, match=said):
            require_same_devices(made, other)
