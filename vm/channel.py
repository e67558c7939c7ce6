"""The host's side of the guest channel: one asyncio task that serves one guest, which is not trusted.

Invariants, whatever the guest sends or does not read:
- memory is bounded: one line of input, two reads ahead of it, OUTPUT_BYTES_MAX of replies, CHECKPOINTS_REMEMBERED;
- nothing waits for the guest: who does not read its replies loses the connection, and with it the replies;
- the rate is bounded: beyond it the socket is not read, so that QEMU and then the guest's own queue hold the excess;
- every request gets exactly one reply, in order, checkpoints when they are committed; a handler that fails costs
  the guest a reply of kind `failed` and the log one line, and nothing else.

QEMU owns the socket (server=on); connecting is tried for as long as `run` runs. A request can be lost with a
connection, so requests are idempotent: a checkpoint that is repeated under its id is the same checkpoint.

Everything here runs in one event loop's thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Protocol

from base.errors import UsageError, one_line
from vm import protocol
from vm.protocol import (
    ERROR_CHARACTERS_MAX,
    LINE_BYTES_MAX,
    NAME_CHARACTERS_MAX,
    Checkpoint,
    Committed,
    Frozen,
    Hello,
    Mark,
    Query,
    RegionEntry,
    Request,
    RequestRefusedError,
    Unmark,
    Welcome,
)

OUTPUT_BYTES_MAX = 4 * LINE_BYTES_MAX
"""Replies that wait for the guest to read them, beyond what the kernel's socket buffer holds."""
SOCKET_PATH_BYTES_MAX = 107  # unix(7): 108 with the NUL
CHECKPOINTS_PENDING_MAX = 8
CHECKPOINTS_REMEMBERED = 64
RECONNECT_SECONDS_MIN, RECONNECT_SECONDS_MAX = 0.02, 1.0
GUEST = "guest"
"""Owner of a tag whose maker does not say who it is."""
_READ_COST = 1 / 16  # of a request: at most 3,200 reads a second, however small
_LOG_LINES_PER_SECOND, _LOG_BURST = 1, 20


class GuestHandler(Protocol):
    """What the supervisor does for its guest. A RequestRefusedError is told to the guest as it is; any other
    exception is logged, and the guest only learns that it failed, since its text may name files of the host.

    All but `checkpoint` are called one after the other and should be quick: the guest waits for them.
    """

    async def hello(self, boot_id: str, agent: str) -> Welcome:
        """The agent has started, or found its host again. Both texts are short and printable."""

    async def mark(self, address: int, size: int, name: str | None, owner: str) -> None:
        """Make a range persistent; durable on return."""

    async def unmark(self, address: int, size: int) -> None:
        """Make a range volatile; durable on return."""

    async def query(self) -> Sequence[RegionEntry]:
        """All devices and tags."""

    async def frozen(self, token: int, count: int, error: str | None) -> None:
        """So many file systems of the guest are frozen, or none are, and why: printable, and short."""

    async def checkpoint(self, request: int, name: str | None) -> Committed:
        """Commit a generation. Keep the request's id with it, so that a new supervisor can `remember` it.

        Runs beside everything else, and beside other checkpoints; cancelled when the channel ends.
        """


class LineSplitter:
    """Cuts a stream into lines and never holds more than one. `None` in the result stands for a line that is too
    long: said when it becomes so, and its rest skipped."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._skipping = False

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """The lines that end in `chunk`, without their newlines."""
        lines: list[bytes | None] = []
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._hold(piece, lines)
            if not self._skipping:
                lines.append(bytes(self._held))
            self._held.clear()
            self._skipping = False
        self._hold(rest, lines)
        return lines

    def _hold(self, piece: bytes, lines: list[bytes | None]) -> None:
        if self._skipping:
            return
        if len(self._held) + len(piece) >= LINE_BYTES_MAX:  # the newline counts too
            lines.append(None)
            self._held.clear()
            self._skipping = True
        else:
            self._held += piece


class TokenBucket:
    """Allows `rate` a second and `burst` at once. Who takes more goes into debt and is told how long to wait."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = burst, clock()

    def take(self, cost: float) -> float:
        """Take `cost` tokens; seconds until they exist, 0 if they do."""
        self._refill()
        self._tokens -= cost
        return max(0.0, -self._tokens / self._rate)

    def has(self, cost: float) -> bool:
        """Take `cost` tokens if they exist."""
        self._refill()
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now


