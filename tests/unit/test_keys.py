"""Keys and sealing: against vectors, against a second implementation from the tables alone, and against attackers."""

import copy
import json
import os
import pickle
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from base import errors
from base.errors import (
    ConflictError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    PerdureError,
    StorageError,
    UsageError,
    WrongPassphraseError,
)
from store.keyring import layout, slots
from store.keyring.keys import DataKeys, Keys, Sealer
from store.keyring.layout import Argon2Parameters, KeyringBody, SigningKey
from store.keyring.slots import (
    KeyFile,
    NewSlot,
    change,
    list_slots,
    new_keyring,
    newest,
    require_descent,
    require_successor,
    require_trusted,
    unlock,
)

CHEAP = Argon2Parameters(memory_kib=64, time=1, lanes=1)
KEY_PARAMETERS = slots.KEY_FILE_PARAMETERS
PASSPHRASE = b"correct horse battery staple"
KEY_FILE = KeyFile(bytes(range(64)))
VECTORS = json.loads((Path(__file__).parent / "keys_vectors.json").read_text())
REPOSITORY = VECTORS["repository"]
FILES = {name: bytes.fromhex(data) for name, data in REPOSITORY["files"].items()}
EXPECTED = REPOSITORY["expected"]
SLOTS = sorted(name for name in FILES if name.startswith("keys/"))
KEYRING = "keyring/00000002"


def made(credential=PASSPHRASE):
    new = new_keyring(credential, CHEAP)
    return dict(new.files), new.keys


def after(files, step):
    """The files once a change is carried out."""
    kept = {name: data for name, data in files.items() if name not in step.delete}
    assert not kept.keys() & step.put.keys()
    return {**kept, **step.put}


def sealer_of(vector, **other):
    given = {
        "secret": bytes.fromhex(vector["secret"]),
        "kind": vector["kind"],
        "repository_id": bytes.fromhex(vector["repository_id"]),
        "object_id": bytes.fromhex(vector["object_id"]),
        "epoch": vector["epoch"],
        "salt": bytes.fromhex(vector["salt"]),
        "name": "packs/vector",
    }
    return Sealer(**{**given, **other})


# A second implementation, written from the tables of store/keyring/layout.py and sharing nothing with store/.


def reference_parts(secret, kind, repository_id, object_id, epoch, salt, number):
    scope = struct.pack("<HHI", 1, kind, epoch) + repository_id + salt + object_id
    keys = blake3(secret + scope, derive_key_context="Perdure 1 sealed part").digest(64)
    associated = struct.pack("<HH", 1, kind) + repository_id + object_id + struct.pack("<Q", number)
    return AESGCM(keys[:32]), keys[32:], associated


def reference_open(secret, kind, repository_id, object_id, epoch, salt, number, sealed):
    cipher, nonce_key, associated = reference_parts(secret, kind, repository_id, object_id, epoch, salt, number)
    plain = cipher.decrypt(sealed[:12], sealed[12:], associated)
    assert sealed[:12] == blake3(plain + struct.pack("<HQ", kind, number), key=nonce_key).digest(12)
    return plain


def reference_unlock(files, name, secret):
    """(body, data keys by epoch) of the newest keyring, opened with the slot `name`."""
    slot = files[name]
    memory, passes, lanes = struct.unpack_from("<III", slot, 12)
    slot_id, repository_id, salt = slot[24:32], slot[32:48], slot[48:80]
    kek = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(secret)
    plain = reference_open(kek, 32, repository_id, blake3(slot[:184]).digest(), 0, salt, 0, slot[184:276])
    private, trusted = X25519PrivateKey.from_private_bytes(plain[:32]), plain[32:]
    assert slot[88:120] == private.public_key().public_bytes_raw()

    keyring = files[max(each for each in files if each.startswith("keyring/"))]
    count, keys = struct.unpack_from("<HH", keyring, 10)
    (number,) = struct.unpack_from("<Q", keyring, 16)
    assert keyring[24:40] == repository_id
    salt = keyring[72:104]
    chain = [keyring[112 + 100 * at :][:100] for at in range(keys)]
    assert trusted in [each[4:36] for each in chain]
    for old, new in pairwise(chain):
        link = b"PERDSIGN" + struct.pack("<H", 1) + repository_id + new[:4] + old[4:36] + new[4:36]
        Ed25519PublicKey.from_public_bytes(old[4:36]).verify(new[36:], link)
    Ed25519PublicKey.from_public_bytes(chain[-1][4:36]).verify(keyring[-64:], keyring[:-64])
    at = 112 + 100 * keys
    entry = next(each for each in (keyring[at + 164 * i :][:164] for i in range(count)) if each[:8] == slot_id)
    assert entry[40:72] == blake3(slot).digest()
    shared = private.exchange(X25519PublicKey.from_public_bytes(entry[72:104]))
    info = b"Perdure 1 master for a slot" + entry[72:104] + entry[8:40] + slot_id
    secret = HKDF(hashes.SHA256(), 32, None, info).derive(shared)
    master = reference_open(secret, 33, repository_id, slot_id, 0, salt, number, entry[104:])
    begin = at + 164 * count
    clear = blake3(keyring[:begin]).digest()
    body = reference_open(master, 34, repository_id, clear, 0, salt, number, keyring[begin:-64])
    (epochs,) = struct.unpack_from("<I", body, 96)
    return body, {struct.unpack_from("<I", body, 100 + 36 * i)[0]: body[104 + 36 * i :][:32] for i in range(epochs)}


