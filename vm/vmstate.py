"""Registers out of a saved device state: QEMU's migration stream, which describes itself in JSON at its end.

Only sections of processors are looked at. A section begins with a type, its number, name, instance and version, and
holds the fields of the description one after the other, big-endian; pure functions.

Source: QEMU, docs/devel/migration.rst, migration/savevm.c, target/i386/machine.c.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from base.errors import IntegrityError

_DESCRIPTION = 0x06
_SECTION_FULL = 0x04
_SUBSECTION = 0x05
_FOOTER = 0x7E
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register, or a table's: `flags` as in a descriptor."""

    selector: int
    base: int
    limit: int
    flags: int


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor of an x86-64 machine: `registers` by name (rax ... r15, rip, rflags, cr0 to cr4, kernel_gs_base),
    `segments` by name (es, cs, ss, ds, fs, gs, ldt, tr, gdt, idt)."""

    number: int
    registers: Mapping[str, int]
    segments: Mapping[str, Segment]


def processors(state: bytes, name: str) -> list[Processor]:
    """The processors of a device state, by number; `name` is for messages. Raises IntegrityError if there are none."""
    try:
        devices = _description(state, name).get("devices", ())
        found = [
            _processor(_section(state, device, name), device, name) for device in devices if device.get("name") == "cpu"
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise IntegrityError(name, "the device state's description of itself makes no sense") from error
    if not found:
        raise IntegrityError(name, "the device state has no processor of an x86 machine")
    return sorted(found, key=lambda each: each.number)


def _description(state: bytes, name: str) -> dict[str, Any]:
    """The JSON at the end."""
    at = len(state)
    while (at := state.rfind(_DESCRIPTION, 0, at)) >= 0:
        if at + 5 <= len(state) and struct.unpack_from(">I", state, at + 1)[0] == len(state) - at - 5:
            try:
                found = json.loads(state[at + 5 :])
            except (ValueError, RecursionError):
                break
            if isinstance(found, dict):
                return found
    raise IntegrityError(name, "the device state does not end with a description of itself")


def _section(state: bytes, device: Mapping[str, Any], name: str) -> memoryview:
    """Where the fields of a device begin."""
    label = str(device["name"]).encode()
    key = struct.pack(">B", len(label)) + label + struct.pack(">II", device["instance_id"], device["version"])
    at = -1
    while (at := state.find(key, at + 1)) >= 0:
        begin, size = at + len(key), sum(length for _, length, _ in _fields(device))
        number, behind = state[at - 4 : at], state[begin + size : begin + size + 5]
        known = at >= 5 and state[at - 5] == _SECTION_FULL
        if known and (behind[:1] == bytes([_SUBSECTION]) or behind == bytes([_FOOTER]) + number):
            return memoryview(state)[begin : begin + size]
    raise IntegrityError(name, f"the device state does not have processor {device['instance_id']} that it describes")


def _fields(device: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Name, length in bytes and description of each field, in order. Raises what its caller takes for nonsense."""
    for field in device.get("fields", ()):
        size, count = int(field["size"]), int(field.get("array_len", 1))
        if size < 0 or count < 0:
            raise ValueError
        yield str(field["name"]), size * count, field


def _processor(data: memoryview, device: Mapping[str, Any], name: str) -> Processor:
    places: dict[str, list[int]] = {}
    at = 0
    for label, length, field in _fields(device):
        step = int(field["size"])
        places.setdefault(label.removeprefix("env."), []).extend(range(at, at + length, max(step, 1)))
        at += length

    def integers(label: str, count: int = 1) -> list[int]:
        found = places.get(label, [])
        if len(found) < count:
            raise IntegrityError(name, f"the device state does not tell {label} of processor {device['instance_id']}")
        return [struct.unpack_from(">Q", data, place)[0] for place in found[:count]]

    def segments(label: str, count: int = 1) -> list[Segment]:
        found = places.get(label, [])
        if len(found) < count:
            raise IntegrityError(name, f"the device state does not tell {label} of processor {device['instance_id']}")
        parts = [struct.unpack_from(">IQII", data, place) for place in found[:count]]
        return [Segment(*each) for each in parts]

    registers = dict(zip(_GENERAL, integers("regs", len(_GENERAL)), strict=True))
    registers |= {"rip": integers("eip")[0], "rflags": integers("eflags")[0]}
    registers |= {f"cr{number}": integers(f"cr[{number}]")[0] for number in (0, 2, 3, 4)}
    registers["kernel_gs_base"] = integers("kernelgsbase")[0]
    tables = dict(zip(_SEGMENTS, segments("segs", len(_SEGMENTS)), strict=True))
    tables |= {each: segments(each)[0] for each in ("ldt", "tr", "gdt", "idt")}
    return Processor(int(device["instance_id"]), registers, tables)
