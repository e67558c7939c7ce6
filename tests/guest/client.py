"""Runs Python in the test guest, from a test on the host. The other side is runner.py, inside the guest.

A VM that is to be talked to needs the guest that scripts/build-guest makes, and a second port next to the agent's:

    -chardev socket,id=test,path=SOCKET,server=on,wait=off -device virtserialport,chardev=test,name=org.perdure.test.0

Then

    with GuestShell(SOCKET) as guest:
        guest.wait_ready(60)
        guest.run("memory = area('numbers', 1 << 20); memory[:4] = b'1234'")
        assert guest.run("bytes(memory[:4]).decode()") == "1234"
        guest.reboot(60)                                     # returns when the guest is up again
        guest.run("memory = area('numbers', 1 << 20)")       # a new boot has a new namespace

Code runs in one namespace per boot. It has `perdure_guest` (the library), and of runner.py `area(name, size)` (a
persistent area that stays mapped), `reboot()`, `poweroff()`, `panic()`, `boot_id()`; everything else is imported. The
value of `run` is that of the last statement if it is an expression, as JSON keeps it (tuples become lists, bytes and
other objects their repr).

`start` runs code in a thread of the guest, for load or for what does not return; `finished` waits for its end.

A shell outlives reboots of the guest, and QEMU processes too: after either one, `wait_ready`. Times are in seconds and
bound the whole call. One test's thread uses one shell; QEMU takes one connection at a time to a port.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PING_SECONDS = 1.0
"""Between questions whether the guest is up; usually it says so by itself before the second one."""


class GuestCodeError(AssertionError):
    """The code raised in the guest; the message is the traceback from there."""


class GuestGoneError(AssertionError):
    """No answer: the guest rebooted, QEMU closed the port, or time was up."""


class GuestShell:
    """The connection to a guest's test runner. `boot_id` is that of the boot that was last seen ready, or None."""

    def __init__(self, socket_path: Path | str) -> None:
        self.socket_path = str(socket_path)
        self.boot_id: str | None = None
        self._socket: socket.socket | None = None
        self._rest = b""
        self._last_id = 0
        self._finished: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> GuestShell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. The guest goes on; `wait_ready` connects again."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    def wait_ready(self, seconds: float = 60.0, *, after: str | None = None) -> str:
        """Wait until the guest is up and answers; returns its boot id.

        Connects when there is no connection (QEMU need not have made the socket yet). `after` is a boot id that does
        not count: pass what `boot_id` was before a reboot. Raises GuestGoneError.
        """
        deadline = time.monotonic() + seconds
        while True:
            pause = min(deadline, time.monotonic() + PING_SECONDS)
            try:
                self._connect(deadline)
                self._send({"ping": True})
                while True:
                    message = self._receive(pause)
                    if message.get("event") == "ready" and message["boot_id"] != after:
                        self.boot_id = str(message["boot_id"])
                        return self.boot_id
            except GuestGoneError as error:
                if time.monotonic() >= deadline:
                    raise GuestGoneError(
                        f"{self.socket_path}: no guest is ready after {seconds:g} s: {error}"
                    ) from error

    def run(self, code: str, seconds: float = 60.0) -> Any:
        """Run code in the guest and return its value. Raises GuestCodeError, GuestGoneError (never asks twice)."""
        return self._ask({"python": code}, seconds)

    def start(self, code: str, seconds: float = 60.0) -> int:
        """Run code in a thread of the guest and return at once, with the number that `finished` takes."""
        self._ask({"start": code}, seconds)
        return self._last_id

    def finished(self, number: int, seconds: float = 60.0) -> Any:
        """Wait for the end of code that was started, and return its value. Raises GuestCodeError, GuestGoneError."""
        deadline = time.monotonic() + seconds
        while number not in self._finished:
            self._note(self._receive(deadline))
        return _value(self._finished.pop(number))

    def reboot(self, seconds: float = 60.0) -> str:
        """Let the guest reboot itself, and return the id of its next boot when it is up."""
        before = self.boot_id
        with contextlib.suppress(GuestGoneError):  # it may be down before its answer is read
            self.start("reboot()", seconds)
        return self.wait_ready(seconds, after=before)

    def _ask(self, request: dict[str, Any], seconds: float) -> Any:
        if self._socket is None:
            raise GuestGoneError(f"{self.socket_path}: not connected: call wait_ready first")
        deadline = time.monotonic() + seconds
        self._last_id += 1
        self._send({"id": self._last_id, **request})
        while True:
            message = self._receive(deadline)
            self._note(message)
            if message.get("id") == self._last_id and "event" not in message:
                return _value(message)

    def _note(self, message: dict[str, Any]) -> None:
        """What comes unasked."""
        if message.get("event") == "finished":
            self._finished[message["id"]] = message
        elif message.get("event") == "ready" and message["boot_id"] != self.boot_id:
            raise GuestGoneError(f"{self.socket_path}: the guest has rebooted, its answer will not come")

    def _connect(self, deadline: float) -> None:
        while self._socket is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.socket_path)
                self._socket, self._rest = connection, b""
            except OSError as error:
                connection.close()
                if time.monotonic() >= deadline:
                    raise GuestGoneError(f"{self.socket_path}: {error.strerror}") from error
                time.sleep(0.02)  # between looks for a socket that QEMU has not made yet

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            raise GuestGoneError(f"{self.socket_path}: not connected")
        try:
            self._socket.settimeout(10)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self.close()
            raise GuestGoneError(f"{self.socket_path}: {error}") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; lines that are none (a boot can end in the middle of one) are passed over."""
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if not newline:
                self._fill(deadline)
                continue
            self._rest = rest
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    return message

    def _fill(self, deadline: float) -> None:
        if self._socket is None:
            raise GuestGoneError(f"{self.socket_path}: not connected")
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(1 << 20)
        except TimeoutError as error:
            raise GuestGoneError(f"{self.socket_path}: no answer in time") from error
        except OSError as error:
            self.close()
            raise GuestGoneError(f"{self.socket_path}: {error}") from error
        if not data:
            self.close()
            raise GuestGoneError(f"{self.socket_path}: QEMU closed the port")
        self._rest += data


def _value(message: dict[str, Any]) -> Any:
    if message["ok"]:
        return message.get("value")
    raise GuestCodeError(message["error"])