def test_structs_have_the_sizes_of_their_tables():
    assert (layout.SLOT_CLEAR.size, layout.SLOT_BYTES) == (184, 308)
    assert (layout.KEYRING_HEADER.size, layout.KEYRING_SIGNING_KEY.size, layout.KEYRING_SLOT.size) == (112, 100, 164)
    assert (layout.BODY_HEADER.size, layout.BODY_EPOCH.size) == (100, 36)


@pytest.mark.parametrize("vector", VECTORS["sealed"])
def test_sealed_vectors(vector):
    plain, sealed = bytes.fromhex(vector["plaintext"]), bytes.fromhex(vector["sealed"])
    sealer = sealer_of(vector)
    assert sealer.seal(vector["number"], plain) == sealed
    for shape in (bytes, bytearray, memoryview):
        assert sealer.seal(vector["number"], shape(plain)) == sealed
        assert sealer.open(vector["number"], shape(sealed)) == plain


@pytest.mark.parametrize(
    "credential", [REPOSITORY["passphrase"].encode(), KeyFile(bytes.fromhex(REPOSITORY["key_file"]))]
)
def test_repository_vector(credential):
    keys = unlock(FILES, credential)
    assert keys.repository_id.hex() == EXPECTED["repository_id"]
    assert keys.index_mac_key.hex() == EXPECTED["index_mac_key"]
    assert (keys.current_epoch, keys.epochs) == (EXPECTED["current_epoch"], (1, 2))
    assert keys.id_key("chunk").hex() == keys.id_key("chunk", 0).hex() == EXPECTED["chunk_key"]
    assert {level: keys.id_key("node", int(level)).hex() for level in EXPECTED["node_keys"]} == EXPECTED["node_keys"]
    assert blake3(bytes(64), key=keys.id_key("chunk")).hexdigest() == EXPECTED["chunk_id_of_zeros_64"]
    assert [each.public_key.hex() for each in keys.signing_keys] == EXPECTED["signing_keys"]
    assert (keys.public_key_of(1), keys.public_key_of(2)) == tuple(map(bytes.fromhex, EXPECTED["signing_keys"]))
    assert keys.sign(b"perdure").hex() == EXPECTED["signature_of_perdure"]
    for epoch, data_key in EXPECTED["data_keys"].items():
        part = keys.sealer(1, b"p" * 16, int(epoch), b"s" * 32).seal(5, b"content")
        opened = reference_open(
            bytes.fromhex(data_key), 1, keys.repository_id, b"p" * 16, int(epoch), b"s" * 32, 5, part
        )
        assert opened == b"content"


def test_a_reader_written_from_the_tables_opens_the_repository_vector():
    found = []
    for name in SLOTS:
        kind = FILES[name][10]
        secret = REPOSITORY["passphrase"].encode() if kind == 1 else bytes.fromhex(REPOSITORY["key_file"])
        found.append(reference_unlock(FILES, name, secret))
    assert found[0] == found[1]
    body, data_keys = found[0]
    assert (body[:32].hex(), body[32:64].hex()) == (EXPECTED["id_key"], EXPECTED["index_mac_key"])
    assert {str(epoch): key.hex() for epoch, key in data_keys.items()} == EXPECTED["data_keys"]
    node = blake3(body[:32], derive_key_context="Perdure 1 page map node id, level 13").hexdigest()
    assert node == EXPECTED["node_keys"]["13"]


def damaged(data: bytes, what: str, other: bytes):
    """Every damage of a kind to some bytes; None stands for nothing there."""
    if what == "one byte flipped, at every place":
        for at in range(len(data)):
            for mask in (0x01, 0x80):
                yield at, data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
    elif what == "cut, to every length":
        yield from ((length, data[:length]) for length in range(len(data)))
    elif what == "one byte more":
        yield len(data), data + b"\0"
    elif what == "missing":
        yield 0, None
    elif what == "a newer version":
        yield 8, data[:8] + b"\2\0" + data[10:]
    else:
        assert what.startswith("the other")
        yield 0, other


