"""Reading a disk that QEMU exports over NBD on a Unix socket: its size, where it holds data, what a dirty bitmap of it
says, its content.

A client of one export, read-only, for one thread at a time; one request is under way at any moment. What a server
sends is checked against what was asked: QEMU is trusted, but an answer that is cut short must not become zeros.

An instant that QEMU keeps (copy-before-write, snapshot-access) is asked for in a way that QEMU 7.2 answers rightly:
there, whether what was copied before the guest overwrote it is zeros is answered from the disk as it is by now, if a
request begins in that and goes beyond its end; reads were seen to be wrong just where the answer was that it is. So
what the guest has zeroed since then counted as zero. A request within one of the clusters in which QEMU copies is
answered rightly. So what lies in the file of the copies counts as data, and is asked for by cluster, after everything
else: what was copied later than that had been read before.

Source: the NBD protocol, doc/proto.md of the NetworkBlockDevice project: fixed newstyle negotiation, structured
replies, meta context base:allocation. QEMU, docs/interop/nbd.txt: meta context qemu:dirty-bitmap.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from base import extents as ranges
from base.errors import VirtualMachineError
from base.extents import Extents

_SECONDS = 60
"""For any single answer: a disk may be slow, and a guest busy."""
_READ_BYTES_MAX = 4 << 20
_RECEIVE_BYTES_MAX = 64 << 20
"""Of one piece of an answer: QEMU tells of at most 2 ** 20 extents, of 8 bytes, and gives no more than was asked."""
_STATUS_BYTES_MAX = 1 << 30
_CLUSTER = 64 << 10
"""Of copy-before-write; a multiple of it where the file of the copies has larger ones, which a raw file has not."""

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_EXPORT_INFO = struct.Struct(">HQH")
_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR = 1, 3, 4, 1 << 31
_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7
_DONE = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 0, 1, 2, 5, 1 << 15
_STATUS_ZERO, _STATUS_DIRTY = 2, 1
_ALLOCATION = "base:allocation"
_BITMAP = "qemu:dirty-bitmap:"


class Export:
    """A connection to one export; a context manager. Attributes: `vm`, `name`, `size` (bytes)."""

    def __init__(self, vm: str, path: Path, name: str, bitmap: str | None = None, copies: Path | None = None) -> None:
        """`vm` is for messages; `bitmap` names the one that is exported with it, if one is; `copies` is the file to
        which QEMU copies what the guest is about to overwrite, if this is an instant that it keeps.

        Raises VirtualMachineError if there is no such export, or it lacks what is needed.
        """
        self.vm, self.name, self._copies = vm, name, copies
        self._bitmap = None if bitmap is None else _BITMAP + bitmap
        self._cookie = 0
        self._contexts: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_SECONDS)
            with self._errors():
                self._socket.connect(str(path))
                self.size = self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def data(self, start: int, end: int) -> Extents:
        """What of [start, end) may be other than zero, in bytes. Raises VirtualMachineError."""
        found = self._where(_ALLOCATION, start, end, lambda flags: not flags & _STATUS_ZERO)
        return ranges.union(found, self._copied(start, end))  # in this order

    def written(self, start: int, end: int) -> Extents:
        """What of [start, end) is set in the bitmap, in bytes. Raises VirtualMachineError."""
        assert self._bitmap is not None
        return self._where(self._bitmap, start, end, lambda flags: bool(flags & _STATUS_DIRTY))

    def _where(self, context: str, start: int, end: int, counts: Callable[[int], bool]) -> Extents:
        rows: list[tuple[int, int]] = []
        with self._errors():
            while start < end:
                asked = min(end - start, _STATUS_BYTES_MAX)
                at = start
                for length, flags in self._status(context, start, asked):
                    if counts(flags):
                        rows.append((at, min(at + length, end)))
                    at += length
                if at <= start:
                    raise self._broken(f"it says nothing of {context}")
                start = at
        return ranges.normalise(rows)

    def read_into(self, descriptor: int, extents: Extents) -> None:
        """Copy ranges into a file, to the same offsets. Raises VirtualMachineError, OSError of the file."""
        if not len(extents):
            return
        self._read_pieces(descriptor, extents, _READ_BYTES_MAX)
        copied = self._copied(int(extents[0, 0]), int(extents[-1, 1]))
        self._read_pieces(descriptor, ranges.intersect(extents, copied), _CLUSTER)

    def _read_pieces(self, descriptor: int, extents: Extents, size: int) -> None:
        """By requests that do not go beyond a multiple of `size`."""
        for start, end in extents.tolist():
            while start < end:
                length = min(size - start % size, end - start)
                with self._errors():
                    data = self._read(start, length)
                view, at = memoryview(data), start
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
                start += length

    def _copied(self, start: int, end: int) -> Extents:
        """What of [start, end) QEMU has copied by now, other than zeros, in whole clusters."""
        if self._copies is None:
            return ranges.EMPTY
        first = start - start % _CLUSTER
        with self._errors(), self._copies.open("rb") as file:
            found = ranges.widen(ranges.resident(file.fileno(), end, first), _CLUSTER)
        return ranges.intersect(found, ranges.normalise([(start, end)]))

    def _negotiate(self) -> int:
        magic, options, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, options) != (_MAGIC, _OPTION_MAGIC) or not flags & _FIXED_NEWSTYLE:
            raise self._broken("what answers is no NBD server of this century")
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES))
        list(self._option(_OPT_STRUCTURED_REPLY, b""))
        name = self.name.encode()
        named = struct.pack(">I", len(name)) + name
        contexts = [_ALLOCATION, *([] if self._bitmap is None else [self._bitmap])]
        wanted = named + struct.pack(">I", len(contexts))
        for each in contexts:
            wanted += struct.pack(">I", len(each)) + each.encode()
        for kind, data in self._option(_OPT_SET_META_CONTEXT, wanted):
            if kind == _REP_META_CONTEXT:
                self._contexts[data[4:].decode(errors="replace")] = int.from_bytes(data[:4], "big")
        if sorted(self._contexts) != sorted(contexts):
            raise self._broken(f"it does not tell of {' and '.join(contexts)}")
        told = [data for kind, data in self._option(_OPT_GO, named + struct.pack(">H", 0)) if kind == _REP_INFO]
        sizes = [int(_EXPORT_INFO.unpack(data)[1]) for data in told if data[:2] == b"\0\0"]
        if len(sizes) != 1:
            raise self._broken("it does not tell its size")
        return sizes[0]

    def _option(self, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The replies to an option before its acknowledgement, as (type, data)."""
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        while True:
            magic, answered, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            content = self._receive(length)
            if magic != _REPLY_MAGIC or answered != option:
                raise self._broken("its answer to an option makes no sense")
            if kind & _REP_ERROR:
                raise self._broken(content.decode(errors="replace") or f"it refuses option {option}")
            if kind == _REP_ACK:
                return
            yield kind, content

    def _status(self, context: str, start: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for kind, content in self._request(_BLOCK_STATUS, start, length):
            if kind == _CHUNK_STATUS and int.from_bytes(content[:4], "big") == self._contexts[context]:
                found += struct.iter_unpack(">II", content[4:])
        return found

    def _read(self, start: int, length: int) -> bytearray:
        data, received = bytearray(length), 0
        for kind, content in self._request(_READ, start, length):
            if kind == _CHUNK_DATA:
                at = struct.unpack_from(">Q", content)[0] - start
                piece = memoryview(content)[8:]
            elif kind == _CHUNK_HOLE:
                offset, count = struct.unpack(">QI", content)
                at, piece = offset - start, memoryview(bytes(min(count, length + 1)))
            else:
                continue
            if not 0 <= at <= length - len(piece):
                raise self._broken("it sends what was not asked for")
            data[at : at + len(piece)] = piece
            received += len(piece)
        if received != length:
            raise self._broken(f"{received} of {length} bytes at {start} were sent")
        return data

    def _request(self, command: int, start: int, length: int) -> Iterator[tuple[int, bytes]]:
        """The chunks of the answer, as (type, content)."""
        self._cookie += 1
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, start, length))
        done = False
        while not done:
            magic, flags, kind, cookie, size = _CHUNK.unpack(self._receive(_CHUNK.size))
            content = self._receive(size)
            if magic != _CHUNK_MAGIC or cookie != self._cookie:
                raise self._broken("its answer to a request makes no sense")
            if kind & _CHUNK_ERROR:
                code = struct.unpack_from(">I", content)[0]
                raise self._broken(
                    f"{length} bytes at {start} cannot be read as they were ({os.strerror(code)}): is there room in "
                    "the runtime folder for what the guest overwrites?"
                )
            done = bool(flags & _DONE)
            yield kind, content

    def _receive(self, count: int) -> bytes:
        if count > _RECEIVE_BYTES_MAX:
            raise self._broken(f"it sends {count} bytes at once")
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise self._broken("the connection ended")
            view = view[got:]
        return bytes(data)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._broken(error.strerror or str(error) or "no answer in time") from error
        except struct.error as error:
            raise self._broken("its answer is cut short") from error

    def _broken(self, problem: str) -> VirtualMachineError:
        return VirtualMachineError(f"VM {self.vm}: disk {self.name}: {problem}")
