"""The journal of dirty tracking: which generations the write-protect bits of a running QEMU are relative to.

Collecting dirty pages clears the bits that name them. Between that and the commit of the generation the pages are
known only to the process that collected them, so a crash there must be noticed. The journal is one small file in the
VM's runtime folder, replaced atomically:

    {"version": 2, "baselines": {"pm0": "..."}, "pid": ..., "start_ticks": ..., "boot": "...", "collecting": ["ram"]}

Each region has a baseline of its own: main memory is only in full generations, and so stays relative to the last one
of these, while a persistent region is relative to the last generation of any sort.

Invariants: `begin_collect` is durable before the first bit is cleared, and only `committed` takes it back. The
bits are those of one process of one boot; for any other, and for a file that is missing, damaged or of another
version, there is no baseline, and the next generation looks at everything resident. The journal can cost a scan, never
a page. One process at a time writes it (the VM's supervisor); not shared between threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from base.disk import Disk, replace_file
from base.errors import StorageError
from vm.identity import Identity

FORMAT = 2


class _Record(msgspec.Struct, frozen=True):
    version: int
    baselines: dict[str, str]
    pid: int
    start_ticks: int
    boot: str
    collecting: tuple[str, ...]


class Journal:
    """What is known about the bits of one QEMU process."""

    def __init__(self, path: Path, qemu: Identity, disk: Disk) -> None:
        """Reads what an earlier supervisor left. Raises StorageError if the file is there and cannot be read."""
        self._path, self._qemu, self._disk = path, qemu, disk
        self._in_file = _read(path)  # None: nothing, or unknown after a failed write
        nothing = self._record({}, set())
        self._now = self._in_file if self._in_file is not None and self._is_ours(self._in_file) else nothing

    def baseline(self, region: str) -> str | None:
        """Id of the generation since which the bits name every written page; None: look at everything."""
        return None if region in self._now.collecting else self._now.baselines.get(region)

    def begin_collect(self, regions: Iterable[str]) -> None:
        """Bits of these regions are going to be cleared. Returns when that is durable, at once if it was.

        Raises StorageError.
        """
        collecting = self._record(self._now.baselines, {*self._now.collecting, *regions})
        if self._in_file != collecting:
            self._write(collecting)
        self._now = collecting

    def committed(self, generation: str, regions: Iterable[str]) -> None:
        """All that was collected of these regions is in this generation, which is durable.

        Raises StorageError if that could not be written down: true all the same, but a next supervisor will scan.
        """
        names = set(regions)
        baselines = self._now.baselines | dict.fromkeys(names, generation)
        self._now = self._record(baselines, set(self._now.collecting) - names)
        self._write(self._now)

    def _is_ours(self, found: _Record) -> bool:
        return found == self._record(found.baselines, set(found.collecting))

    def _record(self, baselines: Mapping[str, str], collecting: set[str]) -> _Record:
        qemu = self._qemu
        return _Record(FORMAT, dict(baselines), qemu.pid, qemu.start_ticks, qemu.boot, tuple(sorted(collecting)))

    def _write(self, record: _Record) -> None:
        self._in_file = None
        replace_file(self._disk, self._path, msgspec.json.encode(record) + b"\n")
        self._in_file = record


def _read(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (FileNotFoundError, ValueError, RecursionError):  # never written, or damaged: there is no baseline
        return None
    except OSError as error:
        raise StorageError.from_os(error, str(path), "read") from error
