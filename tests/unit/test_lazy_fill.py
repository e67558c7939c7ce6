"""What a lazy restore had not placed is filled in, however often whoever does that is killed."""

import os
import random
import signal
from pathlib import Path

import pytest
from store_fixtures import Place, add, place

from base.errors import ConflictError
from restore.claims import Claims
from restore.lazy_fill import fill

PAGE = 4096
CONTENT = {name: random.Random(name).randbytes(8 * PAGE) for name in ("ram", "pm0")}
SIZE = 12 * PAGE


@pytest.fixture
def where():
    with place() as made:
        yield made


def begun(where: Place) -> Path:
    """A memory folder of which nothing has been placed."""
    folder = where.root / "memory"
    folder.mkdir()
    with where.open() as repository:
        whole = {name: bytes(2 * PAGE) + content + bytes(2 * PAGE) for name, content in CONTENT.items()}
        generation = add(repository, "vm", whole)
    for name in CONTENT:
        with (folder / f"{name}.memory").open("wb") as file:
            file.truncate(SIZE)
    Claims.create(folder, "vm", generation, {name: (f"{name}.memory", SIZE) for name in CONTENT}).close()
    return folder


def killed(where: Place, folder: Path, writes: int, *, after: bool) -> None:
    """Fill it in another process, which is killed at that write, before or just after it."""
    pid = os.fork()
    if not pid:
        try:
            write, left = os.pwrite, writes

            def last(descriptor, data, offset):
                nonlocal left
                left -= 1
                if not left and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                count = write(descriptor, data, offset)
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return count

            with where.open() as repository:
                os.pwrite = last
                fill(repository, folder, list(CONTENT))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def placed(folder: Path) -> int:
    return sum((folder / f"{name}.memory").stat().st_blocks * 512 // PAGE for name in CONTENT)


@pytest.mark.parametrize("after", [False, True])
def test_whoever_fills_in_may_be_killed_at_any_write(where, after):
    folder = begun(where)
    for done in range(1, 16):  # each one more page, of both regions
        killed(where, folder, 1 if after else 2, after=after)
        assert placed(folder) == done
    with where.open() as repository:
        fill(repository, folder, list(CONTENT))
    for name, content in CONTENT.items():
        assert (folder / f"{name}.memory").read_bytes() == bytes(2 * PAGE) + content + bytes(2 * PAGE)
    assert sorted(each.name for each in folder.iterdir()) == ["pm0.memory", "ram.memory"]


def test_a_page_that_nobody_of_us_has_placed_is_told_from_the_one_that_somebody_placed_last(where):
    folder = begun(where)
    killed(where, folder, 3, after=True)
    with (folder / "pm0.memory").open("r+b") as file:
        file.seek(4 * PAGE)
        file.write(b"somebody else's")
    with where.open() as repository, pytest.raises(ConflictError, match="page 4 of region pm0"):
        fill(repository, folder, list(CONTENT))
