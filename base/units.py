"""Sizes: the page, and the way people write and read byte counts. Pure functions."""

from __future__ import annotations

import re

PAGE = 4096
"""Bytes of a page of guest memory, the unit of tags, tracking and deduplication."""

_SUFFIXES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?)\s*(?:([KMGTkmgt]?)(?:iB|i)?|B)\s*")


def parse_size(text: str | int) -> int:
    """Bytes from `64MiB`, `64M`, `0x1000`, `4096` or a plain int; suffixes are powers of 1024.

    Raises ValueError for anything else, and for what is not a whole number of bytes.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is not a size")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write bytes or use a suffix, as in 64MiB")
    number, suffix = match[1], (match[2] or "").upper()
    if number[:2].lower() == "0x":
        return int(number, 16) * _SUFFIXES[suffix]
    if "." not in number:
        return int(number) * _SUFFIXES[suffix]
    whole = float(number) * _SUFFIXES[suffix]
    if not whole.is_integer():
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(whole)


def format_size(count: int) -> str:
    """`12.3 MiB` for people; bytes below 1 KiB are given as they are."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def pages(size: int) -> int:
    """How many pages `size` bytes need."""
    return -(-size // PAGE)
