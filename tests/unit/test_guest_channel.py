"""The guest channel over real unix sockets: the test is QEMU (it listens) and the guest (it speaks)."""

import asyncio
import contextlib
import json
import random
import shutil
import socket
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import StorageError, UsageError
from base.units import PAGE
from vm import protocol
from vm.channel import CHECKPOINTS_PENDING_MAX, OUTPUT_BYTES_MAX, GuestChannel, LineSplitter, TokenBucket
from vm.protocol import LINE_BYTES_MAX, Committed, RegionEntry, RequestRefusedError, Welcome
from vm.regions import INFO_BLOCK, Device, RegionTable

DATA = INFO_BLOCK
DEADLINE_SECONDS = 30


class Supervisor:
    """A handler on a real table; checkpoints wait until the test lets them go."""

    def __init__(self, folder: Path) -> None:
        self.table = RegionTable.create(folder / "t", "demo", [Device("pm0", 0, 1 << 40)])
        self.checkpoints: list[int] = []
        self.names: list[str | None] = []
        self.frozen_by: list[tuple[int, int, str | None]] = []
        self.greetings: list[tuple[str, str]] = []
        self.may_commit = asyncio.Event()
        self.raises: BaseException | None = None

    async def hello(self, boot_id, agent):
        self.greetings.append((boot_id, agent))
        return Welcome("demo", 3, self.table.query())

    async def mark(self, address, size, name, owner):
        if self.raises is not None:
            raise self.raises
        self.table.mark(address, size, name, owner)

    async def unmark(self, address, size):
        self.table.unmark(address, size)

    async def query(self):
        return self.table.query()

    async def frozen(self, token, count, error):
        self.frozen_by.append((token, count, error))

    async def checkpoint(self, request, name):
        self.checkpoints.append(request)
        self.names.append(name)
        number = len(self.checkpoints)
        await self.may_commit.wait()
        if self.raises is not None:
            raise self.raises
        return Committed(number, f"{request:x}")


class Guest:
    """One connection, from the side of QEMU and the guest behind it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE_SECONDS)
        self.connection = connection
        self.lines = connection.makefile("rb")

    def close(self) -> None:
        self.lines.close()
        self.connection.close()

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def message(self) -> dict:
        """The next line that is not empty."""
        while not (line := self.lines.readline()).strip():
            assert line, "the host closed the connection"
        assert line.endswith(b"\n")
        assert len(line) <= LINE_BYTES_MAX
        return json.loads(line)

    def ask(self, do: str, request: int | None = None, **facts) -> int:
        request = random.randrange(1, 1 << 53) if request is None else request
        self.send(json.dumps({"v": 1, "id": request, "do": do, **facts}).encode() + b"\n")
        return request

    def call(self, do: str, **facts) -> dict:
        request = self.ask(do, **facts)
        reply = self.message()
        assert reply["id"] == request
        assert reply["v"] == 1
        return reply

    def refused(self) -> tuple[int, str]:
        reply = self.message()
        assert set(reply) == {"v", "id", "ok", "error", "kind"}
        assert reply["ok"] is False
        assert reply["error"]
        assert "\n" not in reply["error"]
        return reply["id"], reply["kind"]


class Host:
    """QEMU's listening socket, and a channel with its event loop in a thread."""

    def __init__(self, requests_per_second: float = 1e9) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.path = self.folder / "agent.sock"
        self.logged: list[str] = []
        self.listener = self.listen()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.supervisor = self.inside(self._supervisor())
        self.channel = GuestChannel(
            "demo", self.path, self.supervisor, self.logged.append, requests_per_second=requests_per_second
        )
        self.running = asyncio.run_coroutine_threadsafe(self.channel.run(), self.loop)

    async def _supervisor(self) -> Supervisor:
        return Supervisor(self.folder)

    def listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        listener.settimeout(DEADLINE_SECONDS)
        return listener

    def accept(self) -> Guest:
        return Guest(self.listener.accept()[0])

    def inside(self, work):
        """Run a coroutine in the channel's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_SECONDS)

    def do(self, function, *arguments):
        """Call a function in the channel's loop."""

        async def call():
            return function(*arguments)

        return self.inside(call())

    def close(self) -> None:
        async def end():
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.inside(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_SECONDS)
        self.loop.close()
        self.listener.close()
        shutil.rmtree(self.folder)


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def guest(host):
    guest = host.accept()
    yield guest
    guest.close()


