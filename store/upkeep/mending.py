"""Small files that are damaged or missing, made again what they were: the mark, key slots, keyrings, records.

Each has a hash that stands elsewhere under a signature: a slot's in the keyring, a keyring's and a record's in the one
that follows. So it does not matter where the bytes come from: a copy of the repository, or trying which one flipped
bit gives the hash. The newest record and keyring have nobody who follows: there this host's memory counts, and else
their own signature. A copy in which somebody has gone on from other records than ours is refused.
Works without an index, before the repository is opened. Belongs to one thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from base.errors import ConflictError, FormatVersionError, IntegrityError
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

        Raises ConflictError (somebody has gone on in the copy from other records than ours), IntegrityError (so has
        the repository itself, from another record than this host has seen), StorageError.
        """
        self._keys, self._seen = keys, seen
        return list(self._records())

    def _records(self) -> Iterator[Mend]:
        """From our newest to the first, so that each is proven by the one behind it; then what the copy has beyond.

        Where two have gone on from one repository, a signature does not say whose records these are. So nothing of
        the copy proves anything about ours.
        """
        ours, theirs = _numbers(self._storage), set() if self._copy is None else _numbers(self._copy)
        newest = max(ours | {self._seen[0]})
        known = {each for each in ours | theirs | {self._seen[0]} if 0 < each <= newest}
        mends, later = [], [] if newest else self._later(0, layout.ZERO_ID, 0)
        wanted: bytes | None = None
        behind = 0
        for done, sequence in enumerate(sorted(known, reverse=True), 1):
            if sequence != behind - 1:
                wanted = None
            behind = sequence
            if sequence == self._seen[0]:
                wanted = self._remembered(wanted)
            mends += list(self._record(sequence, wanted))
            mended = self._found
            if sequence == newest:
                later = self._beyond(sequence, mended)
            wanted = None if mended is None else layout.decode_record(mended, layout.record_name(sequence))[0].previous
            self._progress("checking records", done, len(known))
        yield from reversed(mends)
        yield from later

    def _remembered(self, wanted: bytes | None) -> bytes:
        """Hash of the record that this host has seen. Raises IntegrityError if the one behind it says another."""
        sequence, remembered = self._seen[0], bytes.fromhex(self._seen[1])
        if wanted is not None and wanted != remembered:
            raise IntegrityError(
                layout.record_name(sequence + 1), "does not go on from the record that this host has seen"
            )
        return remembered

    def _record(self, sequence: int, wanted: bytes | None) -> Iterator[Mend]:
        name = layout.record_name(sequence)
        data = self._get(name)
        if wanted is not None:
            yield from self._mended(name, data, _has_hash(wanted), _TRIED)
        elif data is not None and self._is_record(data, sequence, None):
            self._found = data
        else:
            before = self._get(layout.record_name(sequence - 1)) if sequence > 1 else None
            link = (
                None if before is None or not self._is_record(before, sequence - 1, None) else layout.record_id(before)
            )
            yield from self._mended(name, data, lambda each: self._is_record(each, sequence, link), _TRIED_SIGNED)

    def _beyond(self, sequence: int, newest: bytes | None) -> list[Mend]:
        """What the copy has beyond our newest record, `newest`; None: nobody has what it was. Raises ConflictError."""
        name = layout.record_name(sequence)
        if newest is not None:
            return self._later(sequence, layout.record_id(newest), layout.decode_record(newest, name)[0].epoch)
        if self._copy is not None and self._copy.exists(name) and self._is_record(self._copy.get(name), sequence, None):
            raise _parted(sequence, "is another than was here")
        return []

    def _later(self, sequence: int, previous: bytes, epoch: int) -> list[Mend]:
        """Records of the copy that go on from ours, up to the first that is damaged."""
        mends: list[Mend] = []
        while self._copy is not None and self._copy.exists(name := layout.record_name(sequence + 1)):
            sequence += 1
            data = self._copy.get(name)
            if not self._is_record(data, sequence, None):
                break
            if not self._is_record(data, sequence, previous, epoch):
                if mends:
                    break
                raise _parted(sequence, "does not go on from the newest record here")
            mends.append(self._put(name, _problem(None), data, FROM_COPY))
            previous, epoch = layout.record_id(data), layout.decode_record(data, name)[0].epoch
        return mends

    def _is_record(self, data: bytes, sequence: int, previous: bytes | None, epoch: int = 0) -> bool:
        """Whether it is signed, and follows the record with the hash `previous`, if that is known."""
        try:
            decode_record(self._keys, data, sequence, previous, epoch)
        except (IntegrityError, FormatVersionError):
            return False
        return True

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


def _numbers(storage: Storage) -> set[int]:
    return {int(each[-12:]) for each in storage.list("records") if _RECORD.fullmatch(each)} - {0}


def _parted(sequence: int, how: str) -> ConflictError:
    return ConflictError(
        f"the copy has gone another way: its {layout.record_name(sequence)} {how}. Repair without it or from another "
        "copy; what only this one has can be exported there and imported here"
    )


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
