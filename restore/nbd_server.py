"""An NBD server for disks that nobody may write: newstyle negotiation, structured replies, where there is data.

`serve` answers one connection to its end, in the caller's thread. What a client sends is checked; a client that breaks
the protocol loses its connection. A disk whose content cannot be had just now holds its reader: the request is tried
again until it can, and is never answered with zeros or an error. QEMU would pass an error on to the guest; one that
waits goes on when what is missing is back.

Source: the NBD protocol, doc/proto.md of the NetworkBlockDevice project.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from base import extents as ranges
from base.errors import PerdureError
from base.extents import Extents

REQUEST_BYTES_MAX = 32 << 20
"""Of one read: what the specification says that every server should take."""
_STATUS_BYTES_MAX = 1 << 30
_OPTION_BYTES_MAX = 64 << 10
_RETRY_SECONDS = 1.0

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_HAS_FLAGS, _READ_ONLY, _MULTI_CONNECTION = 1, 2, 1 << 8
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO, _STRUCTURED, _LIST_META, _SET_META = 1, 2, 3, 6, 7, 8, 9, 10
_ACK, _SERVER, _REP_INFO, _META = 1, 2, 3, 4
_UNSUPPORTED, _INVALID, _UNKNOWN = (1 << 31) + 1, (1 << 31) + 3, (1 << 31) + 6
_READ, _WRITE, _DISCONNECT, _FLUSH, _CACHE, _BLOCK_STATUS = 0, 1, 2, 3, 5, 7
_REQUEST_ONE, _DONE = 1 << 3, 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 0, 1, 2, 5, (1 << 15) + 1
_HOLE_AND_ZERO = 3
_ALLOCATION, _CONTEXT = b"base:allocation", 1


T = TypeVar("T")
"""What is looked for."""


class Disk(Protocol):
    """The content of one export. `size` in bytes. Called by several threads."""

    size: int

    def data(self, start: int, end: int) -> Extents:
        """What of [start, end) may be other than zero, in bytes."""

    def read(self, start: int, end: int) -> bytes:
        """The content of [start, end). Both raise PerdureError: it is asked for again."""


class _BrokenError(Exception):
    """The client does not keep to the protocol, or has gone."""


Held = Callable[[str, PerdureError | None], None]
"""Told of an export's name and why its readers are held; None when they go on."""


def serve(connection: socket.socket, disks: Mapping[str, Disk], held: Held, leave: Callable[[float], bool]) -> None:
    """Answer one client until it disconnects; closes the connection.

    `leave(seconds)` waits for at most so long, and gives True when the server is to end.
    """
    with connection:
        try:
            found = _Negotiation(connection, disks).run()
            if found is not None:
                name, structured, contexts = found
                _Transmission(connection, name, disks[name], structured, contexts, held, leave).run()
        except (_BrokenError, struct.error, OSError):
            return


class _Negotiation:
    def __init__(self, connection: socket.socket, disks: Mapping[str, Disk]) -> None:
        self._connection, self._disks = connection, disks
        self._structured = self._contexts = False

    def run(self) -> tuple[str, bool, bool] | None:
        """Name of the export, whether replies are structured, whether block status may be asked for."""
        self._connection.sendall(_GREETING.pack(_MAGIC, _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES))
        [flags] = struct.unpack(">I", _receive(self._connection, 4))
        while True:
            magic, option, length = _OPTION.unpack(_receive(self._connection, _OPTION.size))
            if magic != _OPTION_MAGIC or length > _OPTION_BYTES_MAX:
                raise _BrokenError
            data = _receive(self._connection, length)
            if option == _EXPORT_NAME:
                name = data.decode(errors="replace")
                if name not in self._disks:
                    raise _BrokenError
                head = struct.pack(">QH", self._disks[name].size, _transmission_flags())
                self._connection.sendall(head if flags & _NO_ZEROES else head + bytes(124))
                return name, self._structured, False
            if option == _ABORT:
                self._reply(option, _ACK)
                return None
            chosen = self._answer(option, data)
            if chosen is not None:
                return chosen, self._structured, self._contexts

    def _answer(self, option: int, data: bytes) -> str | None:
        """Answer one option; the name of the export that it begins with, if it does."""
        if option == _STRUCTURED:
            self._structured = True
            self._reply(option, _ACK)
        elif option == _LIST:
            for name in self._disks:
                self._reply(option, _SERVER, _named(name))
            self._reply(option, _ACK)
        elif option in (_INFO, _GO):
            name, _ = _name_in(data)
            if name not in self._disks:
                self._reply(option, _UNKNOWN, f"there is no disk {name} here".encode())
                return None
            size = self._disks[name].size
            self._reply(option, _REP_INFO, struct.pack(">HQH", 0, size, _transmission_flags()))
            self._reply(option, _REP_INFO, struct.pack(">HIII", 3, 1, 64 << 10, REQUEST_BYTES_MAX))
            self._reply(option, _ACK)
            return name if option == _GO else None
        elif option in (_LIST_META, _SET_META):
            self._meta(option, data)
        else:
            self._reply(option, _UNSUPPORTED)
        return None

    def _meta(self, option: int, data: bytes) -> None:
        name, rest = _name_in(data)
        if name not in self._disks:
            self._reply(option, _UNKNOWN, f"there is no disk {name} here".encode())
            return
        [count] = struct.unpack_from(">I", rest)
        queries, at = [], 4
        for _ in range(count):
            if at + 4 > len(rest):
                raise _BrokenError
            [length] = struct.unpack_from(">I", rest, at)
            queries.append(rest[at + 4 : at + 4 + length])
            at += 4 + length
        wanted = _ALLOCATION in queries or b"base:" in queries or (option == _LIST_META and not queries)
        if option == _SET_META:
            self._contexts = wanted and self._structured
        if wanted:
            self._reply(option, _META, struct.pack(">I", _CONTEXT) + _ALLOCATION)
        self._reply(option, _ACK)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._connection.sendall(_OPTION_REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data)


