"""The on-disk format of key slots, keyrings and sealed parts: magics, layouts, pure encoders and decoders.

All integers are little-endian. No key is used here: what is sealed, and what was opened, only changes its shape.

SLOT  files `keys/<slot id, 16 hex digits>`, 308 bytes
    offset size  field
         0    8  magic "PERDSLOT"
         8    2  format version, 1
        10    1  kind: 1 passphrase, 2 key file
        11    1  zero
        12    4  Argon2id memory in KiB, at most 2097152; times passes at most 4194304
        16    4  Argon2id passes, at most 64
        20    4  Argon2id lanes, at most 64
        24    8  slot id, random
        32   16  repository id
        48   32  Argon2id salt
        80    8  time of creation, seconds since 1970
        88   32  X25519 public key
       120   64  label, UTF-8, padded with zeros
       184   92  sealed: X25519 private key (32), Ed25519 public key that this slot trusts (32)
       276   32  BLAKE3 of everything before: tells damage from a wrong passphrase
Sealed with kind 32, number 0, object id = BLAKE3 of the first 184 bytes, salt = the Argon2id salt,
secret = Argon2id (version 0x13) of the passphrase or of the key file's bytes, 32 bytes.

KEYRING  files `keyring/<number, 8 digits>`; the highest number counts
    offset size  field
         0    8  magic "PERDKEYS"
         8    2  format version, 1
        10    2  number of slots, s, at most 64; KiB times passes of all of them at most 8388608
        12    2  number of signing keys, k
        14    2  zero
        16    8  number of this keyring, from 1
        24   16  repository id
        40   32  BLAKE3 of the whole previous keyring; zero in the first
        72   32  salt
       104    4  current epoch
       108    4  length of the sealed body, n
       112 100*k signing keys, oldest first
     +100*k 164*s slots
     +164*s   n  body
         +n   64  Ed25519 signature of everything before it, by the last signing key

SIGNING KEY  (in a keyring)
    offset size  field
         0    4  first epoch whose records it signs
         4   32  Ed25519 public key
        36   64  signature of the link by the signing key before; zero in the first
The link: "PERDSIGN", format version (2), repository id (16), first epoch (4), old public key, new public key.

KEYRING SLOT  (in a keyring)
    offset size  field
         0    8  slot id
         8   32  the slot's X25519 public key
        40   32  BLAKE3 of the whole slot file
        72   32  ephemeral X25519 public key
       104   60  sealed: master (32), new in every keyring
Sealed with kind 33, number = that of the keyring, object id = slot id, salt = the keyring's, secret = HKDF-SHA256
(no salt, 32 bytes) of the X25519 shared secret with info "Perdure 1 master for a slot", ephemeral public key, slot
public key, slot id.

KEYRING BODY  (before sealing)
    offset size  field
         0   32  id key
        32   32  index MAC key
        64   32  Ed25519 private key of the last signing key
        96    4  number of epochs, e
       100 36*e  data keys, ascending: epoch (4), key (32); the last is that of the current epoch
Sealed with kind 34, number = that of the keyring, object id = BLAKE3 of everything before the body, salt = the
keyring's, secret = the master.

SEALED PART
    offset size  field
         0   12  nonce
        12    n  AES-256-GCM ciphertext, as long as the plaintext
      12+n   16  AES-256-GCM tag
Given a secret (32), a kind, an object id, an epoch, a salt (32) and a number. Frames and footers of packs and bodies of
records: the secret is the data key of their epoch; slots and keyrings have epoch 0.
Keys: BLAKE3 key derivation, context "Perdure 1 sealed part", of secret, format version (2), kind (2), epoch (4),
repository id (16), salt (32), object id; 64 bytes: AES key (32), nonce key (32).
Nonce: first 12 bytes of BLAKE3 keyed with the nonce key, of plaintext, kind (2), number (8).
Associated data: format version (2), kind (2), repository id (16), object id, number (8).

CHUNK AND NODE IDS  BLAKE3 of the content, keyed with the BLAKE3 key derivation of the id key, context
"Perdure 1 chunk id" for chunks, "Perdure 1 page map node id, level L" for nodes of level L (1 to 13).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

from blake3 import blake3

from base.errors import FormatVersionError, IntegrityError, UsageError

VERSION = 1
"""Of everything in a repository: this module's part of it and that of store.format."""
SIGNATURE_BYTES = 64

