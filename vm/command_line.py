"""QEMU's command line for one VM, as a pure function of what is known before the launch.

The VM starts paused (-S) and stops, instead of resetting or ending, whenever the guest reboots, powers off or
panics: the supervisor decides what comes next. Options whose values can hold anything are given as JSON, which
needs no escaping. Nothing of the user's or the host's QEMU configuration files is read, and there is no device but
those that are named here.

Source: qemu(1), QEMU 7.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vm.config import RAM, Description, Disk
from vm.firmware import Firmware
from vm.folder import RuntimeFolder
from vm.memory import BackingFile
from vm.protocol import PORT_NAME

VARIABLES_NODE = "firmware-variables"
"""Block node of the UEFI variables, whose content is part of the state of the devices."""


@dataclass(frozen=True, slots=True)
class Platform:
    """What a launch has made of the words in a description: a generation stores it, a resume needs the same."""

    binary: Path
    version: str
    """QEMU's, as it says it."""
    machine: str
    """Versioned, `pc-q35-7.2` and not `q35`: the alias means another machine after an upgrade."""
    accelerator: Literal["kvm", "tcg"]
    cpu: str
    firmware: Firmware
    variables: Path | None
    """The VM's copy of the UEFI variables."""
    uuid: str
    generation_id: bool = False
    """Whether there is a device with a random id that is another one at each launch (QEMU, docs/specs/vmgenid)."""


_VISIBLE = ("-device", "-drive", "-cdrom", "-virtfs", "-nic", "-net", "-global", "-vga", "-usbdevice", "-watchdog")
"""Options with a value of which devices of the guest come."""
_VISIBLE_FLAGS = ("-usb",)


def devices_of(arguments: Sequence[str]) -> list[str]:
    """What of a command line makes devices that the guest sees, in order: a saved state fits these and no others."""
    return [
        option if option in _VISIBLE_FLAGS else f"{option} {value}"
        for option, value in zip(arguments, [*arguments[1:], ""], strict=True)
        if option in (*_VISIBLE, *_VISIBLE_FLAGS)
    ]


def command_line(
    vm: Description,
    platform: Platform,
    folder: RuntimeFolder,
    files: Mapping[str, BackingFile],
    *,
    incoming: bool = False,
    fillings: Mapping[str, Mapping[str, Any]] = {},
) -> list[str]:
    """All arguments, the program first. `files` has a backing file for main memory and for each region. `incoming`:
    it waits for a device state to be loaded, and leaves alone what is in memory. `fillings`: by disk, the block node
    behind an image that is not filled yet (vm.overlays)."""
    return [
        str(platform.binary),
        *("-name", f"guest={vm.name},process=perdure-{vm.name}", "-uuid", platform.uuid),
        *("-no-user-config", "-nodefaults", "-display", "none", "-S"),
        *("-action", "reboot=shutdown,shutdown=pause,panic=pause"),
        *("-accel", platform.accelerator, "-cpu", platform.cpu, "-smp", str(vm.cpus)),
        *_machine(vm, platform, files),
        *_channels(folder),
        *_firmware(platform),
        *_boot(vm),
        *(("-device", _json({"driver": "vmgenid", "guid": "auto"})) if platform.generation_id else ()),
        *(argument for disk in vm.disks for argument in _disk(disk, vm, fillings.get(disk.name))),
        *vm.extra,
        *(("-incoming", "defer") if incoming else ()),
    ]


def _machine(vm: Description, platform: Platform, files: Mapping[str, BackingFile]) -> Iterator[str]:
    """The machine, main memory and the NVDIMMs. The guest's memory is left out of core dumps, which go to disks."""
    machine = f"{platform.machine},memory-backend={RAM},dump-guest-core=off"
    if platform.firmware.kind == "ovmf":
        machine += f",pflash0=firmware-code,pflash1={VARIABLES_NODE}"
    memory = f"size={vm.memory}b"
    if vm.regions:
        machine += ",nvdimm=on"
        memory += f",slots={len(vm.regions)},maxmem={sum(vm.backing_sizes.values())}b"
    yield from ("-machine", machine, "-m", memory)
    for name in vm.backing_sizes:
        file = files[name]
        backend = {"qom-type": "memory-backend-file", "id": name, "size": file.size, "share": True}
        yield from ("-object", _json(backend | {"mem-path": str(file.path)}))
    for region in vm.regions:
        yield from ("-device", _json({"driver": "nvdimm", "id": f"nvdimm-{region.name}", "memdev": region.name}))


def _channels(folder: RuntimeFolder) -> Iterator[str]:
    """Monitor, event journal, console, guest channel: listening sockets and files, nothing inherited."""
    listening = "server=on,wait=off"
    yield from ("-chardev", f"socket,id=monitor,path={_escaped(folder.monitor)},{listening}")
    yield from ("-mon", "chardev=monitor,mode=control")
    # A second monitor on a FIFO and a file writes down events while no supervisor is connected to the first.
    yield from ("-chardev", f"pipe,id=journal,path={_escaped(folder.journal)}", "-mon", "chardev=journal,mode=control")
    yield from ("-chardev", f"file,id=console,path={_escaped(folder.console)},append=on", "-serial", "chardev:console")
    yield from ("-chardev", f"socket,id=agent,path={_escaped(folder.agent)},{listening}")
    yield from ("-device", _json({"driver": "virtio-serial-pci", "id": "channels"}))
    yield from ("-device", _json({"driver": "virtserialport", "chardev": "agent", "name": PORT_NAME}))


def _firmware(platform: Platform) -> Iterator[str]:
    firmware = platform.firmware
    if firmware.kind == "seabios":
        return
    for node, path, kind, readonly in (
        ("firmware-code", firmware.code, firmware.code_format, True),
        (VARIABLES_NODE, platform.variables, firmware.template_format, False),
    ):
        file = {"driver": "file", "filename": str(path), "read-only": readonly}
        yield from ("-blockdev", _json({"driver": kind, "node-name": node, "read-only": readonly, "file": file}))


def _boot(vm: Description) -> Iterator[str]:
    for option, value in (("-kernel", vm.kernel), ("-initrd", vm.initrd), ("-append", vm.append)):
        if value is not None:
            yield from (option, str(value))


def _disk(disk: Disk, vm: Description, filling: Mapping[str, Any] | None) -> Iterator[str]:
    """A protocol node, a format node, and the device; disks boot in their order if there is no kernel."""
    common: dict[str, Any] = {
        "read-only": disk.readonly,
        "cache": {"direct": disk.cache == "none", "no-flush": False},
    }
    file = {"driver": "file", "node-name": f"file-{disk.name}", "filename": str(disk.file), **common}
    if disk.file.is_block_device():
        file["driver"] = "host_device"
    yield from ("-blockdev", _json(file))
    image = {"driver": disk.format, "node-name": f"disk-{disk.name}", "file": f"file-{disk.name}", **common}
    if filling is not None:
        yield from ("-blockdev", _json(dict(filling)))
        image["backing"] = filling["node-name"]
    yield from ("-blockdev", _json(image))
    device: dict[str, Any] = {"driver": "virtio-blk-pci", "id": f"drive-{disk.name}", "drive": f"disk-{disk.name}"}
    device["serial"] = disk.name[:20]  # what the guest can read of it
    if vm.kernel is None:
        device["bootindex"] = vm.disks.index(disk) + 1
    yield from ("-device", _json(device))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value)


def _escaped(path: Path) -> str:
    """In QEMU's key=value options a comma is written twice."""
    return str(path).replace(",", ",,")
