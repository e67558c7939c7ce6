"""A QEMU that somebody else has launched: which process it is, and what in it is what a VM.toml describes.

Nothing is taken from its command line that QEMU itself says. Regions are found by the ids of their memory back ends or
devices, or by their size; disks by the files of their images. Where their memory lies in QEMU's process is asked with
`gpa2hva` and looked up in /proc/PID/maps.

`find` blocks; coroutines belong to the monitor's loop. Errors name the VM and say what to do.

Source: unix(7), SO_PEERCRED; QEMU, qapi/machine.json, qapi/block.json, HMP `gpa2hva`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import ConflictError, NotFoundError, VirtualMachineError
from base.units import format_size
from vm import mappings
from vm.addresses import AddressMap
from vm.config import RAM, Description, Disk
from vm.identity import state_of
from vm.mappings import Place
from vm.memory import BackingFile
from vm.monitor import Monitor
from vm.naming import Names, device_path

GREETING_SECONDS = 5.0
"""For QEMU's first words: it says them at once, unless it serves somebody else."""
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid: unix(7)
_GREETING_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Found:
    """A QEMU process. `arguments` are those that it was started with, `user` is its user's number."""

    pid: int
    arguments: tuple[str, ...]
    user: int


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """Where a region lies in QEMU's process: from `start` on. `file` is None where QEMU shares it with nobody; then
    `anonymous` says whether it is of no file at all."""

    region: str
    start: int
    size: int
    file: BackingFile | None
    anonymous: bool = False


