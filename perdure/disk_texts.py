"""What commands say of a VM's disks, for people. Pure functions on JSON documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def reads_text(reads: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each disk of a generation that was read in full, which takes long: why it had to be."""
    for name, done in reads.items():
        if done.get("method") == "rescan":
            yield f"disk {name} was read in full: {done.get('reason')}"
