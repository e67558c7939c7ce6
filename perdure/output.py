"""What people and programs see: one JSON document or lines of text on standard output, progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from base.progress import Progress, silent
from base.units import format_size

_COUNTED_IN_ITEMS = ("indexing", "checking", "reading packs", "marking", "putting in order")


@dataclass(frozen=True, slots=True)
class Output:
    """How a command speaks."""

    json: bool
    quiet: bool

    def result(self, document: dict[str, Any], text: Callable[[], Iterable[str]] | None = None) -> None:
        """The command's result, once: the document with --json, else the lines of `text` unless --quiet."""
        if self.json:
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")
        elif text is not None and not self.quiet:
            for line in text():
                print(line)

    def note(self, line: str) -> None:
        """Something worth knowing, on standard error."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def progress(self) -> Progress:
        """Bars on a terminal, nothing elsewhere."""
        if self.quiet or not sys.stderr.isatty():
            return silent
        return _Bars()


class _Bars:
    """One progress bar at a time, drawn only for work that takes longer than half a second."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: Any = None
        self._began = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._finish()
            self._what, self._began = what, time.monotonic()
        if self._bar is None and time.monotonic() - self._began > 0.5 and done < total:
            from tqdm import tqdm  # 60 ms that short work need not pay

            items = what.startswith(_COUNTED_IN_ITEMS)
            self._bar = tqdm(desc=what, total=total, unit="" if items else "B", unit_scale=not items, leave=False)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._finish()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._what = ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: str = "") -> list[str]:
    """Lines of a plain table; columns named in `right` (space-separated) are right-aligned."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    to_right = [name in right.split() for name in header]
    return [
        "  ".join(
            cell.rjust(width) if aligned else cell.ljust(width)
            for cell, width, aligned in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in cells
    ]


def size(count: int | None) -> str:
    """A byte count for a table."""
    return "-" if count is None else format_size(count)


def moment(time_utc: str) -> str:
    """RFC 3339 in UTC to the reader's local time."""
    from datetime import datetime

    return datetime.fromisoformat(time_utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")
