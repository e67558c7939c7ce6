"""Keys of an unlocked repository, and the sealing of everything that is stored.

Owns the derivation of every key, every AES-256-GCM call and every nonce of the store; `slots` makes and opens
the files that keys come from, and nothing else touches either. Invariants: a nonce never meets the same AES key with
different input (argued at `Sealer`); nothing here prints, pickles or logs a secret; what another process needs leaves
only through `worker_material` or `handover`, without the signing key.

Everything is immutable once made and may be shared between threads. Processes get `worker_material` through a pipe.
Python cannot wipe memory: secrets live until the process ends.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from base.errors import IntegrityError
from store.keyring.layout import (
    ASSOCIATED,
    CHUNK_CONTEXT,
    KEY_BYTES,
    MAX_LEVEL,
    NODE_CONTEXT,
    NONCE_BYTES,
    SCOPE,
    SEAL_OVERHEAD,
    SEALING_CONTEXT,
    VERSION,
    KeyringBody,
    KeyringHeader,
    Secret,
    SigningKey,
    decode_keyring,
    decode_keyring_body,
    encode_keyring_body,
    keyring_name,
)

Bytes = bytes | bytearray | memoryview

_WORKER = struct.Struct("<16s32sII")
_WORKER_EPOCH = struct.Struct("<I32s")
_HANDOVER = struct.Struct("<Q32s8s")


def signer_of(signing_keys: Sequence[SigningKey], epoch: int) -> bytes:
    """The public key that signs records of an epoch: the last one that began no later. Needs no secret."""
    return [each.public_key for at, each in enumerate(signing_keys) if not at or each.first_epoch <= epoch][-1]


class Sealer(Secret):
    """Seals and opens the parts of one object: the frames and footer of a pack, the body of a record.

    Why a nonce cannot do harm. AES-GCM breaks when one key meets one nonce with two different inputs (plaintext or
    associated data). Counting would need memory that survives a crash, a retried write and a host restored from a
    snapshot; random nonces need a random generator that such a snapshot does not repeat. So both keys are derived from
    everything that names the object (version, kind, repository, object id, epoch, salt), and the nonce is a keyed hash
    of all that is left of the input: plaintext, kind and number. Two equal nonces under one key therefore mean either
    equal input, which gives the same sealed bytes and tells nothing new, or a collision of 96 bits of a keyed hash
    whose key nobody knows: among 2**20 parts of one object less than 2**-56, even if the salt should be repeated.
    The nonce key is the second half of the derived 64 bytes and never the AES key: each primitive has a key of its own,
    so what a nonce, which is stored in clear, might ever tell about its key tells nothing about the cipher's. That key
    is secret and differs from object to object, so that equal content shows no equal nonces across objects, and nobody
    can test a guess of the content against the nonce.
    """

    __slots__ = ("_aead", "_associated", "_kind", "_name", "_nonce_key")

    def __init__(
        self, secret: bytes, kind: int, repository_id: bytes, object_id: bytes, epoch: int, salt: bytes, name: str
    ) -> None:
        """`name` is the object's storage name, for errors."""
        scope = SCOPE.pack(VERSION, kind, epoch, repository_id, salt) + object_id
        keys = blake3(secret + scope, derive_key_context=SEALING_CONTEXT).digest(2 * KEY_BYTES)
        self._aead = AESGCM(keys[:KEY_BYTES])
        self._nonce_key = keys[KEY_BYTES:]
        self._kind = kind.to_bytes(2, "little")
        self._associated = ASSOCIATED.pack(VERSION, kind, repository_id) + object_id
        self._name = name

    def seal(self, number: int, plaintext: Bytes) -> bytes:
        """Nonce (12), ciphertext, tag (16) of part `number` (0 to 2**64-1) of the object.

        Two passes over the plaintext, one allocation more than its length: 64 KiB take 13 us, 16 KiB 4.6 us.
        """
        place = number.to_bytes(8, "little")
        nonce = blake3(plaintext, key=self._nonce_key).update(self._kind + place).digest(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, plaintext, self._associated + place)

    def open(self, number: int, sealed: Bytes, offset: int | None = None) -> bytes:
        """The plaintext. Raises IntegrityError naming the object, and `offset` if the caller knows where it read."""
        view = memoryview(sealed)
        if len(view) >= SEAL_OVERHEAD:
            place = number.to_bytes(8, "little")
            try:
                return self._aead.decrypt(view[:NONCE_BYTES], view[NONCE_BYTES:], self._associated + place)
            except InvalidTag:
                pass
        raise IntegrityError(self._name, f"sealed part {number} does not open: damaged or replaced", offset=offset)


