"""Needs: generations that something outside the repository stands on for longer than any process lives.

A disk whose image is still being filled from a generation needs that generation, also when its host was switched off
meanwhile. A need is a file `need-<16 hex>` in the repository's `leases` folder, durable, without a lock: it holds until
it is dropped. What prune marks, it marks for needs as well (`leases.held` lists them); `forget` refuses a needed
generation, and rules keep it. Whoever records a need does so before he looks whether the generation is there; should
it be forgotten in that very moment, its content stays all the same.

Who is sure that the host of a need is gone for good removes its file.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from base.disk import Disk, replace_file
from base.errors import ConflictError, StorageError

_NAME = re.compile(r"need-[0-9a-f]{16}")
_TEXT_MAX = 1000


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Who needs generations (sequences of their records), for what, since when."""

    generations: tuple[int, ...]
    purpose: str
    host: str
    since: str


def new_name() -> str:
    """A name that no other need has: whoever records one can note it before."""
    return f"need-{secrets.token_hex(8)}"


def record(disk: Disk, folder: Path, name: str, purpose: str, generations: Iterable[int]) -> None:
    """Make a need durable. `folder` is the repository's, of leases. Raises StorageError."""
    assert _NAME.fullmatch(name)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    need = Need(generations=tuple(generations), purpose=purpose, host=socket.gethostname(), since=since)
    replace_file(disk, folder / name, msgspec.json.encode(need) + b"\n")


def drop(folder: Path, name: str) -> None:
    """End a need, be it there or not. Raises StorageError."""
    assert _NAME.fullmatch(name)
    try:
        (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError.from_os(error, str(folder / name), "remove") from error


def listed(folder: Path) -> list[tuple[str, Need]]:
    """All needs, with their names. Of one that cannot be understood, everything is in its purpose.

    Raises StorageError.
    """
    found = []
    try:
        for name in sorted(os.listdir(folder)):
            if _NAME.fullmatch(name):
                with suppress(FileNotFoundError):
                    found.append((name, _decode((folder / name).read_bytes())))
    except OSError as error:
        raise StorageError.from_os(error, str(folder), "read the needs") from error
    return found


def of(folder: Path) -> dict[int, tuple[str, Need]]:
    """By the sequence of a generation, the first need that names it. Raises StorageError."""
    found: dict[int, tuple[str, Need]] = {}
    for name, need in listed(folder):
        for sequence in need.generations:
            found.setdefault(sequence, (name, need))
    return found


def require_none(folder: Path, generation: str, sequence: int) -> None:
    """Raises ConflictError if somebody needs a generation. `generation` is its name."""
    known = of(folder).get(sequence)
    if known is not None:
        name, need = known
        raise ConflictError(
            f"{generation} is needed by {need.purpose} on host {need.host} since {need.since}, until that is filled or "
            f"gone (if it is gone for good, remove {folder / name})"
        )


def _decode(data: bytes) -> Need:
    try:
        need = msgspec.json.decode(data, type=Need)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return Need(generations=(), purpose="a need that cannot be read", host="?", since="?")
    facts = {name: _plain(getattr(need, name)) for name in ("purpose", "host", "since")}
    return msgspec.structs.replace(need, **facts)


def _plain(text: str) -> str:
    """For a message of one line: anybody who writes the folder may have written it."""
    return "".join(each if each.isprintable() else "?" for each in text[:_TEXT_MAX])