@pytest.mark.parametrize(
    "case", [each for each in VECTORS["failures"] if each["of"] == "sealed"], ids=lambda case: case["what"]
)
def test_damaged_sealed_parts_do_not_open(case):
    error = getattr(errors, case["error"])
    for vector in VECTORS["sealed"]:
        sealed, number = bytes.fromhex(vector["sealed"]), vector["number"]
        if not case["what"].startswith("another"):
            for _, wrong in damaged(sealed, case["what"], b""):
                with pytest.raises(error, match="packs/vector at offset 64"):
                    sealer_of(vector).open(number, wrong, offset=64)
            continue
        field = case["what"].split()[1]
        if field == "number":
            sealer, number = sealer_of(vector), number ^ 1
        elif field in ("kind", "epoch"):
            sealer = sealer_of(vector, **{field: vector[field] ^ 3})
        else:
            value = bytes.fromhex(vector[field])
            sealer = sealer_of(vector, **{field: value[:-1] + bytes([value[-1] ^ 1])})
        with pytest.raises(error, match="packs/vector"):
            sealer.open(number, sealed)


@pytest.mark.parametrize(
    "case",
    [each for each in VECTORS["failures"] if each["of"] in ("slot", "keyring")],
    ids=lambda case: f"{case['of']}, {case['what']}",
)
def test_damaged_key_files_are_named_and_never_called_a_wrong_passphrase(case):
    """The passphrase is the right one: it is the file of its slot, or the keyring, that is damaged."""
    error = getattr(errors, case["error"])
    own = next(name for name in SLOTS if FILES[name][10] == 1)
    foreign = next(name for name in SLOTS if name != own)
    name, other = (own, FILES[foreign]) if case["of"] == "slot" else (KEYRING, FILES["keyring/00000001"])
    for at, wrong in damaged(FILES[name], case["what"], other):
        files = {each: data for each, data in FILES.items() if each != name}
        if wrong is not None:
            files[name] = wrong
        elif name == KEYRING:
            del files["keyring/00000001"]
            name = "keyring"
        with pytest.raises((error, FormatVersionError) if at in (8, 9) else error) as caught:
            unlock(files, REPOSITORY["passphrase"].encode())
        assert str(caught.value).startswith(name)
        assert len(str(caught.value).splitlines()) == 1


def test_decoders_refuse_what_no_writer_writes():
    slot, keyring = FILES[SLOTS[0]], FILES[KEYRING]
    for at in range(10, len(slot)):
        with pytest.raises(IntegrityError, match="truncated or damaged"):
            layout.decode_slot(slot[:at] + bytes([slot[at] ^ 1]) + slot[at + 1 :], SLOTS[0])
    with pytest.raises(IntegrityError, match="in the place of another"):
        layout.decode_slot(slot, SLOTS[1])
    for decode, data, name in ((layout.decode_slot, slot, SLOTS[0]), (layout.decode_keyring, keyring, KEYRING)):
        with pytest.raises(IntegrityError, match="damaged header"):
            decode(data[:8] + b"\0\0" + data[10:], name)
        with pytest.raises(FormatVersionError):
            decode(data[:8] + b"\2\0", name)  # before anything else is read
    bare = keyring[:104] + bytes(8)
    for slot_count, key_count in ((0, 0), (0, 1), (1, 0)):
        counts = struct.pack("<HH", slot_count, key_count)
        size = slot_count * 164 + key_count * 100 + 64
        with pytest.raises(IntegrityError, match="truncated or damaged"):
            layout.decode_keyring(bare[:10] + counts + bare[14:] + bytes(size), KEYRING)
    for body in (bytes(100), bytes(99), struct.pack("<96xI", 2) + bytes(36)):
        with pytest.raises(IntegrityError, match="makes no sense"):
            layout.decode_keyring_body(body, KEYRING)
    for kind, label in ((0, bytes(64)), (3, bytes(64)), (1, b"\xff" * 64), (1, b"\x1b[2J".ljust(64, b"\0"))):
        clear = slot[:10] + bytes([kind]) + slot[11:120] + label
        with pytest.raises(IntegrityError, match="makes no sense"):
            layout.decode_slot(layout.finish_slot(clear, slot[184:276]), SLOTS[0])


def test_a_keyring_that_contradicts_itself_is_refused():
    files, keys = made()
    entry = keys.header.slots[0]
    holder = slots._Holder(entry.slot_id, entry.public_key, entry.file_hash)
    header = replace(keys.header, epoch=5)
    files["keyring/00000001"] = slots._seal_keyring(header, keys.secrets(), [holder], b"")[0]
    with pytest.raises(IntegrityError, match="contradict"):
        unlock(files, PASSPHRASE)


def test_a_slot_opens_with_one_passphrase_only():
    """As if somebody had found a sealed part that opens with a second one: its private key is not the slot's."""
    files, keys = made()
    (name,) = [each for each in files if each.startswith("keys/")]
    slot, _ = layout.decode_slot(files[name], name)
    clear = files[name][:184]
    plain = X25519PrivateKey.generate().private_bytes_raw() + keys.public_key
    files[name] = layout.finish_slot(
        clear, slots._slot_sealer(slot, clear, slots._derive(slot, b"second")).seal(0, plain)
    )
    holder = slots._Holder(slot.slot_id, slot.public_key, blake3(files[name]).digest())
    files["keyring/00000001"] = slots._seal_keyring(keys.header, keys.secrets(), [holder], b"")[0]
    with pytest.raises(WrongPassphraseError):
        unlock(files, b"second")


