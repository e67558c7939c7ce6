"""Retention rules: cases worked out by hand, and what holds for any history."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.records import Generation
from store.retention.policy import Policy, format_span, parse_span
from store.retention.rules import GUEST_CAUSES, plan

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


def test_periods_are_those_of_utc_whatever_clock_the_client_shows():
    history = [generation(1, datetime(2026, 11, 22, 23, 30, tzinfo=UTC)), generation(2, NOW)]
    for zone in (UTC, timezone(timedelta(hours=2)), ZoneInfo("America/New_York")):
        assert kept(history, Policy(daily=2), NOW.astimezone(zone)) == [2, 1]


@pytest.mark.parametrize("change", [datetime(2026, 10, 25, 1, tzinfo=UTC), datetime(2026, 3, 29, 1, tzinfo=UTC)])
def test_daylight_saving_changes_nothing(change):
    """In Berlin those days have 25 and 23 hours, and 02:30 happens twice or never."""
    berlin = ZoneInfo("Europe/Berlin")
    times = [change + timedelta(minutes=30 * n) for n in range(-60, 61)]
    history = [generation(n + 1, at.astimezone(berlin)) for n, at in enumerate(times)]
    hours = kept(history, Policy(hourly=48), times[-1].astimezone(berlin))
    assert hours == [121, *range(120, 26, -2)]  # the half hour, of every hour; and the newest
    days = kept(history, Policy(daily=3), times[-1].astimezone(berlin))
    assert [times[n - 1].hour for n in days] == [7, 23, 23]
    assert kept(history, Policy(within=parse_span("3h")), times[-1].astimezone(berlin)) == list(range(121, 114, -1))


def test_a_span_longer_than_the_calendar_keeps_all():
    history = every(24, 10)
    assert kept(history, Policy(within=parse_span("999999y"))) == list(range(10, 0, -1))


def test_a_client_whose_clock_runs_ahead_forgets_nothing_for_it():
    history = every(24, 10)
    for now in (NOW, NOW + timedelta(days=3650)):
        assert kept(history, Policy(within=parse_span("2d")), now) == [10, 9, 8]
    assert kept(history, Policy(within=parse_span("2d")), NOW - timedelta(days=4)) == [10, 9, 8, 7, 6, 5, 4]


def test_within_tags_protected_and_the_newest():
    history = [
        generation(1, NOW - timedelta(days=400), protected=True),
        generation(2, NOW - timedelta(days=300), tags=("release", "x")),
        generation(3, NOW - timedelta(days=2)),
        generation(4, NOW - timedelta(days=1)),
        generation(5, NOW - timedelta(hours=1)),
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


@given(st.integers(1, 10**6))
def test_spans_are_written_as_they_are_read(hours):
    assert parse_span(format_span(timedelta(hours=hours))) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "3", "h", "3 d", "3x", "-3d", "3dd", "999999y" * 9])
def test_what_is_no_span(text):
    with pytest.raises(ValueError, match="span"):
        parse_span(text)


HISTORY = st.lists(
    st.tuples(st.integers(0, 20000), st.sampled_from(["snapshot", "reboot", "checkpoint"]), st.booleans()), min_size=1
)
COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
POLICY = st.builds(Policy, **{each: st.integers(0, 6) for each in COUNTS})


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
    limit = 2 * sum(getattr(policy, each) for each in COUNTS)
    assert len(numbers) <= limit + 1 + sum(each.protected for each in history)
