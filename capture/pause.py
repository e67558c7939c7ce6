"""The pause of a capture: rounds before it until little is dirty, and what happens while the guest stands still.

A round stores what is dirty while the guest runs. Where bits must not be cleared under a running guest (O_DIRECT), a
round begins with a stop that only collects. With a limit, rounds go on until what is left fits it; after the last one
the capture goes over the limit or is given up. In the pause, dirty pages are copied into private memory; hashing and
compressing come after it, also where changes are found by scanning and all that is resident must be looked at, as long
as there is memory for the copy.

`PauseModel` learns from the pauses of one VM what they are made of. Plain calls; one thread at a time.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from base import extents as ranges
from base import private
from base.errors import ConflictError, VirtualMachineError
from base.extents import Extents
from base.progress import Progress, silent
from base.units import format_size
from capture.disks import Disks
from capture.sources import Source
from store.writer import GenerationWriter

_PRIVATE_COPY_MAX = 256 << 20
"""Bytes that are copied in a pause in any case; beyond that a quarter of what the host has free. More is stored while
the guest stands still, which bounds memory."""
_COPIES = "copies of dirty pages"
_DRAIN_ABOVE = 4 << 20
"""Dirty bytes above which a round of storing while the guest runs makes the pause shorter."""
_LAST_ROUND_SECONDS = 0.2
"""What the last round before the pause takes, roughly."""
_LEARN = 0.5
_LEARN_FROM = 1 << 20
"""Bytes: copying less says nothing about how fast it goes."""


class Execution(Protocol):
    """Stops and continues the guest; both return when it is so. The others are for full generations."""

    def runs(self) -> bool:
        """Whether the guest runs; somebody else may have stopped it."""

    def settle(self) -> None:
        """What makes `stop` short, or the instant a better one, and can be done before it."""

    def unsettle(self) -> None:
        """Whatever became of it: nothing of that may stay. Called at least once, after `cont`."""

    def prepare(self) -> None:
        """What `device_state` needs and can be done before `stop`."""

    def stop(self) -> None: ...

    def device_state(self) -> int:
        """The stopped guest's, in a memory file without a name that the caller closes."""

    def kept_now(self) -> Mapping[str, Extents]:
        """Of the stopped guest: by region, what survives a reboot. `facts` has the tags that say so."""

    def cont(self) -> None: ...

    def take_back(self) -> None:
        """Undo `prepare`; after `cont`."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a generation records of the instant."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a capture may do to a running guest. `pause_ms_max` None: whatever it takes; `rounds_max` of storing while
    it runs; then `exceed` the limit, or give up."""

    pause_ms_max: int | None = None
    rounds_max: int = 4
    exceed: bool = True


@dataclass(slots=True)
class PauseModel:
    """What the pauses of a VM are made of: a part that is always there, and one for each byte that is copied."""

    fixed_ms: float = 5.0
    fixed_full_ms: float = 30.0
    bytes_per_ms: float = 512 << 10

    def expected_ms(self, copied: int, *, full: bool) -> float:
        """Of a pause with so many bytes to copy."""
        return (self.fixed_full_ms if full else self.fixed_ms) + copied / self.bytes_per_ms

    def allowed_bytes(self, limit_ms: int | None, *, full: bool) -> float:
        """What can be copied within a limit."""
        if limit_ms is None:
            return float("inf")
        return max(0.0, (limit_ms - (self.fixed_full_ms if full else self.fixed_ms)) * self.bytes_per_ms)

    def learn(self, pause_ms: float, copy_ms: float, copied: int, *, full: bool) -> None:
        """From a pause as it was."""
        fixed = pause_ms - copy_ms
        if full:
            self.fixed_full_ms += _LEARN * (fixed - self.fixed_full_ms)
        else:
            self.fixed_ms += _LEARN * (fixed - self.fixed_ms)
        if copied >= _LEARN_FROM and copy_ms > 0:
            self.bytes_per_ms += _LEARN * (copied / copy_ms - self.bytes_per_ms)


