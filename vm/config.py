"""A VM's description: VM.toml as typed, checked facts.

`load` gives a `Description` whose paths are absolute and whose sizes are bytes, or raises ConfigurationError naming
file, line and key. What the file says is checked here; what the host can give (memory that is free, a usable
accelerator, QEMU itself) is found out at launch. Values are immutable and safe to share.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from base.errors import ConfigurationError
from base.units import format_size, parse_size
from vm import policy
from vm.lines import Lines, read_toml
from vm.policy import Policy, Schedule
from vm.policy import Size as Size  # a description has it
from vm.protocol import Mode

ALIGNMENT = 2 << 20
"""Memory and regions are whole huge pages of the guest, which is also what a DAX namespace is aligned to."""
REGION_BYTES_MIN = 16 << 20
MEMORY_BYTES_MIN = 16 << 20
REGIONS_MAX = 64
RAM = "ram"
"""Name of main memory where a region is named; no region of a file can have it."""
DEVICES = "device"
"""Name of the state of the devices where a region is named; no region of a file can have it."""
DISK_PREFIX = "disk:"
"""What stands before a disk's name where a region is named; no region of a file can have it."""
CPUS_MAX = 255
"""With more, x86 needs an interrupt remapping device."""

_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also a folder's name: never `.`, `..` or hidden
_PART_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,23}")  # a QEMU node name (31 characters) with a prefix of ours
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_OURS = ("daemonize", "S", "incoming", "action", "no-reboot", "no-shutdown", "m", "mem-path", "smp", "accel", "uuid")


def is_vm_name(text: str) -> bool:
    """Whether a VM may be called so."""
    return _VM_NAME.fullmatch(text) is not None


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[region]]`: an NVDIMM, persistent memory for the guest."""

    name: str
    size: Size
    mode: Mode = "devdax"


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[disk]]`: a virtio block device."""

    name: str
    file: Path
    format: Literal["raw", "qcow2"] = "raw"
    cache: Literal["writeback", "none"] = "writeback"
    readonly: bool = False
    capture: bool = False
    """In every generation, not only in full ones."""


class FirmwareFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[firmware]`: UEFI flash images of the user's own; `vars` is a template that is copied for the VM."""

    code: Path
    vars: Path