def test_a_damaged_slot_keeps_nobody_else_out():
    own = next(name for name in SLOTS if FILES[name][10] == 1)
    key_file = KeyFile(bytes.fromhex(REPOSITORY["key_file"]))
    for wrong in (FILES[own][:-1], b"", FILES[own][:8] + b"\2\0" + FILES[own][10:]):
        assert unlock({**FILES, own: wrong}, key_file).slot_id.hex() != own[5:]


def test_wrong_credentials():
    files, _ = made()
    for wrong in (PASSPHRASE + b" ", b"", KeyFile(PASSPHRASE), KEY_FILE):
        with pytest.raises(WrongPassphraseError) as caught:
            unlock(files, wrong)
        assert caught.value.exit_code == 12
    files, _ = made(KEY_FILE)
    with pytest.raises(WrongPassphraseError):
        unlock(files, KEY_FILE.content)
    for refused in (b"", KeyFile(b"short")):
        with pytest.raises(UsageError):
            new_keyring(refused, CHEAP)
    for label in ("x" * 65, "two\nlines", "\udcff" * 70):
        with pytest.raises(UsageError, match="label"):
            new_keyring(PASSPHRASE, CHEAP, label=label)


@pytest.mark.parametrize(
    ("memory", "passes", "lanes"),
    [
        *(
            (0, 1, 1),
            (7, 1, 1),
            (8 << 20, 1, 1),
            (0xFFFFFFFF, 1, 1),
            (64, 0, 1),
            (64, 65, 1),
            (64, 1, 0),
            (1 << 20, 1, 65),
        ),
        *(((2 << 20) + 1, 1, 1), (1 << 20, 5, 4), (128 << 10, 33, 4)),
    ],
)
def test_a_slot_that_asks_for_too_much_is_refused_at_once(memory, passes, lanes):
    files, keys = made()
    with pytest.raises(UsageError):
        Argon2Parameters(memory, passes, lanes)
    (name,) = [each for each in files if each.startswith("keys/")]
    clear = files[name][:12] + struct.pack("<III", memory, passes, lanes) + files[name][24:184]
    files[name] = layout.finish_slot(clear, files[name][184:276])
    entry = keys.header.slots[0]  # somebody who can sign: nothing but the bounds is in the way
    holder = slots._Holder(entry.slot_id, entry.public_key, blake3(files[name]).digest())
    files["keyring/00000001"] = slots._seal_keyring(keys.header, keys.secrets(), [holder], b"")[0]
    began = time.monotonic()
    with pytest.raises(IntegrityError, match=rf"{name}: the key slot makes no sense: Argon2id with {memory} KiB"):
        unlock(files, PASSPHRASE)
    assert time.monotonic() - began < 0.2


def with_slots(keys, count, parameters):
    """Files of a repository with so many whole slots; their seals are nothing."""
    files, holders = {}, []
    for at in range(count):
        slot_id = at.to_bytes(8, "big")
        slot = layout.SlotHeader(
            layout.SlotKind.PASSPHRASE, parameters, slot_id, keys.repository_id, bytes(32), 0, b"p" * 32, ""
        )
        data = layout.finish_slot(layout.encode_slot_header(slot), bytes(92))
        files[layout.slot_name(slot_id)] = data
        holders.append(slots._Holder(slot_id, b"p" * 32, blake3(data).digest()))
    return files, slots._seal_keyring(keys.header, keys.secrets(), holders, b"")[0]


def test_a_keyring_whose_slots_together_ask_for_too_much_is_refused_at_once():
    """Each is within its bounds. The sums that are refused would take minutes and more."""
    _, keys = made()
    for parameters in (Argon2Parameters(1 << 20, 4, 4), slots.PASSPHRASE_PARAMETERS):
        files, keyring = with_slots(keys, 40, parameters)
        began = time.monotonic()
        with pytest.raises(IntegrityError, match="keyring/00000001: trying its 40 key slots would take"):
            unlock({**files, "keyring/00000001": keyring}, PASSPHRASE)
        assert time.monotonic() - began < 0.2
    with pytest.raises(IntegrityError, match="damaged"):
        with_slots(keys, 65, CHEAP)


def test_no_slot_is_added_that_unlocking_would_refuse():
    _, keys = made()
    for count, parameters in ((31, slots.PASSPHRASE_PARAMETERS), (63, KEY_PARAMETERS)):
        files, keyring = with_slots(keys, count, parameters)
        files["keyring/00000001"] = keyring
        opened = Keys(newest(files)[0], keys.secrets(), blake3(keyring).digest(), bytes(8))
        new = NewSlot(PASSPHRASE if count == 31 else KEY_FILE)
        step = change(files, opened, add=new)
        with pytest.raises(ConflictError, match=f"keyring/00000003: {count + 1} key slots are all"):
            change(after(files, step), step.keys, add=new)
        one_out = change(after(files, step), step.keys, add=NewSlot(b"other", "", CHEAP), remove=[bytes(8)])
        assert len(one_out.keys.header.slots) == count + 1


