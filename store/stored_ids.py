"""Which chunks a generation in the making has stored already, in bounded memory.

The newest ones are in a set (2^18, some 30 MiB); beyond that they go into a chunk index of their own, on this host, in
a folder that goes with the generation: its memory is mapped from a file, and look-ups stay in batches. What a process
that was killed leaves behind is removed by the next one that needs such a folder. Belongs to one thread.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from base.disk import Disk
from store import format as layout
from store.index.chunks import LOCATION, Index
from store.index.environment import Environment

_ID = np.dtype((np.void, layout.ID_BYTES))
_HELD = 1 << 18
_PREFIX = "stored-"


class StoredIds:
    """Ids of chunks; a set that forgets nothing. `state` is this host's folder for the repository."""

    def __init__(self, state: Path, disk: Disk) -> None:
        self._state, self._disk = state, disk
        self._held: set[bytes] = set()
        self._spilled: tuple[Environment, Index] | None = None
        self._spills = 0

    def fresh(self, ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of these ids (n, 32) were not there, each at its first place only; from now on they are.

        Raises StorageError, IndexLostError (what was spilled is damaged: the generation cannot be made).
        """
        found = np.ones(len(ids), np.bool_)
        if self._spilled is not None:
            environment, index = self._spilled
            with environment.read() as txn:
                found = index.lookup(txn, ids)["pack"] == 0
        held, add = self._held, self._held.add
        candidates = np.flatnonzero(found)
        names = cast("list[bytes]", np.ascontiguousarray(ids[candidates]).view(_ID).reshape(-1).tolist())
        found[candidates] = [name not in held and not add(name) for name in names]
        if len(held) >= _HELD:
            self._spill()
        return found

    def close(self) -> None:
        """Forget all of them."""
        self._held = set()
        if self._spilled is not None:
            environment, _ = self._spilled
            self._spilled = None
            environment.close()
            shutil.rmtree(environment.directory, ignore_errors=True)

    def _spill(self) -> None:
        if self._spilled is None:
            _sweep(self._state)
            key = secrets.token_bytes(32)
            folder = self._state / f"{_PREFIX}{secrets.token_hex(8)}"
            environment = Environment(folder, Index.DATABASES, mac_key=key, disk=self._disk)
            self._spilled = environment, Index(environment, key)
        environment, index = self._spilled
        self._spills += 1
        ids = np.frombuffer(b"".join(self._held), np.uint8).reshape(-1, layout.ID_BYTES)
        places = np.zeros(len(ids), LOCATION)
        places["pack"] = self._spills
        with environment.write() as txn:
            index.add(txn, ids, places)
        index.merge()
        self._held.clear()


def _sweep(state: Path) -> None:
    """Remove the folders of processes that have died: nobody holds the lock of their index."""
    for folder in state.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
