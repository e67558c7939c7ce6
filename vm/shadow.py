"""The firmware's shadow: the chipset's switch that shows main memory where the firmware's ROM is (0xC0000-0xFFFFF).

SeaBIOS copies itself into that memory and runs from it. A reset of QEMU's machine does not turn the switch back, so
that SeaBIOS then starts from its used copy, notices, brings the ROM back and resets once more. It asks for that reset
twice, through port 0xCF9 and with a triple fault right behind it. QEMU mostly takes both for one, but measured on
two busy cores it took them for two in 1 of 3 reboots, with SeaBIOS running in between for about 1 ms; where it had got
far enough to use its copy again (1 in 60 to 150), a third reset followed, which nothing told from a reboot of the
guest. With the switch as it is at power-on none of this happens: the firmware starts from ROM and resets nothing.

OVMF has no shadow; for it this changes nothing. To be called while the guest is stopped, before a reset.

Source: SeaBIOS, src/fw/shadow.c, which knows the same two chipsets; Intel 82441FX and 3 Series datasheets (PAM).
"""

from __future__ import annotations

from base.errors import VirtualMachineError
from vm.monitor import Monitor

_ADDRESS, _DATA = 0xCF8, 0xCFC
"""Ports for the configuration of PCI devices; the chipset's host bridge is at bus 0, device 0, function 0."""
_ENABLE = 1 << 31
_SWITCHES = {0x29C08086: range(0x90, 0x97), 0x12378086: range(0x59, 0x60)}
"""PAM registers by the host bridge's vendor and device: q35 and i440fx (`pc`). Others have none."""


async def remove(monitor: Monitor) -> None:
    """Show the ROM again, as at power-on. Raises VirtualMachineError."""
    await _write(monitor, "w", _ADDRESS, _ENABLE)
    for register in _SWITCHES.get(await _read(monitor, "w", _DATA), ()):
        await _write(monitor, "w", _ADDRESS, _ENABLE | register & ~3)
        await _write(monitor, "b", _DATA + (register & 3), 0)


async def _write(monitor: Monitor, width: str, port: int, value: int) -> None:
    said = await monitor.human(f"o /{width} {port:#x} {value:#x}")
    if said:  # the human monitor has no other way to fail
        raise VirtualMachineError(f"VM {monitor.vm}: QEMU does not write port {port:#x}: {said.strip()}")


async def _read(monitor: Monitor, width: str, port: int) -> int:
    said = await monitor.human(f"i /{width} {port:#x}")
    try:
        return int(said.partition("=")[2], 16)
    except ValueError:
        raise VirtualMachineError(f"VM {monitor.vm}: QEMU does not read port {port:#x}: {said.strip()}") from None
