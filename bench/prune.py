"""How restores age, with and without prune: python -m bench.prune [--mib 1024] [--generations 100] [--dirty 0.02]

An image gets many generations, each with some dirty pages. Then the newest is restored from four repositories, turn
by turn: as it has grown ("grown"), after a prune with all generations kept ("kept"), after all but the first and the
last were forgotten and a prune ("few"), and from a fresh import of the same image ("fresh"). Also measured: what prune
rewrites and frees, how long that takes, and its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from base.workers import WorkerPool, usable_cores
from bench import images
from bench.footprint import peak_mib
from store.chunker import PackingSettings
from store.creation import create
from store.keyring.files import read_key_files
from store.keyring.layout import Argon2Parameters
from store.keyring.slots import new_keyring, unlock
from store.reader import GenerationReader
from store.records import Generation
from store.repository import Repository
from store.upkeep.prune import prune
from store.upkeep.prune_plan import PruneSettings
from store.workers import serve

_PASSPHRASE = b"benchmark"
_CHEAP = Argon2Parameters(time=1, memory_kib=64, lanes=1)


def main() -> None:
    """Measure, print lines as they come, and at last all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--dirty", type=float, default=0.02)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--prune", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--forget", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        pruned(options.prune, forget=options.forget)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        print(json.dumps(measure(Path(root), options)))


def measure(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    figures: dict[str, float] = {}
    image = images.memory(options.mib, 1)
    current = root / "image"
    with WorkerPool(usable_cores(), serve) as pool:
        with made(root / "grown", pool) as repository:
            image.tofile(current)
            parent = stored(repository, current, None, None)
            for generation in range(options.generations):
                dirty = images.dirtied(image, options.dirty, 1000 + generation)
                image.tofile(current)
                parent = stored(repository, current, parent, dirty)
                if generation % 10 == 9:
                    print(f"{generation + 1} generations", file=sys.stderr)
        with made(root / "fresh", pool) as repository:
            stored(repository, current, None, None)
    names = ["grown", "kept", "few", "fresh"]
    for name in ("kept", "few"):
        shutil.copytree(root / "grown", root / name)
        command = [sys.executable, "-m", "bench.prune", "--prune", str(root / name)]
        peak = peak_mib([*command, "--forget"] if name == "few" else command, dict(os.environ))
        found = json.loads((root / name / "figures").read_bytes())
        figures |= {f"{name}_{key}": each for key, each in found.items()} | {f"{name}_prune_peak_mib": round(peak)}
    wall: dict[str, list[float]] = {name: [] for name in names}
    used: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.turns):
        for name in names:
            seconds, processor = restored(root / name, root / "target", current if turn == 0 else None)
            wall[name].append(seconds)
            used[name].append(processor)
    for what, measured in (("restore", wall), ("restore_processor", used)):
        medians = {name: statistics.median(each) for name, each in measured.items()}
        figures |= {f"{name}_{what}_seconds": round(each, 3) for name, each in medians.items()}
        figures |= {f"{name}_{what}_vs_fresh": round(medians[name] / medians["fresh"], 2) for name in names[:-1]}
    return figures


def pruned(root: Path, *, forget: bool) -> None:
    """Prune a repository, in a process of its own, and leave figures beside it."""
    with opened(root) as repository:
        if forget:
            for generation in repository.generations("vm")[1:-1]:
                repository.forget(generation)
        began, used = time.monotonic(), time.process_time()
        planned, result = prune(repository, PruneSettings())
        figures = {
            "prune_seconds": round(time.monotonic() - began, 2),
            "prune_processor_seconds": round(time.process_time() - used, 2),
            "rewritten_mib": result.rewritten_bytes >> 20,
            "freed_mib": result.freed_bytes >> 20,
            "estimate_before": planned.scattered["vm"],
        }
        after, _ = prune(repository, PruneSettings(), dry_run=True)
        figures |= {"estimate_after": after.scattered["vm"], "stored_mib": after.total_bytes >> 20}
        repository.tidy(30.0)
    (root / "figures").write_text(json.dumps(figures))


def made(root: Path, pool: WorkerPool) -> Repository:
    """A new repository, open."""
    keyring = new_keyring(_PASSPHRASE, _CHEAP)
    create(root / "repository", keyring.files, keyring.keys, PackingSettings())
    return opened(root, pool)


def opened(root: Path, pool: WorkerPool | None = None) -> Repository:
    """A repository, open."""
    path = root / "repository"
    return Repository(path, unlock(read_key_files(path), _PASSPHRASE), root / "state", pool=pool)


def stored(
    repository: Repository, file: Path, parent: Generation | None, dirty: list[tuple[int, int]] | None
) -> Generation:
    """A generation of the file."""
    with repository.writer("vm", parent) as writer, file.open("rb") as source:
        draft = writer.region("ram", "image", os.fstat(source.fileno()).st_size)
        extents = None if dirty is None else np.array([(at, at + count) for at, count in dirty])
        writer.replace(draft, source.fileno(), extents)
        return writer.commit("import")


def restored(root: Path, target: Path, expected: Path | None) -> tuple[float, float]:
    """Restore the newest generation: (seconds from the opened repository to the last byte written, of processors).

    The second says more where others are at work too.
    """
    with opened(root) as repository:
        generation = repository.resolve("vm@latest")
        began, before = time.monotonic(), time.process_time()
        with GenerationReader(repository, generation) as reader, target.open("w+b") as file:
            region = reader.region("ram")
            os.ftruncate(file.fileno(), region.root.length)
            reader.restore(region, file.fileno(), str(target))
        seconds = time.monotonic() - began, time.process_time() - before
    if expected is not None and target.read_bytes() != expected.read_bytes():
        raise SystemExit(f"{root} restored other bytes than it was given")
    target.unlink()
    return seconds


if __name__ == "__main__":
    main()
