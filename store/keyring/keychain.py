"""The files of key slots and keyrings in a repository: reading them, and carrying out a change of keys.

The order of a change: new slots durable, then the keyring that names them: that is the change; then the files of slots
that no keyring names any more. Put-if-absent of the keyring's number decides between two who change keys at once; the
other takes its slot back and is told. A crash before the keyring leaves a slot that nobody will ever name, a crash
after it leaves the file of a slot that was removed: the next change deletes both. A keyring that this host has seen
before must lead to the one that is changed, so that keys which were put back are not carried on. Nothing here needs
LMDB. Belongs to one thread.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from base.disk import Disk
from base.errors import ConflictError, FormatVersionError, IntegrityError, PerdureError, StorageError
from store.history import History
from store.keyring import layout, slots
from store.keyring.files import FOLDERS, key_files
from store.keyring.keys import Keys
from store.keyring.slots import Credential, KeyChange, NewSlot, SlotInfo
from store.storage import LocalStorage, ObjectMissingError

_SLOT = re.compile(r"keys/[0-9a-f]{16}")


def left_over(files: dict[str, bytes]) -> list[str]:
    """Slot files that the newest keyring does not name: removed ones, or those of a change that was interrupted."""
    named = {layout.slot_name(each.slot_id) for each in slots.newest(files)[0].slots}
    return sorted(name for name in files if _SLOT.fullmatch(name) and name not in named)


def recognise(history: History, files: dict[str, bytes]) -> None:
    """Compare the newest keyring with what this host has seen. Raises IntegrityError."""
    header, name = slots.newest(files)
    digest = blake3(files[name]).digest()
    history.check_keyring(header.number, digest, lambda number, seen: slots.require_descent(files, number, seen))


class Keychain:
    """The keys of one repository, unlocked to be changed; a context manager.

    `state` is this host's private folder for the repository. Raises WrongPassphraseError, IntegrityError, StorageError.
    """

    def __init__(
        self, path: Path, repository_id: bytes, credential: Credential, state: Path, *, disk: Disk | None = None
    ) -> None:
        self._storage = LocalStorage(path, disk)
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The memory first: all that it knows is there when files are read.
            self._history = History(state / "history.json", self._storage.settle, disk)
            self._files = key_files(self._storage)
            self.keys = slots.unlock(self._files, credential)
            if self.keys.repository_id != repository_id:
                raise IntegrityError(str(path / "config"), "belongs to another repository than the keys beside it")
            self._recognise()
        except BaseException:
            self._storage.close()
            raise

    def __enter__(self) -> Keychain:
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.close()

    def slots(self) -> tuple[SlotInfo, ...]:
        """Slots of the keyring that was opened."""
        return slots.list_slots(self._files)

    @property
    def own(self) -> SlotInfo:
        """The slot that was opened."""
        return next(each for each in self.slots() if each.slot_id == self.keys.slot_id)

    def outdated(self) -> tuple[bytes, ...]:
        """Ids of slots that were made under an earlier signing key, which they still trust; see `slots.change`."""
        current, first = self.keys.public_key, dict[bytes, bytes]()
        for name in sorted(each for each in self._files if each.startswith("keyring/")):
            with suppress(IntegrityError, FormatVersionError):
                header = slots.read_keyring(self._files[name], name)
                for each in header.slots:
                    first.setdefault(each.slot_id, header.signing_keys[-1].public_key)
        return tuple(each.slot_id for each in self.keys.header.slots if first.get(each.slot_id, current) != current)

    def change(self, *, add: NewSlot | None = None, remove: Collection[bytes] = (), rotate: bool = False) -> Keys:
        """Carry out a change as of `slots.change`; `rotate`: with a new epoch and a new signing key.

        Raises ConflictError (somebody else was faster, no usable slot would be left), NotFoundError, UsageError,
        StorageError.
        """
        step = slots.change(self._files, self.keys, add=add, remove=remove, new_epoch=rotate, new_signing_key=rotate)
        for folder in FOLDERS:  # a writer that died may have left a second name of a slot
            self._storage.remove_leftovers(folder)
        self._publish(step)
        self.keys, self._files = step.keys, {**self._files, **step.put}
        try:
            self._delete(left_over(self._files))
        except StorageError as error:
            raise StorageError(
                error.path, f"{error}; keys were changed, but a removed slot's file is still there", errno=error.errno
            ) from error
        finally:
            self._remember()
        return self.keys

    def _publish(self, step: KeyChange) -> None:
        """Put what is to be put, the keyring last; where that fails, no slot of it is left."""
        keyring = list(step.put)[-1]
        try:
            for name, data in step.put.items():
                if not self._storage.put(name, data):
                    raise ConflictError(f"{name}: keys were changed by somebody else meanwhile: try again")
        except BaseException as error:
            if self._holds(keyring, step.put[keyring]):
                if isinstance(error, StorageError):
                    raise StorageError(
                        error.path, f"{error}; keys were changed, but a power loss may undo it", errno=error.errno
                    ) from error
                raise
            with suppress(StorageError):
                self._delete([name for name in step.put if name != keyring])
            raise

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether this is or may be the file: not where it is missing or another one."""
        try:
            return self._storage.get_range(name, 0, len(data) + 1) == data
        except ObjectMissingError:
            return False
        except PerdureError:
            return True

    def _delete(self, names: list[str]) -> None:
        """Delete files of slots that no keyring will name again.

        What `left_over` gives after our keyring is visible is that: we saw the slot before keyring n was the newest, so
        its maker knew at most keyring n, and can only name it in keyring n + 1, which is ours.
        """
        for name in names:
            self._storage.delete(name)
            self._files.pop(name, None)
        if names:
            self._storage.settle("keys")

    def _remember(self) -> None:
        try:
            self._recognise()
        except StorageError as error:
            raise StorageError(
                error.path, f"{error}; keys were changed, but this host will not remember it", errno=error.errno
            ) from error

    def _recognise(self) -> None:
        """Compare with what this host has seen, then remember. Raises IntegrityError."""
        recognise(self._history, self._files)
        self._history.remember()