class GuestChannel:
    """Serves the guest of one VM for as long as `run` runs. Attributes: `vm` (name), `path` (QEMU's socket).

    Raises UsageError if the path is too long for a socket.
    """

    def __init__(
        self,
        vm: str,
        path: Path,
        handler: GuestHandler,
        log: Callable[[str], None],
        *,
        requests_per_second: float = protocol.REQUESTS_PER_SECOND,
    ) -> None:
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f"VM {vm}: {path}: the path of a socket has at most {SOCKET_PATH_BYTES_MAX} bytes: "
                "set PERDURE_STATE_DIR to a shorter folder"
            )
        self.vm, self.path = vm, path
        self._handler, self._log = handler, log
        self._pace = TokenBucket(requests_per_second, protocol.REQUEST_BURST)
        self._log_pace = TokenBucket(_LOG_LINES_PER_SECOND, _LOG_BURST)
        self._suppressed = 0
        self._malformed = 0
        self._writer: asyncio.StreamWriter | None = None
        self._event: tuple[int, bool, Sequence[tuple[str, str]]] | None = (
            None  # what a guest is told as soon as there is a connection
        )
        self._answers: OrderedDict[int, bytes | None] = OrderedDict()  # of checkpoints; None while pending
        self._checkpoints: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether QEMU's socket is connected; says nothing about an agent in the guest."""
        return self._writer is not None and not self._writer.is_closing()

    async def run(self) -> None:
        """Connect, serve, connect again, until cancelled."""
        delay = RECONNECT_SECONDS_MIN
        try:
            while True:
                try:
                    reader, writer = await asyncio.open_unix_connection(self.path, limit=LINE_BYTES_MAX)
                    if await self._serve(reader, writer):
                        delay = RECONNECT_SECONDS_MIN
                except (FileNotFoundError, ConnectionError):
                    pass  # QEMU does not listen yet, or has gone, or somebody closed the connection
                except OSError as error:
                    self._note(f"guest channel {self.path}: {error.strerror}")
                await asyncio.sleep(delay)
                delay = min(2 * delay, RECONNECT_SECONDS_MAX)
        finally:
            for task in self._checkpoints:
                task.cancel()
            await asyncio.gather(*self._checkpoints, return_exceptions=True)

    def resumed(self, generation: int, *, renew: bool = False, addresses: Sequence[tuple[str, str]] = ()) -> None:
        """Tell the guest that it goes on from a generation: now, or as soon as there is a connection.

        `renew`: from the very instant, so that its clock is late and its random numbers would come once more. Its
        network cards are to have new `addresses` in the place of old ones.
        """
        self._event = (generation, renew, addresses)
        self._send_event()

    def freeze(self, token: int, seconds: float) -> bool:
        """Have the guest freeze its file systems, for so many seconds at most; `frozen` is called with what it says.

        Gives False if there is no connection.
        """
        if not self.connected:
            return False
        self._send(protocol.encode_freeze(token, seconds))
        return True

    def thaw(self) -> None:
        """Let the guest's file systems go on."""
        self._send(protocol.encode_thaw())

    def remember(self, request: int, committed: Committed) -> None:
        """A checkpoint that an earlier supervisor committed: asked for again, it is answered and not made again."""
        self._remember(request, protocol.encode_committed(request, committed))

    def reset(self) -> None:
        """The guest is starting anew: forget half a line that it sent and replies that it never read.

        Called while it does not run. The connection is made again by itself.
        """
        if self._writer is not None:
            self._writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one connection to its end; whether the guest was well-behaved enough to be met again at once."""
        self._writer = writer
        splitter = LineSplitter()
        served = False
        try:
            self._send(b"\n")  # ends the half line that an earlier connection may have left with the guest
            self._send_event()
            while chunk := await reader.read(LINE_BYTES_MAX):
                lines = splitter.feed(chunk)
                await self._slow_down(max(0.0, _READ_COST + len(chunk) / LINE_BYTES_MAX - len(lines)))
                for line in lines:
                    await self._slow_down(1)
                    await self._answer(line)
                    if writer.is_closing():  # for not reading, or by `reset`
                        return False
                    served = True
        finally:
            self._writer = None
            writer.transport.abort()
        return served

    async def _slow_down(self, cost: float) -> None:
        wait = self._pace.take(cost)
        if wait:
            await asyncio.sleep(wait)

    async def _answer(self, line: bytes | None) -> None:
        if line is not None and not line.strip():
            return
        try:
            if line is None:
                raise RequestRefusedError("malformed", f"a line has at most {LINE_BYTES_MAX} bytes")
            request = protocol.decode_request(line)
        except RequestRefusedError as refused:
            self._note_malformed(refused)
            self._send(protocol.encode_refused(refused.request, refused.kind, str(refused)))
            return
        if isinstance(request, Checkpoint):
            self._begin_checkpoint(request)
        else:
            self._send(await self._outcome(request, self._dispatch(request)))

    async def _dispatch(self, request: Request) -> bytes:
        match request:
            case Hello():
                said = (protocol.printable(each, NAME_CHARACTERS_MAX) for each in (request.boot_id, request.agent))
                return protocol.encode_welcome(request.id, await self._handler.hello(*said))
            case Mark():
                await self._handler.mark(request.address, request.size, request.name, request.owner or GUEST)
                return protocol.encode_done(request.id)
            case Unmark():
                await self._handler.unmark(request.address, request.size)
                return protocol.encode_done(request.id)
            case Query():
                return protocol.encode_regions(request.id, await self._handler.query(), request.start)
            case Frozen():
                error = None if request.error is None else protocol.printable(request.error, ERROR_CHARACTERS_MAX)
                await self._handler.frozen(request.token, request.count, error)
                return protocol.encode_done(request.id)
            case Checkpoint():
                problem = protocol.name_problem(request.name)
                if problem is not None:
                    raise RequestRefusedError(*problem)
                return protocol.encode_committed(request.id, await self._handler.checkpoint(request.id, request.name))

    async def _outcome(self, request: Request, work: Coroutine[None, None, bytes]) -> bytes:
        """The reply that a handler's work comes to. Nothing that it raises goes further, cancellation of us apart."""
        [outcome] = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, RequestRefusedError):
            return protocol.encode_refused(request.id, outcome.kind, str(outcome))
        if isinstance(outcome, BaseException):
            what = type(request).__name__.lower()
            self._note(f"a {what} request of the guest failed: {type(outcome).__name__}: {one_line(outcome)}")
            return protocol.encode_refused(request.id, "failed", f"{what} failed on the host: its log says why")
        return outcome

    def _begin_checkpoint(self, request: Checkpoint) -> None:
        if request.id in self._answers:
            answer = self._answers[request.id]
            if answer is not None:  # else it is pending, and its reply comes with the commit
                self._send(answer)
            return
        if len(self._checkpoints) >= CHECKPOINTS_PENDING_MAX:
            text = f"{CHECKPOINTS_PENDING_MAX} checkpoints are under way: wait for one of them"
            self._send(protocol.encode_refused(request.id, "limit", text))
            return
        self._answers[request.id] = None
        task = asyncio.create_task(self._checkpoint(request))
        self._checkpoints.add(task)
        task.add_done_callback(self._checkpoints.discard)

    async def _checkpoint(self, request: Checkpoint) -> None:
        try:
            answer = await self._outcome(request, self._dispatch(request))
        except asyncio.CancelledError:
            del self._answers[request.id]
            raise
        self._remember(request.id, answer)
        self._send(answer)

    def _remember(self, request: int, answer: bytes) -> None:
        self._answers[request] = answer
        self._answers.move_to_end(request)
        finished = [each for each, known in self._answers.items() if known is not None]
        for oldest in finished[:-CHECKPOINTS_REMEMBERED]:
            del self._answers[oldest]

    def _send_event(self) -> None:
        if self._event is not None and self.connected:
            (generation, renew, addresses), self._event = self._event, None
            if renew:
                seed = os.urandom(protocol.SEED_BYTES)
                self._send(protocol.encode_resumed(generation, seed, time.time(), self.vm, addresses))
            else:
                self._send(protocol.encode_resumed(generation))

    def _send(self, line: bytes) -> None:
        """Queue a line for the guest. Without a connection it is lost, and the guest asks again."""
        if self._writer is None or self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() + len(line) > OUTPUT_BYTES_MAX:
            self._note("the guest does not read its replies: they are dropped, and its connection made anew")
            self._writer.transport.abort()
            return
        self._writer.write(line)

    def _note_malformed(self, refused: RequestRefusedError) -> None:
        """Log garbage when there is 1, 2, 4, 8 ... of it: a noisy guest must not fill the host's log."""
        self._malformed += 1
        if self._malformed & (self._malformed - 1) == 0:
            self._note(f"lines of the guest that are no request, {self._malformed} so far, the last: {refused}")

    def _note(self, text: str) -> None:
        if not self._log_pace.has(1):
            self._suppressed += 1
            return
        more = f" ({self._suppressed} lines before it were too many to log)" if self._suppressed else ""
        self._suppressed = 0
        self._log(protocol.printable(f"VM {self.vm}: {text}", 1000) + more)
