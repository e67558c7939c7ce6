"""Unlocking that begins before a command's modules are imported.

Argon2id takes a sixth of a second on both cores, importing numpy and the rest as long on one. So the command line
begins to unlock in a thread, and the command takes the keys, or the error that there was, when it needs them. Where
there is no repository, or a person would have to be asked, that is left to the command. Imports only what unlocking
needs. One at a time in a process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

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
    """Begin to unlock, if there is something to unlock and nobody need be asked. Raises UsageError."""
    path = repository or os.environ.get("PERDURE_REPOSITORY")
    if path and stands_somewhere() and (Path(path) / "config").exists():
        _begun.append(Unlocking(Path(path).absolute(), credential()))


def begun(path: Path) -> Unlocking | None:
    """What was begun for this repository; to be used once."""
    found = _begun.pop() if _begun else None
    return found if found is not None and found.path == path else None