@dataclass(slots=True)
class Stopped:
    """How a guest was stopped. `pause_ms` in all, `longest_ms` at once; `rounds` before the last stop; `devices` is a
    memory file with their state, closed by the stack that was given."""

    pause_ms: float = 0.0
    longest_ms: float = 0.0
    rounds: int = 0
    devices: int | None = None


def expected_ms(model: PauseModel, dirty: int, dirty_rate: float, *, full: bool) -> float:
    """The pause of a capture that began now: rounds bring down what is dirty, as far as the guest lets them."""
    left = max(_DRAIN_ABOVE, dirty_rate * _LAST_ROUND_SECONDS)
    return model.expected_ms(int(min(dirty, left)), full=full)


class _Copy:
    """Private copies of the dirty pages of several sources, in one buffer that is there before the guest stops."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = private.memory(_COPIES, size) if size else None
        self._parts: list[tuple[Source, Extents, mmap.mmap, int]] = []
        self._used = 0

    def take(self, source: Source, present: Extents) -> None:
        """Copy what is pending; `present` is what of it is no hole."""
        total = ranges.total(present)
        memory, at = self._memory, self._used
        if memory is None or at + total > self._size:
            memory, at = private.memory(_COPIES, total), 0
        else:
            self._used += total
        self._parts.append((source, present, memory, at))
        with memoryview(memory) as view:
            for start, end in present.tolist():
                source.memory.read_into(view[at : at + end - start], start)
                at += end - start

    def store(self, writer: GenerationWriter) -> None:
        """Put the copies into packs, in place of what was pending."""
        for source, present, memory, at in self._parts:
            descriptor = private.file(source.region.name, source.region.length)
            try:
                with memoryview(memory) as view:
                    for start, end in present.tolist():
                        _write(descriptor, view[at : at + end - start], start)
                        at += end - start
                source.store_from(writer, descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Give the memory back."""
        self._parts.clear()
        self._memory = None


def store_while_running(
    sources: Sequence[Source], writer: GenerationWriter, rounds_max: int, enough: float, progress: Progress
) -> int:
    """Rounds before the pause; how many there were. What is written meanwhile is found again in the pause: as dirty
    where writes are tracked, by a second look at everything where they are not. Where bits must not be cleared under a
    running guest there is no such round: what is dirty is not known."""
    followed = [source for source in sources if source.followed and not source.region.tracker.direct_io]
    for source in sources:
        if not source.followed:  # all of it is stored once, so that what the pause finds is mostly known
            source.collect(running=True)
            source.store(writer, progress)
        elif source not in followed and ranges.total(source.pending) > enough:
            source.store(writer, progress)
    rounds = 0
    while followed and rounds < rounds_max:
        for source in followed:
            source.collect(running=True)
        if sum(ranges.total(source.pending) for source in followed) <= enough:
            break
        for source in followed:
            source.store(writer, progress)
        rounds += 1
    return rounds


