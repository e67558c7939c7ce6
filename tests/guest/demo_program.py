"""The demo's program inside the guest: data that must survive reboots, and a secret that must not.

Persistent: 32 MiB in the area `demo`, filled on the first boot. On each later boot every page is verified, the
counter becomes the number of boots that the data has survived, and about one page in a hundred is changed as the
counter says: after k reboots the data is verified with counter k. Volatile: 64 MiB of a secret, which is derived from
`perdure.secret=HEX` on the kernel command line and is not itself there. With `perdure.reboots=N` the program reboots
the guest until the counter is N, else it stays up.

On the console, one line for each step, `PERDURE-DEMO ` and a JSON object:

    {"event":"filled","counter":0,"address":A,"seconds":S}
    {"event":"verified","counter":K,"address":A,"seconds":S}
    {"event":"changed","counter":K,"pages":N}
    {"event":"damaged","counter":K,"page":N}                   and the program ends with status 1
    {"event":"secret","bytes":N}
    {"event":"rebooting"} or {"event":"idle"}

The area: page 0 is the header, every other page is a stamp (page number, version) and bytes of a random block that
follows from the header's seed. Page p is changed at counter k when k = p mod 100, so its version follows from the
counter. `pending` in the header says that pages of the next counter are being changed, so that a state in between,
which a snapshot may have caught, is as valid as any other.

Everything but `main` is pure and may be used by tests on the host.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

PAGE = 4096
AREA_SIZE = 32 << 20
AREA_NAME = "demo"
SECRET_SIZE = 64 << 20
CHANGE_EVERY = 100
_HEADER = struct.Struct("<16s32sQQI")  # magic, seed, counter, pending (0: none), CRC-32 of what is before it
_MAGIC = b"PERDURE-DEMO-1\n\0"
_STAMP = struct.Struct("<QQ")
_BLOCK = 1 << 20
_BATCH = 256  # pages that are compared at once


def secret_text(seed: str) -> bytes:
    """The secret of a hexadecimal seed: 128 bytes, of which the guest's volatile memory is full."""
    digest = hashlib.blake2b(bytes.fromhex(seed), digest_size=32).hexdigest()
    return f"PERDURE-SECRET-{digest}".encode().ljust(127, b".") + b"\n"


def block_of(seed: bytes) -> bytes:
    """The random bytes that all pages are cut from."""
    return random.Random(seed).randbytes(_BLOCK)


def page_content(block: bytes, page: int, version: int) -> bytes:
    """What a page holds in a version. Neighbours are cut far from each other, so that they do not compress together."""
    start = (page * 649_657 + version * 7_919) % (_BLOCK - PAGE)
    return _STAMP.pack(page, version) + block[start : start + PAGE - _STAMP.size]


def version_of(page: int, counter: int) -> int:
    """The latest counter up to `counter` at which the page was changed; 0 if it never was."""
    latest = counter - (counter - page) % CHANGE_EVERY
    return max(latest, 0)


def changed_pages(counter: int, pages: int) -> Iterator[int]:
    """The data pages that are changed at a counter (from 1)."""
    return iter(range(counter % CHANGE_EVERY or CHANGE_EVERY, pages, CHANGE_EVERY))


def encode_header(seed: bytes, counter: int, pending: int) -> bytes:
    """The start of page 0."""
    clear = _HEADER.pack(_MAGIC, seed, counter, pending, 0)[:-4]
    return clear + struct.pack("<I", zlib.crc32(clear))


def decode_header(memory: memoryview) -> tuple[bytes, int, int] | None:
    """Seed, counter and pending; None if there is no valid header."""
    raw = bytes(memory[: _HEADER.size])
    magic, seed, counter, pending, checksum = _HEADER.unpack(raw)
    return (seed, counter, pending) if magic == _MAGIC and checksum == zlib.crc32(raw[:-4]) else None


