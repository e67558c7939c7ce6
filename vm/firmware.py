"""The guest's firmware: which images, and the VM's own copy of the UEFI variables.

SeaBIOS is QEMU's default and needs no files here. UEFI images are found by the descriptors that distributions
install for that, so that no path of one distribution is built in. Safe anywhere; one process makes a VM's copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.disk import Disk, replace_file
from base.errors import StorageError, VirtualMachineError
from vm.config import FirmwareFiles

DESCRIPTOR_FOLDERS = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
"""A file in the first hides one of the same name in the second. Source: QEMU, docs/interop/firmware.json."""
_NOT_PLAIN = {"requires-smm", "secure-boot", "enrolled-keys"}

Kind = Literal["seabios", "ovmf"]


@dataclass(frozen=True, slots=True)
class Firmware:
    """What the guest starts with. `code` and `template` (of the variables) are None with SeaBIOS."""

    kind: Kind
    code: Path | None = None
    template: Path | None = None
    code_format: str = "raw"
    template_format: str = "raw"


def find(vm: str, wanted: Literal["seabios", "ovmf"] | FirmwareFiles) -> Firmware:
    """Raises VirtualMachineError if no UEFI image is installed."""
    if wanted == "seabios":
        return Firmware("seabios")
    if isinstance(wanted, FirmwareFiles):
        return Firmware("ovmf", wanted.code, wanted.vars)
    for descriptor in _descriptors():
        firmware = _from_descriptor(descriptor)
        if firmware is not None:
            return firmware
    raise VirtualMachineError(
        f"VM {vm}: no UEFI firmware is installed: install the package ovmf, or name code and vars under [firmware]"
    )


def variables(vm: str, firmware: Firmware, folder: Path, disk: Disk) -> Path | None:
    """The VM's own copy of the UEFI variables in `folder`, made from the template if it is not there yet.

    None with SeaBIOS. Raises StorageError.
    """
    if firmware.template is None:
        return None
    copy = folder / "firmware-variables.fd"
    if not copy.exists():
        try:
            content = firmware.template.read_bytes()
        except OSError as error:
            raise StorageError.from_os(error, str(firmware.template), f"read the template for VM {vm}") from error
        replace_file(disk, copy, content)
    return copy


def _descriptors() -> list[Path]:
    found: dict[str, Path] = {}
    for folder in reversed(DESCRIPTOR_FOLDERS):
        found |= {path.name: path for path in folder.glob("*.json")}
    return [found[name] for name in sorted(found)]


def _from_descriptor(path: Path) -> Firmware | None:
    """The images that a descriptor describes, if they are UEFI flash for q35 without Secure Boot and exist."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        mapping = content["mapping"]
        machines = [
            name for each in content["targets"] if each["architecture"] == "x86_64" for name in each["machines"]
        ]
        suits = (
            "uefi" in content["interface-types"]
            and mapping["device"] == "flash"
            and any(name.startswith("pc-q35-") for name in machines)
            and not _NOT_PLAIN & set(content["features"])
        )
        if not suits:
            return None
        code, template = mapping["executable"], mapping["nvram-template"]
        firmware = Firmware(
            "ovmf", Path(code["filename"]), Path(template["filename"]), code["format"], template["format"]
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # empty: masks another; broken: no firmware
        return None
    both = (firmware.code, firmware.template)
    return firmware if all(each is not None and each.is_file() for each in both) else None
