"""Write-back of a running VM: python -m bench.drain [--turns N] [--seconds S] [--quick] [--qemu BINARY].

Slowdown: a program of the guest writes memory at a set rate and pattern (uniform, a hot set, sequential) and counts
what else it gets done. By turns write-back works, at the limits that a VM.toml without any has, and does not (the
supervisor is stopped by SIGSTOP, so that nothing of us runs); before each turn all of the program's memory is written
once, so that there is as much to drain, and as little to fault on, in either. Of each pair of turns the ratio counts,
and of each pattern and rate the median. `--cpus 2` lets a second such program compete for the host's other processor.

Throughput: how fast what was written once is stored, at these limits and without any. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.vms import MIB, ROOT, supervised

from perdure.control import call  # isort: skip  bench.vms says where our code is
from supervised import NAME, PAGE, SECONDS, Supervised  # isort: skip  and the tests'

IN_GUEST = (ROOT / "tests" / "e2e" / "in_guest_load.py").read_text()
PATTERNS = ("uniform", "hot set", "sequential")
DONE, WRITTEN = 0, 5
"""Of the numbers of in_guest_load.py."""
WRITE_BACK = 'write_back = "on"\n'
UNLIMITED = 'background_bandwidth = "8 GiB"\nbackground_cpu_percent = 100\n'
SETTLE_SECONDS = 1.5
"""After a turn began: draining stores what has rested for a look, half a second or more."""
WELL_UNDER_WAY = 4.0
"""MiB that are stored ahead when draining is measured."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Units of work and MiB written by the guest's program a second; units for each processor second of the guest's
    processors; MiB stored ahead, and the share of a processor that the supervisor has used."""

    units: float
    units_per_processor_second: float
    written: float
    stored: float
    processor: float


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="measure write-back and what it costs the guest")
    add_arguments(parser)
    parser.add_argument("--qemu", help="QEMU's program, if not the one in PATH")
    arguments = parser.parse_args()
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    print(json.dumps(measure(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this module; `bench.capture` has them, too."""
    parser.add_argument("--drain-turns", type=int, default=5, help="pairs of turns for each pattern and rate")
    parser.add_argument("--drain-seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--drain-field", type=int, default=256, help="MiB that the guest's program writes to")
    parser.add_argument("--drain-rates", type=int, nargs="+", default=[8, 32], help="MiB a second that it writes")
    parser.add_argument("--drain-cpus", type=int, default=1, help="virtual processors, each with such a program")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    return slowdown(arguments) | throughput(arguments)


