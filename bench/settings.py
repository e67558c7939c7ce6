"""Compression level and frame size: what each choice costs and saves. python -m bench.settings [--mib 1024].

Processor seconds, since those hardly depend on what else the machine does: of storing an image, of restoring it, and
microseconds of reading one page that nobody has read before, as a page fault of a lazy restore would.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from base import extents as ranges
from base.allocation import keep_freed_memory
from bench import images
from store.chunker import PackingSettings
from store.creation import create
from store.keyring.slots import KeyFile, new_keyring
from store.reader import GenerationReader
from store.repository import Repository

_FRAMES_KIB = (16, 64, 128, 256)
_LEVELS = (3, 1, -1, -3)
_PAGES = 400


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench settings", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="perdure-settings-", dir=options.directory) as folder:
        image = images.memory(options.mib, 1)
        image.tofile(Path(folder) / "0")
        dirty = images.dirtied(image, 0.02, 2)
        image.tofile(Path(folder) / "1")
        del image
        print("| frame | level | store, CPU s | restore, CPU s | one page, us | stored, MiB | 2 % dirty, MiB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for frame in _FRAMES_KIB:
            for level in _LEVELS:
                figures = measured(Path(folder), PackingSettings(level=level, frame_bytes=frame << 10), dirty)
                print(f"| {frame} KiB | {level} | " + " | ".join(figures) + " |", flush=True)


def measured(folder: Path, settings: PackingSettings, dirty: list[tuple[int, int]]) -> list[str]:
    """One row of the table, in a repository of its own."""
    made = new_keyring(KeyFile(os.urandom(64)))
    place = Path(tempfile.mkdtemp(dir=folder))
    create(place / "repository", made.files, made.keys, settings)
    extents = ranges.normalise([(start, start + length) for start, length in dirty])
    with Repository(place / "repository", made.keys, place / "state") as repository:
        began = processor()
        full = _stored(repository, folder / "0", None)
        storing = processor() - began
        changed = _stored(repository, folder / "1", extents)
        generation = repository.resolve("vm@1")
        with GenerationReader(repository, generation) as reader, tempfile.TemporaryFile(dir=folder) as file:
            region = reader.region("ram")
            file.truncate(region.root.length)
            began = processor()
            reader.restore(region, file.fileno(), "a file")
            restoring = processor() - began
            pages = np.random.default_rng(5).integers(0, region.root.length >> 12, _PAGES).tolist()
            clock = time.process_time()
            for page in pages:
                reader.read(region, page << 12, (page + 1) << 12)
            one = (time.process_time() - clock) / _PAGES * 1e6
    return [f"{storing:.2f}", f"{restoring:.2f}", f"{one:.0f}", f"{full / (1 << 20):.1f}", f"{changed / (1 << 20):.1f}"]


def processor() -> float:
    """Processor seconds of this process so far, user and system, all threads."""
    times = os.times()
    return times.user + times.system


def _stored(repository: Repository, image: Path, extents: ranges.Extents | None) -> int:
    """Bytes that a generation of this image added."""
    with image.open("rb") as file, repository.writer("vm", repository.latest("vm")) as writer:
        draft = writer.region("ram", "image", image.stat().st_size)
        writer.replace(draft, file.fileno(), extents)
        return writer.commit("measured").stored_bytes


if __name__ == "__main__":
    main()
