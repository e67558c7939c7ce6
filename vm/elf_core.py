"""The frame of an ELF core of a whole machine, as `crash`, `gdb` and Volatility read it: headers and notes.

What stands in it is what QEMU's `dump-guest-memory` writes without paging: a PT_LOAD for each span of guest-physical
memory, and for each processor a NT_PRSTATUS and a note of QEMU's own, from which `crash` finds where the kernel lies.
Other than QEMU's, virtual addresses are the physical ones, so that `gdb` can be asked for them. Pure functions.

Source: System V ABI, "Program Header" and "Note Section"; linux/elfcore.h; QEMU, target/i386/arch_dump.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from base.units import PAGE
from vm.addresses import Span
from vm.vmstate import Processor, Segment

_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_CORE, _X86_64, _LITTLE, _64_BITS, _CURRENT = 4, 62, 1, 2, 1
_PT_LOAD, _PT_NOTE, _READ_WRITE_EXECUTE = 1, 4, 7
_NT_PRSTATUS, _NT_QEMU = 1, 0
_USER = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "", "rip",
)  # fmt: skip
"""Registers at the beginning of user_regs_struct; the empty name is orig_rax."""
_QEMU = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")


@dataclass(frozen=True, slots=True)
class Frame:
    """`head` stands at the beginning of the file; the bytes of each region of memory from its offset in `places` on;
    the file is `size` bytes long."""

    head: bytes
    places: dict[str, int]
    size: int


def frame(spans: Sequence[Span], lengths: dict[str, int], processors: Sequence[Processor]) -> Frame:
    """The frame for memory at `spans`, whose regions have `lengths` in bytes."""
    notes = b"".join(_note(b"CORE", _NT_PRSTATUS, _status(each)) for each in processors)
    notes += b"".join(_note(b"QEMU", _NT_QEMU, _qemu(each)) for each in processors)
    begin = _HEADER.size + _PROGRAM.size * (1 + len(spans))
    places: dict[str, int] = {}
    at = -(-(begin + len(notes)) // PAGE) * PAGE
    for region in dict.fromkeys(span.region for span in spans):
        places[region] = at
        at += -(-lengths[region] // PAGE) * PAGE
    programs = [_PROGRAM.pack(_PT_NOTE, 0, begin, 0, 0, len(notes), len(notes), 0)]
    programs += [
        _PROGRAM.pack(
            _PT_LOAD,
            _READ_WRITE_EXECUTE,
            places[span.region] + span.offset,
            span.address,
            span.address,
            span.size,
            span.size,
            PAGE,
        )
        for span in spans
    ]
    header = _HEADER.pack(
        b"\x7fELF", _64_BITS, _LITTLE, _CURRENT, 0, 0, _CORE, _X86_64, _CURRENT, 0, _HEADER.size, 0, 0,
        _HEADER.size, _PROGRAM.size, len(programs), 0, 0, 0,
    )  # fmt: skip
    return Frame(header + b"".join(programs) + notes, places, at)


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    padded = name + b"\0" * (-len(name) % 4 or 4)
    return _NOTE.pack(len(name) + 1, len(content), kind) + padded + content + b"\0" * (-len(content) % 4)


def _status(processor: Processor) -> bytes:
    """struct elf_prstatus: of what is not registers only the process's number, which begins with 1."""
    registers, segments = processor.registers, processor.segments
    values = [registers[name] if name else 0 for name in _USER]
    values += [segments["cs"].selector, registers["rflags"], registers["rsp"], segments["ss"].selector]
    values += [segments["fs"].base, segments["gs"].base]
    values += [segments[name].selector for name in ("ds", "es", "fs", "gs")]
    return struct.pack("<32xI76x27Q8x", processor.number + 1, *values)


def _qemu(processor: Processor) -> bytes:
    """QEMU's QEMUCPUState, version 1."""
    registers = processor.registers
    body = struct.pack("<18Q", *(registers[name] for name in (*_QEMU, "rip", "rflags")))
    body += b"".join(_segment(processor.segments[name]) for name in _QEMU_SEGMENTS)
    body += struct.pack("<6Q", *(registers.get(f"cr{number}", 0) for number in range(5)), registers["kernel_gs_base"])
    return struct.pack("<II", 1, len(body) + 8) + body


def _segment(segment: Segment) -> bytes:
    return struct.pack("<IIIIQ", segment.selector, segment.limit, segment.flags, 0, segment.base)
