#!/usr/bin/python3
"""Perdure inside a virtual machine: tag memory that survives the guest's reboot, and find it again. One file.

As a library:

    import perdure_guest
    with perdure_guest.persistent_area("cache", 32 << 20) as memory:  # the same bytes after every reboot
        memory[:5] = b"hello"
    perdure_guest.checkpoint("before the upgrade")                    # durable against power loss, too

As a command: `perdure-guest mark ADDRESS SIZE [--name N]`, `unmark ADDRESS SIZE`, `query [--json]`,
`checkpoint [--name N]`, and `agent [--foreground] [--mode devdax|fsdax]`, the daemon that all others talk to.

Installing it in a guest with Python 3.9 or newer (nothing else is needed, but do load the modules virtio_console,
nfit, nd_pmem, device_dax and dax_pmem where udev does not):

    install -m 755 perdure_guest.py /usr/local/bin/perdure-guest
    install -m 644 perdure_guest.py /usr/local/lib/python3.11/dist-packages/perdure_guest.py
    install -m 644 perdure-guest.service /etc/systemd/system/ && systemctl enable --now perdure-guest

What survives what: tagged memory survives a reboot of the guest; what a generation holds (`checkpoint`, or one that
the host makes, at every reboot for example) survives power loss of the host. Flushing caches does not change that.

Addresses are guest-physical and, like sizes, multiples of PAGE. A NVDIMM becomes usable through a namespace, which
the agent makes once, in the mode that the host has for the device, on a device that is still empty at its start:
nothing is ever overwritten. Its memory map is kept in RAM, so that data starts 2 MiB into the device whatever the
device's size, which is what the host counts on.

The library opens one connection to the agent for each call: it may be used from any thread or process. The agent is
one single-threaded process that owns the virtio-serial port, takes requests from a Unix socket (root only), asks
again when an answer is lost, and passes answers back by the request's id. Neither side can stop it with garbage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import mmap
import os
import re
import select
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

AGENT_VERSION = "1"
PROTOCOL_VERSION = 1
PAGE = 4096
MAP_ALIGN = 2 << 20
"""Device DAX maps in units of this; persistent areas start at multiples of it."""
NAME_CHARACTERS_MAX = 128
SOCKET_PATH = "/run/perdure/agent.sock"
PORT_NAME = "org.perdure.agent.0"

ANSWER_SECONDS = 60.0
"""How long a library call waits for the host, by default; a checkpoint waits ten times as long."""
_AGENT_SECONDS = 10.0  # for the agent to be there: programs are started next to it at boot
_RETRY_SECONDS = {"checkpoint": 60.0}  # without an answer; a checkpoint takes time by its nature
_RETRY_SECONDS_DEFAULT = 5.0
_PORT_SECONDS_MIN, _PORT_SECONDS_MAX = 0.02, 1.0  # between looks for a port that is not there, or has no host
_LINE_MAX = 65536
_READ_SIZE = 65536
_CLIENTS_MAX = 64
_IN_FLIGHT_MAX = 16  # requests of one client
_OUTPUT_MAX = 1 << 20  # bytes waiting for a client that does not read
_RACES_MAX = 32
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFHWADDR = 0x8913, 0x8914, 0x8924
RESUME_HOOK = "/etc/perdure/resumed"
"""Run when the guest has gone on from an earlier instant."""


class PersistenceError(Exception):
    """What was asked did not happen; one line that says why.

    Attributes: `kind`, the protocol's word for it (bounds, overlap, alignment, limit, malformed, unsupported, failed)
    or `unreachable` when there was no answer.
    """

    def __init__(self, problem: str, kind: str = "failed") -> None:
        self.kind = kind
        super().__init__(problem)


class Region(NamedTuple):
    """A range of guest-physical memory: a tag (`class_` persistent) or the whole of a pmem device (reserved).

    `modified` is in seconds since the epoch, as far as generations have seen it; None if unknown.
    """

    address: int
    size: int
    class_: str
    name: str | None
    owner: str | None
    device: str
    mode: str
    permissions: str = "rw"
    modified: float | None = None


class Checkpoint(NamedTuple):
    """A committed generation of this VM: its number and its id in hex."""

    generation: int
    id: str


# --- Library ---------------------------------------------------------------------------------------------------------


def mark_persistent(address: int, size: int, name: str | None = None, *, timeout: float = ANSWER_SECONDS) -> None:
    """Make [address, address + size) persistent: the tag is durable when this returns. Marking again is harmless.

    Raises PersistenceError.
    """
    _check_range(address, size)
    _check_name(name)
    _request({"do": "mark", "address": address, "size": size, "name": name}, timeout)


def unmark_persistent(address: int, size: int, *, timeout: float = ANSWER_SECONDS) -> None:
    """Make [address, address + size) volatile: it is scrubbed at the next reboot. Unmarking again is harmless.

    Raises PersistenceError.
    """
    _check_range(address, size)
    _request({"do": "unmark", "address": address, "size": size}, timeout)


def query_persistent_regions(*, timeout: float = ANSWER_SECONDS) -> list[Region]:
    """All tags, and the devices that can hold some, by address. Raises PersistenceError."""
    regions: list[Region] = []
    request: dict[str, Any] = {"do": "query"}
    while True:
        reply = _request(request, timeout)
        page, following = _read_listing(reply)
        regions += page
        if following is None:
            return regions
        request["from"] = following


def checkpoint(name: str | None = None, *, timeout: float = 10 * ANSWER_SECONDS) -> Checkpoint:
    """Make a generation of the persistent memory as it is now; committed, and so durable, when this returns.

    Raises PersistenceError.
    """
    _check_name(name)
    reply = _request({"do": "checkpoint", "name": name}, timeout)
    try:
        return Checkpoint(int(reply["generation"]), str(reply["generation_id"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PersistenceError(f"the host's answer to a checkpoint has no generation: {error}") from error


@contextlib.contextmanager
def persistent_area(name: str, size: int, *, timeout: float = ANSWER_SECONDS) -> Iterator[memoryview]:
    """Map the persistent area `name`: a writable memoryview of exactly `size` bytes, the same after every reboot.

    The first time, an area is set aside on a devdax device and tagged with the name; from then on it is found by
    it and must be asked for with the same size. The tag's size is `size` rounded up to whole pages, the mapping's (and
    the room that is looked for) `size` rounded up to 2 MiB. Leaving the context unmaps and keeps the tag;
    `unmark_persistent` gives the area back. Views taken of the memory keep it mapped until they are released.

    A new area is not cleared: untagged memory is zero after a reboot, but may hold what an area that was unmarked
    since has left. Writes are in the host's memory at once; see the module about what survives what.

    Raises PersistenceError: also when there is no devdax device, no room, or the size is another one.
    """
    if not isinstance(size, int) or size <= 0:
        raise PersistenceError(f"persistent area {name!r}: the size is {size!r} and must be above 0", "bounds")
    if not name:
        raise PersistenceError("a persistent area needs a name", "malformed")
    _check_name(name)
    device, address = _place_area(name, _round_up(size, PAGE), timeout)
    offset = address - device.start
    before = offset % device.align  # not 0 only for a range that was tagged by other means
    try:
        mapping = _map_device(device.path, offset - before, _round_up(before + size, device.align))
    except (OSError, ValueError) as error:
        raise PersistenceError(f"persistent area {name!r}: cannot map {device.path}: {error}") from error
    view = memoryview(mapping)[before : before + size]
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):  # somebody holds a view still: the last one to go unmaps
            view.release()
            mapping.close()


def first_gap(start: int, end: int, taken: list[tuple[int, int]], size: int, align: int = MAP_ALIGN) -> int | None:
    """The lowest multiple of `align` in [start, end) with `size` bytes that touch no range [low, high) of `taken`."""
    candidate = _round_up(start, align)
    for low, high in sorted(taken):
        if high <= candidate:
            continue
        if low >= candidate + size:
            break
        candidate = _round_up(high, align)
    return candidate if candidate + size <= end else None


def _place_area(name: str, tag_size: int, timeout: float) -> tuple[DaxDevice, int]:
    """Device and guest-physical address of the area `name`, tagged now if it was not yet."""
    for _ in range(_RACES_MAX):
        regions = query_persistent_regions(timeout=timeout)
        devices = _usable_devices(regions)
        found = _find_area(name, tag_size, regions, devices)
        if found is not None:
            return found
        device, address = _find_room(name, tag_size, regions, devices)
        try:
            mark_persistent(address, tag_size, name, timeout=timeout)
        except PersistenceError as error:
            if error.kind != "overlap":
                raise
            continue  # somebody else was quicker: look again
        return device, address
    raise PersistenceError(f"persistent area {name!r}: others took the room {_RACES_MAX} times: try again", "overlap")


def _usable_devices(regions: list[Region]) -> list[DaxDevice]:
    """The device DAX devices that lie in what the host calls a pmem device in devdax mode."""
    spans = [each for each in regions if each.class_ == "reserved" and each.mode == "devdax"]
    devices = [
        device
        for device in dax_devices()
        if any(span.address <= device.start and device.end <= span.address + span.size for span in spans)
    ]
    if devices:
        return devices
    if spans:
        names = ", ".join(span.device for span in spans)
        raise PersistenceError(f"{names} has no device DAX namespace here: see the messages of perdure-guest agent")
    raise PersistenceError("this VM has no pmem region in devdax mode: add one to its description on the host")


def _find_area(
    name: str, tag_size: int, regions: list[Region], devices: list[DaxDevice]
) -> tuple[DaxDevice, int] | None:
    named = [each for each in regions if each.class_ == "persistent" and each.name == name]
    for tag in named:
        for device in devices:
            if tag.size == tag_size and device.start <= tag.address and tag.address + tag.size <= device.end:
                return device, tag.address
    if named:
        raise PersistenceError(
            f"persistent area {name!r} has {named[0].size} bytes at {named[0].address:#x}, not {tag_size}: "
            "ask for that size, or unmark it first",
            "overlap",
        )
    return None


def _find_room(name: str, tag_size: int, regions: list[Region], devices: list[DaxDevice]) -> tuple[DaxDevice, int]:
    taken = [(each.address, each.address + each.size) for each in regions if each.class_ == "persistent"]
    for device in devices:
        address = first_gap(device.start, device.end, taken, _round_up(tag_size, device.align), device.align)
        if address is not None:
            return device, address
    paths = ", ".join(device.path for device in devices)
    raise PersistenceError(f"persistent area {name!r}: {paths} has no free range of {tag_size} bytes", "bounds")


def _map_device(path: str, offset: int, length: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
    finally:
        os.close(descriptor)


def _check_range(address: int, size: int) -> None:
    """What the host would refuse anyway, said where the mistake is."""
    if not isinstance(address, int) or not isinstance(size, int) or address < 0 or size <= 0:
        raise PersistenceError(f"a range is an address and a size above 0, not {address!r} and {size!r}", "bounds")
    if address % PAGE or size % PAGE:
        raise PersistenceError(f"{address:#x} and {size:#x} are not multiples of the page, {PAGE} bytes", "alignment")


def _check_name(name: str | None) -> None:
    if name is None:
        return
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
        raise PersistenceError(f"a name has 1 to {NAME_CHARACTERS_MAX} printable characters", "malformed")


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# --- Requests, as the library and the agent write and read them ------------------------------------------------------


def _request(message: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Ask the host through the agent and wait for the answer: the same request again if the agent goes away."""
    request_id = _random_id()
    line = encode({"v": PROTOCOL_VERSION, "id": request_id, **message})
    deadline = time.monotonic() + timeout
    while True:
        with _connect(deadline) as connection:
            reply = _exchange(connection, line, request_id, deadline)
        if reply is not None:
            break
        if time.monotonic() >= deadline:
            raise PersistenceError(f"no answer to {message['do']} from the host within {timeout:g} s", "unreachable")
    if reply.get("ok") is True:
        return reply
    raise PersistenceError(str(reply.get("error", "refused without a reason")), str(reply.get("kind", "failed")))


