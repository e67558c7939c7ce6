"""Key slots and keyrings: how a passphrase or key file becomes `Keys`, and how the next keyring is made.

Pure functions from files to files (storage name -> bytes); the caller reads, puts if absent, and deletes. Only this
module and `keys` touch keys. Trust goes one way: a slot, which only its passphrase could have sealed, names an
Ed25519 public key of the repository; from it a chain of signatures leads to the keyring. Without that, whoever can
write the folder could seal a master of his own to the slots' public keys, which lie in clear, and would be able to read
what is captured from then on. For the same reason the next keyring takes public keys from the last one, never from slot
files. Files are immutable, the highest keyring number counts, and put-if-absent decides between two who change keys at
once. Safe anywhere; Argon2id takes the memory that a slot asks for.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from base.errors import (
    ConflictError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UsageError,
    WrongPassphraseError,
)
from store.keyring import layout
from store.keyring.keys import Keys, Sealer
from store.keyring.layout import (
    SIGNATURE_BYTES,
    Argon2Parameters,
    KeyringBody,
    KeyringHeader,
    KeyringSlot,
    Secret,
    SigningKey,
    SlotHeader,
    SlotKind,
)

PASSPHRASE_PARAMETERS = Argon2Parameters(memory_kib=128 << 10, time=2, lanes=4)
"""0.25 s of processor time, 0.17 s on two cores. What a guess costs an attacker is memory times the time it is held,
which goes with memory squared times passes: this is 2.7 times the second choice of RFC 9106 (64 MiB, 3 passes) for 1.3
times its work. Four passes would double it again, but every command pays them: they were half of a small one's time."""
KEY_FILE_PARAMETERS = Argon2Parameters(memory_kib=1 << 10, time=1, lanes=1)
"""0.5 ms: a key file is at least 32 random bytes, which nobody guesses at any speed."""
_KEY_FILE_LEAST = 32

_KEYRING = re.compile(r"keyring/[0-9]{8}")
_NO_LINK = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True, repr=False)
class KeyFile(Secret):
    """The bytes of a key file, at least 32 of them and random; a passphrase is given as plain bytes."""

    content: bytes


Credential = bytes | KeyFile


@dataclass(frozen=True, slots=True)
class NewSlot(Secret):
    """A slot to be added. `parameters` None: the default for its kind."""

    credential: Credential
    label: str = ""
    parameters: Argon2Parameters | None = None

    def __repr__(self) -> str:
        return f"NewSlot(label={self.label!r})"


@dataclass(frozen=True, slots=True)
class NewRepositoryKeys:
    """First slot and keyring of a repository, and what they hold."""

    files: dict[str, bytes]
    keys: Keys


@dataclass(frozen=True, slots=True)
class KeyChange:
    """Files to put, in this order and durably; then those to delete; then `keys` are the ones to use.

    If the keyring, which comes last in `put`, exists already, somebody else changed keys: start again.
    """

    put: dict[str, bytes]
    delete: tuple[str, ...]
    keys: Keys


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A slot for lists and checks: `header` is None where its file cannot be read, and `problem` says why."""

    slot_id: bytes
    header: SlotHeader | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who may open a keyring, as the one before knows it."""

    slot_id: bytes
    public_key: bytes
    file_hash: bytes


def new_keyring(
    credential: Credential, parameters: Argon2Parameters | None = None, *, label: str = "", created: int | None = None
) -> NewRepositoryKeys:
    """All keys of a new repository, and the files to store before anything else. `created`: seconds since 1970, now.

    Raises UsageError for a credential, label or parameters that will not do.
    """
    repository_id = secrets.token_bytes(16)
    signing = Ed25519PrivateKey.generate()
    body = KeyringBody(
        id_key=secrets.token_bytes(32),
        index_mac_key=secrets.token_bytes(32),
        signing_private=signing.private_bytes_raw(),
        data_keys={1: secrets.token_bytes(32)},
    )
    trusted = signing.public_key().public_bytes_raw()
    files, holder = _new_slot(NewSlot(credential, label, parameters), repository_id, trusted, created)
    header = KeyringHeader(1, repository_id, bytes(32), b"", 1, (SigningKey(1, trusted, _NO_LINK),), ())
    data, keys = _seal_keyring(header, body, [holder], holder.slot_id)
    return NewRepositoryKeys({**files, layout.keyring_name(1): data}, keys)


