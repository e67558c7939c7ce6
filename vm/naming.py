"""What QEMU calls the parts of a VM. A QEMU that we have launched has the names that we have given; one that somebody
else launched has others, which are found once (vm.foreign) and kept with its monitor. Immutable values."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_PERIPHERAL = "/machine/peripheral/"
_BACKEND = "/virtio-backend"


class Names(msgspec.Struct, frozen=True):
    """`memories`: regions by the ids of their memory back ends; `nodes`: block nodes by disk; `devices`: QOM paths of
    the disks' devices by disk. What is not in them is called as we call it."""

    memories: dict[str, str] = {}
    nodes: dict[str, str] = {}
    devices: dict[str, str] = {}

    def region(self, memory: str) -> str:
        """The region that a memory back end is."""
        return self.memories.get(memory, memory)

    def node(self, disk: str) -> str:
        """Block node of a disk."""
        return self.nodes.get(disk, f"disk-{disk}")

    def device(self, disk: str) -> str:
        """QOM path of a disk's device."""
        return self.devices.get(disk, f"{_PERIPHERAL}drive-{disk}")

    def disk_at(self, device: str) -> str | None:
        """The disk whose device is at a QOM path; None if that is no disk of the VM's."""
        for disk, path in self.devices.items():
            if path == device:
                return disk
        ours = f"{_PERIPHERAL}drive-"
        return device.removeprefix(ours) if device.startswith(ours) else None


def device_path(block: Mapping[str, object]) -> str:
    """QOM path of the device of an entry of `query-block`, empty if it has none: there it is an id, or a path, or that
    of the part of a virtio device which is behind its bus."""
    found = str(block.get("qdev", "")).removesuffix(_BACKEND)
    return found if not found or found.startswith("/") else f"{_PERIPHERAL}{found}"
