"""Progress of long work, as a plain callable, so that no layer knows of terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a piece of work has come; may be called from any thread."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`what` names the work; `done` and `total` are bytes (or items where `what` says so)."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
