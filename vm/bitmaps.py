"""What the guest has written on its disks since a generation: QEMU's dirty bitmaps.

Names of ours, on the node of a disk (`vm.naming`):

    perdure-since-TOKEN   records what is written from an instant on, in QEMU's memory
    perdure-kept-TOKEN    the same, and QEMU puts it into the image (qcow2) when it ends, and finds it there again
    perdure-frozen        what had been written at the instant that is being captured

The token stands in the metadata of the generation with that instant, so that a bitmap says by itself which generation
it belongs to, and whoever commits the generation makes the bitmap that of the VM's disk in the same step. One that no
generation names, and one that QEMU calls inconsistent (it had ended without writing it), is not trusted. Nor is one
whose image builds on a file that was changed since. (That an image goes back to an internal snapshot of its own, QEMU
and qemu-img refuse as long as there is a bitmap.)

Order of a capture: `prepare` while the guest runs; `begin` within the stop, one transaction for all disks; after the
export has been read, and the generation committed or not, `settle`. The older bitmap records on until then, so that
nothing has to be merged back where a capture comes to nothing.

Only between captures a bitmap is of the kept sort: when QEMU saves the state of devices it writes those into the image,
drops them from memory and reads them again when the guest goes on, all of it in the pause (7 ms each way, QEMU 10.0).

Coroutines of the monitor's loop. Source: QEMU, docs/interop/bitmaps.rst, qapi/block-core.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base.errors import VirtualMachineError
from vm.monitor import COMMAND_SECONDS, Monitor

FROZEN = "perdure-frozen"
"""Name of the bitmap that is exported."""
GRANULARITY = 64 << 10
"""Bytes of a bit."""

_OURS, _SINCE, _KEPT = "perdure-", "perdure-since-", "perdure-kept-"
_KEEPING = ("qcow2",)
"""Formats that have room for bitmaps."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One of ours. `dirty_bytes` is QEMU's count."""

    name: str
    dirty_bytes: int
    recording: bool
    busy: bool
    inconsistent: bool

    @property
    def kept(self) -> bool:
        """Whether it outlives QEMU."""
        return self.name.startswith(_KEPT)


@dataclass(frozen=True, slots=True)
class Followed:
    """What QEMU has of a disk: its format, and bitmaps of ours. `size` in bytes; `backing` stands for the files that
    the image builds on, as they are now."""

    disk: str
    driver: str
    size: int
    bitmaps: tuple[Bitmap, ...]
    backing: str

    def new_token(self) -> str:
        """For a bitmap that begins now. It says on what the image builds, which no bitmap follows."""
        return self.backing + secrets.token_hex(8)

    def since(self, token: str) -> Bitmap | None:
        """The bitmap that records since a generation with this token; None if there is none to trust."""
        names = _SINCE + token, _KEPT + token
        return next((each for each in self.bitmaps if each.name in names and _is_right(each)), None)

    def problem(self, token: str | None, generation: str) -> str | None:
        """Why it is not known what was written since a generation; None if it is."""
        if token is None:
            return f"it was not followed since {generation}"
        if self.since(token) is not None:
            return None if token.startswith(self.backing) else "a backing file of its image was changed"
        found = [each for each in self.bitmaps if each.name in (_SINCE + token, _KEPT + token)]
        if any(each.inconsistent for each in found):
            return f"its bitmap since {generation} is inconsistent: QEMU had not ended as it should"
        if found:
            return f"its bitmap since {generation} does not record any more"
        if self.driver in _KEEPING:
            return f"it has no bitmap since {generation}"
        return f"it has no bitmap since {generation}: QEMU was started anew, and a {self.driver} image keeps none"


async def look(monitor: Monitor, disks: Sequence[str], *, timeout_s: float = COMMAND_SECONDS) -> dict[str, Followed]:
    """What QEMU has of these disks; those that it does not have are left out. Raises VirtualMachineError."""
    nodes = await monitor.execute("query-named-block-nodes", timeout_s=timeout_s)
    by_name = {each["node-name"]: each for each in nodes}
    found = {disk: by_name.get(monitor.names.node(disk)) for disk in disks}
    return {disk: _followed(disk, node) for disk, node in found.items() if node is not None}


