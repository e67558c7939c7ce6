"""Where a process maps a given file, from /proc/PID/maps.

A file is found by device and inode, never by its name: names are reused, and a deleted file keeps its inode. Only
shared mappings count: what is written through a private one never reaches the file. Pure functions and one read.

Source: proc_pid_maps(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ..(.)([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)", re.MULTILINE)


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
