"""Where a process maps a given file, from /proc/PID/maps.

A file is found by device and inode, never by its name: names are reused, and a deleted file keeps its inode. Only
shared mappings count: what is written through a private one never reaches the file. Pure functions and one read.

Source: proc_pid_maps(5).
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base import extents
from base.extents import Extents
from base.units import PAGE

_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ..(.)([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)", re.MULTILINE)
_ENTRY_BYTES, _PRESENT_BIT = 8, 63


@dataclass(frozen=True, slots=True)
class Mapping:
    """Addresses [start, end) of a process show a file from byte `offset` on."""

    start: int
    end: int
    offset: int

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return self.end - self.start


def parse(maps: bytes, device: int, inode: int) -> list[Mapping]:
    """The shared mappings of one file in the text of a /proc/PID/maps, by address."""
    found = []
    wanted = b"%d" % inode
    for match in _LINE.finditer(maps):
        start, end, _, sharing, offset, major, minor, number = match.groups()
        if sharing == b"s" and number == wanted and os.makedev(int(major, 16), int(minor, 16)) == device:
            found.append(Mapping(int(start, 16), int(end, 16), int(offset, 16)))
    return found


def shared_mappings(pid: int, file: int) -> list[Mapping]:
    """Where process `pid` maps the open file `file` (a descriptor of ours), by address; empty if nowhere.

    Raises OSError, which includes a process that is gone.
    """
    status = os.fstat(file)
    with open(f"/proc/{pid}/maps", "rb") as maps:
        return parse(maps.read(), status.st_dev, status.st_ino)


def loaded_files(pid: int) -> dict[Path, Extents]:
    """What a process has in its page tables of the files that it maps privately, as its program and its libraries: byte
    ranges of each, in whole pages. Raises OSError. Source: proc_pid_pagemap(5)."""
    found: dict[bytes, list[Extents]] = {}
    with open(f"/proc/{pid}/pagemap", "rb") as tables:
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            match = _LINE.match(line)
            if match is None or match[4] != b"p":
                continue
            name = line[match.end() :].strip()
            if name.startswith(b"/") and not name.endswith(b" (deleted)"):
                start, end, offset = (int(each, 16) for each in match.group(1, 2, 5))
                tables.seek(start // PAGE * _ENTRY_BYTES)
                entries = np.frombuffer(tables.read((end - start) // PAGE * _ENTRY_BYTES), np.uint64)
                pages = np.flatnonzero(entries >> _PRESENT_BIT).astype(np.uint64)
                found.setdefault(name, []).append(extents.from_numbers(pages, PAGE) + offset)
    return {Path(os.fsdecode(name)): extents.union(*parts) for name, parts in found.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """What is mapped at an address: `mapping` has offsets into a file, whose `device` and `inode` are 0 if there is
    none. What is written to a mapping that is not `shared` is the process's alone."""

    mapping: Mapping
    shared: bool
    device: int
    inode: int
    name: str


def place_at(maps: bytes, address: int) -> Place | None:
    """What the text of a /proc/PID/maps has at an address; None if nothing is there."""
    for line in maps.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        start, end, _, sharing, offset, major, minor, number = match.groups()
        if int(start, 16) <= address < int(end, 16):
            name = line[match.end() :].strip().decode(errors="surrogateescape")
            device = os.makedev(int(major, 16), int(minor, 16))
            mapping = Mapping(int(start, 16), int(end, 16), int(offset, 16))
            return Place(mapping, sharing == b"s", device, int(number), name)
    return None


def file_of(pid: int, place: Place) -> str:
    """A path by which the file of a mapping can be opened, also one that has no name any more: by its name, by a
    descriptor that the process has of it, or else by the mapping itself, which takes CAP_CHECKPOINT_RESTORE."""
    names = [place.name]
    with contextlib.suppress(OSError):
        names += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            found = os.stat(name)
            if (found.st_dev, found.st_ino) == (place.device, place.inode):
                return name
    return f"/proc/{pid}/map_files/{place.mapping.start:x}-{place.mapping.end:x}"
