"""Images like a machine's memory, and successors of which a part is dirty: made here, the same on every run.

A page is one of four sorts: 35 % are zero, 45 % hold files (a page cache: this system's shared libraries, each from a
page's beginning; where there are too few, they come again, so that some pages are there twice), 12 % are a heap (half
pointers, half text), 8 % are noise that nothing compresses. Sorts come in extents of 256 KiB, shuffled. A successor
rewrites runs of 8 pages: half of them get some new bytes in each page, half become copies of other pages with a new
stamp in front, so that every page of a run is one never seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
_EXTENT = 64
_RUN = 8
_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


def memory(mib: int, seed: int) -> NDArray[np.uint8]:
    """The first state: pages (n, 4096)."""
    random = np.random.default_rng(seed)
    extents = mib * 256 // _EXTENT
    image = np.zeros((extents, _EXTENT * PAGE), np.uint8)
    sorts = random.permutation(np.repeat(np.arange(4), _shares(extents, (0.35, 0.45, 0.12, 0.08))))
    paths = _libraries()
    files, text = _file_content(paths, random), np.frombuffer("\n".join(map(str, paths)).encode(), np.uint8)
    for at, sort in enumerate(sorts.tolist()):
        if sort == 1:
            image[at] = next(files)
        elif sort == 2:
            image[at] = _heap(text, random)
        elif sort == 3:
            image[at] = random.integers(0, 256, _EXTENT * PAGE, dtype=np.uint8)
    return image.reshape(-1, PAGE)


def dirtied(image: NDArray[np.uint8], share: float, seed: int) -> list[tuple[int, int]]:
    """Rewrite a share of the pages in place; gives the ranges, (offset, length) in bytes, ascending and apart."""
    random = np.random.default_rng(seed)
    slots = len(image) // _RUN
    chosen = np.sort(random.choice(slots, max(1, int(slots * share)), replace=False))
    for slot in chosen.tolist():
        run = image[slot * _RUN : (slot + 1) * _RUN]
        if random.random() < 0.5:
            run[:, 100:600] = random.integers(0, 256, (_RUN, 500), dtype=np.uint8)
        else:
            source = int(random.integers(0, len(image) - _RUN))
            run[:] = image[source : source + _RUN].copy()
            run[:, :8] = random.integers(0, 256, (_RUN, 8), dtype=np.uint8)
    return [(slot * _RUN * PAGE, _RUN * PAGE) for slot in chosen.tolist()]


def write_ranges(path: Path, ranges: list[tuple[int, int]]) -> None:
    """For `perdure import --dirty`."""
    path.write_text(json.dumps(ranges))


def sparse(path: Path, length: int, pages: NDArray[np.int64], seed: int) -> list[tuple[int, int]]:
    """Write random pages at page numbers into a file that is all holes elsewhere; gives their ranges."""
    random = np.random.default_rng(seed)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(length)
        for page in pages.tolist():
            file.seek(page * PAGE)
            file.write(random.bytes(PAGE))
    return [(page * PAGE, PAGE) for page in pages.tolist()]


def _shares(count: int, shares: tuple[float, ...]) -> NDArray[np.int64]:
    counts = np.array([int(count * share) for share in shares], np.int64)
    counts[0] += count - counts.sum()
    return counts


def _libraries() -> list[Path]:
    return sorted(
        path
        for path in _LIBRARIES.rglob("*")
        if path.is_file() and not path.is_symlink() and 1 << 14 < path.stat().st_size < 32 << 20
    )


def _file_content(paths: list[Path], random: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Extents full of files; all of them, in random order, before any comes again."""
    rest = np.empty(0, np.uint8)
    while True:
        for at in random.permutation(len(paths)).tolist():
            data = np.fromfile(paths[at], np.uint8)
            rest = np.concatenate([rest, data, np.zeros(-len(data) % PAGE, np.uint8)])
            while len(rest) >= _EXTENT * PAGE:
                yield rest[: _EXTENT * PAGE]
                rest = rest[_EXTENT * PAGE :]


def _heap(text: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Pages of which the first half are pointers into one arena, and the second half is a piece of text."""
    pages = np.empty((_EXTENT, PAGE), np.uint8)
    pointers = random.integers(0, 1 << 22, (_EXTENT, PAGE // 16), dtype=np.uint64) * np.uint64(16)
    pages[:, : PAGE // 2] = (pointers + np.uint64(0x7F3A_0000_0000)).view(np.uint8)
    starts = random.integers(0, len(text) - PAGE // 2, _EXTENT)
    pages[:, PAGE // 2 :] = text[starts[:, None] + np.arange(PAGE // 2)]
    return pages.reshape(-1)
