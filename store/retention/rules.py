"""Which generations a policy keeps: a pure plan, carried out by `Repository.forget`.

Rules are those that users know from restic: `last` keeps the newest n; `hourly` to `yearly` keep the newest of each of
the n most recent periods in which there is one; `within` keeps what is younger than a span; `tags` keeps what carries
one of them. The newest generation of a VM, the newest one that has lost nothing, and protected ones, are always kept;
one that is hurt is not counted in the place of a whole one.

Order is the repository's sequence, never a clock, so that a wrong time cannot push others out by count. Periods are
those of UTC: every host comes to the same plan, and no day has 23 or 25 hours. A span counts back from the newest
generation or from now, whichever is earlier: a client whose clock runs ahead forgets nothing for it.

What a guest can cause by itself (a reboot, a checkpoint) is counted apart from what the operator made, by every rule
that counts: a guest that reboots in a loop takes nothing from the operator's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from store.records import Generation
from store.retention.policy import Policy

GUEST_CAUSES = frozenset({"reboot", "shutdown", "panic", "crash", "checkpoint"})
"""Causes that a guest can bring about by itself."""

_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda at: (at.year, at.month, at.day, at.hour),
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: tuple(at.isocalendar())[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: (at.year,),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a generation: kept for these `reasons`, or forgotten if there are none."""

    generation: Generation
    reasons: tuple[str, ...]


def by_guest(cause: str) -> bool:
    """Whether a guest can bring this about by itself."""
    return cause in GUEST_CAUSES


def plan(generations: Sequence[Generation], policy: Policy, now: datetime) -> list[Verdict]:
    """Verdicts on all generations of one VM, newest first. `now` has a time zone, whichever."""
    newest_first = sorted(generations, key=lambda each: each.sequence, reverse=True)
    times = {each.id: datetime.fromisoformat(each.time).astimezone(UTC) for each in newest_first}
    reasons: dict[str, list[str]] = {each.id: [] for each in newest_first}
    whole = next((each for each in newest_first if not each.hurt), None)
    for at, each in enumerate(newest_first):
        if at == 0:
            reasons[each.id].append("newest")
        elif each is whole:
            reasons[each.id].append("newest whole")
        if each.protected:
            reasons[each.id].append("protected")
        reasons[each.id] += [f"tag {tag}" for tag in each.tags if tag in policy.tags]
        if policy.within is not None and min(now, times[newest_first[0].id]) - times[each.id] <= policy.within:
            reasons[each.id].append("within")
    for guest in (False, True):
        share = [each for each in newest_first if by_guest(each.cause) == guest and not each.hurt]
        for each in share[: policy.last]:
            reasons[each.id].append("last")
        for rule, period in _PERIODS.items():
            for each in _newest_of_periods(share, times, period, getattr(policy, rule)):
                reasons[each.id].append(rule)
    return [Verdict(each, tuple(reasons[each.id])) for each in newest_first]


def _newest_of_periods(
    share: Sequence[Generation], times: dict[str, datetime], period: Callable[[datetime], tuple[int, ...]], count: int
) -> list[Generation]:
    found: dict[tuple[int, ...], Generation] = {}
    for each in share:
        if len(found) == count:
            break
        found.setdefault(period(times[each.id]), each)
    return list(found.values())