def test_memory_that_is_not_to_be_had_is_a_clear_error(monkeypatch):
    files, _ = made()

    class Refused:
        def __init__(self, **_):
            pass

        def derive(self, _):
            raise MemoryError("no")

    monkeypatch.setattr(slots, "Argon2id", Refused)
    with pytest.raises(StorageError, match="MiB of memory"):
        unlock(files, PASSPHRASE)


# What somebody can do who writes the folder and has no passphrase.


def attackers_keyring(keys, signing_keys, signing):
    """A keyring with secrets of the attacker's choice, sealed to the public keys that lie in the keyring."""
    body = KeyringBody(b"i" * 32, b"m" * 32, signing.private_bytes_raw(), {1: b"d" * 32})
    header = replace(keys.header, signing_keys=signing_keys, number=2, previous=keys.keyring_hash)
    holders = [slots._Holder(each.slot_id, each.public_key, each.file_hash) for each in keys.header.slots]
    return slots._seal_keyring(header, body, holders, b"")[0]


def test_a_keyring_of_somebody_else_is_not_believed():
    files, keys = made()
    own = Ed25519PrivateKey.generate()
    public = own.public_key().public_bytes_raw()
    alone = attackers_keyring(keys, (SigningKey(1, public, bytes(64)),), own)
    for name in ("keyring/00000002", "keyring/00000001"):
        placed = {**files, name: alone} if name.endswith("2") else {**files, name: alone[:16] + b"\1" + alone[17:]}
        with pytest.raises(IntegrityError, match=name):
            unlock(placed, PASSPHRASE)
    with pytest.raises(IntegrityError, match="not signed by a key that is trusted"):
        unlock({**files, "keyring/00000002": alone}, PASSPHRASE)
    with pytest.raises(IntegrityError, match="not signed by a key that is trusted"):
        require_trusted(newest({**files, "keyring/00000002": alone})[0], keys.public_key, "keyring/00000002")
    link = own.sign(layout.encode_link(keys.repository_id, 2, keys.public_key, public))
    with pytest.raises(IntegrityError, match="signature is wrong"):
        attackers_keyring(keys, (*keys.signing_keys, SigningKey(2, public, link)), own)


def test_an_exchanged_slot_gets_nothing_from_the_next_keyring():
    """Same id, whole, but with the attacker's passphrase and public key."""
    files, keys = made()
    (name,) = [each for each in files if each.startswith("keys/")]
    theirs, holder = slots._new_slot(NewSlot(b"attacker", "", CHEAP), keys.repository_id, keys.public_key, 0)
    data = next(iter(theirs.values()))
    clear = data[:24] + bytes.fromhex(name[5:]) + data[32:184]
    exchanged = {**files, name: layout.finish_slot(clear, data[184:276])}
    for credential in (PASSPHRASE, b"attacker"):
        with pytest.raises(IntegrityError, match=f"{name}: is not the key slot that the keyring means"):
            unlock(exchanged, credential)
    step = change(exchanged, keys, add=NewSlot(b"second", "", CHEAP), new_epoch=True)
    assert holder.public_key not in b"".join(step.put.values())
    assert unlock({**step.put, name: files[name]}, PASSPHRASE).current_epoch == 2


def test_every_part_of_a_keyring_is_bound_to_its_number_and_repository():
    files, keys = made()
    other_files, other = made()
    mixed = {**files, "keyring/00000001": other_files["keyring/00000001"]}
    with pytest.raises(IntegrityError):
        unlock(mixed, PASSPHRASE)
    sealed = keys.sealer(1, b"p" * 16, 1, b"s" * 32).seal(0, b"content")
    with pytest.raises(IntegrityError):
        other.sealer(1, b"p" * 16, 1, b"s" * 32).open(0, sealed)


# Changing keys.


def test_rotation_needs_nobody_elses_passphrase():
    files, keys = made()
    files = after(files, change(files, keys, add=NewSlot(KEY_FILE, "backup", CHEAP)))
    before = unlock(files, KEY_FILE)
    assert before.header.number == 2
    old = before.sealer(1, b"p" * 16, 1, b"s" * 32).seal(0, b"content")
    step = change(files, unlock(files, KEY_FILE), new_epoch=True, new_signing_key=True)
    assert list(step.put) == ["keyring/00000003"]
    files = after(files, step)
    for credential in (PASSPHRASE, KEY_FILE):
        now = unlock(files, credential)
        assert (now.current_epoch, now.epochs) == (2, (1, 2))
        assert now.keyring_hash == step.keys.keyring_hash
        assert now.sealer(1, b"p" * 16, 1, b"s" * 32).open(0, old) == b"content"
        assert now.sealer(1, b"p" * 16, 2, b"s" * 32).seal(0, b"content") != old
        assert now.id_key("chunk") == keys.id_key("chunk")
        assert now.index_mac_key == keys.index_mac_key
        assert (now.public_key_of(1), now.public_key_of(7)) == (keys.public_key, now.public_key)
        assert now.public_key != keys.public_key
        Keys.verify(now.public_key, b"data", now.sign(b"data"))
    with pytest.raises(IntegrityError, match="belongs to epoch 2"):
        keys.sealer(1, b"p" * 16, 2, b"s" * 32, "packs/new")
    for public in (keys.public_key, now.public_key):
        require_trusted(newest(files)[0], public, "keyring")


