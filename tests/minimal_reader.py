"""A reader of Perdure repositories, written from docs/FORMAT.md alone: the reference for who writes another.

It shares no code with Perdure and needs only `cryptography`, `blake3` and `zstandard`. It reads in the order in which
trust is built: config, key slot (opened by the passphrase), keyring (public part, then keys), records, footers of
packs, page maps, chunks. Whatever does not hold raises `Refused`; nothing is ever written to the repository. There is
no index, no lease and no thread: every pack's footer is read at the start, so a large repository takes its time.

Without any secret, `verify_history` checks the chain of records from one trusted public key.
"""

import getpass
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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
DATA, NODES, BODY, SLOT, MASTER, KEYRING = 1, 2, 16, 32, 33, 34  # kinds of sealed parts
GENESIS, GENERATION, TOMBSTONE = 1, 2, 3  # kinds of records
FOOTER_NUMBER = 0xFFFFFFFF
NODE_BYTES, FAN_OUT, HEIGHT_MAX = 1024, 32, 13
ZERO = bytes(32)


class Refused(Exception):
    """Damaged, forged, of an unknown version, or not to be opened with this passphrase."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Refused(what)


def fields(layout: str, data: bytes, at: int = 0) -> tuple[Any, ...]:
    """Little-endian fields at an offset; data too short is refused."""
    try:
        return struct.unpack_from("<" + layout, data, at)
    except struct.error as error:
        raise Refused(f"cut short: {error}") from error


def header(layout: str, data: bytes, magic: bytes, what: object) -> tuple[Any, ...]:
    """Fields after magic and version. The version is looked at before anything else is."""
    found, version = fields("8sH", data)
    require(found == magic, f"{what}: the magic is not {magic.decode()}")
    require(version == VERSION, f"{what}: format version {version}; this reader knows {VERSION}")
    return fields(layout, data, 10)


def verify(key: bytes, signature: bytes, signed: bytes, what: object) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except InvalidSignature as error:
        raise Refused(f"{what}: the signature does not hold") from error


@dataclass(frozen=True)
class Seal:
    """What a sealed part is bound to, besides its number."""

    secret: bytes
    kind: int
    repository: bytes
    object_id: bytes
    salt: bytes
    epoch: int = 0

    def open(self, sealed: bytes, number: int, what: object) -> bytes:
        """The plaintext. The nonce is derived from it, so that is checked too."""
        bound = struct.pack("<HHI", VERSION, self.kind, self.epoch) + self.repository + self.salt + self.object_id
        keys = blake3(self.secret + bound, derive_key_context="Perdure 1 sealed part").digest(64)
        associated = struct.pack("<HH", VERSION, self.kind) + self.repository + self.object_id
        nonce = sealed[:12]
        try:
            plain = AESGCM(keys[:32]).decrypt(nonce, sealed[12:], associated + struct.pack("<Q", number))
        except (InvalidTag, ValueError) as error:
            raise Refused(f"{what}: the seal is broken") from error
        derived = blake3(plain + struct.pack("<HQ", self.kind, number), key=keys[32:]).digest(12)
        require(nonce == derived, f"{what}: the nonce is not the plaintext's")
        return plain


def names(folder: Path) -> list[str]:
    """Complete files, in order of their names."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def repository_id(folder: Path) -> bytes:
    data = (folder / "config").read_bytes()
    zero, found = header("6s16s", data, b"PERDREPO", "config")
    require(len(data) == 32 and zero == bytes(6), "config: not 32 bytes, or not zero where it should be")
    return bytes(found)


@dataclass(frozen=True)
class Keyring:
    """The newest keyring, verified as far as its public part goes."""

    data: bytes
    number: int
    repository: bytes
    salt: bytes
    epoch: int
    signers: list[tuple[int, bytes]]  # first epoch, public key; oldest first
    slots: dict[bytes, tuple[bytes, bytes, bytes, bytes]]  # id -> public key, file's hash, ephemeral key, sealed
    body_at: int

    def signer(self, epoch: int) -> bytes:
        """The key that signs records of an epoch."""
        fitting = [key for first, key in self.signers if first <= epoch]
        require(fitting, f"no signing key for epoch {epoch}")
        return fitting[-1]


