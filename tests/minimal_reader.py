"""A reader of Perdure repositories, written from docs/FORMAT.md alone: the reference for whoever writes another.

It shares no code with Perdure and needs only `cryptography`, `blake3` and `zstandard`. It reads in the order in which
trust is built: config, keyring (what is clear), slot, keyring (what is sealed), records, footers of packs, page maps,
chunks. What does not hold raises `Refused`. `verify_history` checks the records with one public key and no secret.

For a repository that nobody prunes meanwhile: it takes no lease, and writes nothing. There is no index and no thread:
all footers are read at the start. Whoever remembers a newer record or keyring must compare; this reader does not.
"""

import getpass
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from zstandard import ZstdDecompressor, ZstdError

VERSION = 1
DATA, NODES, BODY, SLOT, MASTER, KEYRING = 1, 2, 16, 32, 33, 34  # kinds of sealed parts; the first two are packs'
GENESIS, GENERATION, TOMBSTONE, ATTRIBUTES, DOOM, SWAP, POLICY, HURT = range(1, 9)  # kinds of records
FOOTER_NUMBER = 0xFFFFFFFF
NODE_BYTES, FAN_OUT, HEIGHT_MAX = 1024, 32, 13
FRAME_MAX = 16 << 20
ZERO = bytes(32)


class Refused(Exception):  # noqa: N818  # said as it is meant
    """Damaged, forged, of an unknown version, or not to be opened with this passphrase."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Refused(what)


def fields(layout: str, data: bytes, at: int = 0) -> tuple[Any, ...]:
    """Little-endian fields at an offset."""
    try:
        return struct.unpack_from("<" + layout, data, at)
    except struct.error as error:
        raise Refused(f"cut short: {error}") from error


def header(layout: str, data: bytes, magic: bytes, what: object) -> tuple[Any, ...]:
    """Fields after magic and version, which are looked at before anything else is."""
    found, version = fields("8sH", data)
    require(found == magic, f"{what}: does not begin with {magic.decode()}")
    require(version == VERSION, f"{what}: of format version {version}, this reader knows {VERSION}")
    return fields(layout, data, 10)


def verify(key: bytes, signature: bytes, signed: bytes, what: object) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except (InvalidSignature, ValueError) as error:
        raise Refused(f"{what}: its signature is wrong") from error


@dataclass(frozen=True)
class Seal:
    """The sealed parts of one object, told apart by their numbers."""

    secret: bytes
    kind: int
    repository: bytes
    object_id: bytes
    salt: bytes
    epoch: int = 0

    def open(self, number: int, sealed: bytes) -> bytes:
        """The plaintext. The nonce follows from it, so that is checked too."""
        what = f"sealed part {number} of kind {self.kind}, object {self.object_id.hex()}"
        scope = struct.pack("<HHI", VERSION, self.kind, self.epoch) + self.repository + self.salt + self.object_id
        keys = blake3(self.secret + scope, derive_key_context="Perdure 1 sealed part").digest(64)
        associated = struct.pack("<HH", VERSION, self.kind) + self.repository + self.object_id
        try:
            plain = AESGCM(keys[:32]).decrypt(sealed[:12], sealed[12:], associated + struct.pack("<Q", number))
        except (InvalidTag, ValueError) as error:
            raise Refused(f"{what}: does not open") from error
        nonce = blake3(plain + struct.pack("<HQ", self.kind, number), key=keys[32:]).digest(12)
        require(sealed[:12] == nonce, f"{what}: has a nonce that is not its own")
        return plain


def names(folder: Path) -> list[str]:
    """Complete files, in order."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def repository_id(folder: Path) -> bytes:
    data = (folder / "config").read_bytes()
    zero, found = header("6s16s", data, b"PERDREPO", "config")
    require(len(data) == 32 and zero == bytes(6), "config: damaged")
    return bytes(found)


