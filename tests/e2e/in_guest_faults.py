"""What the tests of faults have in the guest, besides in_guest.py: the agent's port in the hands of a bad program."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import mmap
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import perdure_guest
from runner import area

PAGE = 4096
PORT = "/dev/virtio-ports/org.perdure.agent.0"


def fill(name: str, size: int) -> None:
    """Tag an area and fill it with what nobody has stored before."""
    area(name, size)[:] = os.urandom(size)


def write_pages(numbers: Iterable[int]) -> None:
    """Write something new into pages of the device, counted from the start of its data, tagged or not."""
    device = perdure_guest.dax_devices()[0]
    descriptor = os.open(device.path, os.O_RDWR)
    with contextlib.closing(mmap.mmap(descriptor, device.end - device.start)) as memory:
        os.close(descriptor)
        for number in numbers:
            memory[number * PAGE : (number + 1) * PAGE] = os.urandom(PAGE)


def problem(call: Callable[[], Any]) -> str:
    """The kind of the PersistenceError that it raises."""
    try:
        return f"none, but {call()!r}"
    except perdure_guest.PersistenceError as error:
        return error.kind


def in_background(call: Callable[[], Any]) -> list[Any]:
    """A list that will have its result."""
    results: list[Any] = []
    threading.Thread(target=lambda: results.append(call()), daemon=True).start()
    return results


def stop_agent() -> None:
    """SIGKILL."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        pid = int(path.split("/")[2])
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if b"\0agent\0--foreground" in file.read() and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)


def start_agent() -> None:
    """As at boot."""
    subprocess.Popen(["perdure-guest", "agent", "--foreground"])


class Port:
    """The agent's port, once the agent has ended. `counts`: what `mark_pages` was answered, by kind, None for ok."""

    def __init__(self) -> None:
        self.counts: Counter[str | None] = Counter()
        self._lines = perdure_guest.LineReader(1 << 20)
        self._replies: list[dict[str, Any]] = []
        self._closing = False
        self._flood: threading.Thread | None = None
        while True:
            try:
                self._descriptor = os.open(PORT, os.O_RDWR)
                return
            except OSError as error:  # the agent is not gone yet
                if error.errno != errno.EBUSY:
                    raise

    def ask(self, line: bytes) -> tuple[int, str | None]:
        """Write a line; id and kind of the reply."""
        self._write(line + b"\n")
        reply = self._reply()
        return reply["id"], reply.get("kind")

    def flood(self) -> None:
        """Write requests without end, and read none of the replies."""
        requests = b'{"v":1,"id":1,"do":"query"}\n' * 100

        def work() -> None:
            while not self._closing:
                self._write(requests)

        self._flood = threading.Thread(target=work, daemon=True)
        self._flood.start()

    def mark_pages(self, start: int, count: int) -> None:
        """Tag pages one by one, without waiting for replies; they are counted by a thread."""

        def write() -> None:
            for number in range(count):
                request = {"v": 1, "id": number, "do": "mark", "address": start + number * PAGE, "size": PAGE}
                self._write(json.dumps({**request, "name": f"page {number}"}).encode() + b"\n")

        def read() -> None:
            while sum(self.counts.values()) < count:
                self.counts[self._reply().get("kind")] += 1

        for work in (write, read):
            threading.Thread(target=work, daemon=True).start()

    def answered(self, count: int) -> dict[str | None, int]:
        """Wait for so many replies to `mark_pages`; `counts` as they are then."""
        while sum(self.counts.values()) < count:
            time.sleep(0.01)  # between two looks
        return dict(self.counts)

    def close(self) -> None:
        """Give the port back."""
        self._closing = True
        if self._flood is not None:
            self._flood.join()
        os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view[:65536]) :]

    def _reply(self) -> dict[str, Any]:
        """The next message that is no event."""
        while not self._replies:
            messages = map(perdure_guest.decode, self._lines.feed(os.read(self._descriptor, 65536)))
            self._replies += [each for each in messages if each is not None and "ok" in each]
        return self._replies.pop(0)
