"""A long history: python -m bench.generations [COUNT] [--vms N] [--directory FOLDER].

Makes generations of small VMs through the store, two dirty pages each, and measures what a user waits for: listing one
VM among them, and a host that sees the repository for the first time. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import extents as ranges
from base.units import PAGE

LENGTH = 64 << 20
_TURNS = 3


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="measure a long history")
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--vms", type=int, default=10)
    parser.add_argument("--directory", type=Path, help="where to make it (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="perdure-history-", dir=arguments.directory))
    os.environ |= {
        "PERDURE_REPOSITORY": str(folder / "repository"),
        "PERDURE_PASSWORD": "benchmark",
        "PERDURE_STATE_DIR": str(folder / "state"),
    }
    try:
        perdure("init")
        made = make(folder, arguments.count, arguments.vms)
        listing = [perdure("log", "vm0", "--json") for _ in range(_TURNS)]
        everything = perdure("log", "--json")
        os.environ["PERDURE_STATE_DIR"] = str(folder / "another host")
        first = perdure("log", "vm0", "--json")
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    finally:
        shutil.rmtree(folder)
    one = tuple(statistics.median(each) for each in zip(*listing, strict=True))
    figures = {"generations": arguments.count, "peak_resident_mib": memory >> 10}
    parts = {"commit": tuple(each / arguments.count for each in made)}
    parts |= {"log_of_one_vm": one, "log_of_all": everything, "first_log_of_another_host": first}
    for name, (seconds, worked) in parts.items():
        figures |= {f"{name}_s": round(seconds, 4), f"{name}_cpu_s": round(worked, 4)}
    print(json.dumps(figures))


def perdure(*words: str) -> tuple[float, float]:
    """Seconds that a command took, by the clock and of the processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "perdure", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, worked


def make(folder: Path, count: int, vms: int) -> tuple[float, float]:
    """Make so many generations, of VMs in turn; gives the seconds, by the clock and of the processor."""
    from perdure.opening import opened

    rng = random.Random(1)
    began, worked = time.perf_counter(), time.process_time()
    with opened(folder / "repository") as repository, tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), LENGTH)
        for each in range(count):
            pages = [rng.randrange(LENGTH // PAGE) for _ in range(2)]
            for page in pages:
                os.pwrite(file.fileno(), rng.randbytes(PAGE), page * PAGE)
            dirty = ranges.normalise([(page * PAGE, (page + 1) * PAGE) for page in pages])
            vm = f"vm{each % vms}"
            with repository.writer(vm, repository.latest(vm)) as writer:
                draft = writer.region("ram", "image", LENGTH)
                writer.replace(draft, file.fileno(), None if each < vms else dirty)
                writer.commit("import")
            if each % 1000 == 0:
                print(f"generation {each} of {count}", file=sys.stderr)
    return time.perf_counter() - began, time.process_time() - worked


if __name__ == "__main__":
    main()
