"""The guest channel's protocol, version 1: every message, limit and encoding of it. Pure functions, safe anywhere.

JSON lines in UTF-8 over a virtio-serial port. Guest to host, `id` chosen by the requester:

    {"v":1,"id":N,"do":"hello","boot_id":"text","agent":"version"}
    {"v":1,"id":N,"do":"mark","address":A,"size":S,"name":null|"text","owner":"text"}
    {"v":1,"id":N,"do":"unmark","address":A,"size":S}
    {"v":1,"id":N,"do":"query"}                        with "from":A, entries from that address on
    {"v":1,"id":N,"do":"checkpoint","name":null|"text"}
    {"v":1,"id":N,"do":"frozen","token":T,"count":C,"error":null|"text"}     an event `freeze` has been acted on

Host to guest, exactly one reply to each request, and events:

    {"v":1,"id":N,"ok":true}                           mark, unmark, frozen
    {"v":1,"id":N,"ok":true,"regions":[...],"next":A|null}                         query
    {"v":1,"id":N,"ok":true,"vm":"demo","restored":N|null,"regions":[...],"next":A|null}   hello
    {"v":1,"id":N,"ok":true,"generation":N,"generation_id":"hex"}                  checkpoint, after the commit
    {"v":1,"id":N,"ok":false,"error":"one line","kind":"bounds|overlap|..."}
    {"v":1,"event":"resumed","generation":N}           its persistent memory is that generation's
    {"v":1,"event":"resumed","generation":N,"seed":"hex","time":T}     so are all memory and devices: it must take
                                                       new random numbers, and the time (seconds since 1970)
              ..."vm":"name","addresses":[["old","new"],...]}   and what the VM and its network cards are called now
    {"v":1,"event":"freeze","token":T,"seconds":S}     freeze what file systems are on disks, for S seconds at most
    {"v":1,"event":"thaw"}                             let them go on

A listing that does not fit one line is cut: `next` is then the address to ask `from`. What is not a request at
all is answered with id 0. Empty lines mean nothing: each side sends one when it starts, so that half a line left
by its predecessor ends there. Unknown fields are ignored, an unknown `do` or `v` is `unsupported`.

What a guest sends is never trusted: `decode_request` gives a request of the right types or raises
RequestRefusedError, whatever the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from base.errors import PerdureError

VERSION = 1
PORT_NAME = "org.perdure.agent.0"
LINE_BYTES_MAX = 65536
"""Bytes of a line, newline included, in both directions."""
TAGS_MAX = 4096
NAME_CHARACTERS_MAX = 128
SEED_BYTES = 64
"""Random bytes for a guest that goes on from an instant from which it may go on more than once."""
REQUESTS_PER_SECOND = 200
REQUEST_BURST = 20
"""Requests that are served at once after a quiet time, before the rate holds them back."""
REQUEST_ID_MAX = (1 << 53) - 1
"""Largest integer that every JSON implementation keeps exactly."""
ERROR_CHARACTERS_MAX = 400

_LISTING_BYTES_MAX = LINE_BYTES_MAX - 4096  # the rest of the line is for the envelope

Kind = Literal["bounds", "overlap", "alignment", "limit", "malformed", "unsupported", "failed"]
Mode = Literal["devdax", "fsdax", "raw"]


class RequestRefusedError(PerdureError):
    """A request is not carried out, and the requester may know why.

    Attributes: `kind` (of the protocol), `request` (id of the request, 0 if it has none that can be read).
    """

    def __init__(self, kind: Kind, problem: str, *, request: int = 0) -> None:
        self.kind: Kind = kind
        self.request = request
        super().__init__(problem)


class Hello(msgspec.Struct, frozen=True, tag_field="do", tag="hello"):
    """The agent is there: since `boot_id` (of the kernel), in version `agent`."""

    id: int
    boot_id: str = ""
    agent: str = ""


class Mark(msgspec.Struct, frozen=True, tag_field="do", tag="mark"):
    """Make [address, address + size) of guest-physical memory persistent."""

    id: int
    address: int
    size: int
    name: str | None = None
    owner: str = ""


class Unmark(msgspec.Struct, frozen=True, tag_field="do", tag="unmark"):
    """Make [address, address + size) volatile again."""

    id: int
    address: int
    size: int


class Query(msgspec.Struct, frozen=True, tag_field="do", tag="query"):
    """List what is persistent or reserved, from an address on."""

    id: int
    start: int | None = msgspec.field(default=None, name="from")


class Checkpoint(msgspec.Struct, frozen=True, tag_field="do", tag="checkpoint"):
    """Make a generation now; answered when it is committed."""

    id: int
    name: str | None = None


class Frozen(msgspec.Struct, frozen=True, tag_field="do", tag="frozen"):
    """So many file systems are frozen, by the event of that token; or none are, and why."""

    id: int
    token: int
    count: int = 0
    error: str | None = None


Request = Hello | Mark | Unmark | Query | Checkpoint | Frozen


class RegionEntry(msgspec.Struct, frozen=True, rename={"class_": "class"}):
    """One line of a listing: a device's span (class reserved) or a tag (class persistent).

    Addresses are guest-physical, sizes bytes, times seconds since the epoch; `generation` is the latest one in
    which bytes of the tag had changed, None before the first.
    """

    address: int
    size: int
    class_: Literal["persistent", "reserved"]
    name: str | None
    owner: str | None
    device: str
    mode: Mode
    permissions: str = "rw"
    created: float | None = None
    modified: float | None = None
    generation: int | None = None


class Committed(msgspec.Struct, frozen=True):
    """What a checkpoint gave: the generation's number and its id in hex."""

    generation: int
    id: str