class Hooks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[hooks]`: commands of the user's, as lists of arguments; an empty one is not run."""

    before_boot: tuple[str, ...] = ()
    """Run when restored or scrubbed memory is in place, before the guest's first instruction."""


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of a VM.toml."""

    name: str
    memory: Size
    cpus: int = 1
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    cpu: str | None = None
    machine: str = "q35"
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    firmware: Literal["seabios", "ovmf"] | FirmwareFiles = "seabios"
    qemu: str = "qemu-system-x86_64"
    extra: tuple[str, ...] = ()
    repository: str | None = None
    overlays: Path | None = None
    """Folder of the images of disks that went back to a generation; else a folder beside each disk's file."""
    regions: tuple[Region, ...] = msgspec.field(name="region", default=())
    disks: tuple[Disk, ...] = msgspec.field(name="disk", default=())
    policy: Policy = Policy()
    schedules: tuple[Schedule, ...] = msgspec.field(name="schedule", default=())
    hooks: Hooks = Hooks()

    @property
    def backing_sizes(self) -> dict[str, int]:
        """Bytes of each backing file, main memory first, by region name."""
        return {RAM: int(self.memory), **{region.name: int(region.size) for region in self.regions}}


_TABLES: dict[str, type[msgspec.Struct]] = {
    "": Description,
    "region": Region,
    "disk": Disk,
    "firmware": FirmwareFiles,
    "policy": Policy,
    "schedule": Schedule,
    "hooks": Hooks,
}


def load(path: Path, *, host_memory: int | None = None) -> Description:
    """Read and check a VM.toml. `host_memory` is what this machine has, in bytes; tests set it.

    Raises ConfigurationError.
    """
    data, lines = read_toml(path)
    reader = _Reader(path, lines)
    reader.check_keys(data)
    description = reader.convert(data)
    for key, problem in _problems(description):
        reader.fail(key, problem)
    if host_memory is None:
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = sum(description.backing_sizes.values())
    if needed > host_memory:
        largest = max(range(len(description.regions)), key=lambda at: description.regions[at].size, default=None)
        in_region = largest is not None and description.regions[largest].size > description.memory
        reader.fail(
            f"region[{largest}].size" if in_region else "memory",
            f"memory and regions together need {format_size(needed)}, and this machine has {format_size(host_memory)}",
        )
    return description


class _Reader:
    """Decodes one file; every problem becomes a ConfigurationError at the right line."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self._file, self._lines = str(path), lines
        self._folder = path.absolute().parent

    def fail(self, key: str, problem: str) -> NoReturn:
        """`key` is dotted, empty for the whole file."""
        raise ConfigurationError(self._file, problem, line=self._lines.of(key), key=key or None)

    def check_keys(self, data: Mapping[str, Any]) -> None:
        """Unknown keys, with the known one that was probably meant."""
        for key, problem in _unknown(data, Description):
            if key == "network":
                problem = "networks are given to QEMU as they are, for example extra = ['-nic', 'user']"
            self.fail(key, problem)
        for name, table in data.items():
            kind = _TABLES.get(name)
            for at, entry in enumerate(table if isinstance(table, list) else [table]):
                if kind is None or not isinstance(entry, dict):
                    continue  # a plain value, or a wrong one, which the decoder will name
                place = f"{name}[{at}]" if isinstance(table, list) else name
                for key, problem in _unknown(entry, kind):
                    self.fail(f"{place}.{key}", problem)

    def convert(self, data: Mapping[str, Any]) -> Description:
        """Types, defaults, sizes in bytes, absolute paths."""
        try:
            raw = msgspec.convert(data, Description, dec_hook=self._decode)
        except msgspec.ValidationError as error:
            problem, _, place = str(error).partition(" - at `$")
            key = place.rstrip("`").lstrip(".")
            missing = re.fullmatch("Object missing required field `(.*)`", problem)
            if missing:
                self.fail(f"{key}.{missing[1]}" if key else missing[1], "is missing")
            if problem.startswith("Invalid enum value"):
                problem = f"{problem.removeprefix('Invalid enum value ')} is not one of {', '.join(_choices(key))}"
            self.fail(key, re.sub("^Expected `(.*)`, got `(.*)`$", _types, problem))
        hooks, command = raw.hooks, raw.hooks.before_boot
        if command and "/" in command[0]:
            hooks = Hooks(before_boot=(str(self._folder / command[0]), *command[1:]))
        return msgspec.structs.replace(
            raw,
            hooks=hooks,
            qemu=str(self._folder / raw.qemu) if "/" in raw.qemu else raw.qemu,
            repository=None if raw.repository is None else str(self._folder / raw.repository),
        )

    def _decode(self, kind: type, value: Any) -> Any:
        """msgspec's hook for types that it does not know; a ValueError gets the key from it."""
        if kind is Size:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError("is not a size: write bytes or use a suffix, as in 64MiB")
            return Size(parse_size(value))
        if kind is Path:
            if not isinstance(value, str) or not value:
                raise ValueError("is not a path")
            return self._folder / value
        raise NotImplementedError(kind)  # a field of a new type: a mistake in this module


def _unknown(data: Mapping[str, Any], kind: type[msgspec.Struct]) -> Iterable[tuple[str, str]]:
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    for key in data:
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            yield key, f"unknown key: {hint}"


def _choices(key: str) -> list[str]:
    """The words that the field at `key` may hold."""
    table, _, name = key.rpartition(".")
    hints = typing.get_type_hints(_TABLES[table.partition("[")[0]])
    kinds = [hints[name], *typing.get_args(hints[name])]
    return [str(word) for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]