def persistent(reply: dict) -> list[tuple[int, int, str | None, str]]:
    tags = [each for each in reply["regions"] if each["class"] == "persistent"]
    return [(each["address"], each["size"], each["name"], each["owner"]) for each in tags]


def test_each_verb_and_its_reply(host, guest):
    reply = guest.call("hello", boot_id="b-1", agent="1.0")
    assert (reply["vm"], reply["restored"], reply["next"]) == ("demo", 3, None)
    assert [(each["class"], each["device"], each["mode"]) for each in reply["regions"]] == [
        ("reserved", "pm0", "devdax")
    ]
    assert guest.call("hello", boot_id="\x1b[2J\n", agent="x" * 1000)["ok"]  # what a handler shows is safe to show
    assert host.supervisor.greetings == [("b-1", "1.0"), ("?[2J?", "x" * 128)]
    assert guest.call("mark", address=DATA, size=2 * PAGE, name="heap", owner="pid 7 app").keys() == {"v", "id", "ok"}
    assert guest.call("mark", address=DATA + 4 * PAGE, size=PAGE)["ok"]
    wanted = [(DATA, 2 * PAGE, "heap", "pid 7 app"), (DATA + 4 * PAGE, PAGE, None, "guest")]
    assert persistent(guest.call("query")) == wanted
    assert guest.call("unmark", address=DATA, size=PAGE)["ok"]
    assert persistent(guest.call("query"))[0] == (DATA + PAGE, PAGE, "heap", "pid 7 app")
    host.do(host.supervisor.may_commit.set)
    request = guest.ask("checkpoint", name="before upgrade")
    assert guest.message() == {"v": 1, "id": request, "ok": True, "generation": 1, "generation_id": f"{request:x}"}
    assert host.supervisor.names == ["before upgrade"]


def test_refusals_name_their_kind(guest):
    assert guest.call("mark", address=DATA, size=2 * PAGE)["ok"]
    for facts, kind in (
        ({"address": DATA + 1, "size": PAGE}, "alignment"),
        ({"address": 0, "size": PAGE}, "bounds"),
        ({"address": 10**100, "size": PAGE}, "bounds"),
        ({"address": DATA, "size": PAGE}, "overlap"),
        ({"address": DATA, "size": 2 * PAGE, "name": "n" * 129}, "limit"),
        ({"address": DATA, "size": 2 * PAGE, "name": "\x1b[0m"}, "malformed"),
        ({"address": "1", "size": PAGE}, "malformed"),
        ({"address": 4096.0, "size": PAGE}, "malformed"),
        ({"address": True, "size": PAGE}, "malformed"),
        ({"size": PAGE}, "malformed"),
    ):
        request = guest.ask("mark", **facts)
        assert guest.refused() == (request, kind)
    request = guest.ask("checkpoint", name="\n")
    assert guest.refused() == (request, "malformed")
    request = guest.ask("format the disk")
    assert guest.refused() == (request, "unsupported")


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        (b"hello", (0, "malformed")),
        (b"[]", (0, "malformed")),
        (b"\xff\xfe\x00", (0, "malformed")),
        (b'{"v":1,"id":5', (0, "malformed")),
        (b'{"v":1,"id":-5,"do":"query"}', (0, "malformed")),
        (b'{"v":1,"id":9007199254740992,"do":"query"}', (0, "malformed")),
        (b'{"v":1,"id":true,"do":"query"}', (0, "malformed")),
        (b'{"v":1,"do":"query"}', (0, "malformed")),
        (b'{"id":5,"do":"query"}', (5, "malformed")),
        (b'{"v":"1","id":5,"do":"query"}', (5, "malformed")),
        (b'{"v":2,"id":5,"do":"query"}', (5, "unsupported")),
        (b'{"v":2,"id":"text","do":{}}', (0, "unsupported")),
        (b'{"v":1,"id":5,"do":7}', (5, "malformed")),
        (b'{"v":1,"id":5}', (5, "malformed")),
        (b'{"v":1,"id":5,"do":"query","from":"x"}', (5, "malformed")),
        (b'{"v":1,"id":5,"do":"mark","address":' + b"9" * 6000 + b',"size":1}', (5, "malformed")),
        (b'{"v":1,"id":5,"do":"mark","address":1e999,"size":1}', (5, "malformed")),
        (b'{"v":1,"id":5,"do":"hello","boot_id":"\\ud800"}', (0, "malformed")),
        (b'{"v":' + b"[" * 60000, (0, "malformed")),
        (b'{"x":' + b"[" * 30000 + b"]" * 30000 + b"}", (0, "malformed")),
        (b"x" * (LINE_BYTES_MAX - 1), (0, "malformed")),
        (b"x" * LINE_BYTES_MAX, (0, "malformed")),
        (b"x" * (3 * LINE_BYTES_MAX + 1), (0, "malformed")),
    ],
)
def test_garbage_is_answered_once_and_the_next_request_served(guest, line, refused):
    guest.send(line + b"\n")
    assert guest.refused() == refused
    assert guest.call("query")["ok"]


