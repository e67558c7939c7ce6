"""Which accelerator a VM gets: KVM where it works, found out by trying, and TCG where it does not.

/dev/kvm can exist and be of no use: QEMU aborts on a CPU model that the host cannot give, or the module emulates
the guest's kernel instruction by instruction, so that firmware still comes up (real and protected mode) while Linux
seems to hang. So a guest of our own is tried that does what a kernel does: it enters 64-bit mode with paging, at
privilege level 0, counts down, and reports. With hardware behind it that takes 30 ms; where stock kernels appeared
to hang it had not ended after 60 s.

The answer is cached for this boot of the host, since a probe that fails can take all of its time. One process at a
time per cache file; a cache that is broken or not ours is measured again.

Source: Intel SDM volume 3, 9.8.5 (entering IA-32e mode); QEMU, -device isa-debugcon.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from base.disk import Disk, replace_file
from base.errors import StorageError
from vm.config import Description

Kind = Literal["kvm", "tcg"]

PROBE_SECONDS = 5.0
"""Time for QEMU to start and count, with a wide margin for a busy host."""
DEFAULT_CPU: dict[Kind, str] = {"kvm": "host", "tcg": "max"}
"""Each the most capable. `host` can only be resumed on the same kind of CPU: who moves VMs names a model."""

_KVM = Path("/dev/kvm")
_DONE = b"K"
_PROGRAM = bytes.fromhex(
    # 16-bit code at F000:FF00, the last 256 bytes below 1 MiB, where the end of the ROM is visible
    "fa 31c0 8ed8"  # cli; xor ax, ax; mov ds, ax
    "66c706001003200000"  # mov dword [0x1000], 0x2003: page tables that map the first 2 MiB to themselves
    "66c706002003300000"  # mov dword [0x2000], 0x3003
    "66c706003083000000"  # mov dword [0x3000], 0x83
    "66b800100000 0f22d8"  # mov eax, 0x1000; mov cr3, eax
    "66b820000000 0f22e0"  # mov eax, 0x20; mov cr4, eax: PAE
    "66b9800000c0 0f32 0d0001 0f30"  # mov ecx, 0xc0000080; rdmsr; or ax, 0x100; wrmsr: EFER.LME
    "2e660f011680ff"  # lgdt cs:[0xff80]
    "0f20c0 660d01000080 0f22c0"  # mov eax, cr0; or eax, 0x80000001; mov cr0, eax: paging and protection
    "66ea5aff0f000800"  # jmp 8:0xfff5a
    # 64-bit code
    "b980f0fa02 ffc9 75fc"  # mov ecx, 50000000; dec ecx; jnz
    "b04b 66ba0204 ee"  # mov al, 'K'; mov dx, 0x402; out dx, al
    "f4 ebfd 0000 00"  # hlt; jmp to it
    # at 0xfff70: null descriptor, 64-bit code (marked as accessed: the ROM cannot be written), and the table's place
    "0000000000000000 ffff0000009baf00 0f00 70ff0f00"
)
_RESET = bytes.fromhex("ea00ff00f0")  # jmp F000:FF00, at the reset vector
_ROM = bytes(65536 - 256) + _PROGRAM.ljust(240, b"\0") + _RESET.ljust(16, b"\0")


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator, the CPU model that it gives if the description names none, and why."""

    kind: Kind
    cpu: str
    reason: str


class _Cached(msgspec.Struct):
    """A probe's result, and all that it is a result for."""

    boot: str
    binary: str
    changed_ns: int
    cpu: str
    problem: str | None


def choose(vm: Description, binary: Path, cache: Path, *, timeout_s: float = PROBE_SECONDS) -> Choice:
    """The accelerator for a launch of `vm` with the QEMU at `binary`; what the description names is not tried."""
    if vm.accelerator != "auto":
        return Choice(vm.accelerator, vm.cpu or DEFAULT_CPU[vm.accelerator], "as described")
    cpu = vm.cpu or DEFAULT_CPU["kvm"]
    problem = _kvm_problem(binary, cpu, cache, timeout_s)
    if problem is None:
        return Choice("kvm", cpu, "KVM works here")
    return Choice("tcg", vm.cpu or DEFAULT_CPU["tcg"], f"KVM is not usable: {problem}")


def probe(binary: Path, kind: Kind, cpu: str, timeout_s: float, folder: Path) -> str | None:
    """Run the small guest; None if it counted in time, else what went wrong. `folder` takes a temporary file."""
    rom = folder / f".probe.{os.getpid()}.rom"
    rom.write_bytes(_ROM)
    try:
        return _run(binary, kind, cpu, timeout_s, rom)
    except OSError as error:
        return f"{binary} cannot be started: {error.strerror or error}"
    finally:
        rom.unlink(missing_ok=True)


def _kvm_problem(binary: Path, cpu: str, cache: Path, timeout_s: float) -> str | None:
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return f"{_KVM} does not exist" if not _KVM.exists() else f"this user may not open {_KVM}"
    try:
        changed = binary.stat().st_mtime_ns
    except OSError as error:
        return f"{binary}: {error.strerror or error}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    wanted = _Cached(boot, str(binary), changed, cpu, None)
    known: _Cached | None = None
    with suppress(OSError, ValueError, RecursionError):
        known = msgspec.json.decode(cache.read_bytes(), type=_Cached)
    if known is not None and msgspec.structs.replace(known, problem=None) == wanted:
        return known.problem
    found = msgspec.structs.replace(wanted, problem=probe(binary, "kvm", cpu, timeout_s, cache.parent))
    with suppress(StorageError):  # it will only have to be found out again
        replace_file(Disk(), cache, msgspec.json.encode(found))
    return found.problem


def _run(binary: Path, kind: Kind, cpu: str, timeout_s: float, rom: Path) -> str | None:
    arguments = [str(binary), "-no-user-config", "-nodefaults", "-display", "none", "-machine", "q35", "-m", "16M"]
    arguments += ["-accel", kind, "-cpu", cpu, "-bios", str(rom), "-no-reboot"]
    arguments += ["-chardev", "stdio,id=debug,signal=off", "-device", "isa-debugcon,iobase=0x402,chardev=debug"]
    deadline = time.monotonic() + timeout_s
    pipe = subprocess.PIPE
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    ) as qemu:
        assert qemu.stdout is not None and qemu.stderr is not None
        try:
            while (left := deadline - time.monotonic()) > 0:
                if not select.select([qemu.stdout], [], [], left)[0]:
                    break
                said = os.read(qemu.stdout.fileno(), 64)
                if _DONE in said:
                    return None
                if not said:
                    lines = qemu.stderr.read().decode(errors="replace").splitlines()
                    told = next((line for line in lines if line and "warning:" not in line), f"status {qemu.wait()}")
                    return f"QEMU ended at once: {told.removeprefix(f'{binary.name}: ').removeprefix('error: ')}"
        finally:
            qemu.kill()
    return f"a guest in 64-bit mode counted for {timeout_s:g} s without coming to 50 million"
