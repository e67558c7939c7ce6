"""Network devices among QEMU's arguments: the addresses that they have, and other ones for a copy of the VM.

Pure functions. Perdure gives networks to QEMU as the user wrote them, so this looks for devices where QEMU does:
`-nic`, `-net nic`, and `-device` with a driver that is a network card, in QEMU's key=value form or as JSON. QEMU itself
counts addresses up for cards that are given none, first those of -nic and -net.

Source: qemu(1); QEMU, net/net.c (qemu_macaddr_default_if_unset).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, pairwise
from typing import Any

_CARDS = re.compile(
    r"(virtio-net|e1000|igb|rtl8139|vmxnet3|ne2k_|pcnet|i825|tulip|usb-net|sungem|lan9118|xen-net)[\w.-]*", re.ASCII
)
_FIRST = 0x525400123456
"""QEMU's own addresses begin with it."""
_ADDRESS = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")


@dataclass(frozen=True, slots=True)
class Card:
    """A network device: which of the arguments makes it, and its address as `52:54:00:12:34:56`."""

    at: int
    address: str


def cards(arguments: Sequence[str]) -> list[Card]:
    """The network devices of a command line, or of a part of it, with the addresses that QEMU gives them."""
    found = [(at, _given(arguments[at]), first) for at, first in _places(arguments)]
    taken = {address for _, address, _ in found if address is not None}
    given: dict[int, str] = {at: address for at, address, _ in found if address is not None}
    free = iter(text for number in count(_FIRST) if (text := _text(number)) not in taken)
    for at, address, _ in sorted(found, key=lambda each: not each[2]):
        if address is None:
            given[at] = next(free)
    return [Card(at, given[at]) for at, _, _ in found]


def with_new_addresses(arguments: Sequence[str], seed: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The same arguments with addresses that only this `seed` leads to, and (old, new) of each device.

    New ones are locally administered, with 40 bits of the seed's hash: 1,000 copies have one in 10**6 chance that two
    share one.
    """
    changed, pairs = list(arguments), []
    for number, card in enumerate(cards(arguments)):
        digest = blake2b(f"{seed} {number}".encode(), digest_size=5, person=b"perdure mac").digest()
        new = _text(0x52 << 40 | int.from_bytes(digest, "big"))
        changed[card.at] = _with_address(arguments[card.at], new)
        pairs.append((card.address, new))
    return changed, pairs


def changed(then: Sequence[str], now: Sequence[str]) -> list[tuple[str, str]]:
    """(old, new) addresses of devices that have others now; both as vm.command_line.devices_of lists devices."""
    both = [cards([word for each in side for word in each.split(" ", 1)]) for side in (then, now)]
    return [(old.address, new.address) for old, new in zip(*both, strict=False) if old.address != new.address]


def without_addresses(devices: Sequence[str]) -> list[str]:
    """Devices as vm.command_line.devices_of lists them, with no addresses: what two copies of a VM have in common."""
    return [_bare(*each.partition(" ")[::2]) for each in devices]


def _bare(option: str, value: str) -> str:
    if _is_card(option, value):
        if value.lstrip().startswith("{"):
            value = json.dumps({name: each for name, each in _fields(value).items() if name != "mac"}, sort_keys=True)
        else:
            value = ",".join(each for each in value.split(",") if not each.startswith(("mac=", "macaddr=")))
    return f"{option} {value}"


def _places(arguments: Sequence[str]) -> list[tuple[int, bool]]:
    """(where the value stands, whether QEMU counts it among the first) of each network device."""
    options = pairwise(arguments)
    return [(at + 1, option != "-device") for at, (option, value) in enumerate(options) if _is_card(option, value)]


def _is_card(option: str, value: str) -> bool:
    if option == "-nic":
        return value.partition(",")[0] != "none"
    if option == "-net":
        return value.partition(",")[0] == "nic"
    return option == "-device" and bool(_CARDS.match(str(_fields(value).get("driver", ""))))


def _fields(value: str) -> dict[str, Any]:
    """A device's properties, from either form; its driver is one of them."""
    if value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
    driver, *rest = value.split(",")
    return {"driver": driver.removeprefix("driver="), **dict(each.partition("=")[::2] for each in rest)}


def _given(value: str) -> str | None:
    found = str(_fields(value).get("mac") or _fields(value).get("macaddr") or "")
    return found.lower().replace("-", ":") if _ADDRESS.fullmatch(found) else None


def _with_address(value: str, address: str) -> str:
    if value.lstrip().startswith("{"):
        return json.dumps(_fields(value) | {"mac": address})
    kept = [each for each in value.split(",") if not each.startswith(("mac=", "macaddr="))]
    name = "macaddr" if kept[0] == "nic" else "mac"
    return ",".join([*kept, f"{name}={address}"])


def _text(address: int) -> str:
    return ":".join(f"{byte:02x}" for byte in address.to_bytes(6, "big"))
