"""Unlocking that begins before a command's modules are imported.

Argon2id takes a quarter of a second on both cores, importing numpy and the rest a sixth on one. So the command line
begins to unlock in a thread, and the command takes the keys when it has got as far as needing them. Whatever stands in
the way (no repository, nothing that opens it without asking, an error) is left to the command, which meets it again and
says so. Imports only what unlocking needs. One at a time in a process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from base.errors import PerdureError
from perdure.credentials import credential, stands_somewhere
from store.key_files import read_key_files
from store.keys import Keys
from store.slots import Credential, unlock


@dataclass(slots=True)
class Unlocking:
    """A repository that is being unlocked with `given`."""

    path: Path
    given: Credential
    _thread: Thread = field(init=False)
    _result: Keys | Exception | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._thread = Thread(target=self._run, name="unlocking", daemon=True)
        self._thread.start()

    def keys(self) -> Keys:
        """The keys, when they are there. Raises what unlocking raised."""
        self._thread.join()
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result

    def finish(self) -> None:
        """Wait until the thread has ended, before a fork."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._result = unlock(read_key_files(self.path), self.given)
        except Exception as error:
            self._result = error


_begun: list[Unlocking] = []


def begin(repository: str | None) -> None:
    """Begin to unlock, if there is something to unlock and nobody need be asked."""
    path = repository or os.environ.get("PERDURE_REPOSITORY")
    if path and stands_somewhere() and (Path(path) / "config").exists():
        with suppress(PerdureError):
            _begun.append(Unlocking(Path(path).absolute(), credential()))


def begun(path: Path) -> Unlocking | None:
    """What was begun for this repository; to be used once."""
    found = _begun.pop() if _begun else None
    return found if found is not None and found.path == path else None
