"""The catalog: what LMDB caches of a repository, packs and history, besides the chunk index.

Everything in it is replayed from records and pack footers, in the order of the repository's sequence, inside the
caller's transaction; nothing stands here alone. Keys are big-endian numbers so that LMDB's order is theirs.

    meta         "last" -> sequence (8), hash of that record (32)
                 "next pack" -> number (4)
                 "doomed" -> of each doomed pack: id (16), number (4), sequence since which it is doomed (8)
    packs        pack number (4) -> pack header (64), size (8), frame offsets and footer offset (4 each), number of
                 chunks in each frame (2 each)
    pack_ids     pack id (16) -> pack number (4), 0 for a pack that a swap has removed
    vms          VM name -> VM id (16), highest generation number ever used (8)
    generations  VM id (16), number (8) -> sequence (8), record id (32), parent (32), body as JSON
    ids          record id (32) -> VM id (16), number (8)
    protected    VM id (16), number (8) -> nothing
    hurt         VM id (16), number (8) -> bytes lost by region, as JSON
    damaged      pack id (16) -> what is wrong with it, as JSON
    stored       VM id (16), number (8) -> bytes (8) that this VM's generations have stored up to that one, forgotten
                 ones included; number 0: up to the newest
    policies     VM name, or a zero byte for all that have none -> policy as JSON

Pack numbers are local to this host's catalog; 0 is none. A damaged pack has one if something of it can be read: its
readable frames are in the index, reads use them, and deduplication does not (`avoided`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from base.arrays import distinct
from base.errors import NotFoundError
from store import format as layout
from store.index.chunks import Additions, Index
from store.packs import PackEntry, PackInfo
from store.records import (
    AttributesBody,
    DoomBody,
    Generation,
    GenerationBody,
    HurtBody,
    HurtGeneration,
    PolicyBody,
    Record,
    SwapBody,
    TombstoneBody,
    generation_of,
)
from store.retention.policy import Policy, decode_policy
from store.salvage import Examined
from store.storage import ObjectMissingError

if TYPE_CHECKING:
    import lmdb

    from store.index.environment import Environment

DATABASES = (
    "meta", "packs", "pack_ids", "vms", "generations", "ids", "protected", "hurt", "damaged", "stored", "policies",
)  # fmt: skip

INDEX_FOLDER = "index-2"
"""Where the index lies in a host's state for a repository. The number changes with any layout that is kept in LMDB:
another Perdure then indexes anew, beside what it cannot read."""

_LAST = struct.Struct(">Q32s")
_NUMBER = struct.Struct(">I")
_VM = struct.Struct(">16sQ")
_GENERATION = struct.Struct(">Q32s32s")
_PACK_SIZE = struct.Struct("<Q")
_PACK_FIXED = layout.PACK_HEADER.size + _PACK_SIZE.size

DOOMED = np.dtype([("pack_id", "V16"), ("pack", "<u4"), ("since", "<u8")])
"""A doomed pack: its id, its number (0 if nothing of it can be read), and the sequence of the record since which it
has been doomed without a break."""
_BYTES = struct.Struct(">Q")
_ALL_VMS = b"\0"


class DamagedPack(msgspec.Struct, frozen=True, kw_only=True):
    """What this host knows of a pack that is damaged or missing. `pack_id` in hex; `offset` in bytes, None if it is
    about all of it; `frame`: one that is lost, None if none is known to be."""

    pack_id: str
    problem: str
    offset: int | None = None
    frame: int | None = None

    @classmethod
    def of(cls, found: Examined) -> DamagedPack:
        """From what was found, which has problems."""
        first, lost = found.problems[0], min(found.lost_frames, default=None)
        return cls(pack_id=found.pack_id.hex(), problem=first.text, offset=first.offset, frame=lost)


class Catalog:
    """Typed access to the catalog's databases. Every method takes the caller's transaction."""

    def __init__(self, environment: Environment, index: Index) -> None:
        self._environment = environment
        self._index = index
        self._entries: dict[int, PackEntry] = {}

    def last(self, txn: lmdb.Transaction) -> tuple[int, bytes]:
        """(sequence, hash) of the newest record replayed; (0, zeros) before the first."""
        value = self._get(txn, "meta", b"last")
        if value is None:
            return 0, layout.ZERO_ID
        sequence, record_id = _LAST.unpack(value)
        return sequence, record_id

    def apply(
        self, txn: lmdb.Transaction, record: Record, packs: Iterable[PackInfo], gathered: Additions | None = None
    ) -> None:
        """Replay one record, the next in sequence. `packs` are those that it names and that are not known yet.

        Their chunks are findable at once, or after `add_gathered` in the same transaction.
        """
        additions = Additions() if gathered is None else gathered
        for pack in packs:
            self.add_pack(txn, pack, additions)
        if gathered is None:
            self.add_gathered(txn, additions)
        header, body = record.header, record.body
        if isinstance(body, DoomBody):
            self._doom(txn, [bytes.fromhex(each) for each in body.packs], header.sequence)
        elif isinstance(body, SwapBody):
            self._remove(txn, [bytes.fromhex(each) for each in body.removed])
        if isinstance(body, GenerationBody):
            self._put(txn, "vms", body.vm.encode(), _VM.pack(header.vm_id, header.number))
            key = _VM.pack(header.vm_id, header.number)
            value = _GENERATION.pack(header.sequence, record.id, header.parent) + msgspec.json.encode(body)
            self._put(txn, "generations", key, value)
            self._put(txn, "ids", record.id, key)
            stored = _BYTES.pack(self.stored(txn, header.vm_id) + body.stored_bytes)
            self._put(txn, "stored", key, stored)
            self._put(txn, "stored", _VM.pack(header.vm_id, 0), stored)
        elif isinstance(body, TombstoneBody):
            key = _VM.pack(header.vm_id, header.number)
            known = self._get(txn, "generations", key)
            if known is not None:
                self._delete(txn, "ids", _GENERATION.unpack_from(known)[1])
                self._delete(txn, "generations", key)
                self._delete(txn, "protected", key)
                self._delete(txn, "stored", key)
                self._delete(txn, "hurt", key)
        elif isinstance(body, HurtBody):
            self._mark_hurt(txn, body)
        elif isinstance(body, AttributesBody):
            key = _VM.pack(header.vm_id, header.number)
            if body.protected:
                self._put(txn, "protected", key, b"")
            else:
                self._delete(txn, "protected", key)
        elif isinstance(body, PolicyBody):
            key = _ALL_VMS if body.vm is None else body.vm.encode()
            if bytes(body.policy) == b"null":
                self._delete(txn, "policies", key)
            else:
                self._put(txn, "policies", key, bytes(body.policy))
        self._put(txn, "meta", b"last", _LAST.pack(header.sequence, record.id))

    def hurt(self, txn: lmdb.Transaction, generation: Generation) -> dict[str, int]:
        """Bytes that a generation has lost, by region, as the last repair found."""
        value = self._get(txn, "hurt", _VM.pack(bytes.fromhex(generation.vm_id), generation.number))
        return {} if value is None else msgspec.json.decode(value, type=dict[str, int])

    def all_hurt(self, txn: lmdb.Transaction) -> list[HurtGeneration]:
        """What the last record of its kind says, less what was forgotten."""
        found = []
        for key, value in self._items(txn, "hurt"):
            vm_id, number = _VM.unpack(key)
            regions = msgspec.json.decode(value, type=dict[str, int])
            found.append(HurtGeneration(vm_id=vm_id.hex(), number=number, regions=regions))
        return found

    def _mark_hurt(self, txn: lmdb.Transaction, body: HurtBody) -> None:
        for key, _ in list(self._items(txn, "hurt")):
            self._delete(txn, "hurt", key)
        for each in body.generations:
            key = _VM.pack(bytes.fromhex(each.vm_id), each.number)
            if self._get(txn, "generations", key) is not None:
                self._put(txn, "hurt", key, msgspec.json.encode(each.regions))

    def add_gathered(self, txn: lmdb.Transaction, gathered: Additions) -> None:
        """Make chunks findable that were gathered in this transaction."""
        if len(gathered):
            self._index.add(txn, *gathered.take())

    def add_pack(self, txn: lmdb.Transaction, pack: PackInfo, additions: Additions) -> None:
        """Note a pack, and gather its chunks for `add_gathered`; does nothing for a pack that is known."""
        if self._get(txn, "pack_ids", pack.header.pack_id) is not None:
            return
        number = _NUMBER.unpack(self._get(txn, "meta", b"next pack") or _NUMBER.pack(1))[0]
        self._put(txn, "meta", b"next pack", _NUMBER.pack(number + 1))
        self._put(txn, "pack_ids", pack.header.pack_id, _NUMBER.pack(number))
        doomed = self.doomed(txn)
        if len(doomed):  # a damaged one that is whole again, under another number
            doomed["pack"][doomed["pack_id"] == np.void(pack.header.pack_id)] = number
            self._put(txn, "meta", b"doomed", doomed.tobytes())
        value = layout.encode_pack_header(pack.header) + _PACK_SIZE.pack(pack.size) + pack.edges.astype("<u4").tobytes()
        self._put(txn, "packs", _NUMBER.pack(number), value + pack.footer.counts.astype("<u2").tobytes())
        if len(pack.footer.ids):
            additions.append(pack.footer.ids, pack.locations(number))

    def doomed(self, txn: lmdb.Transaction) -> NDArray[np.void]:
        """The packs that are about to be removed: DOOMED (n,), the caller's own."""
        return np.frombuffer(self._get(txn, "meta", b"doomed") or b"", DOOMED).copy()

    def was_removed(self, txn: lmdb.Transaction, pack_id: bytes) -> bool:
        """Whether a swap has removed this pack: its file may go."""
        return self._get(txn, "pack_ids", pack_id) == _NUMBER.pack(0)

    def names(self, txn: lmdb.Transaction, pack_id: bytes) -> bool:
        """Whether some record names this pack, be it there, removed or damaged."""
        return any(self._get(txn, database, pack_id) is not None for database in ("pack_ids", "damaged"))

    def _doom(self, txn: lmdb.Transaction, pack_ids: list[bytes], sequence: int) -> None:
        since = {bytes(each["pack_id"]): int(each["since"]) for each in self.doomed(txn)}
        rows = [
            (np.void(each), self.pack_number(txn, each), since.get(each, sequence)) for each in dict.fromkeys(pack_ids)
        ]
        self._put(txn, "meta", b"doomed", np.array(rows, DOOMED).tobytes())

    def _remove(self, txn: lmdb.Transaction, pack_ids: list[bytes]) -> None:
        numbers = np.array([self.pack_number(txn, each) for each in pack_ids], np.uint32)
        for pack_id, number in zip(pack_ids, numbers.tolist(), strict=True):
            self._put(txn, "pack_ids", pack_id, _NUMBER.pack(0))
            self._delete(txn, "damaged", pack_id)
            if number:
                self._delete(txn, "packs", _NUMBER.pack(number))
                self._entries.pop(number, None)
        self._index.drop_packs(txn, numbers[numbers != 0])
        gone = set(pack_ids)
        doomed = self.doomed(txn)
        left = np.array([bytes(each) not in gone for each in doomed["pack_id"]], np.bool_)
        self._put(txn, "meta", b"doomed", doomed[left].tobytes())

    def pack(self, number: int) -> PackEntry:
        """A pack by its number, for readers of frames. Raises ObjectMissingError for one that was removed."""
        entry = self._entries.get(number)
        if entry is None:
            with self._environment.read() as txn:
                entry = self.entry(txn, number)
            self._entries[number] = entry
        return entry

    def entry(self, txn: lmdb.Transaction, number: int) -> PackEntry:
        """The same inside a transaction, and not kept. Raises ObjectMissingError, IntegrityError."""
        name = f"pack {number} of the local index"
        value = self._get(txn, "packs", _NUMBER.pack(number))
        if value is None:
            raise ObjectMissingError(name)
        frames = (len(value) - _PACK_FIXED - 4) // 6
        header = layout.decode_pack_header(value[: layout.PACK_HEADER.size], name)
        offsets = np.frombuffer(value, "<u4", frames + 1, _PACK_FIXED).astype(np.uint32)
        counts = np.frombuffer(value, "<u2", frames, _PACK_FIXED + 4 * (frames + 1)).astype(np.uint16)
        return PackEntry(header, offsets, counts, _PACK_SIZE.unpack_from(value, layout.PACK_HEADER.size)[0])

    def pack_number(self, txn: lmdb.Transaction, pack_id: bytes) -> int:
        """Number of a known pack, 0 if it is not known or was removed."""
        value = self._get(txn, "pack_ids", pack_id)
        return 0 if value is None else int(_NUMBER.unpack(value)[0])

    def pack_numbers(self, txn: lmdb.Transaction) -> list[int]:
        """Numbers of all packs, ascending."""
        return [int(_NUMBER.unpack(key)[0]) for key, _ in self._items(txn, "packs")]

    def has_packs(self, txn: lmdb.Transaction, numbers: set[int]) -> bool:
        """Whether all these packs are still there."""
        return all(self._get(txn, "packs", _NUMBER.pack(each)) is not None for each in numbers)

    def note_damage(self, txn: lmdb.Transaction, damage: DamagedPack) -> None:
        """From now on deduplication does not rely on this pack."""
        if not self.was_removed(txn, bytes.fromhex(damage.pack_id)):
            self._put(txn, "damaged", bytes.fromhex(damage.pack_id), msgspec.json.encode(damage))

    def damaged(self, txn: lmdb.Transaction) -> list[DamagedPack]:
        """Packs that are known to be damaged or missing."""
        return [msgspec.json.decode(value, type=DamagedPack) for _, value in self._items(txn, "damaged")]

    def avoided(self, txn: lmdb.Transaction) -> NDArray[np.uint32]:
        """Numbers of packs in which deduplication must find nothing, ascending: damaged and doomed ones.

        Read it in the transaction of the look-up.
        """
        numbers = [self.pack_number(txn, bytes.fromhex(each.pack_id)) for each in self.damaged(txn)]
        both = distinct(np.concatenate([np.array(numbers, np.uint32), self.doomed(txn)["pack"]]))
        avoided: NDArray[np.uint32] = both[both != 0].astype(np.uint32)
        return avoided

    def heal_pack(self, txn: lmdb.Transaction, pack: PackInfo) -> None:
        """A pack that was damaged is whole again: all of it is indexed anew, under another number."""
        number = self.pack_number(txn, pack.header.pack_id)
        if number:
            self._index.drop_packs(txn, np.array([number], np.uint32))
            self._delete(txn, "packs", _NUMBER.pack(number))
            self._delete(txn, "pack_ids", pack.header.pack_id)
        self._delete(txn, "damaged", pack.header.pack_id)
        additions = Additions()
        self.add_pack(txn, pack, additions)
        self.add_gathered(txn, additions)

    def vm(self, txn: lmdb.Transaction, name: str) -> tuple[bytes, int] | None:
        """(VM id, highest number ever used), None for a name that never had a generation."""
        value = self._get(txn, "vms", name.encode())
        if value is None:
            return None
        vm_id, highest = _VM.unpack(value)
        return vm_id, highest

    def vms(self, txn: lmdb.Transaction) -> list[str]:
        """Names of all VMs that have generations now."""
        names = []
        for name, value in self._items(txn, "vms"):
            if next(self._scan(txn, "generations", value[:16]), None) is not None:
                names.append(name.decode())
        return names

    def generations(self, txn: lmdb.Transaction, name: str) -> list[Generation]:
        """All generations of a VM, oldest first; empty for an unknown VM."""
        vm = self.vm(txn, name)
        if vm is None:
            return []
        return [self._generation(txn, key, value) for key, value in self._scan(txn, "generations", vm[0])]

    def generation_numbers(self, txn: lmdb.Transaction, name: str) -> list[int]:
        """Numbers of a VM's generations, ascending: a few bytes each, where generations themselves may be many."""
        vm = self.vm(txn, name)
        return [] if vm is None else [int(_VM.unpack(key)[1]) for key, _ in self._scan(txn, "generations", vm[0])]

    def generation(self, txn: lmdb.Transaction, name: str, number: int) -> Generation:
        """One generation. Raises NotFoundError, which says whether it was forgotten or never was."""
        vm = self.vm(txn, name)
        if vm is None:
            raise NotFoundError(f"no VM {name} in this repository")
        key = _VM.pack(vm[0], number)
        value = self._get(txn, "generations", key)
        if value is None:
            what = "was forgotten" if 0 < number <= vm[1] else f"does not exist: the newest is {name}@{vm[1]}"
            raise NotFoundError(f"generation {name}@{number} {what}")
        return self._generation(txn, key, value)

    def has(self, txn: lmdb.Transaction, generation_id: str) -> bool:
        """Whether there is a generation of this id (hex), not forgotten."""
        return self._get(txn, "ids", bytes.fromhex(generation_id)) is not None

    def latest(self, txn: lmdb.Transaction, name: str, back: int = 0) -> Generation:
        """The newest generation of a VM, or the one `back` before it. Raises NotFoundError."""
        vm = self.vm(txn, name)
        seen = 0
        if vm is not None:
            for key, value in self._newest_first(txn, vm[0]):
                if seen == back:
                    return self._generation(txn, key, value)
                seen += 1
        if not seen:
            raise NotFoundError(f"no VM {name} in this repository")
        raise NotFoundError(f"VM {name} has only {seen} generations")

    def newest_first(self, txn: lmdb.Transaction, name: str) -> Iterator[Generation]:
        """All generations of a VM, the newest first; none for an unknown VM. Read within the transaction."""
        vm = self.vm(txn, name)
        for key, value in () if vm is None else self._newest_first(txn, vm[0]):
            yield self._generation(txn, key, value)

    def by_prefix(self, txn: lmdb.Transaction, prefix: str) -> list[Generation]:
        """Generations whose id begins with these hex digits, at most two (to tell that it is ambiguous)."""
        found: list[Generation] = []
        for record_id, key in self._scan(txn, "ids", bytes.fromhex(prefix[: len(prefix) // 2 * 2])):
            if record_id.hex().startswith(prefix):
                found.append(self._generation(txn, key, self._get(txn, "generations", key) or b""))
                if len(found) == 2:
                    break
        return found

    def is_protected(self, txn: lmdb.Transaction, vm_id: bytes, number: int) -> bool:
        """Whether a generation is to be kept whatever a policy says."""
        return self._get(txn, "protected", _VM.pack(vm_id, number)) is not None

    def stored(self, txn: lmdb.Transaction, vm_id: bytes, number: int = 0) -> int:
        """Bytes that a VM's generations have stored up to a listed one, or up to the newest; forgotten ones count."""
        value = self._get(txn, "stored", _VM.pack(vm_id, number))
        return 0 if value is None else int(_BYTES.unpack(value)[0])

    def policy(self, txn: lmdb.Transaction, name: str, *, whole: bool = False) -> Policy | None:
        """What holds for a VM: its own policy, else that for all; None if there is neither.

        With `whole` one that is not all understood is refused (ConflictError). Raises IntegrityError.
        """
        value = self._get(txn, "policies", name.encode()) or self._get(txn, "policies", _ALL_VMS)
        return None if value is None else decode_policy(value, f"VM {name}", whole=whole)

    def policies(self, txn: lmdb.Transaction) -> dict[str | None, Policy]:
        """All policies by VM name; None for the one that holds for all others, which comes first."""
        return {
            None if key == _ALL_VMS else key.decode(): decode_policy(
                value, "all VMs" if key == _ALL_VMS else key.decode()
            )
            for key, value in self._items(txn, "policies")
        }

    def _generation(self, txn: lmdb.Transaction, key: bytes, value: bytes) -> Generation:
        vm_id, number = _VM.unpack(key)
        sequence, record_id, parent = _GENERATION.unpack_from(value)
        body = msgspec.json.decode(value[_GENERATION.size :], type=GenerationBody)
        header = layout.RecordHeader(
            layout.RECORD_GENERATION, 0, sequence, layout.ZERO_ID, vm_id, number, parent, layout.ZERO_ID
        )
        hurt = self._get(txn, "hurt", key)
        return generation_of(
            header,
            body,
            record_id,
            protected=self._get(txn, "protected", key) is not None,
            hurt=None if hurt is None else msgspec.json.decode(hurt, type=dict[str, int]),
        )

    def _get(self, txn: lmdb.Transaction, database: str, key: bytes) -> bytes | None:
        value = txn.get(key, db=self._environment.database(database))
        return None if value is None else bytes(value)

    def _put(self, txn: lmdb.Transaction, database: str, key: bytes, value: bytes) -> None:
        txn.put(key, value, db=self._environment.database(database))

    def _delete(self, txn: lmdb.Transaction, database: str, key: bytes) -> None:
        txn.delete(key, db=self._environment.database(database))

    def _newest_first(self, txn: lmdb.Transaction, vm_id: bytes) -> Iterator[tuple[bytes, bytes]]:
        with txn.cursor(db=self._environment.database("generations")) as cursor:
            found = cursor.prev() if cursor.set_range(vm_id + b"\xff" * 9) else cursor.last()
            while found and bytes(cursor.key())[:16] == vm_id:
                yield bytes(cursor.key()), bytes(cursor.value())
                found = cursor.prev()

    def _items(self, txn: lmdb.Transaction, database: str) -> Iterator[tuple[bytes, bytes]]:
        return self._scan(txn, database, b"")

    def _scan(self, txn: lmdb.Transaction, database: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with txn.cursor(db=self._environment.database(database)) as cursor:
            if cursor.set_range(prefix) if prefix else cursor.first():
                for key, value in cursor:
                    if not bytes(key).startswith(prefix):
                        return
                    yield bytes(key), bytes(value)
