"""Capturing disks: python -m bench.disks [--gib N] [--format raw|qcow2] [--turns N] [--directory FOLDER].

A real guest with one disk, full of data that does not compress. Before each full generation the guest writes 1 % of it
at random; then it is quiet, or it goes on writing while the generation is made. Measured is how long that takes and
for how long the guest is stopped, with the dirty bitmap, and without (it is taken away first: all of the disk is read
then, as before there were bitmaps). Ends with a line of JSON.
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
from pathlib import Path
from typing import Any

from bench.vms import ROOT, Guest

from supervised import NAME, Supervised  # isort: skip  bench.vms says where it is
from test_survival import IN_GUEST  # isort: skip

BLOCK = 64 << 10
WRITER = f"""
import random, time
disk, some = os.open("/dev/vda", os.O_RDWR), random.Random(1)
size = os.lseek(disk, 0, os.SEEK_END)

def write_one():
    os.pwrite(disk, some.randbytes({BLOCK}), some.randrange(size // {BLOCK}) * {BLOCK})

def write_and_sync():
    for _ in range(8):
        write_one()
    os.fsync(disk)
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="measure captures of a disk")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, help="where disk and repository are made (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="perdure-disks-", dir=arguments.directory) as folder:
        disk = Path(folder, "disk")
        make(disk, int(arguments.gib * (1 << 30)), arguments.format)
        settings = f'[[disk]]\nname = "one"\nfile = "{disk}"\nformat = "{arguments.format}"\n'
        vm = Supervised(Guest(), settings=settings, repository=Path(folder, "repository"))
        with contextlib.closing(vm):
            figures = measure(vm, arguments.turns, int(arguments.gib * (1 << 30)))
    print(json.dumps({"disk_gib": arguments.gib, "format": arguments.format, **figures}))


def make(disk: Path, size: int, kind: str) -> None:
    """A full disk."""
    raw = disk.with_suffix(".raw")
    with raw.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, str(raw), str(disk)], check=True)
    raw.unlink()


def measure(vm: Supervised, turns: int, size: int) -> dict[str, Any]:
    """Medians of some turns of each sort."""
    vm.boot()
    vm.guest.run(IN_GUEST + WRITER)
    first = vm.perdure("snapshot", NAME, "--full")
    figures: dict[str, Any] = {"first_s": first["seconds"]}
    for how in ("bitmap", "rescan"):
        for load in ("idle", "writing"):
            made = []
            for _ in range(turns):
                vm.guest.run(f"for _ in range({size // 100 // BLOCK}): write_one()\nos.fsync(disk)")
                if how == "rescan":
                    forget(vm)
                if load == "writing":
                    vm.guest.run("work(write_and_sync)")
                made.append(vm.perdure("snapshot", NAME, "--full"))
                vm.guest.run("finish()")
                assert made[-1]["disks"]["one"]["method"] == how
                print(how, load, made[-1]["seconds"], made[-1]["pause_ms"], made[-1]["disks"], file=sys.stderr)
            figures |= {
                f"{how}_{load}_s": round(statistics.median(each["seconds"] for each in made), 3),
                f"{how}_{load}_pause_ms": round(statistics.median(each["pause_ms"] for each in made), 1),
                f"{how}_{load}_pause_ms_max": round(max(each["pause_ms"] for each in made), 1),
                f"{how}_{load}_read_mib": round(made[-1]["disks"]["one"]["read_bytes"] / (1 << 20), 1),
            }
    return figures


def forget(vm: Supervised) -> None:
    """Take QEMU's bitmaps of the disk away."""
    for node in vm.judge.execute("query-named-block-nodes", flat=True):
        for bitmap in node.get("dirty-bitmaps", ()) if node["node-name"] == "disk-one" else ():
            vm.judge.execute("block-dirty-bitmap-remove", node="disk-one", name=bitmap["name"])


if __name__ == "__main__":
    main()
