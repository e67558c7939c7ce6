"""One budget for what the supervisors of a host do in the background: they take turns, and what one has used of a
processor, the next one waits for.

A file beside the VMs' runtime folders holds the time from which the next piece of work may begin, on the host's
monotonic clock, and is locked while one is done: whoever dies leaves no lock. Without that file (a full tmpfs, say) a
supervisor keeps to its own budget.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

_BUSY_SECONDS = 0.1
"""Between attempts, while another supervisor works."""
_AHEAD_MAX = 60.0
"""Seconds; a time later than that is of before the host's last boot."""


class HostBudget:
    """The turns of one supervisor. `share` of one processor is what all that say the same may use together."""

    def __init__(self, path: Path, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._share, self._clock = path, share, clock
        self._file = -1
        self._held = False

    def begin(self) -> float:
        """Seconds to wait before asking again; 0: a piece of work may be done, then `end` is to be called."""
        if self._file < 0:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                return 0.0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _BUSY_SECONDS * (1 + random.random())
        self._held = True
        wait = self._free_at() - self._clock()
        if 0 < wait < _AHEAD_MAX:
            self._release()
            return wait * (1 + random.random() / 10)  # not all at once
        return 0.0

    def end(self, processor_seconds: float) -> None:
        """A piece of work has used so much."""
        if not self._held:
            return
        try:
            free_at = int((self._clock() + processor_seconds / self._share) * 1e9)
            os.pwrite(self._file, free_at.to_bytes(8, "little"), 0)
        except OSError:
            pass
        finally:
            self._release()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._held = -1, False

    def _free_at(self) -> float:
        try:
            return int.from_bytes(os.pread(self._file, 8, 0), "little") / 1e9
        except OSError:
            return 0.0

    def _release(self) -> None:
        self._held = False
        fcntl.flock(self._file, fcntl.LOCK_UN)
