"""The control socket of a supervisor: `serve` is its side (asyncio), `call` is the side of all other commands (plain).

JSON lines on a unix socket, one request a connection:

    {"do":"snapshot","arguments":{...}}
    {"progress":{"what":"capturing","done":4096,"total":8192}} or {"notice":"text"}      none or many
    {"ok":true,"result":{...}}
    {"ok":false,"error":"one line","family":"ConflictError","exit_code":1,"facts":{...}}

Who may speak: the socket has mode 0600 in a folder of mode 0700, and each peer's user is asked of the kernel: the
supervisor's own or root. A flock on the folder is held while serving, so that a socket found by its holder is one
that a dead supervisor left. The folder is named `<VM>`; the socket is bound and reached through the opened folder,
so that its path may be longer than the 107 bytes that unix(7) allows.

A request goes on when its client leaves: what it began (a capture, a rollback) is not left half done.
A server belongs to one event loop; `Reporter` and `call` may be used from any thread. A forked child loses the
server's descriptors at once: it would otherwise keep the socket alive after its parent, with nobody to answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from base import errors
from base.errors import (
    ConflictError,
    LockedError,
    NotFoundError,
    PerdureError,
    StorageError,
    UsageError,
    WorkerError,
    one_line,
)
from base.progress import Progress

if TYPE_CHECKING:
    import asyncio  # imported where it is used: 30 ms that a command which only calls need not pay

REQUEST_BYTES_MAX = 1 << 20
_UNREAD_BYTES_MAX = 1 << 20  # progress and notices that wait for a client; beyond it they are dropped
_PROGRESS_SECONDS = 0.05
_PATIENCE_SECONDS = 5.0
_UCRED = struct.Struct("=iII")  # pid, uid, gid: unix(7), SO_PEERCRED
_FAMILIES: dict[str, type[PerdureError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PerdureError)
}

Handler = Callable[[dict[str, Any], "Reporter"], Awaitable[dict[str, Any]]]


class _Request(msgspec.Struct):
    do: str
    arguments: dict[str, Any] = {}


class _ProgressMessage(msgspec.Struct):
    what: str
    done: int
    total: int


class _Message(msgspec.Struct):
    """Any line from the server, as the client reads it; `ok` is there in the last one only."""

    ok: bool | None = None
    result: dict[str, Any] = {}
    error: str = ""
    family: str = ""
    exit_code: int = 1
    facts: dict[str, Any] = {}
    progress: _ProgressMessage | None = None
    notice: str | None = None


class Reporter:
    """What a handler tells its client while it works: it is a `base.progress.Progress`, and has notices besides.

    Never blocks and never fails, whether the client reads, or is still there, or not. Any thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._loop, self._reader, self._writer = loop, reader, writer
        self._said = ("", 0.0)  # what progress was last told of, and when

    @property
    def connected(self) -> bool:
        """Whether the client waits for the answer; for requests that only make sense while it does."""
        return not self._reader.at_eof() and not self._writer.is_closing()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Progress; told when the work is new or complete, and otherwise 20 times a second at most."""
        now = time.monotonic()
        if done < total and self._said[0] == what and now - self._said[1] < _PROGRESS_SECONDS:
            return
        self._said = (what, now)
        self._post({"progress": {"what": what, "done": int(done), "total": int(total)}})

    def notice(self, text: str) -> None:
        """One line that the user should see now."""
        self._post({"notice": text})

    def _post(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the supervisor has ended
            self._loop.call_soon_threadsafe(self._write, _line(message))

    def _write(self, line: bytes) -> None:
        unread = self._writer.transport.get_write_buffer_size()
        if not self._writer.is_closing() and unread < _UNREAD_BYTES_MAX:
            self._writer.write(line)


class ControlServer:
    """A supervisor's open control socket. Made by `serve`; an asynchronous context manager that closes it."""

    def __init__(self, path: Path, directory: int, handlers: Mapping[str, Handler], log: Callable[[str], None]) -> None:
        self.path = path
        self._vm = path.parent.name
        self._directory = directory
        self._handlers, self._log = handlers, log
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server: asyncio.Server | None = None
        self._conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._busy: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ControlServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Take no more requests, give those under way `patience_seconds` to be answered, then cancel them.

        Not for handlers: one that ends the supervisor sets an event, and its reply is sent before the end.
        """
        import asyncio

        if self._server is None:
            return
        self._server.close()
        self._server = None
        _remove(self._directory, self.path.name)
        if self._busy:
            await asyncio.wait(self._busy, timeout=patience_seconds)
        for task in self._conversations:
            task.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)
        os.close(self._directory)
        self._directory = -1

    async def _start(self) -> None:
        import asyncio

        listener = self._listener
        try:
            os.fchmod(listener.fileno(), 0o600)  # bind gives the file this mode: there is no moment with another
            listener.bind(_within(self._directory, self.path.name))
            self._server = await asyncio.start_unix_server(self._conversation, sock=listener, limit=REQUEST_BYTES_MAX)
        except BaseException as error:
            listener.close()
            if isinstance(error, OSError):
                raise StorageError.from_os(error, str(self.path), "listen") from error
            raise

    async def _conversation(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its connection to its end."""
        import asyncio

        task = asyncio.current_task()
        assert task is not None
        self._conversations[task] = writer
        try:
            answer = await self._converse(task, reader, writer)
            writer.write(answer)
            writer.close()  # at once: whatever a reporter still says is not sent after the answer
            await writer.wait_closed()
        except (OSError, asyncio.CancelledError):
            pass  # the client left, or we close; a cancelled task would be an error to asyncio's streams, which log it
        finally:
            del self._conversations[task]
            self._busy.discard(task)
            if not writer.is_closing() or writer.transport.get_write_buffer_size():
                writer.transport.abort()  # closed and sent, it must not be: asyncio's transport fails then

    async def _converse(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """The last line for a client; empty if it left without a request."""
        if _peer(writer.get_extra_info("socket")) not in (0, os.geteuid()):
            return _failure(PerdureError(f"VM {self._vm} belongs to another user"))
        try:
            line = await reader.readline()
        except ValueError:  # that is how it says that a line is longer than the limit
            return _failure(UsageError(f"a control request has at most {REQUEST_BYTES_MAX} bytes"))
        if not line.endswith(b"\n"):
            return b""
        self._busy.add(task)
        reporter = Reporter(task.get_loop(), reader, writer)
        return await self._answer(line, reporter)

    async def _answer(self, line: bytes, reporter: Reporter) -> bytes:
        """The last line of a request. Nothing that a handler raises goes further, cancellation of us apart."""
        import asyncio

        [outcome] = await asyncio.gather(self._carry_out(line, reporter), return_exceptions=True)
        if isinstance(outcome, bytes):
            return outcome
        if isinstance(outcome, asyncio.CancelledError):
            outcome = ConflictError(f"VM {self._vm}: the request was interrupted: its supervisor is stopping")
        elif not isinstance(_principal(outcome), PerdureError):
            self._log(f"VM {self._vm}: a control request failed: {type(outcome).__name__}: {one_line(outcome)}")
        return _failure(outcome)

    async def _carry_out(self, line: bytes, reporter: Reporter) -> bytes:
        try:
            request = msgspec.json.decode(line, type=_Request)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise UsageError(f"VM {self._vm}: not a control request: {error}") from error
        handler = self._handlers.get(request.do)
        if handler is None:
            raise UsageError(
                f"the supervisor of VM {self._vm} does not know {request.do!r}: is it of another version of Perdure?"
            )
        return _line({"ok": True, "result": await handler(request.arguments, reporter)})

    def _close_in_child(self) -> None:
        """After fork, in the child: give up the descriptors and leave everything else alone."""
        sockets = [writer.get_extra_info("socket").fileno() for writer in self._conversations.values()]
        for descriptor in (self._directory, self._listener.fileno(), *sockets):
            if descriptor >= 0:
                os.close(descriptor)


async def serve(path: Path, handlers: Mapping[str, Handler], log: Callable[[str], None]) -> ControlServer:
    """Listen on `path`, `<runtime folder>/<VM>/<name>`; the folder is made if it is missing.

    `log` is told of handlers that fail by other errors than ours, which the client sees as well.
    Raises LockedError if somebody serves there already; StorageError, also if the folder is open to other users.
    """
    directory = _open_private(path.parent)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            name, holder = path.parent.name, _holder(directory)
            who = "" if holder is None else f", process {holder}"
            message = f"VM {name} has a supervisor already{who}: see perdure status {name}"
            raise LockedError(message, pid=holder, purpose="supervising") from error
        _remove(directory, path.name)
        server = ControlServer(path, directory, handlers, log)
        await server._start()
    except BaseException:
        os.close(directory)
        raise
    _OPEN.add(server)
    return server


def call(
    path: Path,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    timeout_seconds: float | None = None,
) -> dict[str, Any]:
    """Ask the supervisor that listens on `path` and wait for its answer.

    `timeout_seconds` bounds each wait for its next line. Raises NotFoundError if there is no supervisor, WorkerError
    if it ends or falls silent before it answers, StorageError if the socket may not be used, and else what the
    supervisor raised: the same class of base.errors with the same message, attributes and exit code.
    """
    vm = path.parent.name
    request = _line(_Request(command, dict(arguments or {})))
    if len(request) > REQUEST_BYTES_MAX:
        raise UsageError(f"VM {vm}: {command}: a control request has at most {REQUEST_BYTES_MAX} bytes")
    with contextlib.closing(_messages(path, request, command, timeout_seconds)) as messages:
        for message in messages:
            if message.ok is not None:
                return _result(message)
            if message.progress is not None and progress is not None:
                progress(message.progress.what, message.progress.done, message.progress.total)
            if message.notice is not None and notice is not None:
                notice(message.notice)
    raise WorkerError(f"VM {vm}: its supervisor ended before it had answered {command}")


def _messages(
    path: Path, request: bytes, command: str, timeout_seconds: float | None
) -> Generator[_Message, None, None]:
    """What the supervisor says to a request, until it ends the connection. Only its errors are turned into ours,
    not those of whoever consumes the messages."""
    vm = path.parent.name
    with _connected(path) as connection:
        connection.settimeout(timeout_seconds)
        try:
            with contextlib.suppress(ConnectionError):  # it may have refused us unheard: what it said is there to read
                connection.sendall(request)
            with connection.makefile("rb") as lines:
                for line in lines:
                    yield msgspec.json.decode(line, type=_Message)
        except TimeoutError as error:
            raise WorkerError(f"VM {vm}: its supervisor said nothing for {timeout_seconds:g} s") from error
        except (ValueError, RecursionError) as error:  # msgspec's errors: half a line, or another program
            raise WorkerError(f"VM {vm}: its supervisor's answer to {command} cannot be understood") from error
        except ConnectionError:
            return


def _result(message: _Message) -> dict[str, Any]:
    if message.ok:
        return message.result
    family = _FAMILIES.get(message.family, PerdureError)
    error = family.__new__(family, message.error)  # the message is made already: no constructor has to make it again
    vars(error).update(message.facts)
    if message.exit_code != error.exit_code:
        error.exit_code = message.exit_code
    raise error


def _failure(error: BaseException) -> bytes:
    """The last line of a request that failed."""
    principal = _principal(error)
    text, family, code, facts = one_line(error), "PerdureError", PerdureError.exit_code, {}
    if isinstance(principal, PerdureError):
        family = next(kind.__name__ for kind in type(principal).__mro__ if _FAMILIES.get(kind.__name__) is kind)
        code = principal.exit_code
        facts = {name: value for name, value in vars(principal).items() if isinstance(value, str | int | float | None)}
    else:
        text = f"{type(error).__name__}: {text}"
    return _line({"ok": False, "error": text, "family": family, "exit_code": code, "facts": facts})


def _principal(error: BaseException) -> BaseException:
    """The error of ours that a group holds, whose family says what to do about it; an error alone is itself."""
    leaves = list(_leaves(error))
    return next((each for each in leaves if isinstance(each, PerdureError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    missing = f"VM {path.parent.name} is not running: start it with perdure run"
    with contextlib.ExitStack() as stack:
        try:
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory)
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.connect(_within(directory, path.name))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFoundError(missing) from error
        except OSError as error:
            raise StorageError.from_os(error, str(path), "connect") from error
        yield connection


def _open_private(folder: Path) -> int:
    """Open a folder, made if it is missing, that nobody else can enter."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError.from_os(error, str(folder), "open the folder") from error
    found = os.fstat(directory)
    if found.st_uid == os.geteuid() and found.st_mode & 0o077 == 0:
        return directory
    os.close(directory)
    problem = f"is open to other users (owner {found.st_uid}, mode {found.st_mode & 0o777:o}): make it yours, mode 700"
    raise StorageError(str(folder), problem)


def supervisor_of(folder: Path) -> int | None:
    """Process that serves in a VM's runtime folder; None if nobody does. The lock is not touched for it."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _holder(directory)
    finally:
        os.close(directory)


def _holder(directory: int) -> int | None:
    """Process that holds the lock on an opened folder; None if the kernel does not say. Source: proc_locks(5)."""
    facts = os.fstat(directory)
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
            return int(words[4])
    return None


def _within(directory: int, name: str) -> str:
    """A file in an opened folder as a path that is short however long the folder's own is."""
    return f"/proc/self/fd/{directory}/{name}"


def _remove(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _peer(connection: socket.socket) -> int:
    """User of the process at the other end, as of its connect."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def _line(message: msgspec.Struct | dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _forked() -> None:
    for server in list(_OPEN):
        server._close_in_child()


_OPEN: weakref.WeakSet[ControlServer] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forked)