def test_a_line_without_end_is_answered_before_it_ends(guest):
    guest.send(b"x" * LINE_BYTES_MAX)
    assert guest.refused() == (0, "malformed")
    for _ in range(50):
        guest.send(b"x" * LINE_BYTES_MAX)
    guest.send(b'{"v":1,"id":1,"do":"query"}\n')  # still the same line
    assert guest.call("query")["ok"]


def test_the_longest_line_is_served(guest):
    line = b'{"v":1,"id":4,"do":"query"'
    guest.send(line + b" " * (LINE_BYTES_MAX - len(line) - 2) + b"}\n")
    assert guest.message()["id"] == 4


def test_empty_lines_mean_nothing_and_pieces_are_put_together(guest):
    guest.send(b"\n \r\n\n")
    for each in b'{"v":1,"id":4,"do":"query"}\r\n':
        guest.send(bytes([each]))
    assert guest.message()["id"] == 4


def test_half_lines_around_a_new_connection(host, guest):
    guest.send(b'{"v":1,"id":8,"do":"que')
    guest.close()
    again = host.accept()
    assert again.lines.readline() == b"\n"  # ends what the guest may have read half of
    again.send(b'ry"}\n')
    assert again.refused() == (0, "malformed")
    again.send(b'\n{"v":1,"id":8,"do":"query"}\n')
    assert again.message()["id"] == 8
    again.close()


def test_qemu_that_comes_late_or_goes_and_comes_back(host, guest):
    host.listener.close()
    host.path.unlink()
    guest.close()
    wait_for(lambda: not host.do(lambda: host.channel.connected))
    host.listener = host.listen()
    again = host.accept()
    assert again.call("query")["ok"]
    again.close()


def test_reset_forgets_what_the_guest_had_said(host, guest):
    guest.send(b'{"v":1,"id":8,')
    assert guest.lines.readline() == b"\n"
    host.do(host.channel.reset)
    with contextlib.suppress(ConnectionResetError):  # where the host had not read all of it
        assert guest.lines.readline() == b""
    again = host.accept()
    assert again.call("query")["ok"]
    again.close()


def test_a_guest_is_told_to_freeze_and_says_what_became_of_it(host, guest):
    assert guest.call("query")["ok"]
    assert host.do(lambda: host.channel.freeze(7, 4))
    assert guest.message() == {"v": 1, "event": "freeze", "token": 7, "seconds": 4}
    assert guest.call("frozen", token=7, count=2, error=None)["ok"]
    assert guest.call("frozen", token=7, count=0, error="/data: \x1b[2J" + "x" * 1000)["ok"]
    assert guest.call("frozen", token="7")["kind"] == "malformed"
    one, two = host.supervisor.frozen_by
    assert one == (7, 2, None)
    assert two[:2] == (7, 0) and two[2].startswith("/data: ?[2Jxx") and len(two[2]) < 500
    host.do(host.channel.thaw)
    assert guest.message() == {"v": 1, "event": "thaw"}
    guest.close()
    wait_for(lambda: not host.do(lambda: host.channel.connected))
    assert not host.do(lambda: host.channel.freeze(8, 4))