@dataclass(frozen=True)
class Keyring:
    """What is clear in a keyring, its signatures verified."""

    data: bytes
    repository: bytes
    number: int
    previous: bytes
    salt: bytes
    epoch: int
    body_at: int
    signers: list[tuple[int, bytes]]  # first epoch, Ed25519 public key
    slots: dict[bytes, tuple[Any, ...]]  # id -> X25519 public key, hash of the file, ephemeral key, sealed master

    def require_trusted(self, key: bytes) -> None:
        require(key in [each for _, each in self.signers], f"keyring {self.number}: does not follow from a trusted key")


def read_keyring(folder: Path) -> Keyring:
    """The one that counts. Those before it, as far as they are still there, must be those that it follows."""
    repository, files = repository_id(folder), names(folder / "keyring")
    require(files, "no keyring")
    newest = at = _keyring(folder / "keyring" / files[-1], repository)
    while (before := f"{at.number - 1:08}") in files:
        earlier = _keyring(folder / "keyring" / before, repository)
        require(blake3(earlier.data).digest() == at.previous, f"keyring {before}: not the one that the next follows")
        continued = at.signers[: len(earlier.signers)] == earlier.signers and at.epoch >= earlier.epoch
        require(continued, f"keyring {at.number}: does not go on from the keys of the one before")
        at = earlier
    return newest


def _keyring(path: Path, repository: bytes) -> Keyring:
    data, what = path.read_bytes(), f"keyring {path.name}"
    s, k, zero, number, of, previous, salt, epoch, n = header("HHHQ16s32s32sII", data, b"PERDKEYS", what)
    slots_at = 112 + 100 * k
    body_at = slots_at + 164 * s
    require(len(data) == body_at + n + 64 and k and s <= 64 and zero == 0, f"{what}: damaged")
    require(path.name == f"{number:08}" and of == repository, f"{what}: in the place of another")
    chain = [fields("I32s64s", data, at) for at in range(112, slots_at, 100)]
    for (_, old, _), (first, new, signature) in pairwise(chain):
        link = b"PERDSIGN" + struct.pack("<H", VERSION) + repository + struct.pack("<I", first) + old + new
        verify(old, signature, link, f"{what}: link")
    signers = [(first, key) for first, key, _ in chain]
    verify(signers[-1][1], data[-64:], data[:-64], what)
    slots = {entry[0]: entry[1:] for entry in struct.iter_unpack("<8s32s32s32s60s", data[slots_at:body_at])}
    return Keyring(data, repository, number, previous, salt, epoch, body_at, signers, slots)


@dataclass(frozen=True)
class Keys:
    """What a reader needs of a keyring's body: the id key, and data keys by epoch."""

    ids: bytes
    data: dict[int, bytes]


def unlock(folder: Path, keyring: Keyring, passphrase: bytes) -> Keys:
    """Through the slot that opens with the passphrase, or with a key file's bytes. A bad slot stops no other."""
    problem = Refused("no key slot opens with this passphrase")
    for slot, (public, file_hash, ephemeral, sealed_master) in keyring.slots.items():
        try:
            private, trusted = _open_slot(folder / "keys" / slot.hex(), file_hash, keyring.repository, passphrase)
        except (Refused, OSError) as error:
            problem = Refused(f"no key slot opens with this passphrase; slot {slot.hex()}: {error}")
            continue
        keyring.require_trusted(trusted)
        try:
            shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(ephemeral))
        except ValueError as error:
            raise Refused(f"keyring {keyring.number}: bad ephemeral key") from error
        secret = HKDF(SHA256(), 32, None, b"Perdure 1 master for a slot" + ephemeral + public + slot).derive(shared)
        seal = Seal(secret, MASTER, keyring.repository, slot, keyring.salt)
        return _open_body(keyring, seal.open(keyring.number, sealed_master))
    raise problem