def fill(memory: memoryview, seed: bytes) -> None:
    """The data at counter 0; the header comes last."""
    block = block_of(seed)
    for first in range(0, len(memory) // PAGE, _BATCH):
        pages = range(max(first, 1), min(first + _BATCH, len(memory) // PAGE))
        memory[pages.start * PAGE : pages.stop * PAGE] = b"".join(page_content(block, page, 0) for page in pages)
    memory[: _HEADER.size] = encode_header(seed, 0, 0)


def damaged_page(memory: memoryview) -> int | None:
    """The first page that is not what the header says; None if all are. Page 0 means that there is no header."""
    header = decode_header(memory)
    if header is None:
        return 0
    seed, counter, pending = header
    block = block_of(seed)
    for first in range(0, len(memory) // PAGE, _BATCH):
        pages = range(max(first, 1), min(first + _BATCH, len(memory) // PAGE))
        expected = b"".join(page_content(block, page, version_of(page, counter)) for page in pages)
        found = bytes(memory[pages.start * PAGE : pages.stop * PAGE])
        if found == expected:
            continue
        for index, page in enumerate(pages):
            span = slice(index * PAGE, (index + 1) * PAGE)
            changing = bool(pending) and version_of(page, pending) == pending
            if found[span] != expected[span] and not (changing and found[span] == page_content(block, page, pending)):
                return page
    return None


def advance(memory: memoryview) -> int:
    """Go to the next counter, which must be a verified state's; returns how many pages were changed."""
    header = decode_header(memory)
    if header is None:
        raise ValueError("no header")
    seed, counter, _ = header
    block, count = block_of(seed), 0
    memory[: _HEADER.size] = encode_header(seed, counter, counter + 1)
    for page in changed_pages(counter + 1, len(memory) // PAGE):
        memory[page * PAGE : (page + 1) * PAGE] = page_content(block, page, counter + 1)
        count += 1
    memory[: _HEADER.size] = encode_header(seed, counter + 1, 0)
    return count


def _report(event: str, **facts: Any) -> None:
    line = "PERDURE-DEMO " + json.dumps({"event": event, **facts}, separators=(",", ":"))
    print(line, flush=True)


def _argument(name: str) -> str | None:
    with open("/proc/cmdline", encoding="utf-8") as file:
        for word in file.read().split():
            key, _, value = word.partition("=")
            if key == name:
                return value
    return None


def _survive(memory: memoryview, address: int) -> int:
    """Fill or verify and advance; returns the counter. Raises SystemExit if the data is damaged."""
    started = time.monotonic()
    header = decode_header(memory)
    if header is None:
        fill(memory, os.urandom(32))
        _report("filled", counter=0, address=address, seconds=round(time.monotonic() - started, 2))
        return 0
    counter = header[1] + 1
    damaged = damaged_page(memory)
    if damaged is not None:
        _report("damaged", counter=counter, page=damaged)
        raise SystemExit(1)
    _report("verified", counter=counter, address=address, seconds=round(time.monotonic() - started, 2))
    _report("changed", counter=counter, pages=advance(memory))
    return counter


def _keep_secret(seed: str) -> mmap.mmap:
    """Volatile memory full of the secret."""
    memory = mmap.mmap(-1, SECRET_SIZE)
    piece = secret_text(seed) * (_BLOCK // 128)
    for offset in range(0, SECRET_SIZE, len(piece)):
        memory[offset : offset + len(piece)] = piece
    _report("secret", bytes=SECRET_SIZE)
    return memory


def main() -> int:
    """One boot."""
    import perdure_guest  # only the guest has it on its path

    with perdure_guest.persistent_area(AREA_NAME, AREA_SIZE) as memory:
        tags = perdure_guest.query_persistent_regions()
        counter = _survive(memory, next(tag.address for tag in tags if tag.name == AREA_NAME))
        seed, reboots = _argument("perdure.secret"), _argument("perdure.reboots")
        secret = _keep_secret(seed) if seed else None
        if reboots is not None and counter < int(reboots):
            _report("rebooting")
            os.spawnv(os.P_WAIT, "/bin/busybox", ["reboot", "-f"])
        _report("idle")
        while True:
            time.sleep(3600)
            assert secret is None or len(secret) == SECRET_SIZE  # it stays in memory until the end


if __name__ == "__main__":
    sys.exit(main())
