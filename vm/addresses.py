"""The guest-physical address map: which byte of which backing file an address is, and back.

Made from QEMU's own answers, never guessed: NVDIMMs from `query-memory-devices`, main memory from the flat view of
`info mtree -f`, which shows how it is split around the hole below 4 GiB. Parts of main memory that the flat view
does not show at the moment (VGA, option ROMs, firmware lie over them) belong to it all the same: the guest reaches
them when the chipset is told so, and a scrub has to. Pure functions and an immutable value; safe anywhere.

Source: QEMU, hw/i386/pc.c and monitor command `info mtree`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from base.errors import NotFoundError, VirtualMachineError
from vm.config import RAM
from vm.naming import Names

_VIEW = re.compile(r'^FlatView #\d+\n((?: AS "[^"\n]*".*\n)+) Root memory region: .*\n((?:  .*\n?)*)', re.MULTILINE)
_RANGE = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom|nv-ram|romd)\): (\S+)(?: @([0-9a-f]{16}))?",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes at guest-physical `address` are the bytes from `offset` on of a region's backing file."""

    region: str
    address: int
    size: int
    offset: int = 0

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class AddressMap:
    """All backed memory of a VM, by address; spans are disjoint. Made by `address_map`."""

    vm: str
    spans: tuple[Span, ...]

    def locate(self, address: int, size: int = 1) -> tuple[str, int]:
        """(region, file offset) of a range that lies in one span. Raises NotFoundError."""
        for span in self.spans:
            if span.address <= address and address + size <= span.end and size > 0:
                return span.region, span.offset + address - span.address
        raise NotFoundError(f"VM {self.vm}: {address:#x} and the {size} bytes from there are not in one region")

    def address_of(self, region: str, offset: int) -> int:
        """Guest-physical address of a byte of a backing file. Raises NotFoundError."""
        for span in self.of(region):
            if span.offset <= offset < span.offset + span.size:
                return span.address + offset - span.offset
        raise NotFoundError(f"VM {self.vm}: region {region} has no byte at offset {offset:#x}")

    def of(self, region: str) -> tuple[Span, ...]:
        """The spans of one region: one for an NVDIMM, one or two for main memory. Raises NotFoundError."""
        found = tuple(span for span in self.spans if span.region == region)
        if not found:
            raise NotFoundError(f"VM {self.vm} has no region {region}")
        return found


def address_map(
    vm: str, devices: Iterable[Mapping[str, Any]], mtree: str, ram_size: int, names: Names | None = None
) -> AddressMap:
    """From the result of `query-memory-devices`, the text of `info mtree -f`, and main memory's size in bytes;
    `names` say which memory back end is which region.

    Raises VirtualMachineError if the answers are not understood or contradict each other.
    """
    names = names or Names()
    shown = _shown(vm, mtree, names)
    spans = [*_main_memory(vm, shown, ram_size), *_modules(vm, devices, shown, names)]
    spans.sort(key=lambda span: span.address)
    for low, high in pairwise(spans):
        if low.end > high.address:
            raise VirtualMachineError(f"VM {vm}: QEMU places {low.region} and {high.region} at the same addresses")
    return AddressMap(vm, tuple(spans))


def _shown(vm: str, mtree: str, names: Names) -> list[Span]:
    """The ranges of memory in the flat view of the whole system; what is no region has QEMU's name."""
    for match in _VIEW.finditer(mtree.replace("\r\n", "\n")):
        if ' AS "memory", root: system' in match[1].splitlines():
            return [
                Span(
                    names.region(name.removeprefix("/objects/")),
                    int(start, 16),
                    int(last, 16) + 1 - int(start, 16),
                    int(offset or "0", 16),
                )
                for start, last, _, name, offset in _RANGE.findall(match[2])
            ]
    raise VirtualMachineError(f"VM {vm}: QEMU's memory map has no view of the system's memory")


def _main_memory(vm: str, shown: list[Span], size: int) -> list[Span]:
    """One span from address 0, and where memory is larger than the chipset's low part, one from 4 GiB on."""
    pieces = [span for span in shown if span.region == RAM]
    shifts = {span.address - span.offset: span for span in reversed(pieces)}
    high = [(shift, first) for shift, first in shifts.items() if shift]
    if 0 not in shifts or len(high) > 1 or max(span.offset + span.size for span in pieces) > size:
        raise VirtualMachineError(f"VM {vm}: main memory in QEMU's memory map is not as expected")
    if not high:
        return [Span(RAM, 0, size)]
    shift, first = high[0]
    low_size = first.offset
    return [Span(RAM, 0, low_size), Span(RAM, low_size + shift, size - low_size, low_size)]


def _modules(vm: str, devices: Iterable[Mapping[str, Any]], shown: list[Span], names: Names) -> Iterable[Span]:
    for device in devices:
        if device.get("type") != "nvdimm":
            continue
        facts = device["data"]
        span = Span(names.region(str(facts["memdev"]).rpartition("/")[2]), int(facts["addr"]), int(facts["size"]))
        if span not in shown:
            raise VirtualMachineError(f"VM {vm}: region {span.region} is not at {span.address:#x} in QEMU's memory map")
        yield span
