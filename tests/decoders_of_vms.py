"""More of what decoders.py has: a VM's state on this host, disks' protocol, what QEMU says, what a generation tells.

`DECODERS` has all of them, those of decoders.py among them.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from types import SimpleNamespace

import msgspec
from decoders import DAMAGE, DECODERS, decoder, world

from base import extents as ranges
from base import locks
from base.errors import ConflictError, IntegrityError, PerdureError, StorageError, VirtualMachineError
from capture.disks import reads_of, token_of
from perdure.disks import server, state
from perdure.supervision import launcher
from restore import claims, nbd_server, working_set
from store import needs
from vm import hold, nbd, networks, recorded, vmstate
from vm.config import Description, Size

__all__ = ["DECODERS", "world"]


# In the repository's folder.


def _need() -> bytes:
    need = needs.Need(generations=(3, 4), purpose="disk root of VM web", host="h", since="2026-11-25T12:00:00+00:00")
    return msgspec.json.encode(need) + b"\n"


@decoder("need", lambda: [_need()])
def _(data: bytes) -> None:
    folder = world().root / "needs"
    folder.mkdir(exist_ok=True)
    (folder / "need-0123456789abcdef").write_bytes(data)
    [(_, found)] = needs.listed(folder)
    for sequence in found.generations[:2]:
        try:
            needs.require_none(folder, "web@3", sequence)
        except ConflictError as error:
            assert len(str(error).splitlines()) == 1


# This host's own state.


def _disk_state() -> bytes:
    overlay = state.Overlay(
        path="/x/o", size=4096, token="t", generation="00" * 32, sequence=3, point="vm@1", need="need-0123456789abcdef"
    )
    current = state.Current(first=state.First(path="/x/a", size=4096, modified_ns=1), overlay=overlay)
    pending = state.Pending(token="t", disks={"root": current}, drop=True)
    left = (state.Left(disk="root", overlay=overlay, drop=False),)
    return msgspec.json.encode(
        state.DiskState(repository="00" * 16, leases="/r/leases", disks={"root": current}, left=left, pending=pending)
    )


@decoder("where disks are", lambda: [_disk_state()], (StorageError,))
def _(data: bytes) -> None:
    folder = world().root / "disks"
    folder.mkdir(exist_ok=True)
    (folder / "disks.json").write_bytes(data)
    found = state.read(folder)
    if found.pending is not None:
        found.promoted()


def _record_of_a_server() -> bytes:
    return msgspec.json.encode(server._Record(pid=1, start_ticks=2, boot="b", held={"root": "why"}))


@decoder("record of a disk server", lambda: [_record_of_a_server()])
def _(data: bytes) -> None:
    path = world().root / "then.sock"
    path.with_suffix(".json").write_bytes(data)
    server._read(path)


LAZY_PAGES = 4


def _lazy_facts() -> bytes:
    facts = claims.Facts(claims.FORMAT, "vm", "00" * 32, (("ram", "ram", LAZY_PAGES * 4096), ("pm0", "pm0", 4096)))
    return msgspec.json.encode(facts)


@decoder("what is restored lazily", lambda: [_lazy_facts()], (StorageError, ConflictError))
def _(data: bytes) -> None:
    _claims(data, bytes(4096) + b"\1" * 8192)


@decoder("claims", lambda: [bytes(3 * 4096), bytes(4096) + b"\1" * LAZY_PAGES + bytes(8192 - LAZY_PAGES)], DAMAGE)
def _(data: bytes) -> None:
    """Whatever they say, with what lies in the backing files."""
    with suppress(StorageError, ConflictError):
        _claims(_lazy_facts(), data)


def _claims(facts: bytes, content: bytes) -> None:
    folder = world().root / "lazy"
    folder.mkdir(exist_ok=True)
    (folder / claims.FACTS).write_bytes(facts)
    (folder / claims.CLAIMS).write_bytes(content)
    with suppress(FileNotFoundError), open(folder / claims.PROBLEM_TEXT, "wb") as problem:
        problem.write(content[-100:])
    found = claims.Claims.find(folder)
    assert found is not None
    with found, open(folder / "backing", "w+b") as backing:
        backing.truncate(LAZY_PAGES * 4096)
        os.pwrite(backing.fileno(), b"x", 4096)
        for share in (0.5, 0.99):
            assert found.latency(share) >= 0
        assert isinstance(found.problem, str)
        found.take_over({name: backing.fileno() for name, _, _ in found.facts.regions})


@decoder("working set", lambda: [msgspec.msgpack.encode({"ram": struct.pack("<4I", 1, 2, 900, 2**32 - 1)})])
def _(data: bytes) -> None:
    known = working_set.WorkingSet(world().file("x.pages", data))
    pages = known.pages("ram")
    assert pages.ndim == 1 and (pages >= 0).all() and len(set(pages.tolist())) == len(pages)


def _launch() -> bytes:
    platform = {
        "binary": "/usr/bin/qemu", "version": "7.2.0", "machine": "q35", "accelerator": "tcg", "cpu": "max",
        "firmware": {
            "kind": "ovmf", "code": "/c", "template": "/t", "code_format": "raw", "template_format": "raw",
        },
        "variables": "/v", "uuid": "u", "generation_id": True,
    }  # fmt: skip
    return json.dumps({"platform": platform, "memory": "memory", "accelerator_reason": "told"}).encode()


@decoder("facts of a launch", lambda: [_launch()], (VirtualMachineError,))
def _(data: bytes) -> None:
    record = SimpleNamespace(facts={"launch": data.decode(errors="surrogateescape")})
    launcher._decode(SimpleNamespace(vm="vm", pid=1, record=record))


@decoder("holder of a lock", lambda: [msgspec.json.encode(locks.Holder(pid=1, host="h", purpose="p", since="s"))])
def _(data: bytes) -> None:
    descriptor = os.open(world().file("held", data), os.O_RDONLY)
    try:
        locks._read(descriptor)
    finally:
        os.close(descriptor)


# What QEMU says.

EVENT = b'{"timestamp":{"seconds":1764000000,"microseconds":5},"event":"SHUTDOWN","data":{"guest":true,"reason":"x"}}'


@decoder("line of the event journal", lambda: [EVENT])
def _(data: bytes) -> None:
    hold._event(data)


def _device_state() -> list[bytes]:
    """Of one processor, as QEMU describes it."""
    registers = [("env.regs", 8, 16), ("env.eip", 8, 1), ("env.eflags", 8, 1), ("env.kernelgsbase", 8, 1)]
    registers += [(f"env.cr[{number}]", 8, 1) for number in (0, 2, 3, 4)]
    registers += [("env.segs", 20, 6), *((f"env.{name}", 20, 1) for name in ("ldt", "tr", "gdt", "idt"))]
    fields = [{"name": name, "size": size, "array_len": count} for name, size, count in registers]
    device = {"name": "cpu", "instance_id": 0, "version": 12, "fields": fields}
    number = struct.pack(">I", 5)
    size = sum(size * count for _, size, count in registers)
    section = b"\4" + number + b"\3cpu" + struct.pack(">II", 0, 12) + bytes(size) + b"\x7e" + number
    text = json.dumps({"page_size": 4096, "devices": [device]}).encode()
    return [b"QEVM" + section + b"\x06" + struct.pack(">I", len(text)) + text]


@decoder("device state", _device_state, (IntegrityError,))
def _(data: bytes) -> None:
    """With the description's length put right."""
    with suppress(IntegrityError):
        vmstate.processors(data, "generation vm@1")
    head, separator, text = data.partition(b'{"page_size"')
    if separator and len(head) > 5:
        vmstate.processors(head[:-4] + struct.pack(">I", len(separator + text)) + separator + text, "generation vm@1")


