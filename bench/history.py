"""How a store ages: restoring the newest of many generations against restoring a fresh import of the same image."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from bench import images
from bench.tools import Perdure, restored_file, run, same_content

_TURNS = 3


def after_generations(folder: Path, options: argparse.Namespace) -> float | None:
    """Median seconds to restore after generations of dirty pages, forget and prune, divided by those of a fresh import.

    None where there is no `perdure prune` yet.
    """
    aged = Perdure()
    if "prune" not in run([*aged.command, "--help"])[1]:
        print("restore after generations: not measured, there is no `perdure prune`", flush=True)
        return None
    place = folder / "history"
    place.mkdir()
    aged.begin(place / "aged")
    image = np.fromfile(folder / "0", np.uint8).reshape(-1, images.PAGE)
    current, ranges = place / "image", place / "ranges"
    image.tofile(current)
    aged.full(current)
    for generation in range(options.generations):
        if generation % 10 == 0:
            print(f"generation {generation} of {options.generations}", file=sys.stderr)
        images.write_ranges(ranges, images.dirtied(image, options.dirty, 1000 + generation))
        image.tofile(current)
        aged.dirty(current, ranges)
    before = aged.stored()
    aged.perdure("forget", "vm", "--keep-last", "1")
    aged.perdure("prune")
    fresh = Perdure()
    fresh.begin(place / "fresh")
    fresh.full(current)
    print(
        f"after {options.generations} generations: {before >> 20} MiB, pruned {aged.stored() >> 20} MiB, "
        f"fresh {fresh.stored() >> 20} MiB"
    )
    seconds: dict[str, list[float]] = {"aged": [], "fresh": []}
    for _ in range(_TURNS):
        for name, tool in (("aged", aged), ("fresh", fresh)):
            target = place / "target"
            target.mkdir()
            seconds[name].append(tool.restore(target).wall)
            if not same_content(restored_file(target), current):
                raise SystemExit(f"the {name} repository restored other bytes than it was given")
            shutil.rmtree(target)
    shutil.rmtree(place)
    return statistics.median(seconds["aged"]) / statistics.median(seconds["fresh"])
