"""Feed damaged input to every decoder for as long as it is told, and say what was found.

    python bench/fuzz.py [--seconds 600] [--seed 1] [--only NAME] [--keep FOLDER] [--guided]

Every decoder of tests/decoders.py and decoders_of_vms.py gets the same share of the time, and starts from whole
examples, to which it does what disks, networks and attackers do: bits flipped, numbers set to their limits, pieces
cut out, doubled, exchanged with those of other examples, text that nests deep. What was accepted is damaged further.
`--guided` has atheris (from PyPI, to be installed beforehand) choose by coverage instead, in a process for each
decoder. A finding is an exception that is none of the decoder's typed errors, more than SECONDS_MOST for one input,
or memory beyond MEMORY_MOST; its input is kept. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

if TYPE_CHECKING:
    from decoders import Decoder

SECONDS_MOST = 5
MEMORY_MOST = 3 << 30
"""Bytes of address space on top of what the process has at the start."""
_BYTES_MOST = 1 << 20
_NUMBERS = [0, 1, 2, 4, 28, 31, 32, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536]
_NUMBERS += [(1 << bits) - less for bits in (24, 31, 32, 53, 63, 64) for less in (0, 1)]
_TOKENS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"1e308", b"1.5", b"9" * 25, b"9" * 400 + b".5", b"9" * 5000, b'""', b"{}",
    b"[]", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\0", b"[" * 3000, b'{"a":' * 3000, b"[[",
    b"]]", b"'''", b'"""', b" = ", b"nan", b"inf", b"1979-05-27", b"0x", b"T", b"\\", b"-----BEGIN PUBLIC KEY-----\n",
]  # fmt: skip


def damaged(seed: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A variant of an example."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                size = rng.choice((2, 4, 8))
                at = rng.choice((at, at // size * size, min(at, 160)))
                data[at : at + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            case 3:
                del data[at:]
            case 4:
                data += rng.randbytes(rng.choice((1, 4, 16, 300)))
            case 5:
                del data[at : at + rng.choice((1, 2, 8, 32, 500))]
            case 6:
                data[at:at] = data[at : at + rng.choice((1, 8, 32, 500))] * rng.choice((1, 2, 50))
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at : at + rng.choice((0, 8, 100))] = other[start : start + rng.choice((4, 32, 400))]
            case 8:
                data[at : at + rng.choice((0, 0, 1, 8))] = rng.choice(_TOKENS)
    return bytes(data[:_BYTES_MOST])


class _TooLongError(BaseException):
    """An input took more than SECONDS_MOST; nothing that decoders catch."""


def _too_long(*_: object) -> None:
    raise _TooLongError


def fuzz(decoder: Decoder, seconds: float, rng: random.Random, keep: Path) -> tuple[int, int, float, list[str]]:
    """(inputs, accepted, seconds of the slowest, findings) for one decoder."""
    seeds = decoder.seeds()
    corpus, findings, seen = list(seeds), [], set[str]()
    count = accepted = 0
    slowest, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = damaged(rng.choice(corpus), seeds, rng)
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS_MOST)
        try:
            if decoder.feed(data):
                accepted += 1
                if rng.random() < 0.05:
                    corpus = [*corpus[-200:], data]
        except (Exception, _TooLongError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            if where not in seen:
                seen.add(where)
                path = keep / f"{_file_name(decoder.name)}-{len(seen)}"
                path.write_bytes(data)
                findings.append(f"{decoder.name}: {where}: {str(error)[:150]!r} ({path})")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        count += 1
        slowest = max(slowest, time.monotonic() - begin)
    return count, accepted, slowest, findings


def guided(name: str, seconds: float, keep: Path) -> None:
    """Fuzz one decoder with libFuzzer, which ends the process: status 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["base", "capture", "guest", "perdure", "restore", "store", "vm"]):
        from decoders_of_vms import DECODERS
    decoder = DECODERS[name]
    with tempfile.TemporaryDirectory() as corpus:
        for at, seed in enumerate(decoder.seeds()):
            Path(corpus, str(at)).write_bytes(seed)
        limits = [f"-max_total_time={int(seconds)}", f"-timeout={SECONDS_MOST}", "-rss_limit_mb=3000"]
        words = [*limits, "-max_len=70000", "-verbosity=0", f"-artifact_prefix={keep}/{_file_name(name)}-", corpus]
        atheris.Setup([sys.argv[0], *words], lambda data: decoder.feed(bytes(data)))
        atheris.Fuzz()


def _file_name(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-").replace("'", "")


def all_guided(names: list[str], options: argparse.Namespace) -> int:
    """A process for each; gives how many found something."""
    found = 0
    for name in names:
        words = ["--guided-child", name, "--seconds", str(options.seconds / len(names)), "--keep", str(options.keep)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        print(f"{name:26} {'nothing' if done.returncode == 0 else 'FOUND'}", flush=True)
        if done.returncode:
            found += 1
            print(*(f"  {line}" for line in done.stderr.splitlines()[-25:]), sep="\n")
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Feed damaged input to every decoder.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only")
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--guided-child", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    if options.guided_child:
        guided(options.guided_child, options.seconds, options.keep)
    from decoders_of_vms import DECODERS, world

    if options.guided:
        return min(1, all_guided([each for each in DECODERS if options.only in (None, each)], options))
    chosen = [each for each in DECODERS.values() if options.only in (None, each.name)]
    world()  # LMDB takes more address space than the limit leaves
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_MOST, used + MEMORY_MOST))
    signal.signal(signal.SIGALRM, _too_long)
    everything = []
    print(f"{'decoder':26} {'inputs':>9} {'accepted':>9} {'slowest':>8}")
    for each in chosen:
        rng = random.Random(f"{options.seed} {each.name}")
        count, accepted, slowest, findings = fuzz(each, options.seconds / len(chosen), rng, options.keep)
        print(f"{each.name:26} {count:9} {accepted:9} {slowest:6.2f} s", *findings, sep="\n  " if findings else "")
        sys.stdout.flush()
        everything += findings
    print(f"{len(everything)} findings")
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
