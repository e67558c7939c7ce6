"""What a prune would do: a pure plan from facts about packs, carried out by store.upkeep.prune.

Packs without anything in use go. Others are rewritten, which means that what is in use of them is copied into new packs
before they go, for one of four reasons, each within what is left of `max_rewrite_bytes`:

- *epoch*: they are sealed with a data key that was replaced (`perdure key rotate --rewrite` asks for this alone);
- *unused*: too much of the repository is not in use; those with the most to gain for what is copied come first;
- *scattered*: restoring the newest generation of a VM opens far more than it needs, since its chunks lie in many frames
  among others; those that cost the most for what is copied come first. New packs hold its chunks in address order;
- *small*: there are very many small packs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

EPOCH, UNUSED, SCATTERED, SMALL = "epoch", "unused", "scattered", "small"

FRAME_COST = 6
"""What opening a frame costs beside its content, in chunks of 4 KiB."""


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """What prune may leave and may do. Percent, bytes."""

    max_unused_percent: float = 5.0
    max_rewrite_bytes: int | None = 16 << 30
    """None: no limit. Bytes of packs as they are stored. At 41 ms of a processor a MiB, six minutes on two cores."""
    scattered_ratio: float = 1.15
    """Restoring the newest generation of a VM may cost so many times what it would from packs of its own..."""
    scattered_aim: float = 1.05
    """... and is brought down to so many times when it costs more, so that a while passes until it does again."""
    scattered_least: int = 1 << 13
    """Below this many chunks opened in vain, that is not worth anything: some 10 ms of a restore."""
    many_small: int = 256
    """So many packs of an eighth of the usual size or less are too many; down to a quarter of that they are merged."""
    epoch: int | None = None
    """Rewrite packs of epochs before this one, whatever is in them, and for no other reason."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """What the newest generation of a VM costs to restore: of each pack, by its number, (what is opened, what would be
    if frames held nothing but what some newest generation needs), in chunks."""

    vm: str
    packs: dict[int, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class PackUse:
    """Facts about a pack. `id` in hex; `used_bytes` of `size` are in use, estimated by frame."""

    number: int
    id: str
    epoch: int
    size: int
    chunks: int
    live: int
    used_bytes: int
    doomed: bool = False

    @property
    def unused_bytes(self) -> int:
        """What removing it gives back."""
        return self.size - self.used_bytes


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What is to be done. `rewrite` has a reason for each pack."""

    removed: tuple[PackUse, ...]
    rewritten: tuple[tuple[PackUse, str], ...]
    total_bytes: int
    unused_bytes: int
    packs: int
    scattered: dict[str, float] = field(default_factory=dict)
    """By VM: what restoring its newest generation costs now, times what it would from packs of its own."""

    @property
    def doomed(self) -> tuple[PackUse, ...]:
        """All packs that are to go."""
        return (*self.removed, *(each for each, _ in self.rewritten))

    @property
    def rewritten_bytes(self) -> int:
        """About what is copied."""
        return sum(each.used_bytes for each, _ in self.rewritten)

    @property
    def freed_bytes(self) -> int:
        """About what this gives back."""
        return sum(each.unused_bytes for each in self.doomed)


def plan(uses: Iterable[PackUse], scatters: Iterable[Scatter], settings: PruneSettings, pack_bytes: int) -> PrunePlan:
    """Choose packs. `pack_bytes`: the usual size of a pack."""
    everything = list(uses)
    scattered = list(scatters)
    kept = [each for each in everything if each.live]
    made = PrunePlan(
        removed=tuple(each for each in everything if not each.live),
        rewritten=(),
        total_bytes=sum(each.size for each in everything),
        unused_bytes=sum(each.unused_bytes for each in everything),
        packs=len(everything),
        scattered={each.vm: round(_ratio(each), 3) for each in scattered},
    )
    chosen = _Chosen(settings.max_rewrite_bytes)
    if settings.epoch is not None:
        for each in sorted(kept, key=lambda each: (not each.doomed, each.number)):
            if each.epoch < settings.epoch:
                chosen.take(each, EPOCH)
        return replace(made, rewritten=chosen.rows())
    _choose_unused(kept, settings.max_unused_percent, chosen)
    _choose_scattered(kept, scattered, settings, chosen)
    _choose_small(kept, settings.many_small, pack_bytes // 8, chosen)
    return replace(made, rewritten=chosen.rows())


class _Chosen:
    """Packs that are to be rewritten, as far as the limit allows."""

    def __init__(self, limit: int | None) -> None:
        self._left = limit
        self._rows: dict[int, tuple[PackUse, str]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def take(self, use: PackUse, reason: str) -> bool:
        if self._left is not None:
            if use.used_bytes > self._left:
                return False
            self._left -= use.used_bytes
        self._rows[use.number] = use, reason
        return True

    def rows(self) -> tuple[tuple[PackUse, str], ...]:
        return tuple(self._rows.values())


def _choose_unused(kept: list[PackUse], percent: float, chosen: _Chosen) -> None:
    total, unused = sum(each.size for each in kept), sum(each.unused_bytes for each in kept)
    worst_first = sorted(kept, key=lambda each: (not each.doomed, -each.unused_bytes / each.size, each.number))
    for each in worst_first:
        if unused * 100 <= percent * total:
            return
        if each.live < each.chunks and chosen.take(each, UNUSED):
            unused -= each.unused_bytes
            total -= each.unused_bytes


def _choose_scattered(kept: list[PackUse], scatters: list[Scatter], settings: PruneSettings, chosen: _Chosen) -> None:
    by_number = {each.number: each for each in kept}
    for scatter in scatters:
        wasteful = {
            number: opened - needed
            for number, (opened, needed) in scatter.packs.items()
            if number in by_number and number not in chosen and opened > needed
        }
        waste, needed = sum(wasteful.values()), sum(each for _, each in scatter.packs.values())
        dearest_first = sorted(
            (by_number[number] for number in wasteful),
            key=lambda each: (not each.doomed, -wasteful[each.number] / max(1, each.used_bytes), each.number),
        )
        if waste <= (settings.scattered_ratio - 1) * needed:
            continue
        for each in dearest_first:
            if waste < settings.scattered_least or waste <= (settings.scattered_aim - 1) * needed:
                break
            if chosen.take(each, SCATTERED):
                waste -= wasteful[each.number]


def _choose_small(kept: list[PackUse], many: int, small_bytes: int, chosen: _Chosen) -> None:
    small = sorted(
        (each for each in kept if each.size <= small_bytes and each.number not in chosen), key=lambda each: each.size
    )
    if len(small) > many:
        for each in small[: len(small) - many // 4]:
            chosen.take(each, SMALL)


def _ratio(scatter: Scatter) -> float:
    """What restoring costs, times what it would from packs of its own."""
    needed = sum(each for _, each in scatter.packs.values())
    return sum(each for each, _ in scatter.packs.values()) / needed if needed else 1.0
