"""Which pages a VM touched first in earlier resumes of the same content, in their order: the next fetches them ahead.

Local state of this host, one small file for each content that was resumed, named by a hash of the regions' roots (so
that a generation that equals another one knows its working set), the newest few of them. It only makes resumes faster:
what is in it is checked against nothing but its form, and a file that is missing or damaged is no error. Page numbers
tell somewhat of what a guest does, and so the files are private. Belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
_FILES_MAX = 16
_SUFFIX = ".pages"


class WorkingSet:
    """What is known, and what is noted in this resume. `path` None remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, NDArray[np.int64]] = {} if path is None else _load(path)
        self._touched: dict[str, list[int]] = {}

    @classmethod
    def of(cls, folder: Path, generation: Generation, regions: Sequence[str]) -> WorkingSet:
        """Of the content that regions of a generation have; `folder` is this host's, for one VM."""
        content = b"".join(
            struct.pack("<H", len(name)) + name.encode() + generation.regions[name].root.id for name in sorted(regions)
        )
        return cls(folder / f"{blake3(content).hexdigest()[:32]}{_SUFFIX}")

    def touched(self, region: str, page: int) -> None:
        """Somebody waited for this page."""
        self._touched.setdefault(region, []).append(page)

    def pages(self, region: str) -> NDArray[np.int64]:
        """Those of a region that are known, first touched first (n,)."""
        return self._known.get(region, np.empty(0, np.int64))

    def save(self) -> None:
        """Remember it for the next resume, with what was known before; nothing fails here."""
        if self._path is None or not self._touched:
            return
        for region, pages in self._touched.items():
            known = self._known.get(region, np.empty(0, np.int64))
            self._known[region] = _in_order(np.concatenate([known, np.array(pages, np.int64)]))[:_PAGES_MAX]
        self._touched.clear()
        content = msgspec.msgpack.encode({name: pages.astype("<u4").tobytes() for name, pages in self._known.items()})
        with suppress(StorageError, OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(Disk(), self._path, content, lasting=False)
            files = sorted(self._path.parent.glob(f"*{_SUFFIX}"), key=lambda each: each.stat().st_mtime_ns)
            for old in files[:-_FILES_MAX]:
                old.unlink(missing_ok=True)


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