def read_keyring(folder: Path) -> Keyring:
    """The highest keyring: signature, links of signing keys, chain of earlier keyrings. Needs no secret."""
    repository, hash_before = repository_id(folder), ZERO
    for count, name in enumerate(names(folder / "keyring"), 1):
        data = (folder / "keyring" / name).read_bytes()
        layout = "HHHQ16s32s32sII"
        s, k, zero, number, of, previous, salt, epoch, n = header(layout, data, b"PERDKEYS", name)
        require(name == f"{number:08}" and number == count, f"keyring {name}: is number {number}")
        require(of == repository and zero == 0, f"keyring {name}: not of this repository")
        require(previous == hash_before, f"keyring {name}: does not follow the one before")
        body_at = 112 + 100 * k + 164 * s
        require(len(data) == body_at + n + 64, f"keyring {name}: its length is wrong")
        signers: list[tuple[int, bytes]] = []
        for at in range(112, 112 + 100 * k, 100):
            first, key, signature = fields("I32s64s", data, at)
            if signers:
                link = b"PERDSIGN" + struct.pack("<H", VERSION) + repository + struct.pack("<I", first)
                verify(signers[-1][1], signature, link + signers[-1][1] + key, f"keyring {name}: link")
            else:
                require(signature == bytes(64), f"keyring {name}: the first signing key has a link")
            signers.append((first, key))
        require(signers and signers == sorted(signers), f"keyring {name}: signing keys out of order")
        verify(signers[-1][1], data[-64:], data[:-64], f"keyring {name}")
        entries = [fields("8s32s32s32s60s", data, 112 + 100 * k + 164 * i) for i in range(s)]
        slots = {entry[0]: entry[1:] for entry in entries}
        keyring = Keyring(data, number, repository, salt, epoch, signers, slots, body_at)  # type: ignore[arg-type]
        hash_before = blake3(data).digest()
    require(hash_before != ZERO, "no keyring")
    return keyring


@dataclass(frozen=True)
class Keys:
    """What the keyring's body holds, as far as a reader needs it."""

    id_key: bytes
    data: dict[int, bytes]  # by epoch


def unlock(folder: Path, keyring: Keyring, passphrase: bytes) -> Keys:
    """Try every slot of the keyring with the passphrase (or with a key file's bytes)."""
    for name in names(folder / "keys"):
        data = (folder / "keys" / name).read_bytes()
        layout = "BBIII8s16s32sQ32s64s92s32s"
        kind, zero, memory, passes, lanes, slot, of, salt, _, public, _, sealed, digest = header(
            layout, data, b"PERDSLOT", f"slot {name}"
        )
        require(len(data) == 308 and blake3(data[:-32]).digest() == digest, f"slot {name}: damaged")
        require(kind in (1, 2) and zero == 0 and of == keyring.repository, f"slot {name}: not of this repository")
        require(slot.hex() == name, f"slot {name}: is slot {slot.hex()}")
        require(memory <= 4194304 and passes <= 64 and lanes <= 64, f"slot {name}: asks for too much")
        if slot not in keyring.slots:
            continue
        secret = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(passphrase)
        try:
            seal = Seal(secret, SLOT, keyring.repository, blake3(data[:184]).digest(), salt)
            private, trusted = fields("32s32s", seal.open(sealed, 0, f"slot {name}"))
        except Refused:
            continue
        listed, file_hash, ephemeral, sealed_master = keyring.slots[slot]
        require(listed == public and file_hash == blake3(data).digest(), f"slot {name}: not as the keyring knows it")
        require(trusted in [key for _, key in keyring.signers], f"slot {name}: does not trust the keyring")
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(ephemeral))
        info = b"Perdure 1 master for a slot" + ephemeral + public + slot
        secret = HKDF(SHA256(), 32, None, info).derive(shared)
        seal = Seal(secret, MASTER, keyring.repository, slot, keyring.salt)
        return open_body(keyring, seal.open(sealed_master, keyring.number, f"slot {name} in the keyring"))
    raise Refused("no slot opens with this passphrase")


def open_body(keyring: Keyring, master: bytes) -> Keys:
    before, sealed = keyring.data[: keyring.body_at], keyring.data[keyring.body_at : -64]
    seal = Seal(master, KEYRING, keyring.repository, blake3(before).digest(), keyring.salt)
    plain = seal.open(sealed, keyring.number, "keyring")
    id_key, _, private, count = fields("32s32s32sI", plain)
    require(len(plain) == 100 + 36 * count, "keyring: its body's length is wrong")
    signing = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    require(signing == keyring.signers[-1][1], "keyring: signed with another key than it holds")
    data = dict(fields("I32s", plain, 100 + 36 * i) for i in range(count))
    require(count and list(data)[-1] == keyring.epoch and list(data) == sorted(data), "keyring: epochs out of order")
    return Keys(id_key, data)