def test_a_passphrase_is_changed_in_one_step():
    files, keys = made()
    step = change(files, keys, add=NewSlot(b"new", "", CHEAP), remove=[keys.slot_id])
    assert list(step.put)[-1] == "keyring/00000002", "the slot must be there before the keyring that names it"
    assert step.delete == (f"keys/{keys.slot_id.hex()}",)
    crashed = {**files, **step.put}  # before the old slot is deleted
    for now in (crashed, after(files, step)):
        with pytest.raises(WrongPassphraseError):
            unlock(now, PASSPHRASE)
        assert unlock(now, b"new").slot_id == step.keys.slot_id
    begun = {**files, **{name: data for name, data in step.put.items() if name.startswith("keys/")}}
    assert unlock(begun, PASSPHRASE).header.number == 1
    with pytest.raises(WrongPassphraseError):
        unlock(begun, b"new")


def test_a_usable_slot_is_always_left():
    files, keys = made()
    with pytest.raises(ConflictError, match="no usable key slot"):
        change(files, keys, remove=[keys.slot_id])
    with pytest.raises(NotFoundError, match="0000000000000000"):
        change(files, keys, remove=[bytes(8)])
    step = change(files, keys, add=NewSlot(b"second", "", CHEAP))
    files, keys = after(files, step), step.keys
    second = next(each for each in keys.header.slots if each.slot_id != keys.slot_id)
    name = layout.slot_name(second.slot_id)
    for wrong in (files[name][:-1], None):
        hurt = {**files, name: wrong} if wrong is not None else {each: files[each] for each in files if each != name}
        with pytest.raises(ConflictError, match="no usable key slot"):
            change(hurt, keys, remove=[keys.slot_id])
        problems = {each.slot_id: each.problem for each in list_slots(hurt)}
        assert problems[keys.slot_id] is None
        assert name in problems[second.slot_id]
    assert unlock(after(files, change(files, keys, remove=[keys.slot_id])), b"second")


def test_who_comes_second_is_told():
    files, keys = made()
    first = change(files, keys, new_epoch=True)
    second = change(files, keys, add=NewSlot(b"second", "", CHEAP))
    assert first.put.keys() & second.put.keys() == {"keyring/00000002"}, "put-if-absent decides"
    with pytest.raises(ConflictError, match="changed meanwhile"):
        change(after(files, first), keys, new_epoch=True)


def test_slots_are_listed_without_a_passphrase():
    listed = {each.header.label: each.header for each in list_slots(FILES)}
    assert (listed["first"].kind, listed["first"].created) == (layout.SlotKind.PASSPHRASE, 1_800_000_000)
    assert (listed["second"].kind, listed["second"].parameters) == (layout.SlotKind.KEY_FILE, CHEAP)


def test_an_auditor_needs_one_public_key():
    first, last = map(bytes.fromhex, EXPECTED["signing_keys"])
    for trusted in (first, last):
        require_trusted(newest(FILES)[0], trusted, KEYRING)
    with pytest.raises(IntegrityError, match="trusted"):
        require_trusted(newest(FILES)[0], bytes(32), KEYRING)
    files, keys = made()
    other, _ = made()
    chain = after(files, change(files, keys, new_epoch=True))
    with pytest.raises(IntegrityError, match="keyring/00000001"):
        require_successor(other["keyring/00000001"], newest(chain)[0])


def test_keyrings_follow_the_one_that_was_seen():
    files, keys = made()
    two = after(files, change(files, keys, new_epoch=True))
    three = after(two, change(two, unlock(two, PASSPHRASE), new_signing_key=True))
    hashes = {number: blake3(three[layout.keyring_name(number)]).digest() for number in (1, 2, 3)}
    for number, digest in hashes.items():
        require_descent(three, number, digest)
    for seen in ((4, hashes[3]), (3, hashes[2]), (1, hashes[2])):
        with pytest.raises(IntegrityError, match="which this host has seen"):
            require_descent(three, *seen)
    fork = after(files, change(files, keys, add=NewSlot(b"second", "", CHEAP)))  # keyring 2 was taken away before
    fork = after(fork, change(fork, unlock(fork, PASSPHRASE), new_epoch=True))
    with pytest.raises(IntegrityError, match="keyring/00000002"):
        require_descent(fork, 2, hashes[2])
    with pytest.raises(IntegrityError, match="keyring/00000002"):
        require_descent({**fork, "keyring/00000002": two["keyring/00000002"]}, 2, hashes[2])
    with pytest.raises(IntegrityError, match="keyring/00000002: is missing"):
        require_descent({name: data for name, data in three.items() if name != "keyring/00000002"}, 1, hashes[1])


