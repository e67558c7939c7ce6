"""A guest that changes its memory and its disks by chance: sent to its runner after in_guest.py.

`chance(seed)` begins, and `steps` counts. What it does: pages written everywhere, in a hot set and one after the other,
zeroed, given back to the kernel and taken anew, files made and removed, tagged memory, disks written and read past the
page cache, so that devices write into memory.
"""

from __future__ import annotations

import fcntl
import glob
import mmap
import os
import random
import time

from in_guest import use, work

PAGE, MIB = 4096, 1 << 20
FIELD = 32 * MIB
TAGGED = 4 * MIB
HOT_PAGES = 64
BLKZEROOUT = 0x127F
"""Source: Linux, include/uapi/linux/fs.h."""


def chance(seed: int) -> None:
    """Do it until `finish`; once in a boot."""
    global some, field, at, steps, disks
    some, at, steps = random.Random(seed), 0, 0
    field = mmap.mmap(-1, FIELD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    use("chance", TAGGED)
    disks = {path: os.open(path, os.O_RDWR | os.O_DIRECT) for path in sorted(glob.glob("/dev/vd?"))}
    work(_step)


def _step() -> None:
    global steps
    some.choice(_ACTIONS)()
    steps += 1
    if some.random() < 0.2:
        time.sleep(some.random() * 0.02)


def _put(page: int) -> None:
    start = page * PAGE + some.randrange(PAGE - 16)
    field[start : start + 16] = some.randbytes(16)


def _everywhere() -> None:
    for _ in range(some.randrange(1, 200)):
        _put(some.randrange(FIELD // PAGE))


def _hot() -> None:
    for _ in range(some.randrange(1, 400)):
        _put(some.randrange(HOT_PAGES))


def _one_after_the_other() -> None:
    global at
    for _ in range(some.randrange(1, 500)):
        at = (at + 1) % (FIELD // PAGE)
        _put(at)


def _zero() -> None:
    start, count = _range()
    field[start * PAGE : (start + count) * PAGE] = bytes(count * PAGE)


def _give_back() -> None:
    start, count = _range()
    field.madvise(mmap.MADV_DONTNEED, start * PAGE, count * PAGE)


def _range() -> tuple[int, int]:
    count = some.randrange(1, 128)
    return some.randrange(FIELD // PAGE - count), count


def _files() -> None:
    path = f"/tmp/chance-{some.randrange(4)}"
    if os.path.exists(path) and some.random() < 0.5:
        os.unlink(path)
    else:
        with open(path, "wb") as file:
            file.write(some.randbytes(some.randrange(MIB)))


def _tagged() -> None:
    for _ in range(some.randrange(1, 100)):
        start = some.randrange(TAGGED - 16)
        memory[start : start + 16] = some.choice([bytes, some.randbytes])(16)  # noqa: F821  what `use` made


def _write_disk() -> None:
    for descriptor in disks.values():
        start, count = _range()
        os.pwritev(descriptor, [memoryview(field)[start * PAGE : (start + count) * PAGE]], _place(descriptor, count))


def _zero_disk() -> None:
    for descriptor in disks.values():
        count = some.randrange(1, 64)
        place = _place(descriptor, count)
        fcntl.ioctl(descriptor, BLKZEROOUT, place.to_bytes(8, "little") + (count * PAGE).to_bytes(8, "little"))


def _read_disk() -> None:
    for descriptor in disks.values():
        start, count = _range()
        os.preadv(descriptor, [memoryview(field)[start * PAGE : (start + count) * PAGE]], _place(descriptor, count))


def _place(descriptor: int, pages: int) -> int:
    return int(some.randrange(os.lseek(descriptor, 0, os.SEEK_END) // PAGE - pages) * PAGE)


_ACTIONS = (
    *(_everywhere, _hot, _one_after_the_other, _zero, _give_back, _files, _tagged),
    *(_write_disk, _zero_disk, _read_disk, _read_disk),
)
