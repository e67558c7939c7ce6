"""What a supervisor says, from a thread of its own: whoever does not read it, be it a full pipe or a terminal that
was told to wait, holds up neither the VM nor its captures.

Lines are kept in order, up to a bound; what does not fit is counted, and the count is said in its place. Of progress
only the latest word is kept. `say` and `progress` never wait and may be called from any thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType

from base.progress import Progress

LINES_MAX = 1000


class Speaker:
    """Writes lines to a descriptor, and hands progress on; a context manager whose end waits until all is said."""

    def __init__(self, descriptor: int, show: Progress, lines_max: int = LINES_MAX) -> None:
        self._descriptor, self._show, self._lines_max = descriptor, show, lines_max
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._lost = 0
        self._latest: tuple[str, int, int] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="speaker", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """One line."""
        with self._changed:
            if self._lost or len(self._lines) >= self._lines_max:
                self._lost += 1
            else:
                self._lines.append(line)
            self._changed.notify()

    def progress(self, what: str, done: int, total: int) -> None:
        """How far work has come, as base.progress has it."""
        with self._changed:
            self._latest = (what, done, total)
            self._changed.notify()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._latest or self._closing)
                if not self._lines and not self._latest:
                    return
                lines, latest = [*self._lines], self._latest
                if self._lost:
                    lines.append(f"({self._lost} lines that were not read in time are left out)")
                self._lines.clear()
                self._lost, self._latest = 0, None
            self._write("".join(f"{line}\n" for line in lines).encode(errors="replace"))
            if latest is not None:
                self._show(*latest)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError:  # whoever read it is gone: that must not end what supervises a VM
                os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._descriptor)