def _open_slot(path: Path, file_hash: bytes, repository: bytes, passphrase: bytes) -> tuple[bytes, bytes]:
    """X25519 private key, and the Ed25519 public key that the slot trusts."""
    data = path.read_bytes()
    layout = "BBIII8s16s32sQ32s64s92s32s"
    values = header(layout, data, b"PERDSLOT", path.name)
    _, _, memory, passes, lanes, _, of, salt, _, public, _, sealed, digest = values
    require(len(data) == 308 and blake3(data[:276]).digest() == digest, "damaged")
    require(blake3(data).digest() == file_hash and of == repository, "not the slot that the keyring means")
    bounded = 1 <= lanes <= 64 and 1 <= passes <= 64 and 8 * lanes <= memory <= 2097152
    require(bounded and memory * passes <= 4194304, "asks for more memory or time than is allowed, or for none")
    secret = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(passphrase)
    plain = Seal(secret, SLOT, repository, blake3(data[:184]).digest(), salt).open(0, sealed)
    own = X25519PrivateKey.from_private_bytes(plain[:32]).public_key().public_bytes_raw()
    require(own == public, "made to open with several passphrases")  # AES-GCM alone allows that
    return plain[:32], plain[32:]


def _open_body(keyring: Keyring, master: bytes) -> Keys:
    clear, sealed = keyring.data[: keyring.body_at], keyring.data[keyring.body_at : -64]
    seal = Seal(master, KEYRING, keyring.repository, blake3(clear).digest(), keyring.salt)
    plain = seal.open(keyring.number, sealed)
    ids, _, private, count = fields("32s32s32sI", plain)
    require(count and len(plain) == 100 + 36 * count, "keyring: its body has another length")
    data = dict(struct.iter_unpack("<I32s", plain[100:]))
    signer = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    require(signer == keyring.signers[-1][1] and max(data) == keyring.epoch, "keyring: contradicts its body")
    return Keys(ids, data)


@dataclass(frozen=True)
class Record:
    """A record whose place in the chain and whose signature are verified; its body is still sealed."""

    id: bytes
    kind: int
    epoch: int
    sequence: int
    vm: bytes
    number: int
    parent: bytes
    salt: bytes
    sealed: bytes


def read_records(folder: Path, keyring: Keyring) -> list[Record]:
    """All from the first on: sequence, link, signature."""
    records: list[Record] = []
    known, highest = {ZERO}, dict[bytes, int]()  # ids of records; numbers of generations by VM
    for sequence, name in enumerate(names(folder / "records"), 1):
        data, what = (folder / "records" / name).read_bytes(), f"record {name}"
        values = header("BBIQ32s16sQ32s32sI", data, b"PERDRECD", what)
        kind, zero, epoch, found, previous, vm, number, parent, salt, n = values
        require(len(data) == 148 + n + 64 and zero == 0, f"{what}: damaged")
        require(name == f"{sequence:012}" and found == sequence, f"{what}: {sequence} is missing")
        require(previous == (records[-1].id if records else ZERO), f"{what}: does not follow the one before")
        require(GENESIS <= kind <= HURT and (kind == GENESIS) == (sequence == 1), f"{what}: of kind {kind}")
        newest = records[-1].epoch if records else keyring.signers[0][0]
        require(newest <= epoch <= keyring.epoch, f"{what}: of epoch {epoch}, which is past or unknown")
        signer = [key for first, key in keyring.signers if first <= epoch][-1]
        verify(signer, data[-64:], data[:-64], what)
        if kind == GENERATION:
            require(number > highest.get(vm, 0), f"{what}: uses generation number {number} again")
            require(parent in known, f"{what}: its parent does not come before it")
            highest[vm] = number
        records.append(Record(blake3(data).digest(), kind, epoch, sequence, vm, number, parent, salt, data[148:-64]))
        known.add(records[-1].id)
    require(records, "no record")
    return records


def verify_history(folder: Path, trusted: bytes) -> list[Record]:
    """The whole chain of records, proven by one trusted Ed25519 public key (32 bytes)."""
    keyring = read_keyring(folder)
    keyring.require_trusted(trusted)
    return read_records(folder, keyring)