class _Zeros:
    """A disk of 1 MiB with something in its middle."""

    size = 1 << 20

    def data(self, start: int, end: int) -> ranges.Extents:
        return ranges.intersect(ranges.normalise([(65536, 131072)]), ranges.normalise([(start, end)]))

    def read(self, start: int, end: int) -> bytes:
        return bytes(end - start)


def _nbd_client() -> list[bytes]:
    option = struct.Struct(">8sII").pack
    named = struct.pack(">I", 4) + b"root"
    meta = named + struct.pack(">II", 1, 15) + b"base:allocation"
    go = named + struct.pack(">H", 0)
    request = struct.Struct(">IHHQQI").pack
    said = struct.pack(">I", 3) + option(b"IHAVEOPT", 8, 0) + option(b"IHAVEOPT", 10, len(meta)) + meta
    said += option(b"IHAVEOPT", 3, 0) + option(b"IHAVEOPT", 7, len(go)) + go
    said += request(0x25609513, 0, 7, 1, 0, 1 << 20) + request(0x25609513, 0, 0, 2, 60000, 9000)
    return [said + request(0x25609513, 0, 3, 3, 0, 0) + request(0x25609513, 0, 2, 4, 0, 0)]


@decoder("NBD client", lambda: _nbd_client())
def _(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        ours.sendall(data[:65536])
        ours.shutdown(socket.SHUT_WR)
        theirs.settimeout(1)  # what is asked for is not read
        nbd_server.serve(theirs, {"root": _Zeros()}, lambda *_: None, lambda _: True)


def _nbd_server() -> list[bytes]:
    reply = struct.Struct(">QIII").pack
    magic = 0x3E889045565A9
    said = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
    said += reply(magic, 8, 1, 0)
    said += reply(magic, 10, 4, 19) + struct.pack(">I", 1) + b"base:allocation" + reply(magic, 10, 1, 0)
    said += reply(magic, 7, 3, 12) + struct.pack(">HQH", 0, 1 << 20, 3) + reply(magic, 7, 1, 0)
    chunk = struct.Struct(">IHHQI").pack
    said += chunk(0x668E33EF, 1, 5, 1, 12) + struct.pack(">III", 1, 1 << 20, 0)
    return [said + chunk(0x668E33EF, 1, 1, 2, 8 + 4096) + struct.pack(">Q", 0) + bytes(4096)]


@decoder("NBD server", _nbd_server, (VirtualMachineError,))
def _(data: bytes) -> None:
    path = world().root / "nbd.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        opened = _connecting(listener, path, data)
        with opened as export, open(world().root / "nbd.out", "w+b") as target:
            export.data(0, min(export.size, 1 << 20))
            export.read_into(target.fileno(), ranges.normalise([(0, 4096)]))


def _connecting(listener: socket.socket, path, data: bytes) -> nbd.Export:
    """Connected to somebody who has said everything already, and listens no more."""
    from threading import Thread

    def say() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass

    thread = Thread(target=say, daemon=True)
    thread.start()
    return nbd.Export("vm", path, "root")


# What a generation tells under its signature, and what people write.


def _described() -> bytes:
    description = Description(name="vm", memory=Size(1 << 29), extra=("-nic", "user,model=virtio-net-pci"))
    return json.dumps(recorded.encode(description)).encode()


def _document(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None


@decoder("description that a generation keeps", lambda: [_described()], (ConflictError,))
def _(data: bytes) -> None:
    recorded.decode(_document(data), "vm@1", "copy")


DISKS = b'{"disks":{"root":{"bitmap":"t","method":"bitmap","reason":null,"read_bytes":5}}}'


@decoder("disks that a generation tells of", lambda: [DISKS])
def _(data: bytes) -> None:
    document = _document(data)
    metadata = document if isinstance(document, dict) else {"disks": document}
    generation = SimpleNamespace(metadata=metadata, regions={"disk:root": None})
    found = token_of(generation, "root")
    assert found is None or isinstance(found, str)
    assert isinstance(reads_of(generation), dict)


ARGUMENTS = [
    b'-nic\nuser,model=e1000\n-device\n{"driver":"virtio-net-pci","mac":"52:54:00:00:00:01"}',
    b"-net\nnic,macaddr=52-54-00-12-34-56\n-device\nvirtio-net-pci,mac=52:54:00:12:34:57",
]


@decoder("network cards among arguments", lambda: ARGUMENTS, (PerdureError,))
def _(data: bytes) -> None:
    words = data.decode(errors="replace").split("\n")
    networks.with_new_addresses(words, "seed")
    networks.without_addresses(words)
