"""What commands say of a VM's disks, for people. Pure functions on JSON documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from base.units import format_size


def reads_text(reads: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each disk of a generation that was read in full, which takes long: why it had to be."""
    for name, done in reads.items():
        if done.get("method") == "rescan":
            yield f"disk {name} was read in full: {done.get('reason')}"


def followed_text(disk: Mapping[str, Any]) -> Iterator[str]:
    """A line for a disk of a running VM: what the next capture of it reads."""
    captured = {"always": "in every generation", "full": "in full generations"}.get(disk.get("captured", ""))
    if captured is None:
        return
    what = f"to be read in full: {disk['problem']}"
    if disk["tracking"] is not None:
        what = f"{format_size(disk['dirty_bytes'])} written since {disk['since']} ({disk['tracking']})"
    yield f"             {captured}; {what}"
    if disk.get("stuck"):
        yield f"             THE GUEST WAITS: {disk['stuck']} (mended, the next `perdure snapshot` lets it go on)"