def test_a_signing_key_that_was_replaced_does_not_lead_on():
    """Stolen before the rotation, it can still sign a keyring; who has seen the rotation does not follow it."""
    files, keys = made()
    rotated = change(files, keys, new_signing_key=True)
    files = after(files, rotated)
    own = Ed25519PrivateKey.generate()
    public = own.public_key().public_bytes_raw()
    link = keys.sign(layout.encode_link(keys.repository_id, 2, keys.public_key, public))
    body = KeyringBody(b"i" * 32, b"m" * 32, own.private_bytes_raw(), {2: b"d" * 32})
    header = replace(
        rotated.keys.header,
        number=3,
        previous=rotated.keys.keyring_hash,
        signing_keys=(*keys.signing_keys, SigningKey(2, public, link)),
    )
    holders = [slots._Holder(each.slot_id, each.public_key, each.file_hash) for each in keys.header.slots]
    forged = {**files, "keyring/00000003": slots._seal_keyring(header, body, holders, b"")[0]}
    with pytest.raises(IntegrityError, match="drops signing keys"):
        require_descent(forged, 2, rotated.keys.keyring_hash)
    with pytest.raises(IntegrityError, match="not signed by a key that is trusted"):
        require_trusted(newest(forged)[0], rotated.keys.public_key, "keyring/00000003")


class Slots(RuleBasedStateMachine):
    """Any order of changes, by anybody who can open, against a dict from credential to whether it opens."""

    @initialize()
    def begin(self):
        self.files, self.keys = made(b"0")
        self.open = {b"0": self.keys.slot_id}
        self.closed = []
        self.count = 0
        self.epoch = 1
        self.sealed = {1: self.seal()}

    def seal(self):
        return self.keys.sealer(1, b"p" * 16, self.keys.current_epoch, b"s" * 32).seal(1, b"content")

    def carry_out(self, step):
        self.files, self.keys = after(self.files, step), step.keys

    @rule(kind=st.booleans(), epoch=st.booleans(), signing=st.booleans())
    def add(self, kind, epoch, signing):
        self.count += 1
        name = KeyFile(b"%032d" % self.count) if kind else b"%d" % self.count
        step = change(self.files, self.keys, add=NewSlot(name, "", CHEAP), new_epoch=epoch, new_signing_key=signing)
        self.carry_out(step)
        self.epoch += epoch or signing
        self.open[name] = next(bytes.fromhex(each[5:]) for each in step.put if each.startswith("keys/"))
        self.sealed[self.epoch] = self.seal()

    @rule(at=st.integers(0, 100))
    def remove(self, at):
        name = list(self.open)[at % len(self.open)]
        if len(self.open) == 1:
            with pytest.raises(ConflictError):
                change(self.files, self.keys, remove=[self.open[name]])
            return
        self.carry_out(change(self.files, self.keys, remove=[self.open.pop(name)]))
        self.closed.append(name)

    @rule(at=st.integers(0, 100))
    def open_again(self, at):
        self.keys = unlock(self.files, list(self.open)[at % len(self.open)])

    @rule(at=st.integers(0, 100))
    def a_removed_one_does_not_open(self, at):
        if self.closed:
            with pytest.raises(WrongPassphraseError):
                unlock(self.files, self.closed[at % len(self.closed)])

    @invariant()
    def everything_sealed_opens(self):
        assert self.keys.current_epoch == self.epoch
        assert {each.slot_id for each in list_slots(self.files)} == set(self.open.values())
        assert len([each for each in self.files if each.startswith("keys/")]) == len(self.open)
        for epoch, sealed in self.sealed.items():
            assert self.keys.sealer(1, b"p" * 16, epoch, b"s" * 32).open(1, sealed) == b"content"


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=30, stateful_step_count=12)


@given(st.data())
@settings(max_examples=300)
def test_no_bytes_raise_anything_but_our_errors(data):
    files = dict(FILES)
    for name in data.draw(st.sets(st.sampled_from(sorted(FILES)), min_size=1)):
        content = bytearray(files[name])
        for at, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
        ):
            content[at] = value
        content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
        if name.startswith("keys/") and data.draw(st.booleans()) and len(content) >= 276:
            content = bytearray(layout.finish_slot(bytes(content[:184]), bytes(content[184:276])))
        files[name] = bytes(content)
    try:
        unlock(files, REPOSITORY["passphrase"].encode())
    except PerdureError as error:
        assert not isinstance(error, WrongPassphraseError)
        assert len(str(error).splitlines()) == 1
    for decode, name in ((layout.decode_slot, SLOTS[0]), (layout.decode_keyring, KEYRING)):
        with pytest.raises((IntegrityError, FormatVersionError)):
            decode(data.draw(st.binary(max_size=400)), name)


