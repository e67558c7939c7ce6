"""Pages that generations lack: python -m bench.missed [--minutes N] [--seed N] [--qemu BINARY].

A guest changes its memory and disks by chance while dirty pages are written back, captures are made, its balloon goes
up and down, its supervisor is killed and it reboots; again and again the VM is stopped by somebody else, and the
generation of that instant is compared with QEMU's own dump of memory and what qemu-img reads of the disks
(tests/e2e/chance.py). A few minutes with each tracker in turn, in new VMs. Ends with a line of JSON; status 1 if a page
was missed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from itertools import cycle
from typing import Any

from bench.vms import ROOT, Guest

from chance import KINDS, Seen, chance  # isort: skip  bench.vms says where it is

SLICE_MINUTES = 3.0
"""With one VM: its repository, in tmpfs, grows."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="look for pages that generations lack")
    add_arguments(parser)
    parser.add_argument("--qemu", help="QEMU's program, if not the one in PATH")
    arguments = parser.parse_args()
    subprocess.run([str(ROOT / "scripts" / "build-guest")], check=True, stdin=subprocess.DEVNULL)
    figures = measure(arguments)
    print(json.dumps(figures))
    sys.exit(1 if figures["missed_pages"] else 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this module; `bench.capture` has them, too."""
    parser.add_argument("--minutes", type=float, default=3.0, help="of random patterns, all trackers together")
    parser.add_argument("--seed", type=int, help="what decides the first VM's chances")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was missed and compared; each tracker gets at least one round."""
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    began, total, by_kind = time.monotonic(), Seen(), dict.fromkeys(KINDS, 0)
    end = began + 60 * arguments.minutes
    slice_s = 60 * min(SLICE_MINUTES, arguments.minutes / len(KINDS))
    for kind in cycle(KINDS):
        if time.monotonic() >= end and all(by_kind.values()):
            break
        with chance(Guest(), kind, seed, arguments.qemu) as made:
            stop = time.monotonic() + slice_s
            while True:
                made.round()
                if time.monotonic() >= stop:
                    break
        print(f"{kind}, seed {seed}: {made.seen}", file=sys.stderr)
        total.add(made.seen)
        by_kind[kind] += made.seen.instants
        seed += 1000
    return {
        "missed_pages": sum(total.missed.values()),
        "missed_by_region": total.missed,
        "missed_minutes": round((time.monotonic() - began) / 60, 1),
        "instants_judged": by_kind,
        "pages_compared": total.pages,
        "captures_of_running_guests": total.live,
        "take_overs": total.take_overs,
        "guest_reboots": total.reboots,
        "disks_read_by": total.methods,
    }


if __name__ == "__main__":
    main()
