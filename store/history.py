"""What this host remembers of a repository's history, outside the repository and outside the index.

One small file holds the newest (sequence, hash) of records and (number, hash) of keyrings that was seen. A
repository that no longer has them, or has others in their place, was put back or changed, and is refused. Belongs to
one thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import msgspec

from base.disk import Disk, replace_file
from base.errors import IntegrityError, StorageError
from store import format as layout
from store.keyring.layout import keyring_name


class _Seen(msgspec.Struct, frozen=True):
    sequence: int
    hash: str
    keyring: int = 0
    keyring_hash: str = ""


class History:
    """The memory of one repository. `settle` makes the names in one of its folders durable (Storage.settle)."""

    def __init__(self, path: Path, settle: Callable[[str], None] = lambda _: None, disk: Disk | None = None) -> None:
        self._path, self._settle, self._disk = path, settle, disk or Disk()
        self._seen = self._read()
        self._keyring = self._seen.keyring, self._seen.keyring_hash

    @property
    def newest(self) -> tuple[int, str]:
        """(sequence, hash in hex) of the newest record that this host has seen; 0 if it has seen none."""
        return self._seen.sequence, self._seen.hash

    def check(self, hash_of: Callable[[int], bytes | None]) -> None:
        """Compare with the repository. Raises IntegrityError."""
        sequence = self._seen.sequence
        if sequence == 0:
            return
        found = hash_of(sequence)
        if found is None:
            raise IntegrityError(
                layout.record_name(sequence), "is gone though this host has seen it: the repository's history went back"
            )
        if found.hex() != self._seen.hash:
            raise IntegrityError(
                layout.record_name(sequence), "is not the record that this host has seen: history was changed"
            )

    def check_keyring(self, number: int, keyring_hash: bytes, descends: Callable[[int, bytes], None]) -> None:
        """Compare the keyring that was opened. Raises IntegrityError.

        `descends(number, hash)` raises it unless that keyring leads to the opened one, which is newer.
        """
        seen = self._seen
        if seen.keyring and number > seen.keyring:
            descends(seen.keyring, bytes.fromhex(seen.keyring_hash))
        if number < seen.keyring or (number == seen.keyring and keyring_hash.hex() != seen.keyring_hash):
            raise IntegrityError(
                keyring_name(number), f"is older than keyring {seen.keyring} or another one, which this host has seen"
            )
        self._keyring = number, keyring_hash.hex()

    def settle(self, folder: str) -> None:
        """Make durable what others have published: it must be, before this host remembers it for ever.

        Raises StorageError.
        """
        try:
            self._settle(folder)
        except StorageError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # a medium on which nothing can be pending
                raise

    def advance(self, sequence: int, record_hash: bytes) -> None:
        """Remember a newer record, and the keyring that was checked.

        What another process has remembered meanwhile is kept. Its content is durable before its name is changed, or a
        power loss could leave half of it; the change of the name need not be: an older memory is as true. Raises
        StorageError.
        """
        stored = self._read()
        records = [
            (stored.sequence, stored.hash),
            (self._seen.sequence, self._seen.hash),
            (sequence, record_hash.hex()),
        ]
        keyrings = [(stored.keyring, stored.keyring_hash), self._keyring]
        self._seen = _Seen(
            *max(records, key=lambda each: each[0]),  # of equal ones the first: what was seen before
            *max(keyrings, key=lambda each: each[0]),
        )
        if self._seen == stored:
            return
        if self._seen.sequence > stored.sequence:
            self.settle("records")
        if self._seen.keyring > stored.keyring:
            self.settle("keyring")
        replace_file(self._disk, self._path, msgspec.json.encode(self._seen), lasting=False)

    def remember(self) -> None:
        """Remember the keyring that was checked. Raises StorageError."""
        self.advance(0, layout.ZERO_ID)

    def _read(self) -> _Seen:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Seen)
        except FileNotFoundError:
            return _Seen(0, layout.ZERO_ID.hex())
        except OSError as error:
            raise StorageError.from_os(error, str(self._path), "read") from error
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise IntegrityError(
                str(self._path),
                f"what this host remembers of the repository is damaged ({error}): "
                "check the repository, then remove this file",
            ) from error