def test_events_reach_the_guest_now_or_with_the_next_connection(host, guest):
    assert guest.call("query")["ok"]
    host.do(host.channel.resumed, 5)
    assert guest.message() == {"v": 1, "event": "resumed", "generation": 5}
    guest.close()
    wait_for(lambda: not host.do(lambda: host.channel.connected))
    host.do(host.channel.resumed, 6)
    again = host.accept()
    assert again.message()["generation"] == 6
    assert again.call("query")["ok"]
    again.close()
    third = host.accept()
    assert third.call("query")["ok"]  # and nothing was said twice
    third.close()


def test_a_guest_that_goes_on_from_an_instant_is_told_other_random_bytes_each_time(host, guest):
    assert guest.call("query")["ok"]
    began, told = time.time(), []
    for _ in range(2):
        host.do(lambda: host.channel.resumed(5, renew=True))
        told.append(guest.message())
    assert all(each["event"] == "resumed" and began <= each["time"] <= time.time() for each in told)
    seeds = {bytes.fromhex(each["seed"]) for each in told}
    assert {len(each) for each in seeds} == {64}
    assert len(seeds) == 2


def test_a_repeated_checkpoint_is_one_checkpoint(host, guest):
    request = guest.ask("checkpoint")
    guest.ask("checkpoint", request)
    assert guest.call("query")["ok"]  # others are served while it is under way
    guest.close()
    again = host.accept()
    again.ask("checkpoint", request)
    assert again.call("query")["ok"]
    host.do(host.supervisor.may_commit.set)
    first = again.message()
    assert (first["id"], first["generation"]) == (request, 1)
    again.ask("checkpoint", request)  # just done
    assert again.message() == first
    assert host.supervisor.checkpoints == [request]
    other = again.ask("checkpoint")
    assert again.message()["generation"] == 2
    assert host.supervisor.checkpoints == [request, other]
    again.close()


def test_a_checkpoint_that_an_earlier_supervisor_committed(host, guest):
    host.do(host.channel.remember, 77, Committed(4, "abcd"))
    guest.ask("checkpoint", 77)
    assert guest.message() == {"v": 1, "id": 77, "ok": True, "generation": 4, "generation_id": "abcd"}
    assert host.supervisor.checkpoints == []


def test_checkpoints_are_bounded_and_remembered_in_a_bounded_way(host, guest):
    pending = {guest.ask("checkpoint") for _ in range(CHECKPOINTS_PENDING_MAX)}
    refused = guest.ask("checkpoint")
    assert guest.refused() == (refused, "limit")
    host.do(host.supervisor.may_commit.set)
    assert {guest.message()["id"] for _ in pending} == pending
    for _ in range(200):
        last = guest.call("checkpoint")
    assert len(host.channel._answers) == 64
    guest.ask("checkpoint", last["id"])
    assert guest.message() == last


@pytest.mark.parametrize(
    "error",
    [
        StorageError("/secret/place/of/the/host", "cannot write:\nno space left"),
        ZeroDivisionError(),
        RecursionError("deep"),
        MemoryError(),
        asyncio.CancelledError(),
        ExceptionGroup("many", [ValueError("a"), OSError(5, "b")]),
    ],
)
@pytest.mark.parametrize("do", ["mark", "checkpoint"])
def test_a_handler_that_fails_costs_one_reply_and_one_log_line(host, guest, error, do):
    host.supervisor.raises = error
    host.do(host.supervisor.may_commit.set)
    request = guest.ask(do, address=DATA, size=PAGE)
    reply = guest.message()
    assert (reply["id"], reply["kind"]) == (request, "failed")
    assert "secret" not in reply["error"]
    [line] = host.logged
    assert line.startswith("VM demo: a ")
    assert type(error).__name__ in line
    assert "\n" not in line
    assert guest.call("query")["ok"]


def test_a_handler_can_refuse(host, guest):
    host.supervisor.raises = RequestRefusedError("limit", "VM demo: not now")
    request = guest.ask("mark", address=DATA, size=PAGE)
    assert guest.refused() == (request, "limit")
    assert host.logged == []


