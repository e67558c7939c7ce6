"""Captures of a running VM: python -m bench.capture [--memory MIB] [--used MIB] [--turns N] [--quick] [--qemu BINARY]
[--parts pauses drain missed] and what bench.drain and bench.missed take.

A real guest whose memory is full of data that does not compress. Before each full generation a program of the guest
writes one byte into 1 % of all its pages, at random. Measured are: the pause, by a heartbeat of the guest that the host
samples with its own clock, and as we report it, idle and while the guest writes to a disk; QEMU's own stop and migrate
to a file of the same VM in the same run, without a limit to its bandwidth, in its newer format too where QEMU has
that; the pause of a VM of 512 MiB and one of 4 GiB with the same pages written; and the tracker's scan of page tables.
Then write-back and what it costs the guest (bench.drain), and pages missed over random patterns (bench.missed).
Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import drain, missed
from bench.disks import WRITER, make
from bench.heartbeat import IN_GUEST as HEARTBEAT
from bench.heartbeat import Heartbeat
from bench.vms import ROOT, supervised
from vm.mappings import shared_mappings
from vm.pagemap import Pagemap

from supervised import NAME, Supervised  # isort: skip  bench.vms says where it is

MIB = 1 << 20
GIB = 1 << 30
PARTS = ("pauses", "drain", "missed")
USER = f"""
import mmap, random
some, block = random.Random(1), os.urandom({MIB})
used = None

def use(size):
    global used
    used = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, {MIB}):
        used[at : at + {MIB}] = block
    for at in range(0, size, 4096):
        used[at : at + 8] = at.to_bytes(8, "little")