def unlock(files: Mapping[str, bytes], credential: Credential, derived: dict[bytes, bytes] | None = None) -> Keys:
    """Open the newest keyring with the slot that this passphrase or key file opens.

    `derived` holds what Argon2id made of this credential for slots, by their ids, each as secret as the credential:
    what is there is used, what is not is added. A slot that is damaged or missing keeps nobody else out; only when no
    other opens, it is what is reported. Raises WrongPassphraseError, IntegrityError or FormatVersionError naming the
    file, StorageError (Argon2id gets no memory).
    """
    header, name = newest(files)
    kind, secret = _kind_of(credential)
    derived = {} if derived is None else derived
    problems: list[IntegrityError | FormatVersionError] = []
    whole: list[tuple[KeyringSlot, SlotHeader, bytes]] = []
    for entry in header.slots:
        try:
            whole.append((entry, *_read_slot(files, entry)))
        except (IntegrityError, FormatVersionError) as error:
            problems.append(error)
    if _cost(slot for _, slot, _ in whole) > layout.MAX_KEYRING_COST:
        raise IntegrityError(name, f"trying its {len(whole)} key slots would take longer than any writer lets it take")
    for entry, slot, sealed in whole:
        if slot.kind != kind:
            continue
        if entry.slot_id not in derived:
            derived[entry.slot_id] = _derive(slot, secret)
        opened = _open_slot(slot, sealed, files[layout.slot_name(entry.slot_id)], derived[entry.slot_id])
        if opened is not None:
            private, trusted = opened
            require_trusted(header, trusted, name)
            return _open_keyring(header, entry, files[name], private)
    if problems:
        raise problems[0]
    what = "passphrase" if kind == SlotKind.PASSPHRASE else "key file"
    raise WrongPassphraseError(f"wrong {what}: it opens none of the repository's {len(header.slots)} key slots")


def change(
    files: Mapping[str, bytes],
    keys: Keys,
    *,
    add: NewSlot | None = None,
    remove: Collection[bytes] = (),
    new_epoch: bool = False,
    new_signing_key: bool = False,
    created: int | None = None,
) -> KeyChange:
    """The next keyring: with a slot more, without some (slot ids), with a new epoch, all in one step.

    Nobody else's passphrase is needed: the master, which is new in every keyring, is sealed to public keys. A new
    signing key begins a new epoch and is signed by the old. Whoever once held a removed slot may have kept the keys
    of the epochs up to now; a new epoch keeps what is written from then on from him, a new signing key keeps him from
    signing it. Slots keep trusting the signing key that they were made under: make them anew if that one is stolen.

    Raises ConflictError (no usable slot would be left, too many, or keys changed meanwhile), NotFoundError, UsageError,
    IntegrityError.
    """
    header, name = newest(files)
    if (header.number, blake3(files[name]).digest()) != (keys.header.number, keys.keyring_hash):
        raise ConflictError(f"{name}: keys were changed meanwhile: open the repository again")
    unknown = set(remove) - {each.slot_id for each in header.slots}
    if unknown:
        raise NotFoundError(f"no key slot {unknown.pop().hex()} in this repository")
    body, signing_keys, epoch = keys.secrets(), header.signing_keys, header.epoch
    if new_epoch or new_signing_key:
        epoch += 1
        body = replace(body, data_keys={**body.data_keys, epoch: secrets.token_bytes(32)})
    if new_signing_key:
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        link = keys.sign(layout.encode_link(header.repository_id, epoch, keys.public_key, public))
        signing_keys = (*signing_keys, SigningKey(epoch, public, link))
        body = replace(body, signing_private=private.private_bytes_raw())
    kept = [each for each in header.slots if each.slot_id not in set(remove)]
    put: dict[str, bytes] = {}
    holders = [_Holder(each.slot_id, each.public_key, each.file_hash) for each in kept]
    if add is not None:
        put, holder = _new_slot(add, header.repository_id, signing_keys[-1].public_key, created)
        holders.append(holder)
        _require_room(files, put, holders, layout.keyring_name(header.number + 1))
    elif not {each.slot_id for each in kept} & {each.slot_id for each in list_slots(files) if each.problem is None}:
        raise ConflictError(f"{name}: no usable key slot would be left: add another one first")
    bare = replace(
        header,
        number=header.number + 1,
        previous=keys.keyring_hash,
        epoch=epoch,
        signing_keys=signing_keys,
        slots=(),
    )
    own = keys.slot_id if keys.slot_id not in remove else holders[-1].slot_id
    data, changed = _seal_keyring(bare, body, holders, own)
    put[layout.keyring_name(bare.number)] = data
    return KeyChange(put, tuple(layout.slot_name(each) for each in remove), changed)


