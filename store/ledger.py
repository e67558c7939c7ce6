"""The ledger of a repository: its records, replayed into the local index, and the appending of new ones.

The order of a commit: packs visible and durable; LMDB write transaction; what other processes committed is
replayed and the packs that deduplication relied on are looked up again; the record is published under the next
sequence with put-if-absent, its folder synced: this is the commit; then LMDB commits. An LMDB failure after the
publish is still a success: every process replays records that it has not seen. After a crash anywhere, opening
gives exactly the generations whose record exists. Belongs to one thread at a time.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from base.disk import Disk
from base.errors import (
    ConflictError,
    IntegrityError,
    LockedError,
    PerdureError,
    StorageError,
    WrongPassphraseError,
)
from base.progress import Progress, silent
from store import format as layout
from store import needs
from store.catalog import DATABASES, INDEX_FOLDER, Catalog, DamagedPack
from store.history import History
from store.index.chunks import Index
from store.index.environment import Environment, IndexLostError
from store.keyring.files import read_key_files
from store.keyring.keys import Keys
from store.keyring.layout import keyring_name
from store.keyring.slots import require_descent
from store.packs import WrittenPack, read_pack
from store.records import (
    AttributesBody,
    Body,
    DoomBody,
    Generation,
    GenerationBody,
    HurtBody,
    HurtGeneration,
    PolicyBody,
    Record,
    RegionBody,
    SwapBody,
    TombstoneBody,
    UncertainCommitError,
    decode_record,
    encode_record,
    epoch_of,
    generation_of,
    now,
    unknown_epoch,
)
from store.replay import Replay
from store.retention.policy import Policy, encode_policy
from store.retention.quotas import Admission, OvertakenError, Standing
from store.storage import LocalStorage, ObjectMissingError
from store.writer import RegionDraft

_RECORD = re.compile(r"records/[0-9]{12}")
_PURPOSES = {layout.RECORD_GENERATION: "committing a generation", layout.RECORD_TOMBSTONE: "forgetting a generation"}
_INDEXING = "indexing records"
_GLANCE_S = 0.01
"""As long as it may take somebody to write down what he has taken a lock for."""
_REPLAY_AT_ONCE = 1 << 18
"""Entries of the index replayed in one LMDB transaction (11 MiB): an interrupted indexing goes on from there."""


class Ledger:
    """The history of one repository, and the keys that it is written with. `store.repository.Repository` is one.

    `state` is this host's private folder for it (index and remembered history). `unlock` opens the newest keyring again
    after somebody has changed keys; without it, this stops where the first record of a newer epoch stands.
    `lock_wait_s` bounds every wait for other processes of this host (LockedError).
    """

    def __init__(
        self,
        path: Path,
        keys: Keys,
        state: Path,
        *,
        disk: Disk | None,
        unlock: Callable[[], Keys] | None,
        lock_wait_s: float,
    ) -> None:
        self.path, self.keys = path, keys
        self.disk = disk or Disk()
        self.storage = LocalStorage(path, self.disk)
        self._history = History(state / "history.json", self.storage.settle, self.disk)
        self._unlock, self._locked_out = unlock, False
        self.keys = self._newest_keys()
        with ExitStack() as undo:
            undo.callback(self.storage.close)
            self.environment = self._open_environment(state, lock_wait_s)
            undo.callback(self.environment.close)
            self.index = Index(self.environment, self.keys.index_mac_key)
            self.catalog = Catalog(self.environment, self.index)
            self._replay = Replay(self.storage, self.catalog, self._history, self._keys_for)
            self._undo = undo.pop_all()

    @property
    def sequence(self) -> int:
        """Sequence of the newest record seen."""
        with self.environment.read() as txn:
            return self.catalog.last(txn)[0]

    def refresh(self, progress: Progress = silent, *, wait: bool = True) -> None:
        """Replay what other processes have committed. Raises IntegrityError when history was changed or went back.

        Without `wait`, what another process of this host commits just now may be missed, as if this had been called
        before; but not what it is only indexing, since that may be everything. Raises LockedError after that wait.
        """
        with self.environment.read() as txn:
            sequence, last = self.catalog.last(txn)
        if sequence:
            data = self._record_bytes(sequence)
            if layout.record_id(data) != last:
                raise IntegrityError(
                    layout.record_name(sequence), "is not the record that this host has seen: history was changed"
                )
            self._require_epoch_of(data, sequence)  # another process of this host may have replayed it
        wait = wait or not sequence
        while self.storage.exists(layout.record_name(sequence + 1)):
            try:
                with self.environment.write(_INDEXING, None if wait else _GLANCE_S) as txn:
                    sequence = self._replay.forward(txn, progress, _REPLAY_AT_ONCE)
            except LockedError as error:
                if wait:
                    raise
                if error.purpose not in (_INDEXING, None):
                    break
                wait = True
        self.storage.close_deleted()
        self._remember()

    def record(self, sequence: int) -> Record:
        """A record that was replayed before, verified but for its link. Raises IntegrityError, StorageError."""
        return decode_record(self.keys, self._record_bytes(sequence), sequence, None)

    def generation_at(self, sequence: int) -> Generation:
        """A generation by its record, be it forgotten or not. Raises IntegrityError, StorageError."""
        record = self.record(sequence)
        if not isinstance(record.body, GenerationBody):
            raise IntegrityError(layout.record_name(sequence), "a lease names it as a generation, which it is not")
        return generation_of(record.header, record.body, record.id)

    def forget(self, generation: Generation) -> None:
        """Append a tombstone; the generation's number is never used again. Raises StorageError.

        Raises ConflictError if it is protected or needed by now, whoever did that.
        """
        body = TombstoneBody(time=now(), host=socket.gethostname())

        def named(txn: lmdb.Transaction) -> _Append:
            vm_id, number = _named(generation)
            if self.catalog.is_protected(txn, vm_id, number):
                name = generation.name
                raise ConflictError(f"{name} is protected: `perdure unprotect {name}` first")
            needs.require_none(self.path / "leases", generation.name, generation.sequence)
            return body, vm_id, number, layout.ZERO_ID

        self._commit(layout.RECORD_TOMBSTONE, named, [])

    def protect(self, generation: Generation, *, protected: bool) -> None:
        """Keep a generation whatever a policy says, or no longer. Raises StorageError."""
        body = AttributesBody(time=now(), host=socket.gethostname(), protected=protected)
        self._commit(layout.RECORD_ATTRIBUTES, lambda _: (body, *_named(generation), layout.ZERO_ID), [])

    def mark_hurt(self, generations: Sequence[HurtGeneration]) -> int:
        """Append the record that these generations, and no others, have lost something; gives its sequence.

        Raises StorageError.
        """
        body = HurtBody(time=now(), host=socket.gethostname(), generations=tuple(generations))
        return self._commit(layout.RECORD_HURT, lambda _: (body, bytes(16), 0, layout.ZERO_ID), []).header.sequence

    def doom(self, packs: Sequence[bytes]) -> int:
        """Append the record that these packs (ids), and no others, are about to be removed; gives its sequence.

        From then on deduplication misses what only they hold. The repository's lock for pruning is
        held (store.upkeep.prune). Raises StorageError.
        """
        body = DoomBody(time=now(), host=socket.gethostname(), packs=tuple(each.hex() for each in packs))
        return self._commit(layout.RECORD_DOOM, lambda _: (body, bytes(16), 0, layout.ZERO_ID), []).header.sequence

    def swap(
        self,
        added: list[WrittenPack],
        removed: Sequence[bytes],
        relied: Set[int] = frozenset(),
        require: Callable[[lmdb.Transaction], None] = lambda _: None,
    ) -> int:
        """Append the record that puts packs, visible and durable, in the place of doomed ones; gives its sequence.

        `relied`: numbers of other packs that hold what is taken away with `removed`; `require` is asked in the same
        transaction and raises if it must not be. The repository's lock for pruning is held. Raises ConflictError
        (others have changed meanwhile what this stands on: nothing was done), UncertainCommitError, StorageError.
        """
        body = SwapBody(
            time=now(),
            host=socket.gethostname(),
            added=tuple(each.header.pack_id.hex() for each in added),
            removed=tuple(each.hex() for each in removed),
        )

        def checked(txn: lmdb.Transaction) -> _Append:
            require(txn)
            doomed = self.catalog.doomed(txn)
            if not self.catalog.has_packs(txn, set(relied)) or set(doomed["pack"].tolist()) & relied:
                raise ConflictError("packs that hold what others share with them were doomed or removed meanwhile")
            if not {bytes(each) for each in doomed["pack_id"]} >= set(removed):
                raise ConflictError("packs that are to be removed are doomed no longer")
            return body, bytes(16), 0, layout.ZERO_ID

        return self._commit(layout.RECORD_SWAP, checked, added).header.sequence

    def set_policy(self, vm: str | None, policy: Policy | None) -> None:
        """Set the policy of a VM, or of all that have none of their own; None takes it away. Raises StorageError."""
        body = PolicyBody(time=now(), host=socket.gethostname(), vm=vm, policy=encode_policy(policy))
        self._commit(layout.RECORD_POLICY, lambda _: (body, bytes(16), 0, layout.ZERO_ID), [])

    def publish_generation(
        self,
        vm: str,
        *,
        parent: Generation | None,
        drafts: list[RegionDraft],
        packs: list[WrittenPack],
        hit_packs: set[int],
        dirty_bytes: int,
        cause: str,
        tags: tuple[str, ...],
        metadata: dict[str, Any],
        pause_ms: float | None,
        admission: Admission,
    ) -> Generation:
        """The commit; the writer's only. Packs are visible and durable. Raises OvertakenError: admit it again."""
        regions = tuple(
            RegionBody(
                name=each.name,
                kind=each.kind,
                length=each.root.length,
                chunk_size=each.root.chunk_size,
                height=each.root.height,
                root=each.root.id.hex(),
                kept_bytes=each.kept_bytes,
            )
            for each in drafts
        )
        body = GenerationBody(
            vm=vm,
            time=now(),
            cause=cause,
            host=socket.gethostname(),
            tags=tags,
            regions=regions,
            packs=tuple(pack.header.pack_id.hex() for pack in packs),
            dirty_bytes=dirty_bytes,
            stored_bytes=sum(pack.size for pack in packs),
            pause_ms=pause_ms,
            metadata=metadata,
        )

        def numbered(txn: lmdb.Transaction) -> _Append:
            if not self.catalog.has_packs(txn, hit_packs):
                raise ConflictError(f"packs that this generation of {vm} shares were pruned meanwhile: capture again")
            vm_id, highest = self.catalog.vm(txn, vm) or (secrets.token_bytes(16), 0)
            if admission.standing != Standing(self.catalog.policy(txn, vm), self.catalog.stored(txn, vm_id)):
                raise OvertakenError
            return body, vm_id, highest + 1, bytes.fromhex(parent.id) if parent else layout.ZERO_ID

        if self.note_missing(hit_packs):
            raise ConflictError(f"packs that this generation of {vm} shares are gone: capture again")
        record = self._commit(layout.RECORD_GENERATION, numbered, packs)
        assert isinstance(record.body, GenerationBody)
        return generation_of(record.header, record.body, record.id)

    def _commit(self, kind: int, numbered: _Numbered, packs: list[WrittenPack]) -> Record:
        """Append a record. Once it is published that is a success, whatever then fails: the index catches up when it is
        next opened or refreshed.

        Nothing was appended if this raises an error of ours, unless that is an UncertainCommitError. After anything
        else, as a signal that came in between, it may have been: what the record names must stay.
        """
        published: list[Record] = []
        try:
            with self.environment.write(_PURPOSES.get(kind, "appending a record")) as txn:
                self._append(txn, kind, numbered, packs, published)
            if _chunks(packs) > _REPLAY_AT_ONCE:
                self.refresh()
        except PerdureError:
            if not published:
                raise
        with suppress(PerdureError):
            self._remember()
        return published[0]

    def _append(
        self,
        txn: lmdb.Transaction,
        kind: int,
        numbered: _Numbered,
        packs: list[WrittenPack],
        published: list[Record],
    ) -> None:
        """Publish the next record inside a write transaction, and note it in `published`; if another writer was faster,
        replay his and try again. What has more chunks than fit one transaction is left to `refresh`."""
        while True:
            self._replay.forward(txn, silent, None)
            body, vm_id, number, parent = numbered(txn)
            sequence, previous = self.catalog.last(txn)
            self._require_epoch_of(self._record_bytes(sequence), sequence)
            data = encode_record(
                self.keys, kind, sequence + 1, previous, body, vm_id=vm_id, number=number, parent=parent
            )
            record = decode_record(self.keys, data, sequence + 1, previous)
            name = layout.record_name(sequence + 1)
            try:
                if not self.storage.put(name, data):
                    continue
            except StorageError as error:
                if self.storage.exists(name):
                    raise UncertainCommitError(
                        error.path, f"{error}; it may or may not be committed", errno=error.errno
                    ) from error
                raise
            published.append(record)
            if _chunks(packs) <= _REPLAY_AT_ONCE:
                footers = (read_pack(self.storage, self.keys, pack.header.pack_id) for pack in packs)
                self.catalog.apply(txn, record, footers)
            return

    def avoided(self, txn: lmdb.Transaction) -> NDArray[np.uint32]:
        """Numbers of packs in which deduplication must find nothing."""
        return self.catalog.avoided(txn)

    def note_missing(self, numbers: set[int]) -> bool:
        """Look whether these packs are still there, as long as they were; remember those that are not.

        True if there are such: they are found no longer by `nodes.reusable`. Raises StorageError, IntegrityError.
        """
        lost, swapped = [], False
        for number in numbers:
            try:
                entry = self.catalog.pack(number)
            except ObjectMissingError:  # swapped out since it was found
                swapped = True
                continue
            name = layout.pack_name(entry.header.pack_id)
            try:
                if self.storage.size(name) > int(entry.offsets[-1]):
                    continue
                problem = "is truncated"
            except ObjectMissingError as error:
                problem = error.problem
            lost.append(DamagedPack(pack_id=entry.header.pack_id.hex(), problem=problem))
        if lost:
            with self.environment.write("noting packs that are gone") as txn:
                for each in lost:
                    self.catalog.note_damage(txn, each)
        return swapped or bool(lost)

    def _keys_for(self, data: bytes, sequence: int) -> Keys:
        self._require_epoch_of(data, sequence)
        return self.keys

    def _require_epoch_of(self, data: bytes, sequence: int) -> None:
        """Have the keys of a record's epoch. What follows it must not be of an older one, so no writer goes on without.

        Raises WrongPassphraseError, IntegrityError.
        """
        epoch = epoch_of(data, sequence)
        if epoch > self.keys.current_epoch:
            self.renew_keys()
        if epoch > self.keys.current_epoch:
            raise IntegrityError(layout.record_name(sequence), unknown_epoch(epoch, self.keys.current_epoch))

    def renew_keys(self) -> None:
        """Take the newest keys, if somebody has changed them. Raises WrongPassphraseError, IntegrityError."""
        self.keys = self._newest_keys()
        self._locked_out = False

    def _newest_keys(self) -> Keys:
        """The keys at hand, or those of a keyring that was made meanwhile; compared with what this host has seen."""
        keys = self.keys
        if self._unlock is not None and self.storage.exists(keyring_name(keys.header.number + 1)):
            try:
                keys = self._unlock()
            except WrongPassphraseError as error:
                raise WrongPassphraseError(
                    "keys were changed, and what this process was started with opens them no longer: start it again"
                ) from error
        self._history.check_keyring(
            keys.header.number,
            keys.keyring_hash,
            lambda number, seen: require_descent(read_key_files(self.path), number, seen),
        )
        return keys

    def _require_no_gap(self) -> None:
        """Sequences have no holes: a record beyond a missing one means that history was taken out."""
        missing = layout.record_name(self.sequence + 1)
        beyond = max(
            (each for each in self.storage.list("records") if each > missing and _RECORD.fullmatch(each)), default=""
        )
        if beyond and not self.storage.exists(missing):
            raise IntegrityError(missing, f"is missing, though {beyond} is there")

    def _record_bytes(self, sequence: int) -> bytes:
        return self.storage.get(layout.record_name(sequence))

    def _remembered_hash(self, sequence: int) -> bytes | None:
        name = layout.record_name(sequence)
        return layout.record_id(self.storage.get(name)) if self.storage.exists(name) else None

    def _remember(self) -> None:
        with self.environment.read() as txn:
            self._history.advance(*self.catalog.last(txn))

    def _open_environment(self, state: Path, wait_s: float) -> Environment:
        """Open the index; one that was lost or cannot be trusted is made anew and filled by replay."""
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os(error, str(state), "make the folder") from error

        def opened() -> Environment:
            names, key = (*DATABASES, *Index.DATABASES), self.keys.index_mac_key
            return Environment(state / INDEX_FOLDER, names, mac_key=key, wait_s=wait_s, disk=self.disk)

        try:
            return opened()
        except IndexLostError:
            return opened()


_Append = tuple[Body, bytes, int, bytes]
"""(body, VM id, generation number, parent id) of a record to append."""
_Numbered = Callable[[lmdb.Transaction], _Append]
"""Says inside the transaction, once others' records are replayed, what to append; raises if that is to be nothing."""


def _chunks(packs: list[WrittenPack]) -> int:
    return sum(pack.chunks for pack in packs)


def _named(generation: Generation) -> tuple[bytes, int]:
    """The way a record's header names a generation."""
    return bytes.fromhex(generation.vm_id), generation.number