class DataKeys(Secret):
    """What reading and writing chunks needs: the id key and data keys by epoch. All that a worker process gets."""

    __slots__ = ("_data_keys", "_id_key", "_id_keys", "current_epoch", "repository_id")

    def __init__(self, repository_id: bytes, id_key: bytes, data_keys: Mapping[int, bytes], current_epoch: int) -> None:
        self.repository_id = repository_id
        self.current_epoch = current_epoch
        self._id_key = id_key
        self._data_keys = dict(data_keys)
        self._id_keys = {("chunk", 0): blake3(id_key, derive_key_context=CHUNK_CONTEXT).digest()}
        for level in range(1, MAX_LEVEL + 1):
            context = NODE_CONTEXT.format(level)
            self._id_keys["node", level] = blake3(id_key, derive_key_context=context).digest()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of repository {self.repository_id.hex()}, epoch {self.current_epoch}>"

    @classmethod
    def from_worker_material(cls, material: bytes) -> DataKeys:
        """In a worker process: the other end of `worker_material`."""
        repository_id, id_key, current, count = _WORKER.unpack_from(material)
        keys = dict(_WORKER_EPOCH.iter_unpack(material[_WORKER.size :]))
        assert len(keys) == count, "worker material arrived in pieces"
        return DataKeys(repository_id, id_key, keys, current)

    def worker_material(self, epochs: Iterable[int] | None = None) -> bytes:
        """Secrets for a worker process, to be sent through a pipe and never stored or logged.

        `epochs`: those whose packs it reads; by default only the current one, which is enough to write.
        """
        wanted = sorted({self.current_epoch} if epochs is None else set(epochs))
        entries = [_WORKER_EPOCH.pack(epoch, self._data_key(epoch, "keyring")) for epoch in wanted]
        head = _WORKER.pack(self.repository_id, self._id_key, self.current_epoch, len(entries))
        return head + b"".join(entries)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs whose data key is here, ascending."""
        return tuple(sorted(self._data_keys))

    def id_key(self, domain: str, level: int = 0) -> bytes:
        """Key of the BLAKE3 that makes ids: domain "chunk" (level 0) or "node" (page map, level 1 to 13)."""
        return self._id_keys[domain, level]

    def sealer(self, kind: int, object_id: bytes, epoch: int, salt: bytes, name: str = "") -> Sealer:
        """The sealer of one object; `salt` (32) is random and stands in its clear header, `name` is for errors.

        Raises IntegrityError if the keyring has no key of that epoch.
        """
        name = name or f"object {object_id.hex()}"
        secret = self._data_key(epoch, name)
        return Sealer(secret, kind, self.repository_id, object_id, epoch, salt, name)

    def _data_key(self, epoch: int, name: str) -> bytes:
        key = self._data_keys.get(epoch)
        if key is None:
            raise IntegrityError(name, f"belongs to epoch {epoch}, for which the keyring has no key")
        return key


class Keys(DataKeys):
    """All keys of an unlocked repository. Made by `slots` only."""

    __slots__ = ("_body", "_signing", "header", "keyring_hash", "slot_id")

    def __init__(self, header: KeyringHeader, body: KeyringBody, keyring_hash: bytes, slot_id: bytes) -> None:
        super().__init__(header.repository_id, body.id_key, body.data_keys, header.epoch)
        self._body = body
        self._signing = Ed25519PrivateKey.from_private_bytes(body.signing_private)
        self.header = header
        """Clear part of the keyring that counts, verified: slots, signing keys, number."""
        self.keyring_hash = keyring_hash
        """BLAKE3 of the keyring file. A client that remembers (header.number, keyring_hash) notices a step back."""
        self.slot_id = slot_id
        """The slot that was opened."""

    @property
    def index_mac_key(self) -> bytes:
        """Key of the MAC over index runs."""
        return self._body.index_mac_key

    @property
    def signing_keys(self) -> tuple[SigningKey, ...]:
        """Public keys that have signed for this repository, oldest first, each vouched for by the one before."""
        return self.header.signing_keys

    @property
    def public_key(self) -> bytes:
        """The Ed25519 public key that belongs to `sign`."""
        return self.signing_keys[-1].public_key

    def public_key_of(self, epoch: int) -> bytes:
        """The public key that signs records of an epoch."""
        return signer_of(self.signing_keys, epoch)

    def sign(self, data: Bytes) -> bytes:
        """Ed25519 signature (64). What is signed begins with the magic of its kind: no two kinds can be confused."""
        return self._signing.sign(data)

    @staticmethod
    def verify(public_key: bytes, data: Bytes, signature: bytes, name: str = "signature") -> None:
        """Raises IntegrityError naming `name` if `signature` is not that of `data` by `public_key`. Needs no secret."""
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
        except (InvalidSignature, ValueError) as error:
            raise IntegrityError(name, "its signature is wrong: damaged, or written by somebody else") from error

    def handover(self) -> bytes:
        """What another process of this user needs to read, to be sent through a pipe and never stored or logged. The
        signing key is not in it."""
        body = replace(self._body, signing_private=bytes(KEY_BYTES))
        return _HANDOVER.pack(self.header.number, self.keyring_hash, self.slot_id) + encode_keyring_body(body)

    @classmethod
    def from_handover(cls, material: bytes, keyring: Callable[[str], bytes]) -> Keys:
        """The other end of `handover`; what this signs is worth nothing. `keyring` gives the file of a storage name.

        Raises IntegrityError, and what `keyring` raises.
        """
        number, keyring_hash, slot_id = _HANDOVER.unpack_from(material)
        name = keyring_name(number)
        data = keyring(name)
        if blake3(data).digest() != keyring_hash:
            raise IntegrityError(name, "is not the keyring that was opened")
        body = decode_keyring_body(material[_HANDOVER.size :], name)
        return cls(decode_keyring(data, name)[0], body, keyring_hash, slot_id)

    def secrets(self) -> KeyringBody:
        """For `slots`, which seals them again into the next keyring."""
        return self._body
