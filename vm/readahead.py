"""Files that are read while QEMU starts, by it or for it, brought into the host's page cache before that.

A cold kernel and initrd are a third of the time from QEMU's launch to its monitor's answer (109 ms against 37 where
they are warm, 33 MB of both), its program and libraries a sixth (95 ms against 76; 48 MB). Which these are is noted
of one that runs, for the next. Nothing depends on it: what cannot be read, QEMU will report.

Source: posix_fadvise(2). Keeps no state; any thread may call it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from base.disk import Disk, replace_file
from base.errors import StorageError
from vm.mappings import own_files

_WORTH_BYTES = 256 << 10
"""Of a file that is read ahead: a smaller one comes with its first page."""


def expect(paths: Iterable[Path | None], bytes_max: int = 0) -> None:
    """Have the kernel begin to read these files, or so much of each; returns at once. None, and what is no plain file,
    are passed over."""
    for path in paths:
        if path is not None:
            with contextlib.suppress(OSError, ValueError):  # the second for a zero in what was noted
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
                try:
                    os.posix_fadvise(descriptor, 0, bytes_max, os.POSIX_FADV_WILLNEED)  # ESPIPE for what is no file
                finally:
                    os.close(descriptor)


def note(pid: int, program: Path, noted: Path) -> None:
    """Keep in `noted` what a process that runs `program` has loaded, unless that is known. Nothing fails here."""
    with contextlib.suppress(OSError, StorageError):
        if not noted.exists() or noted.stat().st_mtime_ns < program.stat().st_ctime_ns:  # a package keeps its own mtime
            large = [path for path in own_files(pid) if path.stat().st_size >= _WORTH_BYTES]
            replace_file(Disk(), noted, b"\n".join(map(os.fsencode, large)), lasting=False)


def noted_files(noted: Path) -> list[Path]:
    """What was kept there; nothing if there is nothing."""
    try:
        return [Path(os.fsdecode(line)) for line in noted.read_bytes().splitlines()]
    except OSError:
        return []
