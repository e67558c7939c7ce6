"""Replay: bringing the local index up to date with the records of the repository.

Records are applied in their order, inside the caller's write transaction, and only once they are verified: place in
the chain, epoch, signature, seal. A pack that is damaged or missing stops nothing: what can be read of it is indexed,
and the catalog notes the rest, until a later record swaps the pack out. Belongs to one repository and thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from base.progress import Progress
from store import format as layout
from store import salvage
from store.catalog import Catalog, DamagedPack
from store.history import History
from store.index.chunks import Additions
from store.keyring.keys import Keys
from store.records import GenerationBody, SwapBody, decode_record, epoch_of
from store.storage import Storage

if TYPE_CHECKING:
    import lmdb


_RECORD_ENTRIES = 256
"""What a record costs beside the entries that it adds: 0.3 ms of verifying, and a kilobyte or so."""


class Replay:
    """Replays records into a catalog. `keys_for(record bytes, sequence)` gives keys that know the record's epoch."""

    def __init__(
        self, storage: Storage, catalog: Catalog, history: History, keys_for: Callable[[bytes, int], Keys]
    ) -> None:
        self._storage, self._catalog, self._history, self._keys_for = storage, catalog, history, keys_for

    def forward(self, txn: lmdb.Transaction, progress: Progress, limit: int | None) -> int:
        """Replay records that this host has not seen; gives the last sequence.

        Until they have brought about `limit` entries of the index, a record counting as some itself (None: all), so
        that neither memory nor the time for which others wait follows the length of the history or the size of a
        generation, and what is done stays: of a record with more packs than that, these are indexed first, some at a
        time, and it is applied with the last of them. Raises IntegrityError, WrongPassphraseError, StorageError.
        """
        sequence, previous = self._catalog.last(txn)
        first, total, epoch, gathered = sequence, 0, 0, Additions()
        while (limit is None or len(gathered) + (sequence - first) * _RECORD_ENTRIES < limit) and self._storage.exists(
            layout.record_name(sequence + 1)
        ):
            if sequence and not epoch:
                epoch = epoch_of(self._data(sequence), sequence)
            sequence += 1
            data = self._data(sequence)
            keys = self._keys_for(data, sequence)
            record = decode_record(keys, data, sequence, previous, epoch)
            epoch, previous, body = record.header.epoch, record.id, record.body
            added = body.packs if isinstance(body, GenerationBody) else body.added if isinstance(body, SwapBody) else ()
            if not self._add_packs(txn, keys, added, gathered, limit):
                sequence -= 1
                break
            self._catalog.apply(txn, record, (), gathered)
            total = total or sum(1 for _ in self._storage.list("records"))
            progress("indexing records", sequence, max(total, sequence))
        self._catalog.add_gathered(txn, gathered)
        if sequence > first:
            self._history.settle("records")
        return sequence

    def _add_packs(
        self, txn: lmdb.Transaction, keys: Keys, packs: tuple[str, ...], gathered: Additions, limit: int | None
    ) -> bool:
        """Note packs and gather their chunks, as long as these are no more than `limit`; whether that is all of them.

        One that is known is not looked at again.
        """
        for name in packs:
            pack_id = bytes.fromhex(name)
            if self._catalog.names(txn, pack_id):
                continue
            if limit is not None and len(gathered) >= limit:
                return False
            examined = salvage.examine(self._storage, keys, pack_id)
            if examined.info is not None:
                self._catalog.add_pack(txn, examined.info, gathered)
            if examined.problems:
                self._catalog.note_damage(txn, DamagedPack.of(examined))
        return True

    def _data(self, sequence: int) -> bytes:
        return self._storage.get(layout.record_name(sequence))