@dataclass(frozen=True)
class Record:
    """A record whose place in the chain and whose signature hold; its body is still sealed."""

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
    """All records from the first: sequence, link and signature of each. Needs no secret."""
    records: list[Record] = []
    for sequence, name in enumerate(names(folder / "records"), 1):
        data = (folder / "records" / name).read_bytes()
        layout = "BBIQ32s16sQ32s32sI"
        kind, zero, epoch, found, link, vm, number, parent, salt, n = header(layout, data, b"PERDRECD", name)
        require(name == f"{sequence:012}" and found == sequence, f"record {name}: {sequence} expected, {found} found")
        require(link == (records[-1].id if records else ZERO), f"record {name}: does not follow the one before")
        require(len(data) == 148 + n + 64 and zero == 0, f"record {name}: its length is wrong")
        require((kind == GENESIS) == (sequence == 1) and kind <= TOMBSTONE, f"record {name}: kind {kind}")
        verify(keyring.signer(epoch), data[-64:], data[:-64], f"record {name}")
        digest = blake3(data).digest()
        records.append(Record(digest, kind, epoch, sequence, vm, number, parent, salt, data[148:-64]))
    require(records, "no record")
    return records


def verify_history(folder: Path, trusted: bytes) -> list[Record]:
    """The chain of records, checked with a trusted Ed25519 public key (32 bytes) and no secret."""
    keyring = read_keyring(folder)
    require(trusted in [key for _, key in keyring.signers], "the trusted key is not among the signing keys")
    return read_records(folder, keyring)


@dataclass(frozen=True)
class Generation:
    """One remembered state of a VM; `body` is the record's JSON."""

    vm: str
    number: int
    id: bytes
    body: dict[str, Any]

    def region(self, name: str) -> dict[str, Any]:
        found = [region for region in self.body["regions"] if region["name"] == name]
        require(found, f"{self.vm}@{self.number} has no region {name}")
        return dict(found[0])


