"""The QMP session with one QEMU process: commands, events, their time limits.

A thin layer over qemu.qmp that names VM and command in every error, bounds every wait in time, and notices at once
when the session is lost. Everything here belongs to one event loop. QEMU serves one client of its monitor socket
at a time: a second one waits for the greeting in vain, and is told so.

Source: QEMU, docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp import Runstate as Session

from base.errors import VirtualMachineError
from vm import addresses
from vm.addresses import AddressMap
from vm.identity import state_of
from vm.naming import Names
from vm.qemu import Qemu

CONNECT_SECONDS = 20
COMMAND_SECONDS = 30
BANDWIDTH_DEFAULT = 128 << 20  # of migrations, QEMU's own
_RETRY_SECONDS = 0.002
_SOME_SECONDS = 1.0
"""How often it is asked whether QEMU is excused."""
_CLOSE_SECONDS = 2
_END_SECONDS = 0.5
"""For the end of a process whose monitor is gone: after that the session is taken for lost, and QEMU for alive. A guest
may stand still meanwhile."""

_Result = TypeVar("_Result")


class DeadlineError(VirtualMachineError):
    """What was waited for did not come in time; QEMU may be busy, or hang."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that QEMU reported. `time_s` is seconds since the epoch, by the host's clock."""

    name: str
    data: Mapping[str, Any]
    time_s: float

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Event:
        """From QMP's JSON object."""
        stamp = message["timestamp"]
        return cls(message["event"], message.get("data", {}), stamp["seconds"] + stamp["microseconds"] / 1e6)


