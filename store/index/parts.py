"""How runs stand in LMDB: parts, descriptors, the index's own state, each under a keyed MAC.

Private to this host and rebuilt when in doubt, so there is no format version to support but the present one: it is
part of every MAC, and anything else is a damaged index. Integers little-endian, in keys big-endian. Pure
functions, safe anywhere.

PART  database `parts`: two values, since most look-ups need only the first, and py-lmdb touches every page of a
value that it gives. n entries, as the descriptor says.
  key: run (8), number (4), 0
    offset size  field
         0  8*n  prefix: first 8 bytes of each id as a number
       8*n   16  MAC
  key: run (8), number (4), 1
         0 24*n  rest: the other bytes of each id
      24*n 12*n  location: pack (4), frame (4), slot (2), flags (2)
      36*n   16  MAC

RUN  database `runs`, key: "r", run (8)
         0    8  clean: it holds nothing of packs that were dropped up to this serial
         8    8  merge: number of the run being made in the merge it takes part in, 0 if none
        16    4  role: 0 at rest, 1 input of a merge, 2 output of a merge
        20    4  skip: entries of the first part that the merge is done with
        24    4  number of parts, p
        28    4  zero
        32 32*p  for each part: first prefix (8), last prefix (8), number of entries (4), number (4), tied (4), zero (4)
   32+32*p   16  MAC

STATE  database `runs`, key "state": next run (8), serial of the last drop (8), MAC (16)
DEAD   database `runs`, key "dead": dropped packs whose entries may not all be gone yet, ascending (4 each), MAC (16)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from store.index.runs import LOCATION, Columns, Locations, Packs, Prefixes

Buffer = bytes | memoryview

PART_ENTRIES = 47_100
"""Entries of a full part: with LMDB's page headers its values fill 92 and 414 pages, just under 2 MiB together. All
full parts being of one size, the space that one leaves another takes, and the file hardly fragments."""

PREFIX_BYTES, BODY_BYTES = 8, 36
MAC_BYTES = 16

_VERSION = b"perdure index 1 "
_PART_KEY = struct.Struct(">QIB")
_PREFIX, _BODY = 0, 1
_RUN_KEY = struct.Struct(">cQ")
_RUN = struct.Struct("<QQIIIxxxx")
_STATE = struct.Struct("<QQ")
_FENCE = np.dtype(
    [("first", "<u8"), ("last", "<u8"), ("entries", "<u4"), ("number", "<u4"), ("tied", "<u4"), ("zero", "<u4")]
)

STATE_KEY, DEAD_KEY, RUN_PREFIX = b"state", b"dead", b"r"
RUN_KEY_BYTES = _RUN_KEY.size


class DamagedValueError(Exception):
    """A value's MAC or length is wrong. The message names the value; the caller adds the file."""


class Role(IntEnum):
    """What a run is to a merge."""

    AT_REST = 0
    INPUT = 1
    OUTPUT = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A run's descriptor. `fences` has dtype _FENCE, one for each part.

    A part is `tied` if some of its entries share a prefix with each other or with the part before; else each query
    meets one entry at most, which makes look-ups simpler.
    """

    number: int
    clean: int
    fences: NDArray[np.void]
    merge: int = 0
    role: Role = Role.AT_REST
    skip: int = 0

    @property
    def entries(self) -> int:
        """Entries that count: without those that a merge has moved on."""
        return int(self.fences["entries"].sum(dtype=np.int64)) - self.skip

    def key(self) -> bytes:
        """Its key in the database `runs`."""
        return _RUN_KEY.pack(RUN_PREFIX, self.number)

    def prefix_key(self, at: int) -> bytes:
        """Key in the database `parts` of the prefix column of its part at a position."""
        return _PART_KEY.pack(self.number, self.fences["number"][at], _PREFIX)

    def body_key(self, at: int) -> bytes:
        """Key of the other columns of that part."""
        return _PART_KEY.pack(self.number, self.fences["number"][at], _BODY)

    def extended(self, columns: Columns) -> Run:
        """With one more part, which holds these entries, behind the others."""
        first, last = columns.prefix[0], columns.prefix[-1]
        number, tied = 0, bool((columns.prefix[1:] == columns.prefix[:-1]).any())
        if len(self.fences):
            number = int(self.fences["number"][-1]) + 1
            tied |= bool(self.fences["last"][-1] == first)
        fence = np.array([(first, last, len(columns), number, tied, 0)], _FENCE)
        return replace(self, fences=np.concatenate([self.fences, fence]))

    def trimmed(self, parts: int, skip: int) -> Run:
        """Without its first parts, and without the first entries of the one that is then the first."""
        return replace(self, fences=self.fences[parts:], skip=skip)


def new_run(number: int, clean: int, *, merge: int = 0, role: Role = Role.AT_REST) -> Run:
    """A run without parts."""
    return Run(number, clean, np.empty(0, _FENCE), merge, role)


@dataclass(frozen=True, slots=True)
class State:
    """Counters: the number of the next run, and the serial of the last drop of packs."""

    next_run: int = 1
    serial: int = 0


def encode_part(run: Run, columns: Columns, key: bytes) -> tuple[bytes, bytes]:
    """The values of a run's last part, which holds these entries: prefix column and body."""
    prefix = columns.prefix.astype("<u8", copy=False).tobytes()
    body = b"".join((columns.rest.tobytes(), columns.location.tobytes()))
    return _sealed(run.prefix_key(-1), prefix, key), _sealed(run.body_key(-1), body, key)


