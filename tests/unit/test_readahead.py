"""What a process has loaded is noted once, and read ahead for the next; nothing that goes wrong with it matters."""

import os
import sys
from pathlib import Path

from vm import readahead
from vm.mappings import own_files

PROGRAM = Path(sys.executable).resolve()


def test_what_a_program_runs_from_is_noted_until_the_program_is_another(tmp_path):
    noted = tmp_path / "files"
    assert readahead.noted_files(noted) == []
    readahead.note(os.getpid(), PROGRAM, noted)
    found = readahead.noted_files(noted)
    assert any("numpy" in str(path) or "libc" in path.name for path in found)
    assert set(found) <= set(own_files(os.getpid()))
    assert all(path.stat().st_size >= 256 << 10 for path in found)

    noted.write_bytes(b"/other")
    readahead.note(os.getpid(), PROGRAM, noted)
    assert readahead.noted_files(noted) == [Path("/other")]
    os.utime(noted, (0, 0))
    readahead.note(os.getpid(), PROGRAM, noted)
    assert readahead.noted_files(noted) == found


def test_what_cannot_be_noted_or_read_is_passed_over(tmp_path):
    readahead.note(1 << 30, PROGRAM, tmp_path / "files")
    readahead.note(os.getpid(), PROGRAM, tmp_path / "no folder" / "files")
    assert not list(tmp_path.iterdir())
    (tmp_path / "files").write_bytes(b"\xff\x00\n/\n\n/none\n")
    readahead.expect(readahead.noted_files(tmp_path / "files"))
