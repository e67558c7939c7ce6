"""A VM resumed by Perdure and by QEMU's own means, an image restored beside restic and borg: python -m bench.restore.

For each size of memory, half of it in use, a guest is captured in full and resumed turn by turn: lazily where nothing
is known of what it touches, lazily once more, eagerly; then newer generations of it, none of which was ever resumed;
then by QEMU's migration from a file and by loadvm. Milliseconds are from the request (to Perdure's supervisor, or the
start of QEMU) to the first heartbeat of the guest, and to an answered request that looks at pages here and there in its
memory. Medians; ends with one line of JSON. The targets that it is held against are in docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench import figures, store
from bench.figures import Measured
from bench.resumes import ROOT, Bench, Peer, Resume, drop_caches
from bench.tools import Borg, Perdure, Restic, Tool

KEYS = (
    "eager_vs_best_peer", "resume_ms_lazy", "resume_4g_vs_512m", "resume_vs_qemu", "fault_us_p50", "fault_us_p99",
    "prefetch_fault_reduction_percent",
)  # fmt: skip
"""What the last line has, in this order; null for what was not measured."""
OURS = ("lazy, first", "lazy, again", "lazy, newer", "eager", "cold lazy", "cold eager")
PEERS = ("-incoming", "-loadvm")


@dataclass(slots=True)
class Size:
    """What was measured of one size of memory: resumes by kind, and seconds of the full snapshot."""

    mib: int
    used_mib: int
    resumes: dict[str, list[Resume]] = field(default_factory=dict)
    snapshot_seconds: float = 0.0

    def note(self, kind: str, resume: Resume) -> None:
        """One more of a kind."""
        self.resumes.setdefault(kind, []).append(resume)
        print(f"  {self.mib} MiB, {kind}: {resume}", file=sys.stderr, flush=True)

    def beat_ms(self, kind: str) -> float | None:
        """Median to the first heartbeat; None if that was not measured."""
        found = self.resumes.get(kind)
        return statistics.median(each.beat_ms for each in found) if found else None

    def median(self, kind: str, what: str) -> float:
        """Of another figure of a resume."""
        return statistics.median(getattr(each, what) for each in self.resumes[kind])


@dataclass(slots=True)
class Results:
    """All that was measured, in one run or in several."""

    sizes: list[Size] = field(default_factory=list)
    eager_vs_best_peer: float | None = None

    @classmethod
    def load(cls, path: Path | None) -> Results:
        """What earlier runs have kept; nothing where there is no file."""
        return msgspec.json.decode(path.read_bytes(), type=cls) if path and path.exists() else cls()

    def save(self, path: Path | None) -> None:
        """Keep it for the next run."""
        if path:
            path.write_bytes(msgspec.json.encode(self))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench restore", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="512,2048,4096", help="MiB of memory, by commas (default 512,2048,4096)")
    parser.add_argument("--turns", type=int, default=5, help="resumes of each kind (default 5)")
    parser.add_argument("--newer-turns", type=int, default=2, help="newer generations; 0 leaves them out (default 2)")
    parser.add_argument("--peer-turns", type=int, default=2, help="of QEMU's own kinds; 0 leaves them out (default 2)")
    parser.add_argument("--pages", type=int, default=300, help="that the guest looks at for a request (default 300)")
    parser.add_argument(
        "--mib", type=int, default=1024, help="image for restic and borg; 0 leaves it out (default 1024)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of that comparison (default 3)")
    parser.add_argument(
        "--results", type=Path, metavar="JSON", help="keep what is measured there, and do not measure what is there"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the result")
    parser.add_argument("--directory", type=Path, help="where to work, on a disk (default: a temporary folder)")
    options = parser.parse_args()
    results = Results.load(options.results)
    folder = Path(tempfile.mkdtemp(prefix="perdure-bench-", dir=options.directory))
    try:
        print(f"{store.machine()}; caches {'dropped' if drop_caches() else 'not dropped'}", flush=True)
        for mib in options.sizes.split(",") if options.sizes else ():
            if not any(size.mib == int(mib) for size in results.sizes):
                results.sizes.append(measured(folder, int(mib), options))
                results.save(options.results)
        if options.mib and results.eager_vs_best_peer is None:
            results.eager_vs_best_peer = against_peers(folder, options.mib, options.rounds)
            results.save(options.results)
    finally:
        shutil.rmtree(folder)
    sizes = sorted(results.sizes, key=lambda size: size.mib)
    print("\n".join(table(sizes)), flush=True)
    if options.plot:
        from bench.resume_plot import draw

        draw(options.plot, sizes, store.machine())
    result = {"eager_vs_best_peer": results.eager_vs_best_peer, **ratios(sizes)}
    print(json.dumps({key: None if (value := result.get(key)) is None else round(value, 3) for key in KEYS}))


def measured(folder: Path, mib: int, options: argparse.Namespace) -> Size:
    """One size of memory, turn by turn."""
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    size = Size(mib, mib // 2)
    bench = Bench(folder / str(mib), mib, size.used_mib, options.pages)
    try:
        size.snapshot_seconds = bench.snapshot_seconds
        for _ in range(options.turns):
            size.note("lazy, first", bench.roll_back(lazy=True, fresh=True))
            size.note("lazy, again", bench.roll_back(lazy=True))
            size.note("eager", bench.roll_back(lazy=False))
        for turn in range(options.newer_turns):
            bench.go_further(seed=turn + 2)
            size.note("lazy, newer", bench.roll_back(lazy=True))
        bench.whole()
        if options.peer_turns:
            peer = Peer(bench)
            for _ in range(options.peer_turns):
                size.note("-incoming", peer.incoming())
                size.note("-loadvm", peer.loadvm())
        size.note("cold lazy", bench.cold(lazy=True))
        size.note("cold eager", bench.cold(lazy=False))
    except BaseException:
        print(bench.vm.report(), file=sys.stderr)
        raise
    finally:
        bench.close()
    return size


def against_peers(folder: Path, mib: int, rounds: int) -> float:
    """Seconds of the fastest of restic and borg to restore an image, divided by ours; whole commands."""
    store.make_images(folder, mib, 1, 0.02)
    times, place = Measured(), folder / "round"
    tools: list[Tool] = [Perdure(), Restic(), Borg(fixed=False), Borg(fixed=True)]
    place.mkdir()
    for tool in tools:
        tool.begin(place / tool.name.replace(" ", "-"))
        tool.full(folder / "1")
    for _ in range(rounds):
        drop_caches()
        store.restore(tools, place, folder / "1", times)
        for tool in tools:
            times.steps[tool.name, "unlock"].append(tool.unlock())
    shutil.rmtree(place)
    print("restore of an image, seconds (unlocking among them):")
    for tool in tools:
        print(f"{tool.name:16}{times.wall(tool.name, 'restore'):8.2f} ({times.wall(tool.name, 'unlock'):.2f})")
    ours = times.wall(figures.OURS, "restore")
    return min(times.wall(each, "restore") for each in times.peers()) / ours


def ratios(sizes: list[Size]) -> dict[str, float | None]:
    """The figures of the last line: of the largest memory, and of the largest against the smallest."""
    if not sizes:
        return {}
    small, large = sizes[0], sizes[-1]
    lazy = large.beat_ms("lazy, first")
    least = small.beat_ms("lazy, first")
    qemu = large.beat_ms("-incoming")
    first, again = (large.median(kind, "faults") for kind in ("lazy, first", "lazy, again"))
    return {
        "resume_ms_lazy": lazy,
        "resume_4g_vs_512m": None if lazy is None or least is None or small is large else lazy / least,
        "resume_vs_qemu": None if qemu is None or lazy is None else qemu / lazy,
        "fault_us_p50": large.median("lazy, first", "fault_us_p50"),
        "fault_us_p99": large.median("lazy, first", "fault_us_p99"),
        "prefetch_fault_reduction_percent": 100 * (1 - again / first) if first else None,
    }


def table(sizes: list[Size]) -> list[str]:
    """Medians, milliseconds to the heartbeat and to the answer; faults until then, and their latencies."""
    lines = ["ms to the first heartbeat / to an answered request"]
    lines.append("| memory (in use) | " + " | ".join((*OURS, *PEERS)) + " |")
    lines.append("| --- |" + " ---: |" * len((*OURS, *PEERS)))
    for size in sizes:
        cells = [
            "-" if size.beat_ms(kind) is None else f"{size.beat_ms(kind):.0f} / {size.median(kind, 'answer_ms'):.0f}"
            for kind in (*OURS, *PEERS)
        ]
        lines.append(f"| {size.mib} MiB ({size.used_mib}) | " + " | ".join(cells) + " |")
    lines += ["| memory | faults, first | p50, us | p99, us | faults, again | fetched ahead, MiB | faults, newer |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for size in sizes:
        first = " | ".join(
            f"{size.median('lazy, first', each):.0f}" for each in ("faults", "fault_us_p50", "fault_us_p99")
        )
        ahead = size.median("lazy, again", "prefetched_bytes") / (1 << 20)
        again = f"{size.median('lazy, again', 'faults'):.0f}"
        newer = f"{size.median('lazy, newer', 'faults'):.0f}" if "lazy, newer" in size.resumes else "-"
        lines.append(f"| {size.mib} MiB | {first} | {again} | {ahead:.0f} | {newer} |")
    return lines


if __name__ == "__main__":
    main()