def _connect(deadline: float) -> socket.socket:
    deadline = min(deadline, time.monotonic() + _AGENT_SECONDS)
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(SOCKET_PATH)
            return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            connection.close()
            if time.monotonic() >= deadline:
                problem = f"no agent at {SOCKET_PATH}: start `perdure-guest agent`"
                raise PersistenceError(problem, "unreachable") from error
            time.sleep(0.05)
        except OSError as error:
            connection.close()
            raise PersistenceError(f"{SOCKET_PATH}: {error.strerror}", "unreachable") from error


def _exchange(connection: socket.socket, line: bytes, request_id: int, deadline: float) -> dict[str, Any] | None:
    """The answer to a request; None when the agent went away or time is up."""
    lines = LineReader(_LINE_MAX)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.sendall(line)
        while True:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            data = connection.recv(_READ_SIZE)
            if not data:
                return None
            for each in lines.feed(data):
                message = decode(each)
                if message is not None and "ok" in message and message.get("id") == request_id:
                    return message
    except OSError:  # also a timeout, which is no TimeoutError before Python 3.10
        return None


def _read_listing(reply: dict[str, Any]) -> tuple[list[Region], int | None]:
    """The regions of an answer, and the address to ask on from, None at the end."""
    try:
        regions = [
            Region(
                int(each["address"]),
                int(each["size"]),
                str(each["class"]),
                each.get("name"),
                each.get("owner"),
                str(each["device"]),
                str(each["mode"]),
                str(each.get("permissions", "rw")),
                each.get("modified"),
            )
            for each in reply["regions"]
        ]
        following = reply.get("next")
        return regions, None if following is None else int(following)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PersistenceError(f"the host's list of regions makes no sense: {error!r}") from error


