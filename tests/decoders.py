"""Everything of Perdure's that reads bytes which somebody else may have written, each as one function of bytes.

`feed` gives bytes to a decoder and lets through only what it may raise: its typed errors are fine, anything else is a
defect. Decoders of what stands under a seal or a signature are also fed what is sealed and signed properly but makes
no sense, as a faulty or malicious holder of the keys could write it. `seeds` are whole examples, to be damaged.

tests/unit/test_decoders.py runs a little of this each time, bench/fuzz.py for as long as it is told.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3
from store_fixtures import CHEAP, PASSPHRASE, Place, add, image

from base.disk import Disk
from base.errors import (
    ConfigurationError,
    ConflictError,
    FormatVersionError,
    IntegrityError,
    PerdureError,
    StorageError,
    UsageError,
)
from base.units import parse_size
from capture.journal import Journal
from guest import perdure_guest
from perdure.commands.repository import _read_ranges
from store import format as layout
from store import leases, pagemap, records, salvage
from store.chunker import PackingSettings
from store.history import History
from store.index import examination, parts
from store.keyring import layout as format_keys
from store.keyring import slots
from store.keyring.files import read_key_files
from store.keyring.keys import Keys
from store.packs import open_frame
from store.retention.policy import decode_policy, format_span, parse_span
from store.storage import LocalStorage
from store.upkeep import audit
from vm import config
from vm.channel import LineSplitter
from vm.folder import RuntimeFolder
from vm.identity import Identity
from vm.protocol import LINE_BYTES_MAX, RequestRefusedError, decode_request
from vm.qemu import _read_record
from vm.regions import Device, RegionTable

DAMAGE = (IntegrityError, FormatVersionError)


@dataclass(frozen=True)
class Decoder:
    """One of them. `feed` raises only what is wrong with the decoder."""

    name: str
    seeds: Callable[[], list[bytes]]
    decode: Callable[[bytes], object]
    allowed: tuple[type[BaseException], ...]

    def feed(self, data: bytes) -> bool:
        """Whether the bytes were accepted. Raises what the decoder must not."""
        try:
            self.decode(data)
        except self.allowed as error:
            text = str(error)
            if isinstance(error, PerdureError):
                assert len(text.splitlines()) <= 1, f"more than one line: {text!r}"
                assert len(text) < 2000 + 2 * len(data), "a message that fills the screen"
            return False
        return True


class World:
    """A small repository, and a folder for files."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="perdure-decoders-")
        atexit.register(self._folder.cleanup)
        self.root = Path(self._folder.name)
        where = Place(self.root / "place", PackingSettings(pack_bytes=20_000))
        with where.open() as repository:
            first = add(repository, "vm", {"ram": image(1, 24)})
            second = add(repository, "vm", {"ram": image(2, 12) + image(1, 24)[12 * 4096 :]}, first)
            repository.protect(second, protected=True)
            repository.forget(first)
        self.path = where.path
        self.keys: Keys = slots.unlock(read_key_files(where.path), PASSPHRASE)
        self.storage = LocalStorage(self.path)
        self.index = next(self.root.rglob("index.lmdb"))
        self.packs = sorted((self.path / "packs").iterdir())
        self.records = sorted((self.path / "records").iterdir())

    def file(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def sealer(self, kind: int):
        return self.keys.sealer(kind, bytes(16), self.keys.current_epoch, bytes(32))


@functools.cache
def world() -> World:
    return World()


DECODERS: dict[str, Decoder] = {}


def decoder(name: str, seeds: Callable[[], list[bytes]], allowed=DAMAGE):
    def register(function: Callable[[bytes], object]) -> Callable[[bytes], object]:
        DECODERS[name] = Decoder(name, seeds, function, allowed)
        return function

    return register


# The repository: what anybody may write who can write its folder.


@decoder("config", lambda: [(world().path / "config").read_bytes()])
def _(data: bytes) -> None:
    layout.decode_config(data, "config")


@decoder("pack header", lambda: [world().packs[0].read_bytes()[:64]])
def _(data: bytes) -> None:
    layout.decode_pack_header(data, "packs/x")


@decoder("pack trailer", lambda: [world().packs[0].read_bytes()[-16:]])
def _(data: bytes) -> None:
    offset, length = layout.decode_pack_trailer(data[-16:], 100_000, "packs/x")
    assert 64 <= offset <= 100_000 - 16 and offset + length == 100_000 - 16


@decoder("pack", lambda: [each.read_bytes() for each in world().packs])
def _(data: bytes) -> None:
    """Also what can be salvaged of it: with nothing known, and with what the index knows."""
    pack_id = bytes.fromhex(world().packs[0].name)
    storage = LocalStorage(world().root / "scratch")
    (storage.root / "packs").mkdir(parents=True, exist_ok=True)
    (storage.root / layout.pack_name(pack_id)).write_bytes(data)
    with ThreadPoolExecutor(1) as threads:
        found = salvage.examine(storage, world().keys, pack_id, None, threads)
    storage.close()
    if found.info is not None:
        assert len(found.info.footer.ids) == int(found.info.footer.counts.sum())


@decoder("frame", lambda: [layout.encode_frame(0, 4096, bytes(64), bytes(8192))])
def _(data: bytes) -> None:
    layout.decode_frame(data, "packs/x", 0)


def _frames() -> list[bytes]:
    import zstandard

    content = image(3, 4)[: 4 * 4096].ljust(4 * 4096, b"\0")
    packed = zstandard.ZstdCompressor(level=1).compress(content)
    return [layout.encode_frame(0, 4096, bytes(128), content), layout.encode_frame(1, 4096, bytes(128), packed)]


@decoder("frame under seal", _frames)
def _(data: bytes) -> None:
    sealer = world().sealer(layout.PACK_DATA)
    ids, chunks = open_frame(sealer, 0, sealer.seal(0, data), "packs/x", 64)
    assert len(ids) == len(chunks) and chunks.nbytes <= layout.MAX_FRAME


def _footers() -> list[bytes]:
    ids = np.arange(96, dtype=np.uint8).reshape(3, 32)
    return [layout.encode_footer(layout.PackFooter(np.array([64, 900], np.uint32), np.array([1, 2], np.uint16), ids))]


@decoder("footer under seal", _footers)
def _(data: bytes) -> None:
    footer = layout.decode_footer(data, "packs/x")
    assert (np.diff(footer.offsets.astype(np.int64)) > 0).all()


@decoder("record", lambda: [each.read_bytes() for each in world().records])
def _(data: bytes) -> None:
    records.decode_record(world().keys, data, 2, None)


def _bodies() -> list[bytes]:
    found = []
    for path in world().records:
        header, sealed, _ = layout.decode_record(path.read_bytes(), path.name)
        sealer = world().keys.sealer(layout.SEALED_RECORD, header.vm_id, header.epoch, header.salt)
        found.append(bytes([header.kind]) + sealer.open(header.sequence, sealed))
    pack = "00" * 16
    found.append(b"\5" + msgspec.json.encode({"time": "x", "host": "h", "packs": [pack]}))
    found.append(b"\6" + msgspec.json.encode({"time": "x", "host": "h", "added": [pack], "removed": [pack]}))
    found.append(
        b"\7"
        + msgspec.json.encode(
            {"time": "x", "host": "h", "vm": None, "policy": {"last": 3, "within": "P1D", "quota": 5}}
        )
    )
    hurt = {"vm_id": pack, "number": 1, "regions": {"ram": 4096}}
    found.append(b"\10" + msgspec.json.encode({"time": "x", "host": "h", "generations": [hurt]}))
    return found


@decoder("record under seal", _bodies)
def _(data: bytes) -> None:
    keys = world().keys
    kind, body = (data[0], data[1:]) if data else (2, b"")
    header = layout.RecordHeader(kind, keys.current_epoch, 2, bytes(32), bytes(16), 1, bytes(32), bytes(32))
    sealed = keys.sealer(layout.SEALED_RECORD, bytes(16), header.epoch, header.salt).seal(2, body)
    signed = layout.encode_record_header(header, len(sealed)) + sealed
    record = records.decode_record(keys, signed + keys.sign(signed), 2, bytes(32))
    if isinstance(record.body, records.GenerationBody):
        generation = records.generation_of(record.header, record.body, record.id)
        for region in generation.regions.values():
            list(pagemap.nodes(region.root, _NoNodes()))
            pagemap.lookup(region.root, _NoNodes(), np.array([0], np.uint64))
    elif isinstance(record.body, records.PolicyBody):
        with suppress(ConflictError):  # rules of a newer Perdure
            decode_policy(bytes(record.body.policy), "VM demo", whole=True)


@decoder("policy", lambda: [b'{"last":3,"within":"P1DT3H","tags":["a"],"quota":5}'], (IntegrityError, ConflictError))
def _(data: bytes) -> None:
    policy = decode_policy(data, "vm", whole=True)
    if policy.within is not None:
        format_span(policy.within)


class _NoNodes:
    """A store that has no nodes at all."""

    def fetch(self, level: int, ids):  # noqa: ARG002  # as pagemap.NodeSource has it
        raise IntegrityError("page map", "is in no pack")


@decoder("slot", lambda: [each.read_bytes() for each in (world().path / "keys").iterdir()])
def _(data: bytes) -> None:
    """Damaged, and with the hash put right."""
    for each in (data, data[:276] + blake3(data[:276]).digest()):
        with suppress(*DAMAGE):
            format_keys.decode_slot(each, f"keys/{each[24:32].hex()}")


def _keyrings() -> list[bytes]:
    return [each.read_bytes() for each in (world().path / "keyring").iterdir()]


@decoder("keyring", _keyrings)
def _(data: bytes) -> None:
    number = int.from_bytes(data[16:24], "little")
    format_keys.decode_keyring(data, f"keyring/{number:08d}")


@decoder("keyring and slots", _keyrings, (*DAMAGE, PerdureError))
def _(data: bytes) -> None:
    files = read_key_files(world().path) | {"keyring/00000001": data}
    with suppress(*DAMAGE):
        slots.list_slots(files)
    slots.unlock(files, PASSPHRASE)


def _keyring_bodies() -> list[bytes]:
    return [format_keys.encode_keyring_body(format_keys.KeyringBody(b"a" * 32, b"b" * 32, b"c" * 32, {1: b"d" * 32}))]


@decoder("keyring under seal", _keyring_bodies)
def _(data: bytes) -> None:
    format_keys.decode_keyring_body(data, "keyring/1")


@decoder("public key", lambda: [audit.public_pem(world().keys.public_key).encode()], (UsageError,))
def _(data: bytes) -> None:
    audit.public_from_pem(data, "public.pem")


def _leases() -> list[bytes]:
    facts = leases.LeaseFacts(sequence=4, purpose="x", pid=1, host="h", since="s")
    return [msgspec.json.encode(facts) + b"\n" + msgspec.json.encode(facts) + b"\n"]


@decoder("lease", _leases, (StorageError,))
def _(data: bytes) -> None:
    folder = world().root / "leases"
    folder.mkdir(exist_ok=True)
    path = folder / ("0" * 16)
    path.write_bytes(data)
    with path.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert len(leases.held(folder)) == 1


# This host's own state: private, but a disk may damage it.


@decoder("history", lambda: [next(world().root.rglob("history.json")).read_bytes()])
def _(data: bytes) -> None:
    history = History(world().file("history.json", data))
    with suppress(IntegrityError):
        history.check(lambda _: bytes(32))
    with suppress(IntegrityError):
        history.check_keyring(1, bytes(32), lambda *_: None)


def _index_values() -> list[bytes]:
    key = world().keys.index_mac_key
    run = parts.new_run(1, 0)
    return [parts.encode_run(run, key), parts.encode_state(parts.State(), key), bytes(44 * 3 + 32)]


@decoder("index values", _index_values)
def _(data: bytes) -> None:
    key = world().keys.index_mac_key
    run = parts.Run(1, 0, np.array([(0, 9, 3, 0, 0, 0)], parts._FENCE))
    for decode in (
        lambda: parts.decode_run(1, data, key),
        lambda: parts.decode_state(data, key),
        lambda: parts.decode_dead(data, key),
        lambda: parts.decode_prefix(run, 0, data, key, set()),
        lambda: parts.decode_body(run, 0, data, key, set()),
    ):
        with suppress(parts.DamagedValueError):
            decode()


@decoder("index file's head", lambda: [world().index.read_bytes()[:8192]])
def _(data: bytes) -> None:
    examination.read_facts(world().file("index.lmdb", data))


@decoder("index marker", lambda: [(world().index.parent / "lock").read_bytes()])
def _(data: bytes) -> None:
    descriptor = os.open(world().file("lock", data), os.O_RDONLY)
    try:
        examination.read_marker(descriptor)
    finally:
        os.close(descriptor)


@decoder("tracking journal", lambda: [_journal()])
def _(data: bytes) -> None:
    Journal(world().file("journal.json", data), Identity(1, 2, "boot"), Disk())


def _journal() -> bytes:
    path = world().root / "journal.json"
    Journal(path, Identity(1, 2, "boot"), Disk()).committed("00" * 32, ["pm0"])
    return path.read_bytes()


DEVICES = (Device("pm0", 1 << 32, 64 << 20), Device("pm1", 2 << 32, 32 << 20, "raw"))


def _table() -> bytes:
    table = RegionTable.create(world().root / "regions.json", "vm", DEVICES)
    table.mark((1 << 32) + (2 << 20), 4096, "a", "guest")
    table.mark(2 << 32, 8192, None, "host")
    return table.file.read_bytes()


@decoder("region table", lambda: [_table()], (PerdureError,))
def _(data: bytes) -> None:
    RegionTable.load(world().file("regions.json", data), "vm", DEVICES)
    RegionTable.load(world().file("regions.json", data), "vm")


def _tags() -> list[bytes]:
    _table()
    return [msgspec.json.encode(RegionTable.load(world().root / "regions.json", "vm").regions.to_tags())]


@decoder("tags of a generation", _tags, (PerdureError,))
def _(data: bytes) -> None:
    try:
        tags = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return
    RegionTable.from_tags(world().root / "restored.json", "vm", DEVICES, tags)


@decoder("record of QEMU's process", lambda: [b'{"pid":1,"start_ticks":2,"boot":"b","argv":["q"],"facts":{"a":"b"}}'])
def _(data: bytes) -> None:
    folder = RuntimeFolder("vm", world().root)
    folder.process.write_bytes(data)
    _read_record(folder)


# The guest channel, both ends.

REQUESTS = [
    b'{"v":1,"id":1,"do":"hello","boot_id":"x","agent":"1"}',
    b'{"v":1,"id":2,"do":"mark","address":4294967296,"size":4096,"name":null,"owner":"o"}',
    b'{"v":1,"id":3,"do":"unmark","address":4294967296,"size":4096}',
    b'{"v":1,"id":4,"do":"query","from":12}',
    b'{"v":1,"id":5,"do":"checkpoint","name":"n"}',
]


@decoder("guest's request", lambda: REQUESTS, (RequestRefusedError,))
def _(data: bytes) -> None:
    decode_request(data)


@decoder("guest's stream", lambda: [b"\n".join(REQUESTS), b"x" * 70_000 + b"\n" + REQUESTS[0] + b"\n"])
def _(data: bytes) -> None:
    """Whatever the pieces, lines are the same, and none is longer than it may be."""
    whole = LineSplitter().feed(data)
    splitter, pieces = LineSplitter(), []
    for at in range(0, len(data), 977):
        pieces += splitter.feed(data[at : at + 977])
    assert pieces == whole
    assert all(line is None or len(line) < LINE_BYTES_MAX for line in whole)


@decoder("host's message", lambda: [b'{"v":1,"id":1,"ok":true,"vm":"x","restored":null,"regions":[],"next":null}'])
def _(data: bytes) -> None:
    perdure_guest.decode(data)
    perdure_guest.LineReader(4096).feed(data)


# What people write.

VM_TOML = b"""name = "demo"
memory = "512MiB"
cpus = 2
machine = "pc-q35-7.2"
extra = ["-nic", "user"]
[[region]]
name = "pm0"
size = "64M"
mode = "raw"
[policy]
tracker = "scan"
[hooks]
before_boot = ["./hook", "x"]
"""


@decoder("VM.toml", lambda: [VM_TOML], (ConfigurationError,))
def _(data: bytes) -> None:
    config.load(world().file("VM.toml", data), host_memory=1 << 40)


@decoder("RANGES.json", lambda: [b"[[0, 4096], [8192, 4096]]"], (UsageError,))
def _(data: bytes) -> None:
    _read_ranges(world().file("RANGES.json", data))


@decoder("size", lambda: [b"64MiB", b"0x1000", b"1.5G"], (ValueError,))
def _(data: bytes) -> None:
    parse_size(data.decode(errors="replace"))


@decoder("span of time", lambda: [b"2y5m7d3h", b"36h"], (ValueError,))
def _(data: bytes) -> None:
    format_span(parse_span(data.decode(errors="replace")))


@decoder("new key slot's label", lambda: ["Grüße".encode()], (UsageError,))
def _(data: bytes) -> None:
    slots.new_keyring(PASSPHRASE, CHEAP, label=data.decode(errors="replace"))
