"""Pack files that no generation can lead to: left by a prune that was killed, or by writers that were.

Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from store import format as layout
from store import leases
from store.records import GenerationBody, SwapBody

if TYPE_CHECKING:
    from store.repository import Repository


def unlink_swapped(repository: Repository) -> None:
    """Remove files that a killed prune swapped out and did not remove. Raises StorageError."""
    with repository.environment.read() as txn:
        gone = [name for name, each in _stored(repository) if repository.catalog.was_removed(txn, each)]
    if gone:
        repository.environment.flush()
        for name in gone:
            repository.storage.delete(name)


class Orphans:
    """Packs that no record names, as they are found when this is made; perhaps one is about to."""

    def __init__(self, repository: Repository) -> None:
        """Raises StorageError."""
        self._repository = repository
        with repository.environment.read() as txn:
            self._packs = [each for _, each in _stored(repository) if not repository.catalog.names(txn, each)]
        # After the packs: theirs may be among them.
        self._writers = {each.name for each in leases.writers(repository.leases)}

    def remove(self) -> int:
        """They go if every writer that was there after they were found has ended without naming them; gives how many
        went. Raises StorageError."""
        if not self._packs or self._writers & {each.name for each in leases.writers(self._repository.leases)}:
            return 0
        self._repository.refresh()
        named = _named(self._repository)  # not from the index: what is deleted here comes back from nowhere
        gone = [each for each in self._packs if each.hex() not in named]
        for pack_id in gone:
            self._repository.storage.delete(layout.pack_name(pack_id))
        return len(gone)


def _stored(repository: Repository) -> Iterator[tuple[str, bytes]]:
    """(name, id) of every file that is a pack of ours by its name."""
    for name in repository.storage.list("packs"):
        with suppress(ValueError):  # not ours
            pack_id = bytes.fromhex(name.rpartition("/")[2])
            if layout.pack_name(pack_id) == name and len(pack_id) == 16:
                yield name, pack_id


def _named(repository: Repository) -> set[str]:
    """Ids of all packs that any record has ever named."""
    named: set[str] = set()
    for sequence in range(1, repository.sequence + 1):
        body = repository.record(sequence).body
        if isinstance(body, GenerationBody):
            named.update(body.packs)
        elif isinstance(body, SwapBody):
            named.update(body.added)
    return named
