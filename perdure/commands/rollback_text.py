"""What `perdure rollback --dry-run` prints. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from base.units import format_size
from perdure.output import size

_FIRST = {
    "full": "the VM is captured in full first",
    "kept": "what of it survives a boot is captured first",
    None: "nothing is captured first: what it has now is lost (--discard)",
}


def preview_text(found: dict[str, Any]) -> Iterator[str]:
    """The plan in lines."""
    point = f"{found['vm']}@{found['generation']}"
    how = "is resumed at" if found["resumes"] else "boots with the persistent memory of"
    if not found["regions"]:
        how = "goes on as it is, with other disks of"
    yield f"{found['vm']} {how} {point}; {_FIRST[found['captured_first']]}"
    since = found["compared_with"]
    if since is not None:
        yield f"against {since} (what the guest has written since comes on top):"
    for region in found["regions"]:
        yield f"region  {region['name']}: {format_size(region['bytes'])}, {size(region['changed_bytes'])} differ"
    for disk in found["disks"]:
        yield f"disk    {disk['disk']}: {format_size(disk['content_bytes'])}, {size(disk['changed_bytes'])} differ"
        yield f"        a new image in {disk['image_folder']} ({format_size(disk['room_bytes'])} free)"
        yield f"        instead of {disk['replaces']}"
    for warning in found["warnings"]:
        yield f"warning {warning}"
