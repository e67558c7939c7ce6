"""Which generations a policy keeps: a pure plan, carried out by `Repository.forget`.

Rules are those that users know from restic: `last` keeps the newest n; `hourly` to `yearly` keep the newest of each of
the n most recent periods in which there is one; `within` keeps what is younger than a span before now; `tags` keeps
what carries one of them. The newest generation of a VM, and protected ones, are always kept.

Order is the repository's sequence, never a clock, so that a forged time cannot push others out by count. What a guest
caused (a reboot, a checkpoint) is counted apart from what the operator made: a guest that reboots in a loop takes
nothing from the operator's share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from store.records import Generation

GUEST_CAUSES = frozenset({"reboot", "shutdown", "panic", "crash", "checkpoint"})
"""Causes that a guest can bring about by itself."""

_SPAN = re.compile(r"(\d+)([hdwmy])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "m": 30 * 24, "y": 365 * 24}
_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda at: (at.year, at.month, at.day, at.hour),
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: tuple(at.isocalendar())[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: (at.year,),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """How many of each to keep; 0, None and empty keep none by that rule."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta | None = None
    tags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it says nothing at all; then it must not be taken to mean that everything goes."""
        return self == Policy()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a generation: kept for these `reasons`, or forgotten if there are none."""

    generation: Generation
    reasons: tuple[str, ...]


def parse_span(text: str) -> timedelta:
    """`2y5m7d3h`: years of 365 days, months of 30, weeks (w), days, hours. Raises ValueError."""
    parts = _SPAN.findall(text)
    if not parts or "".join(count + unit for count, unit in parts) != text:
        raise ValueError(f"{text!r} is no span of time: write it as in 2y5m7d3h")
    return timedelta(hours=sum(int(count) * _HOURS[unit] for count, unit in parts))


def plan(generations: Sequence[Generation], policy: Policy, now: datetime) -> list[Verdict]:
    """Verdicts on all generations of one VM, newest first. `now` has the time zone in which periods are counted."""
    newest_first = sorted(generations, key=lambda each: each.sequence, reverse=True)
    reasons: dict[str, list[str]] = {each.id: [] for each in newest_first}
    for at, each in enumerate(newest_first):
        if at == 0:
            reasons[each.id].append("newest")
        if each.protected:
            reasons[each.id].append("protected")
        reasons[each.id] += [f"tag {tag}" for tag in each.tags if tag in policy.tags]
        if policy.within is not None and _time(each, now) >= now - policy.within:
            reasons[each.id].append("within")
    for by_guest in (False, True):
        share = [each for each in newest_first if (each.cause in GUEST_CAUSES) == by_guest]
        for each in share[: policy.last]:
            reasons[each.id].append("last")
        for rule, period in _PERIODS.items():
            for each in _newest_of_periods(share, period, getattr(policy, rule), now):
                reasons[each.id].append(rule)
    return [Verdict(each, tuple(reasons[each.id])) for each in newest_first]


def _newest_of_periods(
    share: Sequence[Generation], period: Callable[[datetime], tuple[int, ...]], count: int, now: datetime
) -> list[Generation]:
    found: dict[tuple[int, ...], Generation] = {}
    for each in share:
        if len(found) == count:
            break
        found.setdefault(period(_time(each, now)), each)
    return list(found.values())


def _time(generation: Generation, now: datetime) -> datetime:
    return datetime.fromisoformat(generation.time).astimezone(now.tzinfo)