# Sealing.


@given(
    st.integers(0, 0xFFFF),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=48),
    st.binary(max_size=3000),
)
def test_sealing_agrees_with_a_second_implementation(kind, number, epoch, salt, object_id, plain):
    data_key, repository_id = b"k" * 32, b"r" * 16
    keys = DataKeys(repository_id, b"i" * 32, {epoch: data_key}, epoch)
    sealer = keys.sealer(kind, object_id, epoch, salt)
    sealed = sealer.seal(number, plain)
    assert len(sealed) == len(plain) + 28
    assert sealer.open(number, memoryview(sealed)) == plain
    assert reference_open(data_key, kind, repository_id, object_id, epoch, salt, number, sealed) == plain


def test_a_nonce_differs_with_everything_that_is_sealed():
    vector = VECTORS["sealed"][1]
    nonces = {sealer_of(vector).seal(number, plain)[:12] for number in range(50) for plain in (b"", b"a", b"b", b"ab")}
    for field in ("secret", "repository_id", "object_id", "salt"):
        nonces.add(sealer_of(vector, **{field: bytes(len(vector[field]) // 2)}).seal(0, b"a")[:12])
    for field in ("kind", "epoch"):
        nonces.add(sealer_of(vector, **{field: 99}).seal(0, b"a")[:12])
    assert len(nonces) == 206
    assert sealer_of(vector).seal(3, b"again") == sealer_of(vector).seal(3, b"again"), "a retried write repeats itself"


def test_threads_may_share_a_sealer():
    _, keys = made()
    sealer = keys.sealer(1, b"p" * 16, 1, b"s" * 32)
    parts = [os.urandom(20_000) for _ in range(200)]
    alone = [sealer.seal(number, part) for number, part in enumerate(parts)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(sealer.seal, range(200), parts)) == alone
        assert list(threads.map(sealer.open, range(200), alone)) == parts


def test_workers_seal_alike_and_cannot_sign():
    files, keys = made()
    step = change(files, keys, new_epoch=True)
    keys = step.keys
    material = keys.worker_material()
    worker = DataKeys.from_worker_material(material)
    sealed = worker.sealer(1, b"p" * 16, worker.current_epoch, b"s" * 32).seal(3, b"content")
    assert keys.sealer(1, b"p" * 16, 2, b"s" * 32).open(3, sealed) == b"content"
    assert [worker.id_key("chunk"), worker.id_key("node", 13)] == [keys.id_key("chunk"), keys.id_key("node", 13)]
    assert worker.repository_id == keys.repository_id
    assert not hasattr(worker, "sign")
    for secret in (keys.secrets().signing_private, keys.secrets().index_mac_key, keys.secrets().data_keys[1]):
        assert secret not in material
    with pytest.raises(IntegrityError, match="epoch 1"):
        worker.sealer(1, b"p" * 16, 1, b"s" * 32)
    assert DataKeys.from_worker_material(keys.worker_material(keys.epochs)).epochs == (1, 2)
    with pytest.raises(IntegrityError, match="epoch 9"):
        keys.worker_material([9])


def test_secrets_are_not_shown_and_do_not_leave():
    files, keys = made()
    step = change(files, keys, add=NewSlot(KEY_FILE, "label", CHEAP))
    body = keys.secrets()
    shown = [keys, keys.sealer(1, b"p" * 16, 1, b"s" * 32), body, KEY_FILE, NewSlot(PASSPHRASE), step, keys.header]
    shown.append(DataKeys.from_worker_material(keys.worker_material()))
    text = "".join(repr(each) + str(each) + f"{each}" for each in shown)
    for secret in (
        body.id_key,
        body.index_mac_key,
        body.signing_private,
        body.data_keys[1],
        PASSPHRASE,
        KEY_FILE.content,
    ):
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text
    for holder in (keys, body, KEY_FILE, NewSlot(PASSPHRASE), shown[1], shown[-1]):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds keys"):
                attempt(holder)
    with pytest.raises(TypeError):
        pickle.dumps(step)


def test_signatures():
    _, keys = made()
    signature = keys.sign(b"data")
    Keys.verify(keys.public_key, memoryview(b"data"), signature)
    for public, data, wrong in (
        (keys.public_key, b"date", signature),
        (keys.public_key, b"data", signature[:-1]),
        (keys.public_key, b"data", bytes(64)),
        (bytes(32), b"data", signature),
        (b"short", b"data", signature),
    ):
        with pytest.raises(IntegrityError, match="records/1: its signature is wrong"):
            Keys.verify(public, data, wrong, "records/1")


def test_the_defaults_cost_what_is_said():
    began = time.monotonic()
    files = new_keyring(PASSPHRASE).files
    seconds = time.monotonic() - began
    print(f"new_keyring with the default parameters: {seconds:.2f} s")
    assert seconds > 0.1
    header = list_slots(files)[0].header
    assert header.parameters == slots.PASSPHRASE_PARAMETERS
    assert abs(header.created - time.time()) < 100