def slowdown(arguments: argparse.Namespace) -> dict[str, Any]:
    """Percent by which the guest's program gets less done while write-back works: by pattern and rate, the worst."""
    field, turns = arguments.drain_field * MIB, arguments.drain_turns
    found: dict[str, Any] = {}
    memory = 256 + arguments.drain_field * 3 // 2
    settings = f"cpus = {arguments.drain_cpus}\n"
    with supervised(memory, qemu=arguments.qemu, settings=settings, policy=WRITE_BACK) as vm:
        vm.guest.run(IN_GUEST)
        for _ in range(arguments.drain_cpus - 1):
            vm.guest.run("if os.fork() == 0:\n    while True: _unit()")
        vm.guest.run(f"load({field})")
        bench = _Bench(vm)
        bench.turn("sequential", 0, 0.1)
        vm.perdure("snapshot", NAME, "--full")  # there is something to go on from
        for pattern in PATTERNS:
            for rate in arguments.drain_rates:
                pairs = [bench.pair(pattern, rate, arguments.drain_seconds) for _ in range(turns)]
                name = f"{pattern.replace(' ', '_')}_{rate}"
                found[name] = _percent(pairs)
                _say(name, pairs)
        bench.close()
    return {"guest_slowdown_percent": max(found.values()), "slowdown_percent": found}


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """MiB a second that are drained of a guest that has written all of its field and then rests."""
    found = {}
    memory = 256 + arguments.drain_field * 3 // 2
    for name, policy in (("drain_mib_per_s", ""), ("drain_unlimited_mib_per_s", UNLIMITED)):
        with supervised(memory, qemu=arguments.qemu, policy=WRITE_BACK + policy) as vm:
            vm.guest.run(IN_GUEST)
            vm.guest.run(f"load({arguments.drain_field * MIB})")
            bench = _Bench(vm)
            bench.turn("sequential", 0, 0.1)
            vm.perdure("snapshot", NAME, "--full")
            rates = []
            for _ in range(3):
                vm.perdure("snapshot", NAME, "--full")
                vm.guest.run("turn('sequential', 0)")
                rates.append(bench.drained(arguments.drain_field * 3 // 4))
            bench.close()
        found[name] = round(statistics.median(rates), 1)
        print(name, *(f"{each:.1f}" for each in rates), file=sys.stderr)
    return found


class _Bench:
    """One VM whose guest has the program."""

    def __init__(self, vm: Supervised) -> None:
        self.vm = vm
        qemu = Path(f"/proc/{vm.status()['pid']}/task")
        self._processors = {qemu / str(each["thread-id"]) for each in vm.judge.execute("query-cpus-fast")}
        offset = vm.area("load").offset
        with (vm.runtime / "memory" / "pm0.memory").open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=offset, prot=mmap.PROT_READ)
        self._numbers = memoryview(self._memory).cast("Q")

    def pair(self, pattern: str, rate: int, seconds: float) -> tuple[Turn, Turn]:
        """A turn with write-back and one without, after a capture that both of them follow alike."""
        self.vm.perdure("snapshot", NAME, "--full")  # and what was stored in vain is counted from zero
        on = self.turn(pattern, rate, seconds)
        supervisor = self.vm.run.process.pid
        os.kill(supervisor, signal.SIGSTOP)
        try:
            off = self.turn(pattern, rate, seconds, stopped=True)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        return on, off

    def turn(self, pattern: str, rate: int, seconds: float, *, stopped: bool = False) -> Turn:
        """What is done in so many seconds, after a sweep."""
        self.vm.guest.run(f"turn({pattern!r}, {rate * MIB // PAGE})", SECONDS)
        time.sleep(SETTLE_SECONDS)
        if rate and not stopped:  # write-back waits longer for pages to rest where much was stored in vain
            self._until_drained(WELL_UNDER_WAY)
        ahead = 0.0 if stopped else self.ahead()
        before = self._counters()
        time.sleep(seconds)
        after = self._counters()
        stored = 0.0 if stopped else self.ahead() - ahead
        took, units, written, guest, ours = (late - early for early, late in zip(before, after, strict=True))
        return Turn(units / took, units / guest, written * PAGE / MIB / took, stored / took, ours / took)

    def ahead(self) -> float:
        """MiB that are stored ahead now, and were not written since."""
        status = call(self.vm.runtime / "control.sock", "status")["write_back"]
        return float(status["stored_ahead_bytes"]) / MIB

    def drained(self, wanted: float) -> float:
        """MiB a second, from the first that are stored ahead until `wanted` are."""
        self._until_drained(WELL_UNDER_WAY)
        began, first = time.monotonic(), self.ahead()
        return (self._until_drained(wanted) - first) / (time.monotonic() - began)

    def _until_drained(self, wanted: float) -> float:
        """Wait until so many MiB are stored ahead; gives how many are."""
        deadline = time.monotonic() + SECONDS
        while (ahead := self.ahead()) < wanted:
            assert time.monotonic() < deadline, f"{ahead:.0f} of {wanted:.0f} MiB are drained"
            time.sleep(0.05)
        return ahead

    def close(self) -> None:
        """Let go of the guest's memory."""
        self._numbers.release()
        self._memory.close()

    def _counters(self) -> tuple[float, float, float, float, float]:
        """Seconds, units, pages; processor seconds of the guest's processors, and of the supervisor."""
        guest = sum(_processor(each) for each in self._processors)
        ours = _processor(Path(f"/proc/{self.vm.run.process.pid}"))
        return time.monotonic(), self._numbers[DONE], self._numbers[WRITTEN], guest, ours


def _processor(process: Path) -> float:
    """Processor seconds that a process has used, or a thread."""
    if (process / "task").exists():
        return sum(_processor(each) for each in (process / "task").iterdir())
    return int((process / "schedstat").read_text().split()[0]) / 1e9


def _percent(pairs: Sequence[tuple[Turn, Turn]]) -> float:
    return round(100 * (1 - statistics.median(on.units / off.units for on, off in pairs)), 1)


def _say(name: str, pairs: Sequence[tuple[Turn, Turn]]) -> None:
    """A line for people."""
    on = [each for each, _ in pairs]
    middle = statistics.median
    alone = 100 * (1 - middle(a.units_per_processor_second / b.units_per_processor_second for a, b in pairs))
    print(
        f"{name}: slower by {', '.join(f'{100 * (1 - a.units / b.units):.1f}' for a, b in pairs)} % "
        f"({alone:.1f} % for each processor second of its own); "
        f"{middle(each.written for each in on):.1f} MiB/s written, {middle(b.written for _, b in pairs):.1f} without; "
        f"{middle(each.stored for each in on):.1f} MiB/s stored, "
        f"{100 * middle(each.processor for each in on):.0f} % of a processor",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
