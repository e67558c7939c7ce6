"""Pages put into QEMU's memory, each claimed once it is there.

The one way in which a page server changes anything: an intent, the kernel's copy, the claim. Belongs to one thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from base.errors import VirtualMachineError
from base.units import PAGE
from restore.claims import Claims, wrong_page
from restore.plan import RegionPlan, Window
from vm.mappings import Mapping
from vm.userfaultfd import Userfaultfd

ZERO = np.zeros((1, PAGE), np.uint8)
ZEROS = 16
"""Pages of zeros that are put together at most: a guest that takes one is likely to take its neighbours."""
_ZEROS = np.zeros((ZEROS, PAGE), np.uint8)


@dataclass(slots=True, eq=False)
class Served:
    """One region: its plan, claims, backing file, and where QEMU shows it."""

    at: int
    name: str
    plan: RegionPlan
    claims: NDArray[np.uint8]
    backing: int
    mappings: list[Mapping]

    def address(self, page: int) -> tuple[int, int]:
        """QEMU's address of a page, and how many pages follow it there without a gap."""
        offset = page * PAGE
        for each in self.mappings:
            if each.offset <= offset < each.offset + each.size:
                return each.start + offset - each.offset, (each.offset + each.size - offset) // PAGE
        raise VirtualMachineError(f"region {self.name}: QEMU does not show its page {page} anywhere")

    def page_of(self, address: int) -> int:
        """The page that QEMU shows at an address; -1 if it is none of this region."""
        for mapping in self.mappings:
            if mapping.start <= address < mapping.end:
                return (mapping.offset + address - mapping.start) // PAGE
        return -1

    def is_finished(self, number: int) -> bool:
        """Whether nothing is left to place of a window: what of it is not claimed is zero."""
        return number >= len(self.plan.finished) or bool(self.plan.finished[number])

    def missing(self, window: Window, members: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those members of a window that are not placed."""
        found: NDArray[np.intp] = members[self.claims[window.numbers[members]] == 0]
        return found


class Placer:
    """Puts pages where they belong."""

    def __init__(self, claims: Claims, descriptor: Userfaultfd) -> None:
        self._claims, self._descriptor = claims, descriptor

    def one(self, served: Served, page: int, content: NDArray[np.uint8]) -> None:
        """Put `content` (PAGE,) to a page that is not claimed. Raises ConflictError if it is there all the same."""
        address, _ = served.address(page)
        self._put(served, page, 1, address, address_of(content))

    def several(self, served: Served, numbers: NDArray[np.int64], chunks: NDArray[np.uint8]) -> int:
        """Put rows of `chunks` (n, PAGE) to pages `numbers` (n,), ascending, those that are claimed left out; gives how
        many were put. Raises ConflictError for one that is there and not claimed."""
        free = served.claims[numbers] == 0
        if not free.all():
            numbers, chunks = numbers[free], np.ascontiguousarray(chunks[free])
        if not len(numbers):
            return 0
        source = address_of(chunks)
        cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
        for start, end in zip([0, *cuts], [*cuts, len(numbers)], strict=True):
            while start < end:
                first = int(numbers[start])
                address, room = served.address(first)
                count = min(end - start, room)
                self._put(served, first, count, address, source + start * PAGE)
                start += count
        return len(numbers)

    def zeros(self, served: Served, first: int, last: int) -> None:
        """Put zeros to those pages of [first, last), at most ZEROS of them, that are not claimed. Raises ConflictError
        for one that is there and not claimed."""
        free = np.flatnonzero(served.claims[first:last] == 0)
        for run in np.split(free, np.flatnonzero(np.diff(free) != 1) + 1) if len(free) else ():
            start, end = first + int(run[0]), first + int(run[-1]) + 1
            while start < end:
                address, room = served.address(start)
                count = min(end - start, room)
                self._put(served, start, count, address, address_of(_ZEROS))
                start += count

    def _put(self, served: Served, first: int, count: int, address: int, source: int) -> None:
        self._claims.intend(served.at, first, count)
        done = self._descriptor.place(address, source, count * PAGE) // PAGE
        if done < count:
            raise wrong_page(self._claims.facts.vm, served.name, first + done)
        self._claims.claim(served.name, first, count)


def add(claims: Claims, word: int, count: int) -> None:
    """Count in the record."""
    claims.set(word, claims.word(word) + count)


def by_frame(window: Window, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Members of a window by frame, each ascending, in order of pack and frame."""
    if not len(members):
        return []
    keys = window.frames[members]
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(members[order], cuts)


def address_of(array: NDArray[np.uint8]) -> int:
    """Where its first byte is, for system calls."""
    return int(array.__array_interface__["data"][0])
