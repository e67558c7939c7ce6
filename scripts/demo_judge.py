"""The demo's judge: reads all of a guest's memory, and says what it found of the secret and of the data.

Memory comes out of QEMU with pmemsave, over a monitor of the judge's own, and out of the backing files as they are:
nothing of Perdure is imported. As a program, `demo_judge.py FOLDER`, it is the VM's hook: what it sees before a boot's
first instruction goes to FOLDER/seen-N.json, N counting the boots. FOLDER has the monitor's socket and a file with the
secret's seed, and is on a tmpfs: memory is saved there, a piece at a time, and never on a disk.

Standard library only. One process at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "guest"), str(ROOT / "tests" / "e2e")]

import demo_program as program  # noqa: E402  # both are files of the tests, found by the line above
from judge import SOCKET, Judge  # noqa: E402

__all__ = ["REGION", "SOCKET", "Seen", "last_seen", "look", "program"]

REGION = "pm0"
_SEED = "seed"
_PIECE = 32 << 20
"""What is saved at once, so that a small tmpfs does."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in `searched` bytes of a guest's memory: how often the secret, in what QEMU gives and in the
    backing files; the counter of the data, None if there is none, and its first damaged page, None if it is whole."""

    searched: int
    secrets_by_qemu: int
    secrets_in_files: int
    counter: int | None
    damaged: int | None
    seconds: float


def look(folder: Path, backing: Path) -> Seen:
    """Search all of the guest's memory now; `backing` is the folder of the backing files."""
    started = time.monotonic()
    # The secret's beginning: so what is left of one that was cut off is found, too.
    needle = program.secret_text((folder / _SEED).read_text())[:32]
    judge = Judge(folder)
    spans = judge.spans()
    region = b"".join(_saved(judge, *spans[REGION]))
    elsewhere = (_saved(judge, *span) for name, span in spans.items() if name != REGION)
    counter, damaged = _data(memoryview(region))
    return Seen(
        searched=sum(size for _, size in spans.values()),
        secrets_by_qemu=region.count(needle) + sum(_count(pieces, needle) for pieces in elsewhere),
        secrets_in_files=sum(_count(_read(path), needle) for path in sorted(backing.iterdir())),
        counter=counter,
        damaged=damaged,
        seconds=time.monotonic() - started,
    )


def before_boot(folder: Path) -> None:
    """The hook."""
    seen = look(folder, Path(os.environ["PERDURE_MEMORY"]))
    made = folder / "seen.new"
    made.write_text(json.dumps(asdict(seen)))
    made.rename(folder / f"seen-{_boots(folder) + 1}.json")


def last_seen(folder: Path) -> Seen:
    """What the hook saw before the last boot."""
    return Seen(**json.loads((folder / f"seen-{_boots(folder)}.json").read_text()))


def tell_seed(folder: Path, seed: str) -> None:
    """What the secret is made from."""
    (folder / _SEED).write_text(seed)


def _boots(folder: Path) -> int:
    return len(list(folder.glob("seen-*.json")))


def _data(region: memoryview) -> tuple[int | None, int | None]:
    """Counter and first damaged page of the data that starts with a valid header, wherever in the region that is."""
    for start in range(0, len(region), program.PAGE):
        header = program.decode_header(region[start : start + program.PAGE])
        if header is not None:
            return header[1], program.damaged_page(region[start : start + program.AREA_SIZE])
    return None, None


def _saved(judge: Judge, address: int, size: int) -> Iterator[bytes]:
    """Guest-physical memory, as QEMU saves it."""
    for offset in range(0, size, _PIECE):
        yield judge.read(address + offset, min(_PIECE, size - offset))


def _read(path: Path) -> Iterator[bytes]:
    """A backing file; read and not mapped, since a look at a hole through a mapping allocates it."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            yield piece


def _count(pieces: Iterable[bytes], needle: bytes) -> int:
    count, tail = 0, b""
    for piece in pieces:
        joined = tail + piece
        count += joined.count(needle)
        tail = joined[1 - len(needle) :]
    return count


if __name__ == "__main__":
    before_boot(Path(sys.argv[1]))
