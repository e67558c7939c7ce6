"""Unlocking that begins before a command's modules are imported.

Argon2id takes a sixth of a second on both cores, importing numpy and the rest half as long on one. So the command line
has it done beside that, in a process of its own: a thread would be in the way of the workers that are forked next. What
Argon2id made comes back through a pipe, and the command unlocks with it; where it made nothing (a damaged slot, no
memory), the command finds out why by itself. Where there is no repository, or a person would have to be asked, all is
left to the command. Imports only what unlocking needs. One at a time in a process.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from perdure.credentials import credential, stands_somewhere
from store.keyring.files import read_key_files
from store.keyring.keys import Keys
from store.keyring.layout import KEY_BYTES, SLOT_ID_BYTES
from store.keyring.slots import Credential, unlock

_WIDTH = SLOT_ID_BYTES + KEY_BYTES


@dataclass(slots=True)
class Unlocking:
    """A repository that is being unlocked with `given`."""

    path: Path
    given: Credential
    _process: int = field(init=False)
    _pipe: int = field(init=False)

    def __post_init__(self) -> None:
        self._pipe, theirs = os.pipe()
        self._process = os.fork()
        if not self._process:
            self._derive(theirs)
        os.close(theirs)

    def keys(self) -> Keys:
        """The keys, when they are there; to be called once. Raises what `unlock` raises."""
        with open(self._pipe, "rb") as pipe:
            found = pipe.read()
        os.waitpid(self._process, 0)
        pieces = [found[at : at + _WIDTH] for at in range(0, len(found) // _WIDTH * _WIDTH, _WIDTH)]
        derived = {piece[:SLOT_ID_BYTES]: piece[SLOT_ID_BYTES:] for piece in pieces}
        return unlock(read_key_files(self.path), self.given, derived)

    def _derive(self, pipe: int) -> None:
        """In the other process, which ends here."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            derived: dict[bytes, bytes] = {}
            with suppress(Exception):  # which the command meets again, and reports
                unlock(read_key_files(self.path), self.given, derived)
            os.write(pipe, b"".join(slot + key for slot, key in derived.items()))
        finally:
            os._exit(0)


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