def find(vm: str, path: Path, timeout_s: float = GREETING_SECONDS) -> Found:
    """Which QEMU listens at a QMP socket. It is free again when this returns.

    Raises NotFoundError (nobody listens), ConflictError (it is no QMP, or serves somebody else), VirtualMachineError.
    """
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConflictError(f"VM {vm}: {path} is no socket: name one that QEMU was given with -qmp unix:...")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            pid, _, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if state_of(pid) == "T":  # say at once what else would be a long silence
                raise ConflictError(f"VM {vm}: QEMU (process {pid}) is stopped: kill -CONT {pid} lets it go on")
            with connection.makefile("rwb") as stream:
                if "QMP" not in json.loads(stream.readline(_GREETING_BYTES_MAX)):
                    raise _no_qmp(vm, path)
                threads = _threads(stream)
    except TimeoutError as error:
        raise ConflictError(
            f"VM {vm}: QEMU said nothing at {path} for {timeout_s:g} s: it serves one client at a time, and another "
            "program is connected (give QEMU a second -qmp socket for Perdure), or it hangs"
        ) from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotFoundError(f"VM {vm}: nobody listens at {path}: is QEMU running?") from error
    except OSError as error:
        raise VirtualMachineError(f"VM {vm}: cannot connect to {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _no_qmp(vm, path) from error
    found = _process(vm, path, pid, threads)
    _maps(vm, found.pid)  # what cannot be looked at should not be found to lack what it has
    return found


async def names_of(monitor: Monitor, description: Description, pid: int) -> Names:
    """What this QEMU calls the parts of the VM. Raises ConflictError that says what does not fit the description."""
    memories = await _memories(monitor, description)
    nodes: dict[str, str] = {}
    devices: dict[str, str] = {}
    blocks = [each for each in await monitor.execute("query-block") if each.get("inserted")]
    for disk in description.disks:
        block = _block_of(disk, blocks, monitor.vm, pid)
        nodes[disk.name] = str(block["inserted"]["node-name"])
        devices[disk.name] = device_path(block)
    return Names(memories, nodes, devices)


async def memory_places(
    monitor: Monitor, description: Description, addresses: AddressMap, pid: int
) -> list[MemoryPlace]:
    """Where main memory and the regions lie in QEMU's process. Raises VirtualMachineError."""
    found = {}
    for name in description.backing_sizes:
        address = addresses.address_of(name, 0)
        said = await monitor.human(f"gpa2hva {address:#x}")
        match = re.search(r"is 0x([0-9a-f]+)\s*$", said.strip())
        if match is None:
            raise VirtualMachineError(f"VM {monitor.vm}: QEMU does not say where {name} lies: {said.strip()}")
        found[name] = int(match[1], 16)
    maps = _maps(monitor.vm, pid)
    sizes = description.backing_sizes
    return [_memory_place(monitor.vm, pid, name, at, sizes[name], maps) for name, at in found.items()]


def _maps(vm: str, pid: int) -> bytes:
    try:
        os.readlink(f"/proc/{pid}/cwd")  # needed as well, and may be forbidden where the map is not
        return Path(f"/proc/{pid}/maps").read_bytes()
    except OSError as error:
        user = ""
        with suppress(OSError):
            user = f" (number {os.stat(f'/proc/{pid}').st_uid})"
        raise VirtualMachineError(
            f"VM {vm}: QEMU (process {pid}) may not be looked at ({error.strerror}): "
            f"run perdure as root or as QEMU's user{user}"
        ) from error


def _memory_place(vm: str, pid: int, name: str, start: int, size: int, maps: bytes) -> MemoryPlace:
    place = mappings.place_at(maps, start)
    if place is None:
        raise VirtualMachineError(f"VM {vm}: QEMU's memory of {name} is not where it says")
    if not place.shared or not place.inode:
        inside = start + size <= place.mapping.end
        return MemoryPlace(name, start, size, None, anonymous=not place.inode and inside)
    if _offset(place, start):
        raise ConflictError(
            f"VM {vm}: {name} does not begin at the beginning of its backing file: that is not supported"
        )
    return MemoryPlace(name, start, size, BackingFile(name, Path(mappings.file_of(pid, place)), size))


def _offset(place: Place, address: int) -> int:
    return place.mapping.offset + address - place.mapping.start


def _no_qmp(vm: str, path: Path) -> ConflictError:
    return ConflictError(
        f"VM {vm}: what listens at {path} does not speak QMP: name the socket of -qmp, not another one"
    )


def _threads(stream: Any) -> list[int]:
    """Of the virtual processors, as QEMU says it."""
    for command in ("qmp_capabilities", "query-cpus-fast"):
        stream.write(json.dumps({"execute": command}).encode() + b"\n")
        stream.flush()
        while "event" in (answer := json.loads(stream.readline() or b"{}")):
            pass
    return [int(each["thread-id"]) for each in answer.get("return", ())]


def _process(vm: str, path: Path, pid: int, threads: Sequence[int]) -> Found:
    """The process that has these threads: the socket's maker, unless that was one which launched QEMU with it."""
    for candidate in (pid, *threads[:1]):
        folder = Path(f"/proc/{candidate}")
        try:
            match = re.search(r"^Tgid:\s+(\d+)$", (folder / "status").read_text(), re.MULTILINE)
            if match is not None:  # a thread's folder is there, too, though it is not listed
                folder = Path(f"/proc/{match[1]}")
            if all((folder / "task" / str(thread)).exists() for thread in threads):
                words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                arguments = tuple(word.decode(errors="surrogateescape") for word in words)
                return Found(int(folder.name), arguments, folder.stat().st_uid)
        except OSError:
            continue
    raise VirtualMachineError(
        f"VM {vm}: the process behind {path} is not to be seen from here: run perdure where QEMU runs, not outside of "
        "its container"
    )


async def _memories(monitor: Monitor, description: Description) -> dict[str, str]:
    """Regions by the ids of memory back ends."""
    vm = monitor.vm
    sizes = {str(each.get("id")): int(each["size"]) for each in await monitor.execute("query-memdev")}
    main = str(await monitor.execute("qom-get", path="/machine", property="memory-backend")).rpartition("/")[2]
    if main not in sizes:
        raise ConflictError(f"VM {vm}: its main memory is in several parts (NUMA): such a VM cannot be attached")
    if sizes[main] != description.memory:
        raise ConflictError(
            f"VM {vm}: QEMU has {format_size(sizes[main])} of main memory, and is described with "
            f"{format_size(description.memory)}: correct memory in the file"
        )
    memories = {main: RAM}
    modules = [each["data"] for each in await monitor.execute("query-memory-devices") if each["type"] == "nvdimm"]
    named = [each for each in description.regions if any(_is_called(module, each.name) for module in modules)]
    for region in (*named, *(each for each in description.regions if each not in named)):
        memories[_module_of(vm, region.name, int(region.size), modules)] = region.name
    return memories


def _module_of(vm: str, name: str, size: int, modules: list[dict[str, Any]]) -> str:
    """Id of the memory back end of a region; it is taken out of `modules`."""
    chosen = [each for each in modules if _is_called(each, name)]
    chosen = chosen or [each for each in modules if int(each["size"]) == size]
    if len(chosen) != 1 or int(chosen[0]["size"]) != size:
        there = ", ".join(f"{_memory_id(each)} ({format_size(int(each['size']))})" for each in modules) or "none"
        which = "several NVDIMMs of that size" if len(chosen) > 1 else "no such NVDIMM"
        raise ConflictError(
            f"VM {vm}: region {name} ({format_size(size)}): QEMU has {which} (it has {there}): call a region by the id "
            "of its memory back end, or of its device"
        )
    modules.remove(chosen[0])
    return _memory_id(chosen[0])


def _is_called(module: Mapping[str, Any], name: str) -> bool:
    return _memory_id(module) == name or module.get("id") in (name, f"nvdimm-{name}")


def _memory_id(module: Mapping[str, Any]) -> str:
    return str(module["memdev"]).rpartition("/")[2]


def _block_of(disk: Disk, blocks: Iterable[Mapping[str, Any]], vm: str, pid: int) -> Mapping[str, Any]:
    """The entry of `query-block` whose image is the file of a disk."""
    files = []
    for each in blocks:
        inserted = each["inserted"]
        file = str(inserted["image"]["filename"])
        files.append(file)
        if not _same_file(disk.file, file, pid) or not device_path(each):
            continue
        if inserted["drv"] not in (disk.format, "host_device" if disk.format == "raw" else disk.format):
            raise ConflictError(
                f"VM {vm}: disk {disk.name} is {inserted['drv']} in QEMU, and is described as {disk.format}"
            )
        if bool(inserted["ro"]) and not disk.readonly:
            raise ConflictError(f"VM {vm}: QEMU has disk {disk.name} read-only: set readonly = true in the file")
        return each
    raise ConflictError(
        f"VM {vm}: QEMU has no disk of the file {disk.file} (it has {', '.join(files) or 'none'}): correct [[disk]]"
    )


def _same_file(path: Path, file: str, pid: int) -> bool:
    try:
        return os.path.samefile(path, os.path.join(f"/proc/{pid}/cwd", file))
    except OSError:
        return str(path) == file