def dirty(pages):
    for page in some.sample(range(len(used) // 4096), pages):
        used[page * 4096 + 100] = some.randrange(256)
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="measure captures of a running VM")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of the VM whose pauses are measured")
    parser.add_argument("--used", type=int, default=1024, help="MiB of it that are filled")
    parser.add_argument("--turns", type=int, default=60, help="captures without disk load")
    parser.add_argument("--quick", action="store_true", help="few captures, and small VMs: whether it works")
    parser.add_argument("--qemu", help="QEMU's program, if not the one in PATH")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    drain.add_arguments(parser)
    missed.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.memory, arguments.used, arguments.turns = 512, 128, 4
        arguments.drain_field, arguments.drain_turns, arguments.drain_seconds = 64, 1, 1.0
        arguments.minutes = 0.0
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    figures: dict[str, Any] = {}
    if "pauses" in arguments.parts:
        dirty = arguments.memory * MIB // 100 // 4096
        figures |= main_vm(arguments, dirty)
        small, large = (256, 512) if arguments.quick else (512, 4096)
        figures |= sizes(small, large, min(dirty, small * MIB // 100 // 4096), arguments)
    if "drain" in arguments.parts:
        figures |= drain.measure(arguments)
    if "missed" in arguments.parts:
        figures |= missed.measure(arguments)
    print(json.dumps(figures))


@contextlib.contextmanager
def beating(memory: int, arguments: argparse.Namespace, settings: str = "") -> Iterator[Supervised]:
    """A VM of `memory` MiB whose guest's heart beats."""
    with supervised(memory, qemu=arguments.qemu, settings=settings) as vm:
        vm.guest.run(HEARTBEAT + USER)
        vm.guest.run("beat()")
        yield vm


def heartbeat(vm: Supervised) -> Heartbeat:
    """Of a guest that beats."""
    return Heartbeat(vm.runtime / "memory" / "pm0.memory", vm.area("heartbeat").offset)


def main_vm(arguments: argparse.Namespace, dirty: int) -> dict[str, Any]:
    """Pauses without and with disk load, the scan of page tables, QEMU's own save."""
    with tempfile.TemporaryDirectory(prefix="perdure-disk-") as folder:
        disk = Path(folder, "disk")
        make(disk, GIB // 4, "raw")
        settings = f'[[disk]]\nname = "one"\nfile = "{disk}"\nformat = "raw"\n'
        with beating(arguments.memory, arguments, settings) as vm:
            vm.guest.run(WRITER)
            vm.guest.run(f"use({arguments.used * MIB})")
            with heartbeat(vm) as beat:
                quiet = gap_during(beat, lambda: time.sleep(5))[1]
                first = vm.perdure("snapshot", NAME, "--full")
                print(f"first: {first['seconds']:.2f} s; longest gap of a quiet guest {quiet:.1f} ms", file=sys.stderr)
                idle = pauses(vm, beat, dirty, arguments.turns)
                scan = scan_ms_per_gib(vm, arguments.memory, dirty)
                vm.guest.run("work(write_and_sync)")
                loaded = pauses(vm, beat, dirty, max(arguments.turns // 3, 2))
                vm.guest.run("finish()")
                saves = {"file": save(vm, beat, "exec")}
                with contextlib.suppress(RuntimeError):  # QEMU before 9.0 has no such format
                    saves["mapped_ram"] = save(vm, beat, "mapped-ram")
    best = min(saves.values())
    return {
        "memory_mib": arguments.memory,
        "used_mib": arguments.used,
        "dirty_pages": dirty,
        "captures": len(idle),
        "quiet_gap_ms": round(quiet, 1),
        "pause_ms_p50": quantile([each for each, _ in idle], 0.5),
        "pause_ms_p99": quantile([each for each, _ in idle], 0.99),
        "reported_pause_ms_p50": quantile([each for _, each in idle], 0.5),
        "disk_load_pause_ms_p50": quantile([each for each, _ in loaded], 0.5),
        "disk_load_pause_ms_p99": quantile([each for each, _ in loaded], 0.99),
        "tracker_scan_ms_per_gib": scan,
        "qemu_save_pause_ms": {name: round(each, 1) for name, each in saves.items()},
        "pause_vs_qemu_save": round(best / quantile([each for each, _ in idle], 0.5), 1),
    }


def sizes(small: int, large: int, dirty: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same pages written in a small and in a large VM (MiB), by turns."""
    found: dict[int, list[float]] = {small: [], large: []}
    used = min(small // 4, arguments.used)
    with contextlib.ExitStack() as stack:
        vms = {size: stack.enter_context(beating(size, arguments)) for size in found}
        beats = {size: stack.enter_context(heartbeat(vm)) for size, vm in vms.items()}
        for vm in vms.values():
            vm.guest.run(f"use({used * MIB})")
            vm.perdure("snapshot", NAME, "--full")
        for _ in range(max(arguments.turns // 3, 2)):
            for size, vm in vms.items():
                found[size] += [gap for gap, _ in pauses(vm, beats[size], dirty, 1)]
    middle = {size: statistics.median(each) for size, each in found.items()}
    return {
        f"pause_ms_{small}m": round(middle[small], 1),
        f"pause_ms_{large}m": round(middle[large], 1),
        "pause_4g_vs_512m": round(middle[large] / middle[small], 2),
    }


def pauses(vm: Supervised, beat: Heartbeat, dirty: int, turns: int) -> list[tuple[float, float]]:
    """Of captures after `dirty` pages were written: the longest gap of the heartbeat, and what we report (ms)."""
    found = []
    for _ in range(turns):
        vm.guest.run(f"dirty({dirty})")
        made, gap = gap_during(beat, lambda: vm.perdure("snapshot", NAME, "--full"))
        found.append((gap, made["pause_ms"]))
        print(f"gap {gap:.1f} ms, reported {made['pause_ms']:.1f} ms, {made['seconds']:.2f} s", file=sys.stderr)
    return found


def gap_during(beat: Heartbeat, work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and the longest gap while it was done (ms)."""
    start = time.monotonic()
    result = work()
    end = time.monotonic()
    beats, deadline = beat.beats(), end + 60
    while beat.beats() == beats and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.005)
    return result, beat.longest(start, end)


def scan_ms_per_gib(vm: Supervised, memory: int, dirty: int) -> float:
    """The kernel's walk over QEMU's page tables, with that much written since it was armed; median of some."""
    pid = vm.status()["pid"]
    file = os.open(vm.runtime / "memory" / "ram.memory", os.O_RDONLY)
    taken = []
    try:
        mappings = shared_mappings(pid, file)
        vm.guest.run(f"dirty({dirty})")
        with contextlib.closing(Pagemap(pid)) as pagemap:
            for _ in range(9):
                began = time.monotonic()
                pagemap.written(mappings, rearm=False)
                taken.append((time.monotonic() - began) * 1e3)
    finally:
        os.close(file)
    return round(statistics.median(taken) / (memory / 1024), 3)


def save(vm: Supervised, beat: Heartbeat, how: str) -> float:
    """QEMU's own: stop, migrate everything to a file, go on. Milliseconds without a heartbeat."""
    target = vm.repository.parent / "saved"  # on the disk that ours are on
    judge = vm.judge
    judge.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    if how == "mapped-ram":
        judge.execute("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": True}])
    uri = f"exec:cat > {target}" if how == "exec" else f"file:{target}"

    def work() -> None:
        judge.execute("stop")
        judge.execute("migrate", uri=uri)
        while (state := judge.execute("query-migrate").get("status")) not in ("completed", "failed"):
            time.sleep(0.002)
        judge.execute("cont")
        if state == "failed":
            raise RuntimeError("QEMU could not save itself")

    try:
        gap = gap_during(beat, work)[1]
        print(f"QEMU's {how}: {gap:.0f} ms, {target.stat().st_size >> 20} MiB", file=sys.stderr)
        return gap
    finally:
        target.unlink(missing_ok=True)
        if how == "mapped-ram":
            judge.execute("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": False}])


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies, of the values themselves."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


if __name__ == "__main__":
    main()