def list_slots(files: Mapping[str, bytes]) -> tuple[SlotInfo, ...]:
    """Slots of the newest keyring; needs no secret, and trusts what stands there. Raises IntegrityError."""
    header, _ = newest(files)
    found = []
    for entry in header.slots:
        try:
            found.append(SlotInfo(entry.slot_id, _read_slot(files, entry)[0], None))
        except (IntegrityError, FormatVersionError) as error:
            found.append(SlotInfo(entry.slot_id, None, str(error)))
    return tuple(found)


def newest(files: Mapping[str, bytes]) -> tuple[KeyringHeader, str]:
    """The keyring that counts, and its name: it is whole, and signed by the last key of its own chain.

    That alone says nothing of whose it is. Needs no secret. Raises IntegrityError, FormatVersionError.
    """
    names = [each for each in files if _KEYRING.fullmatch(each)]
    if not names:
        raise IntegrityError("keyring", "is missing from the repository")
    name = max(names)
    return read_keyring(files[name], name), name


def read_keyring(data: bytes, name: str) -> KeyringHeader:
    """Like `newest`, for any keyring."""
    header, _, signature = layout.decode_keyring(data, name)
    chain = header.signing_keys
    Keys.verify(chain[-1].public_key, memoryview(data)[:-SIGNATURE_BYTES], signature, name)
    for old, new in pairwise(chain):
        link = layout.encode_link(header.repository_id, new.first_epoch, old.public_key, new.public_key)
        Keys.verify(old.public_key, link, new.link, name)
    return header


def require_trusted(header: KeyringHeader, trusted: bytes, name: str) -> None:
    """Raises IntegrityError unless the keyring's chain of signing keys, verified before, contains the trusted one."""
    if trusted not in [each.public_key for each in header.signing_keys]:
        raise IntegrityError(
            name, "is not signed by a key that is trusted: it was put in place of the repository's own"
        )


def require_successor(before: bytes, after: KeyringHeader) -> KeyringHeader:
    """The keyring before another, proven to be it; `before` is its file.

    Its signing keys must all stand in the later one: who has stolen an old signing key can sign a keyring that names
    the newest, but cannot go on from the signing keys that came after the one that he has. Raises IntegrityError.
    """
    name = layout.keyring_name(after.number - 1)
    if blake3(before).digest() != after.previous:
        raise IntegrityError(name, "is not the keyring that the next one follows: history was changed")
    header = read_keyring(before, name)
    if after.signing_keys[: len(header.signing_keys)] != header.signing_keys or after.epoch < header.epoch:
        raise IntegrityError(
            layout.keyring_name(after.number), f"drops signing keys or epochs of {name}: somebody else wrote it"
        )
    return header


def require_descent(files: Mapping[str, bytes], number: int, keyring_hash: bytes) -> None:
    """That the newest keyring follows, one by one, the one that was seen earlier. Raises IntegrityError."""
    header, name = newest(files)
    while header.number > number:
        name = layout.keyring_name(header.number - 1)
        if name not in files:
            raise IntegrityError(name, "is missing: newer keyrings cannot be proven to follow the one seen before")
        header = require_successor(files[name], header)
    if (header.number, blake3(files[name]).digest()) != (number, keyring_hash):
        raise IntegrityError(
            name, f"is older than keyring {number} or another one, which this host has seen: keys were put back"
        )