def _types(match: re.Match[str]) -> str:
    words = {"str": "text", "int": "a whole number", "bool": "true or false", "object": "a table", "array": "a list"}
    words |= {"float": "a number with a fraction", "null": "nothing"}
    wanted, found = (" or ".join(words.get(each, each) for each in side.split(" | ")) for side in match.groups())
    return f"must be {wanted}, not {found}"


def _problems(vm: Description) -> Iterable[tuple[str, str]]:
    """(key, problem) of everything that types do not say."""
    if not _VM_NAME.fullmatch(vm.name):
        yield "name", f"{vm.name!r} is not a VM's name: up to 64 letters, digits, . _ or -, a letter or digit first"
    yield from _size_problems("memory", vm.memory, MEMORY_BYTES_MIN)
    if not 1 <= vm.cpus <= CPUS_MAX:
        yield "cpus", f"must be from 1 to {CPUS_MAX}"
    if not _MACHINE.fullmatch(vm.machine):
        yield "machine", f"{vm.machine!r} is not a machine type: options for it go into extra, as -machine"
    if not vm.qemu:
        yield "qemu", "must name a program"
    if vm.cpu == "":
        yield "cpu", "must name a CPU model"
    if vm.kernel is None:
        for key, value in (("initrd", vm.initrd), ("append", vm.append)):
            if value is not None:
                yield key, "is only used together with kernel, which is not set"
    yield from _file_problems(vm)
    for at, argument in enumerate(vm.extra):
        if argument.startswith("-") and argument.lstrip("-") in _OURS:
            yield f"extra[{at}]", f"{argument} is set by Perdure itself"
        if "\0" in argument or "\n" in argument:
            yield f"extra[{at}]", "must not contain line breaks"
    if len(vm.regions) > REGIONS_MAX:
        yield f"region[{REGIONS_MAX}]", f"no more than {REGIONS_MAX} regions are possible"
    yield from _name_problems(
        "region", [region.name for region in vm.regions], {RAM: "main memory", DEVICES: "device state"}
    )
    yield from _name_problems("disk", [disk.name for disk in vm.disks], {})
    for at, disk in enumerate(vm.disks):
        if disk.capture and disk.readonly:
            yield f"disk[{at}].capture", "a disk that the guest cannot write to is not captured"
    for at, region in enumerate(vm.regions):
        yield from _size_problems(f"region[{at}].size", region.size, REGION_BYTES_MIN)
    yield from policy.problems(vm.policy, vm.schedules)


def _size_problems(key: str, size: int, smallest: int) -> Iterable[tuple[str, str]]:
    if size < smallest:
        yield key, f"{format_size(size)} is too small: at least {format_size(smallest)}"
    if size % ALIGNMENT:
        yield key, f"{size} bytes are not a multiple of {format_size(ALIGNMENT)}"


def _file_problems(vm: Description) -> Iterable[tuple[str, str]]:
    files: list[tuple[str, Path | None]] = [("kernel", vm.kernel), ("initrd", vm.initrd)]
    if isinstance(vm.firmware, FirmwareFiles):
        files += [("firmware.code", vm.firmware.code), ("firmware.vars", vm.firmware.vars)]
    files += [(f"disk[{at}].file", disk.file) for at, disk in enumerate(vm.disks)]
    for key, path in files:
        if path is None:
            continue
        if not path.exists():
            yield key, f"there is no file {path}"
        elif path.is_dir():
            yield key, f"{path} is a folder"


def _name_problems(table: str, names: list[str], reserved: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for at, name in enumerate(names):
        key = f"{table}[{at}].name"
        if not _PART_NAME.fullmatch(name):
            yield key, f"{name!r} is not a {table}'s name: up to 24 letters, digits, . _ or -, a letter first"
        if name in reserved:
            yield key, f"{name!r} is the name of {reserved[name]}: choose another"
        if name in names[:at]:
            yield key, f"two {table}s are named {name}"