def test_a_handler_whose_answer_cannot_be_encoded(host, guest):
    async def wrong():
        return [object()]

    host.supervisor.query = wrong
    request = guest.ask("query")
    assert guest.refused() == (request, "failed")


def test_logs_of_a_noisy_guest_are_few(host, guest):
    guest.send(b"garbage\n" * 1000)
    for _ in range(1000):
        guest.refused()
    assert len(host.logged) == 10  # after 1, 2, 4 ... 512 of them
    host.supervisor.raises = ZeroDivisionError("x" * 100_000)
    for _ in range(100):
        guest.call("mark", address=DATA, size=PAGE)
    assert len(host.logged) < 40
    assert max(map(len, host.logged)) < 1200
    assert "\x1b" not in "".join(host.logged)


def test_a_guest_that_does_not_read_loses_its_connection_and_nothing_else(host, guest):
    for page in range(300):
        host.supervisor.table.mark(DATA + page * PAGE, PAGE, "n" * 128, "o" * 128)
    flood = b'{"v":1,"id":5,"do":"query"}\n' * 64
    sent = 0
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while sent < 64 << 20:
            guest.send(flood)
            sent += len(flood)
    assert any("does not read" in line for line in host.logged)
    again = host.accept()
    assert again.call("unmark", address=DATA, size=PAGE)["ok"]
    again.close()


def test_output_waits_within_its_bound(host, guest):
    """Some replies wait for a guest that is slow: none is lost."""
    for page in range(200):
        host.supervisor.table.mark(DATA + page * PAGE, PAGE, "n" * 128, "o" * 128)
    requests = [guest.ask("query") for _ in range(OUTPUT_BYTES_MAX // LINE_BYTES_MAX)]
    assert [guest.message()["id"] for _ in requests] == requests


def test_listings_longer_than_a_line_come_in_pages(host, guest):
    entries = [RegionEntry(0, 1 << 40, "reserved", None, None, "pm0", "raw")]
    for number in range(protocol.TAGS_MAX):
        entries.append(RegionEntry(number * PAGE, PAGE, "persistent", "ü" * 128, "ö" * (number % 129), "pm0", "raw"))

    async def query():
        return random.sample(entries, len(entries))

    host.supervisor.query = query
    seen, reply = [], guest.call("query")
    while True:
        assert reply["regions"]
        seen += reply["regions"]
        if reply["next"] is None:
            break
        reply = guest.call("query", **{"from": reply["next"]})
    assert seen == msgspec.json.decode(msgspec.json.encode(entries))


def test_the_rate_is_bounded_and_the_excess_is_left_in_the_socket():
    host = Host(requests_per_second=400)
    guest = host.accept()
    try:
        began = time.monotonic()
        requests = [guest.ask("query") for _ in range(200)]
        assert [guest.message()["id"] for _ in requests] == requests
        assert time.monotonic() - began > (200 - protocol.REQUEST_BURST) / 400 * 0.9
        guest.connection.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):  # the host does not read on and on
            while sent < 64 << 20:
                sent += guest.connection.send(b"x" * 65536)
    finally:
        guest.close()
        host.close()


def test_bytes_without_a_line_have_a_rate_too():
    host = Host(requests_per_second=100)
    guest = host.accept()
    try:
        began = time.monotonic()
        guest.send(b"x" * (64 * LINE_BYTES_MAX) + b"\n")
        assert guest.refused() == (0, "malformed")
        assert guest.call("query")["ok"]
        assert time.monotonic() - began > (64 - protocol.REQUEST_BURST) / 100 * 0.9
    finally:
        guest.close()
        host.close()


def test_a_page_does_not_end_between_two_entries_of_one_address(monkeypatch):
    entries = []
    for number in range(8):
        where = number << 30
        entries.append(RegionEntry(where, 1 << 30, "reserved", None, None, f"pm{number}", "raw"))
        entries.append(RegionEntry(where, PAGE, "persistent", "n", "o", f"pm{number}", "raw"))
    wanted = msgspec.json.decode(msgspec.json.encode(entries))
    for room in range(500, 2500, 20):
        monkeypatch.setattr(protocol, "_LISTING_BYTES_MAX", room)
        seen, start = [], None
        while start is not None or not seen:
            page = json.loads(protocol.encode_regions(1, entries, start))
            assert page["regions"]
            seen += page["regions"]
            start = page["next"]
        assert seen == wanted


def test_a_path_too_long_for_a_socket_is_said_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"VM demo: .* at most 107 bytes"):
        GuestChannel("demo", tmp_path / ("x" * 108), None, print)