def _new_slot(
    new: NewSlot, repository_id: bytes, trusted: bytes, created: int | None
) -> tuple[dict[str, bytes], _Holder]:
    kind, secret = _kind_of(new.credential)
    if kind == SlotKind.KEY_FILE and len(secret) < _KEY_FILE_LEAST:
        raise UsageError(f"a key file needs at least {_KEY_FILE_LEAST} random bytes, this one has {len(secret)}")
    if not secret:
        raise UsageError("the passphrase is empty")
    default = PASSPHRASE_PARAMETERS if kind == SlotKind.PASSPHRASE else KEY_FILE_PARAMETERS
    private = X25519PrivateKey.generate()
    slot = SlotHeader(
        kind,
        new.parameters or default,
        secrets.token_bytes(layout.SLOT_ID_BYTES),
        repository_id,
        secrets.token_bytes(32),
        int(time.time()) if created is None else created,
        private.public_key().public_bytes_raw(),
        new.label,
    )
    clear = layout.encode_slot_header(slot)
    sealer = _slot_sealer(slot, clear, _derive(slot, secret))
    data = layout.finish_slot(clear, sealer.seal(0, private.private_bytes_raw() + trusted))
    name = layout.slot_name(slot.slot_id)
    layout.decode_slot(data, name)
    return {name: data}, _Holder(slot.slot_id, slot.public_key, blake3(data).digest())


def _kind_of(credential: Credential) -> tuple[SlotKind, bytes]:
    if isinstance(credential, KeyFile):
        return SlotKind.KEY_FILE, credential.content
    return SlotKind.PASSPHRASE, credential


def _derive(slot: SlotHeader, secret: bytes) -> bytes:
    """The key (32) of a slot, by Argon2id. Raises StorageError where there is not the memory for it."""
    cost = slot.parameters
    argon = Argon2id(salt=slot.salt, length=32, iterations=cost.time, lanes=cost.lanes, memory_cost=cost.memory_kib)
    try:
        return argon.derive(secret)
    except MemoryError as error:
        need = f"opening this key slot takes {cost.memory_kib >> 10} MiB of memory: not to be had"
        raise StorageError(layout.slot_name(slot.slot_id), need) from error


def _slot_sealer(slot: SlotHeader, clear: bytes, key: bytes) -> Sealer:
    """The sealer of a slot's private part. The nonce argument of `Sealer` holds: `key` is of `_derive`."""
    name = layout.slot_name(slot.slot_id)
    return Sealer(key, layout.SEALED_SLOT, slot.repository_id, blake3(clear).digest(), 0, slot.salt, name)


def _open_slot(slot: SlotHeader, sealed: bytes, data: bytes, key: bytes) -> tuple[X25519PrivateKey, bytes] | None:
    """(private key, public signing key that the slot trusts), None if the key is of another secret."""
    sealer = _slot_sealer(slot, data[: layout.SLOT_CLEAR.size], key)
    try:
        plain = sealer.open(0, sealed)
    except IntegrityError:  # the file is whole, its hash is right: it is the secret that is wrong
        return None
    private = X25519PrivateKey.from_private_bytes(plain[:32])
    # AES-GCM alone lets an attacker make a slot that opens with several passphrases that he guesses, and learn from
    # what happens next whether one was right; the public key, which the slot's seal binds, leaves room for one.
    return (private, plain[32:]) if private.public_key().public_bytes_raw() == slot.public_key else None


def _read_slot(files: Mapping[str, bytes], entry: KeyringSlot) -> tuple[SlotHeader, bytes]:
    """A slot's header and sealed part, if its file is the one that the keyring means."""
    name = layout.slot_name(entry.slot_id)
    if name not in files:
        raise IntegrityError(name, "the key slot is missing from the repository")
    slot, sealed = layout.decode_slot(files[name], name)
    if blake3(files[name]).digest() != entry.file_hash:
        raise IntegrityError(name, "is not the key slot that the keyring means: it was replaced")
    return slot, sealed


