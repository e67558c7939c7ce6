"""How runs stand in LMDB: parts, descriptors, the index's own state, each under a keyed MAC.

Private to this host and rebuilt when in doubt, so there is no format version to support but the present one: it is
part of every MAC, and anything else is a damaged index. Integers little-endian, in keys big-endian. Pure
functions, safe anywhere; arrays of a decoded part are views of the caller's buffer.

PART  database `parts`, key: run (8), number (4)
    offset size  field
         0    4  number of entries, n
         4    4  zero
         8   16  MAC of the prefix column
        24   16  MAC of the rest column
        40   16  MAC of the location column
        56  8*n  prefix: first 8 bytes of each id as a number
   56+8*n  24*n  rest of each id
  56+32*n  12*n  location: pack (4), frame (4), slot (2), flags (2)

RUN  database `runs`, key: "r", run (8)
         0    8  clean: it holds nothing of packs that were dropped up to this serial
         8    8  merge: number of the run being made in the merge it takes part in, 0 if none
        16    4  role: 0 at rest, 1 input of a merge, 2 output of a merge
        20    4  skip: entries of the first part that the merge is done with
        24    4  number of parts, p
        28    4  zero
        32 24*p  for each part: first prefix (8), last prefix (8), number of entries (4), number (4)
   32+24*p   16  MAC

STATE  database `runs`, key "state": next run (8), serial of the last drop (8), MAC (16)
DEAD   database `runs`, key "dead": for each dropped pack, ascending: pack (4), zero (4), serial (8); MAC (16)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from store.runs import LOCATION, Columns, Packs

PART_ENTRIES = 47_660
"""Entries of a full part: with LMDB's page header it fills 512 pages, 2 MiB, to the last 40 bytes. All full parts
being of one size, the space that one leaves another takes, and the file hardly fragments."""

MAC_BYTES = 16
PART_HEADER = 8 + 3 * MAC_BYTES
ENTRY_BYTES = 44

_VERSION = b"perdure index 1 "
_PART_KEY = struct.Struct(">QI")
_PART_CONTEXT = struct.Struct("<QIIB")
_RUN_KEY = struct.Struct(">cQ")
_RUN = struct.Struct("<QQIIIxxxx")
_STATE = struct.Struct("<QQ")
_FENCE = np.dtype([("first", "<u8"), ("last", "<u8"), ("entries", "<u4"), ("number", "<u4")])
_DEAD = np.dtype([("pack", "<u4"), ("zero", "<u4"), ("serial", "<u8")])

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
    """A run's descriptor. `fences` has dtype _FENCE: first and last prefix, entries and number of each part."""

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

    def part_key(self, at: int) -> bytes:
        """Key in the database `parts` of its part at a position."""
        return _PART_KEY.pack(self.number, int(self.fences["number"][at]))

    def extended(self, columns: Columns) -> Run:
        """With one more part, which holds these entries, behind the others."""
        number = int(self.fences["number"][-1]) + 1 if len(self.fences) else 0
        fence = np.array([(columns.prefix[0], columns.prefix[-1], len(columns), number)], _FENCE)
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


@dataclass(frozen=True, slots=True)
class Dead:
    """Packs that were dropped, ascending and unique, each with the serial of its drop."""

    packs: Packs
    serials: NDArray[np.uint64]

    def with_more(self, packs: Packs, serial: int) -> Dead:
        """With these packs too."""
        fresh = np.setdiff1d(packs, self.packs)
        everything = np.concatenate([self.packs, fresh])
        serials = np.concatenate([self.serials, np.full(len(fresh), serial, np.uint64)])
        order = np.argsort(everything)
        return Dead(everything[order], serials[order])

    def after(self, serial: int) -> Dead:
        """Those that were dropped later than this."""
        keep = self.serials > serial
        return Dead(self.packs[keep], self.serials[keep])


NONE_DEAD = Dead(np.empty(0, np.uint32), np.empty(0, np.uint64))


