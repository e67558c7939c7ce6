"""What a QEMU that we did not launch does when its guest reboots, powers off or panics, and who else acts on it.

QEMU has no question for its actions, so what they are is read from its command line. That is where they are put back
to. Pure functions. Source: qemu(1), -action, -no-reboot, -no-shutdown; QEMU, qapi/run-state.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

_DEFAULT = {"reboot": "reset", "shutdown": "poweroff", "panic": "shutdown"}
HELD = {"reboot": "shutdown", "shutdown": "pause", "panic": "pause"}
"""With which the guest stops for us in each case."""


def of(arguments: Sequence[str]) -> dict[str, str]:
    """The actions of a QEMU with these arguments."""
    found = dict(_DEFAULT)
    for name, value in _options(arguments):
        if name == "no-reboot":
            found["reboot"] = "shutdown"
        elif name == "no-shutdown":
            found["shutdown"] = "pause"
        elif name == "action":
            given = dict(each.partition("=")[::2] for each in value.split(","))
            found |= {key: given[key] for key in found if key in given}
    return found


def listeners(arguments: Sequence[str], chardevs: Iterable[Mapping[str, Any]]) -> int:
    """How many programs hear QEMU's events at this moment, whoever asks included. `chardevs`: `query-chardev`."""
    controls, compatible = set(), 0
    for name, value in _options(arguments):
        if name in ("monitor", "qmp", "qmp-pretty"):
            if name != "monitor":
                controls.add(f"compat_monitor{compatible}")
            compatible += 1
        elif name == "mon" and "mode=control" in value.split(","):
            controls.add(
                next((each.removeprefix("chardev=") for each in value.split(",") if "chardev=" in each), value)
            )
    return sum(
        str(each["label"]) in controls and not str(each["filename"]).startswith("disconnected:") for each in chardevs
    )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of options, which begin with one hyphen or two, and the argument after each."""
    for option, value in pairwise([*arguments, ""]):
        if option.startswith("-"):
            yield option.removeprefix("-").removeprefix("-"), value
