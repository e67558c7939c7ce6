"""Records: the signed, hash-chained history of a repository, one file a record, numbered without gaps.

Pure encoding and decoding; store.catalog replays them, store.ledger publishes them. Bodies are JSON, sealed;
headers are clear, so that the chain can be audited with the public key alone.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from base.errors import IntegrityError, StorageError
from store import format as layout
from store.keyring.keys import Keys
from store.keyring.layout import MAX_LEVEL, SIGNATURE_BYTES
from store.pagemap import Root


class UncertainCommitError(StorageError):
    """A record became visible but could not be made durable: a later look tells whether it was committed."""


# A holder of the keys may have written anything: what makes no sense is refused when a body is decoded.
Id16 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class RegionBody(msgspec.Struct, frozen=True, kw_only=True):
    """A region in a generation. Sizes in bytes; `root` in hex."""

    name: str
    kind: str
    length: Bytes
    chunk_size: Annotated[int, msgspec.Meta(ge=1, le=layout.MAX_FRAME)]
    height: Annotated[int, msgspec.Meta(ge=0, le=MAX_LEVEL)]
    root: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    kept_bytes: Bytes


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of a generation. `time` is RFC 3339 in UTC; `packs` are the ids of packs that it added, in hex."""

    vm: str
    time: str
    cause: str
    host: str
    tags: tuple[str, ...]
    regions: tuple[RegionBody, ...]
    packs: tuple[Id16, ...]
    dirty_bytes: Bytes
    stored_bytes: Bytes
    pause_ms: float | None
    metadata: dict[str, Any]


class GenesisBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the first record: the repository's settings."""

    time: str
    level: Annotated[int, msgspec.Meta(ge=-100, le=22)]
    frame_bytes: Annotated[int, msgspec.Meta(ge=1, le=layout.MAX_FRAME)]
    pack_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class TombstoneBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that forgets a generation, named by the header's VM and number."""

    time: str
    host: str


class AttributesBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that sets what can change about a generation; the last one counts."""

    time: str
    host: str
    protected: bool


class DoomBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that names all packs (ids in hex) which are about to be removed, from here on.

    It takes the place of the set before: an empty one ends it. Deduplication misses what only doomed packs hold.
    """

    time: str
    host: str
    packs: tuple[Id16, ...]


class SwapBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that puts packs (ids in hex) in the place of doomed ones, whose files may then go."""

    time: str
    host: str
    added: tuple[Id16, ...]
    removed: tuple[Id16, ...]


class PolicyBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that sets the policy of a VM, or (`vm` None) of every VM that has none of its own.

    The last one counts; `policy`, as store.retention.policy encodes it, is null to take it away.
    """

    time: str
    host: str
    vm: str | None
    policy: msgspec.Raw


