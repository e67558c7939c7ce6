"""Which pages a VM touched first in earlier resumes, in their order: the next one fetches them ahead.

Local state of this host: one small file for each content of a VM that was resumed, the newest few of them, named by
hashes of the VM and its regions and of these regions' roots. So a generation that equals another one, also one of a
copy, knows its working set. Content that was never resumed has the pages of the last resume of its VM's regions as a
guess: as long as a guest has not booted anew it goes on with the same pages, whatever is in them by now. What turns out
to be missing in a guess stands before it from then on, so that what was of use longest ago is what falls out of it.

It only makes resumes faster: what is in it is checked against nothing but its form, and a file that is missing or
damaged is no error. Page numbers tell somewhat of what a guest does, and so the files are private. Processes of several
VMs may work in one folder; an object belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from base.disk import Disk, replace_file
from base.errors import StorageError
from store.records import Generation

_PAGES_MAX = 1 << 18
"""Pages of one region (1 GiB) that are remembered; more are no working set."""
_GUESSED_MAX = 1 << 11
"""Pages of one region that are a guess at most: a resume waits for some 500."""
_FILES_MAX, _ALL_FILES_MAX = 16, 512
"""Of one VM's regions, and in all."""
_SUFFIX, _NAME = ".pages", 32


class WorkingSet:
    """What is known, and what is noted in this resume. It is remembered in `path`, None: nowhere; what is known is what
    `source` has, if that is another file, at most so many pages of a region."""

    def __init__(self, path: Path | None, source: Path | None = None, pages_max: int = _PAGES_MAX) -> None:
        self.path = path
        known = source or path
        self._known = {} if known is None else {name: pages[:pages_max] for name, pages in _load(known).items()}
        self._touched: dict[str, list[int]] = {}

    @classmethod
    def of(cls, folder: Path, generation: Generation, regions: Sequence[str]) -> WorkingSet:
        """Of the content that regions of a generation have; `folder` is this host's."""
        names = [struct.pack("<H", len(name)) + name.encode() for name in sorted(regions)]
        roots = [generation.regions[name].root.id for name in sorted(regions)]
        of_vm = blake3(b"".join([generation.vm.encode(), b"\0", *names])).hexdigest()[:_NAME]
        content = blake3(b"".join([*names, *roots])).hexdigest()[:_NAME]
        path = folder / f"{of_vm}-{content}{_SUFFIX}"
        if alike := _oldest_first(folder.glob(f"*-{content}{_SUFFIX}")):
            return cls(path, alike[-1])
        guesses = _oldest_first(folder.glob(f"{of_vm}-*{_SUFFIX}"))
        return cls(path, guesses[-1], _GUESSED_MAX) if guesses else cls(path)

    def touched(self, region: str, page: int) -> None:
        """Somebody waited for this page."""
        self._touched.setdefault(region, []).append(page)

    def pages(self, region: str) -> NDArray[np.int64]:
        """Those of a region that are known, first touched first (n,)."""
        return self._known.get(region, np.empty(0, np.int64))

    def save(self) -> None:
        """Remember it for the next resume, before what was known; nothing fails here."""
        if self.path is None or not self._touched:
            return
        for region, pages in self._touched.items():
            known = self._known.get(region, np.empty(0, np.int64))
            self._known[region] = _in_order(np.concatenate([np.array(pages, np.int64), known]))[:_PAGES_MAX]
        self._touched.clear()
        content = msgspec.msgpack.encode({name: pages.astype("<u4").tobytes() for name, pages in self._known.items()})
        with suppress(StorageError, OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(Disk(), self.path, content, lasting=False)
            of_vm = self.path.name[:_NAME]
            for which, most in ((f"{of_vm}-*", _FILES_MAX), ("*", _ALL_FILES_MAX)):
                for old in _oldest_first(self.path.parent.glob(f"{which}{_SUFFIX}"))[:-most]:
                    old.unlink(missing_ok=True)


def _oldest_first(files: Iterable[Path]) -> list[Path]:
    """Files that are there, by when they were written."""
    written = []
    for path in files:
        with suppress(OSError):
            written.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(written)]


def _load(path: Path) -> dict[str, NDArray[np.int64]]:
    try:
        found = msgspec.msgpack.decode(path.read_bytes(), type=dict[str, bytes])
        return {name: _in_order(np.frombuffer(pages, "<u4").astype(np.int64)) for name, pages in found.items()}
    except (OSError, ValueError, RecursionError):
        return {}


def _in_order(pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each once, where it stands first."""
    found: NDArray[np.int64] = pages[np.sort(np.unique(pages, return_index=True)[1])]
    return found
