"""What a process has loaded is noted once, and read ahead for the next; nothing that goes wrong with it matters."""

import mmap
import os
import sys
from pathlib import Path

from base.extents import total
from vm import readahead
from vm.mappings import loaded_files

PROGRAM = Path(sys.executable).resolve()
MIB, BLOCK = 1 << 20, 64 << 10


def noted_of(noted: Path) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for line in noted.read_text().splitlines():
        start, size, path = line.split(" ", 2)
        found.setdefault(path, []).append((int(start), int(size)))
    return found


def test_what_a_process_has_touched_of_a_file_is_what_it_has_loaded(tmp_path):
    path = tmp_path / "a file"
    path.touch()
    os.truncate(path, 64 * MIB)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 63 * MIB, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=MIB) as part,
    ):
        assert part[MIB] == part[MIB + 5 * BLOCK] == 0
        found = loaded_files(os.getpid())[path]
        for at in (2 * MIB, 2 * MIB + 5 * BLOCK):
            assert ((found[:, 0] <= at) & (at < found[:, 1])).any()
        assert 2 * 4096 <= total(found) < 32 * MIB  # the kernel maps what is around a page in one go, at most 2 MiB
        assert (found % 4096 == 0).all()
    assert path not in loaded_files(os.getpid())


def test_what_a_program_runs_from_is_noted_until_the_program_is_another(tmp_path):
    noted = tmp_path / "loaded"
    readahead.note(os.getpid(), PROGRAM, noted)
    found = noted_of(noted)
    assert str(PROGRAM) in found and any("numpy" in path for path in found)
    assert all(start % BLOCK == size % BLOCK == 0 < size for parts in found.values() for start, size in parts)
    readahead.expect_noted(noted)

    noted.write_bytes(b"0 0 /other")
    readahead.note(os.getpid(), PROGRAM, noted)
    assert noted_of(noted) == {"/other": [(0, 0)]}
    os.utime(noted, (0, 0))
    readahead.note(os.getpid(), PROGRAM, noted)
    assert noted_of(noted).keys() == found.keys()


def test_what_cannot_be_noted_or_read_is_passed_over(tmp_path):
    readahead.note(1 << 30, PROGRAM, tmp_path / "loaded")
    readahead.note(os.getpid(), PROGRAM, tmp_path / "no folder" / "loaded")
    readahead.expect_noted(tmp_path / "loaded")
    assert not list(tmp_path.iterdir())
    for odd in (
        b"\xff\x00\n/\n\n/none\n",
        b"0 1 /none\n0 1 /\n0 1 a\0b",
        b"-1 5 /dev/zero",
        b"0 %d /etc/passwd" % (1 << 80),
    ):
        (tmp_path / "loaded").write_bytes(odd)
        readahead.expect_noted(tmp_path / "loaded")
