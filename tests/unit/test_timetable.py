"""When captures are due: in every time zone, over every change of the clock, exactly the points that were asked for."""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from base.timetable import Interval, WallTime, local_zone, parse_interval, parse_wall_time, parse_zone
from perdure.supervision.schedule import Due, Timetable
from vm.policy import Schedule

ZONES = (
    *("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Sao_Paulo", "Africa/Casablanca"),
    *("Asia/Kolkata", "Asia/Tehran", "Pacific/Chatham", "America/St_Johns"),
)
zones = st.sampled_from([ZoneInfo(name) for name in ZONES])
# Minutes are where clocks change; and a time of day may fall on one of these.
instants = st.integers(0, 40 * 365 * 24 * 60).map(lambda minutes: datetime(2000, 1, 1, tzinfo=UTC) + minutes * MINUTE)
times = st.tuples(st.integers(0, 23), st.integers(0, 59)).map(lambda found: time(*found))
days = st.frozensets(st.integers(0, 6), min_size=1)
MINUTE = timedelta(minutes=1)


def shown(instant: datetime, zone: ZoneInfo) -> datetime:
    """What a clock in the zone shows."""
    return instant.astimezone(zone).replace(tzinfo=None)


@given(zones, instants, times, days)
@example(ZoneInfo("Europe/Berlin"), datetime(2026, 3, 28, 12, tzinfo=UTC), time(2, 30), frozenset(range(7)))
@example(ZoneInfo("Europe/Berlin"), datetime(2026, 10, 25, 0, 30, tzinfo=UTC), time(2, 30), frozenset(range(7)))
@example(ZoneInfo("America/Sao_Paulo"), datetime(2017, 10, 14, 12, tzinfo=UTC), time(0, 0), frozenset(range(7)))
def test_the_next_point_is_the_first_minute_at_which_a_clock_shows_that_time_or_has_passed_over_it(zone, start, at, on):
    """Against a walk minute by minute, which knows nothing of offsets."""
    found = WallTime(at, on, zone).after(start)
    assert found > start and found.tzinfo is UTC
    if found - start > timedelta(days=2):
        start = found - timedelta(days=2)  # enough of the walk: days before it are of other weekdays, or not after it
    seen: set[date] = set()
    minute = start - timedelta(days=1)
    while minute <= found:
        before, now = shown(minute - MINUTE, zone), shown(minute, zone)
        for wall in {datetime.combine(day, at) for day in (before.date(), now.date())}:
            reached = before < wall <= now and wall.date() not in seen  # a clock that went back shows it again
            if reached:
                seen.add(wall.date())
                if minute > start and wall.weekday() in on:
                    assert minute == found, (minute, wall)
        minute += MINUTE
    assert any(day.weekday() in on for day in seen)


@given(zones, st.integers(2001, 2038), times)
def test_a_year_has_as_many_points_as_days(zone, year, at):
    point, found = WallTime(at, frozenset(range(7)), zone), []
    instant = datetime(year, 1, 1, tzinfo=zone).astimezone(UTC) - timedelta(seconds=1)
    end = datetime(year + 1, 1, 1, tzinfo=zone).astimezone(UTC)
    while (instant := point.after(instant)) < end:
        found.append(shown(instant, zone).date())
    assert found == sorted(set(found))
    assert len(found) == (date(year + 1, 1, 1) - date(year, 1, 1)).days


@given(instants, st.integers(1, 10**6), st.integers(0, 10**6))
def test_intervals_know_no_daylight_saving(start, seconds, phase):
    interval = Interval(seconds, phase % seconds)
    first = interval.after(start)
    assert timedelta(0) < first - start <= timedelta(seconds=seconds)
    assert interval.after(first) - first == timedelta(seconds=seconds)
    assert interval.after(first - timedelta(microseconds=1)) == first


