"""What a run measured, and what follows from it. Pure functions on medians."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from bench.tools import Step

OURS, PIPE = "perdure", "zstd | aes"
PHASES = ("full", "dirty", "scan", "restore", "unlock")


class Measured:
    """Steps of all rounds by tool and phase, and sizes in bytes."""

    def __init__(self) -> None:
        self.steps: dict[tuple[str, str], list[Step]] = defaultdict(list)
        self.stored: dict[str, list[int]] = defaultdict(list)
        self.growth: dict[str, list[int]] = defaultdict(list)

    def tools(self) -> list[str]:
        """Names, in the order in which they were first measured."""
        return list(dict.fromkeys(tool for tool, _ in self.steps))

    def peers(self) -> list[str]:
        """Tools that do what we do."""
        return [tool for tool in self.tools() if tool not in (OURS, PIPE)]

    def wall(self, tool: str, phase: str) -> float:
        """Median seconds from outside."""
        return statistics.median(each.wall for each in self.steps[tool, phase])

    def processor(self, tool: str, phase: str) -> float:
        """Median processor seconds of a command and its children."""
        return statistics.median(each.processor for each in self.steps[tool, phase])

    def own(self, phase: str) -> float:
        """Median of our own seconds, unlocked to committed."""
        return statistics.median(each.own or each.wall for each in self.steps[OURS, phase])

    def unlocked(self, tool: str, phase: str) -> float:
        """Median seconds from outside less those of the tool's cheapest command that unlocks."""
        return max(self.wall(tool, phase) - self.wall(tool, "unlock"), 1e-9)

    def mib(self, tool: str) -> tuple[float, float]:
        """Medians of what a tool's repository takes for the image, and of its growth for the successor."""
        return (
            statistics.median(self.stored[tool]) / (1 << 20),
            statistics.median(self.growth[tool]) / (1 << 20),
        )


def ratios(measured: Measured) -> dict[str, float]:
    """Figures of the comparison; those that end in `_peer` or `_pipe` are better when they are higher, but sizes."""
    peers = measured.peers()
    ours = {phase: measured.wall(OURS, phase) for phase in ("full", "dirty", "restore")}
    dirty = min(measured.unlocked(tool, "dirty") for tool in peers)
    return {
        "full_vs_best_peer": min(measured.wall(tool, "full") for tool in peers) / ours["full"],
        "full_vs_pipe": measured.wall(PIPE, "full") / ours["full"],
        "dirty_vs_best_peer": dirty / measured.own("dirty"),
        "scan_vs_best_peer": dirty / measured.own("scan"),
        "growth_mib": measured.mib(OURS)[1],
        "growth_best_peer_mib": min(measured.mib(tool)[1] for tool in peers),
        "restore_vs_best_peer": min(measured.wall(tool, "restore") for tool in peers) / ours["restore"],
        "wall_dirty_vs_best_peer": min(measured.wall(tool, "dirty") for tool in peers) / ours["dirty"],
        "stored_vs_pipe": measured.mib(OURS)[0] / measured.mib(PIPE)[0],
    }


def table(measured: Measured, mib: int) -> list[str]:
    """Medians by tool: seconds of each phase, MiB/s of image for full and restore, sizes."""
    columns = ("full", "MiB/s", "2% dirty", "restore", "MiB/s", "unlock", "stored", "growth")
    lines = [" " * 16 + "".join(f"{column:>10}" for column in columns)]
    for tool in measured.tools():
        full, dirty, restore, unlock = (measured.wall(tool, each) for each in ("full", "dirty", "restore", "unlock"))
        seconds = f"{full:10.2f}{mib / full:10.0f}{dirty:10.2f}{restore:10.2f}{mib / restore:10.0f}{unlock:10.2f}"
        lines.append(f"{tool:16}{seconds}" + "".join(f"{size:10.1f}" for size in measured.mib(tool)))
    lines.append("processor seconds of all processes:")
    for tool in measured.tools():
        spent = ", ".join(f"{phase} {measured.processor(tool, phase):.2f}" for phase in ("full", "dirty", "restore"))
        lines.append(f"{tool:16} {spent}")
    lines.append("seconds are medians of whole commands; stored and growth (for 2 % dirty) in MiB")
    own = ", ".join(f"{phase} {measured.own(phase):.3f}" for phase in ("full", "dirty", "scan"))
    lines.append(f"{OURS}, seconds from unlocked to committed: {own}")
    best = min(measured.unlocked(tool, "full") for tool in measured.peers())
    lines.append(
        f"so counted, full is {best / measured.own('full'):.2f} times as fast as the best peer less its unlocking, "
        f"{measured.wall(PIPE, 'full') / measured.own('full'):.2f} times as fast as the pipe"
    )
    return lines


def spread(measured: Measured) -> Iterable[str]:
    """Least and most of what the medians stand for: how noisy the machine was."""
    for (tool, phase), steps in measured.steps.items():
        walls = [each.wall for each in steps]
        if phase in ("full", "dirty", "restore"):
            yield f"{tool} {phase}: {min(walls):.2f} to {max(walls):.2f} s"
