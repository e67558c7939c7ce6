"""Whether an index file that others left behind can be trusted, decided before LMDB maps it.

Reading a damaged LMDB file through its map cannot be survived: a truncated one kills the reader with SIGBUS, a
zeroed page reads as an empty one. So the first process that opens an index looks at it from outside:

- The marker says "closed", and the file is the one it describes: orderly shutdown. Trusted.
- The marker says "open", written since this machine was booted, for this very file: somebody was killed. Trusted:
  what LMDB had written is in the page cache, which outlives processes; a transaction becomes visible by one
  write(2) of less than a page, done after all its other pages; locks are robust mutexes.
- Anything else (power loss, a copied or restored file, no marker): a child process (store.index.probe) reads
  everything. It may die of it; then the index is lost, and nothing else with it.

The marker need not be durable: it names the file's inode, size, time and last transaction, so that an older one
which a power loss brought back does not fit the file, or fits a file that was indeed left like that. Pure
decisions and one child process; the caller holds the lock that keeps everybody else out.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

_MAGIC = 0xBEEFC0DE
_PAGE_HEADER = struct.Struct("=QHHHH")
_META = struct.Struct("=IIQQ")
_DATABASE_BYTES = 48
_MARKER_BYTES = 512
_PROBE_SECONDS = 60.0
_PROBE_BYTES_PER_SECOND = 10e6
"""Slower than this and the probe is taken to hang. It reads and checks about 2 GB/s from the page cache."""


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What identifies a state of an LMDB file: inode, bytes, modification time (ns), newest transaction."""

    inode: int
    size: int
    modified: int
    transaction: int
    needed: int
    """Bytes that a file with this newest transaction has at least, short of pages that are free."""


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the lock file. `boot` tells this run of the machine from others."""

    state: str
    boot: str
    file: FileFacts


def read_facts(path: Path) -> FileFacts | None:
    """Facts of an LMDB data file, read without mapping it; None if its head is not one. Raises OSError.

    Source: struct MDB_meta in LMDB 0.9's mdb.c; both meta pages count, the higher transaction is the newest.
    """
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        head = file.read(_PAGE_HEADER.size + _META.size + _DATABASE_BYTES)
        if len(head) < _PAGE_HEADER.size + _META.size + 4:
            return None
        (page_size,) = struct.unpack_from("=I", head, _PAGE_HEADER.size + _META.size)
        if not 512 <= page_size <= 65536 or page_size & (page_size - 1):
            return None
        newest = (-1, 0)
        for number in (0, 1):
            file.seek(number * page_size)
            page = file.read(_PAGE_HEADER.size + _META.size + 2 * _DATABASE_BYTES + 16)
            if len(page) < _PAGE_HEADER.size + _META.size + 2 * _DATABASE_BYTES + 16:
                return None
            if _META.unpack_from(page, _PAGE_HEADER.size)[0] != _MAGIC:
                return None
            last_page, transaction = struct.unpack_from("=QQ", page, len(page) - 16)
            newest = max(newest, (transaction, last_page))
    return FileFacts(
        inode=facts.st_ino,
        size=facts.st_size,
        modified=facts.st_mtime_ns,
        transaction=newest[0],
        needed=(newest[1] + 1) * page_size,
    )


def boot_id() -> str:
    """Tells this run of the machine's kernel from others; empty if unknown, which equals nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_marker(descriptor: int) -> Marker | None:
    """The marker in an open lock file; None if there is none or it is torn."""
    try:
        return msgspec.json.decode(os.pread(descriptor, _MARKER_BYTES, 0), type=Marker)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


def write_marker(descriptor: int, state: str, path: Path) -> None:
    """Mark the index as "open" or "closed". Raises OSError; an index without a marker is probed, not lost."""
    facts = read_facts(path)
    if facts is None:
        return
    data = msgspec.json.encode(Marker(state=state, boot=boot_id(), file=facts))
    os.pwrite(descriptor, data.ljust(_MARKER_BYTES), 0)


def distrust(path: Path, marker: Marker | None, mac_key: bytes) -> str | None:
    """Why this index file cannot be used, None if it can. Raises OSError if it cannot be read at all."""
    facts = read_facts(path)
    if facts is None:
        return "it does not begin like an LMDB file"
    if marker is not None:
        if marker.state == "closed" and marker.file == facts:
            return None
        alive = marker.state == "open" and marker.boot == boot_id() != "" and marker.file.inode == facts.inode
        if alive and facts.size >= facts.needed:
            return None
    return probe(path, facts.size, mac_key)


def probe(path: Path, size: int, mac_key: bytes) -> str | None:
    """Have a child process read all of the index; why it cannot be trusted, None if it can."""
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(each for each in (root, os.environ.get("PYTHONPATH", "")) if each)
    limit = _PROBE_SECONDS + size / _PROBE_BYTES_PER_SECOND
    try:
        child = subprocess.run(
            [sys.executable, "-m", "store.index.probe", str(path.absolute())],
            input=mac_key,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search},
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {limit:.0f} s"
    except OSError as error:
        return f"it could not be examined: {error.strerror}"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        name = str(-child.returncode)
        with suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        return f"reading it kills the reader ({name})"
    said = " ".join(child.stdout.decode(errors="replace").split())
    return said or f"examining it failed with status {child.returncode}"
