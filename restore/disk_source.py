"""A disk of a generation as something that can be read anywhere: what is shown to QEMU while an image is filled.

Chunks come out of authenticated frames under the ids of the signed page map, as in any restore. Reads are widened to
what stands in a frame or two, and the last of these are remembered: a guest that reads on finds them. May be used by
several threads; the repository is used by one of them at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from base.errors import NotFoundError
from base.extents import Extents
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository

_WINDOW = 128 << 10
"""Bytes that are read together: a frame as `perdure init` chooses it, two chunks of a disk."""
_REMEMBERED = 256
"""Windows: 32 MiB."""


class Access:
    """One repository for several disks; `lock` is held while it is used."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.lock = Lock()


class GenerationDisk:
    """One disk of a generation (region `disk:NAME`). Attributes: `size` in bytes.

    A record of store.needs keeps what it stands on.
    """

    def __init__(self, access: Access, generation: Generation, region: str) -> None:
        """Raises NotFoundError if the generation has no such disk, IntegrityError."""
        self._access = access
        self._reader = GenerationReader(access.repository, generation, needed=True)
        try:
            self._region = self._reader.region(region)
            if self._region.kind != "disk":
                raise NotFoundError(f"{region} of {generation.name} is no disk")
            self._reader.require_whole(self._region)
        except BaseException:
            self._reader.__exit__()
            raise
        self.size = self._region.root.length
        self._windows: OrderedDict[int, bytes] = OrderedDict()

    def close(self) -> None:
        """Give its lease back."""
        self._reader.__exit__()

    def data(self, start: int, end: int) -> Extents:
        """What of [start, end) may be other than zero. Raises IntegrityError, StorageError."""
        with self._access.lock:
            return self._reader.data(self._region, start, end)

    def read(self, start: int, end: int) -> bytes:
        """The content of [start, end). Raises IntegrityError, StorageError."""
        first, last = start // _WINDOW, -(-end // _WINDOW)
        with self._access.lock:
            data = b"".join(self._window(number, last) for number in range(first, last))
        return data[start - first * _WINDOW : end - first * _WINDOW]

    def _window(self, number: int, last: int) -> bytes:
        """One window; what follows it up to `last` and is not remembered either is read with it."""
        if number not in self._windows:
            end = next((each for each in range(number + 1, last) if each in self._windows), last)
            data = self._reader.read(self._region, number * _WINDOW, end * _WINDOW)
            for at in range(number, end):
                self._windows[at] = data[(at - number) * _WINDOW : (at - number + 1) * _WINDOW]
            kept = max(_REMEMBERED, last - number)
            while len(self._windows) > kept:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return self._windows[number]
