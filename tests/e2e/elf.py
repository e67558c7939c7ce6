"""A reader of ELF files, enough for tests: notes and loadable segments of cores, and where a kernel is loaded. Shares
no code with the writer.

Source: System V ABI, elf(5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Load:
    """A PT_LOAD."""

    offset: int
    virtual: int
    physical: int
    size: int


def loaded(path: Path) -> dict[int, bytes]:
    """What a program has in memory when it is loaded, by physical address; nothing if the file is no ELF file."""
    data = path.read_bytes()
    if data[:4] != b"\x7fELF":
        return {}
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    heads = (struct.unpack_from("<IIQQQQQ", data, table + number * size) for number in range(count))
    return {
        physical: data[offset : offset + length].ljust(memory, b"\0")
        for kind, _, offset, _, physical, length, memory in heads
        if kind == 1
    }


class Core:
    """A core file, opened."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        head = self._read(0, 64)
        assert head[:7] == b"\x7fELF\x02\x01\x01"
        kind, machine = struct.unpack_from("<HH", head, 16)
        assert (kind, machine) == (4, 62)  # a core, of x86-64
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        self.loads: list[Load] = []
        self.notes: list[tuple[str, int, bytes]] = []
        for number in range(count):
            kind, _, offset, virtual, physical, length, memory, _ = struct.unpack(
                "<IIQQQQQQ", self._read(table + number * size, 56)
            )
            if kind == 1:
                assert length == memory
                self.loads.append(Load(offset, virtual, physical, length))
            else:
                assert kind == 4
                self._take_notes(self._read(offset, length))

    def _take_notes(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            name, size, kind = struct.unpack_from("<III", data, at)
            at += 12
            label = data[at : at + name].rstrip(b"\0").decode()
            at += -(-name // 4) * 4
            self.notes.append((label, kind, data[at : at + size]))
            at += -(-size // 4) * 4

    def physical(self, address: int, size: int) -> bytes:
        """Guest-physical memory."""
        for load in self.loads:
            if load.physical <= address and address + size <= load.physical + load.size:
                return self._read(load.offset + address - load.physical, size)
        raise AssertionError(f"{address:#x} is in no segment")

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        data = self._file.read(size)
        assert len(data) == size
        return data