def _random_id() -> int:
    """53 random bits, the most that every JSON reader keeps. os.urandom could wait for entropy early in the boot."""
    return int(_read("/proc/sys/kernel/random/uuid").replace("-", ""), 16) & ((1 << 53) - 1)


def encode(message: dict[str, Any]) -> bytes:
    """One line. Raises ValueError or RecursionError for what JSON cannot say."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none, whatever the bytes."""
    try:
        message = json.loads(line.decode())  # json would guess other encodings from the bytes
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


class LineReader:
    """Cuts a stream into lines. What is longer than the limit comes as one empty line and is not kept in memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        *complete, rest = (self._rest + data).split(b"\n")
        if complete and self._skipping:
            complete[0] = b""
            self._skipping = False
        if self._skipping or len(rest) >= self._limit:
            self._skipping, rest = True, b""
        self._rest = rest
        return [b"" if len(line) >= self._limit else line for line in complete]


# --- NVDIMMs and their namespaces, through sysfs ---------------------------------------------------------------------


class DaxDevice(NamedTuple):
    """A device DAX device: offset 0 of the file `path` is guest-physical `start`."""

    path: str
    start: int
    end: int
    align: int


def dax_devices(sys_path: str = "/sys") -> list[DaxDevice]:
    """The device DAX devices that can be mapped, by address."""
    found = []
    for path in glob.glob(f"{sys_path}/bus/dax/devices/dax*"):
        with contextlib.suppress(OSError, ValueError):  # gone or not set up: not one to map
            start, size = int(_read(f"{path}/resource"), 0), int(_read(f"{path}/size"), 0)
            if size and os.path.exists(f"{path}/driver"):
                align = int(_read(f"{path}/align"), 0) if os.path.exists(f"{path}/align") else MAP_ALIGN
                found.append(DaxDevice(f"/dev/{os.path.basename(path)}", start, start + size, align))
    return sorted(found, key=lambda device: device.start)


def prepare_namespaces(mode_of: Callable[[int], str | None], sys_path: str = "/sys", dev_path: str = "/dev") -> None:
    """Make the namespace on each raw NVDIMM; those that have one already, from an earlier boot, are left as they are.

    `mode_of` says by guest-physical address what a device is to be: devdax, fsdax, or anything else for nothing.
    Problems are said on standard error and concern one device each.
    """
    for probe in glob.glob(f"{sys_path}/bus/nd/devices/ndbus*/wait_probe"):
        with contextlib.suppress(OSError):
            _read(probe)  # returns when the drivers have looked at all devices
    for path in sorted(glob.glob(f"{sys_path}/bus/nd/devices/namespace*")):
        name = os.path.basename(path)
        try:
            mode = mode_of(int(_read(f"{path}/resource"), 0))
            if mode in ("devdax", "fsdax"):
                _prepare_namespace(path, mode, sys_path, dev_path)
        except (OSError, ValueError) as error:
            say(f"{name}: cannot be made usable: {error}")


def _prepare_namespace(path: str, mode: str, sys_path: str, dev_path: str) -> None:
    drivers, name = f"{sys_path}/bus/nd/drivers", os.path.basename(path)
    prefix, driver = ("dax", "dax_pmem") if mode == "devdax" else ("pfn", "nd_pmem")
    if not _read(f"{path}/holder") and not os.path.exists(f"{path}/driver"):
        with contextlib.suppress(OSError):  # refused when it finds a namespace and hands over to its holder
            _write(f"{drivers}/nd_pmem/bind", name)
    holder = _read(f"{path}/holder")
    if holder:
        if not holder.startswith(prefix):
            say(f"{name}: is {holder} and stays so, though the host says {mode}")
        elif not os.path.exists(f"{sys_path}/bus/nd/devices/{holder}/driver"):
            _write(f"{drivers}/{driver}/bind", holder)
        return
    if not _starts_empty(path, dev_path):
        say(f"{name}: holds data without a namespace: left alone (clear its first 2 MiB to make it {mode})")
        return
    seed = _read(f"{os.path.dirname(os.path.realpath(path))}/{prefix}_seed")
    if not seed.startswith(prefix):
        raise ValueError(f"no free {prefix} device, is the driver {driver} loaded?")
    _write(f"{drivers}/nd_pmem/unbind", name)
    try:
        _claim_namespace(f"{sys_path}/bus/nd/devices/{seed}", name)
        _write(f"{drivers}/{driver}/bind", seed)
    except OSError:
        with contextlib.suppress(OSError):
            _write(f"{sys_path}/bus/nd/devices/{seed}/namespace", "")
            _write(f"{drivers}/nd_pmem/bind", name)
        raise
    say(f"{name}: made {mode} namespace {seed}")


def _claim_namespace(seed_path: str, name: str) -> None:
    """Mode `ram` keeps the memory map out of the device: in `pmem` mode data would start later on larger devices."""
    _write(f"{seed_path}/align", str(MAP_ALIGN))
    _write(f"{seed_path}/uuid", _read("/proc/sys/kernel/random/uuid"))
    _write(f"{seed_path}/mode", "ram")
    _write(f"{seed_path}/namespace", name)


def _starts_empty(path: str, dev_path: str) -> bool:
    """Whether the first 2 MiB are zero: a file system or anything else of value begins there."""
    with open(f"{dev_path}/{min(os.listdir(f'{path}/block'))}", "rb") as device:
        start = device.read(MAP_ALIGN)
    return len(start) == MAP_ALIGN and start.count(0) == MAP_ALIGN


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _write(path: str, value: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(value + "\n")


# --- Agent -----------------------------------------------------------------------------------------------------------


class Channel:
    """A non-blocking descriptor that lines are read from and written to, with what could not be written yet."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.waiting = bytearray()
        self._lines = LineReader(_LINE_MAX)

    def receive(self) -> list[bytes]:
        """The lines that arrived. Raises OSError, also at the end of the stream."""
        try:
            data = os.read(self.descriptor, _READ_SIZE)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("closed")
        return self._lines.feed(data)

    def send(self, line: bytes) -> None:
        """Write a line, as much as goes now. Raises OSError."""
        self.waiting += line
        self.flush()

    def flush(self) -> None:
        """Write what is waiting, as much as goes now. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            while self.waiting:
                del self.waiting[: os.write(self.descriptor, self.waiting[:_READ_SIZE])]


class Client:
    """A connection to the agent's socket; `owner` says who is at its other end."""

    def __init__(self, connection: socket.socket, owner: str) -> None:
        self.connection, self.owner = connection, owner
        self.channel = Channel(connection.fileno())
        self.in_flight = 0


