"""Small files that are damaged or missing, made again what they were: the mark, key slots, keyrings, records.

Each has a hash that stands elsewhere under a signature: a slot's in the keyring, a keyring's and a record's in the one
that follows. So it does not matter where the bytes come from: a copy of the repository, or trying which one flipped
bit gives the hash. The newest record and keyring have nobody who follows: there this host's memory counts, and else
their own signature. Works without an index, before the repository is opened. Belongs to one thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from base.errors import FormatVersionError, IntegrityError
from base.progress import Progress, silent
from store import format as layout
from store.keyring import slots
from store.keyring.files import key_files
from store.keyring.keys import Keys
from store.keyring.layout import keyring_name, slot_name
from store.records import decode_record
from store.storage import LocalStorage, ObjectMissingError, Storage

FROM_COPY, ONE_BIT, KNOWN = "from the copy", "one flipped bit", "its content is known"
_RECORD = re.compile(r"records/[0-9]{12}")
_TRIED = 1 << 15
"""Bytes of files in which every bit is tried: some two seconds."""
_TRIED_SIGNED = 1 << 12
"""The same where a signature must be verified each time."""


@dataclass(frozen=True, slots=True)
class Mend:
    """A file that was damaged or missing, and how it is known what it was."""

    object: str
    problem: str
    how: str


Right = Callable[[bytes], bool]


class Mending:
    """Mends the files of one repository if `apply`; else says what it would do. `copy`: storage of a copy of it."""

    def __init__(
        self, storage: LocalStorage, copy: Storage | None, *, apply: bool, progress: Progress = silent
    ) -> None:
        self._storage, self._copy, self._apply, self._progress = storage, copy, apply, progress
        self._found: bytes | None = None

    def key_files(self) -> tuple[list[Mend], dict[str, bytes]]:
        """Mark, keyrings and slots, for which no key is needed; and slots and keyrings as they are then.

        What cannot be mended is left as it is. Raises StorageError, IntegrityError (there is no keyring).
        """
        files = key_files(self._storage)
        mends: list[Mend] = []

        def mended(name: str, right: Right, tried: int) -> None:
            mends.extend(self._mended(name, files.get(name), right, tried))
            if self._found is not None:
                files[name] = self._found

        names = [each for each in files if each.startswith("keyring/")]
        if not names:
            raise IntegrityError("keyring", "is missing from the repository")
        name = max(names)
        mended(name, lambda data: _is_keyring(data, name), _TRIED_SIGNED)
        header = slots.read_keyring(files[name], name)
        for entry in header.slots:
            mended(slot_name(entry.slot_id), _has_hash(entry.file_hash), _TRIED)
        mends += self._mark(header.repository_id)
        while header.number > 1 and keyring_name(header.number - 1) in files:
            before = keyring_name(header.number - 1)
            mended(before, _has_hash(header.previous), _TRIED)
            if self._found is None:
                break
            header = slots.read_keyring(files[before], before)
        return mends, files

    def _mark(self, repository_id: bytes) -> Iterator[Mend]:
        wanted = layout.encode_config(repository_id)
        data = self._get("config")
        if data != wanted:
            yield self._put("config", _problem(data), wanted, KNOWN)

    def records(self, keys: Keys, seen: tuple[int, str]) -> list[Mend]:
        """The history. `seen`: (sequence, hash in hex) of the newest record that this host remembers; 0: none.

        Raises StorageError.
        """
        self._keys, self._seen = keys, seen
        return list(self._records())

    def _records(self) -> Iterator[Mend]:
        """From the newest to the first, so that each is proven by the one behind it."""
        known = {self._seen[0]} - {0}  # nothing can be done about numbers of which nobody has a record
        for storage in (self._storage, self._copy):
            if storage is not None:
                known |= {int(each[-12:]) for each in storage.list("records") if _RECORD.fullmatch(each)} - {0}
        wanted: bytes | None = None
        mends, behind = [], 0
        for done, sequence in enumerate(sorted(known, reverse=True), 1):
            if sequence != behind - 1:
                wanted = None
            behind = sequence
            if wanted is None and sequence == self._seen[0]:
                wanted = bytes.fromhex(self._seen[1])
            name = layout.record_name(sequence)
            data = self._get(name)
            mends += list(self._mended(name, data, self._right(sequence, wanted), _TRIED if wanted else _TRIED_SIGNED))
            mended = self._found
            wanted = None if mended is None else layout.decode_record(mended, name)[0].previous
            self._progress("checking records", done, len(known))
        yield from reversed(mends)

    def _right(self, sequence: int, wanted: bytes | None) -> Right:
        def is_right(data: bytes) -> bool:
            if wanted is not None:
                return blake3(data).digest() == wanted
            try:
                decode_record(self._keys, data, sequence, None)
            except (IntegrityError, FormatVersionError):
                return False
            return True

        return is_right

    def _mended(self, name: str, data: bytes | None, right: Right, tried: int) -> Iterator[Mend]:
        """At most one; what the file is to hold is left in `_found`, None if nobody knows."""
        self._found = data if data is not None and right(data) else None
        if self._found is not None:
            return
        for how, candidate in self._candidates(name, data, tried):
            if right(candidate):
                self._found = candidate
                yield self._put(name, _problem(data), candidate, how)
                return

    def _candidates(self, name: str, data: bytes | None, tried: int) -> Iterator[tuple[str, bytes]]:
        if self._copy is not None:
            with suppress(ObjectMissingError):
                yield FROM_COPY, self._copy.get(name)
        if data is not None and len(data) <= tried:
            changed = bytearray(data)
            for at in range(len(changed)):
                for bit in range(8):
                    changed[at] ^= 1 << bit
                    yield ONE_BIT, bytes(changed)
                    changed[at] ^= 1 << bit

    def _get(self, name: str) -> bytes | None:
        try:
            return self._storage.get(name)
        except ObjectMissingError:
            return None

    def _put(self, name: str, problem: str, data: bytes, how: str) -> Mend:
        if self._apply:
            self._storage.put_back(name, [data])
        return Mend(name, problem, how)


def _has_hash(wanted: bytes) -> Right:
    return lambda data: blake3(data).digest() == wanted


def _is_keyring(data: bytes, name: str) -> bool:
    try:
        slots.read_keyring(data, name)
    except (IntegrityError, FormatVersionError):
        return False
    return True


def _problem(data: bytes | None) -> str:
    return "is missing" if data is None else "is damaged"
