"""Retention rules: cases worked out by hand, and what holds for any history."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.records import Generation
from store.retention import GUEST_CAUSES, Policy, parse_span, plan

NOW = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)


def generation(number, time, cause="snapshot", tags=(), protected=False) -> Generation:
    return Generation(
        vm="vm", vm_id="00" * 16, number=number, id=f"{number:064x}", parent=None, sequence=number + 1,
        time=time.isoformat(), cause=cause, host="h", tags=tags, regions={}, packs=(), dirty_bytes=0, stored_bytes=0,
        pause_ms=None, metadata={}, protected=protected,
    )  # fmt: skip


def kept(generations, policy, now=NOW) -> list[int]:
    return [each.generation.number for each in plan(generations, policy, now) if each.reasons]


def every(hours, count, cause="snapshot"):
    """`count` generations, the last one now."""
    return [generation(n + 1, NOW - timedelta(hours=hours * (count - 1 - n)), cause) for n in range(count)]


def test_last_hourly_daily_weekly():
    history = every(6, 40)  # ten days
    assert kept(history, Policy(last=3)) == [40, 39, 38]
    assert kept(history, Policy(hourly=3)) == [40, 39, 38]
    # The newest of each day: 12:30 today, and 18:30 of the days before.
    assert kept(history, Policy(daily=3)) == [40, 37, 33]
    assert kept(history, Policy(weekly=2)) == [40, 37]  # 23 November 2026 is a Monday
    assert kept(history, Policy(yearly=5)) == [40]


def test_periods_are_those_of_the_given_time_zone():
    history = [generation(1, datetime(2026, 11, 22, 23, 30, tzinfo=UTC)), generation(2, NOW)]
    assert kept(history, Policy(daily=2)) == [2, 1]
    assert kept(history, Policy(daily=2), NOW.astimezone(timezone(timedelta(hours=2)))) == [2]


def test_within_tags_protected_and_the_newest():
    history = [
        generation(1, NOW - timedelta(days=400), protected=True),
        generation(2, NOW - timedelta(days=300), tags=("release", "x")),
        generation(3, NOW - timedelta(days=2)),
        generation(4, NOW - timedelta(days=1)),
        generation(5, NOW - timedelta(hours=90)),
    ]
    assert kept(history, Policy(within=parse_span("1d12h"))) == [5, 4, 1]
    assert kept(history, Policy(tags=("release",))) == [5, 2, 1]


def test_a_guest_does_not_push_out_what_the_operator_made():
    operator = [generation(n, NOW - timedelta(days=10 - n)) for n in range(1, 4)]
    guest = [generation(n, NOW - timedelta(minutes=100 - n), "reboot") for n in range(4, 90)]
    assert kept([*operator, *guest], Policy(last=2)) == [89, 88, 3, 2]


def test_a_forged_time_pushes_out_nothing_by_count():
    history = [*every(1, 5), generation(6, NOW + timedelta(days=9999)), generation(7, NOW - timedelta(days=9999))]
    assert kept(history, Policy(last=3)) == [7, 6, 5]


@pytest.mark.parametrize(("text", "hours"), [("3h", 3), ("2d", 48), ("1w1d", 192), ("1m", 720), ("1y", 8760)])
def test_spans(text, hours):
    assert parse_span(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "3", "h", "3 d", "3x", "-3d", "3dd"])
def test_what_is_no_span(text):
    with pytest.raises(ValueError, match="span"):
        parse_span(text)


HISTORY = st.lists(
    st.tuples(st.integers(0, 20000), st.sampled_from(["snapshot", "reboot", "checkpoint"]), st.booleans()), min_size=1
)
POLICY = st.builds(Policy, *[st.integers(0, 6)] * 6)


@given(HISTORY, POLICY)
def test_what_holds_for_any_history(rows, policy):
    history = [
        generation(n + 1, NOW - timedelta(hours=hours), cause, protected=protected)
        for n, (hours, cause, protected) in enumerate(rows)
    ]
    numbers = kept(history, policy)
    assert len(rows) in numbers  # the newest
    assert {each.number for each in history if each.protected} <= set(numbers)
    for by_guest in (False, True):
        share = [each.number for each in history if (each.cause in GUEST_CAUSES) == by_guest]
        assert set(share[len(share) - policy.last :] if policy.last else []) <= set(numbers)
    limit = 2 * sum(getattr(policy, each) for each in ("last", "hourly", "daily", "weekly", "monthly", "yearly"))
    assert len(numbers) <= limit + 1 + sum(each.protected for each in history)