SLOT_MAGIC, KEYRING_MAGIC, LINK_MAGIC = b"PERDSLOT", b"PERDKEYS", b"PERDSIGN"
SLOT_CLEAR = struct.Struct("<8sHBxIII8s16s32sQ32s64s")
KEYRING_HEADER = struct.Struct("<8sHHH2xQ16s32s32sII")
KEYRING_SIGNING_KEY = struct.Struct("<I32s64s")
KEYRING_SLOT = struct.Struct("<8s32s32s32s60s")
BODY_HEADER = struct.Struct("<32s32s32sI")
BODY_EPOCH = struct.Struct("<I32s")
LINK = struct.Struct("<8sH16sI32s32s")
SCOPE = struct.Struct("<HHI16s32s")
"""What the keys of a sealed part are derived from, after the secret and before the object id."""
ASSOCIATED = struct.Struct("<HH16s")
"""Associated data, before the object id and the number."""

NONCE_BYTES, TAG_BYTES, KEY_BYTES, HASH_BYTES = 12, 16, 32, 32
SEAL_OVERHEAD = NONCE_BYTES + TAG_BYTES
SLOT_BYTES = SLOT_CLEAR.size + SEAL_OVERHEAD + 2 * KEY_BYTES + HASH_BYTES
LABEL_BYTES = 64
SLOT_ID_BYTES = 8
MAX_KEYRING = 16 << 20
MAX_SLOTS = 64
MAX_SLOT_COST = 4 << 20
"""KiB times passes of one slot: 16 times the default, 3 s on two cores of an EPYC 9005. Memory alone: 2 GiB."""
MAX_KEYRING_COST = 8 << 20
"""KiB times passes of all slots of a keyring, which is what a wrong passphrase costs: 32 default slots, 6 s there.
Whoever can write the folder can put any slots there, and they are tried before the keyring is known to be his."""

SEALED_SLOT, SEALED_MASTER, SEALED_KEYRING = 32, 33, 34
"""Kinds of sealed parts; those of packs and records are in store.format."""

SEALING_CONTEXT = "Perdure 1 sealed part"
CHUNK_CONTEXT = "Perdure 1 chunk id"
NODE_CONTEXT = "Perdure 1 page map node id, level {}"
MASTER_CONTEXT = b"Perdure 1 master for a slot"
MAX_LEVEL = 13
"""32**13 chunks are more than 64 bits can number."""


class Secret:
    """Base of what holds secrets: does not pickle, does not copy, shows nothing."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds keys and does not leave its process")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class SlotKind(IntEnum):
    """What opens a slot."""

    PASSPHRASE = 1
    KEY_FILE = 2


@dataclass(frozen=True, slots=True)
class Argon2Parameters:
    """What opening a slot takes, `time` in passes; raises UsageError outside the bounds."""

    memory_kib: int
    time: int
    lanes: int

    def __post_init__(self) -> None:
        lanes = 1 <= self.lanes <= 64
        memory = 8 * self.lanes <= self.memory_kib <= 2 << 20
        if not (lanes and memory and 1 <= self.time <= 64 and self.cost <= MAX_SLOT_COST):
            raise UsageError(
                f"Argon2id with {self.memory_kib} KiB, {self.time} passes, {self.lanes} lanes: allowed are 8 KiB a lane"
                " to 2 GiB, 1 to 64 passes, 4 GiB times passes, 1 to 64 lanes"
            )

    @property
    def cost(self) -> int:
        """Time that it takes grows with this: KiB times passes."""
        return self.memory_kib * self.time


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """Clear part of a slot."""

    kind: SlotKind
    parameters: Argon2Parameters
    slot_id: bytes
    repository_id: bytes
    salt: bytes
    created: int
    public_key: bytes
    label: str


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One Ed25519 public key of the repository, and the signature by the one before it."""

    first_epoch: int
    public_key: bytes
    link: bytes