def test_cancelling_ends_checkpoints_and_leaves_no_task(host, guest):
    guest.ask("checkpoint")
    wait_for(lambda: host.supervisor.checkpoints)
    host.running.cancel()

    async def others():
        return len(asyncio.all_tasks()) - 1

    wait_for(lambda: host.inside(others()) == 0)
    assert host.channel._answers == {}


def test_token_bucket_lets_a_burst_pass_and_then_keeps_the_rate():
    now = [0.0]
    bucket = TokenBucket(10, 3, lambda: now[0])
    assert [bucket.take(1) for _ in range(5)] == [0, 0, 0, pytest.approx(0.1), pytest.approx(0.2)]
    now[0] = 100.0  # a long rest earns no more than the burst
    assert [bucket.has(1) for _ in range(4)] == [True, True, True, False]


@given(
    st.lists(st.binary(max_size=20) | st.integers(0, 2 * LINE_BYTES_MAX).map(lambda n: b"x" * n), max_size=6),
    st.lists(st.integers(0, 3 * LINE_BYTES_MAX), max_size=20),
)
def test_lines_do_not_depend_on_how_the_stream_was_cut(pieces, cuts):
    stream = b"\n".join(pieces) + b"\n"
    splitter = LineSplitter()
    found: list[bytes | None] = []
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in pairwise(edges):
        found += splitter.feed(stream[start:end])
        assert len(splitter._held) < LINE_BYTES_MAX
    wanted = b"\n".join(pieces).split(b"\n")
    assert found == [line if len(line) < LINE_BYTES_MAX else None for line in wanted]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=5
)
NUMBERS = st.sampled_from([0, 1, -1, PAGE, DATA, 1 << 63, 1 << 64, 10**30]) | JSON
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "v": st.just(1) | JSON,
        "id": st.integers(0, 1 << 54) | JSON,
        "do": st.sampled_from(["mark", "unmark", "query", "hello"]) | JSON,
        "address": NUMBERS,
        "size": NUMBERS,
        "name": JSON,
        "owner": JSON,
        "from": NUMBERS,
        "boot_id": JSON,
        "extra": JSON,
    },
).map(lambda each: json.dumps(each).encode())
DEEP = st.integers(1, 30_000).map(lambda n: b'{"v":1,"id":1,"do":"mark","address":' + b"[" * n + b"]" * n + b"}")
FLIPPED = st.tuples(REQUESTS, st.integers(0, 1 << 30), st.integers(0, 255)).map(
    lambda each: each[0][: each[1] % len(each[0])] + bytes([each[2]]) + each[0][each[1] % len(each[0]) + 1 :]
)
LINES = st.binary() | JSON.map(lambda each: json.dumps(each).encode()) | REQUESTS | FLIPPED | DEEP


@pytest.fixture(scope="module")
def fuzzed():
    host = Host()
    guest = host.accept()
    yield host, guest
    guest.close()
    host.close()


@settings(max_examples=400)
@given(st.lists(LINES, max_size=5))
def test_whatever_is_sent_is_answered_line_by_line_and_a_good_request_after_it_is_served(fuzzed, lines):
    host, guest = fuzzed
    stream = b"\n".join(lines) + b"\n"
    guest.send(stream)
    for line in stream.split(b"\n"):
        if line.strip():
            reply = guest.message()
            assert reply["v"] == 1
            assert 0 <= reply["id"] <= protocol.REQUEST_ID_MAX
            if not reply["ok"]:
                assert reply["kind"] in {"bounds", "overlap", "alignment", "limit", "malformed", "unsupported"}
    assert guest.call("mark", address=DATA + (1 << 39), size=PAGE, name="good")["ok"]
    assert not any("failed" in line for line in host.logged)
