"""The result as a picture: seconds of each step by tool, and what the repository takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from bench.figures import OURS, PIPE, Measured

mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of a backend that needs no display

_COLOURS = {OURS: "#1b6ca8", PIPE: "#9aa5ad"}
_OTHERS = ("#e07a3f", "#c9a227", "#7d5ba6", "#5a9367")


def draw(path: Path, measured: Measured, title: str) -> None:
    """Write a PNG of four panels; medians, with least and most as whiskers."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.8), constrained_layout=True)
    others = iter(_OTHERS)
    colours = {tool: _COLOURS.get(tool) or next(others) for tool in measured.tools()}
    panels = (("full", "full image"), ("dirty", "2 % dirty"), ("restore", "restore"))
    for axis, (phase, name) in zip(axes, panels, strict=False):
        for tool in measured.tools():
            walls = [each.wall for each in measured.steps[tool, phase]]
            middle = measured.wall(tool, phase)
            whiskers = [[middle - min(walls)], [max(walls) - middle]]
            axis.bar(tool, middle, yerr=whiskers, color=colours[tool], capsize=3)
        axis.set_title(f"{name}, seconds")
    for tool in measured.tools():
        stored, growth = measured.mib(tool)
        axes[3].bar(tool, stored, color=colours[tool])
        axes[3].bar(tool, growth, bottom=stored, color=colours[tool], alpha=0.45)
    axes[3].set_title("stored and growth, MiB")
    for axis in axes:
        axis.tick_params(axis="x", rotation=35)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