@dataclass(frozen=True, slots=True)
class KeyringSlot:
    """A slot as the keyring knows it: who may open, and the master sealed for it."""

    slot_id: bytes
    public_key: bytes
    file_hash: bytes
    ephemeral: bytes
    sealed_master: bytes


@dataclass(frozen=True, slots=True)
class KeyringHeader:
    """Clear part of a keyring."""

    number: int
    repository_id: bytes
    previous: bytes
    salt: bytes
    epoch: int
    signing_keys: tuple[SigningKey, ...]
    slots: tuple[KeyringSlot, ...]


@dataclass(frozen=True, slots=True, repr=False)
class KeyringBody(Secret):
    """The secrets of a repository: `data_keys` by epoch."""

    id_key: bytes
    index_mac_key: bytes
    signing_private: bytes
    data_keys: dict[int, bytes]


def slot_name(slot_id: bytes) -> str:
    """Storage name of a slot."""
    return f"keys/{slot_id.hex()}"


def keyring_name(number: int) -> str:
    """Storage name of a keyring."""
    return f"keyring/{number:08d}"


def encode_slot_header(slot: SlotHeader) -> bytes:
    """184 bytes. Raises UsageError for a label that is too long or not printable."""
    label = slot.label.encode("utf-8", "replace")
    if len(label) > LABEL_BYTES or not slot.label.isprintable():
        raise UsageError(f"label {slot.label[:LABEL_BYTES]!r}: at most {LABEL_BYTES} bytes of printable text")
    return SLOT_CLEAR.pack(
        SLOT_MAGIC,
        VERSION,
        slot.kind,
        slot.parameters.memory_kib,
        slot.parameters.time,
        slot.parameters.lanes,
        slot.slot_id,
        slot.repository_id,
        slot.salt,
        slot.created,
        slot.public_key,
        label,
    )


def finish_slot(clear: bytes, sealed: bytes) -> bytes:
    """A whole slot file."""
    return clear + sealed + blake3(clear + sealed).digest()


def decode_slot(data: bytes, name: str) -> tuple[SlotHeader, bytes]:
    """(header, sealed part). Raises IntegrityError, FormatVersionError; Argon2id parameters are checked here."""
    require_magic(data, SLOT_MAGIC, name)
    if len(data) != SLOT_BYTES or blake3(data[:-HASH_BYTES]).digest() != data[-HASH_BYTES:]:
        raise IntegrityError(name, "the key slot is truncated or damaged")
    _, _, kind, memory, passes, lanes, slot_id, repository_id, salt, created, public, label = SLOT_CLEAR.unpack_from(
        data
    )
    try:
        parameters = Argon2Parameters(memory, passes, lanes)
        text = label.rstrip(b"\0").decode()
        header = SlotHeader(SlotKind(kind), parameters, slot_id, repository_id, salt, created, public, text)
        encode_slot_header(header)
    except (UsageError, ValueError) as error:  # the hash is right: somebody wrote it so
        raise IntegrityError(name, f"the key slot makes no sense: {error}") from error
    if name != slot_name(slot_id):
        raise IntegrityError(name, f"holds key slot {slot_id.hex()}: was put in the place of another")
    return header, data[SLOT_CLEAR.size : -HASH_BYTES]