class Events:
    """Events of some names from the moment it was made, in order; a context manager. Made by `Monitor.events`."""

    def __init__(self, monitor: Monitor, names: tuple[str, ...]) -> None:
        self._monitor = monitor
        self._listener = EventListener(names or None)

    async def next(self, timeout_s: float | None = None, **data: Any) -> Event:
        """The next event whose data has the given values; others are passed over. None waits without end.

        Raises VirtualMachineError if the session is lost or the time is over.
        """
        return await self._monitor.bounded(self._matching(data), timeout_s, "an event")

    def clear(self) -> None:
        """Forget those that came and were not waited for."""
        self._listener.clear()

    async def _matching(self, data: Mapping[str, Any]) -> Event:
        while True:
            event = Event.of(await self._listener.get())
            if data.items() <= event.data.items():
                return event

    def __enter__(self) -> Events:
        self._monitor.listen(self._listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.listen_no_more(self._listener)


def never() -> bool:
    """Whether QEMU is excused: it is not."""
    return False


class Monitor:
    """A session; made by `connect`. While `excused` says so, QEMU may take longer than any time limit: for when it is
    known what it waits for."""

    def __init__(self, qemu: Qemu, client: QMPClient, excused: Callable[[], bool] = never) -> None:
        self.vm = qemu.vm
        self.excused = excused
        self.names = Names()
        """What this QEMU calls the parts of the VM."""
        self.migration_bandwidth = BANDWIDTH_DEFAULT
        """Bytes a second that migrations may take that are not ours."""
        self._qemu, self._client = qemu, client
        self._listeners: list[EventListener] = []
        self.stopped = False
        """Whether the guest stands still because of us, as far as QEMU has answered."""
        self._lost = asyncio.Event()
        self._wait_until: float | None = None
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def connect(
        cls, qemu: Qemu, timeout_s: float = CONNECT_SECONDS, excused: Callable[[], bool] = never
    ) -> Monitor:
        """Retry until it answers. Raises VirtualMachineError, with QEMU's own words if it has ended."""
        return cls(qemu, await cls._open(qemu, timeout_s, excused), excused)

    async def connect_again(self, timeout_s: float = CONNECT_SECONDS) -> None:
        """A session in the place of one that was lost. Who listens for events goes on, without those that came in
        between. Raises VirtualMachineError as `connect` does; then this one stays lost."""
        assert self.lost
        client = await self._open(self._qemu, timeout_s, self.excused)
        before, self._client = self._client, client
        for each in self._listeners:
            client.register_listener(each)
        self._lost, self._wait_until = asyncio.Event(), None
        self._watcher = asyncio.create_task(self._watch())
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):  # it says once more how it ended
            async with asyncio.timeout(_CLOSE_SECONDS):
                await before.disconnect()

    @staticmethod
    async def _open(qemu: Qemu, timeout_s: float, excused: Callable[[], bool]) -> QMPClient:
        deadline = asyncio.get_running_loop().time() + timeout_s
        connected = False
        while True:
            if not qemu.folder.monitor.exists() and qemu.alive() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_RETRY_SECONDS)  # an attempt takes a millisecond, which QEMU may need to start
                continue
            client = QMPClient(qemu.vm)
            try:
                async with asyncio.timeout_at(deadline):
                    await client.connect(str(qemu.folder.monitor))
                return client
            except ConnectError as error:
                connected = not isinstance(error.exc, OSError)
            except TimeoutError:
                connected = qemu.folder.monitor.exists()
            if not qemu.alive():
                raise VirtualMachineError(f"VM {qemu.vm}: {qemu.end()}")
            if excused():
                deadline = asyncio.get_running_loop().time() + timeout_s
            elif asyncio.get_running_loop().time() + _RETRY_SECONDS >= deadline:
                problem = "its monitor does not answer: another program is connected to it, or QEMU hangs"
                if not connected:
                    problem = f"QEMU (process {qemu.pid}) does not listen at {qemu.folder.monitor}"
                    said = qemu.last_lines()
                    problem += (
                        f": {said}" if said else ""
                    ) + "; end it, and the next `perdure run` captures its memory"
                raise VirtualMachineError(f"VM {qemu.vm}: after {timeout_s:g} s {problem}")
            await asyncio.sleep(_RETRY_SECONDS)

    async def execute(self, command: str, /, *, timeout_s: float = COMMAND_SECONDS, **arguments: Any) -> Any:
        """Run a QMP command and give its result. Raises VirtualMachineError naming VM and command."""
        try:
            waiting = self._client.execute(command, arguments or None)
            return await self.bounded(waiting, timeout_s, f"the answer to `{command}`")
        except ExecuteError as error:
            raise VirtualMachineError(f"VM {self.vm}: QEMU refused `{command}`: {error.error.error.desc}") from error
        except (ExecInterruptedError, QMPError, EOFError, OSError) as error:
            raise await self._ended(f"the answer to `{command}`") from error

    async def human(self, line: str, *, timeout_s: float = COMMAND_SECONDS) -> str:
        """The text that a command of the human monitor prints. Raises VirtualMachineError."""
        arguments: dict[str, Any] = {"command-line": line}
        return str(await self.execute("human-monitor-command", timeout_s=timeout_s, **arguments))

    def events(self, *names: str) -> Events:
        """Listen for events of these names, or all; from the moment that it is entered, nothing is missed."""
        return Events(self, names)

    def listen(self, listener: EventListener) -> None:
        """What a listener asked for is put into it from now on, in this session and one that takes its place."""
        self._client.register_listener(listener)
        self._listeners.append(listener)

    def listen_no_more(self, listener: EventListener) -> None:
        """Undo `listen`."""
        self._listeners.remove(listener)
        with contextlib.suppress(ValueError):  # a lost session may have dropped it
            self._client.remove_listener(listener)

    async def wait_event(self, name: str, timeout_s: float, **data: Any) -> Event:
        """The next event of that name with the given data. For what a command of ours causes, listen before it."""
        with self.events(name) as events:
            return await events.next(timeout_s, **data)

    @property
    def version(self) -> tuple[int, int]:
        """QEMU's, as in (7, 2), by its greeting."""
        greeting = self._client.greeting
        assert greeting is not None
        version: Any = greeting.QMP.version["qemu"]
        return int(version["major"]), int(version["minor"])

    async def add_descriptor(self, name: str, descriptor: int) -> int:
        """Hand QEMU a copy of an open file, which it keeps as /dev/fdset/N until `remove-fd`; gives N. The name is what
        `query-fdsets` calls it. Raises VirtualMachineError.
        """
        self._send(descriptor)
        return int((await self.execute("add-fd", opaque=name))["fdset-id"])

    async def give_descriptor(self, name: str, descriptor: int) -> None:
        """Hand QEMU a copy of an open file, under a name (`getfd`). Raises VirtualMachineError."""
        self._send(descriptor)
        await self.execute("getfd", fdname=name)

    def _send(self, descriptor: int) -> None:
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise VirtualMachineError(f"VM {self.vm}: cannot hand a descriptor to QEMU: {error}") from error

    async def stop(self) -> None:
        """Pause the guest; its disk I/O is complete afterwards."""
        self.stopped = True  # also if the answer does not come
        await self.execute("stop")

    async def cont(self) -> None:
        """Let the guest run."""
        await self.execute("cont")
        self.stopped = False

    async def query_status(self) -> str:
        """QEMU's run state, as `running`, `paused`, `prelaunch`, `shutdown`."""
        return str((await self.execute("query-status"))["status"])

    async def address_map(self, ram_size: int) -> AddressMap:
        """Where the regions and `ram_size` bytes of main memory are in guest-physical memory now."""
        devices = await self.execute("query-memory-devices")
        return addresses.address_map(self.vm, devices, await self.human("info mtree -f"), ram_size, self.names)

    @property
    def lost(self) -> bool:
        """Whether the session has ended, from whichever side."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Return when the session has ended, from whichever side."""
        await self._lost.wait()

    async def disconnect(self) -> None:
        """End the session; QEMU goes on. Never raises: what is gone is disconnected."""
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        self._lost.set()
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._client.disconnect()

    async def bounded(self, waiting: Awaitable[_Result], timeout_s: float | None, what: str) -> _Result:
        """Await something of this session, until the time is over or the session is lost."""
        task = asyncio.ensure_future(waiting)
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            left, done = timeout_s, set[asyncio.Future[Any]]()
            while not done and (left is None or left > 0):
                some = None if left is None else min(left, _SOME_SECONDS)
                done, _ = await asyncio.wait((task, lost), timeout=some, return_when=asyncio.FIRST_COMPLETED)
                if left is not None and some is not None and not self.excused():
                    left -= some
            if task.done():
                return task.result()
            if lost.done():  # there may be another session by now
                raise await self._ended(what)
            pid = self._qemu.pid
            why = f": process {pid} is stopped, kill -CONT {pid} lets it go on" if state_of(pid) == "T" else ""
            raise DeadlineError(f"VM {self.vm}: QEMU did not give {what} within {timeout_s:g} s{why}")
        finally:
            for each in (task, lost):
                each.cancel()
            await asyncio.gather(task, lost, return_exceptions=True)

    async def _ended(self, what: str) -> VirtualMachineError:
        if self._wait_until is None:
            self._wait_until = time.monotonic() + _END_SECONDS
        left = max(0.0, self._wait_until - time.monotonic())  # once for all that fails with the session
        if await asyncio.to_thread(self._qemu.wait, left):  # the socket closes before the process is gone
            return VirtualMachineError(f"VM {self.vm}: {self._qemu.end()} (while waiting for {what})")
        return VirtualMachineError(f"VM {self.vm}: the connection to QEMU's monitor ended while waiting for {what}")

    async def _watch(self) -> None:
        while self._client.runstate == Session.RUNNING:
            await self._client.runstate_changed()
        self._lost.set()

    async def __aenter__(self) -> Monitor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()
