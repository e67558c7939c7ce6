"""Runs inside the test guest and executes what the tests on the host send; the host's side is client.py.

JSON lines over the virtio-serial port `org.perdure.test.0`, host to guest:

    {"id":N,"python":"code"}   run it; the answer carries the value of its last statement if that is an expression
    {"id":N,"start":"code"}    run it in a thread: answered at once, and again with an event when it ends
    {"ping":true}              say ready again

Guest to host:

    {"event":"ready","boot_id":"text"}                           when a host connects, and for each ping
    {"id":N,"ok":true,"value":...} or {"id":N,"ok":false,"error":"traceback"}
    {"event":"finished","id":N,"ok":true} or {...,"ok":false,"error":"traceback"}

All code shares one namespace, which has `perdure_guest` and the functions of `helpers`. What JSON cannot say becomes
its repr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from _ast import Expr, Expression, PyCF_ONLY_AST  # `ast` and `traceback` take an emulated guest a fifth of a second
from collections.abc import Callable
from typing import Any

import perdure_guest

PORT_NAME = "org.perdure.test.0"
LINE_MAX = 64 << 20


def area(name: str, size: int) -> memoryview:
    """A persistent area that stays mapped until the guest goes down."""
    context = perdure_guest.persistent_area(name, size)
    _kept.append(context)
    return context.__enter__()


_kept: list[Any] = []


def reboot() -> None:
    """Reboot the guest at once, as `reboot -f` does."""
    os.spawnv(os.P_WAIT, "/bin/busybox", ["reboot", "-f"])


def poweroff() -> None:
    """Switch the guest off at once."""
    os.spawnv(os.P_WAIT, "/bin/busybox", ["poweroff", "-f"])


def panic() -> None:
    """Make the kernel panic."""
    with open("/proc/sysrq-trigger", "w", encoding="ascii") as file:
        file.write("c")


def boot_id() -> str:
    """The kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


helpers: tuple[Callable[..., Any], ...] = (area, reboot, poweroff, panic, boot_id)


class Runner:
    """Executes requests in one namespace and writes answers to a descriptor, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.namespace: dict[str, Any] = {"__name__": "__guest__", "perdure_guest": perdure_guest}
        self.namespace.update((each.__name__, each) for each in helpers)

    def on_line(self, line: bytes) -> None:
        """One request; what is none is said on the console."""
        message = perdure_guest.decode(line)
        if message is None:
            if line:
                print(f"runner: not a request: {line[:200]!r}", file=sys.stderr)
        elif "ping" in message:
            write_ready(self._descriptor)
        elif isinstance(message.get("python"), str):
            self._answer({"id": message.get("id"), **self._execute(message["python"])})
        elif isinstance(message.get("start"), str):
            self._answer({"id": message.get("id"), "ok": True, "value": None})
            threading.Thread(target=self._background, args=(message.get("id"), message["start"]), daemon=True).start()
        else:
            self._answer({"id": message.get("id"), "ok": False, "error": "neither python nor start"})

    def _background(self, request_id: Any, code: str) -> None:
        self._answer({"event": "finished", "id": request_id, **self._execute(code)})

    def _execute(self, code: str) -> dict[str, Any]:
        try:
            tree = compile(code, "<test>", "exec", PyCF_ONLY_AST)
            last = tree.body[-1] if tree.body else None
            if not isinstance(last, Expr):
                exec(compile(tree, "<test>", "exec"), self.namespace)
                return {"ok": True, "value": None}
            tree.body.pop()
            exec(compile(tree, "<test>", "exec"), self.namespace)
            return {"ok": True, "value": eval(compile(Expression(last.value), "<test>", "eval"), self.namespace)}
        except BaseException:  # the code is a test's: whatever it raises, exiting included, is its answer
            import traceback

            return {"ok": False, "error": traceback.format_exc()}

    def _answer(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, default=repr).encode() + b"\n"
        with self._lock:
            write_all(self._descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it; waits for a host to be there."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:65536]) :]


def write_ready(descriptor: int) -> None:
    """Say that the guest is up."""
    write_all(descriptor, json.dumps({"event": "ready", "boot_id": boot_id()}).encode() + b"\n")


def serve(descriptor: int, runner: Runner) -> None:
    """Say ready, and execute what comes, until the host goes away."""
    write_ready(descriptor)
    lines = perdure_guest.LineReader(LINE_MAX)
    while data := os.read(descriptor, 65536):
        for line in lines.feed(data):
            runner.on_line(line)


def main() -> int:
    """Serve one host after the other, for ever; with the agent's arguments, beside the agent, a child of this process
    that is like one of its own."""
    if sys.argv[1:] == ["agent", "--foreground"] and not os.fork():
        return perdure_guest.main(sys.argv[1:])
    descriptor = os.open(perdure_guest.find_port(PORT_NAME), os.O_RDWR | os.O_CLOEXEC)
    runner = Runner(descriptor)
    while True:
        serve(descriptor, runner)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
