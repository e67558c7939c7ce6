"""What a supervisor says holds it up nowhere, and is all there for who reads it."""

import os
import re
import threading

from base.progress import silent
from perdure.supervision.speaker import Speaker


def read_all(descriptor):
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read().decode().splitlines()


def test_a_reader_that_does_not_read_holds_up_nobody_and_learns_what_it_missed():
    read_end, write_end = os.pipe()
    line = "x" * 4096
    with Speaker(write_end, silent, lines_max=10) as speaker:
        for _ in range(200):  # twelve times what a pipe holds, and then some
            speaker.say(line)
        found = []
        reader = threading.Thread(target=lambda: found.extend(read_all(read_end)))
        reader.start()
    os.close(write_end)
    reader.join()
    said = found.count(line)
    lost = [int(re.fullmatch(r"\((\d+) lines that were not read in time are left out\)", each)[1])
            for each in found if each != line]  # fmt: skip
    assert 10 <= said < 200
    assert said + sum(lost) == 200


def test_lines_come_in_order_and_progress_ends_where_it_ended():
    read_end, write_end = os.pipe()
    seen = []
    with Speaker(write_end, lambda *words: seen.append(words)) as speaker:
        for number in range(500):
            speaker.say(f"line {number}")
            speaker.progress("work", number, 499)
    os.close(write_end)
    assert read_all(read_end) == [f"line {number}" for number in range(500)]
    assert seen[-1] == ("work", 499, 499)


def test_a_reader_that_is_gone_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Speaker(write_end, silent) as speaker:
        speaker.say("nobody hears this")
    assert os.readlink(f"/proc/self/fd/{write_end}") == os.devnull
    os.close(write_end)