def _cost(slots: Iterable[SlotHeader]) -> int:
    return sum(each.parameters.cost for each in slots)


def _require_room(files: Mapping[str, bytes], put: Mapping[str, bytes], holders: list[_Holder], name: str) -> None:
    """That the next keyring is not one that `unlock` refuses. Raises ConflictError."""
    names = [layout.slot_name(each.slot_id) for each in holders]
    whole = [each.header for each in list_slots(files) if each.header and layout.slot_name(each.slot_id) in names]
    whole += [layout.decode_slot(data, each)[0] for each, data in put.items()]
    if len(holders) > layout.MAX_SLOTS or _cost(whole) > layout.MAX_KEYRING_COST:
        raise ConflictError(
            f"{name}: {len(holders) - 1} key slots are all that a keyring holds at their cost: remove one first"
        )


def _seal_keyring(bare: KeyringHeader, body: KeyringBody, holders: list[_Holder], slot_id: bytes) -> tuple[bytes, Keys]:
    """A keyring file and its keys. The master is made, sealed to every holder, used once, and forgotten."""
    master = secrets.token_bytes(32)
    header = replace(bare, salt=secrets.token_bytes(32))
    slots = []
    for holder in holders:
        ephemeral = X25519PrivateKey.generate()
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(holder.public_key))
        public = ephemeral.public_key().public_bytes_raw()
        sealed = _master_sealer(header, holder.slot_id, holder.public_key, public, shared).seal(header.number, master)
        slots.append(KeyringSlot(holder.slot_id, holder.public_key, holder.file_hash, public, sealed))
    header = replace(header, slots=tuple(slots))
    plain = layout.encode_keyring_body(body)
    clear = layout.encode_keyring_clear(header, len(plain) + layout.SEAL_OVERHEAD)
    unsigned = clear + _body_sealer(header, clear, master).seal(header.number, plain)
    data = unsigned + Ed25519PrivateKey.from_private_bytes(body.signing_private).sign(unsigned)
    read_keyring(data, layout.keyring_name(header.number))
    return data, Keys(header, body, blake3(data).digest(), slot_id)


def _open_keyring(header: KeyringHeader, entry: KeyringSlot, data: bytes, private: X25519PrivateKey) -> Keys:
    name = layout.keyring_name(header.number)
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(entry.ephemeral))
    except ValueError as error:  # the shared secret is zero: a point that no key generation gives
        raise IntegrityError(name, f"has a bad ephemeral key for slot {entry.slot_id.hex()}") from error
    sealer = _master_sealer(header, entry.slot_id, entry.public_key, entry.ephemeral, shared)
    master = sealer.open(header.number, entry.sealed_master)
    _, sealed, _ = layout.decode_keyring(data, name)
    clear = data[: -SIGNATURE_BYTES - len(sealed)]
    body = layout.decode_keyring_body(_body_sealer(header, clear, master).open(header.number, sealed), name)
    signing = Ed25519PrivateKey.from_private_bytes(body.signing_private).public_key().public_bytes_raw()
    if header.epoch != max(body.data_keys) or signing != header.signing_keys[-1].public_key:
        raise IntegrityError(name, "its clear part and its sealed body contradict each other")
    return Keys(header, body, blake3(data).digest(), entry.slot_id)


def _master_sealer(header: KeyringHeader, slot_id: bytes, public: bytes, ephemeral: bytes, shared: bytes) -> Sealer:
    """Binds slot, both public keys, repository, keyring number and salt. Source: RFC 7748 section 6, RFC 5869."""
    info = layout.MASTER_CONTEXT + ephemeral + public + slot_id
    secret = HKDF(hashes.SHA256(), 32, None, info).derive(shared)
    name = layout.keyring_name(header.number)
    return Sealer(secret, layout.SEALED_MASTER, header.repository_id, slot_id, 0, header.salt, name)


def _body_sealer(header: KeyringHeader, clear: bytes, master: bytes) -> Sealer:
    name = layout.keyring_name(header.number)
    return Sealer(master, layout.SEALED_KEYRING, header.repository_id, blake3(clear).digest(), 0, header.salt, name)