class Welcome(msgspec.Struct, frozen=True):
    """The answer to hello: the VM's name, the generation its memory was restored from, and its regions."""

    vm: str
    restored: int | None
    regions: Sequence[RegionEntry]


class _Envelope(msgspec.Struct):
    """What is looked at before anything else, of any type, since another version may mean something else by it."""

    v: Any = None
    id: Any = None
    do: Any = None


_DO = ("hello", "mark", "unmark", "query", "checkpoint", "frozen")
_ENVELOPE = msgspec.json.Decoder(_Envelope)
_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_ENCODER = msgspec.json.Encoder()
_UNREADABLE = (ValueError, RecursionError)  # msgspec's errors and UnicodeDecodeError are ValueErrors


def decode_request(line: bytes) -> Request:
    """The request in one line, without or with its newline. Raises RequestRefusedError for anything else."""
    try:
        envelope = _ENVELOPE.decode(line)
    except _UNREADABLE as error:
        raise RequestRefusedError("malformed", f"not a request in JSON: {_first_line(error)}") from error
    known = type(envelope.id) is int and 0 <= envelope.id <= REQUEST_ID_MAX
    request = envelope.id if known else 0
    if type(envelope.v) is not int:
        raise RequestRefusedError("malformed", "a request has its version in v", request=request)
    if envelope.v != VERSION:
        raise RequestRefusedError("unsupported", f"this host speaks version {VERSION}", request=request)
    if not known:
        raise RequestRefusedError("malformed", f"a request has a number from 0 to {REQUEST_ID_MAX} in id")
    if not isinstance(envelope.do, str):
        raise RequestRefusedError("malformed", "a request says what to do in do", request=request)
    if envelope.do not in _DO:
        raise RequestRefusedError("unsupported", f"this host knows only: {', '.join(_DO)}", request=request)
    try:
        return _REQUEST.decode(line)
    except _UNREADABLE as error:
        raise RequestRefusedError("malformed", f"{envelope.do}: {_first_line(error)}", request=request) from error


def name_problem(name: str | None) -> tuple[Kind, str] | None:
    """What is wrong with the name of a tag or a checkpoint, as kind and sentence; None if nothing is."""
    if name is None:
        return None
    if len(name) > NAME_CHARACTERS_MAX:
        return "limit", f"a name has at most {NAME_CHARACTERS_MAX} characters, this one has {len(name)}"
    if not name or not name.isprintable():
        return "malformed", "a name has one or more characters, all of them printable"
    return None


def printable(text: str, length: int) -> str:
    """Untrusted text made safe for a terminal and a log: cut to `length`, unprintable characters as `?`."""
    return "".join(each if each.isprintable() else "?" for each in text[:length])


def encode_done(request: int) -> bytes:
    """The reply to mark, unmark and frozen."""
    return _reply(request, {})


def encode_regions(request: int, entries: Sequence[RegionEntry], start: int | None) -> bytes:
    """The reply to query."""
    return _reply(request, _listing(entries, start))


def encode_welcome(request: int, welcome: Welcome) -> bytes:
    """The reply to hello."""
    return _reply(request, {"vm": welcome.vm, "restored": welcome.restored, **_listing(welcome.regions, None)})


def encode_committed(request: int, committed: Committed) -> bytes:
    """The reply to checkpoint. The hex id is `generation_id`, since `id` is the request's."""
    return _reply(request, {"generation": committed.generation, "generation_id": committed.id})


def encode_refused(request: int, kind: Kind, problem: str) -> bytes:
    """The reply to a request that is not carried out."""
    text = printable(" ".join(problem.split()), ERROR_CHARACTERS_MAX)
    return _ENCODER.encode({"v": VERSION, "id": request, "ok": False, "error": text, "kind": kind}) + b"\n"


def encode_resumed(
    generation: int,
    seed: bytes = b"",
    now: float | None = None,
    vm: str = "",
    addresses: Sequence[tuple[str, str]] = (),
) -> bytes:
    """The event that tells a guest it goes on from a generation; with a time, from its very instant."""
    renewal: dict[str, Any] = {}
    if now is not None:
        renewal = {"seed": seed.hex(), "time": now, "vm": vm, "addresses": addresses}
    return _ENCODER.encode({"v": VERSION, "event": "resumed", "generation": generation, **renewal}) + b"\n"


def encode_freeze(token: int, seconds: float) -> bytes:
    """The event that has a guest freeze its file systems, for so many seconds at most."""
    return _ENCODER.encode({"v": VERSION, "event": "freeze", "token": token, "seconds": seconds}) + b"\n"


def encode_thaw() -> bytes:
    """The event that lets them go on."""
    return _ENCODER.encode({"v": VERSION, "event": "thaw"}) + b"\n"


def _reply(request: int, facts: dict[str, Any]) -> bytes:
    return _ENCODER.encode({"v": VERSION, "id": request, "ok": True, **facts}) + b"\n"


def _listing(entries: Sequence[RegionEntry], start: int | None) -> dict[str, Any]:
    """As many entries from `start` on, in address order, as fit one line, and where to go on.

    A device and the tag at its very start share an address; a page never ends between the two, so that an
    address says where the next one begins.
    """
    ordered = sorted(entries, key=lambda each: (each.address, each.class_ == "persistent"))
    wanted = [each for each in ordered if start is None or each.address >= start]
    page: list[msgspec.Raw] = []
    room = _LISTING_BYTES_MAX
    for each in wanted:
        encoded = _ENCODER.encode(each)
        room -= len(encoded) + 1
        if room < 0:
            break
        page.append(msgspec.Raw(encoded))
    cut = len(page)
    if cut == len(wanted):
        return {"regions": page, "next": None}
    while cut and wanted[cut - 1].address == wanted[cut].address:
        cut -= 1
    return {"regions": page[:cut], "next": wanted[cut].address}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]