def encode_keyring_clear(header: KeyringHeader, body_bytes: int) -> bytes:
    """Everything before the sealed body; `body_bytes` is the length of that."""
    parts = [
        KEYRING_HEADER.pack(
            KEYRING_MAGIC,
            VERSION,
            len(header.slots),
            len(header.signing_keys),
            header.number,
            header.repository_id,
            header.previous,
            header.salt,
            header.epoch,
            body_bytes,
        )
    ]
    parts += [KEYRING_SIGNING_KEY.pack(key.first_epoch, key.public_key, key.link) for key in header.signing_keys]
    parts += [
        KEYRING_SLOT.pack(slot.slot_id, slot.public_key, slot.file_hash, slot.ephemeral, slot.sealed_master)
        for slot in header.slots
    ]
    return b"".join(parts)


def decode_keyring(data: bytes, name: str) -> tuple[KeyringHeader, bytes, bytes]:
    """(header, sealed body, signature). The signature covers `data[:-64]`, and is not checked here.

    Raises IntegrityError, FormatVersionError.
    """
    require_magic(data, KEYRING_MAGIC, name)
    if not KEYRING_HEADER.size <= len(data) <= MAX_KEYRING:
        raise IntegrityError(name, "the keyring is truncated or damaged")
    _, _, slots, keys, number, repository_id, previous, salt, epoch, length = KEYRING_HEADER.unpack_from(data)
    slots_at = KEYRING_HEADER.size + keys * KEYRING_SIGNING_KEY.size
    body_at = slots_at + slots * KEYRING_SLOT.size
    if len(data) != body_at + length + SIGNATURE_BYTES or not keys or not 1 <= slots <= MAX_SLOTS:
        raise IntegrityError(name, "the keyring is truncated or damaged")
    if name != keyring_name(number):
        raise IntegrityError(name, f"holds keyring {number}: was put in the place of another")
    header = KeyringHeader(
        number,
        repository_id,
        previous,
        salt,
        epoch,
        tuple(SigningKey(*each) for each in KEYRING_SIGNING_KEY.iter_unpack(data[KEYRING_HEADER.size : slots_at])),
        tuple(KeyringSlot(*each) for each in KEYRING_SLOT.iter_unpack(data[slots_at:body_at])),
    )
    return header, data[body_at:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


def encode_keyring_body(body: KeyringBody) -> bytes:
    """Plaintext of a keyring's body."""
    keys = sorted(body.data_keys.items())
    head = BODY_HEADER.pack(body.id_key, body.index_mac_key, body.signing_private, len(keys))
    return head + b"".join(BODY_EPOCH.pack(epoch, key) for epoch, key in keys)


def decode_keyring_body(data: bytes, name: str) -> KeyringBody:
    """The opened body, which was authenticated before. Raises IntegrityError."""
    if len(data) >= BODY_HEADER.size:
        id_key, mac_key, signing, epochs = BODY_HEADER.unpack_from(data)
        if epochs and len(data) == BODY_HEADER.size + epochs * BODY_EPOCH.size:
            return KeyringBody(id_key, mac_key, signing, dict(BODY_EPOCH.iter_unpack(data[BODY_HEADER.size :])))
    raise IntegrityError(name, "the keyring's body makes no sense")


def encode_link(repository_id: bytes, first_epoch: int, old: bytes, new: bytes) -> bytes:
    """What the old signing key signs to name its successor."""
    return LINK.pack(LINK_MAGIC, VERSION, repository_id, first_epoch, old, new)


def require_magic(data: bytes, magic: bytes, name: str, least: int = 10) -> None:
    """Magic and version of an object that has at least so many bytes, before anything else is read.

    Raises IntegrityError, FormatVersionError (a later Perdure has written it).
    """
    if len(data) < 10 or data[:8] != magic:
        raise IntegrityError(
            name, f"does not begin with {magic.decode()}: damaged, or not of this repository", offset=0
        )
    version = int.from_bytes(data[8:10], "little")
    if version > VERSION:
        raise FormatVersionError(name, version, VERSION)
    if version != VERSION or len(data) < least:
        raise IntegrityError(name, "truncated or damaged header", offset=0)
