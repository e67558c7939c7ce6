"""How fast dirty pages are stored ahead, and how often one looks for them. Pure: whoever drains says what he saw.

Two limits hold, bytes a second and a share of one processor: after each piece of work comes the pause that keeps both.
Between looks is the time for which a page must have rested before it is stored; it follows the guest. Where much of
what was stored is written again soon, the time is doubled, up to eight seconds: storing it was in vain. Where nearly
all of it rests, the time is halved, down to half a second.
"""

from __future__ import annotations

from dataclasses import dataclass

LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.5, 8.0
_PIECE_SECONDS = 0.1
"""Of work at once: a capture that is asked for waits for so long at most."""
_PIECE_MIN, _PIECE_MAX = 256 << 10, 8 << 20
_IN_VAIN_HIGH, _IN_VAIN_LOW = 0.5, 0.1
_SMOOTH = 0.3


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used in the background: bytes a second, and a share of one processor (0 to 1)."""

    bytes_per_second: int
    share: float


class Pace:
    """The pace of one VM's write-back. Rates are bytes a second, smoothed."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._speed = 64.0 * (1 << 20)  # of storing, as far as it is known: bytes a second of processor time
        self.look_seconds = 1.0
        self.drain_rate = self.dirty_rate = 0.0

    @property
    def piece(self) -> int:
        """Bytes to store at once."""
        return int(min(max(self._speed * _PIECE_SECONDS, _PIECE_MIN), _PIECE_MAX))

    def looked(self, seconds: float, fresh: int, stored: int, in_vain: int) -> None:
        """A look, so long after the last one, has found `fresh` bytes written; `stored` had been stored in between the
        two looks before, and `in_vain` of them are among the fresh ones."""
        if seconds > 0:
            self.dirty_rate += _SMOOTH * (fresh / seconds - self.dirty_rate)
            self.drain_rate += _SMOOTH * (stored / seconds - self.drain_rate)
        if stored and in_vain >= _IN_VAIN_HIGH * stored:
            self.look_seconds = min(2 * self.look_seconds, LOOK_SECONDS_MAX)
        elif stored and in_vain <= _IN_VAIN_LOW * stored:
            self.look_seconds = max(self.look_seconds / 2, LOOK_SECONDS_MIN)

    def rest(self, stored: int, processor_seconds: float, elapsed: float) -> float:
        """Seconds to do nothing after a piece of work that took so much."""
        if stored and processor_seconds > 0:
            self._speed += _SMOOTH * (stored / processor_seconds - self._speed)
        wanted = max(stored / self._budget.bytes_per_second, processor_seconds / self._budget.share)
        return max(0.0, wanted - elapsed)
