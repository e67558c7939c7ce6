"""What a full generation needs to go on: recorded when it is made, compared before anything is restored from it.

QEMU loads a state only into the machine that it was saved from: the same versioned machine type, CPU model, memory
and devices. Where the description leaves the choice (a machine alias, no CPU), what was recorded is used and not what
the words mean today. And it goes on only with disks that hold what they held at that instant (perdure.disks.images).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from base.errors import ConflictError
from perdure.disks.state import disks_of
from store.records import Generation
from vm.command_line import Platform
from vm.config import Description
from vm.networks import without_addresses

_OF_THE_HOST = ("drive", "chardev", "netdev")
_BOOT_HINT = "--boot boots the VM with the generation's persistent memory instead"


def recorded(description: Description, platform: Platform) -> dict[str, Any]:
    """Facts of the machine for a generation's metadata."""
    return {
        "qemu": platform.version,
        "machine": platform.machine,
        "cpu": platform.cpu,
        "accelerator": platform.accelerator,
        "firmware": platform.firmware.kind,
        "memory_bytes": int(description.memory),
        "cpus": description.cpus,
        "uuid": platform.uuid,
        "generation_id": platform.generation_id,
        "regions": {region.name: int(region.size) for region in description.regions},
    }


def fitting(description: Description, now: Platform, generation: Generation) -> Platform:
    """The platform with which a full generation is resumed: `now`, with what was recorded in place of today's choices.

    Raises ConflictError that says what does not fit.
    """
    then = _machine_of(generation)
    wanted = recorded(description, now)
    problems = [
        _differs(what, then.get(key), wanted[key])
        for key, what in (("memory_bytes", "main memory"), ("cpus", "number of processors"), ("firmware", "firmware"))
        if then.get(key) != wanted[key]
    ]
    problems += _region_problems(then.get("regions", {}), wanted["regions"])
    machine, cpu, accelerator = str(then.get("machine")), str(then.get("cpu")), str(then.get("accelerator"))
    if description.machine == now.machine != machine or _family(now.machine) != _family(machine):
        problems.append(_differs("machine type", machine, description.machine))
    if description.cpu not in (None, cpu):
        problems.append(_differs("CPU model", cpu, description.cpu))
    if accelerator != now.accelerator and (accelerator != "tcg" or description.accelerator != "auto"):
        problems.append(_differs("accelerator", accelerator, now.accelerator))
    _require(generation, problems)
    return replace(
        now,
        machine=machine,
        cpu=cpu,
        accelerator="kvm" if accelerator == "kvm" else "tcg",
        uuid=str(then.get("uuid", now.uuid)),
        generation_id=bool(then.get("generation_id")),
    )


def require_same_devices(generation: Generation, devices: Sequence[str], *, copied: bool = False) -> None:
    """Raises ConflictError that names the devices that a generation has and the VM now lacks, and the other way.
    Network addresses do not count for a copy."""
    then = [str(each) for each in generation.metadata.get("devices", ())]
    if copied:
        then, devices = without_addresses(then), without_addresses(devices)
    then, devices = as_made(then), as_made(devices)
    problems = [f"it lacks {each}" for each in then if each not in devices]
    problems += [f"it has {each}, which the generation lacks" for each in devices if each not in then]
    if not problems and then != list(devices):
        problems.append("its devices are in another order")
    _require(generation, problems)


def as_made(devices: Sequence[str]) -> list[str]:
    """Arguments that make devices, each in one way, in the order in which QEMU makes them: those in JSON come last.

    Source: QEMU, softmmu/vl.c, qemu_create_cli_devices.
    """
    ordered = sorted(devices, key=lambda each: each.startswith("-device {"))
    return [way for each in ordered if (way := one_way(each))]


def one_way(device: str) -> str:
    """An argument that makes a device, as vm.command_line.devices_of gives it, in one of the ways in which QEMU takes
    it: `-device {"driver":"nvdimm","id":"a"}` is `-device nvdimm,id=a`; how what is behind it is called on the host is
    left out. Empty for what makes none."""
    option, _, value = device.partition(" ")
    if option == "-drive" and "if=none" in value.split(","):
        return ""
    if option != "-device":
        return device
    if value.startswith("{"):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError):
            return device
        words = {str(name): _word(each) for name, each in fields.items()}
        driver = words.pop("driver", "")
    else:
        driver, *rest = value.split(",")
        words = dict(each.partition("=")[::2] for each in rest)
        driver = words.pop("driver", driver.removeprefix("driver="))
    for name in _OF_THE_HOST:
        words.pop(name, None)
    return f"-device {','.join([driver, *(f'{name}={each}' for name, each in sorted(words.items()))])}"


def require_same_disks(generation: Generation, description: Description) -> None:
    """Raises ConflictError unless the VM has the disks that a generation has, by their names."""
    there = {disk.name for disk in description.disks if not disk.readonly}
    _require(generation, [f"disk {name} is in only one of them" for name in sorted(there ^ set(disks_of(generation)))])


def version_warning(generation: Generation, now: Platform) -> tuple[str, ...]:
    """A QEMU of another version loads older states of a versioned machine type; that is meant to work, and said."""
    then = str(_machine_of(generation).get("qemu"))
    if then == now.version:
        return ()
    return (f"{generation.name} was made under QEMU {then}, and is resumed under {now.version}",)


def _machine_of(generation: Generation) -> dict[str, Any]:
    found = generation.metadata.get("machine")
    if not isinstance(found, dict):
        raise ConflictError(f"{generation.name} does not say what machine it is of, and cannot be resumed")
    return found


def _require(generation: Generation, problems: Sequence[str]) -> None:
    if problems:
        raise ConflictError(
            f"{generation.name} does not fit VM {generation.vm} as it is described now: {'; '.join(problems)} "
            f"({_BOOT_HINT})"
        )


def _region_problems(then: dict[str, int], now: dict[str, int]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            yield _differs(f"region {name}", then.get(name, "none"), now.get(name, "none"))


def _differs(what: str, then: Any, now: Any) -> str:
    return f"{what} was {then} and is {now}"


def _word(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _family(machine: str) -> str:
    """`pc-q35` of `pc-q35-7.2`."""
    return re.sub(r"-[\d.]+$", "", machine)