def pause(
    sources: Sequence[Source],
    writer: GenerationWriter,
    execution: Execution,
    disks: Disks | None,
    stack: ExitStack,
    *,
    vm: str,
    full: bool,
    limits: Limits,
    model: PauseModel,
    progress: Progress,
) -> Stopped:
    """Bring what is dirty down, stop, save the devices, collect, copy what is dirty (or store it at once), continue;
    then store the copies.

    The devices come before the last collection, so that what QEMU might write into memory for it is in the generation;
    and before the only one, where little is expected to be dirty: a collection takes a millisecond for each GiB.
    Raises ConflictError where the limit cannot be kept, and what collecting, storing and stopping raise: the guest
    runs on.
    """
    allowed = model.allowed_bytes(limits.pause_ms_max, full=full)
    done = Stopped(rounds=store_while_running(sources, writer, limits.rounds_max, min(_DRAIN_ABOVE, allowed), progress))
    enough = min(allowed, _DRAIN_ABOVE if any(each.region.tracker.direct_io for each in sources) else _copy_max())
    # Rounds help where writes are followed, and a guest that somebody else has stopped must not run for one.
    rounds_max = limits.rounds_max if execution.runs() and all(each.followed for each in sources) else 0
    with ExitStack() as around:
        around.callback(execution.unsettle)
        if full:
            execution.prepare()
            around.callback(execution.take_back)
        if disks is not None:
            disks.prepare()
        while True:
            expected = _expected(sources)
            copy = _Copy(min(expected + expected // 4 + (1 << 20), _copy_max()))
            stack.callback(copy.close)
            execution.settle()
            began, copy_ms, copied = time.monotonic(), 0.0, 0
            _stop(execution)
            try:
                devices = execution.device_state() if full and expected <= enough else None
                if devices is not None:
                    stack.callback(os.close, devices)
                found = _collect(sources)
                again = found > enough and done.rounds < rounds_max
                over = found > allowed and not limits.exceed
                if not again and not over:
                    if full and devices is None:
                        devices = execution.device_state()
                        stack.callback(os.close, devices)
                        _collect(sources)
                    done.devices = devices
                    if disks is not None:
                        disks.freeze()
                    _keep(sources, writer, execution.kept_now(), full=full)
                    copying = time.monotonic()
                    copied = _take_copies(sources, writer, copy)
                    copy_ms = (time.monotonic() - copying) * 1e3
            finally:
                execution.cont()
            stopped_ms = (time.monotonic() - began) * 1e3
            done.pause_ms += stopped_ms
            done.longest_ms = max(done.longest_ms, stopped_ms)
            if not again:
                break
            for source in sources:
                source.store(writer, progress)
            done.rounds += 1
    if over:
        raise _given_up(vm, found, done, limits, model, full=full)
    model.learn(stopped_ms, copy_ms, copied, full=full)
    copy.store(writer)
    return done


def _stop(execution: Execution) -> None:
    """Stop the guest. A QEMU that does not answer in time stops it all the same when it moves again: it is told right
    away to let the guest go on after that."""
    try:
        execution.stop()
    except BaseException:
        with suppress(VirtualMachineError):  # the first error says what is wrong
            execution.cont()
        raise


def _collect(sources: Sequence[Source]) -> int:
    """Ask all trackers; bytes that would be copied."""
    for source in sources:
        source.collect(running=False)
    return sum(source.resident_bytes for source in sources)


def _keep(sources: Sequence[Source], writer: GenerationWriter, kept: Mapping[str, Extents], *, full: bool) -> None:
    """What the guest has tagged or untagged since the capture began: it knows, and its memory may say so elsewhere."""
    for source in sources:
        region, now = source.region, kept.get(source.region.name)
        if now is not None and not np.array_equal(now, region.kept):
            source.go_on(writer, replace(region, kept=now), full=full)


def _take_copies(sources: Sequence[Source], writer: GenerationWriter, copy: _Copy) -> int:
    """Bytes that were copied."""
    room, copied = _copy_max(), 0
    for source in sources:
        present = source.present
        size = ranges.total(present)
        if copied + size > room:
            source.store(writer, silent)
        elif len(source.pending):
            copy.take(source, present)
            copied += size
    return copied


def _expected(sources: Sequence[Source]) -> int:
    """Bytes that are to be copied, as far as they are dirty by now; nothing is cleared for it."""
    expected = 0
    for source in sources:
        fresh = source.region.tracker.peek().fresh if source.followed else None
        if source.followed:
            expected += ranges.total(ranges.union(source.pending, ranges.EMPTY if fresh is None else fresh))
        else:
            expected += source.resident_bytes
    return expected


def _copy_max() -> int:
    with open("/proc/meminfo", "rb") as file:
        available = next((int(line.split()[1]) for line in file if line.startswith(b"MemAvailable:")), 0)
    return max(_PRIVATE_COPY_MAX, (available << 10) // 4)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        wrote = os.pwrite(descriptor, data, at)
        data, at = data[wrote:], at + wrote


def _given_up(vm: str, found: int, done: Stopped, limits: Limits, model: PauseModel, *, full: bool) -> ConflictError:
    expected = model.expected_ms(found, full=full)
    return ConflictError(
        f"VM {vm}: given up, nothing was captured: {format_size(found)} were still dirty after {done.rounds} rounds, a "
        f"pause of about {expected:.0f} ms, and pause_ms_max is {limits.pause_ms_max}: raise it or rounds_max, or set "
        "over_limit to exceed"
    )
