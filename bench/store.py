"""Perdure beside restic, borg and a plain pipe, on images like a machine's memory: python -m bench.store.

Every round makes all repositories anew and takes the tools in turn, phase by phase, so that what else the machine does
meets all of them; what counts is the ratio of medians. What is restored is compared with what was stored. Ends with one
line of JSON. The targets that it is held against are in docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bench import figures, footprint, images
from bench.figures import OURS, Measured
from bench.tools import Borg, Perdure, Pipe, Restic, Tool, restored_file, same_content

KEYS = (
    "full_vs_best_peer", "full_vs_pipe", "dirty_vs_best_peer", "scan_vs_best_peer", "growth_mib",
    "growth_best_peer_mib", "restore_vs_best_peer", "wall_dirty_vs_best_peer", "stored_vs_pipe", "peak_private_mib",
    "restore_after_100_generations", "index_us_per_lookup", "index_bytes_per_entry",
)  # fmt: skip
"""What the last line has, in this order; null for what was not measured."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench store", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--mib", type=int, default=1024, help="size of the image (default 1024)")
    parser.add_argument("--dirty", type=float, default=0.02, help="share of dirty pages (default 0.02)")
    parser.add_argument("--entries", type=int, default=20_000_000, help="of the index; 0 leaves it out")
    parser.add_argument("--generations", type=int, default=100, help="before the prune; 0 leaves that out")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the result")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perdure-bench-", dir=options.directory))
    try:
        result = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({key: None if (value := result.get(key)) is None else round(value, 3) for key in KEYS}))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """Everything; gives the figures by name."""
    print(machine(), flush=True)
    make_images(folder, options.mib, options.seed, options.dirty)
    image = np.fromfile(folder / "0", np.uint8).reshape(-1, images.PAGE)
    images.dirtied(image, options.dirty, options.seed + 2)
    image.tofile(folder / "2")
    measured = Measured()
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        one_round(folder, measured)
    result: dict[str, float | None] = dict(figures.ratios(measured))
    print("\n".join(figures.table(measured, options.mib)), flush=True)
    print("\n".join(figures.spread(measured)), file=sys.stderr)
    result["peak_private_mib"] = peaks(folder)
    print(f"same dirty pages in 64 GiB sparse against 1 GiB: {sparse_cost(folder):.2f} times", flush=True)
    if options.generations:
        words = ["bench.prune", "--mib", options.mib, "--generations", options.generations, "--dirty", options.dirty]
        found = other(*words, "--folder", folder)
        result["restore_after_100_generations"] = found["kept_restore_vs_fresh"]
    if options.entries:
        found = other("bench.index", options.entries, "--directory", folder)
        result |= {key: found[key] for key in ("index_us_per_lookup", "index_bytes_per_entry")}
    if options.plot:
        from bench.plot import draw

        draw(options.plot, measured, machine())
    return result


def make_images(folder: Path, mib: int, seed: int, dirty: float) -> None:
    """The image `0`, its successor `1`, and where they differ, `ranges`."""
    print(f"making images of {mib} MiB", file=sys.stderr)
    image = images.memory(mib, seed)
    image.tofile(folder / "0")
    images.write_ranges(folder / "ranges", images.dirtied(image, dirty, seed + 1))
    image.tofile(folder / "1")


def machine() -> str:
    """Date and kind of machine."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{datetime.now(UTC):%Y-%m-%d}, {cores} cores of {model}, Linux {platform.release()}"


def one_round(folder: Path, measured: Measured) -> None:
    """All tools once, phase by phase."""
    ours = Perdure()
    tools: list[Tool] = [ours, Restic(), Borg(fixed=False), Borg(fixed=True), Pipe()]
    place = folder / "round"
    place.mkdir()
    for tool in tools:
        tool.begin(place / tool.name.replace(" ", "-"))
    for tool in tools:
        measured.steps[tool.name, "full"].append(tool.full(folder / "0"))
        measured.stored[tool.name].append(tool.stored())
    for tool in tools:
        measured.steps[tool.name, "dirty"].append(tool.dirty(folder / "1", folder / "ranges"))
        measured.growth[tool.name].append(tool.stored() - measured.stored[tool.name][-1])
    for tool in tools:
        measured.steps[tool.name, "unlock"].append(tool.unlock())
    restore(tools, place, folder / "1", measured)
    measured.steps[OURS, "scan"].append(ours.scan(folder / "2"))
    shutil.rmtree(place)


def restore(tools: list[Tool], place: Path, stored: Path, measured: Measured) -> None:
    """Have each tool restore what it stored last, which is compared."""
    for tool in tools:
        target = place / "target"
        target.mkdir()
        measured.steps[tool.name, "restore"].append(tool.restore(target))
        if not same_content(restored_file(target), stored):
            raise SystemExit(f"{tool.name} restored other bytes than it was given")
        shutil.rmtree(target)


def peaks(folder: Path) -> float:
    """The most memory that one of our commands takes; prints each."""
    tool = Perdure()
    tool.begin(folder / "footprint")
    commands = {
        "full import": ["import", "vm", f"ram={folder / '0'}"],
        "import of dirty ranges": [
            "import", "vm", f"ram={folder / '1'}", "--parent", "vm@1", "--dirty", f"ram={folder / 'ranges'}",
        ],
        "import that scans": ["import", "vm", f"ram={folder / '0'}", "--parent", "vm@latest"],
        "export": ["export", "vm@2", "ram", str(folder / "footprint" / "exported")],
        "diff": ["diff", "vm@1", "vm@2"],
        "check --read-data": ["check", "--read-data"],
    }  # fmt: skip
    found = {what: footprint.peak_mib([*tool.command, *words], tool.environment()) for what, words in commands.items()}
    print("peak anonymous and shared memory, MiB: " + ", ".join(f"{what} {mib:.0f}" for what, mib in found.items()))
    shutil.rmtree(folder / "footprint")
    return max(found.values())


def sparse_cost(folder: Path) -> float:
    """What a generation with the same dirty pages costs in a sparse region of 64 GiB against one of 1 GiB."""
    place = folder / "sparse"
    place.mkdir()
    small, large = Perdure(), Perdure()
    seconds: dict[int, list[float]] = {}
    for tool, gib in ((small, 1), (large, 64)):
        tool.begin(place / str(gib))
    first, later = np.arange(0, 4096), np.sort(np.random.default_rng(3).choice(1 << 18, 5000, replace=False))
    for turn in range(7):
        for tool, gib in ((small, 1), (large, 64)):
            image, ranges = place / f"image{gib}", place / f"ranges{gib}"
            pages = later if turn else first
            images.write_ranges(ranges, images.sparse(image, gib << 30, pages, seed=turn))
            more = ["--parent", "vm@latest", "--dirty", f"ram={ranges}"] if turn else []
            seconds.setdefault(gib, []).append(tool.load("vm", image, *more).own or 0.0)
    shutil.rmtree(place)
    return float(np.median(seconds[64][2:]) / np.median(seconds[1][2:]))


def other(*words: str | int | float | Path) -> dict[str, float]:
    """The figures of another benchmark, run in a process of its own; prints what it says."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
