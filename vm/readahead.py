"""Files that are read while QEMU starts, by it or for it, brought into the host's page cache before that.

What a QEMU has of its program and its libraries is noted of one that runs, for the next: 28 MiB of 48, where reading
whole files took longer than it saved (83 ms from here to the monitor's answer, 75 without, 58 with those parts alone,
26 where all is warm). Nothing depends on it: what cannot be read, QEMU will report.

Source: posix_fadvise(2). Keeps no state; any thread may call it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from base import extents
from base.disk import Disk, replace_file
from base.errors import StorageError
from vm.mappings import loaded_files

_TOGETHER = 64 << 10
"""What is nearer to each other is read together; the kernel maps pages that are there in such blocks, too."""


def expect(paths: Iterable[Path | None], bytes_max: int = 0) -> None:
    """Have the kernel begin to read these files, or so much of each; returns at once. None, and what is no plain file,
    are passed over."""
    for path in paths:
        if path is not None:
            _expect(path, [(0, bytes_max)])


def expect_noted(noted: Path) -> None:
    """The same with what was noted there; nothing if there is nothing."""
    with contextlib.suppress(OSError, ValueError):  # the second where that is of another kind
        lines = (line.split(b" ", 2) for line in noted.read_bytes().splitlines())
        noted_parts = [(path, int(start), int(size)) for start, size, path in lines]
        for path, parts in itertools.groupby(noted_parts, lambda each: each[0]):
            _expect(Path(os.fsdecode(path)), [(start, size) for _, start, size in parts])


def note(pid: int, program: Path, noted: Path) -> None:
    """Keep in `noted` what a process that runs `program` has loaded, unless that is known. Nothing fails here."""
    with contextlib.suppress(OSError, StorageError):
        if noted.exists() and noted.stat().st_mtime_ns >= program.stat().st_ctime_ns:  # a package keeps its own mtime
            return
        lines = [
            b"%d %d %s" % (start, end - start, os.fsencode(path))
            for path, parts in loaded_files(pid).items()
            for start, end in extents.widen(parts, _TOGETHER).tolist()
        ]
        replace_file(Disk(), noted, b"\n".join(lines), lasting=False)


def _expect(path: Path, parts: Iterable[tuple[int, int]]) -> None:
    """Offsets and sizes in bytes; size 0 is all that follows."""
    with contextlib.suppress(OSError, ValueError, OverflowError):  # the others for what was noted and is no file's
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            for start, size in parts:
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)  # ESPIPE for what is no file
        finally:
            os.close(descriptor)