async def prepare(monitor: Monitor, tokens: Mapping[str, str | None]) -> None:
    """Before a stop: of each disk's bitmaps of ours only the one with its token is left, in memory.

    Raises VirtualMachineError.
    """
    for disk, followed in (await look(monitor, list(tokens))).items():
        token, node = tokens[disk], monitor.names.node(disk)
        good = None if token is None else followed.since(token)
        actions = [_remove(node, each) for each in followed.bitmaps if each is not good]
        if good is not None and token is not None and good.kept:
            actions += [*_copied(node, good.name, _SINCE + token, kept=False), _remove(node, good)]
        if actions:
            await _act(monitor, actions)


async def begin(monitor: Monitor, tokens: Mapping[str, tuple[str | None, str]]) -> None:
    """Within the stop: keep what each disk's bitmap (first token, if any) says now as FROZEN, and follow what is
    written from now on (second token). All or nothing. Raises VirtualMachineError."""
    actions = []
    for disk, (old, new) in tokens.items():
        node = monitor.names.node(disk)
        if old is not None:
            actions += _copied(node, _SINCE + old, FROZEN, kept=False, records=False)
        actions.append(_add(node, _SINCE + new))
    if actions:
        await _act(monitor, actions)


async def settle(monitor: Monitor, tokens: Mapping[str, str | None]) -> None:
    """Outside of captures: of each disk's bitmaps of ours only what has its token is left, put where it outlives QEMU
    if that is possible. One that is not to be trusted stays, to say so.

    Raises VirtualMachineError; the bitmap with the token is there in any case.
    """
    for disk, followed in (await look(monitor, list(tokens))).items():
        token, node = tokens[disk], monitor.names.node(disk)
        good = None if token is None else followed.since(token)
        names = () if token is None else (_SINCE + token, _KEPT + token) if good is None else (good.name,)
        others = [_remove(node, each) for each in followed.bitmaps if each.name not in names]
        if good is not None and token is not None and not good.kept and followed.driver in _KEEPING:
            with contextlib.suppress(VirtualMachineError):  # an old version of the format, an image that is full
                kept = _copied(node, good.name, _KEPT + token, kept=True)
                await _act(monitor, [*others, *kept, _remove(node, good)])
                continue
        if others:
            await _act(monitor, others)


def _followed(disk: str, node: Mapping[str, Any]) -> Followed:
    bitmaps = tuple(
        Bitmap(
            name=str(each["name"]),
            dirty_bytes=int(each["count"]),
            recording=bool(each["recording"]),
            busy=bool(each["busy"]),
            inconsistent=bool(each.get("inconsistent")),
        )
        for each in node.get("dirty-bitmaps", ())
        if str(each.get("name", "")).startswith(_OURS)  # QEMU's own have no name
    )
    return Followed(disk, str(node["drv"]), int(node["image"]["virtual-size"]), bitmaps, _backing(node["image"]))


def _backing(image: Mapping[str, Any]) -> str:
    """A digest of size and time of all backing files; what is no file does not change."""
    facts = []
    while (behind := image.get("backing-image")) is not None:
        image = behind
        with contextlib.suppress(OSError):
            path = str(image["filename"])
            found = os.stat(path)
            facts.append(f"{path} {found.st_size} {found.st_mtime_ns}")
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def _is_right(bitmap: Bitmap) -> bool:
    return bitmap.recording and not bitmap.inconsistent


def _copied(node: str, source: str, target: str, *, kept: bool, records: bool = True) -> list[dict[str, Any]]:
    arguments = {"node": node, "target": target, "bitmaps": [source]}
    merge = {"type": "block-dirty-bitmap-merge", "data": arguments}
    return [_add(node, target, kept=kept, records=records), merge]


def _add(node: str, name: str, *, kept: bool = False, records: bool = True) -> dict[str, Any]:
    data = {"node": node, "name": name, "granularity": GRANULARITY, "persistent": kept}
    return {"type": "block-dirty-bitmap-add", "data": data | {"disabled": not records}}


def _remove(node: str, bitmap: Bitmap) -> dict[str, Any]:
    return {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": bitmap.name}}


async def _act(monitor: Monitor, actions: Sequence[dict[str, Any]]) -> None:
    await monitor.execute("transaction", actions=list(actions))