@dataclass(frozen=True)
class Generation:
    """A remembered state of a VM; `body` is the record's JSON."""

    vm: str
    number: int
    id: bytes
    body: dict[str, Any]
    protected: bool = False
    hurt: tuple[str, ...] = ()  # regions that had lost something when that was last looked at


class Pack:
    """A pack: `ids` of the chunks of each frame, from its footer, and the chunks themselves."""

    def __init__(self, path: Path, repository: bytes, keys: Keys) -> None:
        self.path = path
        with path.open("rb") as file:
            self.kind, zero, epoch, pack_id, salt = header("BBI16s32s", file.read(64), b"PERDPACK", path)
            require(path.name == pack_id.hex() and self.kind in (DATA, NODES) and zero == 0, f"{path}: another pack")
            require(epoch in keys.data, f"{path}: of epoch {epoch}, for which there is no key")
            self.seal = Seal(keys.data[epoch], self.kind, repository, pack_id, salt, epoch)
            end = path.stat().st_size - 16
            file.seek(max(0, end))
            length, frames, magic = fields("II8s", file.read())
            require(magic == b"PERDPEND" and end - length >= 64, f"{path}: not complete")
            file.seek(end - length)
            footer = self.seal.open(FOOTER_NUMBER, file.read(length))
        f, c = fields("II", footer)
        require(f == frames and len(footer) == 8 + 6 * f + 32 * c, f"{path}: its footer makes no sense")
        self.offsets = (*fields(f"{f}I", footer, 8), end - length)
        ids = iter([footer[at : at + 32] for at in range(8 + 6 * f, len(footer), 32)])
        self.ids = [[next(ids) for _ in range(count)] for count in fields(f"{f}H", footer, 8 + 4 * f)]

    @lru_cache(maxsize=64)  # noqa: B019  # a pack lives as long as its reader
    def frame(self, number: int) -> list[bytes]:
        """The chunks of a frame."""
        what, start, end = f"{self.path}: frame {number}", self.offsets[number], self.offsets[number + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            stored = file.read(end - start)
        require(fields("I", stored)[0] == len(stored) - 4, f"{what}: has another length")
        plain = self.seal.open(number, stored[4:])
        codec, zero, count, size = fields("BBHI", plain)
        require(codec in (0, 1) and zero == 0 and 0 < count * size <= FRAME_MAX, f"{what}: makes no sense")
        ids, payload = [plain[8 + 32 * i : 40 + 32 * i] for i in range(count)], plain[8 + 32 * count :]
        require(ids == self.ids[number], f"{what}: holds other chunks than the footer says")
        try:
            payload = ZstdDecompressor().decompress(payload, max_output_size=count * size) if codec else payload
        except ZstdError as error:
            raise Refused(f"{what}: {error}") from error
        require(len(payload) == count * size, f"{what}: holds {len(payload)} bytes")
        return [payload[at : at + size] for at in range(0, len(payload), size)]


class Reader:
    """A repository opened with a passphrase: `generations` that are not forgotten, and their regions."""

    def __init__(self, folder: Path, passphrase: bytes) -> None:
        keyring = read_keyring(folder)
        self.repository, self.keys = keyring.repository, unlock(folder, keyring, passphrase)
        self.records = read_records(folder, keyring)
        found: dict[tuple[bytes, int], Generation] = {}
        packs: dict[str, None] = {}
        self.places: dict[bytes, tuple[Pack, int, int]] = {}  # id -> pack, frame, slot
        for record in self.records:
            body, which = self._body(record), (record.vm, record.number)
            if record.kind == GENERATION:
                found[which] = Generation(body["vm"], record.number, record.id, body)
                packs.update(dict.fromkeys(body["packs"]))
            elif record.kind == TOMBSTONE:
                found.pop(which, None)
            elif record.kind == ATTRIBUTES and which in found:
                found[which] = replace(found[which], protected=body["protected"])
            elif record.kind == SWAP:
                packs.update(dict.fromkeys(body["added"]))
                for name in body["removed"]:
                    packs.pop(name, None)
            elif record.kind == HURT:
                hurt = {(bytes.fromhex(each["vm_id"]), each["number"]): each["regions"] for each in body["generations"]}
                found = {which: replace(each, hurt=tuple(hurt.get(which, ()))) for which, each in found.items()}
        for name in packs:
            self._add_pack(folder / "packs" / name)
        self.generations = list(found.values())

    def _body(self, record: Record) -> dict[str, Any]:
        require(record.epoch in self.keys.data, f"record {record.sequence}: there is no key for epoch {record.epoch}")
        seal = Seal(self.keys.data[record.epoch], BODY, self.repository, record.vm, record.salt, record.epoch)
        return dict(json.loads(seal.open(record.sequence, record.sealed)))

    def _add_pack(self, path: Path) -> None:
        if path.exists():  # else it is missed only where something of it is wanted
            pack = Pack(path, self.repository, self.keys)
            for frame, ids in enumerate(pack.ids):
                self.places.update((id_, (pack, frame, slot)) for slot, id_ in enumerate(ids))

    def _fetch(self, id_: bytes, level: int, size: int) -> bytes:
        """A chunk (level 0) or node by its id, which it must have."""
        require(id_ in self.places, f"{id_.hex()} is in no pack")
        pack, frame, slot = self.places[id_]
        content = pack.frame(frame)[slot]
        context = f"Perdure 1 page map node id, level {level}" if level else "Perdure 1 chunk id"
        key = blake3(self.keys.ids, derive_key_context=context).digest()
        require(len(content) == size and blake3(content, key=key).digest() == id_, f"{id_.hex()} is something else")
        return content

    def _chunks(self, id_: bytes, level: int, size: int, place: int = 0) -> Iterator[tuple[int, bytes]]:
        """Numbers and bytes of the chunks below a node that are not zero. `place` is the node's own in its level."""
        if id_ == ZERO:
            return
        if level == 0:
            yield place, self._fetch(id_, 0, size)
            return
        node = self._fetch(id_, level, NODE_BYTES)
        for child in range(FAN_OUT):
            yield from self._chunks(node[32 * child : 32 * child + 32], level - 1, size, FAN_OUT * place + child)

    def export(self, generation: Generation, name: str, file: BinaryIO) -> None:
        """A region into an empty file, in which what is zero stays a hole."""
        region = next((each for each in generation.body["regions"] if each["name"] == name), None)
        if region is None:
            raise Refused(f"{generation.vm}@{generation.number} has no region {name}")
        length, size = region["length"], region["chunk_size"]
        require(0 <= region["height"] <= HEIGHT_MAX, f"region {name}: its page map is too high")
        file.truncate(length)
        for number, chunk in self._chunks(bytes.fromhex(region["root"]), region["height"], size):
            room = length - number * size
            require(room > 0 and not any(chunk[room:]), f"region {name}: chunk {number} goes beyond its end")
            file.seek(number * size)
            file.write(chunk[:room])


def main(folder: str, *wanted: str) -> None:
    """`minimal_reader.py REPOSITORY` lists generations; with `VM NUMBER REGION FILE` behind it exports one region."""
    reader = Reader(Path(folder), getpass.getpass("passphrase: ").encode())
    if not wanted:
        for each in reader.generations:
            regions = ", ".join(f"{region['name']} ({region['length']} bytes)" for region in each.body["regions"])
            print(f"{each.vm}@{each.number}  {each.body['time']}  {each.id.hex()}  {regions}")
        return
    vm, number, region, target = wanted
    found = [each for each in reader.generations if (each.vm, each.number) == (vm, int(number))]
    require(found, f"no generation {vm}@{number}")
    with open(target, "xb") as file:
        reader.export(found[0], region, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