def decode_prefix(run: Run, at: int, value: Buffer | None, key: bytes, trusted: set[bytes]) -> Prefixes:
    """The prefix column of a part: a view, or a copy where the value is not aligned.

    `trusted` remembers the MACs of values that were found right, and these are not checked again. Raises
    DamagedValueError.
    """
    data = _checked(run, at, run.prefix_key(at), value, PREFIX_BYTES, key, trusted)
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def decode_body(
    run: Run, at: int, value: Buffer | None, key: bytes, trusted: set[bytes]
) -> tuple[NDArray[np.uint8], Locations]:
    """Rest (n, 24) and location columns of a part, as views. Raises DamagedValueError."""
    data = _checked(run, at, run.body_key(at), value, BODY_BYTES, key, trusted)
    edge = len(data) // BODY_BYTES * 24
    return np.frombuffer(data[:edge], np.uint8).reshape(-1, 24), np.frombuffer(data[edge:], LOCATION)


def decode_hints(run: Run, at: int, prefix: Buffer | None, body: Buffer | None) -> tuple[Prefixes, Locations]:
    """The prefix and location columns of a part, as views, for whoever proves what it finds with their help: MACs are
    not checked, so that 24 of 44 bytes are not even read. Raises DamagedValueError for a value of a wrong length."""
    first, second = _data(run, at, prefix, PREFIX_BYTES)[0], _data(run, at, body, BODY_BYTES)[0]
    locations = np.frombuffer(second[len(second) // BODY_BYTES * 24 :], LOCATION)
    return np.frombuffer(first, "<u8").astype(np.uint64, copy=False), locations


def encode_run(run: Run, key: bytes) -> bytes:
    """The value of a descriptor."""
    head = _RUN.pack(run.clean, run.merge, run.role, run.skip, len(run.fences))
    return _sealed(run.key(), head + run.fences.tobytes(), key)


def run_number(stored_key: bytes) -> int:
    """The number of the run whose descriptor stands under this key."""
    return int(_RUN_KEY.unpack(stored_key)[1])


def decode_run(number: int, value: bytes, key: bytes) -> Run:
    """A descriptor from its value. Raises DamagedValueError."""
    data = _opened(_RUN_KEY.pack(RUN_PREFIX, number), value, key)
    if len(data) < _RUN.size or (len(data) - _RUN.size) % _FENCE.itemsize:
        raise DamagedValueError(f"run {number}: its descriptor has {len(data)} bytes")
    clean, merge, role, skip, _ = _RUN.unpack_from(data)
    if role not in Role.__members__.values():
        raise DamagedValueError(f"run {number}: has role {role}")
    return Run(number, clean, np.frombuffer(data, _FENCE, -1, _RUN.size), merge, Role(role), skip)


def encode_state(state: State, key: bytes) -> bytes:
    """The value under STATE_KEY."""
    return _sealed(STATE_KEY, _STATE.pack(state.next_run, state.serial), key)


def decode_state(value: bytes | None, key: bytes) -> State:
    """State from its value; that of an empty index from None. Raises DamagedValueError."""
    if value is None:
        return State()
    data = _opened(STATE_KEY, value, key)
    if len(data) != _STATE.size:
        raise DamagedValueError(f"value of the state: has {len(data)} bytes")
    return State(*_STATE.unpack(data))


def encode_dead(dead: Packs, key: bytes) -> bytes:
    """The value under DEAD_KEY: packs, ascending."""
    return _sealed(DEAD_KEY, dead.astype("<u4").tobytes(), key)


def decode_dead(value: bytes | None, key: bytes) -> Packs:
    """Dropped packs, ascending, from their value; none from None. Raises DamagedValueError."""
    data = b"" if value is None else _opened(DEAD_KEY, value, key)
    if len(data) % 4:
        raise DamagedValueError(f"list of dropped packs: has {len(data)} bytes")
    return np.frombuffer(data, "<u4").astype(np.uint32)


def _checked(
    run: Run, at: int, name: bytes, value: Buffer | None, entry_bytes: int, key: bytes, trusted: set[bytes]
) -> memoryview:
    """The data of a part's value if it is what was stored."""
    data, mac = _data(run, at, value, entry_bytes)
    if mac not in trusted:
        if mac != _mac(name, data, key):
            raise DamagedValueError(f"run {run.number}, part {at}: is not what was stored")
        trusted.add(mac)
    return data


def _data(run: Run, at: int, value: Buffer | None, entry_bytes: int) -> tuple[memoryview, bytes]:
    """The data of a part's value, and its MAC."""
    if value is None:
        raise DamagedValueError(f"run {run.number}, part {at}: is missing")
    view = memoryview(value)
    data, mac = view[:-MAC_BYTES], bytes(view[-MAC_BYTES:])
    if len(data) != int(run.fences["entries"][at]) * entry_bytes:
        raise DamagedValueError(f"run {run.number}, part {at}: has {len(view)} bytes")
    return data, mac


def _sealed(name: bytes, data: bytes, key: bytes) -> bytes:
    return b"".join((data, _mac(name, data, key)))


def _opened(name: bytes, value: bytes, key: bytes) -> bytes:
    data, mac = value[:-MAC_BYTES], value[-MAC_BYTES:]
    if mac != _mac(name, data, key):
        raise DamagedValueError(f"value {name.hex()}: is not what was stored")
    return data


def _mac(name: bytes, data: Buffer, key: bytes) -> bytes:
    """Binds a value to its key in the database, so that none can stand in for another."""
    hasher = blake3(_VERSION + struct.pack("<IQ", len(name), len(data)) + name, key=key)
    return hasher.update(data).digest(MAC_BYTES)