class _Transmission:
    def __init__(
        self,
        connection: socket.socket,
        name: str,
        disk: Disk,
        structured: bool,
        contexts: bool,
        held: Held,
        leave: Callable[[float], bool],
    ) -> None:
        self._connection, self._name, self._disk = connection, name, disk
        self._structured, self._contexts = structured, contexts
        self._held, self._leave = held, leave

    def run(self) -> None:
        """Requests, one after the other."""
        while True:
            magic, flags, kind, cookie, start, length = _REQUEST.unpack(_receive(self._connection, _REQUEST.size))
            if magic != _REQUEST_MAGIC or kind in (_WRITE, _DISCONNECT):
                return
            within = start <= self._disk.size and length <= self._disk.size - start
            if kind == _READ and within and length <= REQUEST_BYTES_MAX:
                self._read(cookie, start, start + length)
            elif kind == _BLOCK_STATUS and self._contexts and within and length:
                self._status(cookie, start, min(start + length, start + _STATUS_BYTES_MAX), bool(flags & _REQUEST_ONE))
            elif kind in (_FLUSH, _CACHE):
                self._done(cookie)
            else:
                code = errno.EINVAL if kind in (_READ, _BLOCK_STATUS) else errno.EPERM
                self._fail(cookie, code)

    def _read(self, cookie: int, start: int, end: int) -> None:
        if not self._structured:
            data = self._had(lambda: self._disk.read(start, end))
            self._connection.sendall(_SIMPLE.pack(_SIMPLE_MAGIC, 0, cookie) + data)
            return
        there = self._had(lambda: self._disk.data(start, end))
        pieces = list(_pieces(there, start, end))
        for at, (first, last, is_data) in enumerate(pieces):
            flags = _DONE if at == len(pieces) - 1 else 0
            if is_data:
                data = self._had(lambda: self._disk.read(first, last))  # noqa: B023  # used up in this turn
                head = _CHUNK.pack(_CHUNK_MAGIC, flags, _CHUNK_DATA, cookie, 8 + len(data))
                self._connection.sendall(head + struct.pack(">Q", first) + data)
            else:
                head = _CHUNK.pack(_CHUNK_MAGIC, flags, _CHUNK_HOLE, cookie, 12)
                self._connection.sendall(head + struct.pack(">QI", first, last - first))
        if not pieces:
            self._done(cookie)

    def _status(self, cookie: int, start: int, end: int, one: bool) -> None:
        there = self._had(lambda: self._disk.data(start, end))
        rows = [(last - first, 0 if is_data else _HOLE_AND_ZERO) for first, last, is_data in _pieces(there, start, end)]
        content = struct.pack(">I", _CONTEXT) + b"".join(struct.pack(">II", *row) for row in rows[: 1 if one else None])
        self._connection.sendall(_CHUNK.pack(_CHUNK_MAGIC, _DONE, _CHUNK_STATUS, cookie, len(content)) + content)

    def _had(self, look: Callable[[], T]) -> T:
        """What `look` gives, as soon as it gives something."""
        waits = False
        while True:
            try:
                found = look()
            except PerdureError as error:
                self._held(self._name, error)
                waits = True
                if self._leave(_RETRY_SECONDS):
                    raise _BrokenError from error
            else:
                if waits:
                    self._held(self._name, None)
                return found

    def _done(self, cookie: int) -> None:
        if self._structured:
            self._connection.sendall(_CHUNK.pack(_CHUNK_MAGIC, _DONE, _CHUNK_NONE, cookie, 0))
        else:
            self._connection.sendall(_SIMPLE.pack(_SIMPLE_MAGIC, 0, cookie))

    def _fail(self, cookie: int, code: int) -> None:
        if self._structured:
            content = struct.pack(">IH", code, 0)
            self._connection.sendall(_CHUNK.pack(_CHUNK_MAGIC, _DONE, _CHUNK_ERROR, cookie, len(content)) + content)
        else:
            self._connection.sendall(_SIMPLE.pack(_SIMPLE_MAGIC, code, cookie))


def _pieces(there: Extents, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """[start, end) cut into (first, last, whether there is data), in order."""
    at = start
    for first, last in ranges.intersect(there, ranges.normalise([(start, end)])).tolist():
        if at < first:
            yield at, first, False
        yield first, last, True
        at = last
    if at < end:
        yield at, end, False


def _transmission_flags() -> int:
    return _HAS_FLAGS | _READ_ONLY | _MULTI_CONNECTION


def _named(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack(">I", len(encoded)) + encoded


def _name_in(data: bytes) -> tuple[str, bytes]:
    """A counted name at the beginning of an option's data, and the rest."""
    if len(data) < 6:
        raise _BrokenError
    [length] = struct.unpack_from(">I", data)
    if 4 + length + 2 > len(data):
        raise _BrokenError
    return data[4 : 4 + length].decode(errors="replace"), data[4 + length :]


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise _BrokenError
        view = view[got:]
    return bytes(data)
