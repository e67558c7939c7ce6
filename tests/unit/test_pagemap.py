"""PAGEMAP_SCAN and the memory map against what this process itself writes."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base import extents
from base.units import PAGE
from vm.mappings import Mapping, parse, shared_mappings
from vm.pagemap import Pagemap, has_pagemap_scan
from vm.userfaultfd import Userfaultfd

PAGES = 256
needs_pagemap_scan = pytest.mark.skipif(not has_pagemap_scan(), reason="Linux before 6.7 has no PAGEMAP_SCAN")

MAPS = b"""\
55d0c0a00000-55d0c0a21000 r--p 00000000 fd:01 132 /usr/bin/qemu-system-x86_64
7f00c0000000-7f00d0000000 rw-s 00000000 00:1a 17  /memory/ram0
7f00d0000000-7f00d0001000 rw-p 00002000 00:1a 17  /memory/ram0
7f00e0000000-7f00e0200000 rw-s 10000000 00:1a 17  /memory/ram0 (deleted)
7f00f0000000-7f00f0001000 rw-s 00000000 00:1b 17  /memory/ram0
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0   [stack]
"""


def test_mappings_are_found_by_device_and_inode():
    assert parse(MAPS, os.makedev(0, 0x1A), 17) == [
        Mapping(0x7F00C0000000, 0x7F00D0000000, 0),
        Mapping(0x7F00E0000000, 0x7F00E0200000, 0x10000000),
    ]
    assert parse(MAPS, os.makedev(0, 0x1A), 1) == []


class Memory:
    """A tmpfs file of PAGES pages, mapped twice: its whole, and once more its second half."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.ftruncate(file.fileno(), PAGES * PAGE)
            self.whole = mmap.mmap(file.fileno(), PAGES * PAGE)
            self.half = mmap.mmap(file.fileno(), PAGES * PAGE // 2, offset=PAGES * PAGE // 2)
            self.mappings = shared_mappings(os.getpid(), file.fileno())
        self.descriptor = Userfaultfd.of(os.getpid())

    def arm(self) -> None:
        for each in self.mappings:
            self.descriptor.register(each.start, each.size)
            self.descriptor.write_protect(each.start, each.size)

    def write(self, page: int, by_second: bool) -> None:
        if by_second and page >= PAGES // 2:
            self.half[(page - PAGES // 2) * PAGE] ^= 1
        else:
            self.whole[page * PAGE] ^= 1


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    memory = Memory()
    memory.arm()
    yield memory
    for each in memory.mappings:
        memory.descriptor.unregister(each.start, each.size)
    memory.descriptor.close()


@pytest.fixture
def unregistered() -> Iterator[list[Mapping]]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), PAGE)
        with mmap.mmap(file.fileno(), PAGE):
            yield shared_mappings(os.getpid(), file.fileno())


@needs_pagemap_scan
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.booleans()), max_size=60), st.sampled_from([1, 2, 7, 1000]))
def test_exactly_the_written_pages_are_reported_with_any_size_of_vector(memory, writes, vector):
    with Pagemap(os.getpid(), vector) as pagemap:
        pagemap.written(memory.mappings, rearm=True)
        for page, by_second in writes:
            memory.write(page, by_second)
        wanted = np.array(sorted({page for page, _ in writes}), np.uint64)
        for rearm in (False, True):
            assert pagemap.written(memory.mappings, rearm=rearm).tolist() == (
                extents.from_numbers(wanted, PAGE).tolist()
            )
        assert not len(pagemap.written(memory.mappings, rearm=True))


@needs_pagemap_scan
def test_reading_is_no_write_and_a_hole_stays_clean(memory):
    with Pagemap(os.getpid()) as pagemap:
        pagemap.written(memory.mappings, rearm=True)
        assert sum(memory.whole[::PAGE]) >= 0
        assert not len(pagemap.written(memory.mappings, rearm=True))


@needs_pagemap_scan
def test_a_mapping_that_is_not_registered_is_an_error_and_not_clean(unregistered):
    with Pagemap(os.getpid()) as pagemap, pytest.raises(PermissionError):
        pagemap.written(unregistered, rearm=True)


@needs_pagemap_scan
def test_a_second_owner_gets_the_same_userfaultfd(memory):
    with Userfaultfd.of(os.getpid()) as again:
        inode = Path(f"/proc/self/fdinfo/{again.descriptor}").read_text()
        assert inode == Path(f"/proc/self/fdinfo/{memory.descriptor.descriptor}").read_text()
