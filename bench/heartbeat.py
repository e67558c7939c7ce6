"""A guest's heartbeat, sampled on the host: for how long a guest really stood still.

A process of the guest counts up in a page of its persistent memory every half millisecond, ahead of everything else in
the guest. The host reads the page through the backing file and its own clock, since a guest's clock stops with it.
"""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

BEAT_S = 0.0005
IN_GUEST = f"""
def beat():
    numbers = area("heartbeat", 4096).cast("Q")
    if os.fork() == 0:
        import time
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        while True:
            numbers[0] += 1
            time.sleep({BEAT_S})
"""
"""Defines `beat()`; to be run after tests/e2e/in_guest.py."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which nothing was counted: host's monotonic seconds."""

    start: float
    end: float

    @property
    def ms(self) -> float:
        """Its length."""
        return (self.end - self.start) * 1e3


class Heartbeat:
    """Samples the counter at `offset` of a backing file in a thread of its own, while used as a context."""

    def __init__(self, file: Path, offset: int) -> None:
        with file.open("rb") as opened:
            page = offset - offset % mmap.ALLOCATIONGRANULARITY
            self._memory = mmap.mmap(opened.fileno(), mmap.PAGESIZE, offset=page, prot=mmap.PROT_READ)
        self._numbers = memoryview(self._memory).cast("Q")
        self._at = (offset - page) // 8
        self._gaps: list[Gap] = []
        self._goes = True
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._goes = False
        self._thread.join()

    def longest(self, start: float, end: float) -> float:
        """Milliseconds: the longest gap that overlaps an interval of the host's monotonic clock; 0 if none is noted."""
        return max((gap.ms for gap in list(self._gaps) if gap.end > start and gap.start < end), default=0.0)

    def beats(self) -> int:
        """The counter."""
        return int(self._numbers[self._at])

    def _sample(self) -> None:
        """Gaps of more than four beats are noted. One that lasts is noted when it ends."""
        seen, since = self.beats(), time.monotonic()
        while self._goes:
            time.sleep(BEAT_S / 2)
            now, value = time.monotonic(), self.beats()
            if value != seen:
                if now - since > 4 * BEAT_S:
                    self._gaps.append(Gap(since, now))
                seen, since = value, now