def test_times_that_a_day_has_twice_or_not_at_all():
    berlin = ZoneInfo("Europe/Berlin")
    twice = WallTime(time(2, 30), frozenset(range(7)), berlin)
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # at 03:00 the clock goes back to 02:00
    assert twice.after(first - MINUTE) == first
    assert twice.after(first) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)
    gap = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # at 02:00 the clock goes on to 03:00
    assert twice.after(gap - MINUTE) == gap
    assert twice.after(gap) == datetime(2026, 3, 30, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "at", "on"),
    [
        ("02:00", time(2), set(range(7))),
        ("Mon..Fri 12:30", time(12, 30), {0, 1, 2, 3, 4}),
        ("sat,sun 4:05:06", time(4, 5, 6), {5, 6}),
        ("Sat..Mon,Wed 00:00", time(0), {5, 6, 0, 2}),
        ("Wednesday 23:59", time(23, 59), {2}),
    ],
)
def test_times_of_day_are_read(text, at, on):
    assert parse_wall_time(text) == (at, on)


@pytest.mark.parametrize("text", ["", "2", "24:00", "12:60", "Foo 12:00", "Mon.. 12:00", "Mo 12:00", "12:00 Mon", "x"])
def test_what_is_no_time_of_day_is_refused(text):
    with pytest.raises(ValueError, match=r"no time of day|no day of the week"):
        parse_wall_time(text)


def test_spans_and_zones(monkeypatch):
    assert [parse_interval(text) for text in ("90s", "15m", "15 min", "1h30m", "2d")] == [90, 900, 900, 5400, 172800]
    for text in ("", "0s", "15", "m", "1.5h", "-1h", "900d", "1y"):
        with pytest.raises(ValueError, match=r"span|between"):
            parse_interval(text)
    for text in ("", "Mars/Base", "Europe", "../etc/passwd", "/etc/localtime"):
        with pytest.raises(ValueError, match="no time zone"):
            parse_zone(text)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert local_zone() == ZoneInfo("Asia/Tokyo")


NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
NIGHTLY = Schedule(at="02:00", zone="UTC", full=True, tags=("nightly",))


def test_what_is_due_together_is_one_capture_and_what_was_slept_through_is_made_up_for_once():
    table = Timetable("demo", [Schedule(at=("02:00", "03:00"), zone="UTC", tags=("a",)), NIGHTLY], NOON)
    night = datetime(2026, 6, 2, 2, tzinfo=UTC)
    assert table.next == (night, Due(True, ("a", "nightly")))
    assert table.due(night - MINUTE) is None
    assert table.due(night) == Due(True, ("a", "nightly"))
    assert table.due(night) is None
    assert table.next == (night + 60 * MINUTE, Due(False, ("a",)))
    assert table.due(night + timedelta(days=30)) == Due(True, ("a", "nightly"))
    assert table.due(night + timedelta(days=30)) is None


def test_a_clock_that_is_set_back_neither_repeats_a_capture_nor_waits_for_what_it_had_shown():
    table = Timetable("demo", [NIGHTLY], NOON)
    night = datetime(2026, 6, 2, 2, tzinfo=UTC)
    assert table.due(night)
    assert table.due(night - MINUTE) is None and table.due(night) is None  # a small step
    assert table.due(night - timedelta(days=365)) is None  # it had been wrong by a year
    assert table.due(night - timedelta(days=364)) == Due(True, ("nightly",))


@given(st.integers(1, 10**6), instants)
def test_intervals_of_different_vms_begin_at_different_times_and_a_restart_moves_none(seconds, now):
    plan = [Schedule(every=f"{seconds}s")]
    one = Timetable("web", plan, now).next
    assert one == Timetable("web", plan, now + (one[0] - now) / 2).next
    if seconds > 1000:
        assert one != Timetable("db", plan, now).next


def test_without_schedules_there_is_nothing_to_do():
    assert Timetable("demo", [], NOON).next is None
    assert Timetable("demo", [], NOON).due(NOON) is None