class Pack:
    """Where the chunks of one pack are, from its footer, and its frames, opened and verified."""

    def __init__(self, path: Path, repository: bytes, keys: Keys) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(64)
            self.kind, zero, epoch, pack_id, salt = header("BBI16s32s", head, b"PERDPACK", path)
            end = file.seek(-16, 2)
            m, f, magic = fields("II8s", file.read(16))
            require(magic == b"PERDEND" + b"" or magic == b"PERDPEND", f"{path}: not complete")
            require(64 + m <= end, f"{path}: cut short")
            file.seek(end - m)
            sealed = file.read(m)
        require(path.name == pack_id.hex() and self.kind in (DATA, NODES) and zero == 0, f"{path}: another pack")
        require(epoch in keys.data, f"{path}: of an unknown epoch")
        self.seal = Seal(keys.data[epoch], self.kind, repository, pack_id, salt, epoch)
        footer = self.seal.open(sealed, FOOTER_NUMBER, f"{path}: footer")
        frames, chunks = fields("II", footer)
        require(frames == f and len(footer) == 8 + 6 * f + 32 * chunks, f"{path}: footer and trailer differ")
        self.offsets = (*fields(f"{f}I", footer, 8), end - m)
        counts = fields(f"{f}H", footer, 8 + 4 * f)
        require(sum(counts) == chunks, f"{path}: the footer's counts differ")
        ids = iter(fields("32s" * chunks, footer, 8 + 6 * f))
        self.ids = [[next(ids) for _ in range(count)] for count in counts]

    @lru_cache(maxsize=64)  # noqa: B019  a pack lives as long as its reader
    def frame(self, number: int) -> list[bytes]:
        """The chunks of a frame."""
        what, start, end = f"{self.path}: frame {number}", self.offsets[number], self.offsets[number + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            stored = file.read(end - start)
        require(fields("I", stored)[0] == len(stored) - 4, f"{what}: its length is wrong")
        plain = self.seal.open(stored[4:], number, what)
        codec, zero, count, size = fields("BBHI", plain)
        ids, payload = list(fields("32s" * count, plain, 8)), plain[8 + 32 * count :]
        require(ids == self.ids[number] and zero == 0 and codec in (0, 1), f"{what}: not as the footer says")
        if codec == 1:
            try:
                payload = ZstdDecompressor().decompress(payload, max_output_size=count * size)
            except ZstdError as error:
                raise Refused(f"{what}: {error}") from error
        require(len(payload) == count * size, f"{what}: {len(payload)} bytes for {count} chunks")
        return [payload[at : at + size] for at in range(0, len(payload), size)]


class Reader:
    """A repository, opened with a passphrase: `generations` that are not forgotten, and their regions' bytes."""

    def __init__(self, folder: Path, passphrase: bytes) -> None:
        keyring = read_keyring(folder)
        self.repository, self.keys = keyring.repository, unlock(folder, keyring, passphrase)
        self.records = read_records(folder, keyring)
        generations: dict[tuple[bytes, int], Generation] = {}
        packs: list[str] = []
        for record in self.records:
            body = self.body(record)
            if record.kind == GENERATION:
                generations[record.vm, record.number] = Generation(body["vm"], record.number, record.id, body)
                packs += body["packs"]
            elif record.kind == TOMBSTONE:
                require((record.vm, record.number) in generations, f"record {record.sequence}: forgets what is not")
                del generations[record.vm, record.number]
        self.generations = list(generations.values())
        self.places: dict[tuple[int, bytes], tuple[Pack, int, int]] = {}  # (kind, id) -> pack, frame, slot
        for name in packs:
            pack = Pack(folder / "packs" / name, self.repository, self.keys)
            for number, ids in enumerate(pack.ids):
                self.places.update({(pack.kind, id_): (pack, number, slot) for slot, id_ in enumerate(ids)})

    def body(self, record: Record) -> dict[str, Any]:
        what = f"record {record.sequence}"
        require(record.epoch in self.keys.data, f"{what}: of an unknown epoch")
        seal = Seal(self.keys.data[record.epoch], BODY, self.repository, record.vm, record.salt, record.epoch)
        return dict(json.loads(seal.open(record.sealed, record.sequence, what)))

    def fetch(self, id_: bytes, level: int, size: int) -> bytes:
        """A chunk (level 0) or a node, verified against its id."""
        kind = NODES if level else DATA
        require((kind, id_) in self.places, f"{id_.hex()} is in no pack")
        pack, frame, slot = self.places[kind, id_]
        content = pack.frame(frame)[slot]
        context = f"Perdure 1 page map node id, level {level}" if level else "Perdure 1 chunk id"
        key = blake3(self.keys.id_key, derive_key_context=context).digest()
        require(blake3(content, key=key).digest() == id_ and len(content) == size, f"{id_.hex()}: other content")
        return content

    def chunks(self, id_: bytes, height: int, size: int, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of every chunk that is not zero, ascending."""
        if id_ == ZERO:
            return
        if height == 0:
            yield first, self.fetch(id_, 0, size)
            return
        node = self.fetch(id_, height, NODE_BYTES)
        for digit in range(FAN_OUT):
            child = node[32 * digit : 32 * digit + 32]
            yield from self.chunks(child, height - 1, size, first + digit * FAN_OUT ** (height - 1))

    def export(self, generation: Generation, name: str, file: BinaryIO) -> None:
        """A region into an empty file; what is zero stays a hole."""
        region = generation.region(name)
        length, size, height = region["length"], region["chunk_size"], region["height"]
        require(0 <= height <= HEIGHT_MAX, f"region {name}: height {height}")
        file.truncate(length)
        for number, chunk in self.chunks(bytes.fromhex(region["root"]), height, size):
            room = length - number * size
            require(room > 0 and not any(chunk[room:]), f"region {name}: chunk {number} lies beyond its end")
            file.seek(number * size)
            file.write(chunk[:room])


def main(folder: str, *wanted: str) -> None:
    """`minimal_reader.py REPOSITORY` lists; `minimal_reader.py REPOSITORY VM NUMBER REGION FILE` exports."""
    reader = Reader(Path(folder), getpass.getpass().encode())
    if not wanted:
        for generation in reader.generations:
            regions = ", ".join(f"{region['name']} ({region['length']} bytes)" for region in generation.body["regions"])
            print(f"{generation.vm}@{generation.number} {generation.id.hex()} {generation.body['time']} {regions}")
        return
    vm, number, region, target = wanted
    found = [each for each in reader.generations if (each.vm, each.number) == (vm, int(number))]
    require(found, f"no generation {vm}@{number}")
    with open(target, "xb") as file:
        reader.export(found[0], region, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
