"""The parts of a VM.toml that say when and how captures are made: `[policy]` and `[[schedule]]`, as typed facts.

Decoded and checked by `vm.config`, whose errors name file, line and key; what types do not say is in `problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal
from zlib import crc32

import msgspec

from base.timetable import Interval, WallTime, local_zone, parse_interval, parse_wall_time, parse_zone
from base.units import format_size

PAUSE_MS_MIN = 1
ROUNDS_MAX = 1000
BANDWIDTH_MIN = 64 << 10
QUIESCE_SECONDS_MIN, QUIESCE_SECONDS_MAX = 4, 300


class Size(int):
    """Bytes; in the file as `64MiB`, `64M`, `0x1000` or a number."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[policy]`: when generations are made, how changes are found, what changed measurements mean."""

    capture_on_reboot: bool = True
    capture_on_shutdown: bool = True
    capture_on_panic: bool = True
    """What a QEMU that ended by itself has left is captured in any case: there is nothing else that has it."""
    capture_on_terminate: bool | Literal["full"] = True
    """When the supervisor is told by SIGTERM to leave the VM."""
    forget_after_capture: bool = False
    """Whether each capture is followed by what `perdure forget VM` does by the policy that stands in the repository."""
    pause_ms_max: int | None = None
    """What a capture of a running guest may stop it for; None: whatever it takes."""
    rounds_max: int = 4
    """How often dirty pages are stored while the guest runs, until the rest fits the pause."""
    over_limit: Literal["exceed", "give-up"] = "exceed"
    """What becomes of a capture that does not fit the pause after all rounds."""
    write_back: Literal["auto", "on", "off"] = "auto"
    """Whether dirty pages are stored while the guest runs and nobody captures; auto: if there is a schedule."""
    background_bandwidth: Size = Size(64 << 20)
    """Bytes a second that write-back may store."""
    background_cpu_percent: int = 25
    """Share of one processor that write-back may use."""
    quiesce: Literal["off", "try", "require"] = "off"
    """Whether file systems of a running guest are frozen for the instant of a capture; try: if that can be."""
    quiesce_seconds: int = 20
    """For which they stay frozen at most."""
    tracker: Literal["auto", "scan", "userfaultfd"] = "auto"
    measurements: Literal["require", "warn", "ignore"] = "warn"
    fill_bandwidth: Size = Size(64 << 20)
    """Bytes a second with which the image of a disk that went back is filled, while the guest uses it; 0: no limit."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[schedule]]`: captures every so often, or at times of day; either `every` or `at`."""

    every: str | None = None
    at: tuple[str, ...] | str = ()
    zone: str | None = None
    """Of `at`; None: that of the host."""
    full: bool = False
    tags: tuple[str, ...] = ()

    @property
    def times(self) -> Sequence[str]:
        """`at`, of which one may stand alone."""
        return (self.at,) if isinstance(self.at, str) else self.at

    def points(self, vm: str) -> list[Interval | WallTime]:
        """When captures of this VM are due. Intervals of VMs of different names begin at different times, so that a
        host with many does not make all captures at once. Raises ValueError."""
        found: list[Interval | WallTime] = []
        if self.every is not None:
            seconds = parse_interval(self.every)
            found.append(Interval(seconds, crc32(vm.encode()) % seconds))
        if self.times:
            zone = local_zone() if self.zone is None else parse_zone(self.zone)
            found += [WallTime(*parse_wall_time(each), zone) for each in self.times]
        return found


def problems(policy: Policy, schedules: Sequence[Schedule]) -> Iterable[tuple[str, str]]:
    """(key, problem) of everything that types do not say."""
    if policy.pause_ms_max is not None and policy.pause_ms_max < PAUSE_MS_MIN:
        yield "policy.pause_ms_max", f"must be at least {PAUSE_MS_MIN}"
    if not 1 <= policy.rounds_max <= ROUNDS_MAX:
        yield "policy.rounds_max", f"must be from 1 to {ROUNDS_MAX}"
    if policy.over_limit == "give-up" and policy.pause_ms_max is None:
        yield "policy.over_limit", "give-up needs a limit: set pause_ms_max, too"
    if policy.background_bandwidth < BANDWIDTH_MIN:
        yield "policy.background_bandwidth", f"must be at least {format_size(BANDWIDTH_MIN)} a second"
    if not 1 <= policy.background_cpu_percent <= 100:
        yield "policy.background_cpu_percent", "must be from 1 to 100, of one processor"
    if not QUIESCE_SECONDS_MIN <= policy.quiesce_seconds <= QUIESCE_SECONDS_MAX:
        yield "policy.quiesce_seconds", f"must be from {QUIESCE_SECONDS_MIN} to {QUIESCE_SECONDS_MAX}"
    for at, schedule in enumerate(schedules):
        yield from _schedule_problems(f"schedule[{at}]", schedule)


def _schedule_problems(key: str, schedule: Schedule) -> Iterable[tuple[str, str]]:
    if (schedule.every is None) == (not schedule.times):
        yield key, "says when by either `every` or `at`"
    if schedule.every is not None:
        yield from _parsed(f"{key}.every", parse_interval, schedule.every)
    if schedule.zone is not None:
        if not schedule.times:
            yield f"{key}.zone", "is only used together with at, which is not set"
        yield from _parsed(f"{key}.zone", parse_zone, schedule.zone)
    for number, each in enumerate(schedule.times):
        place = f"{key}.at" if isinstance(schedule.at, str) else f"{key}.at[{number}]"
        yield from _parsed(place, parse_wall_time, each)


def _parsed(key: str, parse: Callable[[str], object], text: str) -> Iterable[tuple[str, str]]:
    try:
        parse(text)
    except ValueError as error:
        yield key, str(error)