class Part:
    """A stored part whose columns are checked when they are first asked for. Lives as long as its buffer does.

    `trusted` remembers, per process, the MACs that were found right; pass the same set for parts of one run.
    Raises DamagedValueError.
    """

    __slots__ = ("_entries", "_key", "_number", "_run", "_trusted", "_value")

    def __init__(self, value: memoryview | None, run: Run, at: int, key: bytes, trusted: set[bytes]) -> None:
        fence = run.fences[at]
        self._run, self._number, self._entries = run.number, int(fence["number"]), int(fence["entries"])
        if value is None:
            raise DamagedValueError(f"run {self._run}, part {self._number}: is missing")
        self._value, self._key, self._trusted = value, key, trusted
        if len(value) != PART_HEADER + ENTRY_BYTES * self._entries:
            raise DamagedValueError(f"run {self._run}, part {self._number}: has {len(value)} bytes")

    def __len__(self) -> int:
        return self._entries

    def prefix(self) -> NDArray[np.uint64]:
        """The prefix column: a view, or a copy where the value is not aligned."""
        return np.frombuffer(self._column(0), "<u8").astype(np.uint64, copy=False)

    def rest(self) -> NDArray[np.uint8]:
        """The rest column (n, 24), a view."""
        return np.frombuffer(self._column(1), np.uint8).reshape(-1, 24)

    def location(self) -> NDArray[np.void]:
        """The location column, a view."""
        return np.frombuffer(self._column(2), LOCATION)

    def columns(self) -> Columns:
        """All three."""
        return Columns(self.prefix(), self.rest(), self.location())

    def _column(self, column: int) -> memoryview:
        start = PART_HEADER + (0, 8, 32)[column] * self._entries
        data = self._value[start : start + (8, 24, 12)[column] * self._entries]
        stored = bytes(self._value[8 + column * MAC_BYTES : 8 + (column + 1) * MAC_BYTES])
        if stored not in self._trusted:
            if stored != _part_mac(self._key, self._run, self._number, column, data):
                raise DamagedValueError(
                    f"run {self._run}, part {self._number}, column {column}: is not what was stored"
                )
            self._trusted.add(stored)
        return data


def encode_part(run: Run, columns: Columns, key: bytes) -> bytearray:
    """The value of a run's last part, which holds these entries."""
    number = int(run.fences["number"][-1])
    count = len(columns)
    value = bytearray(PART_HEADER + ENTRY_BYTES * count)
    view = memoryview(value)
    struct.pack_into("<I", value, 0, count)
    start = PART_HEADER
    np.frombuffer(view[start : start + 8 * count], "<u8")[:] = columns.prefix
    np.frombuffer(view[start + 8 * count : start + 32 * count], np.uint8).reshape(-1, 24)[:] = columns.rest
    np.frombuffer(view[start + 32 * count :], LOCATION)[:] = columns.location
    edges = (start, start + 8 * count, start + 32 * count, start + 44 * count)
    for column in range(3):
        mac = _part_mac(key, run.number, number, column, view[edges[column] : edges[column + 1]])
        value[8 + column * MAC_BYTES : 8 + (column + 1) * MAC_BYTES] = mac
    return value


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
    clean, merge, role, skip, _ = _RUN.unpack_from(data)
    return Run(number, clean, np.frombuffer(data, _FENCE, -1, _RUN.size), merge, Role(role), skip)


def encode_state(state: State, key: bytes) -> bytes:
    """The value under STATE_KEY."""
    return _sealed(STATE_KEY, _STATE.pack(state.next_run, state.serial), key)


def decode_state(value: bytes | None, key: bytes) -> State:
    """State from its value; that of an empty index from None. Raises DamagedValueError."""
    return State() if value is None else State(*_STATE.unpack(_opened(STATE_KEY, value, key)))


def encode_dead(dead: Dead, key: bytes) -> bytes:
    """The value under DEAD_KEY."""
    rows = np.zeros(len(dead.packs), _DEAD)
    rows["pack"], rows["serial"] = dead.packs, dead.serials
    return _sealed(DEAD_KEY, rows.tobytes(), key)


def decode_dead(value: bytes | None, key: bytes) -> Dead:
    """Dropped packs from their value; none from None. Raises DamagedValueError."""
    if value is None:
        return NONE_DEAD
    rows = np.frombuffer(_opened(DEAD_KEY, value, key), _DEAD)
    return Dead(rows["pack"].astype(np.uint32), rows["serial"].astype(np.uint64))


def _part_mac(key: bytes, run: int, number: int, column: int, data: memoryview) -> bytes:
    hasher = blake3(_VERSION + b"part " + _PART_CONTEXT.pack(run, number, len(data), column), key=key)
    return hasher.update(data).digest(MAC_BYTES)


def _sealed(name: bytes, data: bytes, key: bytes) -> bytes:
    return data + _value_mac(name, data, key)


def _opened(name: bytes, value: bytes, key: bytes) -> bytes:
    data, mac = value[:-MAC_BYTES], value[-MAC_BYTES:]
    if mac != _value_mac(name, data, key):
        raise DamagedValueError(f"value {name.hex()}: is not what was stored")
    return data


def _value_mac(name: bytes, data: bytes, key: bytes) -> bytes:
    context = _VERSION + b"value" + struct.pack("<HQ", len(name), len(data)) + name
    return blake3(context + data, key=key).digest(MAC_BYTES)
