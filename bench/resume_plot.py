"""The result of `scripts/bench restore` as a picture: milliseconds to the first heartbeat, by size of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of a backend that needs no display

if TYPE_CHECKING:
    from bench.restore import Size

_KINDS = {
    "lazy, first": "#1b6ca8",
    "lazy, again": "#6aaed6",
    "eager": "#12466e",
    "-incoming": "#e07a3f",
    "-loadvm": "#c9a227",
}


def draw(path: Path, sizes: list[Size], title: str) -> None:
    """Write a PNG; bars are medians, on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    width = 0.8 / len(_KINDS)
    for number, (kind, colour) in enumerate(_KINDS.items()):
        heights = [size.beat_ms(kind) or 0 for size in sizes]
        bars = axis.bar([at + number * width for at in range(len(sizes))], heights, width, color=colour, label=kind)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_yscale("log")
    axis.set_ylabel("ms to the first heartbeat")
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(sizes))])
    axis.set_xticklabels([f"{size.mib} MiB, {size.used_mib} in use" for size in sizes])
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