class HurtGeneration(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that has lost something: its VM's id in hex, its number, and bytes lost by region."""

    vm_id: Id16
    number: Bytes
    regions: dict[str, int]


class HurtBody(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed body of the record that lists all generations which are hurt. It takes the place of the list before."""

    time: str
    host: str
    generations: tuple[HurtGeneration, ...]


Body = GenesisBody | GenerationBody | TombstoneBody | AttributesBody | DoomBody | SwapBody | PolicyBody | HurtBody
_BODIES: dict[int, type[Body]] = {
    layout.RECORD_GENESIS: GenesisBody,
    layout.RECORD_GENERATION: GenerationBody,
    layout.RECORD_TOMBSTONE: TombstoneBody,
    layout.RECORD_ATTRIBUTES: AttributesBody,
    layout.RECORD_DOOM: DoomBody,
    layout.RECORD_SWAP: SwapBody,
    layout.RECORD_POLICY: PolicyBody,
    layout.RECORD_HURT: HurtBody,
}


@dataclass(frozen=True, slots=True)
class Record:
    """A verified record. `id` is the hash of the whole."""

    header: layout.RecordHeader
    body: Body
    id: bytes


@dataclass(frozen=True, slots=True)
class Region:
    """A region of a generation, ready to be read, which keeps `kept_bytes` of the `root.length`."""

    name: str
    kind: str
    root: Root
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class Generation:
    """An immutable point in time of a VM. Ids are hex; sizes are bytes; `time` is RFC 3339 in UTC. `hurt`: bytes that
    were lost by region, as the last repair found."""

    vm: str
    vm_id: str
    number: int
    id: str
    parent: str | None
    sequence: int
    time: str
    cause: str
    host: str
    tags: tuple[str, ...]
    regions: dict[str, Region]
    packs: tuple[str, ...]
    dirty_bytes: int
    stored_bytes: int
    pause_ms: float | None
    metadata: dict[str, Any]
    protected: bool = False
    hurt: dict[str, int] = field(default_factory=dict)

    @property
    def region_bytes(self) -> int:
        """Bytes that this generation keeps."""
        return sum(region.kept_bytes for region in self.regions.values())

    @property
    def full(self) -> bool:
        """Whether it is a whole VM's: with main memory and the state of its devices."""
        return any(region.kind == "device" for region in self.regions.values())

    @property
    def name(self) -> str:
        """The way people name it: `vm@7`."""
        return f"{self.vm}@{self.number}"


def encode_record(
    keys: Keys,
    kind: int,
    sequence: int,
    previous: bytes,
    body: Body,
    *,
    vm_id: bytes = bytes(16),
    number: int = 0,
    parent: bytes = layout.ZERO_ID,
) -> bytes:
    """A whole record, sealed and signed."""
    salt = secrets.token_bytes(32)
    header = layout.RecordHeader(kind, keys.current_epoch, sequence, previous, vm_id, number, parent, salt)
    sealed = keys.sealer(layout.SEALED_RECORD, _object_id(header), header.epoch, salt).seal(
        sequence, msgspec.json.encode(body)
    )
    signed = layout.encode_record_header(header, len(sealed)) + sealed
    return signed + keys.sign(signed)


def decode_record(keys: Keys, data: bytes, sequence: int, previous: bytes | None, epoch: int = 0) -> Record:
    """Verify place in the chain, signature and seal. `previous` None skips the link (its neighbour is not at hand).

    `epoch` is that of the record before: an older one is refused. Whoever writes has read what he follows, so that
    nobody honest goes back; who still holds a signing key that was replaced cannot go on once a record of the next
    epoch stands. Raises IntegrityError, FormatVersionError, naming the record.
    """
    name = layout.record_name(sequence)
    header, sealed, signature = layout.decode_record(data, name)
    if header.epoch > keys.current_epoch:
        raise IntegrityError(name, unknown_epoch(header.epoch, keys.current_epoch))
    keys.verify(keys.public_key_of(header.epoch), data[:-SIGNATURE_BYTES], signature, name)
    if header.sequence != sequence:
        raise IntegrityError(name, f"holds record {header.sequence}: history was reordered")
    if previous is not None and header.previous != previous:
        raise IntegrityError(name, "does not follow the record before it: history was changed")
    if header.epoch < epoch:
        raise IntegrityError(name, replaced_keys(header.epoch, epoch))
    kind = _BODIES.get(header.kind)
    if kind is None:
        raise IntegrityError(name, f"is of kind {header.kind}, which this Perdure does not know: upgrade Perdure")
    sealer = keys.sealer(layout.SEALED_RECORD, _object_id(header), header.epoch, header.salt)
    try:
        body = msgspec.json.decode(sealer.open(sequence, sealed), type=kind)
    except (IntegrityError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise IntegrityError(name, f"its body cannot be opened: {error}") from error
    return Record(header, body, layout.record_id(data))


def generation_of(
    header: layout.RecordHeader,
    body: GenerationBody,
    record_id: bytes,
    *,
    protected: bool = False,
    hurt: dict[str, int] | None = None,
) -> Generation:
    """What callers see of a generation record."""
    regions = {
        each.name: Region(
            each.name,
            each.kind,
            Root(each.length, each.chunk_size, each.height, bytes.fromhex(each.root)),
            each.kept_bytes,
        )
        for each in body.regions
    }
    return Generation(
        vm=body.vm,
        vm_id=header.vm_id.hex(),
        number=header.number,
        id=record_id.hex(),
        parent=None if header.parent == layout.ZERO_ID else header.parent.hex(),
        sequence=header.sequence,
        time=body.time,
        cause=body.cause,
        host=body.host,
        tags=body.tags,
        regions=regions,
        packs=body.packs,
        dirty_bytes=body.dirty_bytes,
        stored_bytes=body.stored_bytes,
        pause_ms=body.pause_ms,
        metadata=body.metadata,
        protected=protected,
        hurt=hurt or {},
    )


def now() -> str:
    """The time as records have it: RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def replaced_keys(found: int, epoch: int) -> str:
    """The problem of a record whose epoch is older than that of a record before it."""
    return f"is of epoch {found} after records of epoch {epoch}: written with keys that were replaced before"


def unknown_epoch(found: int, newest: int) -> str:
    """The problem of a record whose epoch is newer than those of the keyring at hand."""
    return f"is of epoch {found}, and the keyring knows none after {newest}: a newer one is not there or cannot be used"


def epoch_of(data: bytes, sequence: int) -> int:
    """Epoch of a record, which is not verified. Raises IntegrityError, FormatVersionError."""
    return layout.decode_record(data, layout.record_name(sequence))[0].epoch


def _object_id(header: layout.RecordHeader) -> bytes:
    """Binds a body's seal to its VM."""
    return header.vm_id
