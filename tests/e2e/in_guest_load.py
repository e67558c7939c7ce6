"""A program of the guest that writes memory at a set rate and pattern, and counts what else it gets done meanwhile.

Sent to the guest's runner after in_guest.py. `load(size)` starts it as a process of its own, and `numbers` are how it
is told what to do and what it says, eight bytes each in the tagged page `load`: units of work done, pattern, pages a
second, sweeps wanted, sweeps done, pages written. A sweep writes every page once. The host reads them in the backing
file.
"""

from __future__ import annotations

import mmap
import os
import random
import time

from runner import area

PAGE = 4096
PATTERNS = ("uniform", "hot set", "sequential")
HOT_SHARE, HOT_WRITES = 0.05, 0.95
"""Of the pages, which take so much of the writes of a hot set."""
DONE, PATTERN, RATE, WANTED, SWEPT, WRITTEN = range(6)
AT_ONCE_MAX = 1024
"""Pages between two units of work; who is behind stays behind."""


def load(size: int) -> None:
    """Start it, on as many bytes of its own, which it fills with what does not compress."""
    global numbers
    numbers = area("load", PAGE).cast("Q")
    if os.fork() == 0:
        _work(size)


def turn(pattern: str, pages_per_second: int) -> None:
    """From now on; a sweep first. Returns when that is done."""
    numbers[PATTERN], numbers[RATE] = PATTERNS.index(pattern), pages_per_second
    numbers[WANTED] += 1
    while numbers[SWEPT] != numbers[WANTED]:
        time.sleep(0.001)


def _work(size: int) -> None:
    field, pages, some = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), size // PAGE, random.Random(1)
    for at in range(0, size, 1 << 20):
        field[at : at + (1 << 20)] = os.urandom(1 << 20)
    began, written, total = time.monotonic(), 0, 0
    while True:
        if numbers[SWEPT] != numbers[WANTED]:
            total += 1
            for page in range(pages):
                field[page * PAGE : page * PAGE + 8] = total.to_bytes(8, "little")
            numbers[SWEPT] = numbers[WANTED]
            began, written = time.monotonic(), 0
        due = min(int((time.monotonic() - began) * numbers[RATE]) - written, AT_ONCE_MAX)
        for _ in range(due):
            total += 1
            page = _choose(numbers[PATTERN], total, pages, some)
            field[page * PAGE : page * PAGE + 8] = total.to_bytes(8, "little")
        written += max(due, 0)
        numbers[WRITTEN] = total
        _unit()
        numbers[DONE] += 1


def _choose(pattern: int, step: int, pages: int, some: random.Random) -> int:
    if pattern == 0:
        return int(some.random() * pages)
    if pattern == 1 and some.random() < HOT_WRITES:
        return int(some.random() * pages * HOT_SHARE)
    return step % pages if pattern == 2 else int(some.random() * pages)


def _unit() -> int:
    """Some work that writes hardly any memory."""
    found = 0
    for each in range(500):
        found = (found * 31 + each) & 0xFFFF
    return found
