"""The files that keys come from, read: slots and keyrings by storage name.

Apart from the rest so that unlocking needs few modules: it begins before the others are imported. Pure reading; safe
anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from base.errors import FormatVersionError, IntegrityError
from store.keyring import layout, slots
from store.storage import LocalStorage, ObjectMissingError, Storage

_NAME = re.compile(r"keys/[0-9a-f]{16}|keyring/[0-9]{8}")
_BYTES_MAX = 64 << 20
FOLDERS = {"keys": layout.SLOT_BYTES, "keyring": layout.MAX_KEYRING}
"""Where key files lie, and the most bytes that one has."""


def read_key_files(path: Path) -> dict[str, bytes]:
    """Key slots and keyrings by storage name, a byte more than its most of one that is too long."""
    storage = LocalStorage(path)
    try:
        return key_files(storage)
    finally:
        storage.close()


def key_files(storage: Storage) -> dict[str, bytes]:
    """Like `read_key_files`. Slots are listed first: one that is seen was made before the newest keyring was.

    Other names are no key files. Raises IntegrityError if there are more than anybody's changes of keys leave, so that
    who can write the folder cannot choose how much memory this takes.
    """
    files: dict[str, bytes] = {}
    for folder in FOLDERS:
        _read(storage, (each for each in storage.list(folder) if _NAME.fullmatch(each)), files)
    with suppress(IntegrityError, FormatVersionError):  # found again by whoever uses it
        named = (layout.slot_name(each.slot_id) for each in slots.newest(files)[0].slots)
        _read(storage, (name for name in named if name not in files), files)  # made between the two listings
    return files


def _read(storage: Storage, names: Iterable[str], files: dict[str, bytes]) -> None:
    for name in list(names):
        try:
            files[name] = storage.get_range(name, 0, FOLDERS[name.partition("/")[0]] + 1)
        except ObjectMissingError:  # deleted since it was listed
            continue
        except IntegrityError:  # no file at all: a damaged slot stops no other
            files[name] = b""
        if sum(map(len, files.values())) > _BYTES_MAX:
            raise IntegrityError(name, f"key files have more than {_BYTES_MAX >> 20} MiB in all")