class Request:
    """A request that the host has not answered; `client` is None for the agent's own. `sent_at` None: to be sent."""

    def __init__(self, message: dict[str, Any], client: Client | None) -> None:
        self.line = encode(message)
        self.client = client
        self.sent_at: float | None = None
        self.retry_seconds = _RETRY_SECONDS.get(str(message.get("do")), _RETRY_SECONDS_DEFAULT)


class Agent:
    """Passes requests from the clients of `listener` to the host's port and answers back, and greets the host.

    `open_port` gives a descriptor of the port, or raises OSError while there is none; `prepare` gets the host's list of
    regions once the host was greeted; `renew` is told when the guest has gone on from an earlier
    instant. Only after the greeting are requests of clients passed on, so that a program that has an answer also finds
    the devices. `step` does what can be done now; `run` does so for ever.
    """

    def __init__(
        self,
        listener: socket.socket,
        open_port: Callable[[], int],
        prepare: Callable[[list[Region]], None],
        clock: Callable[[], float] = time.monotonic,
        renew: Callable[[Resumption], None] | None = None,
    ) -> None:
        self._listener, self._open_port, self._prepare, self._clock = listener, open_port, prepare, clock
        self._renew = renew
        self._selector = selectors.DefaultSelector()
        self._port: Channel | None = None
        self._port_at = clock()  # when to look for the port again
        self._port_pause = _PORT_SECONDS_MIN
        self._port_problem = ""
        self._greeted = False
        self._regions: list[Region] = []  # of the greeting, as far as its pages have come
        self._clients: set[Client] = set()
        self._requests: dict[int, Request] = {}  # by id, in order of arrival
        self._freezer: Freezer | None = None
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            self.step(None)

    def step(self, timeout: float | None) -> None:
        """Wait for something to do, at most `timeout` seconds (None: as long as it takes), and do it."""
        self._open()
        self._send_due()
        due = self._seconds_to_next()
        for key, _ in self._selector.select(due if timeout is None else min(timeout, due)):
            key.data()
        self._send_due()

    def close(self) -> None:
        """Let go of everything but the listener."""
        for client in list(self._clients):
            self._drop(client)
        self._end_freezer()
        self._lose_port()
        self._selector.close()

    def _seconds_to_next(self) -> float:
        now = self._clock()
        if self._port is None:
            return max(0.0, self._port_at - now)
        due = [each.sent_at + each.retry_seconds for each in self._requests.values() if each.sent_at is not None]
        return max(0.0, min(due) - now) if due else 3600.0

    # The port

    def _open(self) -> None:
        if self._port is not None or self._clock() < self._port_at:
            return
        try:
            self._port = Channel(self._open_port())
        except OSError as error:
            if str(error) != self._port_problem:
                say(f"waiting for the host: {error}")
            self._port_problem = str(error)
            self._look_later()
            return
        self._port_problem = ""
        self._selector.register(self._port.descriptor, selectors.EVENT_READ, self._on_port)
        self._write_port(b"\n")  # ends half a line that a predecessor may have left
        self._greet()

    def _look_later(self) -> None:
        self._port_at = self._clock() + self._port_pause
        self._port_pause = min(2 * self._port_pause, _PORT_SECONDS_MAX)

    def _lose_port(self) -> None:
        """The host went away, or the port: everything is asked again once it is back."""
        if self._port is None:
            return
        self._selector.unregister(self._port.descriptor)
        os.close(self._port.descriptor)
        self._port = None
        self._greeted = False
        for request_id in [number for number, each in self._requests.items() if each.client is None]:
            del self._requests[request_id]
        for request in self._requests.values():
            request.sent_at = None
        self._look_later()

    def _greet(self) -> None:
        if self._port is None:
            return
        self._greeted, self._regions = False, []
        self._ask({"do": "hello", "boot_id": _read("/proc/sys/kernel/random/boot_id"), "agent": AGENT_VERSION})

    def _ask(self, message: dict[str, Any]) -> None:
        """A request of the agent's own: part of the greeting."""
        request_id = _random_id()
        self._requests[request_id] = Request({"v": PROTOCOL_VERSION, "id": request_id, **message}, None)

    def _send_due(self) -> None:
        """Send what was not sent, or not answered in time, as long as the host reads."""
        now = self._clock()
        for request in list(self._requests.values()):
            if self._port is None or self._port.waiting:
                break
            due = request.sent_at is None or now - request.sent_at >= request.retry_seconds
            if due and (self._greeted or request.client is None):
                request.sent_at = now
                self._write_port(request.line)

    def _write_port(self, line: bytes) -> None:
        if self._port is None:
            return
        try:
            self._port.send(line)
        except OSError:
            self._lose_port()
            return
        self._watch(self._port, self._on_port)

    def _watch(self, channel: Channel, handler: Callable[[], None]) -> None:
        writing = selectors.EVENT_WRITE if channel.waiting else 0
        self._selector.modify(channel.descriptor, selectors.EVENT_READ | writing, handler)

    def _on_port(self) -> None:
        port = self._port
        if port is None:
            return
        try:
            port.flush()
            lines = port.receive()
        except OSError:
            self._lose_port()
            return
        self._watch(port, self._on_port)
        for line in lines:
            self._on_host_line(line)

    def _on_host_line(self, line: bytes) -> None:
        message = decode(line)
        if message is None:
            return
        self._port_pause = _PORT_SECONDS_MIN  # somebody is there
        if message.get("event") in ("freeze", "thaw"):
            self._on_freeze(message)
            return
        if message.get("event") == "resumed":
            # This memory is older than the host's: nothing that was sent counts any more.
            for request in self._requests.values():
                request.sent_at = None
            self._on_resumed(message)
            return
        request_id = message.get("id")
        if type(request_id) is not int or request_id not in self._requests:
            return  # late, or not for us
        request = self._requests.pop(request_id)
        if request.client is None:
            self._on_greeting(message)
        else:
            request.client.in_flight -= 1
            self._send_client(request.client, line + b"\n")

    def _on_freeze(self, event: dict[str, Any]) -> None:
        """File systems are to stand still for an instant, or to go on."""
        if self._freezer is not None:
            self._freezer.thaw()
            self._end_freezer()
        if event["event"] == "thaw":
            return
        try:
            token, seconds = int(event["token"]), float(event["seconds"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        try:
            self._freezer = Freezer(seconds)
        except OSError as error:
            self._tell_frozen(token, 0, f"no process for it: {error.strerror}")
            return
        self._selector.register(self._freezer.report, selectors.EVENT_READ, lambda: self._on_frozen(token))

    def _on_frozen(self, token: int) -> None:
        """What became of it, and, at the end of the freezer, nothing."""
        if self._freezer is None:
            return
        data = os.read(self._freezer.report, 1 << 16)
        if not data:
            self._end_freezer()
            return
        found = decode(data) or {}
        self._tell_frozen(token, found.get("count", 0), found.get("error"))

    def _end_freezer(self) -> None:
        if self._freezer is not None:
            self._selector.unregister(self._freezer.report)
            self._freezer.close()
            self._freezer = None

    def _tell_frozen(self, token: int, count: int, error: str | None) -> None:
        """Not sent again if it is lost: the host waits for a moment only, and what is frozen goes on by itself."""
        message = {"do": "frozen", "token": token, "count": count, "error": error}
        self._write_port(encode({"v": PROTOCOL_VERSION, "id": _random_id(), **message}))

    def _on_resumed(self, event: dict[str, Any]) -> None:
        """All of the guest went on from an earlier instant, if the event has a seed and the time."""
        try:
            pairs = [(str(old), str(new)) for old, new in event.get("addresses", [])]
            found = Resumption(
                bytes.fromhex(event["seed"]), float(event["time"]), event.get("generation"), event.get("vm"), pairs
            )
        except (KeyError, TypeError, ValueError):
            return
        if self._renew is not None:
            self._renew(found)

    def _on_greeting(self, reply: dict[str, Any]) -> None:
        """A page of the host's regions; after the last one the devices are made usable, and clients are served."""
        try:
            if reply.get("ok") is not True:
                raise PersistenceError(str(reply.get("error")))
            page, following = _read_listing(reply)
        except PersistenceError as error:
            say(f"the host did not welcome the agent: {error}")
            page, following = [], None
        self._regions += page
        if following is not None:
            self._ask({"do": "query", "from": following})
            return
        self._prepare(self._regions)
        self._greeted, self._regions = True, []

    # Clients

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= _CLIENTS_MAX:
            connection.close()
            return
        client = Client(connection, _peer(connection))
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._on_client(client))

    def _drop(self, client: Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        for request_id in [number for number, each in self._requests.items() if each.client is client]:
            del self._requests[request_id]
        self._selector.unregister(client.connection)
        client.connection.close()

    def _on_client(self, client: Client) -> None:
        try:
            client.channel.flush()
            lines = client.channel.receive()
        except OSError:
            self._drop(client)
            return
        self._watch(client.channel, lambda: self._on_client(client))
        for line in lines:
            if client in self._clients:
                self._on_client_line(client, line)

    def _on_client_line(self, client: Client, line: bytes) -> None:
        message = decode(line)
        request_id = message.get("id") if message is not None else None
        if message is None or type(request_id) is not int or not 0 < request_id < 1 << 53:
            self._refuse(client, 0, "malformed", "a request is a JSON object with a number in id, in one line")
            return
        known = self._requests.get(request_id)
        if known is not None:
            if known.client is not client:
                self._refuse(client, request_id, "malformed", "this id is another's: choose it at random")
            return  # asked again by the same client: it is on its way
        if client.in_flight >= _IN_FLIGHT_MAX:
            self._refuse(client, request_id, "limit", f"more than {_IN_FLIGHT_MAX} requests without an answer")
            return
        if message.get("do") == "mark":
            message["owner"] = client.owner
        try:
            request = Request(message, client)
        except (ValueError, RecursionError) as error:
            self._refuse(client, request_id, "malformed", f"not a request: {error}")
            return
        if len(request.line) > _LINE_MAX:
            self._refuse(client, request_id, "limit", f"a request is longer than {_LINE_MAX} bytes")
            return
        client.in_flight += 1
        self._requests[request_id] = request

    def _refuse(self, client: Client, request_id: int, kind: str, problem: str) -> None:
        reply = {"v": PROTOCOL_VERSION, "id": request_id, "ok": False, "error": problem, "kind": kind}
        self._send_client(client, encode(reply))

    def _send_client(self, client: Client, line: bytes) -> None:
        try:
            client.channel.send(line)
        except OSError:
            self._drop(client)
            return
        if len(client.channel.waiting) > _OUTPUT_MAX:
            self._drop(client)
            return
        self._watch(client.channel, lambda: self._on_client(client))


def _peer(connection: socket.socket) -> str:
    """Who is at the other end, as the kernel knows it: `pid 12 python3`."""
    pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    try:
        return f"pid {pid} {_read(f'/proc/{pid}/comm')}"
    except (OSError, ValueError):
        return f"pid {pid}"


class Resumption(NamedTuple):
    """What the host says when all of the guest goes on from an earlier instant: random bytes, the time (seconds since
    1970), the number of the generation, the name of the VM now, and (old, new) addresses of network cards."""

    seed: bytes
    time: float
    generation: Any
    vm: Any
    addresses: list[tuple[str, str]]


def renew(resumption: Resumption) -> None:
    """Make unique what the memory of another life has, and run the user's hook; each step whatever the others do."""
    steps: list[Callable[[], None]] = [
        lambda: reseed(resumption.seed, resumption.time),
        thaw,
        *(lambda old=old, new=new: set_address(old, new) for old, new in resumption.addresses),
        lambda: run_hook(resumption),
    ]
    for step in steps:
        try:
            step()
        except (OSError, ValueError, OverflowError) as error:
            say(f"resumed, but: {error}")


def thaw(mounts: str = "/proc/self/mountinfo") -> None:
    """Let file systems go on that were frozen at the instant. Source: ioctl_fs(2) FITHAW; proc_pid_mountinfo(5)."""
    for path, _ in on_disks(_read(mounts)):
        with contextlib.suppress(OSError):  # it was not frozen, or cannot be
            _tell_file_system(path, _FITHAW)
            say(f"{path} was frozen, and goes on")


def on_disks(mounts: str) -> list[tuple[str, bool]]:
    """Mount points of file systems on block devices, once for each, the last mounted first, and whether they can be
    written. `mounts` as in /proc/self/mountinfo; others may hang, and must not hang us. proc_pid_mountinfo(5)."""
    found: dict[str, tuple[str, bool]] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, facts = before.split(), after.split()
        if len(fields) < 6 or len(facts) < 3 or not facts[1].startswith("/dev/"):
            continue
        path = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        found.setdefault(fields[2], (path, "rw" in facts[2].split(",")))
    return list(found.values())[::-1]


def _tell_file_system(path: str, request: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, 0)
    finally:
        os.close(descriptor)


class Freezer:
    """Keeps file systems frozen, in a process of its own: until it is told to thaw, its agent ends, or time is up,
    whichever comes first. `report` is a pipe with one line, `{"count":C}` or `{"count":0,"error":"text"}`, and then
    its end. Raises OSError."""

    def __init__(self, seconds: float) -> None:
        ordered, self._orders = os.pipe()
        self.report, reports = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(ordered)
            os.close(reports)
            return
        try:
            last = max(ordered, reports)
            for each in set(range(3, last)) - {ordered, reports}:
                with contextlib.suppress(OSError):
                    os.close(each)  # the port above all: the agent may have to open it again
            os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
            _keep_frozen(ordered, reports, time.monotonic() + seconds)
        finally:
            os._exit(0)

    def thaw(self) -> None:
        """Let them go on; what is still being frozen does so when that is done."""
        with contextlib.suppress(OSError):
            os.write(self._orders, b"t")

    def close(self) -> None:
        """Let go of it; it ends by itself."""
        os.close(self._orders)
        os.close(self.report)
        threading.Thread(target=_await_freezer, args=(self._pid,), daemon=True).start()


def _await_freezer(pid: int) -> None:
    if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):  # it could not thaw them
        thaw()


def _keep_frozen(orders: int, reports: int, deadline: float) -> None:
    """Freeze in turn, say so, wait, thaw what was frozen; no file is written meanwhile. Source: ioctl_fs(2)."""
    frozen: list[str] = []
    problem = None
    try:
        for path, writable in on_disks(_read("/proc/self/mountinfo")):
            if not writable:
                continue
            try:
                _tell_file_system(path, _FIFREEZE)
                frozen.append(path)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    problem = f"{path}: {error.strerror}"
                    break
            if time.monotonic() >= deadline:
                problem = "it took too long"
                break
        with contextlib.suppress(OSError):
            os.write(reports, encode({"count": 0 if problem else len(frozen), "error": problem}))
        if problem is None:
            select.select([orders], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        for path in reversed(frozen):
            with contextlib.suppress(OSError):
                _tell_file_system(path, _FITHAW)


def set_address(old: str, new: str) -> None:
    """Give a network card that has the address `old` (`52:54:00:12:34:56`) another one, as its device has it.

    Its driver has the old one in memory. Raises OSError. Source: netdevice(7).
    """
    for path in glob.glob("/sys/class/net/*/address"):
        name = path.split("/")[-2]
        if _read(path).lower() != old:
            continue
        bare = name.encode()
        wanted = struct.pack("16sH6s8x", bare, 1, bytes.fromhex(new.replace(":", "")))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            try:
                fcntl.ioctl(control, _SIOCSIFHWADDR, wanted)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                flags = struct.unpack("16sH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("32s", bare)))[1]
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", bare, flags & ~1))
                try:
                    fcntl.ioctl(control, _SIOCSIFHWADDR, wanted)
                finally:
                    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", bare, flags))
        say(f"resumed: {name} has the address {new}")
        return
    say(f"resumed: there is no network card with the address {old}, which is {new} now")


def run_hook(resumption: Resumption) -> None:
    """Start the user's program, if there is one: keys and tokens of applications are its to renew. Raises OSError."""
    if not os.access(RESUME_HOOK, os.X_OK):
        return
    environment = {
        **os.environ,
        "PERDURE_VM": str(resumption.vm or ""),
        "PERDURE_GENERATION": str(resumption.generation or ""),
        "PERDURE_ADDRESSES": " ".join(f"{old}={new}" for old, new in resumption.addresses),
    }
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
        pid = os.posix_spawn(RESUME_HOOK, [RESUME_HOOK], environment, file_actions=actions)
    finally:
        os.close(null)
    threading.Thread(target=_await_hook, args=(pid,), daemon=True).start()


def _await_hook(pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        say(f"{RESUME_HOOK} ended with {code}")


def reseed(seed: bytes, now: float) -> None:
    """Make the kernel's random numbers others than those of this memory's other lives, and set the clock.

    Raises OSError. Source: random(4), Linux, include/uapi/linux/random.h.
    """
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
    late = now - time.time()
    time.clock_settime(time.CLOCK_REALTIME, now)
    way = "on" if late >= 0 else "back"
    say(f"resumed: the kernel's random numbers are new, and the clock is set {way} by {abs(late):.3f} s")


def find_port(name: str = PORT_NAME, sys_path: str = "/sys", dev_path: str = "/dev") -> str:
    """The device file of a virtio-serial port, with udev or without. Raises FileNotFoundError."""
    link = f"{dev_path}/virtio-ports/{name}"
    if os.path.exists(link):
        return link
    for path in glob.glob(f"{sys_path}/class/virtio-ports/*/name"):
        with contextlib.suppress(OSError):
            if _read(path) == name:
                return f"{dev_path}/{os.path.basename(os.path.dirname(path))}"
    raise FileNotFoundError(f"there is no virtio-serial port {name}")


def open_port(name: str = PORT_NAME) -> int:
    """A descriptor of the port, which only one process can have. Raises OSError."""
    return os.open(find_port(name), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def listen(path: str) -> socket.socket:
    """The agent's socket, for root only. Raises PersistenceError if an agent is there already."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            listener.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        else:
            raise PersistenceError(f"an agent is running already: it answers at {path}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(_CLIENTS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener


def mode_at(regions: list[Region]) -> Callable[[int], str | None]:
    """What the host wants the device at a guest-physical address to be, as `prepare_namespaces` asks."""

    def mode(address: int) -> str | None:
        for each in regions:
            if each.class_ == "reserved" and each.address <= address < each.address + each.size:
                return each.mode
        return None

    return mode


def run_agent(foreground: bool, mode: str | None) -> None:
    """Be the agent. In the background, the caller goes on once the socket is there."""
    listener = listen(SOCKET_PATH)
    if not foreground:
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    if mode is not None:
        prepare_namespaces(lambda _: mode)
    prepare = (lambda _: None) if mode is not None else (lambda regions: prepare_namespaces(mode_at(regions)))
    Agent(listener, open_port, prepare, renew=renew).run()


def say(text: str) -> None:
    """One line for the journal."""
    print(f"perdure-guest: {text}", file=sys.stderr, flush=True)


# --- Command line ----------------------------------------------------------------------------------------------------


def parse_number(text: str) -> int:
    """Bytes or an address: decimal, 0x..., or with a binary suffix as in 64MiB. Raises ValueError."""
    digits = text.strip()
    for suffix, factor in (("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40)):
        for ending in (f"{suffix}iB", f"{suffix}i", suffix):
            if digits.endswith(ending) and not digits.lower().startswith("0x"):
                return int(digits[: -len(ending)]) * factor
    return int(digits, 0)


def _arguments(words: list[str] | None) -> Any:
    import argparse  # here, since an emulated guest takes a while to load it and programs have no use for it

    parser = argparse.ArgumentParser(prog="perdure-guest", description="Memory of this VM that survives its reboot.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb, text in (("mark", "make a range of memory persistent"), ("unmark", "make it volatile again")):
        command = commands.add_parser(verb, help=text, description=f"{text}: multiples of {PAGE} bytes.")
        command.add_argument("address", type=parse_number, help="guest-physical, as in 0x100200000")
        command.add_argument("size", type=parse_number, help="bytes, as in 2097152, 0x200000 or 2MiB")
        if verb == "mark":
            command.add_argument("--name", help="to find it again")
    query = commands.add_parser("query", help="list what is persistent, and where more can be")
    query.add_argument("--json", action="store_true", help="as one JSON document")
    command = commands.add_parser("checkpoint", help="make a generation now: durable when this returns")
    command.add_argument("--name", help="to find it again")
    agent = commands.add_parser("agent", help="be the daemon that talks to the host")
    agent.add_argument("--foreground", action="store_true", help="do not go to the background")
    agent.add_argument("--mode", choices=("devdax", "fsdax"), help="make this of every empty NVDIMM, host or no host")
    return parser.parse_args(words)


def _print_regions(regions: list[Region], as_json: bool) -> None:
    if as_json:
        rows = [{name.rstrip("_"): value for name, value in each._asdict().items()} for each in regions]
        print(json.dumps({"regions": rows}))
        return
    for each in regions:
        what = each.mode if each.class_ == "reserved" else f"{each.name or '-'} ({each.owner or 'unknown'})"
        print(f"{each.address:#014x}-{each.address + each.size:#014x} {each.size:>12} {each.class_:<10} "
              f"{each.device} {what}")  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """The command: 0 done, 1 failed, 2 usage, 130 interrupted."""
    arguments = _arguments(words)
    try:
        if arguments.command == "mark":
            mark_persistent(arguments.address, arguments.size, arguments.name)
        elif arguments.command == "unmark":
            unmark_persistent(arguments.address, arguments.size)
        elif arguments.command == "query":
            _print_regions(query_persistent_regions(), arguments.json)
        elif arguments.command == "checkpoint":
            made = checkpoint(arguments.name)
            print(f"generation {made.generation} {made.id}")
        else:
            run_agent(arguments.foreground, arguments.mode)
    except (PersistenceError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
